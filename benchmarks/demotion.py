"""How long a decode step takes while KV goes down, or goes. `.venv-engine/bin/python -m benchmarks.demotion [--json]
[--check] [--model demo|random-140m] [--rounds 5] [--released-tokens 138000]`.

Requests decode, and something moves, in turns with steps in which it stands still: three steps of the one, three of the
other. So what else the machine does falls on both, and so does that contexts grow and each step takes longer.

- `demotion`: a session of 3,200 tokens, wholly on the device, is copied to DRAM: the steps until its last block is
  there;
- `release`: a session with so many tokens in DRAM is released: the steps until the last of its rows is overwritten, and
  the call itself, in which no step can be.

Each once at the engine's pace, and once with all that is due done at once (`at_once`), to see what the pace is for:
then the one step that it falls on counts. A step's ratio is that to the mean of the six around it in which nothing
moved; the middle one counts, and of all rounds' the middle one. `--check` leaves with 1 when a step at the engine's
pace misses the bar.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_PLUGINS="holdfast",
)

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.kv_offload.base import ReqContext, make_offload_key

from appliance.engine.demo.random_model import COMMITTED_MODEL, write_random_model
from appliance.engine.inside.pace import Pace
from appliance.engine.protocol import Lease, connector_config, lease_params
from benchmarks.engine_bars import MOST_LONGER

BLOCK: Final = 32  # tokens
RUNNING: Final = 4
DEMOTED_TOKENS: Final = 3200
RELEASED_TOKENS: Final = 138_000
POOL: Final = 1000  # blocks
_IN_TURNS: Final = 3  # steps
_ANSWER_TOKENS: Final = 4000
_MOST_STEPS: Final = 20_000
_ARMS: Final = ("paced", "at_once")
_MOVES: Final = ("demotion", "release")


class Held:
    """A pace at which nothing is done while it `stands` still; it earns meanwhile as it would."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self.stands = False

    def step(self, *, times: int = 1) -> None:
        self._pace.step(times=times)

    def goes_on(self, size_bytes: int) -> bool:
        return not self.stands and self._pace.goes_on(size_bytes)


class Engine:
    """A real engine in this process, stepped by hand, some of whose requests decode."""

    def __init__(self, model: Path, dram_bytes: int) -> None:
        self._llm = LLM(
            model=str(model),
            block_size=BLOCK,
            num_gpu_blocks_override=POOL,
            max_model_len=8192,
            max_num_batched_tokens=2048,
            max_num_seqs=2 * RUNNING,
            enforce_eager=True,
            seed=0,
            kv_transfer_config=connector_config(0.5, None, dram_bytes),
        )
        self._front = self._llm.llm_engine
        self.core: Any = self._front.engine_core.engine_core
        self.tiers: Any = self.core.scheduler.get_kv_connector()._tiers
        connector: Any = kv_transfer_state._KV_CONNECTOR_AGENT
        self.worker = connector.connector_worker.worker
        self._names = itertools.count()
        self._decoding: set[str] = set()
        self._paces: list[Held] = []

    def submit(self, tokens: int, *, salt: str, session: str = "", max_tokens: int = 1) -> str:
        """Queue a request; its name."""
        name = f"request-{next(self._names)}"
        transfer = lease_params(Lease(session, "tenant", 3600.0)) if session else None
        self._front.add_request(
            name,
            {"prompt_token_ids": [10 + position * 31 % 1900 for position in range(tokens)], "cache_salt": salt},
            SamplingParams(
                temperature=0,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args=None if transfer is None else {"kv_transfer_params": transfer},
            ),
        )
        return name

    def step(self) -> float:
        """One step, in which requests decode; how long it took."""
        while len(self._decoding) < RUNNING:
            name = self.submit(BLOCK, salt=f"decoding-{next(self._names)}", max_tokens=_ANSWER_TOKENS)
            self._decoding.add(name)
            self._front.step()  # its prompt
        began = time.perf_counter()
        ended = {output.request_id for output in self._front.step() if output.finished}
        took_s = time.perf_counter() - began
        self._decoding -= ended
        return took_s

    def steps_while(self, busy: Callable[[], object]) -> list[float]:
        """Step as long as something holds, once at least; how long each took."""
        steps = [self.step()]
        while busy():
            steps.append(self.step())
            if len(steps) > _MOST_STEPS:
                raise SystemExit("something does not come to an end")
        return steps

    def at_pace(self, arm: str) -> None:
        """From now on what can wait is done as the arm says."""
        given = {} if arm == "paced" else {"least_bytes": 1 << 60}
        self._paces = [Held(Pace(time.perf_counter, **given)) for _ in range(2)]
        self.tiers._chunks.pace, self.worker._pace = self._paces

    def steps_still(self) -> list[float]:
        """A few steps in which nothing moves; how long each took. Then it may move."""
        for pace in self._paces:
            pace.stands = True
        steps = [self.step() for _ in range(_IN_TURNS)]
        for pace in self._paces:
            pace.stands = False
        return steps

    def compare(self, before: list[float], busy: Callable[[], object]) -> list[float]:
        """How many times as long as those around it each step takes in which something moves, until nothing is left.

        Args:
            before: steps in which nothing moved.
        """
        ratios: list[float] = []
        while True:
            moving = [self.step()]
            while busy() and len(moving) < _IN_TURNS:
                moving.append(self.step())
            after = self.steps_still()
            ratios += [took_s / statistics.mean(before + after) for took_s in moving]
            if not busy():
                return ratios
            before = after

    def fill_dram(self, session: str, tokens: int) -> None:
        """Have DRAM hold so much of a session, without computing it."""
        context = ReqContext(session, lease_params(Lease(session, "tenant", 3600.0)))
        keys = [make_offload_key(f"{session}-{number}".encode().ljust(32), 0) for number in range(tokens // BLOCK)]
        for number, key in enumerate(keys):
            context.set_offload_key_position(key, (number + 1) * BLOCK)
        self.tiers.primary_tier.on_new_request(context)
        self.tiers.on_new_request(context)
        stored = self.tiers.prepare_store(keys, context)
        if stored is None or len(stored.keys_to_store) < len(keys):
            raise SystemExit("DRAM had no room for the session that is to be released")
        self.tiers.complete_store(keys, context)
        self.tiers.on_request_finished(context)


def measure(engine: Engine, rounds: int, released_tokens: int) -> dict[str, Any]:
    """All rounds. Of each move and arm: a step's ratio, the longest one's, how many there were, and the call's."""
    seen: dict[tuple[str, str], list[dict[str, float]]] = {}
    still_s: list[float] = []
    names = itertools.count()

    def note(move: str, arm: str, ratios: list[float], call: float = 0.0) -> None:
        seen.setdefault((move, arm), []).append(
            {
                "step": max(ratios) if arm == "at_once" else statistics.median(ratios),
                "longest": max(ratios),
                "steps": len(ratios),
                "call": call,
            }
        )

    engine.submit(DEMOTED_TOKENS, salt="demoted", session="first")  # from now on the device has its blocks
    engine.steps_while(lambda: engine.worker._leaving)
    for turn in range(rounds):
        for arm in _ARMS if turn % 2 else _ARMS[::-1]:
            engine.tiers.release({"first", *(f"demoted-{number}" for number in range(2 * turn + 2))})
            engine.steps_while(engine.tiers._chunks.waiting_rows)
            engine.at_pace(arm)
            engine.submit(DEMOTED_TOKENS, salt="demoted", session=f"demoted-{next(names)}")
            engine.steps_still()  # it is found on the device, and its last token computed
            still_s += (before := engine.steps_still())
            note("demotion", arm, engine.compare(before, lambda: engine.worker._leaving))

            engine.at_pace("at_once")
            engine.fill_dram(f"released-{turn}-{arm}", released_tokens)
            engine.step()
            engine.at_pace(arm)
            still_s += (before := engine.steps_still())
            began = time.perf_counter()
            engine.core.holdfast_lease_report([f"released-{turn}-{arm}"], [], False)
            call = (time.perf_counter() - began) / statistics.mean(before)
            note("release", arm, engine.compare(before, engine.tiers._chunks.waiting_rows), call)
    figures: dict[str, Any] = {"step_ms": round(1e3 * statistics.median(still_s), 3)}
    for move in _MOVES:
        figures[move] = {
            arm: {
                what: round(statistics.median(each[what] for each in seen[move, arm]), 4)
                for what in ("step", "longest", "steps", "call")
            }
            for arm in _ARMS
        }
    return figures


def main() -> int:
    """Measure, print; 1 when `--check` was asked for and a figure misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("demo", "random-140m"), default="random-140m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--released-tokens", type=int, default=RELEASED_TOKENS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="leave with 1 when a figure is missed")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = COMMITTED_MODEL if chosen.model == "demo" else write_random_model(Path(folder) / "model")
        shape = json.loads((model / "config.json").read_text())
        head_size = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
        row_bytes = shape["num_hidden_layers"] * 2 * shape["num_key_value_heads"] * head_size * 2 * BLOCK
        rows = (chosen.released_tokens + 4 * DEMOTED_TOKENS) // BLOCK
        engine = Engine(model, rows * row_bytes)
        figures = measure(engine, chosen.rounds, chosen.released_tokens)
        engine.core.shutdown()
    figures |= {
        "model": chosen.model,
        "row_bytes": row_bytes,
        "demoted_tokens": DEMOTED_TOKENS,
        "released_tokens": chosen.released_tokens,
    }
    if chosen.json:
        print(json.dumps(figures, indent=2))
    else:
        print(f"{chosen.model}: a decode step of {RUNNING} requests takes {figures['step_ms']:g} ms")
        for move in _MOVES:
            for arm in _ARMS:
                at = figures[move][arm]
                print(
                    f"{move:9} {arm:8} a step {at['step']:6.3f} times as long, the longest {at['longest']:6.3f}, "
                    f"in {at['steps']:g} steps; the call {at['call']:.3f} of a step"
                )
    held = all(figures[move]["paced"]["step"] <= 1 + MOST_LONGER for move in _MOVES)
    return int(chosen.check and not held)


if __name__ == "__main__":
    sys.exit(main())
