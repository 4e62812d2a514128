"""Syslog into a receiver that reads slowly or not at all: what arrived is known; who takes something is waited for."""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator

import pytest

from appliance.audit.siem import syslog
from appliance.audit.siem.transport import ExportUnreachable
from tests.e2e.siem.receivers import receiver_at, rude, server_context
from tests.e2e.siem.shipping import messages, until
from tests.rsyslog import Pki

pytestmark = pytest.mark.anyio
MESSAGES = 600
_LINE = messages(1)[0]._replace(payload=b"x" * 7000)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@contextlib.asynccontextmanager
async def _reading(pki: Pki, may_read: asyncio.Event) -> AsyncIterator[int]:
    """A receiver with a small buffer, which reads while it may; its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            tasks.add(task)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        try:
            await may_read.wait()
            writer.transport.resume_reading()  # type: ignore[attr-defined]
            with contextlib.suppress(OSError):
                while await reader.read(65536):
                    pass
        finally:
            writer.transport.abort()

    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listening.bind(("127.0.0.1", 0))
    server = await asyncio.start_server(take, sock=listening, ssl=server_context(pki, asks=True))
    try:
        yield listening.getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_what_lies_in_our_own_kernel_has_not_arrived(pki: Pki) -> None:
    may_read = asyncio.Event()
    async with _reading(pki, may_read) as port:
        connection = await syslog.connect(receiver_at(port, pki, client="client"), hostname="node")
        sending = asyncio.create_task(_send(connection))
        try:
            await until(lambda: connection._kernel()[1] > 0)  # the receiver's has no room for more
            assert connection.arrived() < MESSAGES
            assert not sending.done(), "no more than a part of it fits into the two kernels"
            may_read.set()
            await sending
            await until(lambda: connection.arrived() == MESSAGES)
        finally:
            sending.cancel()
            await connection.close()
        assert connection.arrived() == MESSAGES


async def test_who_takes_a_little_is_waited_for_and_who_takes_nothing_is_given_up(
    pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with _reading(pki, asyncio.Event()) as port:
        connection = await syslog.connect(receiver_at(port, pki, client="client"), hostname="node", deadline_s=0.2)
        seen = itertools.chain(range(5), itertools.repeat(5))
        looks = []

        def kernel(_: syslog.Connection) -> tuple[int, int]:
            looks.append(next(seen))
            return looks[-1], 1

        monkeypatch.setattr(syslog.Connection, "_kernel", kernel)
        monkeypatch.setattr(connection._writer, "drain", asyncio.Event().wait)  # never done
        try:
            with pytest.raises(ExportUnreachable, match=r"took nothing for 0\.2 s"):
                await connection.send([_LINE])
            assert looks == [0, 1, 2, 3, 4, 5, 5]
        finally:
            await connection.close()


async def test_a_receiver_that_talks_is_not_listened_to_for_ever(pki: Pki) -> None:
    async with rude(b"x" * (1 << 20), pki) as port:
        connection = await syslog.connect(receiver_at(port, pki, client="client"), hostname="node")
        try:
            await connection.send(messages(1))
            assert await connection.ended_within(5)
            with pytest.raises(ExportUnreachable, match="it says much"):
                connection.check()
        finally:
            await connection.close()


async def _send(connection: syslog.Connection) -> None:
    for _ in range(0, MESSAGES, 20):
        await connection.send([_LINE] * 20)
