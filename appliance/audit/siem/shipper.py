"""Carries the log to one destination, in its order, and goes on from where it was.

Rules:

- At least once. Syslog over TLS has no acknowledgement: what a connection took may be lost with the receiver that had
  not written it down yet. So an entry counts as delivered only when its connection has lived `SETTLE_S` longer; when a
  connection ends, everything younger is sent again over the next one, and so it is after a restart. Whoever receives
  an event twice knows it by its stable id. `SETTLE_S` is longer than the transport's own deadline: what counts as
  delivered was acknowledged by the receiver's kernel at least. What a receiver keeps only in memory for longer, and
  loses, this cannot know: it must write down what it took within that time.
- What is known to be delivered is in the cursor, which is never ahead of it.
- A destination that is down, slow or silent is tried again, ever more seldom, with jitter. Nobody waits for it: what it
  has not got stays in the log. Whatever goes wrong here is told in `view`, and ends nothing.
- Bounded: so many entries are read ahead, so many are made at a time, and it rests as long as it worked, so that the
  loop that it runs in is free for what the appliance is for.
- A tenant's record whose key was shredded is sent without content. One that waits for the vault to be opened waits,
  and all that follow it; what is in plaintext before it goes.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from appliance.audit.entry import AuditKeys, Entry, EntryInvalid, open_record
from appliance.audit.journal import Frame
from appliance.audit.reading import LogReader
from appliance.audit.siem import ocsf, syslog
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.signing import public_key
from appliance.audit.tree import Frontier
from appliance.errors import ErrorRecord, Fault, HoldfastError
from appliance.vault import KeyMissing, VaultSealed

SETTLE_S: Final = 3 * syslog.DEADLINE_S
_READ_AHEAD: Final = 256
_MADE_AT_ONCE: Final = 16  # about a millisecond of the loop
_POLL_S: Final = 0.25
_MARK_EVERY_S: Final = 1.0
_SAVE_EVERY_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 60.0
_LIVED_S: Final = 10.0  # a connection that lived so long begins the pauses anew
_REFUSED_WITHIN_S: Final = 2.0  # with TLS 1.3 a receiver refuses our certificate after its handshake
_LOG = logging.getLogger("holdfast.audit.siem")


class LogShorter(HoldfastError):
    """The log has fewer entries than were sent."""

    code: ClassVar[str] = "audit_export_log_shorter"
    fault: ClassVar[Fault] = Fault.CONFLICT


class Sending(Protocol):
    """A connection, as the shipper needs it: `syslog.Connection`."""

    async def send(self, frames: list[bytes]) -> None:
        """See `syslog.Connection.send`."""

    def check(self) -> None:
        """See `syslog.Connection.check`."""

    async def ended_within(self, seconds: float) -> bool:
        """See `syslog.Connection.ended_within`."""

    async def close(self, *, in_good_order: bool = False) -> None:
        """See `syslog.Connection.close`."""


Connect = Callable[[syslog.Receiver], Awaitable[Sending]]


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the log goes to.

    Attributes:
        max_message_bytes: an event that is longer goes without its record.
        host: what we are called in messages.
    """

    name: str
    receiver: syslog.Receiver
    max_message_bytes: int
    host: str


@dataclass(frozen=True, slots=True)
class View:
    """How a destination is.

    Attributes:
        sent: entries that went over the connection there is; without one, those that are delivered.
        delivered: entries that need not be sent again.
        lag_entries: those that are not sent.
        lag_s: how old the oldest of them is.
        waits_for: what it waits for, when it is no error: the vault.
    """

    name: str
    receiver: str
    connected: bool
    sent: int
    delivered: int
    lag_entries: int
    lag_s: float
    waits_for: str
    error: ErrorRecord | None


class _Mark(NamedTuple):
    """Everything before `position` was sent between two moments."""

    begun_s: float
    ended_s: float
    position: Position


class Shipper:
    """One destination's way through the log in `directory`.

    Args:
        cursor_path: where it keeps how far it is.
        size: how many entries the appender has answered for.
        keys: open records; may raise `VaultSealed`.
        monotonic, wall_s: clocks, seconds.
    """

    def __init__(
        self,
        destination: Destination,
        directory: Path,
        cursor_path: Path,
        *,
        size: Callable[[], Awaitable[int]],
        keys: AuditKeys,
        connect: Connect = syslog.connect,
        monotonic: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        random: Random | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        settle_s: float = SETTLE_S,
    ) -> None:
        self.destination = destination
        self._directory = directory
        self._cursor_path = cursor_path
        self._ask_size = size
        self._keys = keys
        self._connect = connect
        self._monotonic = monotonic
        self._wall_s = wall_s
        self._random = random or Random()  # noqa: S311  (jitter)
        self._pause = pause
        self._settle_s = settle_s
        self._cursor: Cursor | None = None
        self._origin = ""
        self._reader: LogReader | None = None
        self._size = 0
        self._oldest_ns: int | None = None
        self._position = self._delivered = self._saved = Position()
        self._saved_at_s = 0.0
        self._marks: deque[_Mark] = deque()
        self._checkpoint: tuple[str, int] | None = None  # signed, and its entries are not all sent
        self._connected = False
        self._failures = 0
        self._waits_for = ""
        self._error: ErrorRecord | None = None

    def view(self) -> View:
        """How it is now."""
        waiting = max(0, self._size - self._position.next)
        oldest_s = None if self._oldest_ns is None or not waiting else self._oldest_ns / 1e9
        return View(
            name=self.destination.name,
            receiver=str(self.destination.receiver),
            connected=self._connected,
            sent=self._position.next,
            delivered=self._delivered.next,
            lag_entries=waiting,
            lag_s=0.0 if oldest_s is None else max(0.0, self._wall_s() - oldest_s),
            waits_for=self._waits_for,
            error=self._error,
        )

    async def run(self) -> None:
        """Ship until cancelled."""
        try:
            while True:
                begun_s = self._monotonic()
                try:
                    await self._take_up()
                    await self._ship()
                except HoldfastError as error:
                    self._failed(error, begun_s)
                except Exception as error:  # a defect of ours, or of the disk: it must not end the gateway
                    _LOG.exception("%s: the export failed", self.destination.name)
                    self._failed(_defect(error), begun_s)
                with contextlib.suppress(HoldfastError, OSError):
                    await self._look()
                await self._pause(self._pause_s())
        finally:
            if self._delivered != self._saved and self._cursor is not None:
                with contextlib.suppress(OSError):
                    self._cursor.save(self._delivered)

    async def try_out(self) -> None:
        """Send an event that says it is a test, over a connection of its own.

        Raises:
            ExportUnreachable: it was not taken; says why.
            ExportUnusable: our certificates cannot be used.
        """
        origin = (await asyncio.to_thread(public_key, self._directory)).name
        connection = await self._connect(self.destination.receiver)
        try:
            await connection.send([self._framed(ocsf.trial_event(origin, int(self._wall_s() * 1000)))])
            if await connection.ended_within(_REFUSED_WITHIN_S):
                connection.check()
        finally:
            await connection.close(in_good_order=True)

    # Where it is

    async def _take_up(self) -> None:
        """Go to what is delivered for certain."""
        if self._cursor is None:
            self._origin = (await asyncio.to_thread(public_key, self._directory)).name
            cursor = Cursor(self._cursor_path, self._origin)
            self._delivered = self._saved = await asyncio.to_thread(cursor.load)
            self._size = await self._ask_size()
            self._reader = await asyncio.to_thread(LogReader, self._directory, self._size)
            self._cursor = cursor
        self._position = self._delivered
        self._marks.clear()
        self._checkpoint = None

    async def _look(self) -> list[Frame]:
        """What there is to send next, at most `_READ_AHEAD` entries."""
        self._size = await self._ask_size()
        frames = await asyncio.to_thread(self._read)
        self._oldest_ns = Entry.unpack(frames[0].entry).wall_ns if frames else None
        return frames

    def _read(self) -> list[Frame]:
        reader = self._reader
        if reader is None:
            return []
        reader.refresh(self._size)
        if max(self._position) > self._size:
            raise LogShorter(
                f"{self.destination.name} has more of the log than there is",
                cause=f"{max(self._position)} entries were sent, and the log has {self._size}",
                remedy="An older copy of the log was put back: keep what the SIEM has. To send this one from its "
                f"beginning, stop the appliance and remove {self._cursor_path}",
            )
        if self._checkpoint is None and reader.published > self._position.checkpoint:
            self._checkpoint = (reader.note, reader.published)
        first = self._position.next
        return [reader.frame(sequence) for sequence in range(first, min(first + _READ_AHEAD, self._size))]

    async def _sent(self, position: Position) -> None:
        now_s = self._monotonic()
        self._position = position
        if self._marks and now_s < self._marks[-1].begun_s + _MARK_EVERY_S:
            begun_s = self._marks.pop().begun_s
        else:
            begun_s = now_s
        self._marks.append(_Mark(begun_s, now_s, position))
        await self._settle()

    async def _settle(self) -> None:
        """What the connection outlived is delivered."""
        now_s = self._monotonic()
        while self._marks and self._marks[0].ended_s + self._settle_s <= now_s:
            self._delivered = self._marks.popleft().position
        if self._delivered != self._saved and self._cursor is not None and now_s >= self._saved_at_s + _SAVE_EVERY_S:
            await asyncio.to_thread(self._cursor.save, self._delivered)
            self._saved, self._saved_at_s = self._delivered, now_s

    # Shipping

    async def _ship(self) -> None:
        connection = await self._connect(self.destination.receiver)
        self._connected = True
        try:
            while True:
                connection.check()
                frames = await self._look()
                done = 0
                while done < len(frames):
                    taken = await self._send_some(connection, frames[done : done + _MADE_AT_ONCE])
                    if not taken:
                        break
                    done += taken
                if self._checkpoint is not None and self._checkpoint[1] <= self._position.next:
                    await self._send_checkpoint(connection, *self._checkpoint)
                if done < _READ_AHEAD:
                    await self._settle()
                    if await connection.ended_within(_POLL_S):
                        connection.check()
        finally:
            self._connected = False
            await connection.close()

    async def _send_some(self, connection: Sending, frames: list[Frame]) -> int:
        """Send some entries; how many. It rests as long as the making took."""
        begun_s = self._monotonic()
        made: list[bytes] = []
        self._waits_for = ""
        try:
            for frame in frames:
                made.append(self._made(frame))  # noqa: PERF401  (those before a sealed one are kept)
        except VaultSealed:
            self._waits_for = "the vault is sealed: what follows cannot be read until it is opened"
        took_s = self._monotonic() - begun_s
        if made:
            await connection.send(made)
            self._error = None
            await self._sent(self._position._replace(next=self._position.next + len(made)))
            await self._pause(took_s)
        return len(made)

    async def _send_checkpoint(self, connection: Sending, note: str, size: int) -> None:
        start = self._position.checkpoint
        peaks = await asyncio.to_thread(self._peaks, start)
        event = ocsf.checkpoint_event(
            self._origin, ocsf.CheckpointEvent(note, start, size, peaks), int(self._wall_s() * 1000)
        )
        await connection.send([self._framed(event)])
        self._checkpoint = None
        await self._sent(self._position._replace(checkpoint=size))

    def _peaks(self, start: int) -> tuple[bytes, ...]:
        assert self._reader is not None  # noqa: S101  (there is a checkpoint, which it has read)
        return Frontier.read(self._reader.hashes(), start).peaks

    def _made(self, frame: Frame) -> bytes:
        made = self._framed(ocsf.entry_event(self._origin, self._disclosed(frame)))
        if len(made) > self.destination.max_message_bytes:
            withheld = ocsf.Disclosed.without(frame.entry, ocsf.Withheld.TOO_LONG)
            made = self._framed(ocsf.entry_event(self._origin, withheld))
        return made

    def _disclosed(self, frame: Frame) -> ocsf.Disclosed:
        try:
            opened = open_record(Entry.unpack(frame.entry), frame.sealed, self._keys)
        except KeyMissing:
            return ocsf.Disclosed.without(frame.entry, ocsf.Withheld.SHREDDED)
        except EntryInvalid:
            return ocsf.Disclosed.without(frame.entry, ocsf.Withheld.DAMAGED)
        return ocsf.Disclosed.of(frame.entry, opened.record, opened.salt)

    def _framed(self, event: dict[str, Any]) -> bytes:
        metadata = event["metadata"]
        return syslog.frame(
            syslog.message(
                ocsf.line_of(event),
                wall_ms=event["time"],
                severity_id=event["severity_id"],
                host=self.destination.host,
                kind=metadata["event_code"],
            )
        )

    # Failing

    def _failed(self, error: HoldfastError, begun_s: float) -> None:
        if self._error is None or self._error["cause"] != error.cause:
            _LOG.warning("%s: %s", self.destination.name, error)
        self._error = error.record()
        self._position = self._delivered
        self._failures = 1 if self._monotonic() >= begun_s + _LIVED_S else self._failures + 1

    def _pause_s(self) -> float:
        """Twice as long each time, and a random part of that: those who lost one receiver do not all come at once."""
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 16))
        return longest_s * (0.5 + self._random.random() / 2)


def _defect(error: Exception) -> HoldfastError:
    return HoldfastError(
        "the export failed",
        cause=f"{type(error).__name__}: {error}"[:300],
        remedy="`holdfast logs gateway` has the trace; events wait in the log",
    )
