"""What an event carries, and the protocol that every format keeps.

Rules:

- A format is pure, a function of the log's origin, the entry and the record alone: the same event whenever and wherever
  it is made. So a receiver makes it again from the entry and the record that it carries: `Format.read`.
- Every event carries its proof: origin, sequence, leaf hash, the entry's bytes, the canonical record and the salt that
  opens the entry's commitment to it; and the number of its mapping: another mapping is another number.
- A record that cannot be had or would not fit is withheld, and the event says so: the entry is never skipped.
- An event is one line: whatever a field holds, it ends no line and begins none, and ends no field either.
"""

import base64
import binascii
import enum
from typing import Any, ClassVar, NamedTuple, Protocol

from appliance.audit.entry import canonical
from appliance.audit.siem.transport import Message
from appliance.errors import Fault, HoldfastError


class EventInvalid(HoldfastError, ValueError):
    """An event is not what the log's entry and record make."""

    code: ClassVar[str] = "audit_event_invalid"
    fault: ClassVar[Fault] = Fault.CONFLICT


class Withheld(enum.StrEnum):
    """Why an event carries no record."""

    SHREDDED = "shredded"  # its key was destroyed
    TOO_LONG = "too long"  # the event would not fit into one message
    DAMAGED = "damaged"  # the record on the appliance's disk is not the one of the entry, or none that can be read


class Disclosed(NamedTuple):
    """An entry with its record, or with why it is withheld.

    Attributes:
        packed: the entry's bytes, which its leaf hashes.
        content: the canonical record; None: withheld.
    """

    packed: bytes
    content: bytes | None
    salt: bytes
    withheld: Withheld | None = None

    @classmethod
    def of(cls, packed: bytes, record: dict[str, Any], salt: bytes) -> "Disclosed":
        """An entry whose record was opened."""
        return cls(packed, canonical(record), salt)

    @classmethod
    def without(cls, packed: bytes, why: Withheld) -> "Disclosed":
        """An entry without its record."""
        return cls(packed, None, b"", why)


class CheckpointEvent(NamedTuple):
    """A signed checkpoint, and what proves it from the entries [start, end) alone.

    Attributes:
        size: how many entries it names.
        peaks: the roots of the complete subtrees of the first `start` leaves, the largest first.
        end: None: the size. A shipper's always is; an excerpt of the log may end before.
        rest: the roots of the complete subtrees that cover [end, size), from left to right.
    """

    note: str
    start: int
    size: int
    peaks: tuple[bytes, ...]
    end: int | None = None
    rest: tuple[bytes, ...] = ()


class Carried(NamedTuple):
    """What an event carries. `content` None: it is a trial."""

    origin: str
    content: Disclosed | CheckpointEvent | None


class Format(Protocol):
    """How an event is written: one of the SIEM's own languages."""

    @property
    def name(self) -> str:
        """What a destination calls it."""

    def entry(self, origin: str, disclosed: Disclosed) -> Message:
        """The event of an entry.

        Raises:
            EntryInvalid: the bytes are no entry.
            EventInvalid: the record is no record of ours.
        """

    def checkpoint(self, origin: str, checkpoint: CheckpointEvent, wall_ms: int) -> Message:
        """The event that carries a checkpoint behind the entries that it names."""

    def trial(self, origin: str, wall_ms: int) -> Message:
        """The event that a destination is tried with: no entry of the log."""

    def find(self, line: str) -> int:
        """Where in a line that a receiver wrote an event of this format begins; -1: nowhere."""

    def read(self, text: str) -> Carried:
        """What an event carries, once it was made again from that and is the same.

        Args:
            text: the line from where `find` said, without its end.

        Raises:
            EventInvalid: it is no event of ours, or one that was altered.
            EntryInvalid: its record is not the one that its entry commits to.
        """


def stable_id(origin: str, sequence: int) -> str:
    """What an entry's event is known by, in every format."""
    return f"{origin}/{sequence}"


def checkpoint_id(origin: str, checkpoint: CheckpointEvent) -> str:
    """What a checkpoint's event is known by, in every format."""
    part = "" if checkpoint.end is None else f"/{checkpoint.end}"
    return f"{origin}/checkpoint/{checkpoint.start}-{checkpoint.size}{part}"


def trial_id(origin: str, wall_ms: int) -> str:
    """What a trial is known by, in every format."""
    return f"{origin}/test/{wall_ms}"


def invalid(cause: str) -> EventInvalid:
    """What an event that is not ours, or was altered, means to a person."""
    return EventInvalid(
        "this is no event of an audit log",
        cause=cause,
        remedy="Keep the file as it is, and compare it with the log: `holdfast audit show NUMBER` at the appliance",
    )


def to_base64(data: bytes) -> str:
    """Bytes as a proof writes them."""
    return base64.b64encode(data).decode()


def from_base64(text: object) -> bytes:
    """The bytes of a part of a proof.

    Raises:
        EventInvalid: it is no base64.
    """
    try:
        return base64.b64decode(str(text), validate=True)
    except (binascii.Error, ValueError):
        raise invalid("a part of its proof is not base64") from None
