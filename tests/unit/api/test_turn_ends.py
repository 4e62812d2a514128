"""The engine is told how turns ended, a message at a time, and no failure of that reaches a turn."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest

from api.turn_ends import TurnEnds, stop_of
from appliance.engine.client import EngineClient, EngineRejected, EngineUnavailable
from appliance.engine.protocol import TurnAccount, TurnEnd


class Engine:
    """Answers when it is told to."""

    def __init__(self) -> None:
        self.told: list[list[str]] = []
        self.asked = asyncio.Event()
        self.answer = asyncio.Event()
        self.failure: Exception | None = None

    async def turns_ended(self, ends: Sequence[TurnEnd]) -> tuple[TurnAccount | None, ...]:
        self.told.append([end.turn for end in ends])
        self.asked.set()
        await self.answer.wait()
        if self.failure is not None:
            raise self.failure
        return tuple(TurnAccount(end.turn, 32) for end in ends)


def end(turn: str) -> TurnEnd:
    return TurnEnd("s", "t", turn, "end_turn", 1, 15.0)


def ends_of(engine: Engine, now: Sequence[float] = (0.0,)) -> TurnEnds:
    return TurnEnds(cast("EngineClient", engine), clock=lambda: now[0])


async def test_what_ends_while_a_message_is_under_way_travels_together() -> None:
    engine = Engine()
    ends = ends_of(engine)
    accounts = [ends.tell(end("a"), at_once=True)]
    await engine.asked.wait()
    accounts += [ends.tell(end("b"), at_once=True), ends.tell(end("c"), at_once=True)]
    engine.answer.set()
    assert [await account for account in accounts] == [TurnAccount(turn, 32) for turn in "abc"]
    assert engine.told == [["a"], ["b", "c"]]


async def test_what_nobody_waits_for_is_told_a_moment_later_together() -> None:
    engine = Engine()
    ends = ends_of(engine)
    accounts = [ends.tell(end(turn), at_once=False) for turn in "abc"]
    engine.answer.set()
    assert [await account for account in accounts] == [TurnAccount(turn, 32) for turn in "abc"]
    assert engine.told == [["a", "b", "c"]]


async def test_what_somebody_waits_for_takes_those_along_that_nobody_waits_for() -> None:
    engine = Engine()
    ends = ends_of(engine)
    engine.answer.set()
    waited_for = [ends.tell(end("a"), at_once=False), ends.tell(end("b"), at_once=True)]
    assert [await account for account in waited_for] == [TurnAccount(turn, 32) for turn in "ab"]
    assert engine.told == [["a", "b"]]
    assert await ends.tell(end("c"), at_once=False) == TurnAccount("c", 32)


@pytest.mark.parametrize("failure", [EngineUnavailable("gone", cause="c", remedy="r"), EngineRejected(404, b"")])
async def test_an_engine_that_fails_costs_the_account_and_nothing_else(failure: Exception) -> None:
    engine = Engine()
    engine.failure = failure
    engine.answer.set()
    assert await ends_of(engine).tell(end("a"), at_once=True) is None


async def test_an_engine_that_does_not_know_the_path_is_left_alone_for_a_while() -> None:
    engine, now = Engine(), [0.0]
    ends = ends_of(engine, now)
    engine.failure = EngineRejected(404, b"")
    engine.answer.set()
    assert await ends.tell(end("a"), at_once=True) is None
    assert await ends.tell(end("b"), at_once=True) is None
    assert engine.told == [["a"]]
    now[0], engine.failure = 61.0, None
    assert await ends.tell(end("c"), at_once=True) == TurnAccount("c", 32)


async def test_nobody_waits_for_ever_when_the_gateway_stops() -> None:
    engine = Engine()
    ends = ends_of(engine)
    accounts = [ends.tell(end("a"), at_once=True), ends.tell(end("b"), at_once=True)]
    await engine.asked.wait()
    await ends.close()
    assert [await account for account in accounts] == [None, None]


@pytest.mark.parametrize(
    ("reason", "stop"), [("tool_calls", "tool_use"), ("stop", "end_turn"), ("length", "other"), (None, "other")]
)
def test_a_stop_is_told_in_the_words_of_the_protocol(reason: Any, stop: str) -> None:
    assert stop_of(reason) == stop
