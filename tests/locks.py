"""The lock files as tests read them, and whether one is complete.

Locks are installed without resolution, so nothing else would notice that a requirement of a requirement is missing.
"""

import importlib.metadata
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
# The oldest and the newest Python that a lock has to serve: Debian 12's, Ubuntu 24.04's, and both series' ends.
PYTHONS = ("3.11.0", "3.11.2", "3.11.14", "3.12.3", "3.12.12")


@dataclass(frozen=True)
class Pin:
    """One requirement of a lock."""

    name: str
    version: str
    marker: str
    hashes: frozenset[str]


def pins(lock: str) -> dict[str, Pin]:
    """Every requirement of `requirements/LOCK.txt`, by name."""
    return {pin.name: pin for pin in _parsed((REQUIREMENTS / f"{lock}.txt").read_text(encoding="utf-8"))}


def _parsed(text: str) -> Iterator[Pin]:
    uncommented = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    for logical in uncommented.replace("\\\n", " ").splitlines():
        requirement, *hashes = logical.split(" --hash=")
        stated, _, marker = requirement.partition(";")
        name, _, version = stated.strip().partition("==")
        yield Pin(canonicalize_name(name), version, marker.strip(), frozenset(part.strip() for part in hashes))


def unmet(lock: dict[str, Pin], python: str, *, unwanted: frozenset[str] = frozenset()) -> list[str]:
    """What the packages of a lock, as installed here, ask for on `python` that the lock does not have.

    Args:
        unwanted: names that are asked for and left out on purpose.
    """
    machine: dict[str, str] = {
        **{name: str(value) for name, value in default_environment().items()},
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "implementation_version": python,
    }
    found = []
    reached: set[tuple[str, str]] = set()
    to_visit = [(name, "") for name in lock]
    while to_visit:
        name, extra = to_visit.pop()
        if (name, extra) in reached:
            continue
        reached.add((name, extra))
        for line in importlib.metadata.requires(name) or ():
            wanted = Requirement(line)
            if wanted.marker is not None and not wanted.marker.evaluate({**machine, "extra": extra}):
                continue
            needed = canonicalize_name(wanted.name)
            if needed in unwanted:
                continue
            if needed not in lock:
                found.append(f"{name} asks for {line}, which is not locked")
            elif not wanted.specifier.contains(lock[needed].version, prereleases=True):
                found.append(f"{name} asks for {line}, and {lock[needed].version} is locked")
            else:
                to_visit += [(needed, asked) for asked in wanted.extras]
    return found
