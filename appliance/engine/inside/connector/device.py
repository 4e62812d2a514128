"""Leases on the device: a connector's hooks hold references on the blocks of sessions whose next turn is due.

Rules:

- A reference is taken or given back only as `LeaseTable` says, and at once.
- A request that could run without leases runs: where vLLM finds no room for one, waiting or running, leases yield what
  it lacks and vLLM looks again. Nothing yields to a request that would not fit even then.
- No request fails on account of its lease: one that is malformed is counted, named as such in the log without its
  content, and ignored.
"""

import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from appliance.engine.inside.accounts import Accounts
from appliance.engine.inside.connector.amendments import (
    ask_for_tiles,
    draw_only_for_tokens_that_count,
    make_room_where_there_is_none,
    release_leases_before_reset,
)
from appliance.engine.inside.connector.memory import keep_kv_private
from appliance.engine.inside.leases import Change, LeasedBlock, LeaseTable
from appliance.engine.inside.lessons import Lessons
from appliance.engine.inside.pictures import Holder, Totals, largest, one, picture_of
from appliance.engine.inside.retention import RetentionPolicy
from appliance.engine.picture import KvPicture, TierPicture
from appliance.engine.protocol import (
    AWAITED_S,
    LEASE_FIELD,
    LEASE_FRACTION_FIELD,
    LESSONS_FIELD,
    Lease,
    LeaseReport,
    TurnAccount,
    TurnEnd,
)
from appliance.engine.wire import MalformedMessage

logger = init_logger(f"vllm.{__name__}")

_AHEAD_PART: Final = 100  # at most one in so many of the pool's blocks yields before a request wants it


class LeaseRetention:
    """The hooks that keep leases. Stands before a connector class and passes every call on to it."""

    clock: Callable[[], float] = staticmethod(time.monotonic)

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)  # type: ignore[call-arg]
        extra: dict[str, Any] = vllm_config.kv_transfer_config.kv_connector_extra_config
        self._lease_fraction = float(extra.get(LEASE_FRACTION_FIELD, 0.0))
        if role == KVConnectorRole.WORKER:
            ask_for_tiles()
            draw_only_for_tokens_that_count()
        groups = kv_cache_config.kv_cache_groups
        self._block_bytes = max(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)
        self._ignored_total = 0
        self._life = secrets.token_hex(8)
        self._requests: dict[str, Request] = {}
        self._leases_asked: dict[str, Lease] = {}
        self.policy = RetentionPolicy()
        lessons = extra.get(LESSONS_FIELD)
        # A connector is made for the scheduler and for each worker: only the scheduler's learns.
        path = Path(lessons) if lessons and role == KVConnectorRole.SCHEDULER else None
        self._lessons = Lessons(path, self.policy, self.clock())
        self._accounts = Accounts()
        self._hit_tokens: dict[str, int] = {}  # of requests that are about to be admitted
        self.most_ahead = 0  # blocks, that yield before a request wants them
        self._table: LeaseTable
        self._pool: BlockPool
        self._manager: KVCacheManager

    # What EngineCore is asked, between two steps.

    def report(
        self, release: Iterable[str] = (), awaited: Sequence[tuple[str, str]] = (), *, every: bool = False
    ) -> LeaseReport:
        """Expire what is due, release the sessions so labelled, and say how things stand.

        Args:
            awaited: tenant and session of those whose request waits elsewhere.
            every: report every lease, not only theirs.
        """
        if awaited:
            self._table.awaited(awaited, AWAITED_S)
        self.tick()
        self._apply(self._table.release(release))
        return LeaseReport(
            leases=self._table.states(None if every else awaited),
            leased_blocks=self._table.leased_blocks,
            free_blocks=self._pool.get_num_free_blocks(),
            total_blocks=self._pool.num_gpu_blocks - 1,
            block_size=self._block_size,
            next_expiry_in_s=self._table.next_expiry_in_s(),
            reclaimed_blocks_total=self._table.reclaimed_blocks_total,
            expired_total=self._table.expired_total,
            ignored_total=self._ignored_total,
        )

    def picture(self, most_sessions: int, of: tuple[str, str] | None = None) -> KvPicture:
        """Expire what is due, and sum up what is kept; the session named `of`, or those that keep most."""
        self.tick()
        table, kept = self._table, self._table.kept()
        holders = self.holders()
        tiers = holders.values()
        return picture_of(
            kept,
            largest(tiers, most_sessions, table.worth) if of is None else one(tiers, of, table.worth),
            block_size=self._block_size,
            holders=holders,
            tiers=self.tiers(min(kept.blocks_with_rank, table.leased_blocks)),  # what two sessions share counts twice
            totals=Totals(table.reclaimed_blocks_total, table.expired_total, self._ignored_total, table.counts()),
            engine_life=self._life,
        )

    def demote(self, tier: str, labels: Collection[str]) -> list[str]:  # noqa: ARG002
        """Have those of the sessions so labelled that a tier has all of keep nothing before it; their labels."""
        return []

    def tiers(self, leased_blocks: int) -> list[TierPicture]:
        """The tiers that this engine has, the device first; `leased_blocks` of its blocks have a lease that runs."""
        capacity = self._pool.num_gpu_blocks - 1
        used = capacity - self._pool.get_num_free_blocks()
        sessions = self._table.sessions
        return [TierPicture("device", "ok", self._block_bytes, capacity, used, leased_blocks, sessions)]

    def holders(self) -> dict[str, Holder]:
        """Who says what of sessions is in each tier."""
        return {"device": self._table}

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

    def next_expiry_in_s(self) -> float | None:
        """Seconds to the next deadline of a lease; `None`: there is none."""
        return self._table.next_expiry_in_s()

    def leased_block_ids(self) -> tuple[int, ...]:
        """The blocks that leases hold a reference on."""
        return self._table.leased_block_ids()

    # What the worker calls.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)  # type: ignore[misc]
        keep_kv_private(kv_caches.values(), "device's pool")

    # What the scheduler calls.

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)  # type: ignore[misc]
        self._manager = kv_cache_manager
        self._pool = kv_cache_manager.block_pool
        self._block_size = self._pool.hash_block_size
        pool_blocks = self._pool.num_gpu_blocks - 1
        self.most_ahead = pool_blocks // _AHEAD_PART
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
        make_room_where_there_is_none(kv_cache_manager, self)

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
            reason = self._why_missed(request, reason, found)
            self._accounts.admitted(lease, hit_tokens, *tier_tokens, "" if whole else reason)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        if self._table.is_due():  # the rest of a tick can wait for the front end's
            self.tick()
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

    def _why_missed(self, request: Request, reason: str, found_tokens: int) -> str:  # noqa: ARG002
        """Why a session's blocks behind what was found were not there, given why they left the device."""
        return reason

    def canary(self) -> Request | None:
        """A request of the engine's own, to be run now, after all others; None: there is none."""
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

    def make_room(self, request: Request, num_new_tokens: int, **how: Any) -> bool:
        """Have leases yield what a request lacks, if that is enough; whether they did.

        Args:
            how: what else vLLM's `allocate_slots` was asked for.
        """
        if not self._table.leased_blocks:
            return False
        lacking = self._lacking(request, num_new_tokens, **how)
        hits = how.get("new_computed_blocks")
        hit_ids = frozenset() if hits is None else frozenset(it.block_id for group in hits.blocks for it in group)

        def is_busy(block_id: int) -> bool:
            # One reference is the table's.
            return block_id in hit_ids or self._pool.blocks[block_id].ref_cnt > 1

        if not self._table.can_yield(lacking, is_busy):
            return False
        lease = self._leases_asked.get(request.request_id)
        tenant = "" if lease is None else lease.tenant
        # Each of those that run wants a block every few steps, and to make room takes as long for one as for several.
        ahead = min(len(self._requests), self.most_ahead)
        self._apply(self._table.reclaim(lacking, is_busy, tenant, ahead=ahead))
        return True

    def _lacking(
        self,
        request: Request,
        num_new_tokens: int,
        *,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        num_encoder_tokens: int = 0,
        full_sequence_must_fit: bool = False,
        reserved_blocks: int = 0,
        has_scheduled_reqs: bool = True,
        **_: Any,
    ) -> int:
        """How many blocks more `allocate_slots` wanted to be free, reckoned from what it was asked as it reckons."""
        manager = self._manager
        local_tokens = request.num_computed_tokens + num_new_computed_tokens
        computed_tokens = local_tokens + num_external_computed_tokens
        all_tokens = computed_tokens + num_new_tokens
        hits = list((new_computed_blocks or manager.empty_kv_cache_blocks).blocks)
        for group in manager.retained_hit_group_ids:
            group_block_size = manager.coordinator.single_type_managers[group].block_size
            reused_tokens = num_new_computed_tokens + num_external_computed_tokens
            hits[group] = hits[group][: math.ceil(reused_tokens / group_block_size)]

        def wanted(tokens: int, tokens_of_model: int, *, at_admission: bool) -> int:
            return int(
                manager.coordinator.get_num_blocks_to_allocate(
                    request_id=request.request_id,
                    num_tokens=min(tokens, manager.max_model_len),
                    new_computed_blocks=tuple(hits),
                    num_encoder_tokens=num_encoder_tokens,
                    total_computed_tokens=computed_tokens,
                    num_local_computed_tokens=local_tokens,
                    num_tokens_main_model=tokens_of_model,
                    apply_admission_cap=at_admission,
                    prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
                )
            )

        required = wanted(all_tokens + num_lookahead_tokens, all_tokens, at_admission=False) + reserved_blocks
        if full_sequence_must_fit:
            whole_tokens = min(request.num_tokens, manager.max_model_len)
            required = max(required, wanted(whole_tokens, whole_tokens, at_admission=True))
        if has_scheduled_reqs and request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED):
            required += manager.watermark_blocks
        return int(required - self._pool.get_num_free_blocks())

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
