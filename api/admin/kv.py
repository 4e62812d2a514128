"""What is kept of sessions, put together from what the engine says and what the gateway counted."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from typing import Final

from api.admin import types
from api.kv_watch import Seen, troubles
from api.services import Services
from appliance.engine.picture import (
    CanaryPicture,
    DiskPicture,
    RecallPicture,
    SessionPicture,
    TenantPicture,
    worths_together,
)
from appliance.errors import HoldfastError
from appliance.sessions import LastTurn, Quantiles, SessionSummary, Sums
from appliance.sessions.keeping import Keeping, keeping
from appliance.sessions.labels import tenant_label
from appliance.sessions.ledger import served_by_tier

_ASKED_WITHIN_S: Final = 3.0


async def kv_status(services: Services, most_sessions: int) -> types.KvStatus:
    """Look now. What the engine does not say in time is left out, and what the gateway counted stands."""
    seen = await services.kv.look(most_sessions)
    picture = None if seen is None else seen.picture
    ledger = services.ledger
    sums = ledger.sums
    rate = services.kv.reclaimed_blocks_per_s()
    now = services.now()
    return types.KvStatus(
        observed_at=now,
        age_s=None if seen is None else services.kv.age_s(seen),
        counted_since=services.lifecycle.started_at,
        block_size_tokens=None if picture is None else picture.block_size,
        tiers=[] if seen is None else _tiers(seen, sums),
        disk=None if picture is None or picture.disk is None else _disk(picture.disk),
        canary=None if picture is None or picture.canary is None else _canary(picture.canary),
        recall=None if picture is None or picture.recall is None else _recall(picture.recall),
        kept_sessions=None if picture is None else picture.sessions_total,
        leased_sessions=None if picture is None else picture.leased_sessions_total,
        worths_hits_per_s=[] if picture is None else list(picture.worths_hits_per_s),
        reclaimed_blocks_total=None if picture is None else picture.reclaimed_blocks_total,
        reclaimed_blocks_per_s=None if rate is None else rate[0],
        reclaimed_over_s=None if rate is None else rate[1],
        expired_leases_total=None if picture is None else picture.expired_leases_total,
        ignored_leases_total=None if picture is None else picture.ignored_leases_total,
        turns=sums.turns,
        prompt_tokens=sums.prompt_tokens,
        repeated_tokens=sums.repeated_tokens,
        found_tokens=dict(sums.served),
        computed_tokens={cause.value: tokens for cause, tokens in sums.computed.items()},
        warm=_first_tokens(ledger.first_tokens(warm=True)),
        cold=_first_tokens(ledger.first_tokens(warm=False)),
        tenants=_tenants(services, seen, await _quotas(services)),
        sessions=[] if picture is None else [_session(services, each) for each in picture.sessions[:most_sessions]],
    )


async def kept_of_session(services: Services, session: SessionSummary) -> SessionPicture | None:
    """What the engine has of a session now; None: it could not be asked."""
    try:
        of = tenant_label(services.vault, session.tenant_id), session.lease_label
        picture = await services.engine.kv(of=of, deadline_s=_ASKED_WITHIN_S)
    except HoldfastError:
        return None
    return next(iter(picture.sessions), SessionPicture(*of, None, ()))


def _tiers(seen: Seen, sums: Sums) -> list[types.KvTier]:
    trouble = troubles(seen.picture)
    return [
        types.KvTier.model_validate(
            {
                "tier": tier.tier,
                "state": tier.state,
                "detail": trouble.get(tier.tier, ""),
                "block_bytes": tier.block_bytes,
                "capacity_blocks": tier.capacity_blocks,
                "used_blocks": tier.used_blocks,
                "leased_blocks": tier.leased_blocks,
                "sessions": tier.sessions,
                "free_blocks": max(0, tier.capacity_blocks - tier.used_blocks),
                "capacity_bytes": tier.capacity_blocks * tier.block_bytes,
                "used_bytes": tier.used_blocks * tier.block_bytes,
                "found_tokens": sums.served[tier.tier],
                "found_share": sums.served[tier.tier] / sums.prompt_tokens if sums.prompt_tokens else None,
            }
        )
        for tier in seen.picture.tiers
    ]


def _disk(disk: DiskPicture) -> types.KvDisk:
    return types.KvDisk(
        stored_blocks_total=disk.stored_blocks_total,
        loaded_blocks_total=disk.loaded_blocks_total,
        evicted_blocks_total=disk.evicted_blocks_total,
        expired_blocks_total=disk.expired_blocks_total,
        waiting_bytes=disk.waiting_bytes,
        not_stored_total=dict(disk.not_stored_total),
        faults_total=dict(disk.faults_total),
        last_error=disk.last_error or None,
        last_error_age_s=disk.last_error_age_s,
    )


def _canary(canary: CanaryPicture) -> types.KvCanary:
    return types.KvCanary(
        compared_blocks_total=canary.compared_blocks_total,
        worst_error=canary.worst_error,
        quarantined=canary.quarantined,
        compared_age_s=canary.compared_age_s,
        dropped_samples_total=canary.dropped_samples_total,
    )


def _recall(recall: RecallPicture) -> types.KvRecall:
    return types.KvRecall(
        recalled_blocks_total=recall.recalled_blocks_total,
        used_blocks_total=recall.used_blocks_total,
        in_vain_blocks_total=recall.in_vain_blocks_total,
        paused_for_s=recall.paused_for_s,
    )


async def _quotas(services: Services) -> dict[str, Keeping]:
    """What is in force for each tenant whose row opens, by its id; empty where none can be read now."""
    try:
        tenants, _ = await services.identity.survey()
    except HoldfastError:
        return {}
    return {tenant.tenant_id: keeping(services.settings.sessions, tenant, "") for tenant in tenants}


def _tenants(services: Services, seen: Seen | None, quotas: Mapping[str, Keeping]) -> list[types.KvTenant]:
    """Those that keep something or had a turn; the largest first."""
    ledger = services.ledger
    pictures, blocks = defaultdict[str, list[TenantPicture]](list), defaultdict[str, Counter[str]](Counter)
    for each in () if seen is None else seen.picture.tenants:
        tenant_id = ledger.tenant_of(each.tenant)
        pictures[tenant_id].append(each)
        blocks[tenant_id].update(each.blocks)
    views = []
    for tenant_id in {**blocks, **ledger.sums_of}:
        sums, those = ledger.sums_of.get(tenant_id, Sums()), pictures[tenant_id]
        views.append(
            types.KvTenant(
                tenant_id=tenant_id,
                kept_sessions=sum(each.sessions for each in those),
                leased_sessions=sum(each.leased_sessions for each in those),
                worths_hits_per_s=list(worths_together([each.worths_hits_per_s for each in those])),
                reclaimed_blocks_total=sum(each.reclaimed_blocks_total for each in those),
                expired_leases_total=sum(each.expired_leases_total for each in those),
                kept=_tenant_tiers(seen, blocks[tenant_id], quotas.get(tenant_id)),
                turns=sums.turns,
                prompt_tokens=sums.prompt_tokens,
                repeated_tokens=sums.repeated_tokens,
                found_tokens=dict(sums.served),
                computed_tokens={cause.value: tokens for cause, tokens in sums.computed.items()},
                warm=_first_tokens(ledger.first_tokens(warm=True, tenant_id=tenant_id)),
                cold=_first_tokens(ledger.first_tokens(warm=False, tenant_id=tenant_id)),
            )
        )
    return sorted(views, key=lambda view: (-blocks[view.tenant_id].total(), -view.prompt_tokens))


def _tenant_tiers(seen: Seen | None, blocks: Mapping[str, int], quota: Keeping | None) -> list[types.KvTenantTier]:
    is_capped = quota is not None and quota.tenant_cap < 1
    return [
        types.KvTenantTier.model_validate(
            {
                "tier": tier.tier,
                "blocks": blocks.get(tier.tier, 0),
                "share_blocks": None if quota is None else int(quota.tenant_share * tier.capacity_blocks),
                "cap_blocks": int(quota.tenant_cap * tier.capacity_blocks) if quota and is_capped else None,
            }
        )
        for tier in (() if seen is None else seen.picture.tiers)
    ]


def _session(services: Services, kept: SessionPicture) -> types.KvSession:
    last = services.ledger.of_labels(kept.tenant, kept.session)
    return types.KvSession(
        session_id=None if last is None else last.of.session_id,
        tenant_id=None if last is None else last.of.tenant_id,
        worth_hits_per_s=kept.worth_hits_per_s,
        kept=[types.KvHeld.model_validate(asdict(each)) for each in kept.held],
        last_turn=None if last is None else _last_turn(last),
    )


def _last_turn(last: LastTurn) -> types.KvLastTurn:
    account = last.account
    return types.KvLastTurn(
        ended_at=last.ended_at,
        prompt_tokens=account.prompt_tokens,
        found_tokens={tier: tokens for tier, tokens in served_by_tier(account).items() if tokens},
        computed_tokens={cause.value: tokens for cause, tokens in account.computed.items()},
        first_token_s=last.first_token_s,
    )


def _first_tokens(quantiles: Quantiles | None) -> types.FirstTokens | None:
    if quantiles is None:
        return None
    return types.FirstTokens(
        turns=quantiles.turns,
        p50_s=quantiles.p50_s,
        p90_s=quantiles.p90_s,
        p99_s=quantiles.p99_s,
        since=quantiles.since,
    )
