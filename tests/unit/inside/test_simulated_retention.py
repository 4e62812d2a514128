"""The policy that the engine runs, driven as a simulator drives it: by name, with keyword arguments and nothing else.

What a simulator calls, with times in seconds of one clock, tokens as whole numbers and sessions as opaque ids:

    arrived(session, now)                                        a request of the session arrived: it waits or runs
    finished(session, now, stop, prompt_tokens, output_tokens)   it is over; stop: "tool_use", "end_turn" or None
    closed(session, now)                                         the session is over
    value(session, now, position, abandoned)                     what the tail that ends at `position` is worth
"""

import heapq
import importlib
import math
import random
from dataclasses import dataclass
from typing import Any, Final

from appliance.engine.inside.leases import LeaseTable

POLICY: Final = "appliance.engine.inside.retention:RetentionPolicy"
TURNS: Final = 12
POOL_TOKENS: Final = 60_000


@dataclass(slots=True)
class Kept:
    """A context, or a tail that one was diverged from."""

    session: int
    tokens: int
    last_used: float
    abandoned: bool = False
    resident: int = 0


def loaded(name: str) -> Any:
    """The class that a simulator is given the name of."""
    module, _, its_class = name.partition(":")
    return getattr(importlib.import_module(module), its_class)


def recomputed(policy: Any, *, agents: int = 24, seed: int = 1) -> int:
    """How many tokens of what sessions had sent before were computed again, in a pool without tiers.

    Args:
        policy: what leaves first, it says; None: what was used longest ago.
    """
    rng = random.Random(seed)  # noqa: S311 (the same every time)
    kept: dict[tuple[int, bool], Kept] = {}
    arrivals = [(rng.uniform(0, 60), agent, 0) for agent in range(agents)]  # when, session, turn
    heapq.heapify(arrivals)
    again, sessions = 0, agents
    while arrivals:
        now, session, turn = heapq.heappop(arrivals)
        if policy:
            policy.arrived(session=session, now=now)
        context = kept.setdefault((session, False), Kept(session, 0, now))
        if turn == TURNS // 2:  # its harness rewrites what it said: the second half is another one
            half = context.tokens // 2
            tail = max(0, context.resident - half)
            kept[session, True] = Kept(session, context.tokens, now, abandoned=True, resident=tail)
            context.tokens, context.resident = half, context.resident - tail
        again += context.tokens - context.resident
        prompt, output = context.tokens + rng.randint(200, 1200), rng.randint(20, 600)
        context.tokens = context.resident = prompt + output
        room(kept, context, policy, now)
        now += 2.0
        calls = turn % 4 != 3
        stop = rng.choice(("tool_use", None)) if calls else "end_turn"
        context.last_used = now
        if policy:
            policy.finished(session=session, now=now, stop=stop, prompt_tokens=prompt, output_tokens=output)
        if turn + 1 < TURNS:
            gap = rng.uniform(2, 12) if calls else rng.uniform(60, 900)
            heapq.heappush(arrivals, (now + gap, session, turn + 1))
            continue
        if policy:
            policy.closed(session=session, now=now)
        if sessions < 3 * agents:
            heapq.heappush(arrivals, (now + 1.0, sessions, 0))
            sessions += 1
    return again


def room(kept: dict[tuple[int, bool], Kept], runs: Kept, policy: Any, now: float) -> None:
    """Take what is worth least, from its tail on, until what runs fits."""

    def rank(each: Kept) -> float:
        if policy is None:
            return each.last_used
        worth = policy.value(session=each.session, now=now, position=each.resident, abandoned=each.abandoned)
        assert isinstance(worth, float)
        assert not math.isnan(worth)
        return worth

    while (over := sum(each.resident for each in kept.values()) - POOL_TOKENS) > 0:
        least = min((each for each in kept.values() if each.resident and each is not runs), key=rank)
        least.resident -= min(least.resident, over)


def test_what_a_simulator_loads_by_name_is_what_the_engine_runs() -> None:
    assert type(LeaseTable(16, lambda: 0.0, lambda block_id: block_id).policy) is loaded(POLICY)


def test_driven_by_a_simulators_calls_alone_it_has_less_computed_again_than_the_order_of_last_use() -> None:
    assert 0 < recomputed(loaded(POLICY)()) < 0.9 * recomputed(None)
