"""The timer in the engine's front end: it asks when a lease is due or may have been left, and sleeps otherwise."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest

from appliance.engine.picture import KV_PATH
from appliance.engine.plugin import ExpiryTimer, LeaseEndpoints, _EndOfRequests
from appliance.engine.protocol import DEMOTE_PATH, LEASES_PATH, PLUGIN_NAME, TURNS_PATH

DEADLINE_S = 5.0
NEVER_S = 3600.0


class Engine:
    """Answers ticks from a list, and counts them; after the list there are no leases."""

    def __init__(self, *answers: float | Exception | None) -> None:
        self.ticks = 0
        self._answers = list(answers)
        self._asked = asyncio.Condition()

    async def tick(self) -> float | None:
        """What the engine core would answer."""
        async with self._asked:
            self.ticks += 1
            self._asked.notify_all()
        answer = self._answers.pop(0) if self._answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def asked(self, times: int) -> None:
        """Wait until the timer has asked so often."""
        async with asyncio.timeout(DEADLINE_S), self._asked:
            await self._asked.wait_for(lambda: self.ticks >= times)


@contextlib.asynccontextmanager
async def running(
    engine: Engine, *, recheck_s: float = NEVER_S, retry_s: float = NEVER_S
) -> AsyncIterator[ExpiryTimer]:
    """A timer that runs while the block does."""
    timer = ExpiryTimer(engine.tick, settle_s=0.0, recheck_s=recheck_s, retry_s=retry_s)
    task = asyncio.create_task(timer.run())
    yield timer
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def let_others_run() -> None:
    """Give every task that could go on the chance to."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_it_asks_nothing_while_nothing_happens() -> None:
    engine = Engine()
    async with running(engine):
        await let_others_run()
    assert engine.ticks == 0


async def test_it_asks_after_a_request_has_ended() -> None:
    engine = Engine()
    async with running(engine) as timer:
        timer.request_ended()
        await engine.asked(1)
        await let_others_run()
    assert engine.ticks == 1


async def test_it_asks_again_when_the_lease_that_it_learned_of_is_due() -> None:
    engine = Engine(0.01, 0.01, None)
    async with running(engine) as timer:
        timer.request_ended()
        await engine.asked(3)
        await let_others_run()
    assert engine.ticks == 3


async def test_a_burst_of_ends_costs_one_question() -> None:
    engine = Engine()
    async with running(engine) as timer:
        for _ in range(100):
            timer.request_ended()
        await engine.asked(1)
        await let_others_run()
    assert engine.ticks == 1


async def test_it_asks_once_more_for_a_request_whose_end_took_longer() -> None:
    engine = Engine(None)
    async with running(engine, recheck_s=0.01) as timer:
        timer.request_ended()
        await engine.asked(2)
        await let_others_run()
    assert engine.ticks == 2


async def test_it_asks_once_more_even_when_a_known_lease_is_due_much_later() -> None:
    engine = Engine(NEVER_S, NEVER_S)
    async with running(engine, recheck_s=0.01) as timer:
        timer.request_ended()
        await engine.asked(2)
        await let_others_run()
    assert engine.ticks == 2


async def test_it_asks_anew_where_a_deadline_was_moved_forward() -> None:
    engine = Engine(NEVER_S, NEVER_S / 2)
    async with running(engine, recheck_s=NEVER_S) as timer:
        timer.request_ended()
        await engine.asked(1)
        await let_others_run()
        for in_s in (None, 2 * NEVER_S):  # nothing is due sooner than it asks
            timer.lease_due(in_s)
            await let_others_run()
        assert engine.ticks == 1
        timer.lease_due(NEVER_S / 2)
        await engine.asked(2)


async def test_it_asks_anew_where_it_knew_of_no_deadline() -> None:
    engine = Engine()
    async with running(engine) as timer:
        await let_others_run()
        timer.lease_due(NEVER_S)
        await engine.asked(1)


async def test_an_engine_that_does_not_answer_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(RuntimeError("PROMPT"), None)
    async with running(engine, retry_s=0.01) as timer:
        timer.request_ended()
        await engine.asked(2)
    assert "did not answer" in caplog.text
    assert "PROMPT" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "ends"),
    [
        ("POST", "/v1/chat/completions", 1),
        ("POST", "/v1/completions", 1),
        ("POST", TURNS_PATH, 0),
        ("POST", LEASES_PATH, 0),
        ("POST", DEMOTE_PATH, 0),
        ("GET", "/health", 0),
    ],
)
async def test_the_end_of_a_request_that_may_leave_a_lease_is_noticed(method: str, path: str, ends: int) -> None:
    seen = await _ends_seen({"type": "http", "method": method, "path": path}, failing=False)
    assert seen == ends


async def test_a_request_that_fails_or_is_cancelled_is_noticed_too() -> None:
    assert await _ends_seen({"type": "http", "method": "POST", "path": "/v1/completions"}, failing=True) == 1


async def test_what_is_no_request_is_passed_on() -> None:
    assert await _ends_seen({"type": "lifespan"}, failing=False) == 0


def test_the_plugin_adds_its_paths_and_its_middleware() -> None:
    app = _App()
    endpoints = LeaseEndpoints()
    endpoints.attach_router(app)
    assert endpoints.name == PLUGIN_NAME
    assert app.added == [LEASES_PATH, KV_PATH, TURNS_PATH, DEMOTE_PATH, _EndOfRequests]


class _App:
    def __init__(self) -> None:
        self.added: list[object] = []

    def add_route(self, path: str, _route: object, *, methods: Iterable[str], include_in_schema: bool) -> None:
        assert (list(methods), include_in_schema) == (["GET" if path == KV_PATH else "POST"], False)
        self.added.append(path)

    def add_middleware(self, middleware: type, **_options: object) -> None:
        self.added.append(middleware)


async def _ends_seen(scope: dict[str, Any], *, failing: bool) -> int:
    ends = 0

    def ended() -> None:
        nonlocal ends
        ends += 1

    async def app(_scope: object, _receive: object, _send: object) -> None:
        if failing:
            raise asyncio.CancelledError

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing is read")

    async def send(_message: dict[str, Any]) -> None:
        raise AssertionError("nothing is written")

    with contextlib.suppress(asyncio.CancelledError):
        await _EndOfRequests(app, ended)(scope, receive, send)
    return ends
