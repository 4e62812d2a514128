"""Which session keeps which blocks on the device, and who yields first.

A lease is soft. It is a claim of one session on the blocks that hold its KV, head first, until a deadline. The table
decides and counts; it touches no block pool. What it decides comes back as a `Change`, which the caller applies at
once.

Rules:

- The table holds one reference for each block that it knows, however many sessions claim the block.
- All leases together hold at most `bound` blocks; one lease alone may hold that many.
- Whoever must yield does so from the tail: a prefix without its tail is worth something, a tail without its prefix
  nothing. The lease with the earliest deadline yields first, and no more than is wanted.
- Blocks come back tail first, so that a pool that evicts in that order evicts tails before heads.
- The clock is passed in.
"""

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from appliance.engine.protocol import Lease, LeaseState


class LeasedBlock(NamedTuple):
    """A block, how many of its session's tokens are cached once it is, and what tells its content from others'."""

    block_id: int
    end_token: int
    content: Hashable


@dataclass(frozen=True, slots=True)
class Change:
    """What the caller does to the pool: take a reference on each block of `taken`, then give back those of `freed`.

    `freed` is in the order in which the blocks are to be evicted.
    """

    taken: tuple[int, ...] = ()
    freed: tuple[int, ...] = ()


@dataclass(slots=True)
class _Claim:
    blocks: list[LeasedBlock]
    deadline: float
    turn: int  # tells a claim's entry in the heap of deadlines from the entries of earlier turns


_Key = tuple[str, str]  # tenant, session: no label reaches another tenant's blocks


class LeaseTable:
    """Every lease of one engine.

    Args:
        bound: the most blocks that all leases may hold together.
        clock: seconds; monotonic.
    """

    def __init__(self, bound: int, clock: Callable[[], float]) -> None:
        self._bound = bound
        self._clock = clock
        self._claims: dict[_Key, _Claim] = {}
        self._claims_on: dict[int, int] = {}
        self._deadlines: list[tuple[float, int, _Key]] = []
        self._turns = itertools.count()
        self.reclaimed_blocks_total = 0
        self.expired_total = 0

    @property
    def leased_blocks(self) -> int:
        """How many blocks the table holds a reference on."""
        return len(self._claims_on)

    def leased_block_ids(self) -> tuple[int, ...]:
        """The blocks that the table holds a reference on."""
        return tuple(self._claims_on)

    def grant(self, lease: Lease, blocks: Sequence[LeasedBlock]) -> Change:
        """Lease `blocks`, head first, to a session whose turn has ended.

        They replace what the session had: a longer history extends its lease, a branch of it replaces it. A beginning
        of what it has already changes nothing but the deadline. What the bound does not admit is left out at the tail.
        """
        key = _key(lease)
        before = self._claims.pop(key, None)
        after = list(blocks[: self._bound])
        if before is not None and _is_beginning(after, before.blocks):
            after = before.blocks
        taken = [block.block_id for block in after if self._claim(block.block_id)]
        freed = self._drop(before.blocks) if before is not None else []
        if after:
            self._claims[key] = claim = _Claim(after, 0.0, 0)
            self._set_deadline(key, claim, lease.idle_timeout_s)
            freed += self._take(len(self._claims_on) - self._bound, spared=key)
        return Change(tuple(taken), tuple(freed))

    def renew(self, lease: Lease) -> None:
        """Start the idle time of a session anew: its next turn has arrived and may have to queue."""
        key = _key(lease)
        claim = self._claims.get(key)
        if claim is not None:
            self._set_deadline(key, claim, lease.idle_timeout_s)

    def expire(self) -> Change:
        """End the leases whose deadline has come."""
        now = self._clock()
        freed: list[int] = []
        while (due := self._next_due()) is not None and due[0] <= now:
            freed += self._drop(self._claims.pop(due[2]).blocks)
            self.expired_total += 1
        return Change(freed=tuple(freed))

    def release(self, sessions: Iterable[str]) -> Change:
        """End the leases of the sessions so labelled."""
        labels = set(sessions)
        freed: list[int] = []
        for key in [key for key in self._claims if key[1] in labels]:
            freed += self._drop(self._claims.pop(key).blocks)
        return Change(freed=tuple(freed))

    def release_all(self) -> Change:
        """End every lease."""
        return self.release([session for _, session in self._claims])

    def yieldable(self, busy: Callable[[int], bool]) -> int:
        """How many blocks would be free if every lease yielded all it can. `busy` blocks are of no use to the pool."""
        return sum(not busy(block_id) for block_id in self._claims_on)

    def reclaim(self, wanted_blocks: int, busy: Callable[[int], bool]) -> Change:
        """Give up `wanted_blocks` blocks, or as many as there are.

        Args:
            wanted_blocks: how many blocks the pool is short of.
            busy: says of a block that giving it up makes no room, because a request uses it or is about to. Whoever
                uses a block uses all before it, so a lease whose tail is busy has nothing to give.
        """
        freed = self._take(wanted_blocks, busy=busy)
        self.reclaimed_blocks_total += len(freed)
        return Change(freed=tuple(freed))

    def next_expiry_in_s(self) -> float | None:
        """Seconds to the earliest deadline; at or below zero when it is due; `None` without leases."""
        due = self._next_due()
        return None if due is None else due[0] - self._clock()

    def states(self) -> tuple[LeaseState, ...]:
        """Every lease as it stands, the earliest deadline first."""
        now = self._clock()
        return tuple(
            LeaseState(
                session=key[1],
                tenant=key[0],
                blocks=len(claim.blocks),
                tokens=claim.blocks[-1].end_token,
                expires_in_s=claim.deadline - now,
            )
            for key, claim in self._by_deadline()
        )

    def _by_deadline(self) -> list[tuple[_Key, _Claim]]:
        return sorted(self._claims.items(), key=lambda item: (item[1].deadline, item[1].turn))

    def _take(
        self, wanted_blocks: int, *, busy: Callable[[int], bool] | None = None, spared: _Key | None = None
    ) -> list[int]:
        freed: list[int] = []
        if wanted_blocks <= 0:
            return freed
        for key, claim in self._by_deadline():
            if key == spared:
                continue
            while claim.blocks and not (busy is not None and busy(claim.blocks[-1].block_id)):
                if len(freed) == wanted_blocks:
                    return freed
                freed += self._drop([claim.blocks.pop()])
            if not claim.blocks:
                del self._claims[key]
        return freed

    def _claim(self, block_id: int) -> bool:
        claims = self._claims_on.get(block_id, 0)
        self._claims_on[block_id] = claims + 1
        return not claims

    def _drop(self, blocks: Sequence[LeasedBlock]) -> list[int]:
        freed: list[int] = []
        for block in reversed(blocks):
            self._claims_on[block.block_id] -= 1
            if not self._claims_on[block.block_id]:
                del self._claims_on[block.block_id]
                freed.append(block.block_id)
        return freed

    def _set_deadline(self, key: _Key, claim: _Claim, idle_timeout_s: float) -> None:
        claim.deadline = self._clock() + idle_timeout_s
        claim.turn = next(self._turns)
        if len(self._deadlines) > 2 * len(self._claims) + 64:
            self._deadlines = [(kept.deadline, kept.turn, name) for name, kept in self._claims.items()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (claim.deadline, claim.turn, key))

    def _next_due(self) -> tuple[float, int, _Key] | None:
        while self._deadlines:
            due = self._deadlines[0]
            claim = self._claims.get(due[2])
            if claim is not None and claim.turn == due[1]:
                return due
            heapq.heappop(self._deadlines)
        return None


def _is_beginning(blocks: Sequence[LeasedBlock], of: Sequence[LeasedBlock]) -> bool:
    # By content: a block that was computed once more has another id.
    return len(blocks) <= len(of) and all(
        block.content == other.content for block, other in zip(blocks, of, strict=False)
    )


def _key(lease: Lease) -> _Key:
    return lease.tenant, lease.session
