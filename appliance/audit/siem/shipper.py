"""Carries the log to one destination, in its order, and goes on from where it was.

Rules:

- At least once. An entry counts as delivered when the receiver said so; where the transport knows no acknowledgement
  (plain syslog), once its connection has lived `SETTLE_S` longer than the entry was seen to have arrived there. When a
  connection ends, what is not delivered is sent again over the next one, and so it is after a restart. Whoever receives
  an event twice knows it by its stable id. So what counts as delivered was acknowledged by the receiver's kernel at
  least, however slowly the receiver reads. What that keeps only in memory for longer, and loses, this cannot know.
- Without an acknowledgement that is authenticated (plain syslog) this holds against outages only: whoever is on the
  line can take everything, forward nothing and keep the connection, and all of it counts as delivered. RELP, HEC and
  Elasticsearch answer inside TLS. What is missing is found at the receiver, by `verify_export` with a checkpoint from
  elsewhere.
- What is known to be delivered is in the cursor, which is never ahead of it. It names the last entry by its hash, too:
  a log with another one there is an older copy that was put back, however long it has become, and is not sent.
- A destination that is down, slow or silent is tried again, ever more seldom, with jitter. Nobody waits for it: what it
  has not got stays in the log. Whatever goes wrong here is told in `view`, and ends nothing. It is told until the
  receiver has all there is, or more than it failed with: not until it merely answers again.
- Bounded: so many entries are read and opened ahead, so many may be sent and not acknowledged.
- A tenant's record whose key was shredded is sent without content; so is one that no format can be made of: what is
  behind it does not wait for ever. One that waits for the vault to be opened waits,
  and all that follow it; what is in plaintext before it goes.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import ClassVar, Final, NamedTuple, Protocol

from appliance.audit.entry import Entry
from appliance.audit.following import LogFollower, Published
from appliance.audit.journal import Frame
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.formats import CheckpointEvent, Disclosed, EventInvalid, Format, Withheld
from appliance.audit.siem.transport import Connection, ExportUnreachable, Message, Transport
from appliance.audit.signing import public_key
from appliance.audit.tree import leaf_hash
from appliance.errors import ErrorRecord, Fault, HoldfastError

SETTLE_S: Final = 60.0
MOST_UNACKNOWLEDGED: Final = 8192  # messages
_MOST_PER_S: Final = 8000  # entries: whoever catches up leaves the processors to those who serve
_READ_AHEAD: Final = 512
_POLL_S: Final = 0.2
_MARK_EVERY_S: Final = 1.0
_SAVE_EVERY_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 60.0
_LIVED_S: Final = 10.0  # a connection that lived so long begins the pauses anew
_REFUSED_WITHIN_S: Final = 2.0  # with TLS 1.3 a receiver refuses our certificate after its handshake
_TRIAL_S: Final = 30.0  # for a test to be acknowledged
_LOG = logging.getLogger("holdfast.audit.siem")


class LogShorter(HoldfastError):
    """The log has fewer entries than were sent, or others in their place."""

    code: ClassVar[str] = "audit_export_log_shorter"
    fault: ClassVar[Fault] = Fault.CONFLICT


class CursorUnsaved(HoldfastError, OSError):
    """How far a destination is cannot be kept; it is sent to all the same."""

    code: ClassVar[str] = "audit_export_cursor_unsaved"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class Opener(Protocol):
    """Who opens records for a shipper."""

    async def open(self, frames: Sequence[Frame]) -> list[Disclosed]:
        """Entries with their records, in their order; fewer: the next one waits for the vault to be opened."""


@dataclass(frozen=True, slots=True)
class View:
    """How a destination is.

    Attributes:
        to: where it is, for people.
        sent: entries that went over the connection there is; without one, those that are delivered.
        delivered: entries that need not be sent again.
        of_this_log: whether those are seen to be this log's: another may have taken its place.
        lag_entries: those that are not sent.
        lag_s: how old the oldest of them is, or how long ago it was seen that there was none.
        waits_for: what it waits for, when it is no error: the vault.
        error: what is in the way.
        last_error: what was in the way last, since the exporter began, and when, epoch seconds; None: nothing was.
    """

    name: str
    to: str
    format: str
    connected: bool
    sent: int
    delivered: int
    of_this_log: bool
    lag_entries: int
    lag_s: float
    waits_for: str
    error: ErrorRecord | None
    last_error: ErrorRecord | None = None
    last_error_s: float | None = None


class _Mark(NamedTuple):
    """Everything before `position` was sent between two moments, as the first `messages` of the connection.

    Where nothing more will be known than that it arrived, `ended_s` is when that was seen.
    """

    begun_s: float
    ended_s: float
    messages: int
    position: Position


class Shipper:
    """One destination's way through the log in `directory`.

    Args:
        name: what the destination is called.
        cursor: where it keeps how far it is.
        size: how many entries the appender has answered for.
        opener: opens records.
        monotonic, wall_s: clocks, seconds.
    """

    def __init__(
        self,
        name: str,
        form: Format,
        transport: Transport,
        directory: Path,
        cursor: Path,
        *,
        size: Callable[[], Awaitable[int]],
        opener: Opener,
        monotonic: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        random: Random | None = None,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        settle_s: float = SETTLE_S,
    ) -> None:
        self.name = name
        self._format = form
        self._transport = transport
        self._directory = directory
        self._cursor_path = cursor
        self._ask_size = size
        self._opener = opener
        self._monotonic = monotonic
        self._wall_s = wall_s
        self._random = random or Random()  # noqa: S311  (jitter)
        self._pause = pause
        self._settle_s = settle_s
        self._log = LogFollower(directory)
        self._cursor: Cursor | None = None
        self._origin = ""
        self._size = 0
        self._size_asked_s = 0.0
        self._oldest_ns: int | None = None  # no entry that is not sent is older; None: it was never looked
        self._position = self._delivered = self._saved = Position()
        self._saved_at_s = 0.0
        self._is_same_log = False  # that what is delivered is in it, looked at since the last connection
        self._of_this_log = False  # the same, as it was found last
        self._marks: deque[_Mark] = deque()
        self._messages = 0  # of the connection there is
        self._arrived = 0  # of those, when it was looked at last
        self._checkpoint: Published | None = None  # its entries are not all sent
        self._began_at = 0  # where the connection there is began
        self._furthest = 0  # before which entry one failed
        self._connected = False
        self._failures = 0
        self._waits_for = ""
        self._error: ErrorRecord | None = None
        self._last_error: ErrorRecord | None = None
        self._last_error_s: float | None = None
        self._unsaved: ErrorRecord | None = None  # why the cursor is behind

    def view(self, size: int = 0) -> View:
        """How it is now.

        Args:
            size: how long the log is, where that is known better than here: a receiver that stands still stops us too.
        """
        waiting = max(0, max(size, self._size) - self._position.next)
        oldest_s = None if self._oldest_ns is None or not waiting else self._oldest_ns / 1e9
        return View(
            name=self.name,
            to=str(self._transport),
            format=self._format.name,
            connected=self._connected,
            sent=self._position.next,
            delivered=self._delivered.next,
            of_this_log=self._of_this_log,
            lag_entries=waiting,
            lag_s=0.0 if oldest_s is None else max(0.0, self._wall_s() - oldest_s),
            waits_for=self._waits_for,
            error=self._error or self._unsaved,
            last_error=self._last_error,
            last_error_s=self._last_error_s,
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
                except Exception as error:  # a defect of ours, or of the disk: it must not end the others
                    _LOG.exception("%s: the export failed", self.name)
                    self._failed(_defect(error), begun_s)
                with contextlib.suppress(HoldfastError, OSError):
                    await self._look()
                await self._pause(self._pause_s())
        finally:
            if self._delivered != self._saved and self._cursor is not None:
                with contextlib.suppress(OSError):
                    self._cursor.save(self._delivered)

    # Where it is

    async def _take_up(self) -> None:
        """Go to what is delivered for certain."""
        if self._cursor is None:
            self._origin = (await asyncio.to_thread(public_key, self._directory)).name
            cursor = Cursor(self._cursor_path, self._origin)
            self._delivered = self._saved = await asyncio.to_thread(cursor.load)
            self._size = await self._ask_size()
            self._cursor = cursor
        self._size_asked_s = float("-inf")
        self._position = self._delivered
        self._began_at = self._position.next
        self._marks.clear()
        self._messages = self._arrived = 0
        self._checkpoint = None
        self._is_same_log = False
        if self._oldest_ns is None:  # it may take a while until there is a connection, and people look at the lag
            await self._look()

    async def _look(self) -> list[Frame]:
        """What there is to send next, at most `_READ_AHEAD` entries."""
        now_s, now_ns, knows_size = self._monotonic(), int(self._wall_s() * 1e9), False
        if self._position.next >= self._size or now_s >= self._size_asked_s + _POLL_S:
            # An appender that is being started again is no reason to part with the receiver.
            with contextlib.suppress(HoldfastError):
                self._size = await self._ask_size()
                knows_size = True
            self._size_asked_s = now_s
        if (sent := max(self._position.next, self._position.checkpoint)) > self._size:
            raise self._put_back(f"{sent} entries were sent, and the log has {self._size}")
        if not self._is_same_log:
            await self._refuse_another_history()
        await self._skip_what_was_removed()
        frames = await asyncio.to_thread(self._read, self._position, self._size)
        if frames:
            self._oldest_ns = Entry.unpack(frames[0].entry).wall_ns
        elif knows_size:  # what comes until the next look, which a receiver that stands still puts off, is younger
            self._oldest_ns = now_ns
        return frames

    async def _refuse_another_history(self) -> None:
        """See that what is delivered ends with the entry that the log has there. Nothing was sent since."""
        next_, leaf = self._delivered.next, self._delivered.leaf
        if next_:
            found = (await asyncio.to_thread(self._log.leaf, next_ - 1)).hex()
            if leaf not in ("", found):
                raise self._put_back(f"entry {next_ - 1} was sent, and the log has another one in its place")
            self._position = self._delivered = self._delivered._replace(leaf=found)
        self._is_same_log = self._of_this_log = True

    async def _skip_what_was_removed(self) -> None:
        """Go on with the oldest entry that the log keeps; what it removed before it was sent is nowhere."""
        next_ = self._position.next
        if next_ >= self._size:
            return
        oldest = await asyncio.to_thread(self._log.oldest, next_)
        if oldest == next_:
            return
        leaf = await asyncio.to_thread(self._log.leaf, oldest - 1)
        _LOG.warning("%s: entries %d to %d are not in the log any more", self.name, next_, oldest - 1)
        self._position = Position(oldest, max(oldest, self._position.checkpoint), leaf.hex())
        if not self._marks:
            self._delivered = self._position

    def _read(self, position: Position, size: int) -> list[Frame]:
        if self._checkpoint is None and (published := self._log.published()).size > position.checkpoint:
            self._checkpoint = published
        return self._log.frames(position.next, size, most=_READ_AHEAD)

    def _sent(self, messages: int, position: Position) -> None:
        now_s = self._monotonic()
        self._position = position
        self._messages += messages
        begun_s = now_s
        if self._marks and now_s < self._marks[-1].begun_s + _MARK_EVERY_S:
            begun_s = self._marks.pop().begun_s
        self._marks.append(_Mark(begun_s, now_s, self._messages, position))

    async def _settle(self, connection: Connection) -> None:
        """What was acknowledged, or the connection outlived, is delivered."""
        now_s = self._monotonic()
        acknowledged = connection.acknowledged
        if acknowledged is None:
            for place in range(len(self._marks) - 1, -1, -1):
                if self._marks[place].messages <= self._arrived:
                    break
                self._marks[place] = self._marks[place]._replace(ended_s=now_s)
            self._arrived = connection.arrived()
        while self._marks and (
            self._marks[0].messages <= self._arrived and self._marks[0].ended_s + self._settle_s <= now_s
            if acknowledged is None
            else self._marks[0].messages <= acknowledged
        ):
            self._delivered = self._marks.popleft().position
        if self._delivered != self._saved and self._cursor is not None and now_s >= self._saved_at_s + _SAVE_EVERY_S:
            self._saved_at_s = now_s
            try:
                await asyncio.to_thread(self._cursor.save, self._delivered)
            except OSError as error:
                self._tell_unsaved(error)
            else:
                self._saved, self._unsaved = self._delivered, None

    # Shipping

    async def _ship(self) -> None:
        connection = await self._transport.connect()
        self._connected = True
        try:
            while True:
                connection.check()
                frames = await self._look()
                whole = await self._send(connection, frames)
                if self._checkpoint is not None and self._checkpoint.size <= self._position.next:
                    await self._send_checkpoint(connection, self._checkpoint)
                await self._settle(connection)
                has_all = not whole or self._position.next >= self._size
                rests = has_all or self._has_too_many(connection)
                if rests and await connection.ended_within(_POLL_S):
                    connection.check()
                if has_all or self._goes_on(connection):
                    self._error = None
        finally:
            self._connected = False
            await connection.close(in_good_order=self._position.next >= self._size)

    async def _send(self, connection: Connection, frames: Sequence[Frame]) -> bool:
        """Send entries, those that can be opened; whether all could."""
        at_once = self._transport.messages_at_once
        self._waits_for = ""
        for begin in range(0, len(frames), at_once):
            some = frames[begin : begin + at_once]
            begun_s = self._monotonic()
            opened = await self._opener.open(some)
            if opened:
                await connection.send([self._made(each) for each in opened])
                last = some[len(opened) - 1].entry
                next_ = self._position.next + len(opened)
                self._sent(len(opened), self._position._replace(next=next_, leaf=leaf_hash(last).hex()))
                self._oldest_ns = Entry.unpack(last).wall_ns
            if len(opened) < len(some):
                self._waits_for = "the vault is sealed: what follows cannot be read until it is opened"
                return False
            await self._pause(max(0.0, begun_s + len(opened) / _MOST_PER_S - self._monotonic()))
        return True

    def _goes_on(self, connection: Connection) -> bool:
        """Whether the receiver took more than it was ever sent before: less, it may have taken each time and failed."""
        acknowledged = connection.acknowledged
        taken = self._arrived if acknowledged is None else acknowledged
        return self._began_at + taken > self._furthest

    def _has_too_many(self, connection: Connection) -> bool:
        acknowledged = connection.acknowledged
        return acknowledged is not None and self._messages - acknowledged > MOST_UNACKNOWLEDGED

    async def _send_checkpoint(self, connection: Connection, published: Published) -> None:
        start = self._position.checkpoint
        peaks = await asyncio.to_thread(self._log.peaks, start)
        event = CheckpointEvent(published.note, start, published.size, peaks)
        await connection.send([self._format.checkpoint(self._origin, event, int(self._wall_s() * 1000))])
        self._checkpoint = None
        self._sent(1, self._position._replace(checkpoint=published.size))

    def _made(self, disclosed: Disclosed) -> Message:
        try:
            made = self._format.entry(self._origin, disclosed)
        except EventInvalid as error:
            _LOG.warning("%s: an entry goes without its record: %s", self.name, error.cause)
            withheld = Disclosed.without(disclosed.packed, Withheld.DAMAGED)
            return self._format.entry(self._origin, withheld)
        if len(made.payload) > self._transport.max_payload_bytes:
            withheld = Disclosed.without(disclosed.packed, Withheld.TOO_LONG)
            made = self._format.entry(self._origin, withheld)
        return made

    # Failing

    def _failed(self, error: HoldfastError, begun_s: float) -> None:
        if self._error is None or self._error["cause"] != error.cause:
            _LOG.warning("%s: %s: %s", self.name, error.message, error.cause)
        self._error = self._last_error = error.record()
        self._last_error_s = self._wall_s()
        self._furthest = max(self._furthest, self._position.next)
        self._position = self._delivered
        self._failures = 1 if self._monotonic() >= begun_s + _LIVED_S else self._failures + 1

    def _put_back(self, cause: str) -> LogShorter:
        self._of_this_log = False
        return LogShorter(
            f"{self.name} has another history than the log",
            cause=cause,
            remedy="An older copy of the log was put back: put the newest there, and keep what the SIEM has. To send "
            f"this one from its beginning: `holdfast audit export remove {self.name}`, and add another place for it",
        )

    def _tell_unsaved(self, error: OSError) -> None:
        """What was sent counts; after a restart it would be sent again."""
        unsaved = CursorUnsaved(
            f"how far {self.name} is cannot be kept",
            cause=f"{self._cursor_path}: {error.strerror or error}",
            remedy="It is sent to all the same, and what it has comes again after a restart. See that there is room",
        )
        if self._unsaved is None:
            _LOG.warning("%s: %s", unsaved.message, unsaved.cause)
        self._unsaved = unsaved.record()

    def _pause_s(self) -> float:
        """Twice as long each time, and a random part of that: those who lost one receiver do not all come at once."""
        longest_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** min(self._failures, 16))
        return longest_s * (0.5 + self._random.random() / 2)


async def try_out(form: Format, transport: Transport, *, origin: str, wall_ms: int) -> None:
    """Send an event that says it is a test, over a connection of its own.

    Raises:
        ExportUnreachable: it was not taken; says why.
        ExportUnusable: what we need for it cannot be used.
    """
    connection = await transport.connect()
    try:
        await connection.send([form.trial(origin, wall_ms)])
        if connection.acknowledged is None:
            if await connection.ended_within(_REFUSED_WITHIN_S):
                connection.check()
        else:
            await _until_acknowledged(connection, transport)
    finally:
        await connection.close(in_good_order=True)


async def _until_acknowledged(connection: Connection, transport: Transport) -> None:
    try:
        async with asyncio.timeout(_TRIAL_S):
            while not connection.acknowledged:
                if await connection.ended_within(_POLL_S):
                    connection.check()
    except TimeoutError:
        raise ExportUnreachable(
            f"{transport} takes no events",
            cause=f"it did not say within {_TRIAL_S:g} s that it keeps the test",
            remedy="See at the receiver what became of it; it may be overloaded, or lack the room",
        ) from None


def _defect(error: Exception) -> HoldfastError:
    return HoldfastError(
        "the export failed",
        cause=f"{type(error).__name__}: {error}"[:300],
        remedy="`holdfast logs gateway` has the trace; events wait in the log",
    )
