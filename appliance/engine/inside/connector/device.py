"""Leases on the device: a connector's hooks hold references on the blocks of sessions whose next turn is due.

Rules:

- A reference is taken or given back only as `LeaseTable` says, and at once.
- A request that could run without leases runs: it finds the room at its admission, and what the running requests will
  need in the next step is kept free at the end of each step. If that was too little, leases yield before a running
  request is preempted. Nothing yields to a request that would not fit even then.
- No request fails on account of its lease: one that is malformed is counted, named as such in the log without its
  content, and ignored.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

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
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.request import Request, RequestStatus

from appliance.engine.inside.accounts import Accounts
from appliance.engine.inside.connector.amendments import draw_only_for_tokens_that_count, release_leases_before_reset
from appliance.engine.inside.leases import Change, LeasedBlock, LeaseTable
from appliance.engine.inside.lessons import Lessons
from appliance.engine.inside.pictures import Totals, picture_of
from appliance.engine.inside.retention import RetentionPolicy
from appliance.engine.picture import KvPicture, TierPicture
from appliance.engine.protocol import (
    LEASE_FIELD,
    LEASE_FRACTION_FIELD,
    LESSONS_FIELD,
    Lease,
    LeaseReport,
    MalformedMessage,
    TurnAccount,
    TurnEnd,
)

logger = init_logger(f"vllm.{__name__}")


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
        if role == KVConnectorRole.WORKER:
            draw_only_for_tokens_that_count()
        groups = kv_cache_config.kv_cache_groups
        self._block_bytes = max(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)
        self._ignored_total = 0
        self._requests: dict[str, Request] = {}
        self._leases_asked: dict[str, Lease] = {}
        self.policy = RetentionPolicy()
        lessons = extra.get(LESSONS_FIELD)
        # A connector is made for the scheduler and for each worker: only the scheduler's learns.
        path = Path(lessons) if lessons and role == KVConnectorRole.SCHEDULER else None
        self._lessons = Lessons(path, self.policy, self.clock())
        self._accounts = Accounts()
        self._hit_tokens: dict[str, int] = {}  # of requests that are about to be admitted
        self._step = 0
        self._looks_due: dict[str, int] = {}  # by request that was admitted: the step at which it may want a block next
        self._table: LeaseTable
        self._pool: BlockPool
        self._manager: KVCacheManager

    # What EngineCore is asked, between two steps.

    def report(self, release: Iterable[str] = ()) -> LeaseReport:
        """Expire what is due, release the sessions so labelled, and say how things stand."""
        self.tick()
        self._apply(self._table.release(release))
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

    def picture(self, most_sessions: int) -> KvPicture:
        """Expire what is due, and sum up what is kept."""
        self.tick()
        table, kept = self._table, self._table.kept()
        return picture_of(
            kept,
            table.largest(most_sessions),
            block_size=self._block_size,
            tiers=self.tiers(min(kept.blocks_with_rank, table.leased_blocks)),  # what two sessions share counts twice
            totals=Totals(table.reclaimed_blocks_total, table.expired_total, self._ignored_total),
        )

    def tiers(self, leased_blocks: int) -> list[TierPicture]:
        """The tiers that this engine has, the device first; `leased_blocks` of its blocks have a lease that runs."""
        capacity = self._pool.num_gpu_blocks - 1
        used = capacity - self._pool.get_num_free_blocks()
        return [TierPicture("device", "ok", self._block_bytes, capacity, used, leased_blocks)]

    def tick(self) -> float | None:
        """Expire what is due; seconds to the next deadline, or `None` without leases."""
        due_in_s = self._table.next_expiry_in_s()
        if due_in_s is not None and due_in_s <= 0:
            expired_before = self._table.expired_total
            self._apply(self._table.expire())
            logger.debug("Leases ended: %d.", self._table.expired_total - expired_before)
            due_in_s = self._table.next_expiry_in_s()
        self._lessons.write_if_due(self.clock())
        return due_in_s

    def turns_ended(self, ends: Iterable[TurnEnd]) -> list[TurnAccount | None]:
        """Hear how turns ended; the account of each."""
        ends = list(ends)
        for end in ends:
            self._table.turn_ended(end)
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
        # Not so for a recurrent state, say: then vLLM is asked in each step.
        self._grows_by_whole_blocks = all(
            type(manager).get_num_blocks_to_allocate is SingleTypeKVCacheManager.get_num_blocks_to_allocate
            for manager in kv_cache_manager.coordinator.single_type_managers
        )
        pool_blocks = self._pool.num_gpu_blocks - 1
        bound = int(self._lease_fraction * pool_blocks)
        blocks = self._pool.blocks
        self._table = LeaseTable(
            bound,
            self.clock,
            lambda block_id: blocks[block_id].block_hash,
            self.policy,
            pool_blocks=pool_blocks,
        )
        release_leases_before_reset(kv_cache_manager, self.release_all)

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)  # type: ignore[misc]
        self.tick()
        self._requests[request.request_id] = request
        lease = self._asked_lease(request)
        if lease is not None:
            self._leases_asked[request.request_id] = lease
            self._table.arrived(lease)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        matched: tuple[int | None, bool] = super().get_num_new_matched_tokens(  # type: ignore[misc]
            request, num_computed_tokens
        )
        self._hit_tokens[request.request_id] = num_computed_tokens
        if matched[0] is not None and self._table.leased_blocks:
            self._make_room_to_admit(request, matched[0], loads_later=matched[1])
        return matched

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)  # type: ignore[misc]
        self._looks_due[request.request_id] = 0
        hit_tokens = self._hit_tokens.pop(request.request_id, None)
        lease = self._leases_asked.get(request.request_id)
        if lease is not None and hit_tokens is not None:
            found = hit_tokens + num_external_tokens
            whole = request.num_tokens - 1 - found < self._block_size  # one token at least is computed
            change, reason = self._table.admitted(lease, hit_tokens, whole)
            self._apply(change)
            tier_tokens = self._tier_tokens(request, num_external_tokens)
            reason = self._why_missed(lease, reason)
            self._accounts.admitted(lease, hit_tokens, *tier_tokens, "" if whole else reason)

    def has_pending_block_frees(self) -> bool:
        # Called when a running request found no block, before it or another one is preempted.
        running = [request for request in self._requests.values() if request.status == RequestStatus.RUNNING]
        wanted = sum(self._wanted_to_continue(request, request.num_computed_tokens) for request in running)
        freed = self._reclaim(max(wanted - self._pool.get_num_free_blocks(), 1))
        pending: bool = super().has_pending_block_frees()  # type: ignore[misc]
        return freed > 0 or pending

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._table.is_due():  # the rest of a tick can wait for the front end's
            self.tick()
        self._step += 1
        if self._table.leased_blocks:
            self._keep_room_for_next_step(scheduler_output.num_scheduled_tokens)
        return super().build_connector_meta(scheduler_output)  # type: ignore[misc]

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._requests.pop(request.request_id, None)
        self._hit_tokens.pop(request.request_id, None)
        self._looks_due.pop(request.request_id, None)
        lease = self._leases_asked.pop(request.request_id, None)
        if lease is not None:
            blocks = list(self._cached_blocks(request, block_ids))
            change = self._table.finished(lease, blocks, request.num_output_tokens)
            self._apply(change, own={block.block_id for block in blocks})
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

    def shutdown(self) -> None:
        self._lessons.write()
        super().shutdown()  # type: ignore[misc]

    def release_all(self) -> None:
        """End every lease."""
        self._apply(self._table.release_all())

    def _why_missed(self, lease: Lease, reason: str) -> str:  # noqa: ARG002
        """Why a session's blocks were not all there, given why they left the device."""
        return reason

    def canary(self) -> Request | None:
        """A request of the engine's own, to be run when nobody else's is; None: there is none."""
        return None

    # How it is done.

    def _tier_tokens(self, request: Request, external_tokens: int) -> tuple[int, int]:  # noqa: ARG002
        """How many of a request's tokens come from DRAM and from the disk."""
        return 0, 0

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

    def _make_room_to_admit(self, request: Request, external_tokens: int, *, loads_later: bool) -> None:
        """Reclaim what `allocate_slots` will find missing for a waiting request, if that lets it in."""
        free_blocks = self._pool.get_num_free_blocks()
        reserved = self._reserved_for_loads(request) if loads_later else 0
        if free_blocks >= self._most_to_admit(request) + reserved:
            return
        hits, local_tokens, _ = self._manager.get_computed_blocks(request)
        computed = local_tokens + external_tokens
        first_chunk = (
            min(request.num_tokens - computed, self._step_tokens) + self._draft_tokens + self._lookahead_tokens
        )
        if loads_later:  # nothing is computed before the load is over
            first_chunk = 0
        needs = [(min(computed + first_chunk, self._max_model_len), False)]
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
        required += self._watermark() + reserved
        if required <= free_blocks:
            return
        hit_ids = {block.block_id for group in hits.blocks for block in group}
        if self._table.can_yield(required - free_blocks, lambda block_id: self._is_busy(block_id, hit_ids)):
            lease = self._leases_asked.get(request.request_id)
            self._reclaim(required - free_blocks, hit_ids, "" if lease is None else lease.tenant)

    def _watermark(self) -> int:
        """What vLLM leaves free when it lets a waiting request in beside running ones."""
        running = any(request.status == RequestStatus.RUNNING for request in self._requests.values())
        return int(self._manager.watermark_blocks) if running else 0

    def _reserved_for_loads(self, loading: Request) -> int:
        """At least what vLLM keeps from an asynchronous load: what the prefills under way still want, and one step."""
        prefills = [
            request
            for request in self._requests.values()
            if request is not loading
            and self._holds_blocks(request)
            and request.num_computed_tokens < request.num_tokens
        ]
        wanted = sum(self._wanted_in_all(request, request.num_computed_tokens) for request in prefills)
        step_tokens = 1 + self._draft_tokens + self._lookahead_tokens
        groups = self._manager.num_kv_cache_groups
        return int(wanted + (step_tokens // self._block_size + 1) * groups)

    def _holds_blocks(self, request: Request) -> bool:
        return request.num_computed_tokens > 0 or request.status in (
            RequestStatus.RUNNING,
            RequestStatus.WAITING_FOR_REMOTE_KVS,
        )

    def _most_to_admit(self, request: Request) -> int:
        """No request takes more blocks than this at its admission; cheap, where looking up its hits is not."""
        most_tokens = request.num_tokens + self._draft_tokens + self._lookahead_tokens
        most_blocks = (most_tokens // self._block_size + 1) * self._manager.num_kv_cache_groups
        return int(most_blocks + self._manager.watermark_blocks)

    def _keep_room_for_next_step(self, scheduled_tokens: dict[str, int]) -> None:
        """Reclaim what the requests that hold blocks will want in the next step beyond what is free."""
        wanted, step = 0, self._step
        # Who was left out of this step has not been given the block that it may have wanted in it.
        everybody_ran = len(scheduled_tokens) == len(self._looks_due)
        for name, due in self._looks_due.items():
            if step < due and everybody_ran:
                continue
            request = self._requests[name]
            # This step's tokens are added to num_computed_tokens after this hook.
            computed = request.num_computed_tokens + scheduled_tokens.get(name, 0)
            if not computed:
                continue  # it was preempted, or its load failed: it is admitted anew
            if request.status != RequestStatus.RUNNING:
                # Its KV is loaded or loads: it is let in without `get_num_new_matched_tokens` being asked again.
                wanted += self._wanted_to_come_in(request, computed)
                continue
            wanted += self._wanted_to_continue(request, computed)
            self._looks_due[name] = step + 1 + self._steps_without_a_block(request, computed)
        if wanted:
            self._reclaim(wanted - self._pool.get_num_free_blocks())

    def _steps_without_a_block(self, request: Request, computed_tokens: int) -> int:
        """For how many steps after the next, in which it is given what it wants, a running request wants no block."""
        next_tokens = self._left_to_continue(request, computed_tokens) + self._draft_tokens
        if not self._grows_by_whole_blocks or next_tokens > self._step_tokens:
            return 0
        room_tokens = -(computed_tokens + next_tokens + self._lookahead_tokens) % self._block_size
        return int(room_tokens // (1 + self._draft_tokens))

    def _wanted_to_come_in(self, request: Request, computed_tokens: int) -> int:
        wanted = self._wanted_to_continue(request, computed_tokens)
        if self._whole_prompt_must_fit:
            wanted = max(wanted, self._wanted_in_all(request, computed_tokens))
        return wanted + self._watermark()

    def _wanted_in_all(self, request: Request, computed_tokens: int) -> int:
        left = max(request.num_tokens - computed_tokens, 0)
        return self._wanted(request, computed_tokens, left + self._draft_tokens)

    def _wanted_to_continue(self, request: Request, computed_tokens: int) -> int:
        left = self._left_to_continue(request, computed_tokens)
        return self._wanted(request, computed_tokens, min(left + self._draft_tokens, self._step_tokens))

    def _left_to_continue(self, request: Request, computed_tokens: int) -> int:
        return max(int(request.num_tokens + request.num_output_placeholders - computed_tokens), 1)

    def _wanted(self, request: Request, computed_tokens: int, next_tokens: int) -> int:
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

    def _reclaim(
        self, wanted_blocks: int, hit_ids: set[int] | frozenset[int] = frozenset(), wanted_by: str = ""
    ) -> int:
        if wanted_blocks <= 0 or not self._table.leased_blocks:
            return 0
        change = self._table.reclaim(wanted_blocks, lambda block_id: self._is_busy(block_id, hit_ids), wanted_by)
        self._apply(change)
        return len(change.freed)

    def _is_busy(self, block_id: int, hit_ids: set[int] | frozenset[int]) -> bool:
        # One reference is the table's.
        return block_id in hit_ids or self._pool.blocks[block_id].ref_cnt > 1

    def _apply(self, change: Change, own: set[int] | frozenset[int] = frozenset()) -> None:
        """Do to the pool what the table decided. `own`: blocks of the request that ends, which still holds them."""
        blocks = self._pool.blocks
        if change.taken:
            self._pool.touch([blocks[block_id] for block_id in change.taken])
        if change.forgotten:
            self._forget(change.forgotten, own.union(change.freed))
        if change.freed:
            self._pool.free_blocks([blocks[block_id] for block_id in change.freed])

    def _forget(self, contents: Iterable[Any], last_held: set[int] | frozenset[int]) -> None:
        """Take contents out of the cache that nobody will ask for again, wherever a copy is; they are evicted first."""
        cached = self._pool.cached_block_hash_to_block
        for content in contents:
            while (block := cached.get_one_block(content)) is not None:
                if block.ref_cnt > (block.block_id in last_held):
                    break  # somebody else uses it
                self._pool.evict_blocks({block.block_id})


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
    """What vLLM loads without tiers: leases on the device, and nothing moved off it."""
