"""RELP, the Reliable Event Logging Protocol of rsyslog, over TLS with both certificates.

Rules:

- Each message is a transaction: the receiver answers 200 when it has it in its queue, or written down if it is told to
  be that careful. `acknowledged` goes up in the order of sending, by those answers.
- One that is answered anything else, or not within the deadline, ends the connection, and all from it on is sent again;
  so does a frame that is none, or longer than `_MAX_FRAME`.
- No more than `_MOST_UNANSWERED` transactions wait for an answer.
- TLS from the first byte, as `syslog` speaks it; `starttls` inside of RELP is not used.

RELP 0.0.1 (librelp, doc/relp.md). librelp calls its version of the protocol 0, which the document calls experimental:
it is what receivers speak.
"""

import asyncio
import contextlib
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from appliance.audit.siem.syslog import (
    DEADLINE_S,
    HEADER_BYTES,
    MAX_HOST,
    MAX_MESSAGE_BYTES,
    MAX_MSGID,
    Receiver,
    header_field,
    in_words,
    line,
    open_tls,
    unreachable,
)
from appliance.audit.siem.transport import ExportUnreachable, Message

PORT: Final = 2514
_OFFERS: Final = b"relp_version=0\nrelp_software=holdfast\ncommands=syslog"
_MAX_NUMBER: Final = 999_999_999
_MAX_FRAME: Final = 64 << 10
_MAX_HEAD: Final = 9 + 1 + 32 + 1 + 9 + 1
_MOST_UNANSWERED: Final = 1024
_HEAD: Final = re.compile(rb"([0-9]{1,9}) ([A-Za-z]{1,32}) ([0-9]{1,9})([ \n])")
_CLOSE_WITHIN_S: Final = 1.0


class RelpTls:
    """The transport, as `transport.Transport` has it.

    Args:
        hostname: what we are called in messages.
        max_message_bytes: what the receiver takes, header and all.
    """

    messages_at_once: Final = 64

    def __init__(
        self,
        receiver: Receiver,
        *,
        hostname: str,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        deadline_s: float = DEADLINE_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._receiver = receiver
        self._hostname = header_field(hostname, MAX_HOST)
        self._max_message_bytes = max_message_bytes
        self._deadline_s = deadline_s
        self._monotonic = monotonic

    def __str__(self) -> str:
        return f"{self._receiver} (RELP)"

    @property
    def max_payload_bytes(self) -> int:
        """What the longest header leaves."""
        return self._max_message_bytes - HEADER_BYTES - len(self._hostname) - MAX_MSGID

    async def connect(self) -> "Connection":
        """See `Transport.connect`."""
        reader, writer = await open_tls(self._receiver, self._deadline_s)
        frames = _Frames(reader)
        try:
            async with asyncio.timeout(self._deadline_s):
                writer.write(_frame(1, b"open", _OFFERS))
                await writer.drain()
                _check_opened(await frames.next())
        except (TimeoutError, OSError, _NoFrame) as error:
            writer.transport.abort()
            cause = (
                f"nobody answered within {self._deadline_s:g} s" if isinstance(error, TimeoutError) else _told(error)
            )
            raise unreachable(self._receiver, cause) from None
        except BaseException:
            writer.transport.abort()
            raise
        return Connection(
            self._receiver,
            frames,
            writer,
            hostname=self._hostname,
            deadline_s=self._deadline_s,
            monotonic=self._monotonic,
        )


class _NoFrame(Exception):
    """What came is not what RELP allows; says what it is."""


class _Frame(NamedTuple):
    """A frame of RELP."""

    number: int
    command: bytes
    data: bytes

    @property
    def code(self) -> bytes:
        """The code of a response."""
        return self.data[:3]


class _Transaction(NamedTuple):
    number: int
    sent_s: float


class Connection:
    """A session with a receiver. Made by `RelpTls.connect`."""

    def __init__(
        self,
        receiver: Receiver,
        frames: "_Frames",
        writer: asyncio.StreamWriter,
        *,
        hostname: str,
        deadline_s: float,
        monotonic: Callable[[], float],
    ) -> None:
        self._receiver = receiver
        self._frames = frames
        self._writer = writer
        self._hostname = hostname
        self._deadline_s = deadline_s
        self._monotonic = monotonic
        self._number = 1
        self._acknowledged = 0
        self._waiting: deque[_Transaction] = deque()
        self._answered: set[int] = set()  # of those that wait
        self._changed = asyncio.Condition()
        self._ended = asyncio.create_task(self._read_answers())

    @property
    def acknowledged(self) -> int:
        """See `transport.Connection.acknowledged`."""
        return self._acknowledged

    def arrived(self) -> int:
        """See `transport.Connection.arrived`."""
        return self.acknowledged

    async def send(self, messages: Sequence[Message]) -> None:
        """See `transport.Connection.send`. Waits while too many messages are not answered."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._waiting) < _MOST_UNANSWERED or self._ended.done())
        self.check()
        frames = []
        for message in messages:
            self._number = self._number % _MAX_NUMBER + 1
            self._waiting.append(_Transaction(self._number, self._monotonic()))
            frames.append(_frame(self._number, b"syslog", line(message, self._hostname)))
        try:
            async with asyncio.timeout(self._deadline_s):
                self._writer.write(b"".join(frames))
                await self._writer.drain()
        except TimeoutError:
            raise self._unreachable(f"it took nothing for {self._deadline_s:g} s") from None
        except OSError as error:
            raise self._unreachable(in_words(error)) from None

    def check(self) -> None:
        """See `transport.Connection.check`."""
        if self._ended.done():
            raise self._unreachable(self._ended.result())

    async def ended_within(self, seconds: float) -> bool:
        """See `transport.Connection.ended_within`."""
        done, _ = await asyncio.wait([self._ended], timeout=seconds)
        return bool(done)

    async def close(self, *, in_good_order: bool = False) -> None:
        """See `transport.Connection.close`. In good order: with a `close`, whose answer is waited for a moment."""
        if in_good_order and not self._ended.done():
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CLOSE_WITHIN_S):
                    self._writer.write(_frame(self._number % _MAX_NUMBER + 1, b"close", b""))
                    await self._writer.drain()
                    await asyncio.wait([self._ended])
        self._writer.transport.abort()
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)

    async def _read_answers(self) -> str:
        """Until the connection ends; why it did."""
        try:
            while True:
                waits = asyncio.timeout(self._deadline_s / 4)
                try:
                    async with waits:
                        frame = await self._frames.next()
                except TimeoutError:
                    if not waits.expired():  # the kernel's own, which gave the peer up
                        raise
                    self._see_that_it_answers()
                    continue
                if frame.number == 0:
                    return "it ended the session"
                await self._answer(frame)
                self._see_that_it_answers()
        except (OSError, _NoFrame) as error:
            return _told(error)
        finally:
            async with self._changed:
                self._changed.notify_all()

    async def _answer(self, frame: _Frame) -> None:
        known = any(each.number == frame.number for each in self._waiting) and frame.number not in self._answered
        if frame.command != b"rsp" or not known:
            if frame.command == b"rsp" and frame.number == self._number % _MAX_NUMBER + 1:
                raise _NoFrame("it ended the session")  # it answered our `close`
            raise _NoFrame("it answered what it was not asked")
        if frame.code != b"200":
            raise _NoFrame(f"it refused a message: {_seen(frame.data)}")
        self._answered.add(frame.number)
        async with self._changed:
            while self._waiting and self._waiting[0].number in self._answered:
                self._answered.discard(self._waiting.popleft().number)
                self._acknowledged += 1
            self._changed.notify_all()

    def _see_that_it_answers(self) -> None:
        if self._waiting and self._monotonic() >= self._waiting[0].sent_s + self._deadline_s:
            raise _NoFrame(f"it acknowledged nothing for {self._deadline_s:g} s")

    def _unreachable(self, cause: str) -> ExportUnreachable:
        return unreachable(self._receiver, cause)


class _Frames:
    """Reads frames. What came of one when its wait was given up is kept."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._buffer = b""

    async def next(self) -> _Frame:
        """The next one.

        Raises:
            _NoFrame: what comes is none, or nothing comes any more.
        """
        while True:
            if (found := self._take()) is not None:
                return found
            more = await self._reader.read(_MAX_FRAME)
            if not more:
                raise _NoFrame("it closed the connection")
            self._buffer += more

    def _take(self) -> _Frame | None:
        head = _HEAD.match(self._buffer)
        if head is None:
            if len(self._buffer) > _MAX_HEAD or b"\n" in self._buffer:
                raise _NoFrame("what it says is no RELP")
            return None
        size = int(head[3])
        if size > _MAX_FRAME:
            raise _NoFrame(f"its frame has more than {_MAX_FRAME} bytes")
        # A frame without data has no space before its end (librelp puts one there).
        begin = head.end() if head[4] == b" " else head.end() - 1
        if len(self._buffer) <= begin + size:
            return None
        if self._buffer[begin + size : begin + size + 1] != b"\n":
            raise _NoFrame("what it says is no RELP")
        data, self._buffer = self._buffer[begin : begin + size], self._buffer[begin + size + 1 :]
        return _Frame(int(head[1]), head[2], data)


def _frame(number: int, command: bytes, data: bytes) -> bytes:
    return b"%d %b %d%b%b\n" % (number, command, len(data), b" " if data else b"", data)


def _check_opened(frame: _Frame) -> None:
    """The answer to `open`: it takes syslog, in a version that it names."""
    if (frame.number, frame.command) != (1, b"rsp"):
        raise _NoFrame("what it says is no RELP")
    if frame.code != b"200":
        raise _NoFrame(f"it refused the session: {_seen(frame.data)}")
    offers = dict(line.partition(b"=")[::2] for line in frame.data.split(b"\n")[1:])
    if b"relp_version" not in offers or b"syslog" not in offers.get(b"commands", b"").split(b","):
        raise _NoFrame("it does not take syslog over RELP")


def _seen(data: bytes) -> str:
    """What a receiver said, for people."""
    return "".join(character if " " <= character <= "~" else " " for character in data[:200].decode("ascii", "replace"))


def _told(error: Exception) -> str:
    return in_words(error) if isinstance(error, OSError) else str(error)
