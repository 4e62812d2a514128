"""The picture of what the engine keeps, whatever that is: as small with ten thousand sessions as with ten.

Rules:

- Pure, and without vLLM.
- Each tier counts what it has; here is chosen what of it is said.
"""

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple, Protocol

from appliance.engine.inside.disk.store import DiskStatus
from appliance.engine.inside.leases import Kept, TenantCounts
from appliance.engine.inside.quotas import Owner
from appliance.engine.picture import (
    DISK_FAULTS,
    MAX_TENANTS,
    NOT_STORED,
    OTHER_TENANTS,
    DiskPicture,
    HeldPicture,
    KvPicture,
    SessionPicture,
    TenantPicture,
    TierPicture,
)


class Holder(Protocol):
    """A tier, asked what it has."""

    def sizes(self) -> Iterable[tuple[Owner, int]]:
        """The sessions that have something, and how many blocks."""

    def kept_of(self, session: Owner) -> HeldPicture | None:
        """What a session has; None: nothing."""

    def blocks_by_tenant(self) -> Mapping[str, int]:
        """How many blocks the sessions of each tenant have; what two of them share counts once."""


class Totals(NamedTuple):
    """What was counted since the engine began, in all and of `tenants`, by their labels."""

    reclaimed_blocks: int
    expired_leases: int
    ignored_leases: int
    tenants: Mapping[str, TenantCounts]


def picture_of(
    kept: Kept,
    sessions: Sequence[SessionPicture],
    *,
    block_size: int,
    tiers: Sequence[TierPicture],
    holders: Mapping[str, Holder],
    totals: Totals,
    engine_life: str,
) -> KvPicture:
    """The picture of what is `kept`, with the sessions to name.

    Args:
        holders: what the tiers have, by their names.
    """
    return KvPicture(
        block_size=block_size,
        tiers=tuple(tiers),
        tenants=_tenants(kept, holders, totals.tenants),
        sessions=tuple(sessions),
        sessions_total=kept.sessions,
        leased_sessions_total=sum(kept.sessions_with_rank.values()),
        worths_hits_per_s=_of_worths(kept.worths.values()),
        reclaimed_blocks_total=totals.reclaimed_blocks,
        expired_leases_total=totals.expired_leases,
        ignored_leases_total=totals.ignored_leases,
        engine_life=engine_life,
    )


def largest(holders: Iterable[Holder], most: int, worth: Callable[[Owner], float]) -> tuple[SessionPicture, ...]:
    """The sessions that keep most in some tier, at most so many, and what of them each tier has.

    Args:
        worth: of a session, in hits a second; infinite: a request of it waits or runs.
    """
    if not most:
        return ()
    holders = tuple(holders)
    # What one tier has another has a copy of: their sum would say nothing.
    blocks: dict[Owner, int] = {}
    for holder in holders:
        for session, size in heapq.nlargest(most, holder.sizes(), key=itemgetter(1)):
            blocks[session] = max(size, blocks.get(session, 0))
    named = heapq.nlargest(most, blocks, key=blocks.__getitem__)
    return tuple(
        SessionPicture(
            *session, _finite(worth(session)), tuple(held for holder in holders if (held := holder.kept_of(session)))
        )
        for session in named
    )


def one(holders: Iterable[Holder], session: Owner, worth: Callable[[Owner], float]) -> tuple[SessionPicture, ...]:
    """What each tier has of one session; `worth` as for `largest`. Empty: nothing."""
    held = tuple(held for holder in holders if (held := holder.kept_of(session)))
    return (SessionPicture(*session, _finite(worth(session)), held),) if held else ()


def disk_picture(status: DiskStatus) -> DiskPicture:
    """What became of blocks on the disk, every cause with its count."""
    return DiskPicture(
        stored_blocks_total=status.stored_chunks,
        loaded_blocks_total=status.loaded_chunks,
        evicted_blocks_total=status.evicted_chunks,
        expired_blocks_total=status.expired_chunks,
        waiting_bytes=status.waiting_bytes,
        not_stored_total={cause: status.not_stored.get(cause, 0) for cause in NOT_STORED},
        faults_total={cause: status.faults.get(cause, 0) for cause in DISK_FAULTS},
        last_error=status.last_error,
        last_error_age_s=status.last_error_age_s,
    )


def _tenants(
    kept: Kept, holders: Mapping[str, Holder], counted: Mapping[str, TenantCounts]
) -> tuple[TenantPicture, ...]:
    by_tier = {tier: holder.blocks_by_tenant() for tier, holder in holders.items()}
    blocks = Counter[str]()
    for counts in by_tier.values():
        blocks.update(counts)

    def picture(label: str, tenants: Iterable[str]) -> TenantPicture:
        tenants = tuple(tenants)
        counts = [counted[tenant] for tenant in tenants if tenant in counted]
        return TenantPicture(
            label,
            sessions=sum(kept.tenants[tenant].sessions for tenant in tenants if tenant in kept.tenants),
            leased_sessions=sum(kept.sessions_with_rank.get(tenant, 0) for tenant in tenants),
            blocks={tier: sum(held.get(tenant, 0) for tenant in tenants) for tier, held in by_tier.items()},
            worths_hits_per_s=_of_worths(kept.worths.get(tenant, ()) for tenant in tenants),
            reclaimed_blocks_total=sum(each.reclaimed_blocks for each in counts),
            expired_leases_total=sum(each.expired_leases for each in counts),
        )

    # Those that keep nothing are shown for what was counted of them, the newest first.
    ranked = [tenant for tenant, _ in blocks.most_common()]
    ranked += [tenant for tenant in reversed(list(counted)) if tenant not in blocks]
    named = tuple(picture(tenant, [tenant]) for tenant in ranked[:MAX_TENANTS])
    rest = ranked[MAX_TENANTS:]
    return (*named, picture(OTHER_TENANTS, rest)) if rest else named


def _of_worths(ascending: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """The lowest, the middle and the highest of several rows; empty: there is none."""
    worths = sorted(itertools.chain.from_iterable(ascending))
    return (worths[0], worths[len(worths) // 2], worths[-1]) if worths else ()


def _finite(worth: float) -> float | None:
    return worth if math.isfinite(worth) else None
