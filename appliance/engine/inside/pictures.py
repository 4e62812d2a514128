"""Sums up what the engine keeps, whatever that is, in one look at each lease.

Rules:

- Pure, and without vLLM.
- What it costs grows with the number of leases, what it says does not.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from appliance.engine.inside.disk.store import DiskStatus
from appliance.engine.picture import (
    DISK_FAULTS,
    MAX_TENANTS,
    NOT_STORED,
    OTHER_TENANTS,
    DiskPicture,
    KvPicture,
    SessionPicture,
    TenantPicture,
    TierPicture,
)
from appliance.engine.protocol import LeaseState


class Totals(NamedTuple):
    """What was counted since the engine began."""

    reclaimed_blocks: int
    expired_leases: int
    ignored_leases: int


def picture_of(
    leases: Sequence[LeaseState],
    *,
    block_size: int,
    tiers: Sequence[TierPicture],
    most_sessions: int,
    totals: Totals,
    worth: Callable[[LeaseState], float | None],
) -> KvPicture:
    """The picture of `leases`.

    Args:
        worth: of a session's KV, in hits a second; infinite: a request of it waits or runs; None: not known.
    """
    of_tenants: dict[str, list[int]] = {}
    worths: list[float] = []
    leased = 0
    for lease in leases:
        held = of_tenants.setdefault(lease.tenant, [0, 0])
        held[0] += 1
        held[1] += lease.blocks
        leased += lease.expires_in_s > 0
        if (known := _finite(worth(lease))) is not None:
            worths.append(known)
    worths.sort()
    largest = heapq.nlargest(most_sessions, leases, key=lambda lease: lease.tokens)
    return KvPicture(
        block_size=block_size,
        tiers=tuple(tiers),
        tenants=_tenants(of_tenants),
        sessions=tuple(
            SessionPicture(
                lease.tenant, lease.session, lease.blocks, lease.tokens, _finite(worth(lease)), lease.expires_in_s
            )
            for lease in largest
        ),
        sessions_total=len(leases),
        leased_sessions_total=leased,
        worths_hits_per_s=(worths[0], worths[len(worths) // 2], worths[-1]) if worths else (),
        reclaimed_blocks_total=totals.reclaimed_blocks,
        expired_leases_total=totals.expired_leases,
        ignored_leases_total=totals.ignored_leases,
    )


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


def _tenants(held: dict[str, list[int]]) -> tuple[TenantPicture, ...]:
    ranked = sorted(held.items(), key=lambda item: -item[1][1])
    named = tuple(TenantPicture(tenant, *counts) for tenant, counts in ranked[:MAX_TENANTS])
    rest = [counts for _, counts in ranked[MAX_TENANTS:]]
    if not rest:
        return named
    return (*named, TenantPicture(OTHER_TENANTS, sum(each[0] for each in rest), sum(each[1] for each in rest)))


def _finite(worth: float | None) -> float | None:
    return worth if worth is not None and math.isfinite(worth) else None
