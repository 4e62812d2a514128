"""Elasticsearch's bulk API over TLS: each item is looked at, what came before counts, what failed stops and is told."""

import asyncio
from pathlib import Path

import pytest

from appliance.audit.siem.ecs import Ecs
from appliance.audit.siem.elastic import Elasticsearch
from appliance.audit.siem.shipper import try_out
from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable
from tests.e2e.siem.receivers import API_KEY, Elastic, receiver_at, rude, secret_file, server_context, serving
from tests.e2e.siem.shipping import Shipped, messages, until
from tests.rsyslog import Pki
from tests.unit.audit.making import ORIGIN

pytestmark = pytest.mark.anyio
INDEX = "logs-holdfast.audit-default"


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def transport(
    port: int, pki: Pki, folder: Path, *, key: str = API_KEY, index: str = INDEX, client: str | None = None,
    deadline_s: float = 5.0,
) -> Elasticsearch:  # fmt: skip
    receiver = receiver_at(port, pki, client=client)
    return Elasticsearch(receiver, secret_file(folder, key), index=index, deadline_s=deadline_s)


async def test_what_is_in_the_index_is_the_log(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Elastic(), pki) as port:
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path), form=Ecs())
        await shipped.until_delivered()
        assert shipped.check(server.lines).repeated == 0
        assert f"{ORIGIN}/41" in server.documents


async def test_what_came_before_counts_as_delivered(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Elastic(), pki) as port:
        server.ends_after = ["once"]  # it had carried the request out
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path), form=Ecs())
        await shipped.until_delivered()
        assert "closed the connection" in shipped.errors[0]
        assert server.repeated > 0
        assert shipped.check(server.lines).repeated == 0


async def test_an_item_that_failed_is_told_and_what_follows_it_waits(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Elastic(), pki) as port:
        connection = await transport(port, pki, tmp_path).connect()
        await connection.send(messages(10))
        assert connection.acknowledged == 10
        server.items = {f"{ORIGIN}/13": 400}
        with pytest.raises(ExportUnreachable, match="400: document_parsing_exception") as caught:
            await connection.send(messages(10, 10))
        assert f"{ORIGIN}/13" in caught.value.message
        assert str(caught.value).isprintable()
        assert connection.acknowledged == 13
        assert await connection.ended_within(9)
        with pytest.raises(ExportUnreachable):
            connection.check()
        await connection.close()


@pytest.mark.parametrize("status", [429, 400, 503])
async def test_an_item_that_the_index_takes_later_is_sent_again(status: int, tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Elastic(), pki) as port:
        server.items = {f"{ORIGIN}/300": status}
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path), form=Ecs())
        await shipped.until_delivered()
        assert f"does not keep {ORIGIN}/300" in shipped.errors[0]
        shipped.check(server.lines)


@pytest.mark.parametrize("status", [429, 503, 413, 500])
async def test_a_request_that_is_refused_is_told_and_nothing_is_lost(status: int, tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Elastic(), pki) as port:
        server.answers = [status, status]
        shipped = Shipped(tmp_path, transport(port, pki, tmp_path), form=Ecs())
        await shipped.until_delivered()
        assert f"it answered {status}: rejected execution" in shipped.errors[0]
        shipped.check(server.lines)


async def test_a_wrong_key_and_an_index_that_is_not_there_are_told(tmp_path: Path, pki: Pki) -> None:
    async with serving(Elastic(), pki) as port:
        with pytest.raises(ExportUnusable, match="401: unable to authenticate") as caught:
            await try_out(Ecs(), transport(port, pki, tmp_path, key="c2VjcmV0"), origin=ORIGIN, wall_ms=1)
        assert "c2VjcmV0" not in f"{caught.value} {caught.value.record()}"
        with pytest.raises(ExportUnreachable, match="no such index"):
            await try_out(Ecs(), transport(port, pki, tmp_path, index="other"), origin=ORIGIN, wall_ms=1)


async def test_a_destination_is_tried_to_the_end(tmp_path: Path, pki: Pki) -> None:
    async with serving(server := Elastic(), pki) as port:
        await try_out(Ecs(), transport(port, pki, tmp_path), origin=ORIGIN, wall_ms=1)
        assert list(server.documents) == [f"{ORIGIN}/test/1"]


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[]", b"[" * 100_000, b'{"items":[]}', b'{"items":[{"index":{}}]}', b'{"items":[{"create":{"_id":"x"}}]}',
     b'{"items":[{"create":{"status":"201"}}]}', b"\xff", b"null"],
)  # fmt: skip
async def test_an_answer_that_says_nothing_acknowledges_nothing(body: bytes, tmp_path: Path, pki: Pki) -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
    async with rude(answer % (len(body), body), pki) as port:
        connection = await transport(port, pki, tmp_path).connect()
        with pytest.raises(ExportUnreachable):
            await connection.send(messages(1))
        assert connection.acknowledged == 0
        await connection.close()


async def test_one_that_never_answers_is_given_up(tmp_path: Path, pki: Pki) -> None:
    async with rude(None, pki) as port:
        with pytest.raises(ExportUnreachable, match=r"did not answer within 0\.3 s"):
            await transport(port, pki, tmp_path, deadline_s=0.3).connect()


async def test_a_receiver_may_ask_for_our_certificate(tmp_path: Path, pki: Pki) -> None:
    seen: list[object] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with_certificate = writer.get_extra_info("peercert")
        seen.append(with_certificate)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=server_context(pki, asks=True))
    port = server.sockets[0].getsockname()[1]
    connection = await transport(port, pki, tmp_path, client="client").connect()
    await connection.close()
    with pytest.raises(ExportUnreachable):
        await transport(port, pki, tmp_path, client="stranger").connect()
    with pytest.raises(ExportUnreachable):
        await transport(port, pki, tmp_path).connect()
    server.close()
    await until(lambda: len(seen) == 1)
