"""What the engine is to let go of, and could not be told, it is told again."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from api.engine_leases import keep_releasing, release
from api.services import Lifecycle, Services
from appliance.engine.client import EngineUnavailable


class Engine:
    """Answers unless it is away."""

    def __init__(self) -> None:
        self.away = True
        self.released: list[str] = []
        self.told = asyncio.Event()

    async def leases(self, release: Sequence[str]) -> None:
        if self.away:
            raise EngineUnavailable("away", cause="it is", remedy="wait")
        self.released += release
        self.told.set()


def services_of(engine: Engine) -> Services:
    return cast("Services", SimpleNamespace(engine=engine, lifecycle=Lifecycle(0.0)))


async def test_what_could_not_be_told_is_told_again_until_the_engine_answers() -> None:
    engine = Engine()
    services = services_of(engine)
    assert not await release(services, ["forgotten"])
    pauses: list[float] = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        engine.away = len(pauses) < 3

    telling = asyncio.create_task(keep_releasing(services, sleep))
    await engine.told.wait()
    telling.cancel()
    assert engine.released == ["forgotten"]
    assert pauses == [1.0, 2.0, 4.0]
    assert not services.lifecycle.unreleased


async def test_what_is_due_goes_with_the_next_word() -> None:
    engine = Engine()
    services = services_of(engine)
    await release(services, ["first"])
    engine.away = False
    assert await release(services, ["second"])
    assert engine.released == ["first", "second"]
    assert await release(services, [])
    assert engine.released == ["first", "second"]


async def test_no_more_is_remembered_than_one_message_holds(monkeypatch: Any) -> None:
    monkeypatch.setattr("api.engine_leases.MAX_RELEASES", 2)
    services = services_of(Engine())
    await release(services, ["one", "two", "three"])
    assert list(services.lifecycle.unreleased) == ["two", "three"]


async def test_an_answer_to_an_earlier_word_leaves_due_what_was_asked_again_and_could_not_be_told() -> None:
    answer = asyncio.Event()

    class Late(Engine):
        async def leases(self, release: Sequence[str]) -> None:
            if self.released:
                raise EngineUnavailable("away", cause="it is", remedy="wait")
            self.released += release
            await answer.wait()

    services = services_of(Late())
    first = asyncio.create_task(release(services, ["over", "another"]))
    await asyncio.sleep(0)  # it is told, and has not answered
    assert not await release(services, ["over"])  # had a turn meanwhile
    answer.set()
    assert await first
    assert list(services.lifecycle.unreleased) == ["over"]
