"""What the engine keeps, for Prometheus: the gateway's page has it, so that the engine's need not be reachable.

Rules:

- The engine is asked for a summary when the page is read, never for its sessions. If it does not answer in time, the
  page has no such series, rather than old ones.
- A tenant's label is its id, as everywhere on the page; those that the gateway has not met in this life are `other`.
"""

from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.kv_watch import Seen
from api.services import Services
from appliance.engine.picture import TIER_STATES, CanaryPicture, DiskPicture, RecallPicture, TierPicture

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


async def exposition(services: Services) -> bytes:
    """The text that Prometheus scrapes, with what the engine keeps now."""
    await services.kv.look()
    return services.metrics.exposition()


class KvCollector(Collector):
    """What the engine keeps, as it was seen last.

    Args:
        seen: the picture that the page is to show; None: none is to be had.
        tenant_of: a tenant's id for the engine's label of it.
    """

    def __init__(self, seen: Callable[[], Seen | None], tenant_of: Callable[[str], str]) -> None:
        self._seen = seen
        self._tenant_of = tenant_of

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known when there is a picture."""
        return []

    def collect(self) -> Iterable[Metric]:
        """The series of one picture."""
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
        for rank, worth in zip(_WORTHS, picture.worths_hits_per_s, strict=False):
            worths.add_metric((rank,), worth)
        yield worths
        yield from self._tenants(seen)
        for name, help_text, total in (
            (
                "holdfast_kv_reclaimed_blocks",
                "Blocks taken back from leases for others.",
                picture.reclaimed_blocks_total,
            ),
            ("holdfast_kv_expired_leases", "Leases that ran out.", picture.expired_leases_total),
            ("holdfast_kv_ignored_leases", "Malformed leases that requests carried.", picture.ignored_leases_total),
        ):
            yield CounterMetricFamily(name, help_text, value=total)
        if picture.disk is not None:
            yield from _disk(picture.disk)
        if picture.canary is not None:
            yield from _canary(picture.canary)
        if picture.recall is not None:
            yield from _recall(picture.recall)

    def _tenants(self, seen: Seen) -> Iterable[Metric]:
        sessions, blocks = Counter[str](), Counter[tuple[str, str]]()
        for each in seen.picture.tenants:
            tenant_id = self._tenant_of(each.tenant)
            sessions[tenant_id] += each.sessions
            for tier, count in each.blocks.items():
                blocks[tenant_id, tier] += count
        family = GaugeMetricFamily(
            "holdfast_kv_tenant_sessions", "Sessions of a tenant that keep KV on the device.", labels=("tenant",)
        )
        for tenant_id, count in sessions.items():
            family.add_metric((tenant_id,), count)
        yield family
        family = GaugeMetricFamily(
            "holdfast_kv_tenant_blocks", "Blocks of a tier that sessions of a tenant have.", labels=("tenant", "tier")
        )
        for labels, count in blocks.items():
            family.add_metric(labels, count)
        yield family


def _disk(disk: DiskPicture) -> Iterable[Metric]:
    for name, help_text, total in (
        ("holdfast_kv_tier_stored_blocks", "Blocks that were written to a tier.", disk.stored_blocks_total),
        ("holdfast_kv_tier_loaded_blocks", "Blocks that were read from a tier.", disk.loaded_blocks_total),
        ("holdfast_kv_tier_evicted_blocks", "Blocks that left a tier for others.", disk.evicted_blocks_total),
        ("holdfast_kv_tier_expired_blocks", "Blocks that left a tier unused.", disk.expired_blocks_total),
    ):
        counter = CounterMetricFamily(name, help_text, labels=("tier",))
        counter.add_metric(("disk",), total)
        yield counter
    for name, help_text, by_cause in (
        (
            "holdfast_kv_tier_not_stored_blocks",
            "Blocks that a tier did not take, by cause. No request waited for it.",
            disk.not_stored_total,
        ),
        (
            "holdfast_kv_tier_faults",
            "Blocks that a tier could not give back, by cause. They were computed again.",
            disk.faults_total,
        ),
    ):
        counter = CounterMetricFamily(name, help_text, labels=("tier", "cause"))
        for cause, total in by_cause.items():
            counter.add_metric(("disk", cause), total)
        yield counter
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
    yield CounterMetricFamily(
        "holdfast_kv_canary_compared_blocks",
        "Restored blocks that were computed again to compare them.",
        value=canary.compared_blocks_total,
    )
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
    yield CounterMetricFamily(
        "holdfast_kv_canary_dropped_samples",
        "Restored blocks were noted and went without having been compared: the engine was busy, or their session over.",
        value=canary.dropped_samples_total,
    )
    yield GaugeMetricFamily(
        "holdfast_kv_canary_quarantined",
        "1: a restored block was not what the model computes, and nothing is restored any more.",
        value=float(canary.quarantined),
    )


def _recall(recall: RecallPicture) -> Iterable[Metric]:
    for name, help_text, total in (
        (
            "holdfast_kv_recalled_blocks",
            "Blocks that were read from the disk into DRAM before a request asked for them.",
            recall.recalled_blocks_total,
        ),
        ("holdfast_kv_recalled_used_blocks", "Recalled blocks that a request loaded.", recall.used_blocks_total),
        (
            "holdfast_kv_recalled_in_vain_blocks",
            "Recalled blocks that left DRAM before a request loaded them.",
            recall.in_vain_blocks_total,
        ),
    ):
        yield CounterMetricFamily(name, help_text, value=total)
    yield GaugeMetricFamily(
        "holdfast_kv_recall_paused_seconds",
        "For how long nothing is recalled, because the disk was slow or failed; 0: it is not paused.",
        value=recall.paused_for_s,
    )
