"""What is known of the engine without asking it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from api import engine_watch
from api.engine_watch import EngineWatch
from api.server import _record_engine
from appliance.audit import AuditUnavailable, Event
from appliance.audit.events import ENGINE_LOST, ENGINE_READY, EventClass
from appliance.engine.client import EngineUnavailable, ModelCard
from appliance.engine.launcher import EngineState


class Engine:
    """Answers when it is up; says how often it was asked."""

    def __init__(self) -> None:
        self.up = False
        self.asked = 0
        self.answered = asyncio.Event()

    async def models(self) -> list[ModelCard]:
        self.asked += 1
        self.answered.set()
        if not self.up:
            raise EngineUnavailable("the engine cannot be reached", cause="nothing answers", remedy="Wait")
        return [ModelCard("m", 100)]


@asynccontextmanager
async def watching(engine: Engine, told: list[list[str]] | None = None) -> AsyncIterator[EngineWatch]:
    changes: list[list[str]] = [] if told is None else told
    watch = EngineWatch(engine, on_change=lambda models: changes.append([model.id for model in models]))  # type: ignore[arg-type]
    task = asyncio.create_task(watch.run())
    try:
        async with asyncio.timeout(10):
            yield watch
    finally:
        task.cancel()


async def asked_again(engine: Engine) -> None:
    engine.answered.clear()
    await engine.answered.wait()


async def test_an_engine_that_answers_is_ready_with_its_models() -> None:
    engine = Engine()
    engine.up = True
    async with watching(engine) as watch:
        await watch.wait_ready()
        assert watch.ready
        assert watch.model("m") == ModelCard("m", 100)
        assert watch.model("x") is None
        assert watch.detail == "serves m"


async def test_an_engine_that_comes_up_is_found() -> None:
    engine = Engine()
    async with watching(engine) as watch:
        await asked_again(engine)
        assert not watch.ready
        assert "nothing answers" in watch.detail
        engine.up = True
        await watch.wait_ready()


@pytest.mark.parametrize("gone", [True, False])
async def test_an_engine_that_a_request_missed_is_asked_at_once_and_holds_until_it_has_answered(
    monkeypatch: pytest.MonkeyPatch, gone: bool
) -> None:
    monkeypatch.setattr(engine_watch, "_WHILE_PRESENT_S", 1000.0)
    engine = Engine()
    engine.up = True
    async with watching(engine) as watch:
        await watch.wait_ready()
        engine.up = not gone
        watch.missed()
        assert watch.ready, "what failed one request may do well for all others"
        await asked_again(engine)
        await asyncio.sleep(0)
        assert watch.ready is not gone
        engine.up = True
        await watch.wait_ready()


async def test_an_engine_that_does_not_answer_any_more_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine_watch._WHILE_PRESENT_S", 0.0)
    monkeypatch.setattr("api.engine_watch._WHILE_ABSENT_S", 0.0)
    engine = Engine()
    told: list[list[str]] = []
    async with watching(engine, told) as watch:
        await asked_again(engine)
        assert told == [], "it was not there yet"
        for losses in (1, 2):
            engine.up = True
            await watch.wait_ready()
            engine.up = False
            for _ in range(3):
                await asked_again(engine)
            assert told == [["m"], []] * losses


async def test_why_it_is_not_there_is_told_by_who_started_it() -> None:
    engine = Engine()
    watch = EngineWatch(engine, reason=lambda: "it was killed by signal 9")  # type: ignore[arg-type]
    assert watch.detail == "it was killed by signal 9"


@pytest.mark.parametrize(
    ("state", "why", "failed"),
    [
        (EngineState.STOPPED, "it is not running", False),
        (EngineState.STARTING, "it is starting", False),
        (EngineState.READY, "it runs and does not answer", False),
        (EngineState.RESTARTING, "it ended, and is started again in a moment", False),
        (EngineState.FAILED, "it failed for good, and is not started again", True),
        (None, "it does not answer; it is started elsewhere", False),
    ],
)
def test_anybody_may_know_where_the_engine_stands_and_nothing_more(
    state: EngineState | None, why: str, failed: bool
) -> None:
    watch = EngineWatch(Engine(), reason=lambda: "/a/path", state=lambda: state)  # type: ignore[arg-type]
    assert (watch.summary, watch.failed) == (why, failed)


async def test_an_engine_that_answers_has_not_failed_whatever_its_process_says() -> None:
    engine = Engine()
    engine.up = True
    watch = EngineWatch(engine, state=lambda: EngineState.FAILED)  # type: ignore[arg-type]
    task = asyncio.create_task(watch.run())
    await watch.wait_ready()
    assert not watch.failed
    task.cancel()


async def test_what_the_engine_begins_and_ceases_to_serve_is_recorded_though_the_log_is_out_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("api.server._RECORD_AGAIN_S", 0.0)
    recorded: list[tuple[EventClass, str]] = []
    tries, log_is_out, told = 0, True, asyncio.Event()

    async def record(event: Event, *, privileged: bool = False) -> None:
        nonlocal tries, log_is_out
        assert privileged, "a full disk has room for it"
        tries += 1
        log_is_out = log_is_out and tries < 4
        if log_is_out:
            raise AuditUnavailable("nothing is recorded", cause="a full disk", remedy="Make room")
        recorded.append((event.kind, event.target[1]))
        if len(recorded) == 4:
            told.set()

    changes: asyncio.Queue[list[str]] = asyncio.Queue()
    for models in (["m"], [], ["m", "n"], []):
        changes.put_nowait(models)
    services: Any = SimpleNamespace(
        lifecycle=SimpleNamespace(engine_changes=changes), audit=SimpleNamespace(record=record)
    )
    recording = asyncio.create_task(_record_engine(services))
    async with asyncio.timeout(10):
        await told.wait()
    recording.cancel()
    assert recorded == [(ENGINE_READY, "m"), (ENGINE_LOST, ""), (ENGINE_READY, "m, n"), (ENGINE_LOST, "")]
