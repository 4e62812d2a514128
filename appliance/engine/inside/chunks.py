"""Which session's chunk leaves DRAM next.

A chunk is the KV of one block outside the device. `ChunkOrder` knows whose it is and where in the session's tokens it
ends, and picks what leaves when the room is wanted. It holds no KV and touches no memory.

Rules:

- What a session diverged from goes first, and what nobody owns any more; then the session of the lowest worth, as
  `RetentionPolicy` reckons it; each from its tail on. A head without its tail is worth something, a tail without its
  head nothing.
- What a session diverged from is released with it, unless another session has it.
- A chunk that several sessions share stays as long as one of them is worth it.
- No tenant's chunks leave for another's below its share; what comes in keeps to its tenant's and its session's caps.
  A chunk counts for its tenant while a session owns it; what was abandoned counts for nobody.
- A chunk that is being copied does not leave: only what is `free` is picked. Nor does one that a request waits for: two
  that come back at once would push each other out for ever.
- For what nobody has asked for yet, only what is worth less may leave.
- A pick looks at what leaves, and at little else: at no session of a tenant of which nothing may leave. A session that
  has nothing left but what worthier ones share stands where they do in the order.
- A chunk takes some tens of bytes beside its key.
- Worths are reckoned for all sessions at once and hold for a while, longer the more sessions there are, so that the
  reckoning costs a bounded share of the time.
- The clock and the worth are passed in.
"""

import itertools
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from heapq import heappop, heappush, heapreplace
from math import inf
from typing import Final, NamedTuple, Protocol

from appliance.engine.inside.quotas import Owner, Quota, Quotas
from appliance.engine.picture import HeldPicture

_ORDER_HOLDS_S: Final = 1.0
_SESSIONS_A_SECOND: Final = 4000  # for each so many sessions the order holds a second longer
_NOBODY: Final[AbstractSet[Owner]] = frozenset()


class Worth(Protocol):
    """What a session's KV is worth; `RetentionPolicy.value`."""

    def __call__(self, *, session: Hashable, now: float, position: int, abandoned: bool) -> float:
        """Hits a second; below zero: nothing."""


class Way(NamedTuple):
    """What may come in, and what is to leave for it because its tenant is at its cap."""

    coming: frozenset[bytes]
    leaving: tuple[bytes, ...] = ()


class _Chunk:
    """Attributes: left_by: who diverged from it."""

    __slots__ = ("end_token", "is_free", "left_by", "owners")

    def __init__(self, end_token: int) -> None:
        self.end_token = end_token
        self.is_free = False
        self.owners = self.left_by = _NOBODY


class _Session:
    """Attributes: keys: of its chunks, head first; alone: the owners of a chunk that nobody else has."""

    __slots__ = ("alone", "keys")

    def __init__(self, owner: Owner) -> None:
        self.keys: list[bytes] = []
        self.alone: AbstractSet[Owner] = frozenset((owner,))


class ChunkOrder:
    """The order in which chunks leave.

    Args:
        worth: what a session is worth; the lowest leaves first.
        clock: seconds; monotonic.
        quotas: of the tier.
        is_kept: whether a tier behind this one has a chunk: then it is not lost when it leaves.
    """

    def __init__(
        self,
        worth: Worth,
        clock: Callable[[], float],
        quotas: Quotas,
        is_kept: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self._worth = worth
        self._clock = clock
        self.quotas = quotas
        self._is_kept = is_kept
        self._held: Counter[str] = Counter()  # chunks that sessions own, by tenant
        self._chunks: dict[bytes, _Chunk] = {}
        self._of: dict[Owner, _Session] = {}
        self._abandoned: dict[Owner, set[bytes]] = {}
        self._awaited_by: dict[str, set[bytes]] = {}
        self._awaited: Counter[bytes] = Counter()
        self._orphans: dict[bytes, None] = {}  # nobody asks for them: they go first
        # Who has something and its worth, by tenant, the lowest first; the last are those who came since that was
        # reckoned, or whom a request waits for since.
        self._ranked: dict[str, dict[Owner, float]] = {}
        self._least: dict[str, float] = {}  # no session of the tenant is worth less; ascending
        self._order_ends_at = 0.0

    def __len__(self) -> int:
        return len(self._chunks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._chunks

    def add(self, key: bytes, end_token: int, owner: Owner | None) -> None:
        """A chunk came in; it is not free until `freed`."""
        self._chunks[key] = _Chunk(end_token)
        if owner is None:
            self._orphans[key] = None
        else:
            self._own(key, owner)
            self.quotas.came(owner, end_token)

    def freed(self, key: bytes) -> None:
        """Nothing copies from or to the chunk any more."""
        if key in self._chunks:
            self._chunks[key].is_free = True

    def held(self, key: bytes) -> None:
        """Something copies from the chunk."""
        if key in self._chunks:
            self._chunks[key].is_free = False

    def wanted(self, owner: Owner) -> None:
        """A request of the session waits: from now on what it has leaves last, until worths are reckoned anew."""
        if owner in self._of:
            ranked = self._ranked[owner[0]]
            del ranked[owner]
            ranked[owner] = inf

    def await_for(self, request: str, key: bytes) -> None:
        """A request that is not admitted yet will load the chunk."""
        keys = self._awaited_by.setdefault(request, set())
        if key not in keys:
            keys.add(key)
            self._awaited[key] += 1

    def waits_no_more(self, request: str) -> None:
        """The request was admitted, or is over."""
        keys = self._awaited_by.pop(request, ())
        self._awaited.subtract(keys)
        for key in keys:
            if not self._awaited[key]:
                del self._awaited[key]

    def discard(self, key: bytes) -> None:
        """The chunk is gone."""
        chunk = self._chunks.get(key)
        if chunk is None:
            return
        for owner in chunk.owners:
            self._take_out(key, owner)
        if chunk.owners:
            self._one_less(owner[0])
        for owner in chunk.left_by:
            self._forget_abandoned(key, owner)
        self._orphans.pop(key, None)
        del self._chunks[key]

    def clear(self) -> None:
        """All chunks are gone."""
        self._chunks.clear()
        self._held.clear()
        self._of.clear()
        self._abandoned.clear()
        self._awaited_by.clear()
        self._awaited.clear()
        self._orphans.clear()
        self._ranked.clear()
        self._least.clear()

    def used(self, owner: Owner, positions: Mapping[bytes, int]) -> None:
        """A request of the session is over.

        Args:
            owner: the session.
            positions: the request's chunks, in DRAM or not, and the token that each ends at. What the session has
                beside them and the request left at an earlier token is abandoned: the session diverged from it.
        """
        for key in positions:
            if key in self._chunks:
                self._own(key, owner)
        reached = max(positions.values(), default=0)
        session = self._of.get(owner)
        beside = [] if session is None else [key for key in session.keys if key not in positions]
        if session is None or not any(self._chunks[key].end_token <= reached for key in beside):
            return
        session.keys = [key for key in session.keys if key in positions]
        if not session.keys:
            self._went(owner)
        for key in beside:
            self._give_up(key, owner)
            self._chunks[key].left_by = _with(self._chunks[key].left_by, owner)
        self._abandoned.setdefault(owner, set()).update(beside)

    def released(self, owners: Iterable[Owner]) -> tuple[bytes, ...]:
        """The sessions are over; the chunks they had or diverged from, and nobody else owns."""
        alone: list[bytes] = []
        for owner in owners:
            self.quotas.forget(owner)
            keys = self.keys_of(owner)
            if keys:
                self._went(owner)
            for key in keys:
                self._give_up(key, owner)
                if not self._chunks[key].owners:
                    alone.append(key)
            for key in self._abandoned.pop(owner, ()):
                chunk = self._chunks[key]
                chunk.left_by = _without(chunk.left_by, owner)
                if not chunk.owners:
                    alone.append(key)
        return tuple(alone)

    def sessions(self) -> tuple[Owner, ...]:
        """Who owns something, or diverged from something that is still here."""
        return (*self._of, *(owner for owner in self._abandoned if owner not in self._of))

    def labelled(self, labels: Collection[str]) -> list[Owner]:
        """Those of them that have one of these labels."""
        return [owner for owner in itertools.chain(self._of, self._abandoned) if owner[1] in labels]

    def keys_of(self, owner: Owner) -> tuple[bytes, ...]:
        """The chunks that a session has, shared ones too, head first."""
        session = self._of.get(owner)
        return () if session is None else tuple(session.keys)

    def alone(self, owner: Owner) -> list[bytes]:
        """The chunks that a session has and nobody else, and that may leave."""
        return [key for key in self.keys_of(owner) if len(self._chunks[key].owners) == 1 and self._may_leave(key, ())]

    def end_of(self, owner: Owner) -> int:
        """The token that a session's last chunk ends at; zero: it has none."""
        keys = self.keys_of(owner)
        return self._end_of(keys[-1]) if keys else 0

    def is_owned(self, key: bytes) -> bool:
        """Whether some session has the chunk."""
        chunk = self._chunks.get(key)
        return chunk is not None and bool(chunk.owners)

    def chunks_of(self, owner: Owner) -> int:
        """How many chunks a session has, shared ones too."""
        session = self._of.get(owner)
        return 0 if session is None else len(session.keys)

    def chunks_of_tenant(self, tenant: str) -> int:
        """How many chunks a tenant's sessions have."""
        return self._held[tenant]

    @property
    def owners(self) -> int:
        """How many sessions have something."""
        return len(self._of)

    def sizes(self) -> Iterator[tuple[Owner, int]]:
        """The sessions that have something, and how many chunks."""
        return ((owner, len(session.keys)) for owner, session in self._of.items())

    def kept_of(self, session: Owner) -> HeldPicture | None:
        """What a session has; None: nothing."""
        keys = self.keys_of(session)
        if not keys:
            return None
        kept_for = "worth"
        if any(key in self._awaited for key in keys):
            kept_for = "in_use"
        elif self.quotas.above_share(session[0], self._held[session[0]], "") <= 0:
            kept_for = "share"
        return HeldPicture("dram", len(keys), self._end_of(keys[-1]), kept_for, None)

    def blocks_by_tenant(self) -> Mapping[str, int]:
        """How many chunks the sessions of each tenant have; what two of them share counts once."""
        return self._held

    def is_free(self, key: bytes) -> bool:
        """Whether the chunk is there and nothing copies it."""
        chunk = self._chunks.get(key)
        return chunk is not None and chunk.is_free

    def make_way(
        self,
        owner: Owner,
        coming: Mapping[bytes, int],
        quota: Quota,
        *,
        free_chunks: int,
        spared: Collection[bytes] = frozenset(),
    ) -> Way:
        """What of the chunks that a session brings in has room within the quotas, from its head on.

        Args:
            coming: chunks that are not here, and the token that each ends at.
            free_chunks: how many have room without anybody's leaving.
            spared: chunks that must not leave.
        """
        tenant, quotas = owner[0], self.quotas
        quotas.in_force(tenant, quota)
        in_order = sorted(coming, key=coming.__getitem__)
        before = quotas.can_follow(owner, coming.values())
        if before is not None:
            in_order = [key for key in in_order if coming[key] < before]
        within = quotas.within_cap(quota, len(in_order), self.chunks_of(owner))
        over = quotas.over_cap(quota, self._held[tenant] + within)
        leaving = tuple(itertools.islice(self._leaving(spared, tenant, only=tenant, but=owner), over))
        within = max(0, within - over + len(leaving))
        wanted = within - free_chunks - len(leaving)
        fits = within - self._withheld(wanted, {*spared, *leaving}, tenant)
        if fits < len(in_order):
            quotas.lost(owner, coming[in_order[fits]])
        for key in leaving:
            if not self._is_kept(key):
                chunk = self._chunks[key]
                for loser in chunk.owners:
                    quotas.lost(loser, chunk.end_token)
        return Way(frozenset(in_order[:fits]), leaving)

    def pick(
        self,
        wanted_chunks: int,
        spared: Collection[bytes],
        wanted_by: str | None = None,
        below: float | None = None,
    ) -> tuple[bytes, ...] | None:
        """Take out so many chunks, or none and return None when fewer can leave.

        Args:
            spared: chunks that must not be among them.
            wanted_by: the tenant that they leave for; None: whatever is guaranteed leaves, too.
            below: only what is worth less leaves; None: whatever may.
        """
        leaving = self._leaving(spared, wanted_by, below=below)
        picked = tuple(itertools.islice(leaving, wanted_chunks))
        if len(picked) < wanted_chunks:
            return None
        for key in picked:
            self.discard(key)
        return picked

    def room_ahead(self, owner: Owner, wanted_chunks: int, *, free_chunks: int, below: float) -> int:
        """For how many of so many chunks, that nobody has asked for, a session has room within the quotas in force.

        Args:
            free_chunks: how many have room without anybody's leaving.
            below: only what is worth less would leave.
        """
        tenant, quota = owner[0], self.quotas.of(owner[0])
        within = self.quotas.within_cap(quota, wanted_chunks, self.chunks_of(owner))
        within -= self.quotas.over_cap(quota, self._held[tenant] + within)
        if within <= free_chunks:
            return max(0, within)
        leaving = self._leaving((), tenant, below=below)
        return free_chunks + sum(1 for _ in itertools.islice(leaving, within - free_chunks))

    def _withheld(self, wanted_chunks: int, spared: Collection[bytes], wanted_by: str) -> int:
        """How many of so many chunks have no room because other tenants' shares are kept."""
        if wanted_chunks <= 0 or not self.quotas.shares:
            return 0
        could, can = (
            sum(1 for _ in itertools.islice(self._leaving(spared, tenant), wanted_chunks))
            for tenant in (None, wanted_by)
        )
        return could - can

    def _leaving(
        self,
        spared: Collection[bytes],
        wanted_by: str | None,
        *,
        only: str | None = None,
        but: Owner | None = None,
        below: float | None = None,
    ) -> Iterator[bytes]:
        """Every chunk that may leave, in the order in which they do.

        Args:
            wanted_by: the tenant that they leave for; None: shares do not count.
            only: a tenant: chunks of its sessions alone.
            but: a session of which nothing leaves.
            below: what is worth less alone.
        """
        if only is None:
            yield from (key for key in self._orphans if self._may_leave(key, spared))
        passed: set[Owner] = set()
        left: Counter[str] = Counter()
        gone: set[bytes] = set()  # of those that are shared
        stopped: list[tuple[str, Iterator[bytes]]] = []
        now = self._clock()

        def is_kept(tenant: str) -> bool:
            if only is not None and tenant != only:
                return True
            held = self._held[tenant] - left[tenant]
            return wanted_by is not None and self.quotas.above_share(tenant, held, wanted_by) <= 0

        for owner in self._lowest_first(is_kept):
            if owner == but:
                continue
            if below is not None and self._worth(session=owner, now=now, position=0, abandoned=False) >= below:
                break
            passed.add(owner)
            tail_first = reversed(self._of[owner].keys)
            for key in tail_first:
                owners = self._chunks[key].owners
                # A shared chunk goes with the owner of the highest worth, who has what is before it, too.
                if not owners <= passed:
                    stopped.append((owner[0], tail_first))
                    break
                if not self._may_leave(key, spared):
                    continue
                if is_kept(owner[0]):
                    break
                if len(owners) > 1:
                    gone.add(key)
                left[owner[0]] += 1
                yield key
        # What had left and came again for one of its owners is that one's alone, though it is before what they share.
        for tenant, tail_first in stopped:
            for key in tail_first:
                if key in gone or not self._chunks[key].owners <= passed or not self._may_leave(key, spared):
                    continue
                if is_kept(tenant):
                    break
                gone.add(key)
                left[tenant] += 1
                yield key

    def _lowest_first(self, is_kept: Callable[[str], bool]) -> Iterator[Owner]:
        """Who has something, the lowest worth first.

        Args:
            is_kept: says of a tenant that its sessions are left out, from now on.
        """
        self._rank()
        tenants, numbers = iter(self._least.items()), itertools.count()
        following = next(tenants, None)
        begun: list[tuple[float, int, Owner, Iterator[tuple[Owner, float]]]] = []  # a heap: the next of each tenant
        while True:
            while following is not None and (not begun or following[1] <= begun[0][0]):
                if not is_kept(following[0]):
                    ranked = iter(self._ranked[following[0]].items())
                    owner, worth = next(ranked)
                    heappush(begun, (worth, next(numbers), owner, ranked))
                following = next(tenants, None)
            if not begun:
                return
            _, number, owner, ranked = begun[0]
            if is_kept(owner[0]):
                heappop(begun)
                continue
            yield owner
            after = next(ranked, None)
            if after is None:
                heappop(begun)
            else:
                heapreplace(begun, (after[1], number, after[0], ranked))

    def _rank(self) -> None:
        """Reckon the worths anew where that is due."""
        now = self._clock()
        if now < self._order_ends_at:
            return
        worths = {owner: self._worth(session=owner, now=now, position=0, abandoned=False) for owner in self._of}
        shared: dict[bytes, float] = {}  # what the worthiest owner is worth

        def place(owner: Owner) -> tuple[float, float]:
            tail = self._of[owner].keys[-1]
            owners = self._chunks[tail].owners
            if len(owners) == 1:
                return worths[owner], worths[owner]
            if tail not in shared:
                shared[tail] = max(map(worths.__getitem__, owners))
            return shared[tail], worths[owner]

        places = {owner: place(owner) for owner in worths}
        self._ranked, self._least = {}, {}
        for owner in sorted(places, key=places.__getitem__):
            self._ranked.setdefault(owner[0], {})[owner] = places[owner][0]
            self._least.setdefault(owner[0], places[owner][0])
        self._order_ends_at = now + _ORDER_HOLDS_S + len(worths) / _SESSIONS_A_SECOND

    def _may_leave(self, key: bytes, spared: Collection[bytes]) -> bool:
        return self._chunks[key].is_free and key not in spared and key not in self._awaited

    def _end_of(self, key: bytes) -> int:
        return self._chunks[key].end_token

    def _own(self, key: bytes, owner: Owner) -> None:
        chunk = self._chunks[key]
        if owner in chunk.owners:
            return
        session = self._of.get(owner)
        if session is None:
            session = self._of[owner] = _Session(owner)
            self._ranked.setdefault(owner[0], {})[owner] = inf
            self._least.setdefault(owner[0], inf)
        if owner in chunk.left_by:
            chunk.left_by = _without(chunk.left_by, owner)
            self._forget_abandoned(key, owner)
        if chunk.owners:
            chunk.owners = _with(chunk.owners, owner)
        else:
            self._held[owner[0]] += 1
            self._orphans.pop(key, None)
            chunk.owners = session.alone
        insort(session.keys, key, key=self._end_of)

    def _give_up(self, key: bytes, owner: Owner) -> None:
        """The session, which has the chunk in its list no more, does not own it any more."""
        chunk = self._chunks[key]
        chunk.owners = _without(chunk.owners, owner)
        if not chunk.owners:
            self._one_less(owner[0])
            self._orphans[key] = None

    def _take_out(self, key: bytes, owner: Owner) -> None:
        """Take a chunk out of its session's list."""
        keys = self._of[owner].keys
        if keys[-1] == key:
            keys.pop()
        else:
            del keys[keys.index(key, bisect_left(keys, self._end_of(key), key=self._end_of))]
        if not keys:
            self._went(owner)

    def _went(self, owner: Owner) -> None:
        """The session has nothing any more."""
        del self._of[owner]
        ranked = self._ranked[owner[0]]
        del ranked[owner]
        if not ranked:
            del self._ranked[owner[0]], self._least[owner[0]]

    def _one_less(self, tenant: str) -> None:
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]

    def _forget_abandoned(self, key: bytes, owner: Owner) -> None:
        abandoned = self._abandoned[owner]
        abandoned.discard(key)
        if not abandoned:
            del self._abandoned[owner]


def _with(owners: AbstractSet[Owner], owner: Owner) -> AbstractSet[Owner]:
    """The same and one more. A frozen set may be of many chunks; a set is of one."""
    if isinstance(owners, set):
        owners.add(owner)
        return owners
    return {*owners, owner}


def _without(owners: AbstractSet[Owner], owner: Owner) -> AbstractSet[Owner]:
    if isinstance(owners, set):
        owners.discard(owner)
        return owners
    return owners - {owner}
