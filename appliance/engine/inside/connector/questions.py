"""What the front end's process asks the engine between two steps. Added to EngineCore, which passes it on."""

from collections.abc import Sequence
from typing import Any

import vllm
from vllm.v1.engine.core import EngineCore

from appliance.engine.inside.connector.amendments import salt_by_range
from appliance.engine.inside.connector.device import LeaseRetention
from appliance.engine.inside.connector.version import UnsupportedEngine, check_version
from appliance.engine.protocol import DemoteRequest, LeasesRequest, TurnAccount, TurnEnd

_REPORT_METHOD = "holdfast_lease_report"
_TICK_METHOD = "holdfast_lease_tick"
_KV_METHOD = "holdfast_kv_picture"
_TURNS_METHOD = "holdfast_turns_ended"
_DEMOTE_METHOD = "holdfast_demote"


def install() -> None:
    """Add to EngineCore what the front-end process asks it, and salt blocks by range. Safe to call more than once.

    Raises:
        UnsupportedEngine: when this is another version of vLLM.
    """
    check_version(vllm.__version__)
    setattr(EngineCore, _REPORT_METHOD, _report)
    setattr(EngineCore, _TICK_METHOD, _tick)
    setattr(EngineCore, _KV_METHOD, _kv)
    setattr(EngineCore, _TURNS_METHOD, _turns_ended)
    setattr(EngineCore, _DEMOTE_METHOD, _demote)
    salt_by_range()


async def lease_report(engine_client: Any, asked: LeasesRequest) -> dict[str, object]:
    """Ask the engine behind vLLM's front end: expect, expire, release, report; a `LeaseReport`, as JSON has it."""
    core = engine_client.engine_core
    said: dict[str, object] = await core.call_utility_async(
        _REPORT_METHOD, list(asked.release), list(asked.awaited), asked.every
    )
    return said


async def demote(engine_client: Any, asked: DemoteRequest) -> list[str]:
    """Ask the engine behind vLLM's front end to have sessions keep nothing before a tier; which of them it has."""
    demoted: list[str] = await engine_client.engine_core.call_utility_async(
        _DEMOTE_METHOD, asked.tier, list(asked.sessions)
    )
    return demoted


async def lease_tick(engine_client: Any) -> float | None:
    """Ask the engine behind vLLM's front end to expire what is due; seconds to the next deadline."""
    due_in_s: float | None = await engine_client.engine_core.call_utility_async(_TICK_METHOD)
    return due_in_s


async def kv_picture(engine_client: Any, most_sessions: int, of: tuple[str, str] | None = None) -> dict[str, object]:
    """Ask the engine behind vLLM's front end to sum up what it keeps: a `KvPicture`, as JSON has it."""
    core = engine_client.engine_core
    said: dict[str, object] = await core.call_utility_async(_KV_METHOD, most_sessions, None if of is None else list(of))
    return said


async def turns_ended(engine_client: Any, ends: Sequence[TurnEnd]) -> tuple[list[TurnAccount | None], float | None]:
    """Tell the engine behind vLLM's front end how turns ended.

    Returns:
        The account of each; and seconds to the next deadline of a lease, which an end may have moved, or `None`.
    """
    told = [end.to_wire() for end in ends]
    accounts, due_in_s = await engine_client.engine_core.call_utility_async(_TURNS_METHOD, told)
    return [None if account is None else TurnAccount.from_wire(account) for account in accounts], due_in_s


def connector_of(engine_core: EngineCore) -> LeaseRetention:
    """The connector of an engine.

    Raises:
        UnsupportedEngine: when the engine was started without it.
    """
    connector = engine_core.scheduler.get_kv_connector()
    if not isinstance(connector, LeaseRetention):
        raise UnsupportedEngine("this engine was started without Holdfast's connector: see connector_config")
    return connector


def _report(self: EngineCore, release: list, awaited: list, every: bool) -> dict:  # type: ignore[type-arg]
    return connector_of(self).report(release, [(tenant, session) for tenant, session in awaited], every=every).to_wire()


def _kv(self: EngineCore, most_sessions: int, of: list | None = None) -> dict:  # type: ignore[type-arg]
    return connector_of(self).picture(most_sessions, None if of is None else (of[0], of[1])).to_wire()


def _demote(self: EngineCore, tier: str, sessions: list) -> list:  # type: ignore[type-arg]
    return connector_of(self).demote(tier, frozenset(sessions))


def _tick(self: EngineCore) -> float | None:
    connector = connector_of(self)
    due_in_s = connector.tick()
    canary = connector.canary()
    if canary is not None:
        self.scheduler.add_request(canary)
    return due_in_s


def _turns_ended(self: EngineCore, ends: list) -> list:  # type: ignore[type-arg]
    connector = connector_of(self)
    accounts = connector.turns_ended([TurnEnd.from_wire(end) for end in ends])
    told = [None if account is None else account.to_wire() for account in accounts]
    return [told, connector.next_expiry_in_s()]
