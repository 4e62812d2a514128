"""HTTP/1.1 with the engine over a Unix socket: as much of it as one trusted server needs, and no more.

Rules:

- A connection carries one request at a time, and is used again only when its answer was read to the end. What came of
  one and was not read, because who asked left, is never another's: such a connection is closed, and a request begins
  with nothing that was there before it.
- What comes is handed out as it came. Who reads slowly slows the engine down: no more than `_AHEAD_BYTES` wait here.
- To connect, and the silence between two reads, have deadlines.
- What goes wrong is `Unreachable` (nothing was asked) or `Broken` (the engine had the request); neither repeats a byte.
"""

import asyncio
from collections.abc import Mapping
from typing import cast

import httptools

_AHEAD_BYTES = 1 << 20


class Unreachable(Exception):
    """No connection could be had."""


class Broken(Exception):
    """The answer will not be whole. The message says why."""


class Connection(asyncio.Protocol):
    """One connection, and the answer that is read from it.

    Attributes:
        status: of the answer, once its headers are there.
        idle_since: when it was put aside, by the loop's clock.
    """

    def __init__(self, silence_timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._silence_timeout_s = silence_timeout_s
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._parts: list[bytes] = []
        self._ahead = 0
        self._ended = False
        self._keeps = False
        self._broken: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.status = 0
        self.idle_since = 0.0

    @property
    def reusable(self) -> bool:
        """Whether another request can be sent over it."""
        return self._ended and not self._parts and self._broken is None and self._parser is None

    @property
    def usable(self) -> bool:
        """Whether it is still connected."""
        return self._broken is None

    async def ask(self, request: bytes) -> None:
        """Send a request; the answer's status is there when this returns.

        Raises:
            Broken: no answer came.
        """
        self._parser = httptools.HttpResponseParser(self)
        self._parts, self._ahead = [], 0
        self._ended, self.status = False, 0
        if self._transport is not None:
            self._transport.write(request)
        while not self.status:
            if self._broken is not None:
                raise Broken(self._broken)
            await self._more()

    async def read(self) -> bytes:
        """What has come of the answer's body since, at least a byte; nothing when it is over.

        Raises:
            Broken: there will not be more, and there should.
        """
        while not self._parts:
            if self._ended:
                return b""
            if self._broken is not None:
                raise Broken(self._broken)
            await self._more()
        whole = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        if self._ahead > _AHEAD_BYTES and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
        self._ahead = 0
        return whole

    def close(self) -> None:
        """Let go of it at once."""
        self._break("it was closed")

    async def _more(self) -> None:
        self._waiter = self._loop.create_future()
        timer = self._loop.call_later(self._silence_timeout_s, self._break, "it said nothing for too long")
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _break(self, why: str) -> None:
        if self._broken is None:
            self._broken = why
        if self._transport is not None:
            self._transport.abort()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are none by name

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            self._break("it spoke without being asked")
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._break("its answer is no HTTP")
        if self._ended:
            self._parser = None
            if not self._keeps:
                self._break("it closed the connection")
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  (asyncio's signature)
        self._break("its answer broke off" if self.status else "its connection broke")

    # httptools' side

    def on_message_begin(self) -> None:
        if self._ended:
            self._break("it spoke without being asked")

    def on_headers_complete(self) -> None:
        if self._parser is not None:
            self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._ended:
            return
        self._parts.append(body)
        before, self._ahead = self._ahead, self._ahead + len(body)
        if before <= _AHEAD_BYTES < self._ahead and self._transport is not None:
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        self._ended = True
        self._keeps = self._parser is not None and self._parser.should_keep_alive()


class Pool:
    """Connections to one Unix socket.

    Args:
        limit: how many carry a request at a time; one beyond them waits.
        connect_timeout_s: for a connection, waiting for a place included.
        idle_timeout_s: how long one is kept that carries nothing: less long than the engine would keep it.
    """

    def __init__(
        self, path: str, *, limit: int, connect_timeout_s: float, silence_timeout_s: float, idle_timeout_s: float
    ) -> None:
        self._path = path
        self._places = asyncio.Semaphore(limit)
        self._connect_timeout_s = connect_timeout_s
        self._silence_timeout_s = silence_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._idle: list[Connection] = []

    async def take(self) -> Connection:
        """A connection that carries nothing; to be given back.

        Raises:
            Unreachable: there is none within the deadline.
        """
        if not self._places.locked():
            await self._places.acquire()  # at once
            found = self._take_idle()
            if found is not None:
                return found
            return await self._connect(self._connect_timeout_s)
        deadline = asyncio.get_running_loop().time() + self._connect_timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                await self._places.acquire()
        except TimeoutError:
            raise Unreachable from None
        return self._take_idle() or await self._connect(deadline - asyncio.get_running_loop().time())

    def give_back(self, connection: Connection) -> None:
        """Done with it: kept when its answer was read to the end, else closed."""
        self._places.release()
        if connection.reusable:
            connection.idle_since = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close those that carry nothing."""
        while self._idle:
            self._idle.pop().close()

    def _take_idle(self) -> Connection | None:
        oldest = asyncio.get_running_loop().time() - self._idle_timeout_s
        while self._idle:
            connection = self._idle.pop()
            if connection.usable and connection.idle_since > oldest:
                return connection
            connection.close()
        return None

    async def _connect(self, timeout_s: float) -> Connection:
        connection = Connection(self._silence_timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().create_unix_connection(lambda: connection, self._path)
        except (OSError, TimeoutError):
            self._places.release()
            raise Unreachable from None
        except BaseException:
            self._places.release()
            raise
        return connection


def request_bytes(method: str, path: str, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """A request as it goes over a connection.

    Raises:
        ValueError: a header would not be one line.
    """
    lines = [f"{method} {path} HTTP/1.1\r\nHost: engine\r\n"]
    for name, value in headers.items():
        if "\r" in value or "\n" in value or "\r" in name or "\n" in name:
            raise ValueError(f"the header {name!r} would not be one line")
        lines.append(f"{name}: {value}\r\n")
    if body is None:
        lines.append("\r\n")
        return "".join(lines).encode("latin-1")
    lines.append(f"Content-Length: {len(body)}\r\n\r\n")
    return "".join(lines).encode("latin-1") + body
