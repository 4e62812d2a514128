"""Reading what came over a wire: each field checked for its type and its range, and nothing beside those expected.

Rules:

- Standard library only, as `protocol` and `picture`, which are read with this.
- What is refused raises `MalformedMessage`, which says what was expected and never repeats what was found.
"""

import functools
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import ClassVar, Final

from appliance.errors import Fault, HoldfastError

LABEL: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LARGEST: Final = sys.float_info.max


class MalformedMessage(HoldfastError, ValueError):
    """A message about leases is not what this version of the protocol writes."""

    code: ClassVar[str] = "engine_message_malformed"
    fault: ClassVar[Fault] = Fault.INTERNAL

    def __init__(self, expected: str) -> None:
        super().__init__(
            "a message between the gateway and the engine is malformed",
            cause=f"expected {expected}",
            remedy="Install the same version of holdfast in the gateway's and in the engine's environment",
        )


def record(value: object, shape: type) -> Mapping[str, object]:
    """An object with the fields of a dataclass and no other."""
    names = _names(shape)
    if not isinstance(value, Mapping) or value.keys() != names:
        raise MalformedMessage(f"an object with the fields {', '.join(sorted(names))} and no other")
    return value


def label(record: Mapping[str, object], name: str) -> str:
    """A label: it names a session, a tenant or a turn and says nothing of it."""
    value = record[name]
    if not isinstance(value, str) or not LABEL.fullmatch(value):
        raise MalformedMessage(f"{name}: 1 to 64 letters, digits, dots, dashes or underscores")
    return value


def flag(record: Mapping[str, object], name: str) -> bool:
    """True or false."""
    value = record[name]
    if not isinstance(value, bool):
        raise MalformedMessage(f"{name}: true or false")
    return value


def one_of(record: Mapping[str, object], name: str, values: Sequence[str]) -> str:
    """One of some words."""
    value = record[name]
    if not isinstance(value, str) or value not in values:
        raise MalformedMessage(f"{name}: one of {', '.join(repr(each) for each in values)}")
    return value


def count(record: Mapping[str, object], name: str) -> int:
    """A whole number, not negative."""
    value = record[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise MalformedMessage(f"{name}: a whole number, not negative")
    return value


def number(record: Mapping[str, object], name: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number within bounds."""
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise MalformedMessage(f"{name}: a number")
    # The comparison is exact for whole numbers of any size, and false for what is not a number.
    if not max(low, -_LARGEST) <= value <= min(high, _LARGEST):
        raise MalformedMessage(f"{name}: a finite number between {low:g} and {high:g}")
    return float(value)


def read_json(body: bytes) -> object:
    """What a body says, as JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise MalformedMessage("a JSON object") from None


@functools.cache
def _names(shape: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(shape))
