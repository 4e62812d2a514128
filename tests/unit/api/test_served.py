"""From where a prompt's tokens were served: what the engine says, waited for only where only the engine can know."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from api.openai import turns
from api.openai.turns import Turns
from appliance.engine.protocol import TurnAccount
from appliance.sessions import Served

ACCOUNT = TurnAccount("turn", device_tokens=32, dram_tokens=64, disk_tokens=0, reason="quota")


async def served(
    *,
    tiers: bool,
    account: TurnAccount | None = None,
    cap: float = 1.0,
    life: str | None = "one",
    cached: int | None = 96,
) -> Served | None:
    """What becomes of a turn whose account comes a moment after it was asked for; None: it never comes."""
    services = SimpleNamespace(engine_life=life, kv=SimpleNamespace(has_more_tiers=tiers))
    running: Any = SimpleNamespace(
        answer=SimpleNamespace(usage=SimpleNamespace(cached_tokens=cached)),
        session=SimpleNamespace(keeping=SimpleNamespace(tenant_cap=1.0, session_cap=cap)),
    )
    told: asyncio.Future[TurnAccount | None] = asyncio.get_running_loop().create_future()
    if account is not None:
        asyncio.get_running_loop().call_soon(told.set_result, account)
    this: Any = SimpleNamespace(_services=services)
    return await Turns._served(this, running, told)


async def test_with_the_device_alone_nobody_waits() -> None:
    assert await served(tiers=False, account=ACCOUNT) == Served(96, 0, 0)


async def test_with_more_tiers_the_engine_says_from_which() -> None:
    assert await served(tiers=True, account=ACCOUNT) == Served(32, 64, 0, "quota")


async def test_where_a_session_has_a_cap_the_engine_says_whether_it_met_it() -> None:
    assert await served(tiers=False, account=ACCOUNT, cap=0.5) == Served(32, 64, 0, "quota")


async def test_what_does_not_come_in_time_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_ACCOUNT_WITHIN_S", 0.01)
    assert await served(tiers=True) is None


async def test_of_an_engine_of_somebody_elses_and_of_a_broken_turn_nothing_is_known() -> None:
    assert await served(tiers=True, account=ACCOUNT, life=None) is None
    assert await served(tiers=True, account=ACCOUNT, cached=None) is None
