"""Leases on vLLM's block pool. The one module that touches vLLM's internals.

`StateConnector` is loaded as a KV connector: it moves no KV, and uses a connector's hooks to hold references on the
blocks of sessions whose next turn is due. `LeaseRetention` has the hooks, each passing on to the class behind it, so
that it can stand before a connector that does move KV.

Rules:

- Everything here runs in the thread of vLLM's scheduler: the block pool has no lock.
- A reference is taken or given back only as `LeaseTable` says, and at once.
- A request that could run without leases runs: it finds the room at its admission, and what the running requests will
  need in the next step is kept free at the end of each step. If that was too little, leases yield before a running
  request is preempted. Nothing yields to a request that would not fit even then.
- No request fails on account of its lease: one that is malformed is counted, named as such in the log without its
  content, and ignored.
- Written for one version of vLLM; `install` refuses another. tests/engine/test_contract.py holds what is relied on.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus

from appliance.engine.inside.accounts import Accounts
from appliance.engine.inside.leases import Change, LeasedBlock, LeaseTable
from appliance.engine.protocol import (
    LEASE_FIELD,
    LEASE_FRACTION_FIELD,
    VLLM_VERSION,
    Lease,
    LeaseReport,
    MalformedMessage,
    TurnAccount,
    TurnEnd,
)

logger = init_logger(f"vllm.{__name__}")

_REPORT_METHOD = "holdfast_lease_report"
_TICK_METHOD = "holdfast_lease_tick"
_TURNS_METHOD = "holdfast_turns_ended"


class UnsupportedEngine(RuntimeError):
    """This vLLM is not the version that this module was written for."""


class LeaseRetention:
    """The hooks that keep leases. Stands before a connector class and passes every call on to it."""

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._lease_fraction = float(extra.get(LEASE_FRACTION_FIELD, 0.0))
        self._lookahead_tokens: int = vllm_config.num_lookahead_tokens
        self._draft_tokens: int = vllm_config.num_speculative_tokens
        scheduler = vllm_config.scheduler_config
        self._step_tokens: int = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        self._whole_prompt_must_fit: bool = scheduler.scheduler_reserve_full_isl
        self._max_model_len: int = vllm_config.model_config.max_model_len
        self._ignored_total = 0
        self._requests: dict[str, Request] = {}
        self._leases_asked: dict[str, Lease] = {}
        self._accounts = Accounts()
        self._hit_tokens: dict[str, int] = {}  # of requests that are about to be admitted
        self._table: LeaseTable
        self._pool: BlockPool
        self._manager: KVCacheManager

    # What EngineCore is asked, between two steps.

    def report(self, release: Iterable[str] = ()) -> LeaseReport:
        """Expire what is due, release the sessions so labelled, and say how things stand."""
        self.tick()
        self._forget(self._table.release(release))
        return LeaseReport(
            leases=self._table.states(),
            leased_blocks=self._table.leased_blocks,
            free_blocks=self._pool.get_num_free_blocks(),
            total_blocks=self._pool.num_gpu_blocks - 1,
            block_size=self._block_size,
            next_expiry_in_s=self._table.next_expiry_in_s(),
            reclaimed_blocks_total=self._table.reclaimed_blocks_total,
            expired_total=self._table.expired_total,
            ignored_total=self._ignored_total,
        )

    def tick(self) -> float | None:
        """Expire what is due; seconds to the next deadline, or `None` without leases."""
        change = self._table.expire()
        if change.freed:
            self._apply(change)
            logger.debug("Leases ended: %d blocks may be evicted.", len(change.freed))
        return self._table.next_expiry_in_s()

    def turns_ended(self, ends: Iterable[TurnEnd]) -> list[TurnAccount | None]:
        """Hear how turns ended; the account of each."""
        return [self._accounts.ended(end) for end in ends]

    def leased_block_ids(self) -> tuple[int, ...]:
        """The blocks that leases hold a reference on."""
        return self._table.leased_block_ids()

    # What the scheduler calls.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)  # type: ignore[misc]
        self._manager = kv_cache_manager
        self._pool = kv_cache_manager.block_pool
        self._block_size = self._pool.hash_block_size
        bound = int(self._lease_fraction * (self._pool.num_gpu_blocks - 1))
        self._table = LeaseTable(bound, self.clock)
        _release_leases_before_reset(kv_cache_manager, self)

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)  # type: ignore[misc]
        self.tick()
        self._requests[request.request_id] = request
        lease = self._asked_lease(request)
        if lease is not None:
            self._leases_asked[request.request_id] = lease
            self._table.renew(lease)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(  # type: ignore[misc]
            request, num_computed_tokens
        )
        self._hit_tokens[request.request_id] = num_computed_tokens
        if matched[0] is not None and self._table.leased_blocks:
            self._make_room_to_admit(request, matched[0])
        return matched

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]
        hit_tokens = self._hit_tokens.pop(request.request_id, None)
        lease = self._leases_asked.get(request.request_id)
        if lease is not None and hit_tokens is not None:
            self._accounts.admitted(lease, hit_tokens)

    def has_pending_block_frees(self) -> bool:
        # Called when a running request found no block, before it or another one is preempted.
        running = [request for request in self._requests.values() if request.status == RequestStatus.RUNNING]
        wanted = sum(self._wanted_to_continue(request, request.num_computed_tokens) for request in running)
        freed = self._reclaim(max(wanted - self._pool.get_num_free_blocks(), 1))
        pending: bool = super().has_pending_block_frees()  # type: ignore[misc]
        return freed > 0 or pending

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        self.tick()
        if self._table.leased_blocks:
            self._keep_room_for_next_step(scheduler_output.num_scheduled_tokens)
        return super().build_connector_meta(scheduler_output)  # type: ignore[misc]

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        self._hit_tokens.pop(request.request_id, None)
        lease = self._leases_asked.pop(request.request_id, None)
        if lease is not None:
            self._apply(self._table.grant(lease, list(self._cached_blocks(request, block_ids))))
        finished: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(  # type: ignore[misc]
            request, block_ids
        )
        return finished

    def reset_cache(self) -> bool | None:
        self.release_all()
        reset: bool | None = super().reset_cache()  # type: ignore[misc]
        return reset

    @property
    def requires_kv_delivery(self) -> bool:
        """Leases keep what is there; nobody waits for it."""
        return False

    def release_all(self) -> None:
        """End every lease."""
        self._apply(self._table.release_all())

    # How it is done.

    def _asked_lease(self, request: Request) -> Lease | None:
        params = request.kv_transfer_params
        if not params or LEASE_FIELD not in params:
            return None
        try:
            return Lease.from_wire(params[LEASE_FIELD])
        except MalformedMessage:
            self._ignored_total += 1
            logger.warning("A request carried a malformed lease; it gets none (%d so far).", self._ignored_total)
            return None

    def _cached_blocks(self, request: Request, block_ids: tuple[list[int], ...]) -> Iterator[LeasedBlock]:
        """The request's computed blocks that another request can hit, in the order of the tokens they complete."""
        groups: tuple[Sequence[KVCacheBlock], ...] = self._manager.get_blocks(request.request_id).blocks
        cached = [
            LeasedBlock(block.block_id, block.block_hash_num_tokens, block.block_hash)
            for blocks, computed in zip(groups, block_ids, strict=True)
            for block in blocks[: len(computed)]
            if block.block_hash is not None and not block.is_null and block.pool is self._pool
        ]
        return iter(sorted(cached, key=lambda block: block.end_token))

    def _make_room_to_admit(self, request: Request, external_tokens: int) -> None:
        """Reclaim what `allocate_slots` will find missing for a waiting request, if that lets it in."""
        free_blocks = self._pool.get_num_free_blocks()
        if free_blocks >= self._most_to_admit(request):
            return
        hits, local_tokens, _ = self._manager.get_computed_blocks(request)
        computed = local_tokens + external_tokens
        first_chunk = min(request.num_tokens - computed, self._step_tokens) + self._draft_tokens
        needs = [(min(computed + first_chunk + self._lookahead_tokens, self._max_model_len), False)]
        if self._whole_prompt_must_fit:
            needs.append((min(request.num_tokens, self._max_model_len), True))
        required = max(
            self._manager.coordinator.get_num_blocks_to_allocate(
                request_id=request.request_id,
                num_tokens=num_tokens,
                new_computed_blocks=hits.blocks,
                num_encoder_tokens=0,
                total_computed_tokens=computed,
                num_local_computed_tokens=local_tokens,
                num_tokens_main_model=num_tokens,
                apply_admission_cap=capped,
                prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
            )
            for num_tokens, capped in needs
        )
        if any(other.status == RequestStatus.RUNNING for other in self._requests.values()):
            required += self._manager.watermark_blocks
        if required <= free_blocks:
            return
        hit_ids = {block.block_id for group in hits.blocks for block in group}
        if free_blocks + self._table.yieldable(lambda block_id: self._is_busy(block_id, hit_ids)) >= required:
            self._reclaim(required - free_blocks, hit_ids)

    def _most_to_admit(self, request: Request) -> int:
        """No request takes more blocks than this at its admission; cheap, where looking up its hits is not."""
        most_tokens = request.num_tokens + self._draft_tokens + self._lookahead_tokens
        most_blocks = (most_tokens // self._block_size + 1) * self._manager.num_kv_cache_groups
        return int(most_blocks + self._manager.watermark_blocks)

    def _keep_room_for_next_step(self, scheduled_tokens: dict[str, int]) -> None:
        """Reclaim what the requests that hold blocks will want in the next step beyond what is free."""
        free_blocks = self._pool.get_num_free_blocks()
        if free_blocks >= len(self._requests) * (1 + self._step_tokens // self._block_size):
            return
        wanted = 0
        for request in self._requests.values():
            # This step's tokens are added to num_computed_tokens after this hook.
            computed = request.num_computed_tokens + scheduled_tokens.get(request.request_id, 0)
            if computed:
                wanted += self._wanted_to_continue(request, computed)
        self._reclaim(wanted - free_blocks)

    def _wanted_to_continue(self, request: Request, computed_tokens: int) -> int:
        left = max(request.num_tokens + request.num_output_placeholders - computed_tokens, 1)
        next_tokens = min(left + self._draft_tokens, self._step_tokens)
        num_tokens = min(computed_tokens + next_tokens + self._lookahead_tokens, self._max_model_len)
        wanted: int = self._manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=num_tokens,
            new_computed_blocks=self._manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=computed_tokens,
            num_local_computed_tokens=computed_tokens,
            num_tokens_main_model=num_tokens,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        return wanted

    def _reclaim(self, wanted_blocks: int, hit_ids: set[int] | frozenset[int] = frozenset()) -> int:
        if wanted_blocks <= 0 or not self._table.leased_blocks:
            return 0
        change = self._table.reclaim(wanted_blocks, lambda block_id: self._is_busy(block_id, hit_ids))
        self._apply(change)
        return len(change.freed)

    def _is_busy(self, block_id: int, hit_ids: set[int] | frozenset[int]) -> bool:
        # One reference is the table's.
        return block_id in hit_ids or self._pool.blocks[block_id].ref_cnt > 1

    def _apply(self, change: Change) -> None:
        if change.taken:
            self._pool.touch([self._pool.blocks[block_id] for block_id in change.taken])
        if change.freed:
            self._pool.free_blocks([self._pool.blocks[block_id] for block_id in change.freed])

    def _forget(self, change: Change) -> None:
        """Give blocks back whose session was released: nobody will ask for them again, so they are evicted first."""
        blocks = self._pool.blocks
        self._pool.evict_blocks({block_id for block_id in change.freed if blocks[block_id].ref_cnt == 1})
        self._apply(change)


class NothingToTransfer(KVConnectorMetadata):  # type: ignore[misc]
    """What the workers are told in each step: nothing."""


class NoTransfer(KVConnectorBase_V1, SupportsHMA):  # type: ignore[misc]
    """A connector that moves no KV."""

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Nothing is loaded."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing was loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Nothing is saved."""

    def wait_for_save(self) -> None:
        """Nothing was saved."""

    def get_num_new_matched_tokens(
        self,
        request: Request,  # noqa: ARG002
        num_computed_tokens: int,  # noqa: ARG002
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """No load waits for these blocks."""

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:  # noqa: ARG002
        return NothingToTransfer()

    def request_finished_all_groups(
        self,
        request: Request,  # noqa: ARG002
        block_ids: tuple[list[int], ...],  # noqa: ARG002
    ) -> tuple[bool, dict[str, Any] | None]:
        return False, None


class StateConnector(LeaseRetention, NoTransfer):
    """What vLLM loads: leases on the device, and nothing moved off it."""


def install() -> None:
    """Add to EngineCore what the front-end process asks it. Safe to call more than once in a process.

    Raises:
        UnsupportedEngine: when this is another version of vLLM.
    """
    check_version(vllm.__version__)
    setattr(EngineCore, _REPORT_METHOD, _report)
    setattr(EngineCore, _TICK_METHOD, _tick)
    setattr(EngineCore, _TURNS_METHOD, _turns_ended)


def check_version(version: str) -> None:
    """Refuse any version of vLLM but ours; a local build label (`+cpu`) may follow it.

    Raises:
        UnsupportedEngine: names both versions.
    """
    if version.partition("+")[0] != VLLM_VERSION:
        raise UnsupportedEngine(
            f"Holdfast's leases are written for vLLM {VLLM_VERSION}, this is {version}. "
            f"Install the engine's environment from its lock file."
        )


async def lease_report(engine_client: Any, release: Sequence[str] = ()) -> LeaseReport:
    """Ask the engine behind vLLM's front end: expire, release, report."""
    return LeaseReport.from_wire(await engine_client.engine_core.call_utility_async(_REPORT_METHOD, list(release)))


async def lease_tick(engine_client: Any) -> float | None:
    """Ask the engine behind vLLM's front end to expire what is due; seconds to the next deadline."""
    due_in_s: float | None = await engine_client.engine_core.call_utility_async(_TICK_METHOD)
    return due_in_s


async def turns_ended(engine_client: Any, ends: Sequence[TurnEnd]) -> list[TurnAccount | None]:
    """Tell the engine behind vLLM's front end how turns ended; the account of each."""
    told = [end.to_wire() for end in ends]
    accounts = await engine_client.engine_core.call_utility_async(_TURNS_METHOD, told)
    return [None if account is None else TurnAccount.from_wire(account) for account in accounts]


def connector_of(engine_core: EngineCore) -> LeaseRetention:
    """The connector of an engine.

    Raises:
        UnsupportedEngine: when the engine was started without it.
    """
    connector = engine_core.scheduler.get_kv_connector()
    if not isinstance(connector, LeaseRetention):
        raise UnsupportedEngine("this engine was started without Holdfast's connector: see connector_config")
    return connector


def _report(self: EngineCore, release: list) -> dict:  # type: ignore[type-arg]
    return connector_of(self).report(release).to_wire()


def _tick(self: EngineCore) -> float | None:
    return connector_of(self).tick()


def _turns_ended(self: EngineCore, ends: list) -> list:  # type: ignore[type-arg]
    accounts = connector_of(self).turns_ended([TurnEnd.from_wire(end) for end in ends])
    return [None if account is None else account.to_wire() for account in accounts]


def _release_leases_before_reset(kv_cache_manager: KVCacheManager, connector: LeaseRetention) -> None:
    """A reset of the prefix cache fails while anything is referenced; leases must not be what stops it."""
    reset_prefix_cache = kv_cache_manager.reset_prefix_cache

    def reset() -> bool:
        connector.release_all()
        done: bool = reset_prefix_cache()
        return done

    kv_cache_manager.reset_prefix_cache = reset
