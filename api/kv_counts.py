"""What the engine counted, over all of its lives that this gateway saw: for the metrics.

Rules:

- A life of the engine counts from zero. What a picture has more than the one before it, of the same life, is added
  here: no counter goes back, and none is the difference of two lives.
- Tenants are named by their ids, as everywhere on the page. What is nobody's who is named is `other`'s, so that all
  together are what the engine counted in all.
- A tenant that is removed takes its counters with it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from appliance.engine.picture import OTHER_TENANTS as OTHERS_OF_THE_ENGINE
from appliance.engine.picture import KvPicture, TenantPicture
from appliance.sessions.ledger import OTHER_TENANTS


class Counted(NamedTuple):
    """One counter: its metric's name, without `_total`, and the values of its labels."""

    metric: str
    labels: tuple[str, ...] = ()


_BY_TENANT: Final[Mapping[str, tuple[Callable[[KvPicture], int], Callable[[TenantPicture], int]]]] = {
    "holdfast_kv_reclaimed_blocks": (lambda all_: all_.reclaimed_blocks_total, lambda of: of.reclaimed_blocks_total),
    "holdfast_kv_expired_leases": (lambda all_: all_.expired_leases_total, lambda of: of.expired_leases_total),
}


class EngineCounts:
    """The counters of one engine.

    Args:
        tenant_of: a tenant's id for the engine's label of it, or `OTHER_TENANTS`.

    Attributes:
        totals: what was counted so far; a tenant's counters have its id as their only label.
    """

    def __init__(self, tenant_of: Callable[[str], str]) -> None:
        self._tenant_of = tenant_of
        self._life = ""
        self._before: dict[Counted, int] = {}  # as the life that was seen last had it
        self.totals: Counter[Counted] = Counter()

    def add(self, picture: KvPicture) -> None:
        """Count what the engine counted since the picture before."""
        if picture.engine_life != self._life:
            self._life, self._before = picture.engine_life, {}
        now = dict(_readings(picture))
        for counted, value in now.items():
            self.totals[counted] += self._more(counted, value)
        for metric, (in_all, of_tenant) in _BY_TENANT.items():
            left = self._more(Counted(metric), in_all(picture))
            now[Counted(metric)] = in_all(picture)
            for tenant in picture.tenants:
                if tenant.tenant == OTHERS_OF_THE_ENGINE:
                    continue  # who that is changes from picture to picture
                counted = Counted(metric, (tenant.tenant,))
                now[counted] = of_tenant(tenant)
                more = min(left, self._more(counted, now[counted]))
                left -= more
                self.totals[Counted(metric, (self._tenant_of(tenant.tenant),))] += more
            self.totals[Counted(metric, (OTHER_TENANTS,))] += left
        self._before = now

    def forget_tenant(self, tenant_id: str) -> None:
        """A tenant was removed."""
        for metric in _BY_TENANT:
            self.totals.pop(Counted(metric, (tenant_id,)), None)

    def _more(self, counted: Counted, value: int) -> int:
        """How much was counted; where that began anew in one life of the engine, which had left it out, all of it."""
        before = self._before.get(counted, 0)
        return value - before if value >= before else value


def _readings(picture: KvPicture) -> Iterator[tuple[Counted, int]]:
    """What a picture says of counters that are no tenant's."""
    yield Counted("holdfast_kv_ignored_leases"), picture.ignored_leases_total
    disk, canary, recall = picture.disk, picture.canary, picture.recall
    if disk is not None:
        yield Counted("holdfast_kv_tier_stored_blocks", ("disk",)), disk.stored_blocks_total
        yield Counted("holdfast_kv_tier_loaded_blocks", ("disk",)), disk.loaded_blocks_total
        yield Counted("holdfast_kv_tier_evicted_blocks", ("disk",)), disk.evicted_blocks_total
        yield Counted("holdfast_kv_tier_expired_blocks", ("disk",)), disk.expired_blocks_total
        for cause, blocks in disk.not_stored_total.items():
            yield Counted("holdfast_kv_tier_not_stored_blocks", ("disk", cause)), blocks
        for cause, blocks in disk.faults_total.items():
            yield Counted("holdfast_kv_tier_faults", ("disk", cause)), blocks
    if canary is not None:
        yield Counted("holdfast_kv_canary_compared_blocks"), canary.compared_blocks_total
        yield Counted("holdfast_kv_canary_dropped_samples"), canary.dropped_samples_total
    if recall is not None:
        yield Counted("holdfast_kv_recalled_blocks"), recall.recalled_blocks_total
        yield Counted("holdfast_kv_recalled_used_blocks"), recall.used_blocks_total
        yield Counted("holdfast_kv_recalled_in_vain_blocks"), recall.in_vain_blocks_total
