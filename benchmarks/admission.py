"""What the order of the line is worth when the engine is full. `python -m benchmarks.admission`.

Simulates agents of several tenants on one engine, whose device holds a small share of their contexts; the line is
`appliance.engine.admission`, driven by a clock of the simulation's. In one run, over the same sessions: first come
first served (nothing known to be resident, no patience), and the order that the gateway uses.

The model: an agent sends its whole context and some new tokens, waits for its place, and pauses when it has the answer.
Contexts grow until a session is over and the agent begins another. The device evicts the least recently used context,
tail first, never one that runs; `--protect` ranks those that wait last. A turn takes the time to compute what is not
resident, and to decode its answer. Sizes and pauses are drawn from log-normal distributions like those of real agents:
pauses of 8.6 s (median) to 71 s (nine in ten), ten minutes at most. What the device holds is a share of what all
contexts have together when nothing is ever evicted.

Reported: tokens computed in percent of all prompt tokens; seconds waited, mean and longest; turns an hour; and the
smallest tenant's share of what was computed, as a part of an equal one.
"""

import argparse
import heapq
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Final

from appliance.engine.admission import AdmissionLine, Place, Wish

PREFILL_TOKENS_PER_S: Final = 20_000.0
DECODE_TOKENS_PER_S: Final = 60.0
_WARM_UP: Final = 0.2  # of the turns


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one order. `contexts_tokens`: of all agents together, the mean at the ends of turns."""

    order: str
    seed: int
    contexts_tokens: float
    computed_percent: float
    waited_mean_s: float
    waited_most_s: float
    turns_per_hour: float
    smallest_tenant_share: float


@dataclass(eq=False, slots=True)
class _Agent:
    """Attributes: resident: tokens of its context on the device, from the first on."""

    tenant: str
    drawn: random.Random
    context: int
    turns_left: int
    answer: int = 0
    resident: int = 0
    running: bool = False
    waiting: bool = False
    used_at: float = 0.0


class _Device:
    """Holds at most `tokens`; what must go is the tail of the context used least recently."""

    def __init__(self, tokens: int, agents: Sequence[_Agent], *, protect: bool) -> None:
        self._tokens = tokens
        self._agents = agents
        self._protect = protect
        self._held = 0

    def take(self, agent: _Agent, tokens: int) -> int:
        """Make room for a context; how much of it was there."""
        found = min(agent.resident, tokens)
        self._held += tokens - agent.resident
        agent.resident = tokens
        excess = self._held - self._tokens
        if excess > 0:
            idle = [each for each in self._agents if each.resident and not each.running and each is not agent]
            for each in sorted(idle, key=lambda each: (self._protect and each.waiting, each.used_at)):
                gone = min(excess, each.resident)
                each.resident -= gone
                self._held -= gone
                excess -= gone
                if excess <= 0:
                    break
        return found

    def drop(self, agent: _Agent) -> None:
        """A session is over."""
        self._held -= agent.resident
        agent.resident = 0


def simulate(
    *,
    longest_wait_s: float | None,
    seed: int,
    device_tokens: int,
    agents: int,
    tenants: int,
    turns: int,
    protect: bool,
) -> Result:
    """Run `turns` turns; `longest_wait_s` None: first come, first served."""
    by_residence = longest_wait_s is not None
    everyone = [_new_agent(seed, number, f"tenant{number % tenants}") for number in range(agents)]
    pool = device_tokens
    device = _Device(pool, everyone, protect=protect)
    now = 0.0
    agent_of: dict[Place, _Agent] = {}
    let_in: list[Place] = []
    line = AdmissionLine(
        sequences=agents,
        longest_wait_s=longest_wait_s or 0.0,
        most_waiting=4 * agents,
        clock=lambda: now,
        let_in=let_in.append,
    )
    line.told(pool)
    done = prompt_tokens = computed_tokens = contexts = 0
    events: list[tuple[float, int, _Agent, Place | None]] = []
    serial = 0

    def later(seconds: float, agent: _Agent, place: Place | None = None) -> None:
        nonlocal serial
        serial += 1
        heapq.heappush(events, (now + seconds, serial, agent, place))

    def start(place: Place) -> None:
        nonlocal prompt_tokens, computed_tokens
        agent = agent_of[place]
        agent.waiting, agent.running = False, True
        found = device.take(agent, min(agent.context + agent.answer, pool))
        computed = agent.context - min(found, agent.context)
        if done >= _WARM_UP * turns:
            prompt_tokens += agent.context
            computed_tokens += computed
            computed_for[agent.tenant] = computed_for.get(agent.tenant, 0) + computed + agent.answer
            waits.append(now - place.asked_at)
        later(computed / PREFILL_TOKENS_PER_S + agent.answer / DECODE_TOKENS_PER_S, agent, place)

    computed_for: dict[str, int] = {}
    waits: list[float] = []
    measured_from = 0.0
    for agent in everyone:
        later(agent.drawn.uniform(0, 120), agent)
    while done < turns:
        now, _, agent, place = heapq.heappop(events)
        if place is None:
            agent.context += int(_log_normal(agent.drawn, 600, 4000))
            agent.answer = int(_log_normal(agent.drawn, 150, 1200))
            agent.waiting = True
            resident = (lambda of: lambda: of.resident)(agent) if by_residence else (lambda: 0)
            asked = line.ask(Wish(agent.tenant, agent.context, agent.answer, resident))
            agent_of[asked] = agent
            if asked.admitted_at is not None:
                start(asked)
        else:
            done += 1
            contexts += sum(each.context for each in everyone)
            if done == int(_WARM_UP * turns):
                measured_from = now
            agent.running, agent.used_at = False, now
            agent.context += agent.answer
            agent.turns_left -= 1
            if agent.turns_left == 0:
                device.drop(agent)
                agent.context, agent.turns_left = _new_session(agent.drawn)
            later(min(_log_normal(agent.drawn, 8.6, 71), 600.0), agent)
            line.leave(place)
            del agent_of[place]
        while let_in:
            start(let_in.pop(0))
    smallest = min(computed_for.values()) / (sum(computed_for.values()) / tenants)
    return Result(
        "first come first served" if longest_wait_s is None else f"resident first, {longest_wait_s:g} s",
        seed,
        contexts / done,
        100 * computed_tokens / prompt_tokens,
        sum(waits) / len(waits),
        max(waits),
        3600 * len(waits) / (now - measured_from),
        smallest,
    )


def _new_agent(seed: int, number: int, tenant: str) -> _Agent:
    """Its numbers are its own, so that its sessions are the same in whatever order it is served."""
    drawn = random.Random(1000 * seed + number)
    return _Agent(tenant, drawn, *_new_session(drawn))


def _new_session(drawn: random.Random) -> tuple[int, int]:
    """Its first context, and how many turns it will have."""
    return int(_log_normal(drawn, 25_000, 60_000)), drawn.randint(5, 60)


def _log_normal(drawn: random.Random, median: float, nine_in_ten: float) -> float:
    return drawn.lognormvariate(math.log(median), math.log(nine_in_ten / median) / 1.2816)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print both orders for each share and seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device-share", default="0.12,0.15,0.25")
    parser.add_argument("--longest-wait-s", default="60,120,300")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--tenants", type=int, default=4)
    parser.add_argument("--turns", type=int, default=4000)
    parser.add_argument("--protect", action="store_true", help="contexts of turns that wait are evicted last")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    run = {"agents": options.agents, "tenants": options.tenants, "turns": options.turns, "protect": options.protect}
    orders = [None, *(float(wait) for wait in options.longest_wait_s.split(","))]
    together = {
        seed: simulate(longest_wait_s=None, seed=seed, device_tokens=1 << 40, **run).contexts_tokens for seed in seeds
    }
    if not options.json:
        sys.stdout.write("device  order                    computed %  waited s  longest s  turns/h  smallest tenant\n")
    rows = []
    for share in (float(share) for share in options.device_share.split(",")):
        for order in orders:
            several = [
                simulate(longest_wait_s=order, seed=seed, device_tokens=int(share * together[seed]), **run)
                for seed in seeds
            ]
            rows += [{"device_share": share, **asdict(result)} for result in several]
            if not options.json:
                sys.stdout.write(_line(share, several))
    if options.json:
        sys.stdout.write(json.dumps(rows, indent=1) + "\n")
    return 0


def _line(share: float, several: Sequence[Result]) -> str:
    def mean(name: str) -> float:
        return sum(float(getattr(result, name)) for result in several) / len(several)

    return (
        f"{share:6.2f}  {several[0].order:23}  {mean('computed_percent'):10.1f}  {mean('waited_mean_s'):8.1f}"
        f"  {max(result.waited_most_s for result in several):9.0f}  {mean('turns_per_hour'):7.0f}"
        f"  {mean('smallest_tenant_share'):15.2f}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
