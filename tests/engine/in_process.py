"""A real engine in the test's own process, stepped by hand, its leases on a clock that the test moves."""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.v1.core.block_pool import BlockPool

from appliance.engine.inside.connector import StateConnector, TieredStateConnector
from appliance.engine.protocol import Lease, LeaseReport, TurnAccount, TurnEnd, connector_config, lease_params

BLOCK = 32  # tokens
POOL = 40  # blocks that can be handed out
BOUND = 20  # blocks that leases may hold together
MAX_MODEL_LEN = 1024
STEP_TOKENS = 256
_MOST_STEPS = 3000


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class Answer:
    """What came of a request."""

    cached_tokens: int | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


class EngineInProcess:
    """See the module. `preemptions` counts requests thrown off the device since `start_anew`; `options` are vLLM's."""

    def __init__(
        self,
        model: Path,
        *,
        dram_bytes: int = 0,
        disk: Mapping[str, object] | None = None,
        pool: int = POOL,
        **options: Any,
    ) -> None:
        self.clock = Clock()
        (TieredStateConnector if dram_bytes else StateConnector).clock = staticmethod(self.clock)
        # A process of vLLM's has one worker, which finds its connector here: each engine has its own.
        kv_transfer_state._KV_CONNECTOR_AGENT = None
        self._llm = LLM(
            model=str(model),
            block_size=BLOCK,
            num_gpu_blocks_override=pool + 1,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=STEP_TOKENS,
            max_num_seqs=8,
            enforce_eager=True,
            dtype="bfloat16",
            seed=0,
            kv_transfer_config=connector_config(BOUND / pool, None, dram_bytes, disk),
            **options,
        )
        self._workers_connector = kv_transfer_state._KV_CONNECTOR_AGENT
        self._front = self._llm.llm_engine
        self._core = self._front.engine_core.engine_core
        self.scheduler: Any = self.core.scheduler
        self.connector: StateConnector | TieredStateConnector = self.scheduler.get_kv_connector()
        self.connector.clock = self.clock
        self.pool: BlockPool = self.scheduler.kv_cache_manager.block_pool
        self.answers: dict[str, Answer] = {}
        self.preemptions = 0
        self.steps = 0
        self._reclaimed_before = 0
        self._names = itertools.count()
        self._preempt = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._count_preemption

    @property
    def core(self) -> Any:
        """vLLM's EngineCore. From now on it is this engine that runs, whichever else is in the process."""
        kv_transfer_state._KV_CONNECTOR_AGENT = self._workers_connector
        return self._core

    def submit(
        self,
        prompt: Sequence[int],
        *,
        salt: str = "salt",
        session: str | None = None,
        tenant: str = "tenant",
        idle_timeout_s: float = 15.0,
        max_tokens: int = 1,
        seed: int | None = None,
        priority: int = 0,
        transfer: object = None,
        **lease: Any,
    ) -> str:
        """Queue a request, greedy without a `seed`.

        `transfer` stands in for the `kv_transfer_params` that `session` would give it.
        """
        name = f"request-{next(self._names)}"
        if session is not None:
            transfer = lease_params(Lease(session, tenant, idle_timeout_s, **lease))
        self._front.add_request(
            name,
            {"prompt_token_ids": list(prompt), "cache_salt": salt},
            SamplingParams(
                temperature=0 if seed is None else 1,
                seed=seed,
                max_tokens=max_tokens,
                ignore_eos=True,
                extra_args=None if transfer is None else {"kv_transfer_params": transfer},
            ),
            priority=priority,
        )
        self.answers[name] = Answer()
        return name

    def step(self, times: int = 1) -> None:
        """Step the engine while there is something to do, at most so often."""
        for _ in range(times):
            if not self._front.has_unfinished_requests():
                return
            self.steps += 1
            kv_transfer_state._KV_CONNECTOR_AGENT = self._workers_connector
            for output in self._front.step():
                self.answers[output.request_id] = Answer(
                    output.num_cached_tokens, list(output.outputs[0].token_ids), output.outputs[0].finish_reason
                )

    def drain(self) -> None:
        """Step until nothing is left to do.

        Raises:
            AssertionError: when some request gets nowhere.
        """
        self.step(_MOST_STEPS)
        assert not self._front.has_unfinished_requests()

    def settle(self) -> None:
        """Step as the engine's own loop does, until no copy between tiers is under way.

        Raises:
            AssertionError: when some copy gets nowhere.
        """
        for _ in range(_MOST_STEPS):
            if not self.scheduler.has_requests():
                return
            self.core.step_fn()
        raise AssertionError("copies between tiers do not come to an end")

    def kv_tensors(self) -> list[Any]:
        """The memory of the device's pool."""
        return list(self.core.model_executor.driver_worker.model_runner.kv_caches)

    def copying_worker(self) -> Any:
        """What copies between the device and DRAM; None without tiers."""
        behind = getattr(self._workers_connector, "connector_worker", None)
        return None if behind is None else behind.worker

    def turn(self, prompt: Sequence[int], **request: Any) -> Answer:
        """Submit a request and run everything to its end."""
        name = self.submit(prompt, **request)
        self.drain()
        return self.answers[name]

    def cancel(self, name: str) -> None:
        """Do what a client's disconnect does."""
        self._front.abort_request([name])

    def cancel_all(self) -> None:
        """Cancel whatever has not ended."""
        for name, answer in self.answers.items():
            if answer.finish_reason is None:
                self.cancel(name)

    def report(self, release: Iterable[str] = (), awaited: Iterable[tuple[str, str]] = ()) -> LeaseReport:
        """What `LEASES_PATH` would answer who asks for every lease."""
        return LeaseReport.from_wire(self.core.holdfast_lease_report(list(release), list(awaited), True))

    def ended(self, end: TurnEnd) -> TurnAccount | None:
        """What `TURNS_PATH` would answer."""
        ((account,), _) = self.core.holdfast_turns_ended([end.to_wire()])
        return None if account is None else TurnAccount.from_wire(account)

    def demote(self, tier: str, *sessions: str) -> set[str]:
        """The sessions that `DEMOTE_PATH` would answer with."""
        return set(self.core.holdfast_demote(tier, list(sessions)))

    def reclaimed_blocks(self) -> int:
        """How many leased blocks yielded to requests since `start_anew`."""
        return self.report().reclaimed_blocks_total - self._reclaimed_before

    def tick(self) -> float | None:
        """What the front end's timer does."""
        due_in_s: float | None = self.core.holdfast_lease_tick()
        return due_in_s

    def running(self) -> int:
        """How many requests have been admitted and not ended."""
        return len(self.scheduler.running)

    def start_anew(self) -> None:
        """Empty the prefix cache and the counters."""
        assert self.core.reset_prefix_cache()
        self.answers.clear()
        self.preemptions = self.steps = 0
        self._reclaimed_before = self.report().reclaimed_blocks_total

    def assert_nothing_is_held(self) -> None:
        """No lease, no reference, every block free."""
        assert self.pool.get_num_free_blocks() == POOL
        assert all(block.ref_cnt == 0 for block in self.pool.blocks if not block.is_null)
        self.assert_references_add_up()

    def assert_references_add_up(self) -> None:
        """Each block is referenced once for each request that holds it, and once if it is leased."""
        expected = Counter(self.connector.leased_block_ids())
        for manager in self.scheduler.kv_cache_manager.coordinator.single_type_managers:
            for blocks in manager.req_to_blocks.values():
                expected.update(block.block_id for block in blocks if not block.is_null)
        actual = {block.block_id: block.ref_cnt for block in self.pool.blocks if block.ref_cnt and not block.is_null}
        assert actual == dict(expected)
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert sorted(free) == [block.block_id for block in self.pool.blocks if not block.ref_cnt and not block.is_null]

    def assert_nobody_s_rows_are_empty(self) -> None:
        """What no chunk has of DRAM is zeros, or waits to be; nothing to be seen where there is no such tier."""
        if isinstance(self.connector, TieredStateConnector):
            tiers = self.connector._tiers
            taken = {chunk.chunk_id for chunk in tiers._chunks._chunks.values()}
            full = {row for row, anything in enumerate(tiers._rows().any(dim=1).tolist()) if anything}
            assert full <= taken | tiers._chunks.waiting_rows()
            assert not taken & tiers._chunks.waiting_rows()

    def close(self) -> None:
        """Shut the engine down, and what all engines of the process share: only when no test needs another one."""
        self.core.shutdown()

    def _count_preemption(self, *arguments: Any, **named: Any) -> None:
        self.preemptions += 1
        self._preempt(*arguments, **named)


def words(seed: int, length: int) -> list[int]:
    """A prompt; different seeds differ from the first token on."""
    return [(seed * 7919 + position * (37 + seed % 11) + 11) % 500 for position in range(length)]
