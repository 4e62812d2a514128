"""What is on the disk, whose it is, and what leaves first. Pure: no clock, no file.

Rules:

- What is being written has its room already: the tier never grows beyond its bound.
- What a session diverged from goes first, whosever it is, and counts for nobody; whoever asks for it again has it back.
  A start does not know: then the session's next request tells.
- Then room is made by dropping the sessions that are worth least, tail first; among equals, those unused for longest.
  Where there are more than `_LOOKED_AT` sessions, that many are looked at, drawn at random: bounded work, and what is
  worth much is never among the least of so many.
- No tenant's chunks leave for another's below its share; what comes in keeps to its tenant's and its session's caps.
- What is being loaded stays.
- A session that was not used for `ttl_s` goes as a whole.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Final, NamedTuple

from appliance.engine.inside.disk.files import ChunkName, Owner
from appliance.engine.inside.quotas import Quota, Quotas
from appliance.engine.picture import HeldPicture

_LOOKED_AT: Final = 512
_SPARE_SHARE: Final = 50  # room is made for a fiftieth more than is wanted, so that it is not looked for each time


class Place(NamedTuple):
    """Where a session's chunk is."""

    position: int
    copy: bytes


class Held:
    """What the disk holds of one session.

    Attributes:
        chunks: by key.
        left: what it diverged from, by key.
        used_at: by the caller's clock.
        loading: how many of its chunks are being read.
        gone: it was dropped; what is still being written of it is dropped, too.
    """

    __slots__ = ("chunks", "gone", "left", "loading", "owner", "used_at", "writing")

    def __init__(self, owner: Owner, used_at: float) -> None:
        self.owner = owner
        self.used_at = used_at
        self.chunks: dict[bytes, Place] = {}
        self.left: dict[bytes, Place] = {}
        self.writing = 0
        self.loading = 0
        self.gone = False

    def place(self, key: bytes) -> Place:
        """Where a chunk of its is, one that it diverged from too."""
        return self.left[key] if key in self.left else self.chunks[key]

    def names(self) -> Iterator[ChunkName]:
        """Its chunks."""
        return self._named(self.chunks)

    def names_left(self) -> Iterator[ChunkName]:
        """What it diverged from."""
        return self._named(self.left)

    def _named(self, places: Mapping[bytes, Place]) -> Iterator[ChunkName]:
        return (ChunkName(self.owner, key, place.position, place.copy) for key, place in places.items())


class DiskIndex:
    """The chunks of every session.

    Args:
        capacity: how many chunks there may be.
        ttl_s: for how long a session may be unused.
        seed: of the draw among many sessions.
    """

    def __init__(self, capacity: int, ttl_s: float, *, seed: int = 0) -> None:
        self.capacity = capacity
        self.quotas = Quotas(capacity)
        self._chunks_of: Counter[str] = Counter()  # by tenant; those that are being written, too
        self._ttl_s = ttl_s
        self._random = Random(seed)  # noqa: S311  (a sample, no secret)
        self._sessions: OrderedDict[Owner, Held] = OrderedDict()  # used longest ago first
        self._by_key: dict[bytes, Held] = {}
        self._writing: dict[bytes, Held] = {}
        self._diverged: dict[Owner, Held] = {}  # those that left something

    def __len__(self) -> int:
        """How many chunks are there."""
        return len(self._by_key)

    @property
    def sessions(self) -> int:
        """How many sessions have something."""
        return len(self._sessions)

    def chunks_of_tenant(self, tenant: str) -> int:
        """How many chunks a tenant's sessions have; those that are being written, too."""
        return self._chunks_of[tenant]

    def used_last(self, most: int) -> list[tuple[Owner, int]]:
        """The sessions that were used last, at most so many, and how many chunks each has."""
        return [(held.owner, len(held.chunks)) for held in itertools.islice(reversed(self._sessions.values()), most)]

    def kept_of(self, owner: Owner, now: float) -> HeldPicture | None:
        """What there is of a session; None: nothing."""
        held = self._sessions.get(owner)
        if held is None or not held.chunks:
            return None
        kept_for = "worth"
        if held.loading or held.writing:
            kept_for = "in_use"
        elif self.quotas.above_share(owner.tenant, self._chunks_of[owner.tenant], "") <= 0:
            kept_for = "share"
        last = max(place.position for place in held.chunks.values())
        return HeldPicture("disk", len(held.chunks), last, kept_for, held.used_at + self._ttl_s - now)

    def chunks_by_tenant(self) -> dict[str, int]:
        """How many chunks the sessions of each tenant have; those that are being written, too."""
        return dict(self._chunks_of)

    @property
    def room(self) -> int:
        """How many chunks more there may be; below zero where there are too many."""
        return self.capacity - len(self._by_key) - len(self._writing)

    def holder(self, key: bytes) -> Held | None:
        """Whose chunk of that key is there."""
        return self._by_key.get(key)

    def owners(self) -> list[Owner]:
        """The sessions that have something."""
        return list(self._sessions)

    def session(self, owner: Owner) -> Held | None:
        """What there is of a session."""
        return self._sessions.get(owner)

    def is_writing(self, key: bytes) -> bool:
        """Whether a chunk of that key is being written."""
        return key in self._writing

    def used(self, owner: Owner, now: float) -> Held:
        """Note that a session is used; what there is of it."""
        held = self._sessions.get(owner)
        if held is None:
            held = self._sessions[owner] = Held(owner, now)
        held.used_at = now
        self._sessions.move_to_end(owner)
        return held

    def reached(self, owner: Owner, positions: Mapping[bytes, int]) -> None:
        """A request of a session is over.

        Args:
            positions: the request's chunks, here or not, and the token that each ends at. What the session has beside
                them, and the request left at an earlier token than its end, it diverged from.
        """
        held = self._sessions.get(owner)
        if held is None:
            return
        for key in held.left.keys() & positions.keys():
            self.back(held, key)
        end = max(positions.values(), default=0)
        beside = [key for key in held.chunks if key not in positions]
        if not any(held.chunks[key].position <= end for key in beside):
            return  # it is a beginning of what there is
        for key in beside:
            held.left[key] = held.chunks.pop(key)
            self._one_less(owner.tenant)
        self._diverged[owner] = held

    def back(self, held: Held, key: bytes) -> None:
        """Somebody asks again for a chunk that its session diverged from."""
        held.chunks[key] = held.left.pop(key)
        self._chunks_of[held.owner.tenant] += 1
        if not held.left:
            del self._diverged[held.owner]

    def found(self, name: ChunkName, used_at: float) -> bool:
        """Take up what a scan found; whether it is new. Sessions are to come in the order of their last use."""
        if name.key in self._by_key:
            return False
        held = self._sessions.setdefault(name.owner, Held(name.owner, used_at))
        self._add(held, name)
        return True

    def begin(self, held: Held, key: bytes) -> None:
        """Give a chunk its room before it is written."""
        held.writing += 1
        self._writing[key] = held
        self._chunks_of[held.owner.tenant] += 1

    def ended(self, held: Held, name: ChunkName, *, written: bool) -> bool:
        """A chunk's write is over; whether it is there from now on."""
        held.writing -= 1
        self._one_less(held.owner.tenant)
        if self._writing.get(name.key) is held:
            del self._writing[name.key]
        if held.gone:
            return False
        if written and name.key not in self._by_key:
            self._add(held, name)
            return True
        self.tidy(held)
        return False

    def remove(self, name: ChunkName) -> bool:
        """Forget one chunk; whether it was there."""
        held = self._by_key.get(name.key)
        if held is None or held.place(name.key) != Place(name.position, name.copy):
            return False
        self._remove(held, name.key)
        self.tidy(held)
        return True

    def drop(self, owner: Owner) -> list[ChunkName]:
        """Forget a session; its chunks."""
        held = self._sessions.pop(owner, None)
        if held is None:
            return []
        held.gone = True
        self.quotas.forget(owner)
        names = [*held.names(), *held.names_left()]
        for name in names:
            self._remove(held, name.key)
        return names

    def expired(self, now: float) -> list[ChunkName]:
        """Forget the sessions that were unused for too long; their chunks."""
        names: list[ChunkName] = []
        while self._sessions:
            owner, held = next(iter(self._sessions.items()))
            if now - held.used_at < self._ttl_s:
                break
            if held.writing or held.loading:
                self.used(owner, now)
                continue
            names += self.drop(owner)
        return names

    def next_expiry_in_s(self, now: float) -> float | None:
        """When a session expires next, if there is any."""
        oldest = next(iter(self._sessions.values()), None)
        return None if oldest is None else max(0.0, oldest.used_at + self._ttl_s - now)

    def make_way(
        self, held: Held, ends: Sequence[int], quota: Quota, worth: Callable[[Owner], float]
    ) -> tuple[int, list[ChunkName]]:
        """How many of the chunks that a session brings in have room, from its head on; what was forgotten for them.

        Args:
            ends: the tokens that the chunks end at, ascending.
        """
        owner, quotas = held.owner, self.quotas
        before = quotas.can_follow(owner, ends)
        coming = len(ends) if before is None else sum(end < before for end in ends)
        within = quotas.within_cap(quota, coming, len(held.chunks) + held.writing)
        over = quotas.over_cap(quota, self._chunks_of[owner.tenant] + within)
        own = self._forget(over, worth, owner.tenant, spared=held, only=owner.tenant)
        for name in own:
            quotas.lost(name.owner, name.position)
        within = max(0, within - over + len(own))
        missing = within - self.room
        others = self._forget(missing + self._slack(missing), worth, owner.tenant, spared=held)
        fits = min(within, max(0, self.room))
        if fits < coming and (fits == within or self._is_withheld(held)):
            quotas.lost(owner, ends[fits])
        return fits, own + others

    def make_room(self, worth: Callable[[Owner], float]) -> list[ChunkName]:
        """Forget what is worth least until there is no more than may be; what was forgotten."""
        return self._forget(-self.room + self._slack(-self.room), worth, None)

    def tidy(self, held: Held) -> None:
        """Forget a session of which there is nothing."""
        is_empty = not (held.chunks or held.left or held.writing or held.loading)
        if is_empty and self._sessions.get(held.owner) is held:
            del self._sessions[held.owner]

    def _slack(self, missing: int) -> int:
        return self.capacity // _SPARE_SHARE if missing > 0 else 0

    def _forget(
        self,
        wanted: int,
        worth: Callable[[Owner], float],
        wanted_by: str | None,
        *,
        spared: Held | None = None,
        only: str | None = None,
    ) -> list[ChunkName]:
        """Forget so many chunks, or as many as may leave: what was diverged from, then what is worth least, tail first.

        Args:
            worth: of a session; see `RetentionPolicy.value`.
            wanted_by: the tenant that they leave for; None: shares do not count.
            spared: a session of which nothing leaves.
            only: a tenant: chunks of its sessions alone.
        """
        names: list[ChunkName] = []
        if wanted <= 0:
            return names
        if only is None:  # it counts for no tenant, so that its going helps none that is at its cap
            names += self._forget_left(wanted, spared)
        if len(names) >= wanted:
            return names
        for held in self._worst(worth, spared, wanted_by, only):
            tenant = held.owner.tenant
            most = wanted - len(names)
            if wanted_by is not None:
                most = min(most, self.quotas.above_share(tenant, self._chunks_of[tenant], wanted_by))
            tail_first = sorted(held.names(), key=lambda name: name.position, reverse=True)
            going = tail_first[: max(0, most)]
            for name in going:
                self._remove(held, name.key)
            names += going
            self.tidy(held)
            if len(names) >= wanted:
                break
        return names

    def _forget_left(self, wanted: int, bringing: Held | None) -> list[ChunkName]:
        """Forget so many of the chunks that sessions diverged from, or as many as there are.

        Args:
            bringing: the session that they leave for, which stays though nothing of it is left.
        """
        left = (name for held in self._diverged.values() if not held.loading for name in held.names_left())
        names = list(itertools.islice(left, wanted))
        for name in names:
            held = self._by_key[name.key]
            self._remove(held, name.key)
            if held is not bringing:
                self.tidy(held)
        return names

    def _is_withheld(self, spared: Held) -> bool:
        """Whether something could leave if no tenant had a share."""
        idle = (held.chunks and not held.loading and held is not spared for held in self._sessions.values())
        return bool(self.quotas.shares) and any(idle)

    def _one_less(self, tenant: str) -> None:
        self._chunks_of[tenant] -= 1
        if not self._chunks_of[tenant]:
            del self._chunks_of[tenant]

    def _worst(
        self, worth: Callable[[Owner], float], spared: Held | None, wanted_by: str | None, only: str | None
    ) -> list[Held]:
        sessions = list(self._sessions.values())
        if only is not None:
            sessions = [held for held in sessions if held.owner.tenant == only]
        elif wanted_by is not None and self.quotas.shares:
            above = {
                tenant: self.quotas.above_share(tenant, chunks, wanted_by) > 0
                for tenant, chunks in self._chunks_of.items()
            }
            sessions = [held for held in sessions if above.get(held.owner.tenant)]
        if len(sessions) > _LOOKED_AT:
            sessions = self._random.sample(sessions, _LOOKED_AT)
        idle = [held for held in sessions if not held.loading and held.chunks and held is not spared]
        return sorted(idle, key=lambda held: (worth(held.owner), held.used_at))

    def _add(self, held: Held, name: ChunkName) -> None:
        held.chunks[name.key] = Place(name.position, name.copy)
        self._by_key[name.key] = held
        self._chunks_of[held.owner.tenant] += 1
        self.quotas.came(held.owner, name.position)

    def _remove(self, held: Held, key: bytes) -> None:
        del self._by_key[key]
        if key in held.chunks:
            del held.chunks[key]
            self._one_less(held.owner.tenant)
            return
        del held.left[key]
        if not held.left:
            del self._diverged[held.owner]
