"""The log and a real rsyslog over mutual TLS: what arrives is the log, whatever ends on the way."""

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.audit.launch import Launcher
from appliance.audit.reading import LogReader
from appliance.audit.recorder import Recorder
from appliance.audit.siem.formats import stable_id
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.shipper import Shipper
from appliance.audit.siem.syslog import Receiver, SyslogTls
from appliance.audit.siem.verify_export import verify_export
from tests.rsyslog import Pki, Rsyslog, running_rsyslog
from tests.unit.audit.making import KEY, Keys, event

pytestmark = pytest.mark.anyio
EVENTS = 20_000
DEADLINE_S = 12.0


class Node:
    """An appender, a recorder and the shippers of a node."""

    def __init__(self, folder: Path, pki: Pki) -> None:
        self.folder, self.pki = folder, pki
        (folder / "run").mkdir(mode=0o700)
        self.log = folder / "audit"
        self.launcher = Launcher(self.log, folder / "run")
        self.recorder = Recorder(Keys, system_scope="system", versions={"holdfast": "0"})

    async def size(self) -> int:
        return int((await self.recorder.status())["size"])

    def transport(
        self, port: int, *, client: str = "client", server_name: str = "127.0.0.1", deadline_s: float = DEADLINE_S
    ) -> SyslogTls:
        folder = self.pki.folder
        receiver = Receiver(
            "127.0.0.1", port, server_name, folder / "ca.pem", folder / f"{client}.pem", folder / f"{client}.key"
        )
        return SyslogTls(receiver, hostname="node", deadline_s=deadline_s)

    def shipper(self, transport: SyslogTls) -> Shipper:
        return Shipper(
            "to",
            Ocsf(),
            transport,
            self.log,
            self.folder / "siem" / "to.cursor",
            size=self.size,
            opener=KeyOpener(Keys()),
        )


@contextlib.asynccontextmanager
async def _node(folder: Path) -> AsyncIterator[Node]:
    node = Node(folder, Pki(folder / "pki"))
    running = asyncio.create_task(node.recorder.run(node.launcher.connect))
    try:
        await node.recorder.sign_with(KEY.to_bytes())
        await node.recorder.record(event(0))
        (node.log / "log.vkey").write_text(f"{KEY.verifier()}\n")
        yield node
    finally:
        running.cancel()
        await node.launcher.stop()


@contextlib.asynccontextmanager
async def _shipping(shipper: Shipper) -> AsyncIterator[Shipper]:
    running = asyncio.create_task(shipper.run())
    try:
        yield shipper
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  (what is looked at is another process's)
            await asyncio.sleep(0.05)


def _ids(receiver: Rsyslog) -> set[str]:
    found = set()
    for line in receiver.received:
        with contextlib.suppress(ValueError):  # cut off where the receiver was killed
            found.add(json.loads(line)["metadata"]["uid"])
    return found


async def _record(node: Node, count: int, first: int = 1) -> None:
    for begin in range(first, first + count, 100):
        await node.recorder.record(*(event(number) for number in range(begin, min(begin + 100, first + count))))


async def test_a_receiver_that_is_down_or_refuses_us_delays_and_is_told(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            async with _shipping(node.shipper(receiver.port, client="stranger")) as stranger:
                await _until(lambda: stranger.view().error is not None)
                assert not _ids(receiver)
            receiver.stop()
            async with _shipping(node.shipper(receiver.port)) as shipper:
                await _until(lambda: shipper.view().error is not None)
                assert "refused" in str(shipper.view().error).lower()
                await _record(node, 10)
                receiver.start()
                await _until(lambda: len(_ids(receiver)) >= 11)
                assert shipper.view().error is None


async def test_a_certificate_for_another_name_is_refused(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            shipper = node.shipper(receiver.port)
            shipper.destination = replace(
                shipper.destination, receiver=replace(shipper.destination.receiver, server_name="other.example")
            )
            with pytest.raises(syslog.ExportUnreachable, match="certificate does not hold"):
                await shipper.try_out()
            await node.shipper(receiver.port).try_out()
            await _until(lambda: any("/test/" in each for each in _ids(receiver)))


async def test_a_peer_that_never_answers_is_given_up_and_nothing_else_waits(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with _shipping(node.shipper(silent.getsockname()[1], deadline_s=0.5)) as shipper:
                await _until(lambda: shipper.view().error is not None)
                assert "nobody answered within 0.5 s" in str(shipper.view().error)
                await _record(node, 100)
                assert await node.size() == 101


async def test_a_receiver_that_never_reads_is_given_up_and_bounded(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        context = syslog.ssl.SSLContext(syslog.ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(node.pki.folder / "server.pem", node.pki.folder / "server.key")

        held: list[asyncio.StreamWriter] = []

        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held.append(writer)
            writer.transport.pause_reading()  # type: ignore[attr-defined]

        server = await asyncio.start_server(ignore, "127.0.0.1", 0, ssl=context)
        await _record(node, 12_000)
        port = server.sockets[0].getsockname()[1]
        async with _shipping(node.shipper(port, deadline_s=1.0)) as shipper:
            await _until(lambda: "took nothing for 1 s" in str(shipper.view().error))
            assert shipper.view().delivered == 0
            await _record(node, 100, first=20_000)
        server.close()
        for writer in held:
            writer.transport.abort()
        await asyncio.sleep(0)


async def test_what_arrives_is_the_log_through_restarts_and_kills(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            async with _shipping(node.shipper(node.transport(receiver.port))) as shipper:
                recording = asyncio.create_task(_record(node, EVENTS - 1))
                await _until(lambda: shipper.view().sent > 3000)
                await asyncio.to_thread(receiver.stop)
                pid = node.launcher.pid
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                await _until(lambda: not shipper.view().connected)
                await asyncio.to_thread(receiver.start)
                await recording
                size = (await node.recorder.checkpoint())["size"]
                assert size >= EVENTS
                wanted = {stable_id(KEY.name, sequence) for sequence in range(size)}
                await _until(lambda: shipper.view().sent == size)
                await _until(lambda: any(f'"size":{size},' in line for line in receiver.received[-50:]))
        assert {each for each in _ids(receiver) if "/checkpoint/" not in each} == wanted
        lines = (tmp_path / "receiver" / "received").read_text().splitlines()
        found = verify_export(lines, KEY.verifier(), checkpoint=LogReader(node.log).note)
        assert (found.first, found.end, found.proved_to) == (0, size, size)
