"""The client against a server that says exactly what the test tells it to, byte by byte."""

import asyncio
import itertools
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.engine.client import EngineClient, EngineLost, EngineRejected, EngineUnavailable, ModelCard
from appliance.engine.protocol import LeaseReport, TurnAccount, TurnEnd, turn_accounts_answer
from appliance.engine.wire import MalformedMessage
from appliance.errors import Fault

Script = Callable[["Peer"], Awaitable[None]]

REPORT = LeaseReport((), 1, 2, 3, 32, None, 4, 5)


class Peer:
    """One connection, seen from the engine."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.head = b""
        self.body = b""

    async def heard(self) -> bool:
        """Read one request; whether there was one."""
        try:
            self.head = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return False
        lengths = [line for line in self.head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
        self.body = await self.reader.readexactly(int(lengths[0].split(b":")[1])) if lengths else b""
        return True

    async def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
            await self.writer.drain()

    async def answer(self, body: bytes, status: int = 200) -> None:
        await self.say(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    async def begin_stream(self) -> None:
        await self.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def chunk(self, data: bytes) -> None:
        await self.say(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.say(b"0\r\n\r\n")


class Engine:
    """A server on a Unix socket that follows a script for each connection."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.peers: list[Peer] = []
        self.gone = asyncio.Event()  # a client closed its connection
        self._server: asyncio.Server | None = None

    async def follow(self, script: Script) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = Peer(reader, writer)
            self.peers.append(peer)
            try:
                await script(peer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                self.gone.set()
                writer.close()

        # A relative name, as vLLM binds it: it fits wherever the folder is.
        directory = os.open(self.socket.parent, os.O_PATH)
        self._server = await asyncio.start_unix_server(connected, f"/proc/self/fd/{directory}/{self.socket.name}")
        os.close(directory)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[Engine]:
    """An engine that has no script yet."""
    made = Engine(tmp_path / "engine.sock")
    yield made
    await made.close()


@pytest.fixture
async def client(engine: Engine) -> AsyncIterator[EngineClient]:
    """A client of that engine."""
    async with EngineClient(engine.socket) as made:
        yield made


def streaming(*chunks: bytes, ends: bool = True) -> Script:
    async def script(peer: Peer) -> None:
        while await peer.heard():
            await peer.begin_stream()
            for chunk in chunks:
                await peer.chunk(chunk)
            if not ends:
                return
            await peer.end_stream()

    return script


def answering(body: bytes, status: int = 200) -> Script:
    async def script(peer: Peer) -> None:
        while await peer.heard():
            await peer.answer(body, status)

    return script


async def payloads(client: EngineClient) -> list[bytes]:
    async with client.stream("/v1/chat/completions", b"{}", request_id="req_1") as events:
        return [payload async for payload in events]


async def test_a_stream_yields_the_payloads_until_done(engine: Engine, client: EngineClient) -> None:
    await engine.follow(streaming(b'data: {"a":1}\n\n', b'data: {"b":2}\n\ndata: {"c":3}\n\n', b"data: [DONE]\n\n"))
    assert await payloads(client) == [b'{"a":1}', b'{"b":2}', b'{"c":3}']


def plain(text: bytes) -> bool:
    return b"\n" not in text and b"\r" not in text and text != b"[DONE]" and not text.startswith(b'{"error":')


@given(
    texts=st.lists(st.binary(min_size=1, max_size=40).filter(plain)),
    cuts=st.lists(st.integers(0, 400), max_size=30),
)
def test_events_are_the_same_however_the_socket_cuts_them(texts: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(b"data: " + text + b"\n\n" for text in texts) + b"data: [DONE]\n\n"
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    parts = [whole[start:end] for start, end in itertools.pairwise(edges) if end > start]
    assert asyncio.run(_events_of(parts)) == texts


async def _events_of(parts: Iterable[bytes]) -> list[bytes]:
    """What a stream makes of these reads; the reads are given to it one by one, as the socket would."""
    stream = EngineClient(Path("/nowhere/engine.sock")).stream("/", b"", request_id="")
    unread = iter(parts)

    async def read() -> bytes:
        return next(unread, b"")

    return [payload async for batch in stream._batches(read) for payload in batch]


async def test_batches_hand_out_what_came_together_and_what_came_before_a_failure(
    engine: Engine, client: EngineClient
) -> None:
    await engine.follow(streaming(b'data: 1\n\ndata: 2\n\ndata: {"error":{"code":500}}\n\ndata: [DONE]\n\n'))
    async with client.batches("/v1/completions", b"{}", request_id="req_1") as batches:
        assert await anext(batches) == [b"1", b"2"]
        with pytest.raises(EngineLost):
            await anext(batches)


async def test_an_event_of_several_lines_is_one_payload(engine: Engine, client: EngineClient) -> None:
    await engine.follow(streaming(b": waiting\n\nevent: error\ndata: one\ndata:two\n\ndata: [DONE]\n\n"))
    assert await payloads(client) == [b"one\ntwo"]


async def test_an_event_of_megabytes_arrives_whole(engine: Engine, client: EngineClient) -> None:
    huge = b"x" * (4 << 20)
    await engine.follow(streaming(b"data: ", huge[: 3 << 20], huge[3 << 20 :], b"\n\ndata: [DONE]\n\n"))
    assert await payloads(client) == [huge]


async def test_an_event_over_the_bound_ends_the_stream(engine: Engine) -> None:
    await engine.follow(streaming(*[b"data: " + b"x" * 60_000] * 4))
    async with EngineClient(engine.socket, max_answer_bytes=100_000) as client:
        with pytest.raises(EngineLost, match="larger than 100000 bytes"):
            await payloads(client)


async def test_a_connection_is_used_again_after_a_whole_stream(engine: Engine, client: EngineClient) -> None:
    await engine.follow(streaming(b"data: 1\n\n", b"data: [DONE]\n\n"))
    for _ in range(3):
        assert await payloads(client) == [b"1"]
    assert len(engine.peers) == 1


async def test_leaving_a_stream_closes_its_connection(engine: Engine, client: EngineClient) -> None:
    async def script(peer: Peer) -> None:
        await peer.heard()
        await peer.begin_stream()
        await peer.chunk(b"data: 1\n\n")
        await peer.reader.read()  # until the client is gone

    await engine.follow(script)
    async with asyncio.timeout(10), client.stream("/v1/completions", b"{}", request_id="req_1") as events:
        assert await anext(events) == b"1"
        assert not engine.gone.is_set()
    async with asyncio.timeout(10):
        await engine.gone.wait()


async def test_cancelling_a_call_closes_its_connection(engine: Engine, client: EngineClient) -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.heard()
        asked.set()
        await peer.reader.read()

    await engine.follow(script)
    call = asyncio.create_task(client.call("/v1/completions", b"{}", request_id="req_1"))
    async with asyncio.timeout(10):
        await asked.wait()
        call.cancel()
        await engine.gone.wait()
    with pytest.raises(asyncio.CancelledError):
        await call


@pytest.mark.parametrize("ends", [True, False], ids=["closed politely", "cut off"])
async def test_a_stream_that_stops_before_done_was_lost(engine: Engine, client: EngineClient, ends: bool) -> None:
    await engine.follow(streaming(b"data: 1\n\n", b'data: {"half', ends=ends))
    async with client.stream("/v1/completions", b"{}", request_id="req_1") as events:
        assert await anext(events) == b"1"
        with pytest.raises(EngineLost):
            await anext(events)


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (b'{"error":{"message":"secret","type":"InternalServerError","code":500}}', EngineLost),
        (b'{"error":{"message":"secret","type":"BadRequestError","code":400}}', EngineRejected),
        (b'{"error":"secret"}', EngineLost),
        (b'{"error":', EngineLost),
    ],
)
async def test_an_error_event_ends_the_stream_though_done_comes_behind_it(
    engine: Engine, client: EngineClient, event: bytes, kind: type[Exception]
) -> None:
    await engine.follow(streaming(b"data: 1\n\ndata: " + event + b"\n\ndata: [DONE]\n\n"))
    async with client.stream("/v1/completions", b"{}", request_id="req_1") as events:
        assert await anext(events) == b"1"
        with pytest.raises(kind) as failed:
            await anext(events)
    assert "secret" not in str(failed.value)


async def test_what_is_no_event_stream_was_lost(engine: Engine, client: EngineClient) -> None:
    await engine.follow(streaming(b"<html>secret\n\n"))
    with pytest.raises(EngineLost) as lost:
        await payloads(client)
    assert "secret" not in str(lost.value)


async def test_what_is_no_http_was_lost(engine: Engine, client: EngineClient) -> None:
    async def script(peer: Peer) -> None:
        await peer.heard()
        await peer.say(b"SSH-2.0-secret\r\n\r\n")

    await engine.follow(script)
    with pytest.raises(EngineLost) as lost:
        await client.call("/v1/completions", b"{}", request_id="req_1")
    assert "secret" not in str(lost.value)


async def test_silence_in_a_stream_has_an_end(engine: Engine) -> None:
    async def script(peer: Peer) -> None:
        await peer.heard()
        await peer.begin_stream()
        await peer.chunk(b"data: 1\n\n")
        await peer.reader.read()

    await engine.follow(script)
    async with EngineClient(engine.socket, silence_timeout_s=0.05) as client:
        with pytest.raises(EngineLost, match="said nothing for too long"):
            await payloads(client)


async def test_a_call_has_a_deadline_however_busily_the_answer_drips(engine: Engine, client: EngineClient) -> None:
    async def script(peer: Peer) -> None:
        await peer.heard()
        await peer.begin_stream()
        while True:
            await peer.chunk(b" ")
            await asyncio.sleep(0.01)

    await engine.follow(script)
    with pytest.raises(EngineLost, match=r"within 0\.1 s"):
        await client.call("/v1/completions", b"{}", request_id="req_1", deadline_s=0.1)


async def test_a_refusal_carries_the_engines_answer_and_no_error_text_does(
    engine: Engine, client: EngineClient
) -> None:
    await engine.follow(answering(b'{"error":{"message":"secret"}}', 400))
    for attempt in (client.call("/v1/completions", b"{}", request_id="req_1"), payloads(client)):
        with pytest.raises(EngineRejected) as refused:
            await attempt
        assert (refused.value.status, refused.value.fault) == (400, Fault.CALLER)
        assert b"secret" in refused.value.body
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("status", "kind"), [(503, EngineUnavailable), (500, EngineLost), (404, EngineRejected)])
async def test_what_a_status_means(engine: Engine, client: EngineClient, status: int, kind: type[Exception]) -> None:
    await engine.follow(answering(b"{}", status))
    with pytest.raises(kind):
        await client.call("/v1/completions", b"{}", request_id="req_1")
    with pytest.raises(kind):
        await payloads(client)


async def test_an_answer_over_the_bound_is_refused(engine: Engine) -> None:
    await engine.follow(answering(b"x" * 2000))
    async with EngineClient(engine.socket, max_answer_bytes=1000) as client:
        with pytest.raises(EngineLost, match="larger than 1000 bytes"):
            await client.call("/v1/completions", b"{}", request_id="req_1")


async def test_the_request_names_itself_and_carries_the_headers_it_was_given(
    engine: Engine, client: EngineClient
) -> None:
    await engine.follow(answering(b'{"ok":true}'))
    status, body = await client.call("/v1/x", b'{"q":1}', request_id="req_7", headers={"X-Other": "1"})
    assert (status, json.loads(body)) == (200, {"ok": True})
    head = engine.peers[0].head.lower()
    assert head.startswith(b"post /v1/x http/1.1\r\n")
    assert b"x-request-id: req_7\r\n" in head
    assert b"x-other: 1\r\n" in head
    assert b"content-type: application/json\r\n" in head
    assert engine.peers[0].body == b'{"q":1}'


@pytest.mark.parametrize("folder", ["", "not-there"])
async def test_no_engine_is_said_to_be_unavailable(tmp_path: Path, folder: str) -> None:
    async with EngineClient(tmp_path / folder / "engine.sock") as client:
        assert await client.health() is False
        with pytest.raises(EngineUnavailable, match="nothing answers"):
            await client.models()
        with pytest.raises(EngineUnavailable):
            await payloads(client)


async def test_an_engine_whose_folder_was_made_anew_is_found_again(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    folder.mkdir()
    async with EngineClient(folder / "engine.sock") as client:
        assert await client.health() is False
        folder.rmdir()
        (tmp_path / "held").mkdir()  # so that the new folder is another inode
        folder.mkdir()
        engine = Engine(folder / "engine.sock")
        await engine.follow(answering(b""))
        assert await client.health() is False  # this finds out
        assert await client.health() is True
    await engine.close()


async def test_a_path_longer_than_a_socket_address_can_be_reached(tmp_path: Path) -> None:
    folder = tmp_path.joinpath(*["a-home-that-is-very-deep"] * 8)
    folder.mkdir(parents=True)
    engine = Engine(folder / "engine.sock")
    await engine.follow(answering(b""))
    async with EngineClient(engine.socket) as client:
        assert await client.health() is True
    await engine.close()


async def test_an_engine_that_calls_itself_ill_is_not_healthy(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(b"", 503))
    assert await client.health() is False


async def test_the_models_are_listed_with_their_context(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(b'{"data":[{"id":"harbour","max_model_len":4096},{"id":"quay"}]}'))
    assert await client.models() == [ModelCard("harbour", 4096), ModelCard("quay", None)]


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data":[{}]}', b'{"data":3}', b"\xff"])
async def test_models_that_cannot_be_read_are_an_error(engine: Engine, client: EngineClient, body: bytes) -> None:
    await engine.follow(answering(body))
    with pytest.raises(EngineLost, match="list of models"):
        await client.models()


async def test_leases_are_released_and_reported(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(json.dumps(REPORT.to_wire()).encode()))
    assert await client.leases(["label-1"]) == REPORT
    assert engine.peers[0].head.startswith(b"POST /holdfast/leases ")
    assert json.loads(engine.peers[0].body) == {"release": ["label-1"], "awaited": [], "every": False}


async def test_every_lease_is_reported_to_whoever_asks_for_it(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(json.dumps(REPORT.to_wire()).encode()))
    assert await client.leases(every=True) == REPORT
    assert json.loads(engine.peers[0].body) == {"release": [], "awaited": [], "every": True}


@pytest.mark.parametrize(("body", "kind"), [(b"{}", MalformedMessage), (b"not json", EngineLost)])
async def test_leases_that_cannot_be_read_are_an_error(
    engine: Engine, client: EngineClient, body: bytes, kind: type[Exception]
) -> None:
    await engine.follow(answering(body))
    with pytest.raises(kind):
        await client.leases()


async def test_what_is_kept_of_one_session_is_asked_for_by_its_labels(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(b"{}"))
    with pytest.raises(MalformedMessage):
        await client.kv(of=("t-1", "s-1"))
    assert engine.peers[0].head.startswith(b"GET /holdfast/kv?tenant=t-1&session=s-1 ")


async def test_sessions_are_sent_down_to_a_tier(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(b'{"demoted": ["label-2"]}'))
    assert await client.demote("disk", ["label-1", "label-2"]) == {"label-2"}
    assert engine.peers[0].head.startswith(b"POST /holdfast/demote ")
    assert json.loads(engine.peers[0].body) == {"tier": "disk", "sessions": ["label-1", "label-2"]}


async def test_an_answer_that_does_not_say_which_were_is_an_error(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(b'{"leases": []}'))
    with pytest.raises(MalformedMessage):
        await client.demote("dram", ["label-1"])


def ends_of(*turns: str) -> list[TurnEnd]:
    return [TurnEnd("s", "t", turn, "end_turn", 1, 15.0) for turn in turns]


async def test_each_turn_gets_its_own_account(engine: Engine, client: EngineClient) -> None:
    accounts = (TurnAccount("a", 32), None, TurnAccount("c", 64))
    await engine.follow(answering(json.dumps(turn_accounts_answer(accounts)).encode()))
    assert await client.turns_ended(ends_of("a", "b", "c")) == accounts


@pytest.mark.parametrize("turns", [("b", "a"), ("a", "other"), ("a",), ("a", "b", "c")])
async def test_an_account_of_another_turn_is_refused(
    engine: Engine, client: EngineClient, turns: tuple[str, ...]
) -> None:
    answer = turn_accounts_answer([TurnAccount(turn, 32) for turn in turns])
    await engine.follow(answering(json.dumps(answer).encode()))
    with pytest.raises(MalformedMessage, match="account"):
        await client.turns_ended(ends_of("a", "b"))


async def test_the_metrics_come_as_text(engine: Engine, client: EngineClient) -> None:
    await engine.follow(answering(b"vllm:x 1\n"))
    assert await client.metrics() == "vllm:x 1\n"
