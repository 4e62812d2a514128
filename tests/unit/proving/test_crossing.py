"""What a proof makes of requests that run at once: whatever of one gets into another's answer is a failure."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest

from api.proving import isolation
from api.proving.asking import Said
from api.proving.judgement import Verdict
from appliance.identity import Isolation

pytestmark = pytest.mark.anyio
PLAIN, SEEDED, STOPPED, SHOWN = range(4)  # in the order in which they are asked at once
AT_ONCE = 4
CHECKS = ("seeds", "stop strings", "log-probabilities")
# What fails by what one of them gets of another. What stops early is another text.
CROSSING = {
    ("seed", PLAIN): {"seeds"},
    ("seed", SEEDED): {"seeds"},
    ("seed", SHOWN): {"seeds", "log-probabilities"},
    ("stop", PLAIN): {"seeds", "stop strings"},
    ("stop", SEEDED): {"seeds", "stop strings"},
    ("stop", STOPPED): {"stop strings"},
    ("stop", SHOWN): {"seeds", "stop strings", "log-probabilities"},
    ("logprobs", PLAIN): {"log-probabilities"},
    ("logprobs", SEEDED): {"log-probabilities"},
    ("logprobs", STOPPED): {"log-probabilities"},
    ("logprobs", SHOWN): {"log-probabilities"},
}


@dataclass(frozen=True)
class Asked:
    seed: int
    stop: tuple[str, ...]
    logprobs: bool


class Engine:
    """Answers by the seed, up to a stop string.

    Args:
        crossing: a field that one of those that run at once gets of another, and the place of the one that gets it.
        in_runs: how often it does.
    """

    def __init__(self, crossing: tuple[str, int] | None = None, *, in_runs: int = 100) -> None:
        self.crossing, self.in_runs = crossing, in_runs
        self.runs = 0
        self.running: list[Asked] = []
        self.answer = "{seed} says what everybody says, and {seed}"

    async def ask(
        self, _: object, *, session: str, seed: int, stop: Sequence[str] = (), logprobs: bool = False, **__: object
    ) -> Said:
        del session
        asked = Asked(seed, tuple(stop), logprobs)
        place = len(self.running)
        self.running.append(asked)
        await asyncio.sleep(0)  # until all are there that are asked at once
        if self.crossing is not None and (len(self.running), place) == (AT_ONCE, self.crossing[1]):
            self.runs += 1
            if self.runs <= self.in_runs:
                asked = self._crossed(asked, self.crossing[0])
        await asyncio.sleep(0)  # until all have been looked at
        self.running.clear()
        return self._said(asked)

    def _crossed(self, asked: Asked, name: str) -> Asked:
        values = [getattr(each, name) for each in self.running]
        return replace(asked, **{name: next(each for each in values if each != getattr(asked, name))})

    def _said(self, asked: Asked) -> Said:
        text, reason = self.answer.format(seed=asked.seed), "length"
        for stop in asked.stop:
            if stop in text:
                text, reason = text.partition(stop)[0], "stop"
        return Said(text, reason, 8, 0, {}, 0.1, text.split() if asked.logprobs else None)


class Proof(isolation._Proof):
    """Of an engine, and parties that are nobody's."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._texts = []

    async def _tenant(self, mode: Isolation, *, idle_timeout_s: float | None = None) -> Any:
        return None

    async def _party(self, tenant: Any, principal: Any = None) -> Any:
        return SimpleNamespace(tenant=tenant, asker=self.engine)


async def verdicts(engine: Engine) -> dict[str, Verdict]:
    return {check.name.removesuffix(" do not cross"): check.verdict for check in await Proof(engine).crossing()}


async def test_where_nothing_crosses_everything_passes() -> None:
    assert await verdicts(Engine()) == dict.fromkeys(CHECKS, Verdict.PASS)


@pytest.mark.parametrize("crossing", CROSSING, ids="{0[0]} {0[1]}".format)
async def test_what_crosses_each_time_fails(crossing: tuple[str, int]) -> None:
    found = await verdicts(Engine(crossing))
    assert found == {name: Verdict.FAIL if name in CROSSING[crossing] else Verdict.PASS for name in CHECKS}


@pytest.mark.parametrize("name", ["seed", "stop", "logprobs"])
async def test_what_differs_once_is_tried_again(name: str) -> None:
    engine = Engine((name, PLAIN), in_runs=1)
    assert await verdicts(engine) == dict.fromkeys(CHECKS, Verdict.PASS)
    assert engine.runs > 1


async def test_seeds_that_give_one_text_and_a_text_without_a_stop_string_say_nothing() -> None:
    engine = Engine()
    engine.answer = ""
    found = await verdicts(engine)
    assert (found["seeds"], found["stop strings"]) == (Verdict.UNKNOWN, Verdict.UNKNOWN)
    engine.answer = "always the same"
    assert await verdicts(engine) == {**dict.fromkeys(CHECKS, Verdict.PASS), "seeds": Verdict.UNKNOWN}
