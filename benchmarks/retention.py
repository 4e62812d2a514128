"""How much of what can be known of the future retention makes use of. `.venv-engine/bin/python -m benchmarks.retention
--simulator KVSIM.PY --traces FOLDER [--json] [--check]`.

A simulator replays sessions of agents, with the policy that the engine runs. Of each setting: how far the policy is on
the way from LRU to an oracle that knows who returns when, in tokens recomputed and in loads from DRAM: the mean of the
runs, and of all runs' tokens together, in which a run where LRU is near the oracle weighs little. And how much more it
recomputes, and has requests wait, than LRU does: the mean, and the worst run.

- `bars`: what the project promises, on the whole sample.
- `others`: the same, on 300 sessions that are made from what is published of 710 (`made_sessions`).
- `halves`, `fifths`: on sessions that nothing was fitted on. The sample is parted at random into two or five; in each
  part, replayed so often that it keeps all agents busy, the policy runs with a prior that is fitted on the others,
  thirds and all; next to it, as it is shipped.
- `elsewhere`: other seeds, more and fewer agents, other sizes of the device, gaps that are a quarter or four times as
  long as those of the prior, stop reasons that nobody tells, and no prior: one that says of every turn that its gap is
  anything from a second to hours.

`--check` leaves with 1 when `bars` or `others` misses what the project promises, or when any mean is worse than LRU's.
"""

import argparse
import importlib.util
import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from appliance.engine.inside import retention
from benchmarks.made_sessions import made_sessions

SEEDS: Final = (1, 2, 3)
AGENTS: Final = 16
DEVICE: Final = 0.25  # of the live contexts
MOST_TOKENS: Final = 262_144  # of a session that is replayed
LEAST_DISTANCE: Final = {"no tiers": 0.25, "DRAM for all": 0.28, "DRAM for all, close signal": 0.95}
LEAST_DISTANCE_IN_LOADS: Final = {"DRAM for all": 0.25}
MOST_MORE_WAITING: Final = 0.05
OTHERS: Final = 300  # sessions that are made
PARTINGS: Final = {2: 2, 5: 1}  # how often, by the number of parts
_TIERS: Final = {"no tiers": 0.0, "DRAM for all": 1.0}
_END_TURN: Final = 1  # as the simulator says it
_SHORTEST_GAP_S: Final = 0.1

Session = dict[str, Any]  # as the simulator loads it
Policy = Callable[[], object]


class Run(NamedTuple):
    """Shares of all prompt tokens, and seconds."""

    recomputed: float
    loaded: float
    waited_s: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What is replayed, and in what.

    Attributes:
        device, dram: in parts of the live contexts.
        told: the end of sessions is.
    """

    name: str
    sessions: Sequence[Session]
    policy: Policy
    agents: int = AGENTS
    seeds: Sequence[int] = SEEDS
    device: float = DEVICE
    dram: float = 0.0
    told: bool = False


class Simulator:
    """The simulator in a file."""

    def __init__(self, path: Path) -> None:
        self._module = _load(path, "simulator")
        self._known: list[tuple[Sequence[Session], tuple[object, ...], Run]] = []
        self._live: list[tuple[Sequence[Session], dict[str, int], float]] = []

    def sessions(self, traces: Path) -> list[Session]:
        """Those that fit."""
        loaded: list[Session] = self._module.load(str(traces))
        return [session for session in loaded if _largest(session) <= MOST_TOKENS]

    def run(self, setting: Setting) -> Iterator[dict[str, Run]]:
        """LRU, the policy and the oracle, by seed."""
        for seed in setting.seeds:
            yield {
                "lru": self._once("lru", setting, seed),
                "external": self._run("external", setting, seed, setting.policy()),
                "oracle": self._once("oracle", setting, seed),
            }

    def _once(self, name: str, setting: Setting, seed: int) -> Run:
        where = (name, setting.agents, seed, setting.device, setting.dram, setting.told)
        for sessions, where_else, run in self._known:
            if sessions is setting.sessions and where_else == where:
                return run
        run = self._run(name, setting, seed)
        self._known.append((setting.sessions, where, run))
        return run

    def _run(self, name: str, setting: Setting, seed: int, policy: object = None) -> Run:
        of = {"agents": setting.agents, "seed": seed}
        live = self._live_tokens(setting.sessions, of)
        device, dram = setting.device * live, setting.dram * live
        said = self._module.simulate(setting.sessions, name, device, dram, 0.0, close=setting.told, ext=policy, **of)
        shares = self._module.pct(said)
        return Run(shares["recompute"] / 100, shares["dram"] / 100, shares["wait"])

    def _live_tokens(self, sessions: Sequence[Session], known: dict[str, int]) -> float:
        for of, known_then, tokens in self._live:
            if of is sessions and known_then == known:
                return tokens
        said = self._module.simulate(sessions, "infinite", math.inf, math.inf, math.inf, **known)
        self._live.append((sessions, known, float(said["W"])))
        return float(said["W"])


def figures_of(runs: Sequence[dict[str, Run]]) -> dict[str, float]:
    """The figures of the runs of one setting: see the module."""
    more = [run["external"].recomputed / run["lru"].recomputed - 1 for run in runs]
    waits = [_ratio(run["external"].waited_s, run["lru"].waited_s) - 1 for run in runs]
    figures = {
        "runs": len(runs),
        "distance": statistics.mean(_distance(run, "recomputed") for run in runs),
        "distance_together": _distance(_together(runs), "recomputed"),
        "recomputed_more": statistics.mean(more),
        "recomputed_more_worst": max(more),
        "waited_more": statistics.mean(waits),
        "waited_more_worst": max(waits),
    }
    if any(run["lru"].loaded for run in runs):
        figures["distance_in_loads"] = statistics.mean(_distance(run, "loaded") for run in runs)
        figures["distance_in_loads_together"] = _distance(_together(runs), "loaded")
    return {name: round(value, 4) for name, value in figures.items()}


def fitted_on(sessions: Sequence[Session]) -> Policy:
    """The policy, its prior and its classes taken from these sessions and from nothing else."""
    module = _load(Path(retention.__file__), "fitted_retention")
    turns = list(_turns(sessions))
    means = [mean for _, mean, _, _ in turns if mean is not None]
    outputs = [output_tokens for _, _, output_tokens, _ in turns]
    module._SHORT_GAPS, module._LONG_GAPS = _quantiles(means, (1 / 3, 2 / 3))
    module._SHORT_OUTPUT, module._LONG_OUTPUT = _quantiles(outputs, (1 / 3, 2 / 3))
    calls = [
        (module._third(mean, module._SHORT_GAPS, module._LONG_GAPS), gap)
        for stop, mean, _, gap in turns
        if stop != _END_TURN
    ]
    module._AFTER_TOOL_USE = tuple(
        _prior(module, [gap for third, gap in calls if third == wanted]) for wanted in range(3)
    )
    module._AFTER_END_TURN = _prior(module, [gap for stop, _, _, gap in turns if stop == _END_TURN])
    return module.RetentionPolicy  # type: ignore[no-any-return]


def without_prior() -> Policy:
    """The policy with a prior that says the same of every turn, and next to nothing."""
    module = _load(Path(retention.__file__), "retention_without_prior")
    prior = module._Prior(tuple(10.0 ** (4 * share) for share in module._SHARES), 0.1)
    module._AFTER_TOOL_USE, module._AFTER_END_TURN = (prior, prior, prior), prior
    return module.RetentionPolicy  # type: ignore[no-any-return]


class Untold(retention.RetentionPolicy):
    """Nobody says why a turn stopped."""

    def finished(self, *, stop: str | None, **told: Any) -> None:  # noqa: ARG002
        """The stop reason is dropped."""
        super().finished(stop=None, **told)


def bars(sample: Sequence[Session]) -> Iterator[Setting]:
    """What the project promises."""
    policy = retention.RetentionPolicy
    yield Setting("no tiers", sample, policy)
    yield Setting("DRAM for all", sample, policy, dram=1.0)
    yield Setting("DRAM for all, close signal", sample, policy, dram=1.0, told=True)


def held_out(sample: Sequence[Session], parts: int) -> Iterator[Setting]:
    """On each part of the sample: fitted on the others, and as shipped; without tiers and with DRAM."""
    for shuffle in range(PARTINGS[parts]):
        order = list(sample)
        random.Random(shuffle).shuffle(order)
        for part in range(parts):
            held = order[part::parts] * parts
            fitted = fitted_on([session for at, session in enumerate(order) if at % parts != part])
            for tiers, dram in _TIERS.items():
                yield Setting(f"fitted on the others, {tiers}", held, fitted, dram=dram)
                yield Setting(f"as shipped, {tiers}", held, retention.RetentionPolicy, dram=dram)


def elsewhere(sample: Sequence[Session]) -> Iterator[Setting]:
    """The same policy where nobody looked when it was made."""
    policy = retention.RetentionPolicy
    for tiers, dram in _TIERS.items():
        yield Setting(f"twelve other seeds, {tiers}", sample, policy, seeds=range(4, 16), dram=dram)
        for agents in (8, 24, 32):
            yield Setting(f"{agents} agents, {tiers}", sample, policy, agents, dram=dram)
        for device in (0.1, 0.15, 0.2, 0.3, 0.4, 0.5):
            yield Setting(f"device {device:.0%}, {tiers}", sample, policy, device=device, dram=dram)
        for times in (0.25, 4.0):
            yield Setting(f"gaps times {times:g}, {tiers}", _stretched(sample, times), policy, dram=dram)
        yield Setting(f"stop reasons untold, {tiers}", sample, Untold, dram=dram)
        yield Setting(f"no prior, {tiers}", sample, without_prior(), dram=dram)


def _distance(run: dict[str, Run], of: str) -> float:
    lru, policy, oracle = (getattr(run[name], of) for name in ("lru", "external", "oracle"))
    return (lru - policy) / (lru - oracle) if lru > oracle else 0.0


def _together(runs: Sequence[dict[str, Run]]) -> dict[str, Run]:
    return {name: Run(*map(math.fsum, zip(*(run[name] for run in runs), strict=True))) for name in runs[0]}


def _ratio(value: float, to: float) -> float:
    return value / to if to else 1.0 + (value > 0)


def _largest(session: Session) -> int:
    return max(int(prompt + output) for _, _, prompt, output, *_ in session["main"])


def _stretched(sessions: Sequence[Session], times: float) -> list[Session]:
    return [{**session, "main": [(turn[0] * times, *turn[1:]) for turn in session["main"]]} for session in sessions]


def _turns(sessions: Iterable[Session]) -> Iterator[tuple[int, float | None, int, float]]:
    """Of each turn: why it stopped, the session's mean of log gaps, the tokens generated, the gap after it."""
    for session in sessions:
        mean: float | None = None
        turns = session["main"]
        for number, (_, _, _, output_tokens, _, _, stop) in enumerate(turns):
            gap_s = turns[number + 1][0] if number + 1 < len(turns) else math.inf
            yield stop, mean, output_tokens, gap_s
            if stop != _END_TURN and gap_s < math.inf:
                newest = math.log(max(gap_s, _SHORTEST_GAP_S))
                mean = newest if mean is None else mean + retention._WEIGHT_OF_NEWEST * (newest - mean)


def _prior(module: Any, gaps_s: Sequence[float]) -> object:
    ended = sorted(gap_s for gap_s in gaps_s if gap_s < math.inf)
    within_s = tuple(max(gap_s, _SHORTEST_GAP_S) for gap_s in _quantiles(ended, module._SHARES))
    return module._Prior(within_s, 1 - len(ended) / len(gaps_s))


def _quantiles(values: Iterable[float], shares: Sequence[float]) -> list[float]:
    in_order = sorted(values)
    return [in_order[min(int(share * len(in_order)), len(in_order) - 1)] for share in shares]


def _load(path: Path, name: str) -> Any:
    """A module of its own, whose constants may be changed."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _promised(name: str, figures: dict[str, float]) -> bool:
    return (
        figures["distance"] >= LEAST_DISTANCE[name]
        and figures.get("distance_in_loads", 1.0) >= LEAST_DISTANCE_IN_LOADS.get(name, 0.0)
        and figures["recomputed_more_worst"] <= 0
        and figures["waited_more_worst"] <= MOST_MORE_WAITING
    )


def _no_worse_than_lru(_name: str, figures: dict[str, float]) -> bool:
    return figures["recomputed_more"] <= 0 and figures["waited_more"] <= MOST_MORE_WAITING


_PARTS: Final[dict[str, tuple[Callable[[Sequence[Session]], Iterator[Setting]], Callable[..., bool]]]] = {
    "bars": (bars, _promised),
    "others": (lambda _: bars(made_sessions(OTHERS)), _promised),
    "halves": (lambda sample: held_out(sample, 2), _no_worse_than_lru),
    "fifths": (lambda sample: held_out(sample, 5), _no_worse_than_lru),
    "elsewhere": (elsewhere, _no_worse_than_lru),
}


def main() -> int:
    """Replay, print each setting's figures as JSON when they are there (`--json`: all in the end), and what misses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("`")[0])
    parser.add_argument("--simulator", type=Path, required=True, metavar="FILE", help="kvsim.py")
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER", help="what it replays")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=sorted(_PARTS), action="append", help="may be given more than once")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    simulator = Simulator(chosen.simulator)
    sample = simulator.sessions(chosen.traces)
    held = True
    measured: dict[str, dict[str, dict[str, float]]] = {}
    for part, (settings_of, holds) in _PARTS.items():
        if chosen.only is not None and part not in chosen.only:
            continue
        runs: dict[str, list[dict[str, Run]]] = {}
        for setting in settings_of(sample):
            these = list(simulator.run(setting))
            runs.setdefault(setting.name, []).extend(these)
            sys.stderr.write(f"{part}, {setting.name}: {json.dumps(figures_of(these))}\n")
        for name, seen in runs.items():
            figures = figures_of(seen)
            measured.setdefault(part, {})[name] = figures
            if not chosen.json:
                print(json.dumps({part: {"setting": name, **figures}}), flush=True)
            if not holds(name, figures):
                held = False
                sys.stderr.write(f"MISSED: {part}, {name}\n")
    if chosen.json:
        print(json.dumps(measured))
    return 1 if chosen.check and not held else 0


if __name__ == "__main__":
    sys.exit(main())
