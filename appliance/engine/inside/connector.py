"""Retention on vLLM's block pool: leases. The one module that touches vLLM's internals.

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

import contextlib
import functools
import itertools
import math
import mmap
import os
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LookupResult,
    Medium,
    OffloadingWorker,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    TransferResult,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec
from vllm.v1.metrics.cache_hit_source import CacheHitSource
from vllm.v1.request import Request, RequestStatus

from appliance.engine.inside.accounts import Accounts
from appliance.engine.inside.canary import MOST_TOKENS, Canary, Place, Sample
from appliance.engine.inside.chunks import ChunkOrder, Owner, Worth
from appliance.engine.inside.disk.channel import KeyAsker
from appliance.engine.inside.disk.files import Owner as DiskOwner
from appliance.engine.inside.disk.fingerprint import fingerprint
from appliance.engine.inside.disk.store import DiskStatus, DiskStore, Piece, Presence
from appliance.engine.inside.leases import Change, LeasedBlock, LeaseTable
from appliance.engine.inside.lessons import Lessons
from appliance.engine.inside.pictures import Totals, disk_picture, picture_of
from appliance.engine.inside.range_salt import BlockSalt, salt_of_block, shared_prefix
from appliance.engine.inside.retention import RetentionPolicy
from appliance.engine.picture import CanaryPicture, KvPicture, TierPicture
from appliance.engine.protocol import (
    LEASE_FIELD,
    LEASE_FRACTION_FIELD,
    LESSONS_FIELD,
    VLLM_VERSION,
    Lease,
    LeaseReport,
    MalformedMessage,
    TurnAccount,
    TurnEnd,
    lease_params,
)
from appliance.engine.tier_keys import inherited_socket

logger = init_logger(f"vllm.{__name__}")

_REPORT_METHOD = "holdfast_lease_report"
_TICK_METHOD = "holdfast_lease_tick"
_KV_METHOD = "holdfast_kv_picture"
_TURNS_METHOD = "holdfast_turns_ended"
_RANGE_SALTED = "holdfast_range_salted"
_DRAWS_WHAT_COUNTS = "holdfast_draws_what_counts"

_CANARY = ("holdfast", "canary")  # a tenant's label is longer


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
        if role == KVConnectorRole.WORKER:
            _draw_only_for_tokens_that_count()
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
        expired_before = self._table.expired_total
        self._apply(self._table.expire())
        if self._table.expired_total > expired_before:
            logger.debug("Leases ended: %d.", self._table.expired_total - expired_before)
        self._lessons.write_if_due(self.clock())
        return self._table.next_expiry_in_s()

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
        _release_leases_before_reset(kv_cache_manager, self)

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
        free_blocks = self._pool.get_num_free_blocks()
        most_each = (1 + self._step_tokens // self._block_size) * self._manager.num_kv_cache_groups
        to_come_in = any(
            request.num_computed_tokens and request.status != RequestStatus.RUNNING
            for request in self._requests.values()
        )
        if not to_come_in and free_blocks >= len(self._requests) * most_each + self._manager.watermark_blocks:
            return
        wanted = 0
        for request in self._requests.values():
            # This step's tokens are added to num_computed_tokens after this hook.
            computed = request.num_computed_tokens + scheduled_tokens.get(request.request_id, 0)
            if not computed:
                continue
            if request.status == RequestStatus.RUNNING:
                wanted += self._wanted_to_continue(request, computed)
            else:
                # Its KV is loaded or loads: it is let in without `get_num_new_matched_tokens` being asked again.
                wanted += self._wanted_to_come_in(request, computed)
        self._reclaim(wanted - free_blocks)

    def _wanted_to_come_in(self, request: Request, computed_tokens: int) -> int:
        wanted = self._wanted_to_continue(request, computed_tokens)
        if self._whole_prompt_must_fit:
            wanted = max(wanted, self._wanted_in_all(request, computed_tokens))
        return wanted + self._watermark()

    def _wanted_in_all(self, request: Request, computed_tokens: int) -> int:
        left = max(request.num_tokens - computed_tokens, 0)
        return self._wanted(request, computed_tokens, left + self._draft_tokens)

    def _wanted_to_continue(self, request: Request, computed_tokens: int) -> int:
        left = max(request.num_tokens + request.num_output_placeholders - computed_tokens, 1)
        return self._wanted(request, computed_tokens, min(left + self._draft_tokens, self._step_tokens))

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


class SessionChunks(CachePolicy):  # type: ignore[misc]
    """Which chunk leaves DRAM, as vLLM's manager asks it; `ChunkOrder` decides."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[bytes, ChunkStatus] = {}
        self.storing: ReqContext | None = None  # for whom the manager inserts: it does not say
        self.order: ChunkOrder

    def get(self, key: bytes) -> ChunkStatus | None:
        return self._chunks.get(key)

    def insert(self, key: bytes, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        context = self.storing
        end_token = 0 if context is None else context.get_offload_key_position(key) or 0
        self.order.add(key, end_token, None if context is None else _owner(context))
        if chunk.ref_cnt == 0:
            self.order.freed(key)

    def remove(self, key: bytes) -> None:
        del self._chunks[key]
        self.order.discard(key)

    def touch(self, keys: Iterable[bytes], req_context: ReqContext) -> None:
        """When a chunk was used says nothing that its session's worth does not."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[bytes]],
        insertion_only_keys: set[bytes],  # noqa: ARG002
        reused_keys: set[bytes],  # noqa: ARG002
        req_context: ReqContext,
    ) -> None:
        owner = _owner(req_context)
        if owner is None or req_context.get_state(_Released) is not None:
            return
        keys = itertools.chain(self.order.keys_of(owner), itertools.chain.from_iterable(key_groups))
        at = ((key, req_context.get_offload_key_position(key)) for key in keys)
        self.order.used(owner, {key: end_token for key, end_token in at if end_token is not None})

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, ChunkStatus]] | None:
        picked = self.order.pick(n, protected)
        return None if picked is None else [(key, self._chunks.pop(key)) for key in picked]

    def clear(self) -> None:
        self._chunks.clear()
        self.order.clear()

    def mark_evictable(self, key: bytes) -> None:
        self.order.freed(key)

    def mark_non_evictable(self, key: bytes) -> None:
        self.order.held(key)


@dataclass(frozen=True)
class _Released:
    """Marks a request whose session was released while it was known: nothing more of it is stored."""


class TieredManager(TieringOffloadingManager):  # type: ignore[misc]
    """vLLM's tiering manager, which stores nothing of strict sessions and lets go of released ones."""

    def __init__(self, primary_tier: CPUPrimaryTierOffloadingManager, secondary_tiers: list[Any]) -> None:
        super().__init__(primary_tier, secondary_tiers)
        self._chunks: SessionChunks = primary_tier._policy
        self._doomed: set[bytes] = set()  # released, and still copied
        self.on_stored: Callable[[ReqContext], None] = lambda _: None
        self.quarantined = False  # nothing is restored any more

    def order_by(self, worth: Worth, clock: Callable[[], float]) -> None:
        """Say what decides the order in which chunks leave. Called once, before anything is stored."""
        self._chunks.order = ChunkOrder(worth, clock)
        for tier in self.secondary_tiers:
            if isinstance(tier, DiskTier):
                tier.order_by(worth, clock)

    def sessions(self) -> tuple[Owner, ...]:
        """Who has something in DRAM."""
        return self._chunks.order.sessions()

    def release(self, sessions: Collection[str]) -> None:
        """Let go of all that the sessions so labelled have in DRAM, and overwrite it; and on the disk, with its key."""
        for tier in self.secondary_tiers:
            if isinstance(tier, DiskTier):
                tier.store.drop_labelled(sessions)
        for state in self._req_state.values():
            owner = _owner(state.req_context)
            if owner is not None and owner[1] in sessions:
                state.req_context.set_state(_Released())
        order = self._chunks.order
        self._doomed.update(order.released([owner for owner in order.sessions() if owner[1] in sessions]))
        self._drop_doomed()

    def take_fault(self, session: Owner) -> bool:
        """Whether a chunk of the session's could not be read from the disk since this was asked last."""
        disks = [tier.store for tier in self.secondary_tiers if isinstance(tier, DiskTier)]
        return any(disk.take_fault(DiskOwner(*session)) for disk in disks)

    def lookup(self, key: bytes, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> LookupResult:
        if self.quarantined:
            return LookupResult.MISS
        self._chunks.storing = req_context
        found = super().lookup(key, req_context, exclude_tier_idx=exclude_tier_idx)
        if found is LookupResult.HIT_PENDING and not self._disk_answers():
            return LookupResult.MISS  # its room stays taken until the disk lets go of it
        if found in (LookupResult.HIT, LookupResult.HIT_PENDING):
            self._chunks.order.await_for(req_context.req_id, key)
        return found

    def admitted(self, request_id: str) -> None:
        """A request has what it waited for, or goes without."""
        self._chunks.order.waits_no_more(request_id)

    def on_request_finished(self, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> None:
        self._chunks.order.waits_no_more(req_context.req_id)
        super().on_request_finished(req_context, exclude_tier_idx=exclude_tier_idx)

    def disk(self) -> DiskStatus | None:
        """How the tier on disk stands; None: there is none."""
        return next((tier.store.status() for tier in self.secondary_tiers if isinstance(tier, DiskTier)), None)

    def pictures(self) -> Iterator[TierPicture]:
        """The tiers behind the device."""
        primary, disk = self.primary_tier, self.disk()
        restoring = "quarantined" if self.quarantined else "ok"
        chunk_bytes = primary._mmap_region.base_tensor.nbytes // primary._num_chunks
        used = primary._num_chunks - primary._get_num_free_chunks()
        yield TierPicture("dram", restoring, chunk_bytes, primary._num_chunks, used, 0)
        if disk is not None:
            state = restoring if disk.on and disk.answers and not disk.paused else "failed"
            yield TierPicture("disk", state, disk.chunk_bytes, disk.capacity_bytes // disk.chunk_bytes, disk.chunks, 0)

    def row(self, key: bytes) -> torch.Tensor | None:
        """The bytes of a chunk in DRAM that is there whole, as int8."""
        chunk, primary = self._chunks.get(key), self.primary_tier
        if chunk is None or not chunk.is_ready:
            return None
        return primary._mmap_region.base_tensor.view(primary._num_chunks, -1)[chunk.chunk_id]

    def prepare_store(self, keys: Collection[bytes], req_context: ReqContext) -> PrepareStoreOutput | None:
        if not _is_stored(req_context):
            return PrepareStoreOutput(keys_to_store=[], store_spec=CPULoadStoreSpec([]), evicted_keys=[])
        self._chunks.storing = req_context
        return super().prepare_store(keys, req_context)

    def complete_store(self, keys: Collection[bytes], req_context: ReqContext, success: bool = True) -> None:
        if req_context.get_state(_Released) is not None:
            self._doomed.update(key for key in keys if not self._chunks.order.is_owned(key))
        super().complete_store(keys, req_context, success)
        self._drop_doomed()
        self.on_stored(req_context)

    def complete_load(self, keys: Collection[bytes], req_context: ReqContext) -> None:
        super().complete_load(keys, req_context)
        self._drop_doomed()

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        super().on_schedule_end(context)
        self._drop_doomed()

    def reset_cache(self) -> None:
        super().reset_cache()
        self._doomed.clear()

    def _disk_answers(self) -> bool:
        return all(tier.store.answers() for tier in self.secondary_tiers if isinstance(tier, DiskTier))

    def _drop_doomed(self) -> None:
        if not self._doomed:
            return
        primary, order = self.primary_tier, self._chunks.order
        rows = primary._mmap_region.base_tensor.view(primary._num_chunks, -1)
        for key in [key for key in self._doomed if order.is_free(key) or key not in order]:
            self._doomed.discard(key)
            chunk = self._chunks.get(key)
            if chunk is None or order.is_owned(key):
                continue
            self._chunks.remove(key)
            primary._num_evictable_cache_chunks -= 1
            primary._free_chunk(chunk)
            rows[chunk.chunk_id].zero_()


class DiskTier(SecondaryTierManager):  # type: ignore[misc]
    """The tier on disk as vLLM asks for it. What is stored and read has a session, whose key encrypts it.

    Args:
        root_dir: where its files are.
        capacity_bytes: the most that they take.
        ttl_s: for how long a session's may be unused.
    """

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        root_dir: str,
        capacity_bytes: int,
        ttl_s: float,
        backpressure_detector: Any = None,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        self._memory = primary_kv_view.cast("B")
        self._worth: Worth | None = None
        self._clock: Callable[[], float] = time.monotonic
        self._asker = KeyAsker(inherited_socket(os.environ))
        self.store = DiskStore(
            Path(root_dir),
            fingerprint=_fingerprint(offloading_spec, self._block_size_bytes),
            chunk_bytes=self._block_size_bytes,
            capacity_bytes=capacity_bytes,
            ttl_s=ttl_s,
            keys=self._asker.keys,
            worth=self._worth_of,
        )
        status = self.store.status()
        if not status.on:
            logger.warning("The KV tier on disk is off: %s.", status.last_error)

    def order_by(self, worth: Worth, clock: Callable[[], float]) -> None:
        """Say what decides which sessions leave first."""
        self._worth, self._clock = worth, clock

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        owner = _owner(req_context)
        if owner is not None:
            self.store.expect(DiskOwner(*owner))  # so that its key is there when it is looked up
            self.store.used([DiskOwner(*owner)])
        return RequestOffloadingContext()

    def lookup(self, key: bytes, req_context: ReqContext) -> LookupResult:
        owner = _owner(req_context)
        found = Presence.ABSENT if owner is None else self.store.find(key, owner[0])
        return _LOOKED_UP[found]

    def submit_store(self, job_metadata: TransferJob) -> None:
        context: ReqContext = job_metadata.req_context
        owner = _owner(context)
        pieces = self._pieces(job_metadata) if owner is not None and _is_stored(context) else []
        self.store.store(job_metadata.job_id, DiskOwner(*(owner or ("", ""))), pieces)

    def submit_load(self, job_metadata: TransferJob) -> None:
        owner = _owner(job_metadata.req_context)
        self.store.load(job_metadata.job_id, owner[0] if owner is not None else "", self._pieces(job_metadata))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        return [
            JobResult(done.job, done.whole, None if done.whole else done.keys, done.seconds, done.moved_bytes)
            for done in self.store.finished()
        ]

    def drain_jobs(self) -> None:
        self.store.drain()

    def shutdown(self) -> None:
        self.store.close()
        self._asker.close()
        self._memory.release()

    def _pieces(self, job: TransferJob) -> list[Piece]:
        size = self._block_size_bytes
        return [
            Piece(
                key, job.req_context.get_offload_key_position(key) or 0, self._memory[chunk * size : (chunk + 1) * size]
            )
            for key, chunk in zip(job.keys, map(int, job.chunk_ids), strict=True)
        ]

    def _worth_of(self, owner: DiskOwner) -> float:
        if self._worth is None:
            return 0.0
        return self._worth(session=tuple(owner), now=self._clock(), position=0, abandoned=False)


_LOOKED_UP = {
    Presence.HERE: LookupResult.HIT,
    Presence.ABSENT: LookupResult.MISS,
    Presence.ASK_AGAIN: LookupResult.RETRY,
}


class TierSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """vLLM's tiers, on a CPU too. The memory of the DRAM tier has no name once everybody has it open."""

    _manager: Any
    _worker: Any

    def get_manager(self) -> TieredManager:
        if self._manager is None:
            made = super().get_manager()
            self._manager = TieredManager(made.primary_tier, made.secondary_tiers)
            region = made.primary_tier._mmap_region
            _keep_out_of_cores(region)
            # vLLM makes the workers' caches before the scheduler: whoever opens the memory last takes its name away, so
            # that no way of dying leaves it behind.
            with contextlib.suppress(FileNotFoundError):
                Path(region.mmap_path).unlink()
            region._creator = False
        manager: TieredManager = self._manager
        return manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = self.create_worker(kv_caches)
        return self._worker

    def create_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if all(tensor.tensor.device.type != "cpu" for tensor in kv_caches.tensors):
            worker = super().create_worker(kv_caches)
            region = worker._mmap_region
        else:
            region = SharedOffloadRegion(
                engine_id=self._engine_id,
                num_chunks=self.num_chunks,
                rank=0 if self.replicated_layout else self.config.parallel.rank,
                kv_bytes_per_chunk=self.kv_bytes_per_chunk,
                cpu_page_size=self.cpu_page_size_per_worker,
            )
            worker = CopyingWorker(kv_caches, region, self.blocks_per_chunk)
        _keep_out_of_cores(region)
        region._creator = False
        return worker


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]
    """Moves chunks where the device is a CPU: a copy in memory, done when it was asked for."""

    def __init__(self, kv_caches: CanonicalKVCaches, region: SharedOffloadRegion, blocks_per_chunk: int) -> None:
        if blocks_per_chunk != 1:
            raise UnsupportedEngine("on a CPU a chunk is one block: leave block_size out of the connector's options")
        self._region: SharedOffloadRegion | None = region
        self._device = [tensor.tensor for tensor in kv_caches.tensors]
        self._dram = [region.create_next_worker_view(tensor.page_size_bytes) for tensor in kv_caches.tensors]
        self._tensors_of_group = [sorted({ref.tensor_idx for ref in refs}) for refs in kv_caches.group_data_refs]
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: CPULoadStoreSpec) -> bool:
        return self._copy(job_id, self._device, src_spec.block_ids, self._dram, dst_spec.chunk_ids, src_spec)

    def submit_load(self, job_id: int, src_spec: CPULoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        return self._copy(job_id, self._dram, src_spec.chunk_ids, self._device, dst_spec.block_ids, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Every copy is over when it was submitted."""

    def shutdown(self) -> None:
        self._device.clear()
        self._dram.clear()
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _copy(
        self,
        job_id: int,
        sources: list[torch.Tensor],
        source_ids: Any,
        targets: list[torch.Tensor],
        target_ids: Any,
        groups: GPULoadStoreSpec,
    ) -> bool:
        started = time.perf_counter()
        copied_bytes = first = 0
        for tensors, blocks in zip(self._tensors_of_group, groups.group_sizes, strict=True):
            source = torch.from_numpy(source_ids[first : first + blocks].astype("int64"))
            target = torch.from_numpy(target_ids[first : first + blocks].astype("int64"))
            first += blocks
            for tensor in tensors:
                targets[tensor].index_copy_(0, target, sources[tensor].index_select(0, source))
                copied_bytes += blocks * targets[tensor].shape[1]
        self._finished.append(TransferResult(job_id, True, copied_bytes, time.perf_counter() - started))
        return True


class TieredRetention(LeaseRetention):
    """Leases before a connector with tiers: the two go by one policy, and end together."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._canary = Canary(self.clock)
        self._dtype = kv_cache_dtype_str_to_dtype(vllm_config.cache_config.cache_dtype, vllm_config.model_config)
        groups = enumerate(kv_cache_config.kv_cache_groups)
        self._comparable = frozenset(number for number, group in groups if self._fills_its_chunks(group))
        if role == KVConnectorRole.SCHEDULER:
            self._tiers.order_by(self.policy.value, self.clock)
            self._tiers.on_stored = self._compare

    @property
    def _tiers(self) -> TieredManager:
        manager: TieredManager = self.connector_scheduler.manager  # type: ignore[attr-defined]
        return manager

    def report(self, release: Iterable[str] = ()) -> LeaseReport:
        labels = frozenset(release)
        report = super().report(labels)
        if self._canary.released(labels):
            self._tiers.release(frozenset({_CANARY[1]}))
        if labels:
            for owner in self._tiers.sessions():
                if owner[1] in labels:
                    self.policy.closed(session=owner, now=self.clock())
            self._tiers.release(labels)
        return report

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self._tiers.admitted(request.request_id)

    def tick(self) -> float | None:
        if self._canary.expire():
            self._tiers.release(frozenset({_CANARY[1]}))
        due = [due_in_s for due_in_s in (super().tick(), self._canary.next_expiry_in_s()) if due_in_s is not None]
        return min(due, default=None)

    def tiers(self, leased_blocks: int) -> list[TierPicture]:
        return [*super().tiers(leased_blocks), *self._tiers.pictures()]

    def picture(self, most_sessions: int) -> KvPicture:
        canary, disk = self._canary, self._tiers.disk()
        return replace(
            super().picture(most_sessions),
            disk=None if disk is None else disk_picture(disk),
            canary=CanaryPicture(
                canary.compared_total,
                canary.worst if math.isfinite(canary.worst) else None,
                self._tiers.quarantined,
            ),
        )

    def _asked_lease(self, request: Request) -> Lease | None:
        lease = super()._asked_lease(request)
        return None if lease is not None and _key(lease) == _CANARY else lease

    def _tier_tokens(self, request: Request, external_tokens: int) -> tuple[int, int]:
        if not external_tokens:
            return 0, 0
        sources: dict[CacheHitSource, int] = self.get_external_cache_hit_sources(  # type: ignore[attr-defined]
            request, external_tokens
        )
        if self._canary.is_due():
            self._note(request)
        dram_tokens = sources.get(CacheHitSource.HOST, 0)
        return dram_tokens, sum(sources.values()) - dram_tokens

    def _why_missed(self, lease: Lease, reason: str) -> str:
        faulty = self._tiers.take_fault(_key(lease))
        return "tier_fault" if faulty or self._tiers.quarantined else reason

    # Restored equals recomputed.

    def canary(self) -> Request | None:
        """A request that computes a restored prompt's beginning again; None: there is none to compute now.

        Its answer goes nowhere: the front end knows no such request. Its KV is stored like that of any session,
        compared when it is in DRAM, and released.
        """
        if any(not request.is_finished() for request in self._requests.values()):
            return None  # whoever asked for something comes first
        sample = self._canary.take()
        if sample is None:
            return None
        request = Request(
            request_id=f"canary-{secrets.token_hex(8)}",
            prompt_token_ids=list(sample.tokens),
            sampling_params=SamplingParams(temperature=0, max_tokens=1),
            pooling_params=None,
            cache_salt=secrets.token_hex(32),
            block_hasher=self._block_hasher,
        )
        request.kv_transfer_params = lease_params(Lease(_CANARY[1], _CANARY[0], 0.0))
        return request

    def _note(self, request: Request) -> None:
        """Keep what comes back for the beginning of a prompt of plain tokens, as it comes back."""
        if request.lora_request is not None or request.mm_features or request.prompt_token_ids is None:
            return
        lease = self._leases_asked[request.request_id]
        status = self.connector_scheduler._req_status[request.request_id]  # type: ignore[attr-defined]
        if status.req_context.get_state(_Released) is not None:
            return
        most = min(MOST_TOKENS, len(request.prompt_token_ids) // self._block_size * self._block_size)
        restored = [
            (Place(group, end_token), row.numpy().tobytes())
            for _, end_token, key in status.load_key_ranges
            if (group := get_offload_group_idx(key)) in self._comparable
            and end_token <= most
            and (row := self._tiers.row(key)) is not None
        ]
        if restored:
            self._block_hasher = request._block_hasher
            tokens = request.prompt_token_ids[: max(place.end_token for place, _ in restored)]
            self._canary.note(Sample(_key(lease), tuple(tokens), tuple(restored)))

    def _fills_its_chunks(self, group: Any) -> bool:
        """Whether a group's chunks are the KV of its tokens, of one type, and nothing beside.

        What a sliding window or a recurrent state leaves for a token depends on the way to it; and where the groups
        differ in size, the end of a smaller one's chunk is what the memory held before.
        """
        spec = group.kv_cache_spec
        return (
            type(spec) in (FullAttentionSpec, MLAAttentionSpec)
            and spec.dtype == self._dtype
            and spec.page_size_padded is None
            and spec.page_size_bytes * len(group.layer_names) == self._block_bytes
        )

    def _compare(self, context: ReqContext) -> None:
        """The canary's KV is in DRAM: compare it."""
        if _owner(context) != _CANARY:
            return
        keys = {
            Place(get_offload_group_idx(key), context.get_offload_key_position(key) or 0): key
            for key in self._tiers._chunks.order.keys_of(_CANARY)
        }
        places = self._canary.places()
        if any((key := keys.get(place)) is None or self._tiers.row(key) is None for place in places):
            return  # it is stored step by step

        def error_of(place: Place, restored: bytes) -> float | None:
            key = keys.get(place)
            computed = None if key is None else self._tiers.row(key)
            if computed is None:
                return None
            expected = computed.view(self._dtype).float()
            came_back = torch.frombuffer(bytearray(restored), dtype=torch.int8).view(self._dtype).float()
            return float((came_back - expected).norm() / expected.norm())

        agreed = self._canary.judge(error_of)
        self._tiers.release(frozenset({_CANARY[1]}))
        if not agreed and not self._tiers.quarantined:
            self._tiers.quarantined = True
            logger.error(
                "KV that came back from a tier is not what the model computes (error %.3g): nothing is restored any "
                "more. Sessions go on and are computed again. Start the engine again when the cause is found.",
                self._canary.worst,
            )


class TieredStateConnector(TieredRetention, OffloadingConnector):  # type: ignore[misc]
    """What vLLM loads with tiers: leases on the device, and vLLM's own connector behind them."""


def _key(lease: Lease) -> Owner:
    return lease.tenant, lease.session


def _lease_of(context: ReqContext) -> Lease | None:
    """The lease that a request carries; None where there is none that can be read."""
    params = context.kv_transfer_params or {}
    try:
        return Lease.from_wire(params[LEASE_FIELD])
    except (KeyError, MalformedMessage):
        return None


def _owner(context: ReqContext) -> Owner | None:
    lease = _lease_of(context)
    return None if lease is None else _key(lease)


def _is_stored(context: ReqContext) -> bool:
    """Whether a request's KV may leave the device: it has a session, which is neither strict nor released."""
    lease = _lease_of(context)
    return lease is not None and not lease.strict and context.get_state(_Released) is None


def _fingerprint(spec: Any, chunk_bytes: int) -> bytes:
    """What the KV of this engine is made by, and how it lies in a chunk."""
    made_with = FileMapper.from_offloading_spec("", spec, spec.blocks_per_chunk).get_run_config()
    return fingerprint(
        Path(spec.config.model.name), {**made_with, "vllm": vllm.__version__, "chunk_bytes": chunk_bytes}
    )


def _keep_out_of_cores(region: SharedOffloadRegion) -> None:
    if region.mmap_obj is not None:
        region.mmap_obj.madvise(mmap.MADV_DONTDUMP)


def install() -> None:
    """Add to EngineCore what the front-end process asks it, and salt blocks by range. Safe to call more than once.

    Raises:
        UnsupportedEngine: when this is another version of vLLM.
    """
    check_version(vllm.__version__)
    setattr(EngineCore, _REPORT_METHOD, _report)
    setattr(EngineCore, _TICK_METHOD, _tick)
    setattr(EngineCore, _KV_METHOD, _kv)
    setattr(EngineCore, _TURNS_METHOD, _turns_ended)
    _salt_by_range()


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


async def kv_picture(engine_client: Any, most_sessions: int) -> dict[str, object]:
    """Ask the engine behind vLLM's front end to sum up what it keeps: a `KvPicture`, as JSON has it."""
    said: dict[str, object] = await engine_client.engine_core.call_utility_async(_KV_METHOD, most_sessions)
    return said


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


def _kv(self: EngineCore, most_sessions: int) -> dict:  # type: ignore[type-arg]
    return connector_of(self).picture(most_sessions).to_wire()


def _tick(self: EngineCore) -> float | None:
    connector = connector_of(self)
    due_in_s = connector.tick()
    canary = connector.canary()
    if canary is not None:
        self.scheduler.add_request(canary)
    return due_in_s


def _turns_ended(self: EngineCore, ends: list) -> list:  # type: ignore[type-arg]
    accounts = connector_of(self).turns_ended([TurnEnd.from_wire(end) for end in ends])
    return [None if account is None else account.to_wire() for account in accounts]


def _salt_by_range() -> None:
    """Have the hashes of blocks take the salts that `range_salt` says. Without this, all of a prompt is its session's.

    vLLM asks one function for what else than tokens goes into a block's hash, by its name in two modules.
    """
    unsalted = kv_cache_utils.generate_block_hash_extra_keys
    if hasattr(unsalted, _RANGE_SALTED):
        return

    def extra_keys(
        request: Request, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        salt = salt_of_block(_shared_prefix_of(request), start_token_idx, end_token_idx)
        own = request.cache_salt
        if salt is BlockSalt.SHARED:
            request.cache_salt = _shared_prefix_of(request).salt
        try:
            keys, next_mm_idx = unsalted(request, start_token_idx, end_token_idx, start_mm_idx)
        finally:
            request.cache_salt = own
        if salt is BlockSalt.OWN:
            keys = (*(keys or ()), ("cache_salt", own))
        return keys, next_mm_idx

    setattr(extra_keys, _RANGE_SALTED, True)
    for module in (kv_cache_utils, block_pool):
        module.generate_block_hash_extra_keys = extra_keys


def _shared_prefix_of(request: Request) -> Any:
    """Found out once for each request, when it is made: its first blocks are hashed then."""
    try:
        return request.holdfast_shared_prefix
    except AttributeError:
        found = shared_prefix(request.kv_transfer_params, request.cache_salt, request.prompt_token_ids)
        request.holdfast_shared_prefix = found
        return found


def _draw_only_for_tokens_that_count() -> None:
    """On a CPU, have a request's seed drawn from only where its token is kept. Safe to call more than once.

    vLLM samples for every request of a step, for one whose prompt goes on in the next step too. It discards that token,
    and then puts the request's generator back by its offset, which a CPU's generator does not have: the engine ends.
    So such a request's generator is kept from the step.
    """
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # which the front end's process never imports

    if hasattr(CPUModelRunner, _DRAWS_WHAT_COUNTS):
        return

    def with_those_that_count(part: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(part)
        def of_a_step(self: CPUModelRunner, *arguments: Any, **named: Any) -> Any:
            generators = self.input_batch.generators
            discarded = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
            kept_back = {index: generators.pop(index) for index in discarded if index in generators}
            try:
                return part(self, *arguments, **named)
            finally:
                generators.update(kept_back)

        return of_a_step

    CPUModelRunner._sample = with_those_that_count(CPUModelRunner._sample)
    CPUModelRunner._bookkeeping_sync = with_those_that_count(CPUModelRunner._bookkeeping_sync)
    setattr(CPUModelRunner, _DRAWS_WHAT_COUNTS, True)


def _release_leases_before_reset(kv_cache_manager: KVCacheManager, connector: LeaseRetention) -> None:
    """A reset of the prefix cache fails while anything is referenced; leases must not be what stops it."""
    reset_prefix_cache = kv_cache_manager.reset_prefix_cache

    def reset() -> bool:
        connector.release_all()
        done: bool = reset_prefix_cache()
        return done

    kv_cache_manager.reset_prefix_cache = reset
