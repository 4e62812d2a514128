"""What carries messages to a destination: the protocol that every transport keeps, and its errors.

Rules:

- A transport takes bytes and says when it cannot. It knows nothing of the log, of formats or of where a destination is.
- Messages of one connection stay in their order. What a connection took may come again over the next one, never less.
- Every wait has a deadline of the transport's own; so has a receiver that acknowledges nothing: `check` raises then.
- What waits in a connection is bounded by what one `send` was given and what the receiver has not acknowledged.
- An unexpected error is a defect. What a network, a receiver or a file system does raises one of the two errors here.
"""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

from appliance.errors import Fault, HoldfastError


class ExportUnreachable(HoldfastError, ConnectionError):
    """A destination takes nothing now: trying again may help."""

    code: ClassVar[str] = "audit_export_unreachable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class ExportUnusable(HoldfastError, ValueError):
    """What we need for a destination (certificates, a token, a folder) cannot be used: somebody has to mend it."""

    code: ClassVar[str] = "audit_export_unusable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class Message(NamedTuple):
    """One event, in the format of its destination.

    Attributes:
        payload: one line without its end: printable characters, UTF-8.
        wall_ms: when it happened, epoch milliseconds.
        severity_id: OCSF's: 1 informational, 2 low, 3 medium.
        kind: its action, `turn.admitted` say.
        stable_id: what it is known by, however often it is sent.
    """

    payload: bytes
    wall_ms: int
    severity_id: int
    kind: str
    stable_id: str


class Connection(Protocol):
    """A way to a receiver that is open. Made by `Transport.connect`, used by one task."""

    @property
    def acknowledged(self) -> int | None:
        """How many messages of this connection, counted from its first, the receiver has said that it keeps.

        None: the transport knows no acknowledgement. Then what arrived counts as delivered once the connection has
        outlived it by long enough (`shipper.SETTLE_S`).
        """

    def arrived(self) -> int:
        """How many messages of this connection, counted from its first, are with the receiver's machine for certain.

        Looked at where `acknowledged` is None. What `send` handed to our kernel may lie there for as long as a receiver
        that reads slowly leaves it there.
        """

    async def send(self, messages: Sequence[Message]) -> None:
        """Hand messages over; the kernel or the receiver has taken them when this returns.

        Raises:
            ExportUnreachable: it is not known which of them arrived.
        """

    def check(self) -> None:
        """See that it is open still.

        Raises:
            ExportUnreachable: it has ended, or the receiver acknowledges nothing; says why.
        """

    async def ended_within(self, seconds: float) -> bool:
        """Wait for its end, at most so long; whether it came: `check` says why."""

    async def close(self, *, in_good_order: bool = False) -> None:
        """Close it, within a second or so, and raise nothing.

        `in_good_order`: everything sent is to be kept; tell the receiver so if the transport can.
        """


class Transport(Protocol):
    """Where to and how. Holds nothing open; `str` of it says where to, for people, without a secret."""

    @property
    def max_payload_bytes(self) -> int:
        """The longest payload that it can carry: an event that is longer goes without its record."""

    @property
    def messages_at_once(self) -> int:
        """How many messages `send` is given at most: as many as make one request, where it makes requests."""

    async def connect(self) -> Connection:
        """Open a connection.

        Raises:
            ExportUnreachable: nobody answers, or not whom we know.
            ExportUnusable: what we show or trust cannot be used.
        """
