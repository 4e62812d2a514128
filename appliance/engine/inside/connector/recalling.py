"""Reading from the disk into DRAM before a request asks: `Recall` says for whom, and what may make room for it.

Rules:

- One read is under way at a time, and none is begun while a request's chunks are read or anything waits to be written.
- A disk that does not answer is asked for nothing. In quarantine nothing is read.
- A chunk that is read ahead is like any other from then on: a request that comes meanwhile waits for it as for a read
  of its own, a release takes it along, and its session expires as if nobody had read it.
"""

import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from math import inf
from typing import Any, Final, NamedTuple

from vllm.v1.kv_offload.base import LoadStoreSpec, LookupResult, ReqContext, ScheduleEndContext
from vllm.v1.kv_offload.tiering.base import JobResult
from vllm.v1.kv_offload.tiering.manager import CPUPrimaryTierOffloadingManager, JobMetadata, PendingPromotion

from appliance.engine.inside.chunks import Worth
from appliance.engine.inside.connector.disk import DiskTier
from appliance.engine.inside.connector.dram import TieredManager
from appliance.engine.inside.connector.sessions import Ahead, Released, owner_of
from appliance.engine.inside.disk.files import Owner as DiskOwner
from appliance.engine.inside.disk.store import Presence
from appliance.engine.inside.quotas import Owner
from appliance.engine.inside.recall import MOST_BYTES, Recall
from appliance.engine.picture import RecallPicture
from appliance.engine.protocol import Lease, lease_params

_LOOK_EVERY_S: Final = 1.0
_MOVING_S: Final = 0.05  # until what moves for somebody else, or a key, may have come
_MOST_EXPECTED: Final = 256
_MOST_COMPLETE: Final = 10_000


class Expectations(NamedTuple):
    """Who is expected.

    Attributes:
        waiting: the sessions whose request the engine has not begun, the oldest first.
        expected: as `RetentionPolicy.expected`.
        device_tokens: how many of a session's tokens are on the device.
    """

    waiting: Callable[[], Sequence[Owner]]
    expected: Callable[[float, int], list[tuple[Owner, float]]]
    device_tokens: Callable[[Owner], int]


class _Plan(NamedTuple):
    """What is read for a session: chunks, head first, with the token that each ends at."""

    session: Owner
    below: float  # what is worth less may make room
    missing: deque[tuple[bytes, int]]
    until: float  # then it is looked whether somebody else's is wanted more


class RecallingManager(TieredManager):
    """The manager of the tiers, which reads ahead."""

    def __init__(self, primary_tier: CPUPrimaryTierOffloadingManager, secondary_tiers: list[Any]) -> None:
        super().__init__(primary_tier, secondary_tiers)
        numbers = [number for number, tier in enumerate(secondary_tiers) if isinstance(tier, DiskTier)]
        self._disk_number = numbers[0] if numbers else 0
        self._disk: DiskTier | None = secondary_tiers[numbers[0]] if numbers else None
        self._ahead: ReqContext | None = None  # of the read that is under way
        self._numbers = itertools.count()
        self._plan: _Plan | None = None
        self._look_at = -inf  # before that nobody's need is looked at
        self._due_at = inf  # then it is to be, though nothing happens
        self._complete: dict[Owner, tuple[int, int, int]] = {}  # of whom nothing was missing, as things stood
        self._expectations: Expectations | None = None
        self._worth: Callable[[Owner], float]
        self._recall: Recall

    def order_by(self, worth: Worth, clock: Callable[[], float]) -> None:
        super().order_by(worth, clock)
        self._clock = clock
        self._recall = Recall(clock)
        self._worth = lambda owner: worth(session=owner, now=clock(), position=0, abandoned=False)
        self._chunks.on_left = self._recall.left

    def recall_for(self, expectations: Expectations) -> None:
        """Say who is expected. Called once."""
        self._expectations = expectations

    def hinted(self, session: Owner) -> None:
        """The session's client says that it returns soon."""
        self._recall.hinted(session)
        self.look_now()

    def arrived(self, session: Owner) -> None:
        """A request of the session is here."""
        self._recall.arrived(session)
        self.wanted((session,))

    def look_now(self) -> None:
        """Somebody is expected who was not."""
        self._plan, self._look_at = None, -inf

    def recalled(self) -> RecallPicture | None:
        """What came of reading ahead; None: there is no disk."""
        if self._disk is None:
            return None
        return RecallPicture(*self._recall.counts(), self._recall.paused_for_s)

    def recall_ahead(self) -> float | None:
        """Begin to read what is wanted most, if anything is and may be read now.

        Returns:
            Seconds after which there may be more to do; None: not before something else happens.
        """
        if self._disk is None or self._expectations is None or self.quarantined:
            return None
        if self._ahead is not None:
            return _LOOK_EVERY_S  # its end is heard of in a step
        now = self._clock()
        if now >= self._look_at:
            again_s = self._look(self._disk, self._expectations)
            self._look_at, self._due_at = now + min(again_s, _LOOK_EVERY_S), now + again_s
        return None if self._due_at == inf else max(self._due_at - now, 0.0)

    # What vLLM asks

    def lookup(self, key: bytes, req_context: ReqContext, *, exclude_tier_idx: int | None = None) -> LookupResult:
        found = super().lookup(key, req_context, exclude_tier_idx=exclude_tier_idx)
        ahead = self._ahead is not None and self._ahead.get_offload_key_position(key) is not None
        if ahead and found is LookupResult.HIT_PENDING:  # the request waits for the disk, whoever asked first
            self._request_load_sources.setdefault(req_context.req_id, {})[key] = DiskTier.cache_hit_source
        return found

    def prepare_load(self, keys: Collection[bytes], req_context: ReqContext) -> LoadStoreSpec:
        self._recall.loaded(keys)
        return super().prepare_load(keys, req_context)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        super().on_schedule_end(context)
        self.recall_ahead()

    def release(self, sessions: Collection[str]) -> list[Owner]:
        self._recall.released(sessions)
        self._plan = None
        return super().release(sessions)

    def demote(self, session: Owner) -> None:
        self._recall.demoted(session)
        self.look_now()
        super().demote(session)

    def _complete_promotion(self, job_metadata: JobMetadata, completed_job: JobResult) -> None:
        super()._complete_promotion(job_metadata, completed_job)
        job, context = job_metadata.transfer_job, self._ahead
        if context is None or job.req_context is not context:
            return
        self._ahead = None
        self._look_at = -inf  # there may be more
        came = job.keys if completed_job.success else completed_job.successful_keys or ()
        whole = completed_job.success or context.get_state(Released) is not None
        wanted_bytes = len(job.keys) * self._chunk_bytes
        self._recall.came(came, wanted_bytes=wanted_bytes, seconds=completed_job.transfer_time or 0.0, whole=whole)
        owner = owner_of(context)
        if not whole and owner is not None:
            self._recall.failed(owner)

    # How it is done

    def _let_go_of(self, owners: Collection[Owner]) -> None:
        if self._ahead is not None and owner_of(self._ahead) in owners:
            self._ahead.set_state(Released())
        if self._plan is not None and self._plan.session in owners:
            self._plan = None
        super()._let_go_of(owners)

    @property
    def _chunk_bytes(self) -> int:
        return 1 if self._disk is None else int(self._disk.block_size_bytes)

    def _look(self, disk: DiskTier, who: Expectations) -> float:
        """Begin to read for the first of those expected of whom something is missing; when to look again."""
        if self._recall.paused_for_s:
            return self._recall.paused_for_s
        if not disk.store.answers():
            return _LOOK_EVERY_S
        again_s = inf
        for plan in self._plans(disk, who):
            if self._is_moving(disk):
                return _MOVING_S
            key = disk.store.expect(DiskOwner(*plan.session))
            if key is Presence.ASK_AGAIN:
                again_s = min(again_s, _MOVING_S)
            elif key is Presence.ABSENT:
                self._recall.failed(plan.session)
            elif self._read(plan):
                self._plan = plan
                return _LOOK_EVERY_S
            else:
                again_s = min(again_s, _LOOK_EVERY_S)
        return again_s

    def _plans(self, disk: DiskTier, who: Expectations) -> Iterator["_Plan"]:
        """What is to be read for whom, the most wanted first. What was begun goes on for a while without looking."""
        now, begun = self._clock(), self._plan
        if begun is not None and begun.missing and now < begun.until:
            yield begun
        self._plan = None
        expected = who.expected(now, _MOST_EXPECTED)
        for session, below in self._recall.in_order(who.waiting(), expected, self._worth):
            missing = self._missing(disk, session, who)
            if missing:
                yield _Plan(session, below, deque(missing.items()), now + _LOOK_EVERY_S)

    def _missing(self, disk: DiskTier, owner: Owner, who: Expectations) -> dict[bytes, int]:
        """A session's chunks that are on the disk alone, head first, and the token that each ends at."""
        of_disk, order = DiskOwner(*owner), self._chunks.order
        stands = disk.store.chunks_of(of_disk), order.chunks_of(owner), who.device_tokens(owner)
        if not stands[0] or self._complete.get(owner) == stands:
            return {}
        missing = {
            key: end_token
            for key, end_token in disk.store.positions_of(of_disk).items()
            if end_token > stands[2] and self._chunks.get(key) is None
        }
        if not missing:
            if len(self._complete) >= _MOST_COMPLETE:
                self._complete.clear()
            self._complete[owner] = stands
        return missing

    def _is_moving(self, disk: DiskTier) -> bool:
        """Whether anything is read for a request, or waits for the disk."""
        jobs: Iterable[JobMetadata] = self._jobs.values()
        reads = any(job.transfer_job.is_promotion for job in jobs)
        return reads or bool(self._pending_load_submissions) or disk.store.is_moving()

    def _read(self, plan: "_Plan") -> bool:
        """Begin to read as many of the chunks as there is room for, head first; whether there is any."""
        primary = self.primary_tier
        wanted = dict(itertools.islice(plan.missing, max(1, MOST_BYTES // self._chunk_bytes)))
        free_chunks = primary._get_num_free_chunks()
        room = self._chunks.order.room_ahead(plan.session, len(wanted), free_chunks=free_chunks, below=plan.below)
        keys = [key for key in itertools.islice(wanted, room) if self._chunks.get(key) is None]
        if not keys:
            return False
        tenant, session = plan.session
        context = ReqContext(f"ahead-{next(self._numbers)}", lease_params(Lease(session, tenant, 0.0)))
        context.set_state(Ahead())
        for key in keys:
            context.set_offload_key_position(key, wanted[key])
        with self._chunks.storing_ahead(context, plan.below):
            written = primary.prepare_write(keys, context)
        if written is None:
            return False
        for _ in range(min(room, len(wanted))):
            plan.missing.popleft()
        self._ahead = context
        chunk_ids = list(written.store_spec.chunk_ids)
        promotion = PendingPromotion(context, list(written.keys_to_store), chunk_ids)
        self._pending_load_submissions[self._disk_number] = {context.req_id: promotion}
        self._flush_pending_promotions()
        return True
