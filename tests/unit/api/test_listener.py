"""What a connection may hold up, whoever holds it. Timers are fired by hand."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import pytest
from uvicorn.config import Config
from uvicorn.server import ServerState

from api import listener
from api.listener import BoundedProtocol

REQUEST = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
KEEP_ALIVE_S = 5


class Timer:
    """One that was started."""

    def __init__(self, seconds: float, fire: Callable[[], None]) -> None:
        self.seconds = seconds
        self.fire = fire
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Task:
    """One that nobody waits for."""

    def add_done_callback(self, done: Callable[..., object]) -> None:
        pass


@dataclass
class Loop:
    """An event loop whose timers and tasks wait for the test."""

    timers: list[Timer] = field(default_factory=list)
    work: list[Coroutine[Any, Any, None]] = field(default_factory=list)

    def call_later(self, seconds: float, fire: Callable[[], None]) -> Timer:
        self.timers.append(Timer(seconds, fire))
        return self.timers[-1]

    def create_task(self, work: Coroutine[Any, Any, None], **_: Any) -> Task:
        self.work.append(work)
        return Task()

    def running(self) -> list[float]:
        """How long each timer takes that was not cancelled."""
        return [timer.seconds for timer in self.timers if not timer.cancelled]

    def answer(self) -> None:
        """Let the application answer what it was asked."""
        while self.work:
            asyncio.run(self.work.pop(0))


class Transport(asyncio.Transport):
    """A connection of nobody's."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture
def connection(loop: Loop, transport: Transport) -> BoundedProtocol:
    config = Config(app, lifespan="off", log_config=None, timeout_keep_alive=KEEP_ALIVE_S, interface="asgi3")
    config.load()
    protocol = BoundedProtocol(config, ServerState(), {}, loop)  # type: ignore[arg-type]
    protocol.connection_made(transport)
    return protocol


@pytest.mark.parametrize("pieces", [[b"\r\n"] * 3, [b"\n"] * 3, [b"\r", b"\n\r\n"], [b"G", b"ET "], [b"\r\nG", b"E"]])
def test_what_comes_after_an_answer_and_is_no_request_holds_no_connection(
    pieces: list[bytes], connection: BoundedProtocol, loop: Loop, transport: Transport
) -> None:
    connection.data_received(REQUEST)
    loop.answer()
    assert transport.written.endswith(b"ok")
    assert loop.running() == [KEEP_ALIVE_S]
    for piece in pieces:
        connection.data_received(piece)
        assert loop.running() == [listener._HEADER_DEADLINE_S]
    loop.timers[-1].fire()
    assert transport.closed


def test_a_request_after_an_empty_line_is_answered_and_the_connection_kept(
    connection: BoundedProtocol, loop: Loop, transport: Transport
) -> None:
    for _ in range(3):
        connection.data_received(REQUEST)
        loop.answer()
        connection.data_received(b"\r\n")
    connection.data_received(b"\r\n" + REQUEST)
    assert loop.running() == []
    loop.answer()
    assert transport.written.count(b"ok") == 4
    assert loop.running() == [KEEP_ALIVE_S]
    assert not transport.closed


def test_an_empty_line_while_a_request_runs_starts_nothing(
    connection: BoundedProtocol, loop: Loop, transport: Transport
) -> None:
    connection.data_received(REQUEST)
    connection.data_received(b"\r\n")
    assert loop.running() == []
    loop.answer()
    assert loop.running() == [KEEP_ALIVE_S]
    assert not transport.closed


def test_headers_that_come_too_late_are_told_once_and_the_connection_closed(
    connection: BoundedProtocol, loop: Loop, transport: Transport
) -> None:
    told: list[tuple[str, str]] = []
    connection.tell_refused = lambda source, error: told.append((source, error.code))
    connection.data_received(b"GET /healthz HTTP/1.1\r\nHost: loc")
    (late,) = [timer for timer in loop.timers if not timer.cancelled]
    late.fire()
    assert (transport.closed, transport.written) == (True, b"")
    late.fire()
    assert told == [("", "headers_late")]


def test_a_request_that_came_in_time_is_told_to_nobody(
    connection: BoundedProtocol, loop: Loop, transport: Transport
) -> None:
    told: list[str] = []
    connection.tell_refused = lambda _, error: told.append(error.code)
    connection.data_received(REQUEST)
    loop.answer()
    for timer in [timer for timer in loop.timers if not timer.cancelled]:
        timer.fire()
    assert (told, transport.closed) == ([], True), "an idle connection is closed, and nothing was refused"
