"""Which sessions' blocks stay on the device, and whose yield first.

A lease is soft. The table holds the blocks of every session whose turn has ended, head first, and gives them up when
room is wanted. Until its idle timeout a session's lease has rank: it yields after all that have none. The table decides
and counts; it touches no block pool. What it decides comes back as a `Change`, which the caller applies at once.

Rules:

- The table holds one reference for each block that it knows, however many sessions claim the block.
- A kept block takes some bytes and no object: what it contains, the pool knows, and is asked.
- All leases together hold at most `bound` blocks; one lease alone may hold that many, or its session's cap.
- Who yields: what a session has diverged from is given up at once; then leases that lost their rank, then those that
  have it, the lowest worth first in both; then a tenant's guaranteed share, to other tenants; and what a request that
  waits or runs will hit, last of all, because no request may wait for a lease.
- A session yields from its tail, and no more than is wanted: a prefix without its tail is worth something, a tail
  without its prefix nothing. Blocks come back tail first, so that a pool evicts tails before heads.
- Who has no rank may yield some blocks ahead, that the next steps will want: they stay in the cache until then.
- A child agent's parent is worth as much as the child, and has rank while the child runs or has it.
- A strict lease leaves nothing behind: whatever it gives up leaves the cache, and at its timeout it gives up all.
- The order is reckoned anew so seldom that it takes one part in `ORDER_SHARE` of the time, whatever their number.
- The clock is passed in. What is worth how much, `RetentionPolicy` says.
"""

import heapq
import itertools
import sys
from array import array
from bisect import bisect_right, insort
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Final, NamedTuple

from appliance.engine.inside.retention import RetentionPolicy
from appliance.engine.picture import HeldPicture
from appliance.engine.protocol import Lease, LeaseState, TurnEnd

ORDER_SHARE: Final = 1000
"""The order in which sessions yield is reckoned in one part of so many of the time, at most."""

_MOST_REASONS: Final = 10_000
_MOST_COUNTED: Final = 1024  # tenants; who was counted first leaves first
_WANTED: Final = float("inf")


class LeasedBlock(NamedTuple):
    """A block, how many of its session's tokens are cached once it is, and what tells its content from others'."""

    block_id: int
    end_token: int
    content: Hashable


@dataclass(frozen=True, slots=True)
class Change:
    """What the caller does to the pool: take a reference on each block of `taken`, then give back those of `freed`.

    `freed` is in the order in which the blocks are to be evicted. What has a content of `forgotten` leaves the cache,
    unless a request uses it.
    """

    taken: tuple[int, ...] = ()
    freed: tuple[int, ...] = ()
    forgotten: tuple[Hashable, ...] = ()


@dataclass(slots=True)
class TenantKeeps:
    """How many sessions of a tenant keep something, and how much: a block that two share counts for both."""

    sessions: int = 0
    blocks: int = 0


@dataclass(slots=True)
class TenantCounts:
    """What the leases of a tenant came to since the engine began."""

    reclaimed_blocks: int = 0
    expired_leases: int = 0


class Kept(NamedTuple):
    """What all sessions keep, summed up.

    Attributes:
        tenants: by label.
        sessions_with_rank: of all that keep something, by tenant.
        blocks_with_rank: theirs; they count once for each session.
        worths: of the sessions whose worth is known and that no request waits for, in hits a second, ascending; by
            tenant.
    """

    tenants: Mapping[str, TenantKeeps]
    sessions: int
    sessions_with_rank: Mapping[str, int]
    blocks_with_rank: int
    worths: Mapping[str, Sequence[float]]


_Key = tuple[str, str]  # tenant, session: no label reaches another tenant's blocks


@dataclass(slots=True)
class _Claim:
    turn: str
    is_strict: bool
    ids: "array[int]"  # of its blocks, head first
    ends: Sequence[int]  # how many tokens are cached once each is; those of blocks that it gave up follow
    finished_at: float
    deadline: float
    has_rank: bool
    version: int  # tells a claim's entries in the heap and in the order from earlier ones
    contents: tuple[Hashable, ...] = ()  # all that a strict session has left in the cache
    reason: str = ""  # why its blocks are not all there

    @property
    def tokens(self) -> int:
        """How many of the session's tokens are cached."""
        return self.ends[len(self.ids) - 1] if self.ids else 0


class _Place(NamedTuple):
    """Where a claim stands in an order: the least yields first; of equal worth, what was used least recently."""

    worth: float
    finished_at: float
    version: int
    key: _Key


class LeaseTable:
    """Every lease of one engine.

    Args:
        bound: the most blocks that all leases may hold together.
        clock: seconds; monotonic.
        content_of: what tells a block's content from others', as `LeasedBlock.content`; asked of blocks that the table
            holds a reference on.
        policy: says what a session's KV is worth; it is told of every turn that the table is told of.
        pool_blocks: what shares and caps are fractions of; None: `bound`.
    """

    def __init__(
        self,
        bound: int,
        clock: Callable[[], float],
        content_of: Callable[[int], Hashable],
        policy: RetentionPolicy | None = None,
        *,
        pool_blocks: int | None = None,
    ) -> None:
        self._bound = bound
        self._pool_blocks = bound if pool_blocks is None else pool_blocks
        self._clock = clock
        self._content_of = content_of
        self.policy = RetentionPolicy() if policy is None else policy
        self._claims: dict[_Key, _Claim] = {}
        self._claims_on = array("I")  # by block
        self._held_by: Counter[str] = Counter()  # blocks, by tenant
        self._kept_by: dict[str, TenantKeeps] = {}
        self.leased_blocks = 0
        self._shares: dict[str, int] = {}  # blocks guaranteed, by tenant
        self._active: Counter[_Key] = Counter()  # requests that wait or run
        self._parents: dict[_Key, _Key] = {}  # of sessions with a claim or a request
        self._children: dict[Hashable, set[_Key]] = {}  # the same, by the parent
        self._closed: set[_Key] = set()  # while a request still runs
        self._reasons: OrderedDict[_Key, str] = OrderedDict()  # of sessions that have nothing left
        self._deadlines: list[tuple[float, int, _Key]] = []
        self._versions = itertools.count(1)
        # The worst at the end. Entries whose version is not their claim's are dead.
        self._order: dict[bool, list[_Place]] = {False: [], True: []}
        self._order_until = -float("inf")
        self.reclaimed_blocks_total = 0
        self.expired_total = 0
        self._counts: dict[str, TenantCounts] = {}

    def leased_block_ids(self) -> tuple[int, ...]:
        """The blocks that the table holds a reference on."""
        return tuple(block_id for block_id, claims in enumerate(self._claims_on) if claims)

    # What happens to a session

    def arrived(self, lease: Lease) -> None:
        """A request of the session came: until it has ended no time runs against its lease."""
        key = _key(lease)
        self.policy.arrived(session=key, now=self._clock())
        self._active[key] += 1
        self._closed.discard(key)
        if lease.parent and lease.parent != lease.session:
            self._leave_parent(key)
            parent = self._parents[key] = (lease.tenant, lease.parent)
            self._children.setdefault(parent, set()).add(key)
        self._pin_parent(key)
        claim = self._claims.get(key)
        if claim is not None:
            claim.has_rank = True
            claim.version = next(self._versions)

    def awaited(self, sessions: Sequence[_Key], for_s: float) -> None:
        """A request of each of these sessions waits elsewhere: for so long its lease has rank, and yields last.

        It may have rank for half as long again: who says so once a second moves few deadlines. A strict lease ends when
        it does in any case.
        """
        now = self._clock()
        self.policy.awaited(sessions=sessions, now=now, until=now + for_s)
        for key in sessions:
            claim = self._claims.get(key)
            if claim is None or claim.is_strict or key in self._active:
                continue
            if not claim.has_rank or claim.deadline < now + for_s:
                claim.has_rank = True
                self._set_deadline(key, claim, max(claim.deadline, now + 1.5 * for_s))
                self._pin_parent(key)

    def admitted(self, lease: Lease, hit_tokens: int, prompt_hits: bool) -> tuple[Change, str]:
        """A request of the session was given its blocks: what it did not hit, the session has diverged from.

        Args:
            hit_tokens: how many tokens it hit on the device.
            prompt_hits: it hit all that a prompt can hit.

        Returns:
            What is given up, and why blocks that the session had were not there any more, as a `TurnAccount` says it.
        """
        key = _key(lease)
        claim = self._claims.get(key)
        if claim is None:
            return Change(), self._reasons.pop(key, "")
        reason, claim.reason = claim.reason, ""
        if prompt_hits:
            return Change(), reason
        kept = bisect_right(claim.ends, hit_tokens, 0, len(claim.ids))
        abandoned = claim.ids[kept:]
        left = self._left(abandoned, is_strict=claim.is_strict or lease.strict)
        freed = self._drop(key, abandoned)
        del claim.ids[kept:]
        if not kept:
            self._remove(key)
        return Change((), tuple(freed), left), reason

    def finished(self, lease: Lease, blocks: Sequence[LeasedBlock], output_tokens: int = 0) -> Change:
        """Lease `blocks`, head first, to a session whose request has ended, however it did.

        They replace what the session had: a longer history extends its lease, a branch of it replaces it. A beginning
        of what it has already changes nothing but the time. What a bound or a cap does not admit is left out at the
        tail.
        """
        key, now = _key(lease), self._clock()
        prompt_tokens = blocks[-1].end_token if blocks else 0
        self.policy.finished(session=key, now=now, stop=None, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        self._active[key] -= 1
        if self._active[key] <= 0:
            del self._active[key]
        if key in self._closed:
            if key not in self._active:
                self._closed.discard(key)
                self._leave_parent(key)
            return Change(forgotten=tuple(block.content for block in blocks))
        before = self._claims.get(key)
        after = blocks[: min(self._bound, self._part(lease.session_cap))]
        contents = tuple(block.content for block in blocks) if lease.strict or (before and before.contents) else ()
        if before is not None and self._is_beginning(after, before.ids):
            ids, ends = before.ids, before.ends
            contents = before.contents or (tuple(map(self._content_of, ids)) if lease.strict else ())
        else:
            ids = array("I", [block.block_id for block in after])
            ends = _compact([block.end_token for block in after])
        taken = [block_id for block_id in ids if self._claim(key, block_id)]
        forgotten: list[Hashable] = []
        freed: list[int] = []
        if before is not None:
            freed += self._drop(key, before.ids)
            forgotten += set(before.contents) - set(contents)
            self._remove(key)
        if not lease.strict:
            contents = ()
        if not ids:
            self._settled(key)
            return Change(tuple(taken), tuple(freed), (*forgotten, *contents))
        claim = _Claim(lease.turn, lease.strict, ids, ends, now, 0.0, True, 0, contents)
        self._claims[key] = claim
        self._kept_by[lease.tenant].sessions += 1
        forgotten += contents[len(ids) :]
        self._reasons.pop(key, None)
        self._shares[lease.tenant] = self._part(lease.tenant_share)
        self._set_deadline(key, claim, now + lease.idle_timeout_s)
        yielded = self._take(self._over_cap(lease), spared=key, only=lease.tenant, reason="quota")
        also = self._take(self.leased_blocks - self._bound, spared=key, wanted_by=lease.tenant)
        # Nobody else may yield: the session keeps what there is room for.
        left_over = max(self.leased_blocks - self._bound, self._over_cap(lease))
        self._yield(key, left_over, None, "quota", also)
        return Change(
            tuple(taken),
            (*freed, *yielded.freed, *also.freed),
            (*forgotten, *yielded.forgotten, *also.forgotten),
        )

    def turn_ended(self, end: TurnEnd) -> None:
        """Why a turn ended is known now: what the session is worth, and how long its lease has rank, depends on it."""
        key = (end.tenant, end.session)
        if key in self._active:
            return
        self.policy.corrected(session=key, stop=end.stop, output_tokens=end.output_tokens)
        claim = self._claims.get(key)
        if claim is not None and claim.turn == end.turn and claim.has_rank:
            self._set_deadline(key, claim, claim.finished_at + end.idle_timeout_s)

    def expire(self) -> Change:
        """Take their rank from the leases whose time is over; end those that are strict."""
        now = self._clock()
        freed: list[int] = []
        forgotten: list[Hashable] = []
        while (due := self._next_due()) is not None and due[0] <= now:
            heapq.heappop(self._deadlines)
            key, claim = due[2], self._claims[due[2]]
            self.expired_total += 1
            self._counts_of(key[0]).expired_leases += 1
            if claim.is_strict:
                freed += self._drop(key, claim.ids)
                forgotten += claim.contents
                self._remove(key)
                self._gone(key, "expired")
                continue
            claim.has_rank = False
            claim.version = next(self._versions)
            if not self._has_ranking_child(key):  # else it stands with those that have rank when that is reckoned next
                insort(self._order[False], self._place(key, claim, now), key=_worst_last)
        return Change(freed=tuple(freed), forgotten=tuple(forgotten))

    def demote(self, session: _Key) -> Change:
        """Have a session that no request waits or runs for give up all that it keeps, for a tier behind has it."""
        claim = self._claims.get(session)
        if claim is None or session in self._active:
            return Change()
        contents = tuple(map(self._content_of, claim.ids))
        taken = _Taken([], [], {})
        self._yield(session, len(claim.ids), None, "", taken)
        return Change(freed=tuple(taken.freed), forgotten=contents)

    def release(self, sessions: Iterable[str]) -> Change:
        """The sessions so labelled, whosever they are, are over: nobody will ask for their blocks again."""
        tenants = {*self._kept_by, *(tenant for tenant, _ in self._active)}
        named = itertools.product(tenants, dict.fromkeys(sessions))
        return self._release([key for key in named if key in self._claims or key in self._active])

    def release_all(self) -> Change:
        """End every lease. The sessions go on."""
        freed: list[int] = []
        forgotten: list[Hashable] = []
        for key in list(self._claims):
            claim = self._claims[key]
            freed += self._drop(key, claim.ids)
            forgotten += claim.contents
            self._remove(key)
            self._settled(key)
        return Change(freed=tuple(freed), forgotten=tuple(forgotten))

    # Making room

    def can_yield(self, wanted_blocks: int, busy: Callable[[int], bool]) -> bool:
        """Whether so many blocks would be free if every lease yielded all it can; `busy` blocks make no room."""
        if wanted_blocks > self.leased_blocks:
            return False
        left, shared = wanted_blocks, set[int]()
        for claim in self._claims.values():  # who has been idle for longest comes first, and seldom has a busy block
            for block_id in reversed(claim.ids):
                if left <= 0:
                    break
                if busy(block_id):
                    continue
                if self._claims_on[block_id] == 1:
                    left -= 1
                elif block_id not in shared:
                    shared.add(block_id)
                    left -= 1
            if left <= 0:
                break
        return left <= 0

    def reclaim(
        self, wanted_blocks: int, busy: Callable[[int], bool], wanted_by: str = "", *, ahead: int = 0
    ) -> Change:
        """Give up `wanted_blocks` blocks, or as many as there are.

        Args:
            wanted_blocks: how many blocks the pool is short of.
            busy: says of a block that giving it up makes no room, because a request uses it or is about to. Whoever
                uses a block uses all before it, or copies of them: a lease whose tail is busy gives last.
            wanted_by: the tenant whose request it is for; empty: nobody's in particular.
            ahead: so many more at most, of leases without rank and beyond the guaranteed shares.
        """
        taken = self._take(wanted_blocks, busy=busy, wanted_by=wanted_by, ahead=ahead)
        room = len(taken.freed)
        for key in list(self._claims) if room < wanted_blocks else ():
            made = self._yield_before_the_tail(key, wanted_blocks - room, busy, taken)
            if made:
                room += made
                taken.of[key[0]] = taken.of.get(key[0], 0) + made
        self.reclaimed_blocks_total += room
        for tenant, blocks in taken.of.items():
            self._counts_of(tenant).reclaimed_blocks += blocks
        return Change(freed=tuple(taken.freed), forgotten=tuple(taken.forgotten))

    # What is asked

    def is_due(self) -> bool:
        """Whether a lease may lose its rank now; cheap, and where it says no, none does."""
        return bool(self._deadlines) and self._deadlines[0][0] <= self._clock()

    def next_expiry_in_s(self) -> float | None:
        """Seconds until a lease loses its rank; at or below zero when that is due; `None`: none has any."""
        due = self._next_due()
        return None if due is None else due[0] - self._clock()

    def is_active(self, session: _Key) -> bool:
        """Whether a request of the session waits or runs."""
        return session in self._active

    def tokens_of(self, session: _Key) -> int:
        """How many of a session's tokens are kept."""
        claim = self._claims.get(session)
        return 0 if claim is None else claim.tokens

    def states(self, sessions: Iterable[_Key] | None = None) -> tuple[LeaseState, ...]:
        """The leases of these sessions as they stand; None: every one, the earliest deadline first.

        One that expires at or below zero has no rank.
        """
        now = self._clock()
        if sessions is not None:
            return tuple(self._state(key, now) for key in sessions if key in self._claims)
        in_order = sorted(self._claims.items(), key=lambda item: (item[1].deadline, item[1].finished_at))
        return tuple(self._state(key, now) for key, _ in in_order)

    def kept(self) -> Kept:
        """What all sessions keep: counted as they come and go, but for their worth, which changes by itself."""
        now, value = self._clock(), self.policy.value
        with_rank = Counter(key[0] for key, claim in self._claims.items() if claim.has_rank)
        blocks_with_rank = sum(len(claim.ids) for claim in self._claims.values() if claim.has_rank)
        worths = defaultdict[str, list[float]](list)
        for key in self._claims:
            worth = value(session=key, now=now, position=0, abandoned=False)
            if isfinite(worth):
                worths[key[0]].append(worth)
        for each in worths.values():
            each.sort()
        return Kept(self._kept_by, len(self._claims), with_rank, blocks_with_rank, worths)

    def counts(self) -> Mapping[str, TenantCounts]:
        """What the leases of each tenant came to, of `_MOST_COUNTED` tenants at most."""
        return self._counts

    @property
    def sessions(self) -> int:
        """How many sessions keep something."""
        return len(self._claims)

    def sizes(self) -> Iterator[tuple[_Key, int]]:
        """The sessions that keep something, and how many blocks."""
        return ((key, len(claim.ids)) for key, claim in self._claims.items())

    def kept_of(self, session: _Key) -> HeldPicture | None:
        """What a session keeps; None: nothing."""
        claim = self._claims.get(session)
        if claim is None:
            return None
        kept_for, ends_in_s = "worth", None
        if session in self._active:
            kept_for = "in_use"
        elif claim.has_rank:
            kept_for, ends_in_s = "lease", claim.deadline - self._clock()
        elif self._above_share(session[0], "", None) <= 0:
            kept_for = "share"
        return HeldPicture("device", len(claim.ids), claim.tokens, kept_for, ends_in_s)

    def blocks_by_tenant(self) -> Mapping[str, int]:
        """How many blocks the sessions of each tenant keep; what two of them share counts once."""
        return self._held_by

    def worth(self, session: _Key) -> float:
        """What a session's KV is worth, in hits a second; infinite: a request of it waits or runs."""
        if session in self._active:
            return _WANTED
        return self.policy.value(session=session, now=self._clock(), position=0, abandoned=False)

    def worth_behind(self, *, session: Hashable, now: float, position: int, abandoned: bool) -> float:
        """As `RetentionPolicy.value`, for the tiers behind the device: a parent is worth as much as its child."""
        related = (session, *self._children.get(session, ()))
        value = self.policy.value
        return max(value(session=each, now=now, position=position, abandoned=abandoned) for each in related)

    # Private

    def _state(self, key: _Key, now: float) -> LeaseState:
        claim = self._claims[key]
        return LeaseState(
            session=key[1],
            tenant=key[0],
            blocks=len(claim.ids),
            tokens=claim.tokens,
            expires_in_s=claim.deadline - now,
        )

    def _release(self, keys: Iterable[_Key]) -> Change:
        freed: list[int] = []
        forgotten: list[Hashable] = []
        for key in keys:
            self.policy.closed(session=key, now=self._clock())
            if key in self._active:
                self._closed.add(key)
            claim = self._claims.get(key)
            if claim is not None:
                forgotten += claim.contents or map(self._content_of, claim.ids)
                freed += self._drop(key, claim.ids)
                self._remove(key)
            self._reasons.pop(key, None)
            self._settled(key)
        return Change(freed=tuple(freed), forgotten=tuple(forgotten))

    def _take(
        self,
        wanted_blocks: int,
        *,
        busy: Callable[[int], bool] | None = None,
        spared: _Key | None = None,
        only: str | None = None,
        wanted_by: str = "",
        reason: str = "",
        ahead: int = 0,
    ) -> "_Taken":
        taken = _Taken([], [], {})
        if wanted_blocks <= 0:
            return taken
        protected: list[_Key] = []
        for key, has_rank in self._victims(only):
            if key == spared:
                continue
            wanted = max(0, wanted_blocks - len(taken.freed))
            above = self._above_share(key[0], wanted_by, only)
            most = max(0, min(wanted, above))
            if most == wanted and not has_rank:
                left = wanted_blocks + ahead - len(taken.freed) - most
                most += max(0, min(left, self._above_share(key[0], "", only) - most))
            before = len(taken.freed)
            if most:
                self._yield(key, most, busy, reason, taken)
            more = len(taken.freed) - wanted_blocks
            # Ahead, nobody is asked in vain but the one, nobody who has rank, and no order is reckoned for it.
            if more >= 0 and (
                more >= ahead or has_rank or len(taken.freed) == before or not self._is_any_without_rank()
            ):
                return taken
            if above < wanted and key in self._claims:
                protected.append(key)
        if busy is not None:  # a request wants them: it does not wait for what is idle, whosever that is
            for key in protected:
                if key in self._claims:
                    self._yield(key, wanted_blocks - len(taken.freed), busy, reason, taken)
                if len(taken.freed) >= wanted_blocks:
                    break
        return taken

    def _above_share(self, tenant: str, wanted_by: str, only: str | None) -> int:
        """How many of a tenant's blocks may go to another."""
        if tenant == wanted_by or only is not None:
            return self._held_by[tenant]
        return self._held_by[tenant] - self._shares.get(tenant, 0)

    def _yield(self, key: _Key, most: int, busy: Callable[[int], bool] | None, reason: str, taken: "_Taken") -> None:
        claim = self._claims[key]
        ids, claims_on = claim.ids, self._claims_on
        kept, wanted = len(ids), most
        while kept and wanted > 0 and not (busy is not None and busy(ids[kept - 1])):
            kept -= 1
            wanted -= claims_on[ids[kept]] == 1
        yielded = ids[kept:]
        if yielded:
            taken.forgotten.extend(self._left(yielded, is_strict=claim.is_strict))
            freed = self._drop(key, yielded)
            taken.freed.extend(freed)
            taken.of[key[0]] = taken.of.get(key[0], 0) + len(freed)
            del ids[kept:]
            claim.reason = reason or ("evicted" if claim.has_rank else "expired")
        if not ids:
            self._remove(key)
            self._gone(key, claim.reason)

    def _yield_before_the_tail(self, key: _Key, most: int, busy: Callable[[int], bool], taken: "_Taken") -> int:
        """Give up blocks of which a request uses copies, and what it uses behind them; how much room that makes."""
        claim = self._claims[key]
        room, cut = 0, len(claim.ids)
        for at in range(len(claim.ids) - 1, -1, -1):
            if room >= most:
                break
            if self._claims_on[claim.ids[at]] == 1 and not busy(claim.ids[at]):
                room, cut = room + 1, at
        yielded = claim.ids[cut:]
        if yielded:
            taken.forgotten.extend(self._left(yielded, is_strict=claim.is_strict))
            taken.freed.extend(self._drop(key, yielded))
            del claim.ids[cut:]
            claim.reason = "evicted" if claim.has_rank else "expired"
        if not claim.ids:
            self._remove(key)
            self._gone(key, claim.reason)
        return room

    def _over_cap(self, lease: Lease) -> int:
        """How many blocks a tenant has above its cap."""
        return 0 if lease.tenant_cap >= 1 else self._held_by[lease.tenant] - self._part(lease.tenant_cap)

    def _victims(self, only: str | None) -> Iterator[tuple[_Key, bool]]:
        """The sessions in the order in which they yield, and whether they have rank, or their child has.

        Whoever takes part of one finds it first the next time.
        """
        if self._clock() >= self._order_until or not (self._order[False] or self._order[True]):
            self._reckon_order()
        reckoned = False
        while True:
            for has_rank in (False, True):
                order = self._order[has_rank]
                passed: list[_Place] = []
                try:
                    while order:
                        place = order.pop()
                        if self._is_dead(place):
                            continue
                        passed.append(place)
                        if only is None or place.key[0] == only:
                            yield place.key, has_rank
                finally:
                    order.extend(place for place in reversed(passed) if not self._is_dead(place))
            if reckoned:
                return
            # Sessions that finished since the order was reckoned are not in it.
            reckoned = True
            self._reckon_order()

    def _is_any_without_rank(self) -> bool:
        order = self._order[False]
        while order and self._is_dead(order[-1]):
            order.pop()
        return bool(order)

    def _is_dead(self, place: _Place) -> bool:
        claim = self._claims.get(place.key)
        return claim is None or claim.version != place.version

    def _reckon_order(self) -> None:
        began_at = self._clock()
        related = {*self._parents, *self._parents.values()}
        order: dict[bool, list[_Place]] = {False: [], True: []}
        places: dict[_Key, _Place] = {}  # of those that are related
        ranks: dict[_Key, bool] = {}
        for key, claim in self._claims.items():
            place = self._place(key, claim, began_at)
            if key in related:
                places[key], ranks[key] = place, claim.has_rank
            else:
                order[claim.has_rank].append(place)
        for child, parent in self._parents.items():
            if parent not in places:
                continue
            if child in self._active:
                places[parent], ranks[parent] = places[parent]._replace(worth=_WANTED), True
            elif ranks.get(child):
                worth = max(places[parent].worth, places[child].worth)
                places[parent], ranks[parent] = places[parent]._replace(worth=worth), True
        for key, place in places.items():
            order[ranks[key]].append(place)
        for rank in (False, True):
            self._order[rank] = sorted(order[rank], reverse=True)
        now = self._clock()
        self._order_until = now + ORDER_SHARE * (now - began_at)

    def _place(self, key: _Key, claim: _Claim, now: float) -> _Place:
        worth = (
            _WANTED
            if key in self._active
            else self.policy.value(session=key, now=now, position=claim.tokens, abandoned=False)
        )
        return _Place(worth, claim.finished_at, claim.version, key)

    def _left(self, block_ids: Sequence[int], *, is_strict: bool) -> tuple[Hashable, ...]:
        return tuple(map(self._content_of, block_ids)) if is_strict else ()

    def _is_beginning(self, blocks: Sequence[LeasedBlock], of: Sequence[int]) -> bool:
        # By content: a block that was computed once more has another id.
        return len(blocks) <= len(of) and all(
            block.block_id == block_id or block.content == self._content_of(block_id)
            for block, block_id in zip(blocks, of, strict=False)
        )

    def _part(self, fraction: float) -> int:
        return int(fraction * self._pool_blocks)

    def _gone(self, key: _Key, reason: str) -> None:
        self._reasons[key] = reason
        if len(self._reasons) > _MOST_REASONS:
            self._reasons.popitem(last=False)
        self._settled(key)

    def _settled(self, key: _Key) -> None:
        """Nothing of a session is left here unless a request is."""
        if key not in self._active and key not in self._claims:
            self._leave_parent(key)

    def _pin_parent(self, key: _Key) -> None:
        """A session has a request or rank now, and so has its parent: from now on, not when that is reckoned next."""
        parent = self._parents.get(key)
        pinned = None if parent is None else self._claims.get(parent)
        if parent is not None and pinned is not None:
            self._set_deadline(parent, pinned, pinned.deadline)

    def _has_ranking_child(self, key: _Key) -> bool:
        return any(
            child in self._active or ((claim := self._claims.get(child)) is not None and claim.has_rank)
            for child in self._children.get(key, ())
        )

    def _leave_parent(self, key: _Key) -> None:
        parent = self._parents.pop(key, None)
        if parent is not None:
            self._children[parent].discard(key)
            if not self._children[parent]:
                del self._children[parent]

    def _counts_of(self, tenant: str) -> TenantCounts:
        counts = self._counts.get(tenant)
        if counts is None:
            if len(self._counts) >= _MOST_COUNTED:
                del self._counts[next(iter(self._counts))]
            counts = self._counts[tenant] = TenantCounts()
        return counts

    def _claim(self, key: _Key, block_id: int) -> bool:
        if block_id >= len(self._claims_on):
            self._claims_on.extend(itertools.repeat(0, block_id + 1 - len(self._claims_on)))
        claims = self._claims_on[block_id]
        self._claims_on[block_id] = claims + 1
        kept = self._kept_by.get(key[0])
        if kept is None:
            kept = self._kept_by[key[0]] = TenantKeeps()
        kept.blocks += 1
        if not claims:
            self._held_by[key[0]] += 1
            self.leased_blocks += 1
        return not claims

    def _drop(self, key: _Key, block_ids: Sequence[int]) -> list[int]:
        freed: list[int] = []
        for block_id in reversed(block_ids):
            self._claims_on[block_id] -= 1
            if not self._claims_on[block_id]:
                freed.append(block_id)
        self._held_by[key[0]] -= len(freed)
        self.leased_blocks -= len(freed)
        if block_ids:
            self._kept_by[key[0]].blocks -= len(block_ids)
        if not self._held_by[key[0]]:
            del self._held_by[key[0]]
            self._shares.pop(key[0], None)
        return freed

    def _remove(self, key: _Key) -> None:
        """Nothing is kept of a session; its blocks are dropped already."""
        del self._claims[key]
        kept = self._kept_by[key[0]]
        kept.sessions -= 1
        if not kept.sessions and not kept.blocks:
            del self._kept_by[key[0]]

    def _set_deadline(self, key: _Key, claim: _Claim, deadline: float) -> None:
        claim.deadline = deadline
        claim.version = next(self._versions)
        if len(self._deadlines) > 2 * len(self._claims) + 64:
            self._deadlines = [
                (kept.deadline, kept.version, name) for name, kept in self._claims.items() if kept.has_rank
            ]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (claim.deadline, claim.version, key))

    def _next_due(self) -> tuple[float, int, _Key] | None:
        while self._deadlines:
            due = self._deadlines[0]
            claim = self._claims.get(due[2])
            if claim is not None and claim.version == due[1] and claim.has_rank and due[2] not in self._active:
                return due
            heapq.heappop(self._deadlines)
        return None


class _Taken(NamedTuple):
    freed: list[int]
    forgotten: list[Hashable]
    of: dict[str, int]  # how many blocks that are free now were whose, by tenant


def _worst_last(place: _Place) -> tuple[float, float, int]:
    return (-place.worth, -place.finished_at, -place.version)


def _compact(ends: Sequence[int]) -> Sequence[int]:
    """The same numbers in less space."""
    if not ends:
        return ()
    even = range(ends[0], ends[-1] + 1, ends[0]) if ends[0] > 0 else range(0)
    return even if len(even) == len(ends) and all(map(int.__eq__, even, ends)) else array("I", ends)


def _key(lease: Lease) -> _Key:
    # Thousands of sessions name few tenants: each label is kept once.
    return sys.intern(lease.tenant), lease.session
