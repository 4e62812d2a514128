"""What the engine keeps, for Prometheus: the gateway's page has it, so that the engine's need not be reachable.

Rules:

- The engine is asked for a summary when the page is read, never for its sessions. If it does not answer in time, the
  page has no such gauges, rather than old ones, and its counters stand (`kv_counts`).
- A tenant's label is its id, as everywhere on the page; those that the gateway has not met in this life are `other`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.kv_counts import Counted
from api.kv_watch import Seen
from api.services import Services
from appliance.engine.picture import (
    TIER_STATES,
    CanaryPicture,
    DiskPicture,
    KvPicture,
    RecallPicture,
    TenantPicture,
    TierPicture,
    worths_together,
)

_OF_TIERS: dict[str, tuple[str, Callable[[TierPicture], float]]] = {
    "holdfast_kv_tier_capacity_blocks": ("Blocks that a tier can hold.", lambda tier: tier.capacity_blocks),
    "holdfast_kv_tier_used_blocks": ("Blocks of a tier that are taken.", lambda tier: tier.used_blocks),
    "holdfast_kv_tier_leased_blocks": (
        "Blocks of a tier that sessions hold whose lease runs; they yield to whoever needs the room.",
        lambda tier: tier.leased_blocks,
    ),
    "holdfast_kv_tier_sessions": ("Sessions that have something in a tier.", lambda tier: tier.sessions),
    "holdfast_kv_tier_capacity_bytes": (
        "Bytes that a tier can hold.",
        lambda tier: tier.capacity_blocks * tier.block_bytes,
    ),
    "holdfast_kv_tier_used_bytes": (
        "Bytes of a tier that are taken.",
        lambda tier: tier.used_blocks * tier.block_bytes,
    ),
}
_WORTHS = ("lowest", "median", "highest")
_WORTHS_TOGETHER = ("lowest", "highest")
_COUNTERS: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "holdfast_kv_reclaimed_blocks": ("Blocks that leases gave up for others, by whose leases they were.", ("tenant",)),
    "holdfast_kv_expired_leases": ("Leases that ran out.", ("tenant",)),
    "holdfast_kv_ignored_leases": ("Malformed leases that requests carried.", ()),
    "holdfast_kv_tier_stored_blocks": ("Blocks that were written to a tier.", ("tier",)),
    "holdfast_kv_tier_loaded_blocks": ("Blocks that were read from a tier.", ("tier",)),
    "holdfast_kv_tier_evicted_blocks": ("Blocks that left a tier for others.", ("tier",)),
    "holdfast_kv_tier_expired_blocks": ("Blocks that left a tier unused.", ("tier",)),
    "holdfast_kv_tier_not_stored_blocks": (
        "Blocks that a tier did not take, by cause. No request waited for it.",
        ("tier", "cause"),
    ),
    "holdfast_kv_tier_faults": (
        "Blocks that a tier could not give back, by cause. They were computed again.",
        ("tier", "cause"),
    ),
    "holdfast_kv_canary_compared_blocks": ("Restored blocks that were computed again to compare them.", ()),
    "holdfast_kv_canary_dropped_samples": (
        "Restored blocks were noted and went without having been compared: the engine was busy, or their session over.",
        (),
    ),
    "holdfast_kv_recalled_blocks": (
        "Blocks that were read from the disk into DRAM before a request asked for them.",
        (),
    ),
    "holdfast_kv_recalled_used_blocks": ("Recalled blocks that a request loaded.", ()),
    "holdfast_kv_recalled_in_vain_blocks": ("Recalled blocks that left DRAM before a request loaded them.", ()),
}
"""By a counter's name: what it counts, and its labels."""


async def exposition(services: Services) -> bytes:
    """The text that Prometheus scrapes, with what the engine keeps now."""
    await services.kv.look()
    return services.metrics.exposition()


class KvCollector(Collector):
    """What the engine keeps, as it was seen last.

    Args:
        seen: the picture that the page is to show; None: none is to be had.
        totals: what the engine counted so far.
        tenant_of: a tenant's id for the engine's label of it.
    """

    def __init__(
        self, seen: Callable[[], Seen | None], totals: Mapping[Counted, int], tenant_of: Callable[[str], str]
    ) -> None:
        self._seen = seen
        self._totals = totals
        self._tenant_of = tenant_of

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known when there is a picture."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The counters, and the gauges of one picture."""
        yield from self._counters()
        seen = self._seen()
        if seen is None:
            return
        picture = seen.picture
        for name, (help_text, value) in _OF_TIERS.items():
            family = GaugeMetricFamily(name, help_text, labels=("tier",))
            for tier in picture.tiers:
                family.add_metric((tier.tier,), value(tier))
            yield family
        states = GaugeMetricFamily(
            "holdfast_kv_tier_state", "1 for the state that a tier is in, 0 for the others.", labels=("tier", "state")
        )
        for tier in picture.tiers:
            for state in TIER_STATES:
                states.add_metric((tier.tier, state), float(tier.state == state))
        yield states
        sessions = GaugeMetricFamily(
            "holdfast_kv_sessions", "Sessions that keep KV on the device, by their lease.", labels=("lease",)
        )
        sessions.add_metric(("running",), picture.leased_sessions_total)
        sessions.add_metric(("over",), picture.sessions_total - picture.leased_sessions_total)
        yield sessions
        worths = GaugeMetricFamily(
            "holdfast_kv_worth_hits_per_second",
            "The worth of keeping a session's KV: the lowest leaves first.",
            labels=("rank",),
        )
        for rank, worth in _worths([picture.worths_hits_per_s]):
            worths.add_metric((rank,), worth)
        yield worths
        yield from self._tenants(picture)
        if picture.disk is not None:
            yield from _disk(picture.disk)
        if picture.canary is not None:
            yield from _canary(picture.canary)
        if picture.recall is not None:
            yield from _recall(picture.recall)

    def _counters(self) -> Iterable[Metric]:
        series = defaultdict[str, list[tuple[tuple[str, ...], int]]](list)
        for counted, total in self._totals.items():
            series[counted.metric].append((counted.labels, total))
        for name, (help_text, labels) in _COUNTERS.items():
            family = CounterMetricFamily(name, help_text, labels=labels)
            for values, total in series[name]:
                family.add_metric(values, total)
            if family.samples:
                yield family

    def _tenants(self, picture: KvPicture) -> Iterable[Metric]:
        tenants = defaultdict[str, list[TenantPicture]](list)
        for each in picture.tenants:
            tenants[self._tenant_of(each.tenant)].append(each)
        sessions = GaugeMetricFamily(
            "holdfast_kv_tenant_sessions",
            "Sessions of a tenant that keep KV on the device, by their lease.",
            labels=("tenant", "lease"),
        )
        blocks = GaugeMetricFamily(
            "holdfast_kv_tenant_blocks", "Blocks of a tier that sessions of a tenant have.", labels=("tenant", "tier")
        )
        worths = GaugeMetricFamily(
            "holdfast_kv_tenant_worth_hits_per_second",
            "As holdfast_kv_worth_hits_per_second, of a tenant's sessions; of several tenants without a median.",
            labels=("tenant", "rank"),
        )
        for tenant_id, those in tenants.items():
            leased = sum(each.leased_sessions for each in those)
            sessions.add_metric((tenant_id, "running"), leased)
            sessions.add_metric((tenant_id, "over"), sum(each.sessions for each in those) - leased)
            in_tiers = Counter[str]()
            for each in those:
                in_tiers.update(each.blocks)
            for tier, count in in_tiers.items():
                blocks.add_metric((tenant_id, tier), count)
            for rank, worth in _worths([each.worths_hits_per_s for each in those]):
                worths.add_metric((tenant_id, rank), worth)
        return sessions, blocks, worths


def _worths(rows: Iterable[Sequence[float]]) -> Iterable[tuple[str, float]]:
    worths = worths_together(rows)
    return zip(_WORTHS if len(worths) == len(_WORTHS) else _WORTHS_TOGETHER, worths, strict=False)


def _disk(disk: DiskPicture) -> Iterable[Metric]:
    waiting = GaugeMetricFamily("holdfast_kv_tier_waiting_bytes", "Bytes that wait to be written.", labels=("tier",))
    waiting.add_metric(("disk",), disk.waiting_bytes)
    yield waiting
    if disk.last_error_age_s is not None:
        age = GaugeMetricFamily(
            "holdfast_kv_tier_last_error_age_seconds", "How long ago a tier's last error was.", labels=("tier",)
        )
        age.add_metric(("disk",), disk.last_error_age_s)
        yield age


def _canary(canary: CanaryPicture) -> Iterable[Metric]:
    if canary.worst_error is not None:
        yield GaugeMetricFamily(
            "holdfast_kv_canary_worst_error",
            "The largest error of a restored block, as a share of the values' root mean square.",
            value=canary.worst_error,
        )
    if canary.compared_age_s is not None:
        yield GaugeMetricFamily(
            "holdfast_kv_canary_compared_age_seconds",
            "How long ago restored blocks were compared last; absent: never.",
            value=canary.compared_age_s,
        )
    yield GaugeMetricFamily(
        "holdfast_kv_canary_quarantined",
        "1: a restored block was not what the model computes, and nothing is restored any more.",
        value=float(canary.quarantined),
    )


def _recall(recall: RecallPicture) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "holdfast_kv_recall_paused_seconds",
        "For how long nothing is recalled, because the disk was slow or failed; 0: it is not paused.",
        value=recall.paused_for_s,
    )
