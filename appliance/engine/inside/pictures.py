"""The picture of what the engine keeps, whatever that is: as small with ten thousand sessions as with ten.

Rules:

- Pure, and without vLLM.
- The lease table counts; here is chosen what of it is said.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from appliance.engine.inside.disk.store import DiskStatus
from appliance.engine.inside.leases import Kept, TenantKeeps
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
    kept: Kept,
    largest: Sequence[tuple[LeaseState, float]],
    *,
    block_size: int,
    tiers: Sequence[TierPicture],
    totals: Totals,
) -> KvPicture:
    """The picture of what is `kept`.

    Args:
        largest: the sessions to name, each with its worth in hits a second; infinite: a request of it waits or runs.
    """
    worths = kept.worths
    return KvPicture(
        block_size=block_size,
        tiers=tuple(tiers),
        tenants=_tenants(kept.tenants),
        sessions=tuple(
            SessionPicture(lease.tenant, lease.session, lease.blocks, lease.tokens, _finite(worth), lease.expires_in_s)
            for lease, worth in largest
        ),
        sessions_total=kept.sessions,
        leased_sessions_total=kept.sessions_with_rank,
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


def _tenants(kept: Mapping[str, TenantKeeps]) -> tuple[TenantPicture, ...]:
    ranked = sorted(kept.items(), key=lambda item: -item[1].blocks)
    named = tuple(TenantPicture(tenant, keeps.sessions, keeps.blocks) for tenant, keeps in ranked[:MAX_TENANTS])
    rest = [keeps for _, keeps in ranked[MAX_TENANTS:]]
    if not rest:
        return named
    others = TenantPicture(OTHER_TENANTS, sum(each.sessions for each in rest), sum(each.blocks for each in rest))
    return (*named, others)


def _finite(worth: float) -> float | None:
    return worth if math.isfinite(worth) else None
