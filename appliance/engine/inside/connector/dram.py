"""The tier in DRAM: vLLM's manager, whose chunks leave in the order of what sessions are worth.

Rules:

- A row that is nobody's holds zeros, and so does what a chunk does not fill of its row: what a session had goes with
  its chunk, by whichever way that leaves.
- A chunk leaves when nothing reads or writes it any more, and its row is overwritten in the same call, as far as the
  step goes: a large session's rows would hold up whoever runs. The others wait, and are overwritten in the steps that
  follow, which go on until none waits; nobody gets one before.
- One exception: a row that the same call gives to a chunk that fills it is overwritten by that, when it comes; if it
  does not, by us.
- vLLM's reset of its caches waits for no copy: what is copied at that moment is overwritten when its row is taken over.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, KeysView, Mapping, Sequence
from typing import Any, Final

import torch
from vllm.v1.kv_offload.base import (
    LookupResult,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, TieringOffloadingManager

from appliance.engine.inside.chunks import ChunkOrder, Worth
from appliance.engine.inside.connector.disk import DiskTier
from appliance.engine.inside.connector.sessions import (
    Released,
    Withheld,
    is_stored,
    is_strict,
    lease_of,
    owner_of,
    session_of,
    withheld,
)
from appliance.engine.inside.disk.files import Owner as DiskOwner
from appliance.engine.inside.disk.store import DiskStatus, DiskStore
from appliance.engine.inside.pace import Pace
from appliance.engine.inside.pictures import Holder
from appliance.engine.inside.quotas import Owner, Quota, Quotas
from appliance.engine.picture import TierPicture

_NOBODY_RUNS: Final = 64  # times as much is overwritten in a step then


class SessionChunks(CachePolicy):  # type: ignore[misc]
    """Which chunk leaves DRAM, as vLLM's manager asks it; `ChunkOrder` decides."""

    def __init__(self, cache_capacity: int) -> None:
        super().__init__(cache_capacity)
        self._chunks: dict[bytes, ChunkStatus] = {}
        self.storing: ReqContext | None = None  # for whom the manager inserts: it does not say
        self.order: ChunkOrder
        self.on_left: Callable[[bytes], None] = lambda _: None
        self.on_used: Callable[[Owner, Mapping[bytes, int]], None] = lambda _owner, _positions: None
        self._below: float | None = None  # only what is worth less leaves
        self.filling: frozenset[int] = frozenset()  # the groups of layers whose chunks fill their rows
        self.wipe: Callable[[int], None]  # overwrites a row
        self.row_bytes = 0
        self.pace: Pace
        self._left: set[int] = set()  # rows whose chunk left in this call, and which are not overwritten yet
        self._waiting: dict[int, None] = {}  # rows whose chunk left before, and which are not
        self._copied: set[int] = set()  # rows that were copied from or to at a reset, and which nobody took over since

    @contextlib.contextmanager
    def storing_ahead(self, context: ReqContext, below: float) -> Iterator[None]:
        """Have room made for chunks that nobody has asked for by what is worth less than `below` alone."""
        self.storing, self._below = context, below
        try:
            yield
        finally:
            self._below = None

    def wipe_left(self) -> None:
        """Overwrite the rows of what left, except those that were taken over, as far as the step goes."""
        self._waiting.update(dict.fromkeys(self._left))
        self._left.clear()
        while self._waiting and self.pace.goes_on(self.row_bytes):
            row = next(iter(self._waiting))
            self.wipe(row)
            del self._waiting[row]

    def waiting_rows(self) -> KeysView[int]:
        """The rows that are nobody's, and are not overwritten yet; a view."""
        return self._waiting.keys()

    def get(self, key: bytes) -> ChunkStatus | None:
        return self._chunks.get(key)

    def insert(self, key: bytes, chunk: ChunkStatus) -> None:
        if chunk.chunk_id in self._waiting:
            self.wipe(chunk.chunk_id)
            del self._waiting[chunk.chunk_id]
        elif chunk.chunk_id in self._left or chunk.chunk_id in self._copied:
            self._left.discard(chunk.chunk_id)
            self._copied.discard(chunk.chunk_id)
            if get_offload_group_idx(key) not in self.filling:
                self.wipe(chunk.chunk_id)
        self._chunks[key] = chunk
        context = self.storing
        end_token = 0 if context is None else context.get_offload_key_position(key) or 0
        self.order.add(key, end_token, None if context is None else owner_of(context))
        if chunk.ref_cnt == 0:
            self.order.freed(key)

    def remove(self, key: bytes) -> None:
        self.take_out(key)
        self.wipe_left()

    def take_out(self, key: bytes) -> ChunkStatus:
        """Remove a chunk that is there. To be followed by `wipe_left`, where its row was not taken over meanwhile."""
        self.order.discard(key)
        return self._leave(key)

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
        positions = {key: end_token for key, end_token in at if end_token is not None}
        self.order.used(owner, positions)
        self.on_used(owner, positions)

    def evict(self, n: int, protected: set[bytes]) -> list[tuple[bytes, ChunkStatus]] | None:
        owner = None if self.storing is None else owner_of(self.storing)
        picked = self.order.pick(n, protected, None if owner is None else owner[0], self._below)
        # vLLM evicts what is missing for those that it inserts next: they take over every row that is free.
        return None if picked is None else [(key, self._leave(key)) for key in picked]

    def clear(self) -> None:
        self._copied.update(chunk.chunk_id for chunk in self._chunks.values() if chunk.ref_cnt)
        for key in list(self._chunks):
            self._leave(key)
        self._left -= self._copied
        self.order.clear()
        for row in (*self._left, *self._waiting):
            self.wipe(row)
        self._left.clear()
        self._waiting.clear()

    def mark_evictable(self, key: bytes) -> None:
        self.order.freed(key)

    def mark_non_evictable(self, key: bytes) -> None:
        self.order.held(key)

    def _leave(self, key: bytes) -> ChunkStatus:
        self.on_left(key)
        chunk = self._chunks.pop(key)
        self._left.add(chunk.chunk_id)
        return chunk


class TieredManager(TieringOffloadingManager):  # type: ignore[misc]
    """vLLM's tiering manager, which has nothing of strict sessions and lets go of released ones.

    A session is strict from its first request with a strict lease on: what the tiers have of it goes when that comes.
    """

    def __init__(self, primary_tier: CPUPrimaryTierOffloadingManager, secondary_tiers: list[Any]) -> None:
        super().__init__(primary_tier, secondary_tiers)
        self._chunks: SessionChunks = primary_tier._policy
        self._chunks.wipe = lambda row: self._rows()[row].zero_()
        self._chunks.on_used = self._reached
        self._chunks.row_bytes = primary_tier._mmap_region.base_tensor.nbytes // primary_tier._num_chunks
        self._chunks.pace = Pace(time.perf_counter)
        self._doomed: set[bytes] = set()  # released, and still copied
        self.on_stored: Callable[[ReqContext], None] = lambda _: None
        # Nothing is restored any more: an engine before may have said so, and what it found is still on the disk.
        self.quarantined = any(tier.store.quarantined for tier in secondary_tiers if isinstance(tier, DiskTier))

    def fill_rows(self, groups: frozenset[int]) -> None:
        """Say of which groups of layers a chunk fills its row. Called once, before anything is stored."""
        self._chunks.filling = groups

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
        for store in self._stores():
            store.drop_labelled(sessions)
        held = self._chunks.order.labelled(sessions)
        running = filter(None, [owner_of(state.req_context) for state in self._req_state.values()])
        self._let_go_of({*held, *(owner for owner in running if owner[1] in sessions)})
        return held

    def wanted(self, sessions: Iterable[Owner]) -> None:
        """A request of each of these sessions is here, or waits elsewhere."""
        for session in sessions:
            self._chunks.order.wanted(session)

    def has_all(self, tier: str, session: Owner, tokens: int) -> bool:
        """Whether a tier has something of a session: all that DRAM has of it, and all of so many tokens."""
        here, reached = self._chunks.order.keys_of(session), self._chunks.order.end_of(session)
        there = all(self._chunks.order.is_free(key) for key in here)
        if tier == "disk":
            stores = self._stores()
            there = there and all(any(store.has(key, session[0]) for store in stores) for key in here)
            own = itertools.chain.from_iterable(store.positions_of(DiskOwner(*session)).values() for store in stores)
            reached = max((reached, *own))
        return there and reached >= max(tokens, 1)

    def demote(self, session: Owner) -> None:
        """Let go of what a session, and nobody else, has in DRAM."""
        for key in self._chunks.order.alone(session):
            self._let_go(key)
        self._chunks.wipe_left()

    def quarantine(self) -> None:
        """Restore nothing any more, from any tier: where there is a disk, no later engine either."""
        self.quarantined = True
        for store in self._stores():
            store.quarantine()

    def is_withheld(self, req_context: ReqContext, found_tokens: int) -> bool:
        """Whether a tier had what a request misses behind so many tokens, and could not give it."""
        missed = req_context.get_state(Withheld)
        return missed is not None and missed.end_token > found_tokens

    def is_lost(self, session: Owner, end_token: int) -> bool:
        """Whether the first chunk that a session misses, which ends there, is nowhere because of a quota."""
        return self._chunks.order.quotas.is_lost(session, end_token) or any(
            store.is_lost(DiskOwner(*session), end_token) for store in self._stores()
        )

    def on_new_request(
        self, req_context: ReqContext, *, exclude_tier_idx: int | None = None
    ) -> RequestOffloadingContext:
        owner = owner_of(req_context)
        if owner is not None and is_strict(req_context):
            for store in self._stores():
                store.drop(DiskOwner(*owner))
            self._let_go_of({owner})
        return super().on_new_request(req_context, exclude_tier_idx=exclude_tier_idx)

    def lookup(self, key: bytes, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> LookupResult:
        if is_strict(req_context):
            return LookupResult.MISS
        if self.quarantined:
            if self._is_known(key, req_context):
                withheld(req_context, key)
            return LookupResult.MISS
        self._chunks.storing = req_context
        found = super().lookup(key, req_context, exclude_tier_idx=exclude_tier_idx)
        if found is LookupResult.HIT_PENDING and not self._disk_answers():
            withheld(req_context, key)
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
        return next((store.status() for store in self._stores()), None)

    def pictures(self) -> Iterator[TierPicture]:
        """The tiers behind the device."""
        primary, disk = self.primary_tier, self.disk()
        restoring = "quarantined" if self.quarantined else "ok"
        used = primary._num_chunks - primary._get_num_free_chunks()
        sessions = self._chunks.order.owners
        yield TierPicture("dram", restoring, self._chunks.row_bytes, primary._num_chunks, used, 0, sessions)
        if disk is not None:
            state = restoring if disk.on and disk.answers and not disk.paused else "failed"
            capacity = disk.capacity_bytes // disk.chunk_bytes
            yield TierPicture("disk", state, disk.chunk_bytes, capacity, disk.chunks, 0, disk.sessions)

    def holders(self) -> dict[str, Holder]:
        """Who says what of sessions is in the tiers behind the device."""
        return {"dram": self._chunks.order, **dict(zip(["disk"], self._stores(), strict=False))}

    def row(self, key: bytes) -> torch.Tensor | None:
        """The bytes of a chunk in DRAM that is there whole, as int8."""
        chunk = self._chunks.get(key)
        if chunk is None or not chunk.is_ready:
            return None
        return self._rows()[chunk.chunk_id]

    def prepare_store(self, keys: Collection[bytes], req_context: ReqContext) -> PrepareStoreOutput | None:
        if not is_stored(req_context):
            return PrepareStoreOutput(keys_to_store=[], store_spec=CPULoadStoreSpec([]), evicted_keys=[])
        for store in self._stores():
            store.computed(keys)
        self._chunks.storing = req_context
        prepared = super().prepare_store(self._within_quotas(keys, req_context), req_context)
        self._chunks.wipe_left()
        return prepared

    def _initiate_promotion(self, tier_idx: int, key: bytes, req_context: ReqContext) -> bool:
        fits = self._within_quotas([key], req_context)
        promoted: bool = bool(fits) and super()._initiate_promotion(tier_idx, key, req_context)
        self._chunks.wipe_left()
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
        self._chunks.pace.step(times=1 if self._req_state else _NOBODY_RUNS)
        self._drop_doomed()
        self._chunks.wipe_left()

    def has_pending_work(self) -> bool:
        return bool(self._chunks.waiting_rows()) or super().has_pending_work()

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

    def _reached(self, session: Owner, positions: Mapping[bytes, int]) -> None:
        """A request of a session is over: what it left at an earlier token goes first from the disk, too."""
        for store in self._stores():
            store.reached(DiskOwner(*session), positions)

    def _is_on_disk(self, key: bytes) -> bool:
        return any(store.holds(key) for store in self._stores())

    def _is_known(self, key: bytes, req_context: ReqContext) -> bool:
        """Whether a tier has a chunk that a request asks for, or had it until it could not be read."""
        owner = owner_of(req_context)
        on_disk = owner is not None and any(store.had(key, owner[0]) for store in self._stores())
        return on_disk or self._chunks.get(key) is not None

    def _stores(self) -> list[DiskStore]:
        return [tier.store for tier in self.secondary_tiers if isinstance(tier, DiskTier)]

    def _let_go_of(self, owners: Collection[Owner]) -> None:
        """Let go of what these sessions have in DRAM, and store nothing more of their requests."""
        for state in self._req_state.values():
            if owner_of(state.req_context) in owners:
                state.req_context.set_state(Released())
        self._doomed.update(self._chunks.order.released(owners))
        self._drop_doomed()

    def _let_go(self, key: bytes) -> None:
        """Give a chunk that nothing copies back to vLLM."""
        primary = self.primary_tier
        primary._num_evictable_cache_chunks -= 1
        primary._free_chunk(self._chunks.take_out(key))

    def _rows(self) -> torch.Tensor:
        """What DRAM holds, a row a chunk, as int8. Not to be kept: it keeps the memory from being given back."""
        primary = self.primary_tier
        return primary._mmap_region.base_tensor.view(primary._num_chunks, -1)

    def _disk_answers(self) -> bool:
        return all(store.answers() for store in self._stores())

    def _drop_doomed(self) -> None:
        if not self._doomed:
            return
        order = self._chunks.order
        for key in [key for key in self._doomed if order.is_free(key) or key not in order]:
            self._doomed.discard(key)
            if self._chunks.get(key) is not None and not order.is_owned(key):
                self._let_go(key)
        self._chunks.wipe_left()
