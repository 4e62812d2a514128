"""The tier in DRAM: vLLM's manager, whose chunks leave in the order of what sessions are worth."""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from vllm.v1.kv_offload.base import LookupResult, PrepareStoreOutput, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from appliance.engine.inside.chunks import ChunkOrder, Worth
from appliance.engine.inside.connector.disk import DiskTier
from appliance.engine.inside.connector.sessions import Released, is_stored, lease_of, owner_of, session_of
from appliance.engine.inside.disk.files import Owner as DiskOwner
from appliance.engine.inside.disk.store import DiskStatus
from appliance.engine.inside.pictures import Holder
from appliance.engine.inside.quotas import Owner, Quota, Quotas
from appliance.engine.picture import TierPicture


class SessionChunks(CachePolicy):  # type: ignore[misc]
    """Which chunk leaves DRAM, as vLLM's manager asks it; `ChunkOrder` decides."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[bytes, ChunkStatus] = {}
        self.storing: ReqContext | None = None  # for whom the manager inserts: it does not say
        self.order: ChunkOrder
        self.on_left: Callable[[bytes], None] = lambda _: None
        self._below: float | None = None  # only what is worth less leaves

    @contextlib.contextmanager
    def storing_ahead(self, context: ReqContext, below: float) -> Iterator[None]:
        """Have room made for chunks that nobody has asked for by what is worth less than `below` alone."""
        self.storing, self._below = context, below
        try:
            yield
        finally:
            self._below = None

    def get(self, key: bytes) -> ChunkStatus | None:
        return self._chunks.get(key)

    def insert(self, key: bytes, chunk: ChunkStatus) -> None:
        self._chunks[key] = chunk
        context = self.storing
        end_token = 0 if context is None else context.get_offload_key_position(key) or 0
        self.order.add(key, end_token, None if context is None else owner_of(context))
        if chunk.ref_cnt == 0:
            self.order.freed(key)

    def remove(self, key: bytes) -> None:
        self.take_out(key)

    def take_out(self, key: bytes) -> ChunkStatus:
        """Remove a chunk that is there."""
        self.order.discard(key)
        self.on_left(key)
        return self._chunks.pop(key)

    def touch(self, keys: Iterable[bytes], req_context: ReqContext) -> None:
        """When a chunk was used says nothing that its session's worth does not."""

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[bytes]],
        insertion_only_keys: set[bytes],  # noqa: ARG002
        reused_keys: set[bytes],  # noqa: ARG002
        req_context: ReqContext,
    ) -> None:
        owner = owner_of(req_context)
        if owner is None or req_context.get_state(Released) is not None:
            return
        keys = itertools.chain(self.order.keys_of(owner), itertools.chain.from_iterable(key_groups))
        at = ((key, req_context.get_offload_key_position(key)) for key in keys)
        self.order.used(owner, {key: end_token for key, end_token in at if end_token is not None})

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, ChunkStatus]] | None:
        owner = None if self.storing is None else owner_of(self.storing)
        picked = self.order.pick(n, protected, None if owner is None else owner[0], self._below)
        for key in picked or ():
            self.on_left(key)
        return None if picked is None else [(key, self._chunks.pop(key)) for key in picked]

    def clear(self) -> None:
        for key in self._chunks:
            self.on_left(key)
        self._chunks.clear()
        self.order.clear()

    def mark_evictable(self, key: bytes) -> None:
        self.order.freed(key)

    def mark_non_evictable(self, key: bytes) -> None:
        self.order.held(key)


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
        quotas = Quotas(self.primary_tier._num_chunks)
        self._chunks.order = ChunkOrder(worth, clock, quotas, self._is_on_disk)
        for tier in self.secondary_tiers:
            if isinstance(tier, DiskTier):
                tier.order_by(worth, clock)

    def sessions(self) -> tuple[Owner, ...]:
        """Who has something in DRAM."""
        return self._chunks.order.sessions()

    def release(self, sessions: Collection[str]) -> list[Owner]:
        """Let go of all that the sessions so labelled have in DRAM, and overwrite it; and on the disk, with its key.

        Returns:
            Those of them that had something in DRAM.
        """
        for tier in self.secondary_tiers:
            if isinstance(tier, DiskTier):
                tier.store.drop_labelled(sessions)
        for state in self._req_state.values():
            owner = owner_of(state.req_context)
            if owner is not None and owner[1] in sessions:
                state.req_context.set_state(Released())
        owners = self._chunks.order.labelled(sessions)
        self._doomed.update(self._chunks.order.released(owners))
        self._drop_doomed()
        return owners

    def take_fault(self, session: Owner) -> bool:
        """Whether a chunk of the session's could not be read from the disk since this was asked last."""
        disks = [tier.store for tier in self.secondary_tiers if isinstance(tier, DiskTier)]
        return any(disk.take_fault(DiskOwner(*session)) for disk in disks)

    def is_lost(self, session: Owner, end_token: int) -> bool:
        """Whether the first chunk that a session misses, which ends there, is nowhere because of a quota."""
        disks = [tier.store for tier in self.secondary_tiers if isinstance(tier, DiskTier)]
        return self._chunks.order.quotas.is_lost(session, end_token) or any(
            disk.is_lost(DiskOwner(*session), end_token) for disk in disks
        )

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
        sessions = self._chunks.order.owners
        yield TierPicture("dram", restoring, chunk_bytes, primary._num_chunks, used, 0, sessions)
        if disk is not None:
            state = restoring if disk.on and disk.answers and not disk.paused else "failed"
            capacity = disk.capacity_bytes // disk.chunk_bytes
            yield TierPicture("disk", state, disk.chunk_bytes, capacity, disk.chunks, 0, disk.sessions)

    def holders(self) -> dict[str, Holder]:
        """Who says what of sessions is in the tiers behind the device."""
        stores = [tier.store for tier in self.secondary_tiers if isinstance(tier, DiskTier)]
        return {"dram": self._chunks.order, **dict(zip(["disk"], stores, strict=False))}

    def row(self, key: bytes) -> torch.Tensor | None:
        """The bytes of a chunk in DRAM that is there whole, as int8."""
        chunk, primary = self._chunks.get(key), self.primary_tier
        if chunk is None or not chunk.is_ready:
            return None
        return primary._mmap_region.base_tensor.view(primary._num_chunks, -1)[chunk.chunk_id]

    def prepare_store(self, keys: Collection[bytes], req_context: ReqContext) -> PrepareStoreOutput | None:
        if not is_stored(req_context):
            return PrepareStoreOutput(keys_to_store=[], store_spec=CPULoadStoreSpec([]), evicted_keys=[])
        self._chunks.storing = req_context
        return super().prepare_store(self._within_quotas(keys, req_context), req_context)

    def _initiate_promotion(self, tier_idx: int, key: bytes, req_context: ReqContext) -> bool:
        if not self._within_quotas([key], req_context):
            return False
        promoted: bool = super()._initiate_promotion(tier_idx, key, req_context)
        return promoted

    def complete_store(self, keys: Collection[bytes], req_context: ReqContext, success: bool = True) -> None:
        if req_context.get_state(Released) is not None:
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

    def _within_quotas(self, keys: Collection[bytes], req_context: ReqContext) -> list[bytes]:
        """What of these chunks is here or may come in; what leaves for them at the tenant's cap has left."""
        lease = lease_of(req_context)
        coming = {key: req_context.get_offload_key_position(key) or 0 for key in keys if self._chunks.get(key) is None}
        if lease is None or not coming:
            return list(keys)
        free_chunks = self.primary_tier._get_num_free_chunks()
        way = self._chunks.order.make_way(
            session_of(lease), coming, Quota.of(lease), free_chunks=free_chunks, spared=set(keys)
        )
        for key in way.leaving:
            self._let_go(key)
        return [key for key in keys if key not in coming or key in way.coming]

    def _is_on_disk(self, key: bytes) -> bool:
        return any(tier.store.holds(key) for tier in self.secondary_tiers if isinstance(tier, DiskTier))

    def _let_go(self, key: bytes) -> int:
        """Give a chunk that nothing copies back to vLLM; which row it had."""
        primary, chunk = self.primary_tier, self._chunks.take_out(key)
        primary._num_evictable_cache_chunks -= 1
        primary._free_chunk(chunk)
        return int(chunk.chunk_id)

    def _disk_answers(self) -> bool:
        return all(tier.store.answers() for tier in self.secondary_tiers if isinstance(tier, DiskTier))

    def _drop_doomed(self) -> None:
        if not self._doomed:
            return
        primary, order = self.primary_tier, self._chunks.order
        rows = primary._mmap_region.base_tensor.view(primary._num_chunks, -1)
        for key in [key for key in self._doomed if order.is_free(key) or key not in order]:
            self._doomed.discard(key)
            if self._chunks.get(key) is not None and not order.is_owned(key):
                rows[self._let_go(key)].zero_()
