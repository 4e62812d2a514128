"""What a proof makes of what an engine says of its prompts in a tier: only what was there can be missed."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from api.proving import isolation
from api.proving.asking import Said
from api.proving.expectations import Pair
from api.proving.judgement import Verdict
from appliance.engine.client import EngineLost
from appliance.identity import Isolation

BLOCK, PROMPT = 16, 1024
PAIRS = {pair.value for pair in Pair}


def said(**tiers: int) -> Said:
    return Said("", "length", PROMPT, sum(tiers.values()), tiers, 0.1, None)


class Asker:
    """Finds its whole prompt on the disk when it asks again, and so does a child of the session."""

    def __init__(self) -> None:
        self.asked: set[str] = set()

    async def ask(self, _: object, *, session: str, parent: str | None = None) -> Said:
        again = session in self.asked or parent is not None
        self.asked.add(session)
        return said(disk=PROMPT - BLOCK) if again else said()


class Engine:
    """Says of a prompt at a time that the disk has it, and never of the `missing`."""

    def __init__(self, *missing: str) -> None:
        self.missing = missing
        self.awaited: list[Sequence[tuple[str, str]]] = []
        self.demoted: list[str] = []

    async def leases(self, awaited: Sequence[tuple[str, str]]) -> None:
        self.awaited.append(awaited)

    async def demote(self, _: str, labels: Sequence[str]) -> frozenset[str]:
        if not self.demoted:
            self.demoted.append("")
            raise EngineLost("busy", cause="a step", remedy="wait")
        there = next((label for label in labels if label not in (*self.missing, *self.demoted)), None)
        self.demoted += [] if there is None else [there]
        return frozenset(self.demoted[-1:])


class Proof(isolation._Proof):
    """Of one engine and parties that are not there."""

    def __init__(self, engine: Engine) -> None:
        self._services: Any = SimpleNamespace(engine=engine)
        self._block_size = BLOCK

    async def _session(self, _: object, named: str) -> Any:
        return SimpleNamespace(tenant_label="tenant", lease_label=named)

    async def _forget(self, party: Any, named: str) -> None:
        party.asker.asked.discard(named)

    async def _system_tokens(self, _: object) -> int:
        return PROMPT // 2


async def verdicts(engine: Engine) -> Mapping[str, Verdict]:
    party: Any = SimpleNamespace(asker=Asker())
    strangers: Any = SimpleNamespace(asker=Asker())
    text = isolation._Text("system", "user")
    prompts = isolation._Prompts(
        Isolation.SESSION, party, strangers, strangers, dict.fromkeys(Pair, text), (text, text)
    )
    checks = await Proof(engine)._pairs_in_tier("disk", prompts)
    return {check.name: check.verdict for check in checks}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_ASK_AGAIN_S", 0.0)


async def test_where_every_prompt_was_there_a_miss_is_a_pass() -> None:
    engine = Engine()
    assert await verdicts(engine) == dict.fromkeys(PAIRS, Verdict.PASS)
    assert {label for _, label in engine.awaited[-1]} == {
        "disk-before", "disk-after", *(f"disk-{pair.name}" for pair in Pair)
    }  # fmt: skip


async def test_what_never_came_to_the_tier_is_unknown_though_the_controls_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "_STORED_WITHIN_S", 0.05)
    expected = {**dict.fromkeys(PAIRS, Verdict.PASS), Pair.OTHER_TENANT.value: Verdict.UNKNOWN}
    assert await verdicts(Engine(f"disk-{Pair.OTHER_TENANT.name}")) == expected
