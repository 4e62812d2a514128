"""Connections to the engine: used again, bounded, and never waited for without end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from appliance.engine.http import Broken, Connection, Pool, Unreachable, request_bytes

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(path: Path, script: Script) -> AsyncIterator[list[int]]:
    """Follows `script` on each connection; the list grows by one for each."""
    connections: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(len(connections))
        try:
            await script(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_unix_server(connected, path), asyncio.timeout(20):
        yield connections


def pool(path: Path, *, limit: int = 4, connect_timeout_s: float = 5.0, idle_timeout_s: float = 30.0) -> Pool:
    return Pool(
        str(path),
        limit=limit,
        connect_timeout_s=connect_timeout_s,
        silence_timeout_s=10.0,
        idle_timeout_s=idle_timeout_s,
    )


ASK = request_bytes("GET", "/", {}, None)


async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.readuntil(b"\r\n\r\n"):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")


async def ask(it: Pool) -> bytes:
    connection = await it.take()
    try:
        await connection.ask(ASK)
        whole = b""
        while part := await connection.read():
            whole += part
        return whole
    finally:
        it.give_back(connection)


async def test_a_connection_is_used_again_one_that_is_too_old_is_not(tmp_path: Path) -> None:
    async with server(tmp_path / "s", hello) as connections:
        it = pool(tmp_path / "s")
        assert [await ask(it) for _ in range(3)] == [b"hello"] * 3
        assert len(connections) == 1
        it.close()
        brief = pool(tmp_path / "s", idle_timeout_s=0.0)
        assert [await ask(brief) for _ in range(2)] == [b"hello"] * 2
        assert len(connections) == 3
        brief.close()


async def test_an_answer_that_came_whole_and_was_not_read_is_nobody_elses(tmp_path: Path) -> None:
    async with server(tmp_path / "s", hello) as connections:
        it = pool(tmp_path / "s")
        connection = await it.take()
        await connection.ask(ASK)
        it.give_back(connection)  # all of it came with the headers, and who asked has left
        assert await ask(it) == b"hello"
        assert len(connections) == 2
        it.close()


async def test_an_answer_that_came_in_the_moment_in_which_its_asker_left_is_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with server(tmp_path / "s", hello) as connections:
        it = pool(tmp_path / "s")
        connection = await it.take()
        asking = asyncio.create_task(connection.ask(ASK))
        received = connection.data_received

        def receive_and_leave(data: bytes) -> None:
            received(data)
            asking.cancel()

        monkeypatch.setattr(Connection, "data_received", lambda _, data: receive_and_leave(data))
        with pytest.raises(asyncio.CancelledError):
            await asking
        monkeypatch.undo()
        it.give_back(connection)
        assert await ask(it) == b"hello"
        assert len(connections) == 2
        it.close()


async def test_a_request_begins_with_nothing_of_the_one_before(tmp_path: Path) -> None:
    async with server(tmp_path / "s", hello):
        it = pool(tmp_path / "s")
        connection = await it.take()
        await connection.ask(ASK)  # and its answer is not read
        await connection.ask(ASK)
        assert await connection.read() == b"hello"
        assert await connection.read() == b""
        it.give_back(connection)
        it.close()


async def test_an_answer_behind_another_is_nobodys(tmp_path: Path) -> None:
    async def twice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            writer.write(2 * b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    async with server(tmp_path / "s", twice) as connections:
        it = pool(tmp_path / "s")
        for number in (1, 2):
            connection = await it.take()
            await connection.ask(ASK)
            assert await connection.read() == b"hello"
            it.give_back(connection)
            assert len(connections) == number
        it.close()


async def test_a_connection_whose_answer_was_not_read_is_not_used_again(tmp_path: Path) -> None:
    async with server(tmp_path / "s", hello) as connections:
        it = pool(tmp_path / "s")
        connection = await it.take()
        it.give_back(connection)
        assert await ask(it) == b"hello"
        assert len(connections) == 2
        it.close()


async def test_a_connection_that_the_server_closes_is_not_used_again(tmp_path: Path) -> None:
    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

    async with server(tmp_path / "s", once) as connections:
        it = pool(tmp_path / "s")
        assert [await ask(it) for _ in range(2)] == [b"hello"] * 2
        assert len(connections) == 2


async def test_a_place_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    async with server(tmp_path / "s", hello):
        it = pool(tmp_path / "s", limit=1)
        held = await it.take()
        waiting = asyncio.create_task(ask(it))
        await asyncio.sleep(0)
        it.give_back(held)
        assert await waiting == b"hello"
        hurried = pool(tmp_path / "s", limit=1, connect_timeout_s=0.05)
        held = await hurried.take()
        with pytest.raises(Unreachable):
            await hurried.take()
        hurried.give_back(held)
        it.close()


async def test_where_nothing_listens_no_place_is_lost(tmp_path: Path) -> None:
    it = pool(tmp_path / "nobody", limit=1)
    for _ in range(3):
        with pytest.raises(Unreachable):
            await it.take()


async def test_a_reader_that_is_slow_slows_the_server_down(tmp_path: Path) -> None:
    sent = 0
    piece = b"x" * (1 << 16)

    async def torrent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 26))
        while sent < 1 << 26:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()

    async with server(tmp_path / "s", torrent):
        it = pool(tmp_path / "s")
        connection = await it.take()
        await connection.ask(ASK)
        for _ in range(2000):  # turns of the loop that both run in: more than the whole answer would take
            await asyncio.sleep(0)
        assert sent < 1 << 24
        received = 0
        while part := await connection.read():
            received += len(part)
        assert received == 1 << 26
        it.give_back(connection)
        it.close()


@pytest.mark.parametrize("said", [b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello", b"", b"hello\r\n\r\n"])
async def test_an_answer_that_breaks_off_is_broken(tmp_path: Path, said: bytes) -> None:
    async def stops(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(said)

    async with server(tmp_path / "s", stops):
        it = pool(tmp_path / "s")
        with pytest.raises(Broken):
            await ask(it)


def test_a_header_is_one_line() -> None:
    for name, value in (("X", "a\r\nY: b"), ("X\n", "a")):
        with pytest.raises(ValueError, match="one line"):
            request_bytes("GET", "/", {name: value}, None)
