"""Two hundred streams at a time for a minute: no error, no memory that is kept. `python -m benchmarks.streams`.

Each connection is an agent with a session of its own; a stream has a hundred words in five seconds, and the agent's
next turn begins when it ends. Memory is the gateway's resident set, looked at every second; what counts is how much it
grows from second 10 on. With `--new-sessions` each stream is a session of its own: then what is remembered of sessions
grows up to its bounds too. `--check` leaves with 1 when a promise is missed.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path

import uvloop

from benchmarks.load import Connection, Target, Times, percentile
from benchmarks.running import Running, make_appliance, running_gateway, running_stub
from benchmarks.stub import MODEL

GROWTH_BYTES = 10_000_000
WARM_S = 10.0
_PLAN = '@stub {"chunks": 100, "pause_s": 0.05}'


async def measure(
    target: Target, gateway: Running, *, streams: int, seconds: float, new_sessions: bool
) -> tuple[Times, list[int]]:
    """The streams that ended, and the gateway's memory second by second."""
    times = Times()
    memory: list[int] = []
    began = time.perf_counter()

    async def worker(number: int) -> None:
        connection = await Connection.open(target)
        await asyncio.sleep(5.0 * number / streams)  # not all at one moment
        turn = 0
        while time.perf_counter() - began < seconds:
            turn += 1
            said = f"Agent {number}, turn {turn}. {'What else is there to say? ' * 20} {_PLAN}"
            body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": said}]}
            session = "" if new_sessions else f"agent-{number}"
            await connection.stream(target.request(json.dumps(body).encode(), session=session), times)
        connection.close()

    async def observe() -> None:
        while True:
            memory.append(gateway.rss_bytes)
            await asyncio.sleep(1.0)

    observer = asyncio.create_task(observe())
    async with asyncio.TaskGroup() as workers:
        for number in range(streams):
            workers.create_task(worker(number))
    observer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await observer
    return times, memory[: int(seconds) + 1]


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--new-sessions", action="store_true", help="every stream is a session of its own")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a promise is missed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="holdfast-streams-") as place:
        engine, state = Path(place) / "engine.sock", Path(place) / "state"
        key = make_appliance(state)
        with running_stub(engine), running_gateway(state, engine) as gateway:
            target = Target("gateway", port=gateway.port, api_key=key)
            times, memory = uvloop.run(
                measure(target, gateway, streams=given.streams, seconds=given.seconds, new_sessions=given.new_sessions)
            )
    growth = max(memory[int(WARM_S) :]) - memory[int(WARM_S)]
    met = not times.errors and growth < GROWTH_BYTES
    result = {
        "streams": len(times.end),
        "errors": len(times.errors),
        "first_p50_ms": 1000 * percentile(times.first, 0.5),
        "first_p99_ms": 1000 * percentile(times.first, 0.99),
        "rss_at_10_s_bytes": memory[int(WARM_S)],
        "rss_growth_bytes": growth,
        "rss_bytes": memory,
        "met": met,
    }
    if given.json:
        sys.stdout.write(json.dumps(result, indent=2) + "\n")
    else:
        print(f"{result['streams']} streams, {result['errors']} errors, {given.streams} at a time")
        print(f"first byte: {result['first_p50_ms']:.1f} ms at the median, {result['first_p99_ms']:.1f} ms at p99")
        print(f"resident: {memory[int(WARM_S)] / 1e6:.1f} MB at 10 s, {growth / 1e6:+.1f} MB after")
        print("met" if met else f"MISSED {times.errors[:2]!r}")
    return 1 if given.check and not met else 0


if __name__ == "__main__":
    sys.exit(main())
