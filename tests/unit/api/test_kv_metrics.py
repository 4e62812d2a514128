"""What the engine keeps on the metrics' page: by tenant, and counted on through the lives of the engine."""

from collections.abc import Mapping
from dataclasses import replace

from api.kv_counts import EngineCounts
from api.kv_metrics import KvCollector
from api.kv_watch import Seen
from api.metrics import Metrics
from appliance.engine.picture import (
    DISK_FAULTS,
    NOT_STORED,
    CanaryPicture,
    DiskPicture,
    KvPicture,
    RecallPicture,
    TenantPicture,
    TierPicture,
)

BANK = TenantPicture("5f2c", 3, 2, {"device": 30, "dram": 9}, (0.1, 0.2, 0.9), 4, 1)
SHIP = TenantPicture("77aa", 1, 0, {"device": 5, "dram": 0}, (0.5, 0.5, 0.5), 2, 6)
ANOTHER = TenantPicture("d00d", 2, 1, {"device": 7, "dram": 0}, (0.05, 0.3, 0.4), 1, 0)
OTHERS = TenantPicture("other", 9, 4, {"device": 1, "dram": 0}, (0.01, 0.02, 3.0), 90, 90)
PICTURE = KvPicture(
    block_size=32,
    tiers=(TierPicture("device", "ok", 4096, 100, 40, 30, 4), TierPicture("dram", "ok", 4096, 100, 9, 0, 3)),
    tenants=(BANK, SHIP),
    sessions=(),
    sessions_total=4,
    leased_sessions_total=2,
    worths_hits_per_s=(0.1, 0.2, 0.9),
    reclaimed_blocks_total=7,
    expired_leases_total=7,
    ignored_leases_total=3,
    engine_life="one",
    disk=DiskPicture(5, 4, 3, 2, 1, dict.fromkeys(NOT_STORED, 1), dict.fromkeys(DISK_FAULTS, 2), "full", 9.0),
    canary=CanaryPicture(12, 0.001, quarantined=False, compared_age_s=8.0, dropped_samples_total=1),
    recall=RecallPicture(6, 3, 1, 0.0),
)
KNOWN = {"5f2c": "ten_bank", "77aa": "ten_ship"}


class Page:
    """The page after some pictures; None: the engine does not answer any more."""

    def __init__(self, known: Mapping[str, str] = KNOWN) -> None:
        self.known = dict(known)
        self.counts = EngineCounts(self._tenant_of)
        self.seen: Seen | None = None
        self.metrics = Metrics()
        self.metrics.collect_from(KvCollector(lambda: self.seen, self.counts.totals, self._tenant_of))

    def after(self, *pictures: KvPicture | None) -> dict[str, float]:
        for picture in pictures:
            self.seen = None if picture is None else Seen(1.0, picture, 0)
            if picture is not None:
                self.counts.add(picture)
        lines = [line for line in self.metrics.exposition().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def _tenant_of(self, label: str) -> str:
        return self.known.get(label, "other")


def test_leases_worth_and_reclaims_are_told_by_tenant() -> None:
    page = Page().after(PICTURE)
    assert page['holdfast_kv_tenant_sessions{lease="running",tenant="ten_bank"}'] == 2
    assert page['holdfast_kv_tenant_sessions{lease="over",tenant="ten_bank"}'] == 1
    assert page['holdfast_kv_tenant_blocks{tenant="ten_bank",tier="dram"}'] == 9
    worths = [
        page[f'holdfast_kv_tenant_worth_hits_per_second{{rank="{rank}",tenant="ten_bank"}}']
        for rank in ("lowest", "median", "highest")
    ]
    assert worths == [0.1, 0.2, 0.9]
    assert page['holdfast_kv_reclaimed_blocks_total{tenant="ten_bank"}'] == 4
    assert page['holdfast_kv_reclaimed_blocks_total{tenant="ten_ship"}'] == 2
    assert page['holdfast_kv_reclaimed_blocks_total{tenant="other"}'] == 1, "of 7, those that are nobody's"
    assert page['holdfast_kv_expired_leases_total{tenant="ten_ship"}'] == 6
    assert page["holdfast_kv_ignored_leases_total"] == 3


def test_of_several_tenants_together_no_middle_worth_is_made_up() -> None:
    page = Page().after(replace(PICTURE, tenants=(BANK, ANOTHER, OTHERS)))
    assert page['holdfast_kv_tenant_worth_hits_per_second{rank="lowest",tenant="other"}'] == 0.01
    assert page['holdfast_kv_tenant_worth_hits_per_second{rank="highest",tenant="other"}'] == 3.0
    assert 'holdfast_kv_tenant_worth_hits_per_second{rank="median",tenant="other"}' not in page
    assert page['holdfast_kv_tenant_sessions{lease="running",tenant="other"}'] == 5


def test_no_counter_goes_back_when_the_engine_was_started_again_and_none_mixes_its_lives() -> None:
    page, fewer = Page(), replace(PICTURE.tenants[0], reclaimed_blocks_total=1)
    page.after(PICTURE)
    again = replace(PICTURE, engine_life="two", tenants=(fewer,), reclaimed_blocks_total=9, ignored_leases_total=1)
    seen = page.after(again, again)
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="ten_bank"}'] == 4 + 1
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="ten_ship"}'] == 2
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="other"}'] == 1 + 8
    assert seen["holdfast_kv_ignored_leases_total"] == 3 + 1
    assert seen['holdfast_kv_tier_faults_total{cause="damaged",tier="disk"}'] == 2 + 2
    assert seen["holdfast_kv_recalled_blocks_total"] == 6 + 6


def test_a_tenant_that_the_engine_leaves_out_for_a_time_is_counted_once() -> None:
    page = Page()
    without = replace(PICTURE, tenants=(SHIP, replace(OTHERS, reclaimed_blocks_total=4)))
    seen = page.after(PICTURE, without, PICTURE, replace(PICTURE, reclaimed_blocks_total=8))
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="ten_bank"}'] == 4
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="other"}'] == 2


def test_a_tenant_that_is_removed_leaves_the_page_and_nothing_of_it_comes_back() -> None:
    page = Page()
    page.after(PICTURE)
    del page.known["5f2c"]
    page.counts.forget_tenant("ten_bank")
    seen = page.after(PICTURE)
    assert not [name for name in seen if "ten_bank" in name]
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="other"}'] == 1, "what was its is not others'"
    assert seen['holdfast_kv_tenant_blocks{tenant="other",tier="device"}'] == 30, "until the engine let go of it"


def test_while_the_engine_does_not_answer_there_is_no_gauge_and_every_counter_stands() -> None:
    seen = Page().after(PICTURE, None)
    assert seen['holdfast_kv_reclaimed_blocks_total{tenant="ten_bank"}'] == 4
    kept = {name.partition("{")[0] for name in seen if name.startswith("holdfast_kv_")}
    assert all(name.endswith("_total") for name in kept)
    assert not [name for name in Page().after(None) if name.startswith("holdfast_kv_")]
