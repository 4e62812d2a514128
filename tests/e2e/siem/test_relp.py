"""RELP over TLS into a real rsyslog: what it acknowledged is there, and what it did not comes again."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from appliance.audit.siem.cef import Cef
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.relp import RelpTls
from appliance.audit.siem.shipper import try_out
from appliance.audit.siem.transport import ExportUnreachable
from tests.e2e.siem.receivers import receiver_at, server_context
from tests.e2e.siem.shipping import Shipped, messages, until
from tests.rsyslog import Pki, Rsyslog
from tests.unit.audit.making import ORIGIN

pytestmark = pytest.mark.anyio
OPENED = b"200 OK\nrelp_version=0\nrelp_software=test\ncommands=syslog"
_CONFIG = """
global(workDirectory="{folder}" maxMessageSize="64k")
module(load="imrelp" tls.tlslib="{library}")
template(name="line" type="string" string="%msg:::sp-if-no-1st-sp%%msg%\\n")
input(type="imrelp" address="127.0.0.1" port="{port}" tls="on" tls.authMode="name" tls.permittedPeer=["client"]
      tls.caCert="{pki}/ca.pem" tls.myCert="{pki}/server.pem" tls.myPrivKey="{pki}/server.key")
action(type="omfile" file="{folder}/received" template="line" asyncWriting="off" flushOnTXEnd="on")
"""


class RelpRsyslog(Rsyslog):
    """rsyslog that takes RELP; `library`: what it speaks TLS with."""

    def __init__(self, folder: Path, pki: Pki, *, library: str = "openssl") -> None:
        super().__init__(folder, pki)
        config = _CONFIG.format(folder=folder, pki=pki.folder, port=self.port, library=library)
        (folder / "rsyslog.conf").write_text(config)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@contextlib.contextmanager
def running(folder: Path, pki: Pki, *, library: str = "openssl") -> Iterator[RelpRsyslog]:
    receiver = RelpRsyslog(folder / "receiver", pki, library=library)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


def transport(port: int, pki: Pki, *, client: str = "client", deadline_s: float = 5.0) -> RelpTls:
    return RelpTls(receiver_at(port, pki, client=client), hostname="node", deadline_s=deadline_s)


@pytest.mark.parametrize("library", ["openssl", "gnutls"])
async def test_what_rsyslog_wrote_is_the_log(library: str, tmp_path: Path, pki: Pki) -> None:
    with running(tmp_path, pki, library=library) as receiver:
        shipped = Shipped(tmp_path, transport(receiver.port, pki), form=Cef(), entries=3000)
        await shipped.until_delivered()
        await until(lambda: len(receiver.received) >= 3001)
        assert shipped.check(receiver.received).repeated == 0
        assert shipped.errors == []


@pytest.mark.parametrize("kill", [False, True], ids=["stopped", "killed"])
async def test_a_receiver_that_ends_in_the_middle_loses_nothing_that_it_had_not_written(
    kill: bool, tmp_path: Path, pki: Pki
) -> None:
    """What it acknowledged and had in memory only is lost when it is killed: nothing else may be missing."""
    with running(tmp_path, pki) as receiver:
        shipped = Shipped(tmp_path, transport(receiver.port, pki), form=Ocsf(), entries=8000)
        async with shipped.running() as shipper:
            await until(lambda: shipper.view().sent > 2000)
            await asyncio.to_thread(receiver.stop, kill=kill)
            await until(lambda: shipper.view().error is not None)
            wrote = len(receiver.received)
            delivered = shipper.view().delivered
            await asyncio.to_thread(receiver.start)
            await until(lambda: shipper.view().delivered == 8000)
        await until(lambda: f'"size":{8000},' in receiver.newest)
        if not kill:
            assert wrote >= delivered
            shipped.check([line for line in receiver.received if line.endswith("}")])
        again = {int(each[1]) for line in receiver.received if (each := re.search(r'"uid":"[^"]*/(\d+)"', line))}
        assert set(range(delivered, 8000)) <= again


async def test_one_that_does_not_know_us_or_whom_we_do_not_know_is_told(tmp_path: Path, pki: Pki) -> None:
    with running(tmp_path, pki) as receiver:
        with pytest.raises(ExportUnreachable):
            await try_out(Cef(), transport(receiver.port, pki, client="stranger"), origin=ORIGIN, wall_ms=1)
        other = RelpTls(receiver_at(receiver.port, pki, client="client", server_name="other.example"), hostname="node")
        with pytest.raises(ExportUnreachable, match="certificate does not hold"):
            await try_out(Cef(), other, origin=ORIGIN, wall_ms=1)
        assert receiver.received == []
        await try_out(Cef(), transport(receiver.port, pki), origin=ORIGIN, wall_ms=1)
        await until(lambda: "audit.export.test" in "".join(receiver.received))


@contextlib.asynccontextmanager
async def scripted(pki: Pki, *answers: bytes | None, opens: bool = True) -> AsyncIterator[int]:
    """A receiver that opens the session, and answers what comes then with these; None: it closes. Its port."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (task := asyncio.current_task()) is not None:
            tasks.add(task)
        with contextlib.suppress(OSError):
            await reader.read(65536)
            if opens:
                writer.write(_response(1, OPENED))
                await reader.read(65536)
            for answer in answers:
                if answer is None:
                    break
                writer.write(answer)
            else:
                await reader.read()
        writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(pki, asks=True))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _response(number: int, data: bytes) -> bytes:
    return b"%d rsp %d %b\n" % (number, len(data), data)


@pytest.mark.parametrize(
    ("answers", "acknowledged", "told"),
    [
        ([_response(2, b"200 OK"), _response(3, b"200 OK"), b"0 serverclose 0\n"], 2, "it ended the session"),
        ([_response(2, b"200 OK"), b"0 serverclose 0 \n"], 1, "it ended the session"),
        ([_response(3, b"200 OK"), _response(4, b"200 OK"), None], 0, "it closed the connection"),
        ([_response(4, b"200 OK"), _response(3, b"200 OK"), _response(2, b"200 OK"), None], 3, "it closed"),
        ([_response(2, b"500 \x1b[31mno"), None], 0, r"it refused a message: 500  \[31mno"),
        ([_response(2, b"200 OK"), _response(2, b"200 OK")], 1, "it answered what it was not asked"),
        ([_response(9, b"200 OK")], 0, "it answered what it was not asked"),
        ([b"2 syslog 2 hi\n"], 0, "it answered what it was not asked"),
        ([b"HTTP/1.1 400 Bad Request\r\n"], 0, "no RELP"),
        ([b"2 rsp 6 200 OKx"], 0, "no RELP"),
        ([b"2 rsp 999999999 x"], 0, "its frame has more than 65536 bytes"),
        ([b"x" * 70], 0, "no RELP"),
        ([], 0, r"it acknowledged nothing for 0\.4 s"),
        ([_response(2, b"200 OK"), b"3 rsp 6 200"], 1, r"it acknowledged nothing for 0\.4 s"),
    ],
    ids=["whole", "hint", "gap", "backwards", "500", "twice", "strange", "command", "http", "tail", "endless", "x",
         "silent", "half"],
)  # fmt: skip
async def test_answers_count_in_their_order_and_only_if_they_are_some(
    answers: list[bytes | None], acknowledged: int, told: str, pki: Pki
) -> None:
    async with scripted(pki, *answers) as port:
        connection = await transport(port, pki, deadline_s=0.4).connect()
        await connection.send(messages(3))
        await connection.ended_within(5)
        with pytest.raises(ExportUnreachable, match=told) as caught:
            connection.check()
        assert str(caught.value).isprintable()
        assert connection.acknowledged == acknowledged
        await connection.close(in_good_order=True)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (_response(1, b"500 no room"), "it refused the session: 500 no room"),
        (_response(1, b"200 OK\ncommands=syslog"), "does not take syslog"),
        (_response(1, b"200 OK\nrelp_version=0\ncommands=eventlog"), "does not take syslog"),
        (_response(2, OPENED), "no RELP"),
        (b"\0" * 100, "no RELP"),
        (None, "it closed the connection"),
        (b"", r"nobody answered within 0\.4 s"),
    ],
    ids=["500", "version", "commands", "number", "garbage", "closes", "silent"],
)
async def test_a_session_that_is_not_opened_is_told(answer: bytes | None, told: str, pki: Pki) -> None:
    async with scripted(pki, answer, opens=False) as port:
        with pytest.raises(ExportUnreachable, match=told):
            await transport(port, pki, deadline_s=0.4).connect()


async def test_too_many_messages_that_wait_hold_the_sender_up(pki: Pki, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.audit.siem.relp._MOST_UNANSWERED", 4)
    async with scripted(pki) as port:
        connection = await transport(port, pki, deadline_s=0.4).connect()
        await connection.send(messages(5))
        with pytest.raises(ExportUnreachable, match="acknowledged nothing"):
            await connection.send(messages(5))
        await connection.close()
