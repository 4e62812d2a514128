"""The log, its exporter and real receivers over mutual TLS: what arrives is the log, whatever ends on the way."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from appliance.audit.events import CATALOGUE, Actor, Event, Outcome
from appliance.audit.launch import Launcher
from appliance.audit.reading import LogReader
from appliance.audit.recorder import Recorder
from appliance.audit.siem.destinations import Destination
from appliance.audit.siem.exports import Exports
from appliance.audit.siem.formats import stable_id
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.shipper import Shipper, try_out
from appliance.audit.siem.syslog import Receiver as Address
from appliance.audit.siem.syslog import SyslogTls
from appliance.audit.siem.transport import ExportUnreachable
from appliance.audit.siem.verify_export import verify_export
from tests.rsyslog import Pki, Receiver, Rsyslog, running_rsyslog
from tests.syslog_ng import SyslogNg
from tests.unit.audit.making import KEY, Keys, event

pytestmark = pytest.mark.anyio
EVENTS = 20_000
DEADLINE_S = 30.0
NASTY = 'a\nb\rc\0d|e=f\x1b[31m\x7f\u2028\u202e\ud800 <34>1 \U0001f600 "\\' + "x" * 400
_MOST_GROWTH_BYTES = 24 << 20


class Node:
    """An appender, a recorder and the exports of a node."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pki = folder, Pki(folder / "pki")
        self.state = folder / "state"
        self.log = self.state / "audit"
        (self.state / "run").mkdir(mode=0o700, parents=True)
        self.launcher = Launcher(self.log, self.state / "run")
        self.recorder = Recorder(Keys, system_scope="system", versions={"holdfast": "0"})

    async def size(self) -> int:
        return int((await self.recorder.status())["size"])

    def destination(self, receiver: Receiver) -> Destination:
        folder = self.pki.folder
        return Destination(
            "to",
            f"syslog+tls://127.0.0.1:{receiver.port}",
            ca=folder / "ca.pem",
            certificate=folder / "client.pem",
            private_key=folder / "client.key",
        )

    def transport(
        self, port: int, *, client: str = "client", server_name: str = "127.0.0.1", deadline_s: float = 20.0
    ) -> SyslogTls:
        folder = self.pki.folder
        address = Address(
            "127.0.0.1", port, server_name, folder / "ca.pem", folder / f"{client}.pem", folder / f"{client}.key"
        )
        return SyslogTls(address, hostname="node", deadline_s=deadline_s)

    def shipper(self, transport: SyslogTls) -> Shipper:
        cursor = self.state / "siem" / "to.cursor"
        return Shipper("to", Ocsf(), transport, self.log, cursor, size=self.size, opener=KeyOpener(Keys()))

    async def record(self, count: int, first: int = 1) -> None:
        for begin in range(first, first + count, 100):
            await self.recorder.record(*(event(number) for number in range(begin, min(begin + 100, first + count))))


@contextlib.asynccontextmanager
async def _node(folder: Path) -> AsyncIterator[Node]:
    node = Node(folder)
    running = asyncio.create_task(node.recorder.run(node.launcher.connect))
    try:
        await node.recorder.sign_with(KEY.to_bytes())
        await node.recorder.record(event(0))
        (node.log / "log.vkey").write_text(f"{KEY.verifier()}\n")
        yield node
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await node.launcher.stop()


@contextlib.asynccontextmanager
async def _shipping(shipper: Shipper) -> AsyncIterator[Shipper]:
    running = asyncio.create_task(shipper.run())
    try:
        yield shipper
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@contextlib.asynccontextmanager
async def _exports(node: Node) -> AsyncIterator[Exports]:
    exports = Exports(node.state, node.log, size=node.size, keys=Keys())
    exports.start()
    try:
        yield exports
    finally:
        await exports.stop()


async def _until(condition: Callable[[], bool], deadline_s: float = DEADLINE_S) -> None:
    async with asyncio.timeout(deadline_s):
        while not condition():  # noqa: ASYNC110  (what is looked at is another process's)
            await asyncio.sleep(0.05)


def _ids(receiver: Receiver) -> set[str]:
    found = set()
    for line in receiver.received:
        with contextlib.suppress(ValueError):  # cut off where the receiver was killed
            found.add(json.loads(line)["metadata"]["uid"])
    return found


def _nasty_events() -> list[Event]:
    """One of each class; with an odd number, one whose event is too long for syslog."""
    return [
        Event(
            kind, Actor("principal", NASTY, NASTY), Outcome.REFUSED,
            tenant_id=NASTY.replace("\ud800", ""), source=NASTY,
            target=(NASTY, "\U0001f600" * 256 * (kind.number % 2) + NASTY),
            reason=NASTY, request_id="\U0001f600" * 256 * (kind.number % 2) + NASTY, session_id=NASTY,
            counts=dict.fromkeys(kind.counts, 3), details=dict.fromkeys(kind.details, NASTY),
        )
        for kind in CATALOGUE.values()
    ]  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, pki: Rsyslog(folder, pki, driver="ossl"),
        lambda folder, pki: Rsyslog(folder, pki, driver="gtls"),
        SyslogNg,
    ],
    ids=["rsyslog-openssl", "rsyslog-gnutls", "syslog-ng"],
)
async def test_what_arrives_is_the_log_whoever_is_killed(make: Callable[[Path, Pki], Receiver], tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        receiver = make(tmp_path / "receiver", node.pki)
        await asyncio.to_thread(receiver.start)
        try:
            async with _exports(node) as exports:
                await exports.add(node.destination(receiver))
                await node.recorder.record(*_nasty_events())
                recording = asyncio.create_task(node.record(EVENTS))
                await _until(lambda: exports.view("to").sent > 3000)
                await asyncio.to_thread(lambda: receiver.stop(kill=True))
                for pid in (node.launcher.pid, exports.pid):
                    assert pid is not None
                    os.kill(pid, signal.SIGKILL)
                await _until(lambda: exports.view("to").error is not None)
                await asyncio.to_thread(receiver.start)
                await recording
                size = (await node.recorder.checkpoint())["size"]
                assert size > EVENTS
                await _until(lambda: exports.view("to").sent == size)
                await _until(lambda: f'"size":{size},' in receiver.newest)
        finally:
            await asyncio.to_thread(receiver.stop)
        wanted = {stable_id(KEY.name, sequence) for sequence in range(size)}
        assert {each for each in _ids(receiver) if "/checkpoint/" not in each and "/test/" not in each} == wanted
        # What was cut off where the receiver was killed is no line of ours.
        lines = [line for line in receiver.received if line.startswith("{") and line.endswith("}")]
        found = verify_export(lines, KEY.verifier(), checkpoint=LogReader(node.log).note)
        assert (found.first, found.end, found.proved_to) == (0, size, size)
        assert set(found.withheld_named.values()) == {"too long"}
        assert sum(kind.number % 2 for kind in CATALOGUE.values()) <= found.withheld < len(CATALOGUE)


async def test_a_receiver_that_is_down_or_refuses_us_delays_and_is_told(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            async with _shipping(node.shipper(node.transport(receiver.port, client="stranger"))) as stranger:
                await _until(lambda: stranger.view().error is not None)
                assert not _ids(receiver)
                assert stranger.view().delivered == 0
            receiver.stop()
            async with _shipping(node.shipper(node.transport(receiver.port))) as shipper:
                await _until(lambda: shipper.view().error is not None)
                assert "refused" in str(shipper.view().error).lower()
                await node.record(10)
                receiver.start()
                await _until(lambda: len(_ids(receiver)) >= 11)
                await _until(lambda: shipper.view().error is None)


async def test_a_certificate_for_another_name_or_of_a_stranger_is_refused(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            other_name = node.transport(receiver.port, server_name="other.example")
            with pytest.raises(ExportUnreachable, match="certificate does not hold"):
                await try_out(Ocsf(), other_name, origin=KEY.name, wall_ms=1)
            (node.pki.folder / "ca.pem").rename(node.pki.folder / "own-ca.pem")
            (node.pki.folder / "other-ca.pem").rename(node.pki.folder / "ca.pem")
            with pytest.raises(ExportUnreachable, match="certificate does not hold"):
                await try_out(Ocsf(), node.transport(receiver.port), origin=KEY.name, wall_ms=1)
            (node.pki.folder / "own-ca.pem").rename(node.pki.folder / "ca.pem")
            await try_out(Ocsf(), node.transport(receiver.port), origin=KEY.name, wall_ms=1)
            await _until(lambda: _ids(receiver) == {f"{KEY.name}/test/1"})


@pytest.mark.parametrize(
    ("version", "suites"),
    [
        (ssl.TLSVersion.TLSv1_2, "AES128-SHA"),  # RFC 5425's own, which RFC 9662 replaces: no forward secrecy
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-SHA:ECDHE-RSA-AES128-SHA"),
        (ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0"),
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256"),  # RFC 9662
    ],
)
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
async def test_a_receiver_that_knows_only_old_suites_or_versions_gets_nothing(
    version: ssl.TLSVersion, suites: str, tmp_path: Path
) -> None:
    is_old = "GCM" not in suites
    async with _node(tmp_path) as node:
        came: list[bytes] = []

        async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            came.append(await reader.read())
            writer.close()

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(node.pki.folder / "server.pem", node.pki.folder / "server.key")
        context.minimum_version = min(version, ssl.TLSVersion.TLSv1_2)
        context.maximum_version = version
        context.set_ciphers(suites)
        server = await asyncio.start_server(take, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(ExportUnreachable) if is_old else contextlib.nullcontext():
                await try_out(Ocsf(), node.transport(port), origin=KEY.name, wall_ms=1)
            await _until(lambda: is_old or bool(came))
        assert (came == []) is is_old


async def test_a_blackholed_receiver_is_given_up_and_nothing_else_waits(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as queued:
            address = full.getsockname()
            with contextlib.suppress(TimeoutError):
                for _ in range(8):  # until the queue is full: from then on the kernel drops who comes
                    queued.enter_context(socket.create_connection(address, 0.3))
            with pytest.raises(TimeoutError):
                socket.create_connection(address, 0.3)
            async with _shipping(node.shipper(node.transport(address[1], deadline_s=0.5))) as shipper:
                await _until(lambda: shipper.view().error is not None)
                assert "nobody answered within 0.5 s" in str(shipper.view().error)
                await node.record(100)
                await _until(lambda: shipper.view().lag_entries == 101)
                assert shipper.view().lag_s > 0


async def test_a_peer_that_accepts_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            async with _shipping(node.shipper(node.transport(silent.getsockname()[1], deadline_s=0.5))) as shipper:
                await _until(lambda: shipper.view().error is not None)
                assert "nobody answered within 0.5 s" in str(shipper.view().error)


async def test_a_receiver_that_never_reads_is_given_up(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(node.pki.folder / "server.pem", node.pki.folder / "server.key")
        held: list[asyncio.StreamWriter] = []

        async def ignore(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            held.append(writer)
            writer.transport.pause_reading()  # type: ignore[attr-defined]

        server = await asyncio.start_server(ignore, "127.0.0.1", 0, ssl=context)
        await node.record(8_000)
        port = server.sockets[0].getsockname()[1]
        async with _shipping(node.shipper(node.transport(port, deadline_s=1.0))) as shipper:
            await _until(lambda: "took nothing for 1 s" in str(shipper.view().error))
            assert shipper.view().delivered == 0
            await node.record(100, first=20_000)
        server.close()
        for writer in held:
            writer.transport.abort()
        await asyncio.sleep(0)


async def test_a_receiver_that_stands_still_costs_no_memory_and_holds_up_nobody(tmp_path: Path) -> None:
    async with _node(tmp_path) as node:
        with running_rsyslog(tmp_path / "receiver", node.pki) as receiver:
            async with _exports(node) as exports:
                await exports.add(node.destination(receiver))
                await _until(lambda: exports.view("to").sent == 1)
                before = _resident_bytes(exports.pid)
                os.kill(receiver.pid, signal.SIGSTOP)
                try:
                    await node.record(EVENTS)
                    sent = -1
                    while sent != exports.view("to").sent:
                        sent = exports.view("to").sent
                        await asyncio.sleep(0.6)
                    assert exports.view("to").lag_entries > EVENTS // 2
                    assert _resident_bytes(exports.pid) < before + _MOST_GROWTH_BYTES
                finally:
                    os.kill(receiver.pid, signal.SIGCONT)
                await _until(lambda: f'"sequence":{EVENTS},' in receiver.newest)


def _resident_bytes(pid: int | None) -> int:
    assert pid is not None
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
