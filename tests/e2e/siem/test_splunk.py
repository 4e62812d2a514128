"""Splunk's HTTP Event Collector over TLS: what it acknowledged it keeps, and what it did not is sent again."""

import asyncio
import json
from pathlib import Path

import pytest

from appliance.audit.siem.cef import Cef
from appliance.audit.siem.shipper import try_out
from appliance.audit.siem.splunk import SplunkHec
from appliance.audit.siem.syslog import Receiver
from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable
from tests.e2e.siem.receivers import TOKEN, Hec, receiver_at, rude, secret_file, serving
from tests.e2e.siem.shipping import Shipped, messages, until
from tests.rsyslog import Pki
from tests.unit.audit.making import ORIGIN

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def transport(
    to: int | Receiver,
    pki: Pki,
    folder: Path,
    *,
    token: str = TOKEN,
    deadline_s: float = 5.0,
    ack_within_s: float = 5.0,
) -> SplunkHec:
    receiver = receiver_at(to, pki) if isinstance(to, int) else to
    return SplunkHec(
        receiver,
        secret_file(folder, token),
        hostname="node",
        deadline_s=deadline_s,
        ack_within_s=ack_within_s,
        poll_every_s=0.02,
    )


async def test_what_splunk_indexed_is_the_log(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path), form=Cef())
        await shipped.until_delivered()
        assert shipped.check(server.lines).repeated == 0
        assert server.indexed[41]["fields"] == {"holdfast_id": f"{ORIGIN}/41"}
        assert (server.indexed[0]["host"], server.indexed[0]["source"]) == ("node", "holdfast")
        assert f"rt={server.indexed[0]['time'] * 1000:.0f} " in server.lines[0]


async def test_it_counts_as_acknowledged_in_its_order_and_not_before(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        indexed = {1, 2}
        server.acknowledges = lambda ack_id: ack_id in indexed
        connection = await transport(port, pki, tmp_path).connect()
        for first in range(0, 40, 10):
            await connection.send(messages(10, first))
        await until(lambda: len(server.indexed) == 20)
        polls = server.polls
        await until(lambda: server.polls > polls + 1)
        assert connection.acknowledged == 0
        indexed.add(0)
        await until(lambda: connection.acknowledged == 30)
        indexed.add(3)
        await until(lambda: connection.acknowledged == 40)
        polls = server.polls
        assert not await connection.ended_within(0.1)
        assert server.polls <= polls + 1  # nothing waits: nothing is asked
        await connection.close(in_good_order=True)


async def test_what_is_never_acknowledged_ends_the_connection_and_is_sent_again(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        server.acknowledges = lambda ack_id: ack_id != 1 or len(server.channels) > 1
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path, ack_within_s=0.3))
        await shipped.until_delivered()
        assert "has not indexed within 0.3 s" in shipped.errors[0]
        assert shipped.check(server.lines).repeated >= 0
        assert len(server.channels) == 2


async def test_what_splunk_lost_before_it_was_indexed_is_sent_again(tmp_path: Path, pki: Pki) -> None:
    server = Hec()
    server.acknowledges = lambda ack_id: ack_id == 0
    async with serving(server, pki) as port:
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path))
        async with shipped.running() as shipper:
            await until(lambda: shipper.view().sent == 600 and len(server.indexed) == 256)
    server.taken.clear()  # it had them in memory
    server.acknowledges = lambda _: True
    async with serving(server, pki, port=port):
        await shipped.until_delivered()
        shipped.check(server.lines)


@pytest.mark.parametrize("status", [503, 429, 500, 400])
async def test_a_refusal_is_told_and_nothing_is_lost(status: int, tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        server.answers = [status]
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path))
        await shipped.until_delivered()
        assert f"it answered {status}" in shipped.errors[0]
        shipped.check(server.lines)


async def test_a_connection_that_ends_within_an_answer_loses_nothing(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        server.ends_after = ["once", "twice"]
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path))
        await shipped.until_delivered()
        assert "closed the connection" in shipped.errors[0]
        shipped.check(server.lines)


async def test_a_collector_that_is_full_is_not_sent_to(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        server.healthy = False
        with pytest.raises(ExportUnreachable, match="503: HEC is unhealthy"):
            await transport(port, pki, tmp_path).connect()


async def test_a_wrong_token_is_told_with_its_file_and_never_itself(tmp_path: Path, pki: Pki) -> None:
    async with serving(Hec(), pki) as port:
        to = transport(port, pki, tmp_path, token="0000-secret")
        with pytest.raises(ExportUnusable, match="403: Invalid token") as caught:
            await try_out(Cef(), to, origin=ORIGIN, wall_ms=1)
        assert "0000-secret" not in f"{caught.value} {caught.value.record()}"
        assert str(tmp_path / "token") in caught.value.cause


async def test_a_token_without_acknowledgement_is_refused(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        server.uses_acknowledgement = False
        with pytest.raises(ExportUnusable, match="acknowledges nothing"):
            await try_out(Cef(), transport(port, pki, tmp_path), origin=ORIGIN, wall_ms=1)


async def test_a_destination_is_tried_to_the_end(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Hec(), pki) as port:
        await try_out(Cef(), transport(port, pki, tmp_path), origin=ORIGIN, wall_ms=1)
        assert "audit.export.test" in server.lines[0]


@pytest.mark.parametrize(
    ("content", "mode", "told"),
    [
        (TOKEN, 0o640, "its mode is 0640"),
        ("", 0o600, "something else than one word"),
        ("a b", 0o600, "something else than one word"),
        ("a\r\nX-Evil: 1", 0o600, "something else than one word"),
        ("x" * 5000, 0o600, "something else than one word"),
    ],
)
async def test_a_token_file_that_cannot_be_one_is_refused(
    content: str, mode: int, told: str, tmp_path: Path, pki: Pki
) -> None:
    to = transport(9, pki, tmp_path)
    secret_file(tmp_path, content, mode=mode)
    with pytest.raises(ExportUnusable, match=told):
        await to.connect()
    (tmp_path / "token").unlink()
    with pytest.raises(ExportUnusable, match="No such file"):
        await to.connect()
    (tmp_path / "token").mkdir()
    with pytest.raises(ExportUnusable, match="it is no file"):
        await to.connect()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "did not answer within 0.3 s"),
        (b"\x00\xff garbage\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "closed the connection"),
        (b"HTTP/1.1 302 Found\r\nLocation: https://elsewhere.example/\r\nContent-Length: 0\r\n\r\n", "redirect"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 13\r\n\r\n\x1b[31m\xe2\x80\xaebad\n\n", r"503: \[31m"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * 9999999, "more than 4194304 bytes"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 99999 + b"\r\n\r\n", "no HTTP"),
    ],
    ids=["never", "garbage", "cut", "redirect", "escapes", "endless", "long"],
)
async def test_whatever_is_answered_is_told_and_bounded(
    answer: bytes | None, told: str, tmp_path: Path, pki: Pki
) -> None:
    async with rude(answer, pki) as port:
        with pytest.raises(ExportUnreachable, match=told) as caught:
            await transport(port, pki, tmp_path, deadline_s=0.3 if answer is None else 5.0).connect()
        assert str(caught.value).isprintable()


async def test_a_certificate_for_another_name_or_from_another_ca_is_refused(tmp_path: Path, pki: Pki) -> None:
    async with serving(Hec(), pki) as port:
        for to in (
            receiver_at(port, pki, server_name="other.example"),
            Receiver("127.0.0.1", port, "127.0.0.1", pki.folder / "other-ca.pem", None, None),
        ):
            with pytest.raises(ExportUnreachable, match="certificate does not hold"):
                await transport(to, pki, tmp_path).connect()


async def test_nobody_there_is_told(tmp_path: Path, pki: Pki) -> None:
    with pytest.raises(ExportUnreachable, match="refused"):
        await transport(9, pki, tmp_path).connect()


async def test_a_proxy_of_the_environment_is_not_used(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    async with serving(Hec(), pki) as port:
        connection = await transport(port, pki, tmp_path).connect()
        await connection.close()


async def test_too_many_requests_that_wait_hold_the_sender_up(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.audit.siem.splunk._MOST_REQUESTS", 3)
    async with serving(server := Hec(), pki) as port:
        server.acknowledges = lambda _: False
        connection = await transport(port, pki, tmp_path).connect()
        for first in range(3):
            await connection.send(messages(1, first))
        waiting = asyncio.create_task(connection.send(messages(1, 3)))
        assert not (await asyncio.wait([waiting], timeout=0.1))[0]
        server.acknowledges = lambda _: True
        await waiting
        await until(lambda: connection.acknowledged == 4)
        assert [json.loads(line)["number"] for line in server.lines] == [0, 1, 2, 3]
        await connection.close()
