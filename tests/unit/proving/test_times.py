"""What a proof makes of the times that an engine takes: only where a hit can be seen there is shown to be none."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from api.proving import isolation
from api.proving.asking import Said
from api.proving.judgement import Verdict
from appliance.identity import Isolation

pytestmark = pytest.mark.anyio
COLD_S, WARM_S, ROUNDS = 0.1, 0.01, 8
Hits = Callable[[str, str, str], bool]


def own(asker: str, before: str, session: str) -> bool:
    """A prompt is found by whom it was asked of before, as an engine should have it."""
    return asker == before


def anybodys(asker: str, before: str, session: str) -> bool:
    return True


def anybodys_in_the_first_run(asker: str, before: str, session: str) -> bool:
    return asker == before or session.startswith("timing-0-")


def nobodys(asker: str, before: str, session: str) -> bool:
    return False


class Engine:
    """Knows who asked for a prompt first, and takes its time by whether `hits` says that this is found."""

    def __init__(self, hits: Hits) -> None:
        self.hits = hits
        self.askers: dict[str, str] = {}  # the first, by prompt
        self.asked: list[str] = []

    def ask(self, asker: str, prompt: str, session: str) -> Said:
        self.asked.append(session)
        found = prompt in self.askers and self.hits(asker, self.askers[prompt], session)
        self.askers.setdefault(prompt, asker)
        takes_s = (WARM_S if found else COLD_S) + 0.0001 * int(session.split("-")[2])  # rounds differ
        return Said("", "length", 8, 0, {}, takes_s, None)


class Asker:
    def __init__(self, engine: Engine, name: str) -> None:
        self.engine, self.name = engine, name

    async def ask(self, messages: Sequence[Mapping[str, str]], *, session: str) -> Said:
        return self.engine.ask(self.name, messages[-1]["content"], session)


class Proof(isolation._Proof):
    """Of tenants that are names, and an engine that is made up."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.names = engine, iter(("mine", "theirs"))
        self._words, self._texts = 1, []

    async def _tenant(self, mode: Isolation, *, idle_timeout_s: float | None = None) -> Any:
        return next(self.names)

    async def _party(self, tenant: Any, principal: Any = None) -> Any:
        return SimpleNamespace(tenant=tenant, asker=Asker(self.engine, tenant))


@pytest.mark.parametrize(
    ("hits", "verdict", "runs"),
    [
        (own, Verdict.PASS, {"0"}),
        (anybodys, Verdict.FAIL, {"0", "1"}),
        (anybodys_in_the_first_run, Verdict.PASS, {"0", "1"}),
        (nobodys, Verdict.UNKNOWN, {"0"}),
    ],
    ids=["nobody else's is found", "another tenant's is found", "a false alarm", "no hit can be seen"],
)
async def test_another_tenants_prompt_that_is_faster_than_a_new_one_fails_when_it_is_so_twice(
    hits: Hits, verdict: Verdict, runs: set[str]
) -> None:
    engine = Engine(hits)
    (check,) = await Proof(engine).timing(ROUNDS)
    assert (check.verdict, check.name) == (verdict, "time to first token of another tenant's prompt")
    assert {session.split("-")[1] for session in engine.asked} == runs
    assert check.found.endswith(f"{ROUNDS} of each")


async def test_it_is_told_by_how_much_a_hit_and_another_tenants_prompt_are_faster() -> None:
    (check,) = await Proof(Engine(own)).timing(ROUNDS)
    assert "another tenant's +0.0 ms faster than cold, a hit +90.0 ms" in check.found
    (check,) = await Proof(Engine(anybodys)).timing(ROUNDS)
    assert "another tenant's +90.0 ms faster than cold, a hit +90.0 ms" in check.found
