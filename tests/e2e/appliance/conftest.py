"""One whole appliance for every test of this folder: the real command, gateway, database and vLLM."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import openai
import pytest

READY_WITHIN_S = 280
IDLE_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Appliance:
    """An appliance that runs, and the demonstration's key to it.

    Attributes:
        shown: what its start printed for a person, as `make run` does; empty: it was started for a program.
        said: what it said of its progress meanwhile.
    """

    state_dir: Path
    endpoint: str
    api_key: str
    shown: str = ""
    said: str = ""

    def run(self, *arguments: str, check: bool = True) -> Any:
        """The JSON that a `holdfast` command prints."""
        return holdfast(self.state_dir, arguments, check=check)

    def client(self, api_key: str | None = None) -> openai.OpenAI:
        """The openai SDK, pointed here."""
        return openai.OpenAI(base_url=self.endpoint, api_key=api_key or self.api_key, max_retries=0, timeout=60)

    def wait_until(self, wanted: Callable[[Any], bool], deadline_s: float = 60.0) -> Any:
        """The first status that is as wanted."""
        end = time.monotonic() + deadline_s
        while time.monotonic() < end:
            status = self.run("status", check=False)
            if wanted(status):
                return status
        raise AssertionError(f"not within {deadline_s} s; the last status was {status}")

    def files(self) -> bytes:
        """Every byte of the database's files."""
        return b"".join(path.read_bytes() for path in sorted(self.state_dir.glob("holdfast.db*")))


def holdfast(
    state_dir: Path,
    arguments: Sequence[str],
    *,
    check: bool = True,
    settings: Mapping[str, str] = MappingProxyType({}),
    timeout_s: float = READY_WITHIN_S,
) -> Any:
    """The JSON that a command prints; `settings` as the environment has them."""
    return json.loads(
        run(state_dir, ("--json", *arguments), check=check, settings=settings, timeout_s=timeout_s).stdout
    )


def run(
    state_dir: Path,
    arguments: Sequence[str],
    *,
    check: bool = True,
    settings: Mapping[str, str] = MappingProxyType({}),
    timeout_s: float = READY_WITHIN_S,
) -> "subprocess.CompletedProcess[str]":
    """Run the command as a person would."""
    command = [str(Path(sys.executable).with_name("holdfast")), "--state-dir", str(state_dir), *arguments]
    environment = {
        **os.environ,
        "HOLDFAST_GATEWAY__PORT": "0",
        "HOLDFAST_SESSIONS__IDLE_TIMEOUT_S": str(IDLE_TIMEOUT_S),
        "HOLDFAST_ENGINE__KV_CACHE_BYTES": str(128 << 20),
        **settings,
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    if check and done.returncode != 0:
        raise AssertionError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
    return done


@pytest.fixture(scope="session")
def appliance(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    state_dir = tmp_path_factory.mktemp("appliance") / "state"
    started = run(state_dir, ("up", "--demo", "--detach", "--timeout", "270"))
    shown = dict(re.findall(r"^  (endpoint|API key) +(\S+)", started.stdout, re.MULTILINE))
    yield Appliance(state_dir, shown["endpoint"], shown["API key"], started.stdout, started.stderr)
    holdfast(state_dir, ("down",))
