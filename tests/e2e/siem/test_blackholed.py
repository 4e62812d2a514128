"""A receiver that is cut off by what drops packets, on every transport: it delays export and nothing else."""

import contextlib
import ctypes
import dataclasses
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from appliance.audit.siem.elastic import Elasticsearch
from appliance.audit.siem.relp import RelpTls
from appliance.audit.siem.splunk import SplunkHec
from appliance.audit.siem.syslog import SyslogTls
from appliance.audit.siem.transport import ExportUnreachable, Transport
from tests.e2e.siem.receivers import API_KEY, TOKEN, Elastic, Hec, receiver_at, secret_file, serving
from tests.e2e.siem.shipping import Shipped, until
from tests.e2e.siem.test_relp import RelpRsyslog
from tests.rsyslog import Pki, Rsyslog
from tests.unit.audit.making import drafts, sign

pytestmark = pytest.mark.anyio
DEADLINE_S = 2.0
WITHIN_S = 60.0  # whatever else the machine does
ENTRIES = 600
_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_BPF_RET = 0x06  # and how many bytes of the packet are kept

Receiving = Callable[[Path, Pki], AbstractAsyncContextManager[tuple[int, Transport, Callable[[], list[str]]]]]


@contextlib.asynccontextmanager
async def _syslog(folder: Path, pki: Pki) -> AsyncIterator[tuple[int, Transport, Callable[[], list[str]]]]:
    receiver = Rsyslog(folder / "receiver", pki)
    receiver.start()
    try:
        to = receiver_at(receiver.port, pki, client="client")
        yield receiver.port, SyslogTls(to, hostname="node", deadline_s=DEADLINE_S), lambda: receiver.received
    finally:
        receiver.stop()


@contextlib.asynccontextmanager
async def _relp(folder: Path, pki: Pki) -> AsyncIterator[tuple[int, Transport, Callable[[], list[str]]]]:
    receiver = RelpRsyslog(folder / "receiver", pki)
    receiver.start()
    try:
        to = receiver_at(receiver.port, pki, client="client")
        yield receiver.port, RelpTls(to, hostname="node", deadline_s=DEADLINE_S), lambda: receiver.received
    finally:
        receiver.stop()


@contextlib.asynccontextmanager
async def _splunk(folder: Path, pki: Pki) -> AsyncIterator[tuple[int, Transport, Callable[[], list[str]]]]:
    async with serving(server := Hec(), pki) as port:
        token = secret_file(folder, TOKEN)
        to = SplunkHec(receiver_at(port, pki), token, hostname="node", deadline_s=DEADLINE_S, poll_every_s=0.02)
        yield port, to, lambda: server.lines


@contextlib.asynccontextmanager
async def _elastic(folder: Path, pki: Pki) -> AsyncIterator[tuple[int, Transport, Callable[[], list[str]]]]:
    async with serving(server := Elastic(), pki) as port:
        key = secret_file(folder, API_KEY)
        to = Elasticsearch(receiver_at(port, pki), key, index=server.index, deadline_s=DEADLINE_S)
        yield port, to, lambda: server.lines


def connected(port: int) -> list[int]:
    """The descriptors of this process's connections with a port."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the listing's own descriptor, and what only listens
            if stat.S_ISSOCK(link.stat().st_mode):
                with socket.socket(fileno=os.dup(int(link.name))) as each:
                    if each.family == socket.AF_INET and each.getpeername()[1] == port:
                        found.append(int(link.name))
    return found


def drop_packets(port: int) -> int:
    """Have the kernel drop what comes from a port to this process, before TCP sees it; for how many connections.

    Nothing is acknowledged and nothing answered any more, and nobody is told: as behind a firewall that forgot us.
    """
    program = ctypes.create_string_buffer(struct.pack("HBBI", _BPF_RET, 0, 0, 0))
    attach = struct.pack("HP", 1, ctypes.addressof(program))
    descriptors = connected(port)
    for descriptor in descriptors:
        with socket.socket(fileno=os.dup(descriptor)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attach)
    return len(descriptors)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(params=[_syslog, _relp, _splunk, _elastic], ids=["syslog", "relp", "splunk", "elasticsearch"])
def receiving(request: pytest.FixtureRequest) -> Receiving:
    made: Receiving = request.param
    return made


async def test_packets_dropped_on_a_living_connection_delay_export_and_lose_nothing(
    receiving: Receiving, tmp_path: Path, pki: Pki
) -> None:
    async with receiving(tmp_path, pki) as (port, transport, received):
        shipped = Shipped(tmp_path, transport, entries=ENTRIES)
        async with shipped.running() as shipper:
            await until(lambda: _names(received(), ENTRIES), WITHIN_S)
            assert drop_packets(port)
            shipped.log.append(drafts(range(ENTRIES, ENTRIES + 100)))
            shipped.log.publish(sign)
            await until(lambda: bool(shipped.errors), WITHIN_S)
            assert shipper.view().delivered <= ENTRIES, "what came after counts for nothing"
            await until(lambda: _names(received(), ENTRIES + 100), WITHIN_S)
            await until(lambda: shipper.view().sent == ENTRIES + 100 and shipper.view().error is None, WITHIN_S)
        await until(lambda: not connected(port), 20.0)  # sooner than TLS gives up a goodbye that never comes
        shipped.check(received())


@pytest.mark.parametrize("receiving", [_syslog, _relp], ids=["syslog", "relp"])
async def test_dropped_packets_are_noticed_where_nothing_is_sent(
    receiving: Receiving, tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over HTTPS there is no connection to notice it on: one that is idle is closed after some seconds."""
    monkeypatch.setattr("appliance.audit.siem.syslog._KEEPALIVE_IDLE_S", 1)
    monkeypatch.setattr("appliance.audit.siem.syslog._KEEPALIVE_EVERY_S", 1)
    async with receiving(tmp_path, pki) as (port, transport, _):
        connection = await transport.connect()
        try:
            assert drop_packets(port) == 1
            assert await connection.ended_within(WITHIN_S)
            with pytest.raises(ExportUnreachable, match="timed out"):
                connection.check()
        finally:
            await connection.close()


@pytest.mark.parametrize("make", [SyslogTls, RelpTls, SplunkHec], ids=["syslog", "relp", "splunk"])
async def test_a_name_without_an_address_is_told(
    make: Callable[..., Transport], tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*given: object, **named: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    receiver = dataclasses.replace(receiver_at(1, pki, client="client"), host="siem.example")
    more = (secret_file(tmp_path, TOKEN),) if make is SplunkHec else ()
    with pytest.raises(ExportUnreachable) as told:
        await make(receiver, *more, hostname="node").connect()
    assert told.value.cause == "its name has no address: Name or service not known"


def _names(lines: list[str], size: int) -> bool:
    """Whether the checkpoint of so many entries has come."""
    return any(f'"size":{size},' in line for line in lines[-3:])
