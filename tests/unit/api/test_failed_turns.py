"""A turn that failed: nothing of its request stays in memory, and its session goes on from where it stood."""

import asyncio
import contextlib
import gc
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest

from api import server
from api.answers import App
from api.app import create_app
from api.initialise import initialise
from api.openai.errors import Draining
from api.openai.running import Running
from api.services import Services
from appliance.audit import AuditUnavailable, Event, NodeAudit
from appliance.settings import load_settings
from appliance.store import StoreUnavailable
from benchmarks.stub import MODEL, Stub

HELLO = {"role": "user", "content": "hello"}
REFUSED = ['{"status": 400}', '{"status": 500}', '{"status": 503}']
BROKEN = [f'{{"{how}_after": {words}}}' for how in ("garbage", "error", "drop") for words in (0, 3)]
SILENT = '{"first_pause_s": 60}'  # until the turn's time is up


class Audit:
    """An audit log that takes so many records, and then no more."""

    def __init__(self) -> None:
        self.takes = 1 << 30
        self.error: object = None

    def begin(self, *_: Event) -> "asyncio.Future[int]":
        recorded: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.takes -= 1
        if self.takes < 0:
            recorded.set_exception(AuditUnavailable("the log cannot be written", cause="a test", remedy=""))
        else:
            recorded.set_result(1)
        return recorded

    async def record(self, *events: Event) -> int:
        return await self.begin(*events)


@dataclass(slots=True)
class Answer:
    """What a client got until now."""

    status: int = 0
    headers: Mapping[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""

    @property
    def session(self) -> bytes:
        return self.headers[b"x-session-id"]


@dataclass(slots=True)
class Gateway:
    """The data listener's application over a real store and a stub of the engine, all in this process."""

    app: App
    services: Services
    audit: Audit
    api_key: str

    async def ask(
        self,
        *messages: Mapping[str, Any],
        stream: bool = False,
        leave: asyncio.Event | None = None,
        answer: Answer | None = None,
    ) -> Answer:
        """A chat completion; its client leaves when `leave` is set."""
        answer = answer or Answer()
        headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {self.api_key}".encode())]
        scope = {"type": "http", "method": "POST", "raw_path": b"/v1/chat/completions", "headers": headers}
        body = [json.dumps({"model": MODEL, "messages": messages, "stream": stream}).encode()]

        async def receive() -> dict[str, Any]:
            if body:
                return {"type": "http.request", "body": body.pop()}
            await (leave or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                answer.status, answer.headers = message["status"], dict(message["headers"])
            else:
                answer.body += message["body"]

        await self.app(scope, receive, send)
        return answer


@contextlib.asynccontextmanager
async def serving(place: Path, **settings: Any) -> AsyncIterator[Gateway]:
    """A gateway with these settings of its section of that name."""
    chosen = {
        "vault": {"seal": "key-file"},
        "engine": {"socket": str(place / "engine.sock")},
        "gateway": settings,
    }
    loaded = load_settings(chosen, environment={}, state_dir=place / "state")
    await asyncio.to_thread(
        initialise, loaded, passphrase=None, tenant_name="tenant", permissions=(), demo_key_file="api-key"
    )
    stub = await asyncio.get_running_loop().create_unix_server(Stub, "engine.sock")
    async with stub, server._services(loaded) as services, asyncio.timeout(60):
        watching = asyncio.create_task(services.watch.run())
        await services.watch.wait_ready()
        audit = Audit()
        recorded_there = replace(services, audit=cast("NodeAudit", audit))
        try:
            api_key = (place / "state" / "api-key").read_text().strip()
            yield Gateway(create_app(recorded_there), recorded_there, audit, api_key)
        finally:
            watching.cancel()


@pytest.fixture
async def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.chdir(tmp_path)  # the engine's socket has a short name
    async with serving(tmp_path, request_timeout_s=1) as made:
        yield made


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is in a circle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def turns_in_memory() -> list[object]:
    return [each for each in gc.get_objects() if type(each) is Running]


async def nothing_is_left(before: list[object], of: object) -> None:
    for _ in range(100):  # what was cancelled ends when the loop comes round
        await asyncio.sleep(0)
    assert all(each in before for each in turns_in_memory()), of


def stub(plan: str) -> dict[str, str]:
    return {"role": "user", "content": f"@stub {plan}"}


def failing(stream: bool) -> list[str]:
    """The ways in which the stub fails an answer."""
    return [*REFUSED, *(BROKEN if stream else ()), SILENT]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  (within the deadline of `serving`)
        await asyncio.sleep(0)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("stream", [False, True])
async def test_nothing_of_a_turn_that_the_engine_failed_is_left(gateway: Gateway, stream: bool) -> None:
    before = turns_in_memory()
    for plan in ("{}", *failing(stream)):
        await gateway.ask(stub(plan), stream=stream)
        await nothing_is_left(before, plan)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("plan", [SILENT, '{"chunks": 10000, "pause_s": 0.01}'])
async def test_nothing_of_a_turn_that_was_broken_off_is_left(gateway: Gateway, plan: str, stream: bool) -> None:
    before = turns_in_memory()
    for client_leaves in (True, False):
        leave, answer, requests = asyncio.Event(), Answer(), Stub.counts.requests
        asking = asyncio.create_task(gateway.ask(stub(plan), stream=stream, leave=leave, answer=answer))
        await until(lambda seen=requests: Stub.counts.requests > seen)  # type: ignore[misc]
        if stream and plan != SILENT:
            await until(lambda of=answer: of.status > 0)  # type: ignore[misc]
        if client_leaves:
            leave.set()
        else:
            for turn in gateway.services.lifecycle.turns:
                turn.interrupt(Draining("the gateway is stopping", cause="a test", remedy=""))
            del turn
        await asking
        del asking
        await nothing_is_left(before, client_leaves)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("store_fails", [False, True])
async def test_nothing_of_a_turn_that_could_not_be_written_down_is_left(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, store_fails: bool, stream: bool
) -> None:
    before = turns_in_memory()
    if store_fails:
        monkeypatch.setattr(gateway.services.store._writer, "_execute", unavailable)
    for plan in ("{}", '{"status": 400}', SILENT):
        for records in range(4):
            gateway.audit.takes = records
            await gateway.ask(stub(plan), stream=stream)
            await nothing_is_left(before, (plan, records))


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_turn_that_failed_is_asked_again_in_its_session(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    first = await gateway.ask(HELLO)
    history = [HELLO, json.loads(first.body)["choices"][0]["message"]]
    for plan in failing(stream):
        failed = await gateway.ask(*history, stub(plan), stream=stream)
        assert failed.session == first.session, plan
    with monkeypatch.context() as patched:
        patched.setattr(gateway.services.store._writer, "_execute", unavailable)
        assert b"store_unavailable" in (await gateway.ask(*history, HELLO, stream=stream)).body
    again = await gateway.ask(*history, HELLO)
    assert (again.status, again.session) == (200, first.session)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_engine_fails_of_one_client_is_refused_to_nobody_else(gateway: Gateway, stream: bool) -> None:
    for plan in failing(stream):
        failed = await gateway.ask(stub(plan), stream=stream)
        assert b"error" in failed.body
        assert (await gateway.ask(HELLO)).status == 200, plan


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_is_found_gone_is_one_that_is_not_ready(gateway: Gateway, stream: bool) -> None:
    await gateway.services.engine.close()  # its connections, which would outlast it
    os.unlink("engine.sock")  # noqa: PTH108  (a path's is for a thread)
    assert gateway.services.watch.ready, "nobody has missed it yet"
    refused = await gateway.ask(HELLO, stream=stream)
    assert (refused.status, refused.headers[b"retry-after"]) == (503, b"2")
    assert json.loads(refused.body)["error"]["code"] == "engine_starting"
    assert b"engine.sock" not in refused.body
    await until(lambda: not gateway.services.watch.ready)


def unavailable(*_: object) -> None:
    raise StoreUnavailable("the database cannot be used", cause="a test", remedy="")
