"""What retention and the account cost the engine. `.venv-engine/bin/python -m benchmarks.leases [--json] [--check]`.

The pool is wholly leased: a block that no request uses is an idle session's.

- `decode`: what all of it takes of a decode step while 10,000 idle sessions have the pool and each new block is
  reclaimed from one of them, on the demonstration model and on one of 140 million weights:
  - the connector's hooks in each step, what they reclaim included;
  - what a turn costs beside its steps: its arrival, room for its prompt, its end, its account. Each of the running
    requests has one in `ANSWER_TOKENS` steps;
  - the order in which sessions yield: how long it takes to reckon, and the share of the time that it is held to;
  - the live picture, asked for as often as Prometheus asks;
  - the gateway's question about `WAITING` sessions whose requests wait there, once a second;
  - one session that ends, and is released, every second.
- `memory`: bytes that an idle session of 100 blocks takes, 3,200 tokens, on the device and without tiers: all that the
  table, its order and the policy hold, labels included; not what the pool has for each block anyway, the hash of its
  content among it. Beside it, what each further block takes: the whole grows with the conversation.
- `first_token`: a request for 80 % of a pool that as many idle sessions have as it has blocks, against the same on an
  empty pool, in pairs: what was done before is the same, and which is first changes, so that what else the machine does
  falls on both. The middle of the pairs' ratios counts. Beside it, what the connector took of the leased one.

A step's time is the middle one's. What the hooks take is the mean of a round of steps in which each running request
fills two blocks, and of several rounds the middle one's; all on a machine that does nothing else. `--check` leaves with
1 when a figure misses what the project promises, or the pool was not as it says here.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="2",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="holdfast",
)

from vllm import LLM, SamplingParams

from appliance.engine.demo.random_model import COMMITTED_MODEL, write_random_model
from appliance.engine.inside.leases import ORDER_SHARE, LeasedBlock, LeaseTable
from appliance.engine.protocol import LEASE_FRACTION_FIELD, Lease, TurnEnd, connector_config, lease_params
from benchmarks.engine_bars import MOST_BYTES, MOST_SHARE, MOST_SLOWER

BLOCK: Final = 32  # tokens
SESSIONS: Final = 10_000
RUNNING: Final = 8
PROMPT_BLOCKS: Final = 32
ROUNDS: Final = 5
ROUND_STEPS: Final = 2 * BLOCK
TURNS: Final = 20
ANSWER_TOKENS: Final = 400  # the mean of agents' turns is 409: docs/decisions/0012
PICTURES: Final = 5
QUESTIONS: Final = 20
PICTURE_EVERY_S: Final = 15.0
PICTURE_SESSIONS: Final = 20
WAITING: Final = 256  # as many as may, as delivered
ASKED_EVERY_S: Final = 1.0
ENDED_EVERY_S: Final = 1.0
PAIRS: Final = 12
BLOCKS_EACH: Final = 100
POOL: Final = 160  # blocks, where first tokens are timed
_ONE_HAS_RANK: Final = 10  # of so many idle sessions
_HOOKS: Final = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "make_room",
    "build_connector_meta",
    "request_finished_all_groups",
    "turns_ended",
)


class Engine:
    """A real engine in this process, stepped by hand."""

    def __init__(self, model: Path, blocks: int, *, most_running: int) -> None:
        transfer: dict[str, Any] = connector_config(0.0)
        transfer["kv_connector_extra_config"][LEASE_FRACTION_FIELD] = 1.0  # more than an operator may say
        self._llm = LLM(
            model=str(model),
            block_size=BLOCK,
            num_gpu_blocks_override=blocks + 1,
            max_model_len=min(8192, blocks * BLOCK),
            max_num_batched_tokens=2048,
            max_num_seqs=most_running,
            enforce_eager=True,
            seed=0,
            kv_transfer_config=transfer,
        )
        self._front = self._llm.llm_engine
        self.core: Any = self._front.engine_core.engine_core
        self.connector: Any = self.core.scheduler.get_kv_connector()
        self.table: LeaseTable = self.connector._table
        self.pool: Any = self.core.scheduler.kv_cache_manager.block_pool
        self._names = itertools.count()

    def submit(self, tokens: int, *, max_tokens: int = 1, with_session: bool = False) -> str:
        """Queue a request that shares nothing with any other; its name, which is its session's and turn's, too."""
        name = f"request-{next(self._names)}"
        transfer = lease_params(Lease(name, "tenant", 15.0, turn=name)) if with_session else None
        self._front.add_request(
            name,
            {"prompt_token_ids": [10 + position * 31 % 1900 for position in range(tokens)], "cache_salt": name},
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args=None if transfer is None else {"kv_transfer_params": transfer},
            ),
        )
        return name

    def lease_what_is_free(self, most_blocks: int) -> None:
        """Lease each free block to a session of its own, as a request that ends does, without computing it."""
        for _ in range(min(most_blocks, self.pool.get_num_free_blocks())):
            number = next(self._names)
            (block,) = self.pool.get_new_blocks(1)
            content = number.to_bytes(36, "big")
            self.pool._insert_block_hash(content, block, BLOCK)
            lease = Lease(f"session-{number}", "tenant", 0.0 if number % _ONE_HAS_RANK else 3600.0)
            self.table.arrived(lease)
            self.connector._apply(self.table.finished(lease, [LeasedBlock(block.block_id, BLOCK, content)]))
            self.pool.free_blocks([block])
        self.connector.tick()

    def held_blocks(self) -> int:
        """How many blocks requests have that no session has leased."""
        return int(self.pool.num_gpu_blocks - 1 - self.pool.get_num_free_blocks() - self.table.leased_blocks)

    def step(self) -> set[str]:
        """One step; the requests that ended."""
        return {output.request_id for output in self._front.step() if output.finished}

    def run(self, name: str) -> int:
        """Step until a request has ended; how often."""
        return next(steps for steps in itertools.count(1) if name in self.step())

    def close(self) -> None:
        """Shut it down."""
        self.core.shutdown()


def _time_calls(of: object, *names: str) -> list[float]:
    """Seconds of each call of the methods so named, from now on."""
    calls: list[float] = []
    for name in names:
        setattr(of, name, _timed(getattr(of, name), calls))
    return calls


def _timed(method: Callable[..., Any], calls: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*given, **named)
        finally:
            calls.append(time.perf_counter() - began)

    return timed


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


class Costs(NamedTuple):
    """See the module. Seconds.

    Attributes:
        hooks_s: in each decode step, without the order.
        turn_s: without its steps and the order.
        asked_s: for one question about those who wait.
        ended_s: for one session that ends.
        new_blocks: that running requests were given in the steps looked at.
        reclaimed_blocks: that idle sessions gave up meanwhile.
    """

    step_s: float
    hooks_s: float
    turn_s: float
    order_s: float
    picture_s: float
    asked_s: float
    ended_s: float
    new_blocks: int
    reclaimed_blocks: int


def costs(model: Path) -> Costs:
    """What it costs while `SESSIONS` idle sessions have what the running requests do not use."""
    engine = Engine(model, SESSIONS + RUNNING * PROMPT_BLOCKS, most_running=2 * RUNNING)
    engine.lease_what_is_free(SESSIONS)
    table = engine.table
    hooks, orders = _time_calls(engine.connector, *_HOOKS), _time_calls(table, "_reckon_order")
    for number in range(RUNNING):  # whose blocks are full at different steps
        engine.submit(
            PROMPT_BLOCKS * BLOCK - number * (BLOCK // RUNNING),
            max_tokens=ROUNDS * ROUND_STEPS + 4 * TURNS + 2 * BLOCK,
            with_session=True,
        )
    for _ in range(BLOCK):  # the prompts, and blocks beyond them
        engine.step()

    new_blocks, reclaimed_blocks = -engine.held_blocks(), -table.reclaimed_blocks_total
    steps, rounds = [], []
    for _ in range(ROUNDS):
        hooks.clear()
        orders.clear()
        steps += [_seconds(engine.step) for _ in range(ROUND_STEPS)]
        rounds.append((sum(hooks) - sum(orders)) / ROUND_STEPS)
    hooks_s = statistics.median(rounds)
    new_blocks, reclaimed_blocks = new_blocks + engine.held_blocks(), reclaimed_blocks + table.reclaimed_blocks_total

    turns = []
    for _ in range(TURNS):
        hooks.clear()
        orders.clear()
        name = engine.submit(PROMPT_BLOCKS * BLOCK, with_session=True)
        of_steps_s = hooks_s * engine.run(name)
        engine.connector.turns_ended([TurnEnd(name, "tenant", name, "tool_use", 1, 120.0)])
        turns.append(sum(hooks) - sum(orders) - of_steps_s)
    order_s = statistics.median(_seconds(table._reckon_order) for _ in range(PICTURES))
    picture_s = statistics.median(_seconds(lambda: engine.connector.picture(PICTURE_SESSIONS)) for _ in range(PICTURES))
    report = engine.core.holdfast_lease_report
    idle = [[state.tenant, state.session] for state in table.states()]
    awaited, ending = idle[:WAITING], [session for _, session in idle[WAITING : WAITING + QUESTIONS]]
    asked_s = statistics.median(_seconds(lambda: report([], awaited, False)) for _ in range(QUESTIONS))
    ended_s = statistics.median(_seconds(lambda: report([session], [], False)) for session in ending)  # noqa: B023
    engine.close()
    return Costs(
        statistics.median(steps),
        hooks_s,
        statistics.median(turns),
        order_s,
        picture_s,
        asked_s,
        ended_s,
        new_blocks,
        reclaimed_blocks,
    )


def decode_step_s(model: Path) -> float:
    """How long a decode step takes where nobody is idle."""
    engine = Engine(model, 2 * RUNNING * PROMPT_BLOCKS, most_running=RUNNING)
    for _ in range(RUNNING):
        engine.submit(PROMPT_BLOCKS * BLOCK, max_tokens=4 * ROUND_STEPS)
    for _ in range(BLOCK):
        engine.step()
    steps = [_seconds(engine.step) for _ in range(ROUND_STEPS)]
    engine.close()
    return statistics.median(steps)


def memory_bytes(blocks_each: int) -> float:
    """What one of 10,000 idle sessions takes."""
    content = os.urandom(36)  # the pool's
    tracemalloc.start()
    table = LeaseTable(SESSIONS * blocks_each, time.monotonic, lambda _: content)
    before = tracemalloc.get_traced_memory()[0]
    for session in range(SESSIONS):
        asked = Lease(f"{session:032x}", f"{session % 50:032x}", 15.0, turn=f"chatcmpl-{session:032x}")
        lease = Lease.from_wire(json.loads(json.dumps(asked.to_wire())))
        table.arrived(lease)
        first = session * blocks_each
        table.finished(
            lease, [LeasedBlock(first + place, (place + 1) * BLOCK, content) for place in range(blocks_each)]
        )
    table.reclaim(1, lambda _: False)  # has it reckon its order
    each = (tracemalloc.get_traced_memory()[0] - before) / SESSIONS
    tracemalloc.stop()
    return each


class FirstTokens(NamedTuple):
    """Seconds to the first token of a request for 80 % of the pool; the connector's share of the leased ones."""

    empty_s: list[float]
    leased_s: list[float]
    connector_s: list[float]


def first_tokens(model: Path) -> FirstTokens:
    """Time `PAIRS` requests each."""
    engine = Engine(model, POOL, most_running=RUNNING)
    tokens = int(0.8 * POOL) * BLOCK - 1
    engine.run(engine.submit(tokens))
    hooks = _time_calls(engine.connector, *_HOOKS)
    seen = FirstTokens([], [], [])
    for pair in range(PAIRS):
        for leased in (False, True) if pair % 2 else (True, False):
            engine.lease_what_is_free(POOL)
            assert engine.table.leased_blocks == POOL
            if not leased:
                assert engine.core.reset_prefix_cache()
            hooks.clear()
            (seen.leased_s if leased else seen.empty_s).append(_seconds(lambda: engine.run(engine.submit(tokens))))
            if leased:
                seen.connector_s.append(sum(hooks))
    engine.close()
    return seen


def _decode() -> tuple[dict[str, float], bool]:
    took = costs(COMMITTED_MODEL)
    with tempfile.TemporaryDirectory() as folder:
        large_step_s = decode_step_s(write_random_model(Path(folder)))
    in_a_step_s = took.hooks_s + took.turn_s * RUNNING / ANSWER_TOKENS
    at_all_times = (
        1 / ORDER_SHARE + took.picture_s / PICTURE_EVERY_S + took.asked_s / ASKED_EVERY_S + took.ended_s / ENDED_EVERY_S
    )
    share, large_share = (in_a_step_s / step_s + at_all_times for step_s in (took.step_s, large_step_s))
    figures = {
        "sessions": SESSIONS,
        "running": RUNNING,
        "new_blocks": took.new_blocks,
        "reclaimed_blocks": took.reclaimed_blocks,
        "hooks_us": round(took.hooks_s * 1e6, 1),
        "turn_us": round(took.turn_s * 1e6, 1),
        "order_ms": round(took.order_s * 1e3, 2),
        "order_share": 1 / ORDER_SHARE,
        "picture_ms": round(took.picture_s * 1e3, 2),
        "picture_share": round(took.picture_s / PICTURE_EVERY_S, 5),
        "waiting": WAITING,
        "asked_ms": round(took.asked_s * 1e3, 2),
        "asked_share": round(took.asked_s / ASKED_EVERY_S, 5),
        "ended_ms": round(took.ended_s * 1e3, 2),
        "ended_share": round(took.ended_s / ENDED_EVERY_S, 5),
        "demo_step_ms": round(took.step_s * 1e3, 3),
        "demo_share": round(share, 5),
        "random_140m_step_ms": round(large_step_s * 1e3, 3),
        "random_140m_share": round(large_share, 5),
    }
    # What the next step wants is reclaimed in the one before: a block of each running request.
    all_reclaimed = took.reclaimed_blocks >= took.new_blocks - RUNNING > 0
    return figures, share < MOST_SHARE and all_reclaimed


def _memory() -> tuple[dict[str, float], bool]:
    one, whole = memory_bytes(1), memory_bytes(BLOCKS_EACH)
    figures = {
        "blocks_per_session": BLOCKS_EACH,
        "bytes_per_session": round(whole),
        "bytes_per_block": round((whole - one) / (BLOCKS_EACH - 1), 1),
    }
    return figures, whole < MOST_BYTES


def _first_token() -> tuple[dict[str, float], bool]:
    seen = first_tokens(COMMITTED_MODEL)
    slower = statistics.median(leased / empty for empty, leased in zip(seen.empty_s, seen.leased_s, strict=True)) - 1
    figures = {
        "pairs": PAIRS,
        "sessions": POOL,
        "empty_p50_s": round(statistics.median(seen.empty_s), 4),
        "leased_p50_s": round(statistics.median(seen.leased_s), 4),
        "slower": round(slower, 4),
        "connector_p50_ms": round(statistics.median(seen.connector_s) * 1e3, 3),
    }
    return figures, slower <= MOST_SLOWER


_PARTS: Final = {"decode": _decode, "memory": _memory, "first_token": _first_token}


def main() -> int:
    """Measure, print each part's figures as JSON when they are there (`--json`: all in the end), and what misses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", choices=sorted(_PARTS))
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    held = True
    measured = {}
    for name, measure in _PARTS.items():
        if chosen.only in (None, name):
            figures, holds = measure()
            measured[name] = figures
            if not chosen.json:
                print(json.dumps({name: figures}), flush=True)
            held = held and holds
            if not holds:
                sys.stderr.write(f"MISSED: {name}\n")
    if chosen.json:
        print(json.dumps(measured))
    return 1 if chosen.check and not held else 0


if __name__ == "__main__":
    sys.exit(main())
