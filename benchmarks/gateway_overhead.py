"""What the gateway adds to a streamed chat completion, everything on. `python -m benchmarks.gateway_overhead`.

Three targets in one run, in turns: the engine's stub directly, the bare FastAPI proxy over it, the gateway over it
(authentication, session, encryption, durable store). The proxy and the gateway have one core to themselves; the stub
and this load generator share the others.

Reported: milliseconds to the first byte of the stream and to its end at a fixed rate; requests a second of 16
connections in a closed loop, and the processor time of one; the median of three starts of the gateway, from its
spawning to a connection that it accepted; its resident memory after all that. `--check` leaves with 1 when a figure
misses what the project promises.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from benchmarks.load import Agents, Target, Times, at_rate, closed_loop, percentile
from benchmarks.running import Running, make_appliance, running_bare_proxy, running_gateway, running_stub

ADDED_MEDIAN_MS = 2.0
ADDED_P99_MS = 4.0
SHARE_OF_BARE = 0.25
START_S = 1.5
RESIDENT_BYTES = 150e6
CONNECTIONS = 16
_STARTS = 3


@dataclass(slots=True)
class Measured:
    """All rounds of one target."""

    times: Times = field(default_factory=Times)
    streams: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    errors: list[str] = field(default_factory=list)

    def add(self, paced: Times, loop: Times, seconds: float, cpu_s: float) -> None:
        """One more round; `cpu_s` was used in the closed loop."""
        self.times.first += paced.first
        self.times.end += paced.end
        self.streams += len(loop.end)
        self.seconds += seconds
        self.cpu_s += cpu_s
        self.errors += paced.errors + loop.errors

    def figures(self) -> dict[str, float]:
        """Milliseconds, and requests a second."""
        shares = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
        named = {f"first_{name}_ms": 1000 * percentile(self.times.first, share) for name, share in shares}
        named |= {f"end_{name}_ms": 1000 * percentile(self.times.end, share) for name, share in shares}
        return {
            **named,
            "requests_per_s": self.streams / self.seconds,
            "cpu_us": 1e6 * self.cpu_s / self.streams,
            "errors": float(len(self.errors)),
        }


async def measure(
    targets: Sequence[tuple[Target, Running]], *, rounds: int, rate: float, seconds: float
) -> dict[str, Measured]:
    """Every target in every round; the first round warms up and does not count."""
    measured = {target.name: Measured() for target, _ in targets}
    agents = {target.name: Agents(target.name, 64) for target, _ in targets}
    for number in range(rounds + 1):
        for target, running in targets:
            mine = agents[target.name]
            paced = await at_rate(target, mine, per_second=rate, seconds=seconds if number else 1.0)
            used = running.cpu_s
            loop, took = await closed_loop(target, mine, connections=CONNECTIONS, seconds=seconds / 2)
            if number:
                measured[target.name].add(paced, loop, took, running.cpu_s - used)
    return measured


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each round, for each target")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure misses its bound")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    one, others = cores[:1], cores[1:] or cores
    os.sched_setaffinity(0, others)
    with tempfile.TemporaryDirectory(prefix="holdfast-overhead-") as place:
        engine, state = Path(place) / "engine.sock", Path(place) / "state"
        key = make_appliance(state)
        start_s = _start_s(state, engine, one)
        with (
            running_stub(engine, cores=others) as stub,
            running_bare_proxy(engine, cores=one) as bare,
            running_gateway(state, engine, cores=one) as gateway,
        ):
            targets = (
                (Target("direct", socket=str(engine)), stub),
                (Target("bare", port=bare.port), bare),
                (Target("gateway", port=gateway.port, api_key=key), gateway),
            )
            measured = uvloop.run(
                measure(targets, rounds=given.rounds, rate=given.rate, seconds=given.seconds), debug=False
            )
            memory = gateway.rss_bytes
    return _report(
        {name: it.figures() for name, it in measured.items()}, measured, start_s, memory, given.json, given.check
    )


def _start_s(state: Path, engine: Path, cores: Sequence[int]) -> float:
    """The median of a few starts; the first of them may have to compile what an installed appliance has compiled."""
    taken = []
    for _ in range(_STARTS):
        with running_gateway(state, engine, cores=cores, ready=False) as gateway:
            taken.append(gateway.accepting_after_s)
    return sorted(taken)[_STARTS // 2]


def promises_met(
    figures: Mapping[str, Mapping[str, float]], *, start_s: float, resident_bytes: float
) -> dict[str, bool]:
    """Each promise, and whether the figures of `direct`, `bare` and `gateway` hold it."""
    direct, bare, gateway = figures["direct"], figures["bare"], figures["gateway"]
    added = _added(figures)
    share = gateway["requests_per_s"] / bare["requests_per_s"]
    return {
        f"added to the first byte, median <= {ADDED_MEDIAN_MS:g} ms": added["first_p50_ms"] <= ADDED_MEDIAN_MS,
        f"added to the first byte, p99 <= {ADDED_P99_MS:g} ms": added["first_p99_ms"] <= ADDED_P99_MS,
        f"added to the durable end, median <= {ADDED_MEDIAN_MS:g} ms": added["end_p50_ms"] <= ADDED_MEDIAN_MS,
        f"added to the durable end, p99 <= {ADDED_P99_MS:g} ms": added["end_p99_ms"] <= ADDED_P99_MS,
        f"requests/s >= {SHARE_OF_BARE:.0%} of the bare proxy's": share >= SHARE_OF_BARE,
        f"start to accepting connections < {START_S:g} s": start_s < START_S,
        f"resident memory < {RESIDENT_BYTES / 1e6:g} MB": resident_bytes < RESIDENT_BYTES,
        "no error": not any(target["errors"] for target in (direct, bare, gateway)),
    }


def _added(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    direct, gateway = figures["direct"], figures["gateway"]
    return {name: gateway[name] - direct[name] for name in direct if name.endswith("_ms")}


def _report(
    figures: dict[str, dict[str, float]],
    measured: dict[str, Measured],
    start_s: float,
    memory: int,
    as_json: bool,
    check: bool,
) -> int:
    added = _added(figures)
    share = figures["gateway"]["requests_per_s"] / figures["bare"]["requests_per_s"]
    met = promises_met(figures, start_s=start_s, resident_bytes=memory)
    if as_json:
        result = {
            "targets": figures,
            "added": added,
            "share_of_bare": share,
            "gateway_start_s": start_s,
            "gateway_rss_bytes": memory,
            "met": met,
        }
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        columns = (
            "first_p50_ms",
            "first_p95_ms",
            "first_p99_ms",
            "end_p50_ms",
            "end_p99_ms",
            "requests_per_s",
            "cpu_us",
        )
        print(f"{'':<10}" + "".join(f"{name:>16}" for name in columns))
        for name, row in (*figures.items(), ("added", {**added, "requests_per_s": 0.0, "cpu_us": 0.0})):
            print(f"{name:<10}" + "".join(f"{row[column]:>16.2f}" for column in columns))
        print(f"gateway: {share:.0%} of the bare proxy's requests/s on one core, {memory / 1e6:.0f} MB resident")
        print(f"gateway: accepts connections {start_s:.2f} s after it was spawned")
        for promise, kept in met.items():
            print(f"{'met   ' if kept else 'MISSED'}  {promise}")
        for name, it in measured.items():
            for error in it.errors[:2]:
                print(f"{name}: {error!r}")
    return 1 if check and not all(met.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
