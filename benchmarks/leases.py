"""What retention costs the engine. `.venv-engine/bin/python -m benchmarks.leases [--json] [--check]`.

- `decode`: the connector's share of a decode step while 10,000 idle sessions hold the pool and each new block has to be
  reclaimed from one of them; the same seconds as a share of a step of the model of 140 million weights.
- `memory`: bytes that an idle session of 100 blocks takes: all that the table, its order and the policy hold, labels
  included; not what the pool has for each block anyway, the hash of its content among it.
- `first_token`: a request for 80 % of a pool that is wholly leased against the same on an empty pool, in pairs: what
  was done before is the same, and which is first changes, so that what else the machine does falls on both. The middle
  of the pairs' ratios counts. Beside it, what the connector took of the leased one.

`--check` leaves with 1 when a figure misses what the project promises.
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
from collections.abc import Callable, Sequence
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
from appliance.engine.inside.leases import LeasedBlock, LeaseTable
from appliance.engine.protocol import Lease, connector_config, lease_params
from benchmarks.engine_bars import MOST_BYTES, MOST_SHARE, MOST_SLOWER

BLOCK: Final = 32  # tokens
SESSIONS: Final = 10_000
RUNNING: Final = 8
STEPS: Final = 300
PAIRS: Final = 12
BLOCKS_EACH: Final = 100
POOL: Final = 160  # blocks, where first tokens are timed
_LEASED: Final = 0.95
_HOOKS: Final = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "has_pending_block_frees",
    "build_connector_meta",
    "request_finished_all_groups",
)


class Engine:
    """A real engine in this process, stepped by hand."""

    def __init__(self, model: Path, blocks: int, *, most_running: int) -> None:
        self._llm = LLM(
            model=str(model),
            block_size=BLOCK,
            num_gpu_blocks_override=blocks + 1,
            max_model_len=min(8192, blocks * BLOCK),
            max_num_batched_tokens=2048,
            max_num_seqs=most_running,
            enforce_eager=True,
            seed=0,
            kv_transfer_config=connector_config(_LEASED),
        )
        self._front = self._llm.llm_engine
        self.core: Any = self._front.engine_core.engine_core
        self.connector: Any = self.core.scheduler.get_kv_connector()
        self._names = itertools.count()

    def submit(self, words: Sequence[int], *, session: str = "", max_tokens: int = 1) -> None:
        """Queue a request; nothing of it is shared with any other."""
        name = f"request-{next(self._names)}"
        transfer = lease_params(Lease(session, "tenant", 15.0)) if session else None
        self._front.add_request(
            name,
            {"prompt_token_ids": list(words), "cache_salt": name},
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args=None if transfer is None else {"kv_transfer_params": transfer},
            ),
        )

    def fill(self, sessions: int) -> None:
        """Lease a cached block to each of so many sessions, as a request that ends does, without computing it."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        for number in range(sessions):
            (block,) = pool.get_new_blocks(1)
            content = number.to_bytes(36, "big")
            pool._insert_block_hash(content, block, BLOCK)
            lease = Lease(f"session-{number}", "tenant", 120.0)
            self.connector._table.arrived(lease)
            self.connector._apply(self.connector._table.finished(lease, [LeasedBlock(block.block_id, BLOCK, content)]))
            pool.free_blocks([block])

    def time_hooks(self) -> list[float]:
        """Seconds spent in the connector from now on, in a list of one."""
        spent = [0.0]
        for hook in _HOOKS:
            setattr(self.connector, hook, _timed(getattr(self.connector, hook), spent))
        return spent

    def step(self) -> None:
        """One step."""
        self._front.step()

    def drain(self) -> None:
        """Step until nothing is left to do."""
        while self._front.has_unfinished_requests():
            self.step()

    def first_token_s(self, tokens: int) -> float:
        """How long a new request of so many tokens takes until its first token."""
        self.submit(_words(tokens))
        began = time.perf_counter()
        self.drain()
        return time.perf_counter() - began

    def close(self) -> None:
        """Shut it down."""
        self.core.shutdown()


def _words(length: int) -> list[int]:
    return [10 + position * 31 % 1900 for position in range(length)]


def _timed(hook: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return hook(*given, **named)
        finally:
            spent[0] += time.perf_counter() - began

    return timed


def decode_cost(model: Path, sessions: int) -> tuple[float, float, int]:
    """Seconds of a decode step in all and in the connector, the mean of many; blocks that were reclaimed meanwhile."""
    prompts = RUNNING * 1024 // BLOCK
    engine = Engine(model, max(int(sessions / _LEASED) + 64, 2 * prompts), most_running=max(RUNNING, 64))
    engine.fill(sessions)
    for _ in range(RUNNING):
        engine.submit(_words(1024), session=f"running-{next(engine._names)}", max_tokens=STEPS + 64)
    for _ in range(32):
        engine.step()
    spent = engine.time_hooks()
    before = engine.connector.report().reclaimed_blocks_total
    began = time.perf_counter()
    for _ in range(STEPS):
        engine.step()
    took = time.perf_counter() - began
    reclaimed = engine.connector.report().reclaimed_blocks_total - before
    engine.close()
    return took / STEPS, spent[0] / STEPS, reclaimed


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
    seen = FirstTokens([], [], [])
    engine.first_token_s(tokens)
    spent = engine.time_hooks()
    for pair in range(PAIRS):
        for leased in (False, True) if pair % 2 else (True, False):
            for session in range(16):
                engine.submit(_words(POOL // 16 * BLOCK), session=f"session-{session}")
            engine.drain()
            assert engine.connector.report().leased_blocks == int(_LEASED * POOL)
            if not leased:
                assert engine.core.reset_prefix_cache()
            spent[0] = 0.0
            (seen.leased_s if leased else seen.empty_s).append(engine.first_token_s(tokens))
            if leased:
                seen.connector_s.append(spent[0])
    engine.close()
    return seen


def _decode() -> tuple[dict[str, float], bool]:
    step_s, hooks_s, reclaimed = decode_cost(COMMITTED_MODEL, SESSIONS)
    with tempfile.TemporaryDirectory() as folder:
        large_step_s, _, _ = decode_cost(write_random_model(Path(folder)), 0)
    figures = {
        "sessions": SESSIONS,
        "running": RUNNING,
        "reclaimed_blocks": reclaimed,
        "connector_us": round(hooks_s * 1e6, 1),
        "demo_step_ms": round(step_s * 1e3, 3),
        "demo_share": round(hooks_s / step_s, 5),
        "random_140m_step_ms": round(large_step_s * 1e3, 3),
        "random_140m_share": round(hooks_s / large_step_s, 5),
    }
    return figures, hooks_s / step_s < MOST_SHARE


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
