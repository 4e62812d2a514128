"""A picture of what is kept: small, strict on the wire, and true to the leases that it sums up."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from appliance.engine.inside.leases import LeasedBlock, LeaseTable, TenantCounts
from appliance.engine.inside.pictures import Totals, largest, picture_of
from appliance.engine.inside.retention import RetentionPolicy
from appliance.engine.picture import (
    DISK_FAULTS,
    MAX_SESSIONS,
    MAX_TENANTS,
    NOT_STORED,
    OTHER_TENANTS,
    CanaryPicture,
    DiskPicture,
    HeldPicture,
    KvPicture,
    RecallPicture,
    SessionPicture,
    TenantPicture,
    TierPicture,
    read_session_asked,
    read_sessions_asked,
    worths_together,
)
from appliance.engine.protocol import Lease, LeaseState
from appliance.engine.wire import MalformedMessage

DEVICE = TierPicture("device", "ok", 4096, 1000, 400, 300, 2)


def lease(number: int, *, tenant: str = "bank", blocks: int = 1, expires_in_s: float = 1.0) -> LeaseState:
    return LeaseState(f"session-{number}", tenant, blocks, 32 * blocks, expires_in_s)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class ByName(RetentionPolicy):
    """What the test says a session is worth."""

    def __init__(self, worths: Mapping[str, float]) -> None:
        super().__init__()
        self.worths = worths

    def value(self, *, session: Any, now: float, position: int, abandoned: bool) -> float:
        return self.worths.get(session[1], math.inf)


def picture(
    *leases: LeaseState,
    sessions: int = 0,
    worths: Mapping[str, float] | None = None,
    counts: Mapping[str, TenantCounts] | None = None,
) -> KvPicture:
    clock, block_ids = Clock(), itertools.count()
    table = LeaseTable(1_000_000, clock, lambda block_id: block_id, ByName(worths or {}))
    for each in leases:
        blocks = [LeasedBlock(next(block_ids), 32 * (place + 1), place) for place in range(each.blocks)]
        table.finished(Lease(each.session, each.tenant, max(0.0, each.expires_in_s)), blocks)
    table.expire()
    named = largest([table], sessions, table.worth)
    return picture_of(
        table.kept(),
        named,
        block_size=32,
        tiers=[DEVICE],
        holders={"device": table},
        totals=Totals(7, 2, 1, table.counts() if counts is None else counts),
        engine_life="life",
    )


def test_sessions_are_counted_and_those_that_keep_most_are_named() -> None:
    seen = picture(lease(1, blocks=3), lease(2, blocks=9), lease(3, blocks=5, expires_in_s=-1.0), sessions=2)
    assert (seen.sessions_total, seen.leased_sessions_total) == (3, 2)
    assert [each.session for each in seen.sessions] == ["session-2", "session-3"]
    assert seen.tenants == (TenantPicture("bank", 3, 2, {"device": 17}, (), 0, 1),)


def test_ten_thousand_sessions_make_no_larger_picture_than_a_few() -> None:
    many = [lease(number, tenant=f"tenant-{number % 200}") for number in range(10_000)]
    seen = picture(*many)
    assert len(seen.tenants) == MAX_TENANTS + 1
    assert seen.tenants[-1] == TenantPicture(OTHER_TENANTS, 136 * 50, 136 * 50, {"device": 136 * 50}, (), 0, 0)
    assert sum(each.sessions for each in seen.tenants) == seen.sessions_total == 10_000
    assert len(json.dumps(seen.to_wire())) < 16_000


def test_worth_is_told_lowest_middle_highest_and_what_is_in_use_has_none() -> None:
    worths = {"session-1": 0.5, "session-2": 0.1, "session-3": math.inf, "session-4": 0.3}
    seen = picture(*map(lease, range(1, 6)), sessions=5, worths=worths)
    assert seen.worths_hits_per_s == (0.1, 0.3, 0.5)
    assert {each.session: each.worth_hits_per_s for each in seen.sessions} == {
        **worths,
        "session-3": None,
        "session-5": None,
    }


def test_worth_and_what_leases_came_to_are_told_of_each_tenant() -> None:
    worths = {"session-1": 0.5, "session-2": 0.1, "session-3": 0.3}
    leases = lease(1, blocks=2), lease(2, blocks=2), lease(3, tenant="ship"), lease(4, tenant="ship")
    counts = {"bank": TenantCounts(5, 1), "gone": TenantCounts(2, 3)}
    seen = picture(*leases, worths=worths, counts=counts)
    assert seen.tenants == (
        TenantPicture("bank", 2, 2, {"device": 4}, (0.1, 0.5, 0.5), 5, 1),
        TenantPicture("ship", 2, 2, {"device": 2}, (0.3, 0.3, 0.3), 0, 0),
        TenantPicture("gone", 0, 0, {"device": 0}, (), 2, 3),
    )
    assert seen.worths_hits_per_s == (0.1, 0.3, 0.5)
    many = {f"tenant-{number}": TenantCounts(1, 2) for number in range(MAX_TENANTS + 9)}
    seen = picture(lease(1), counts=many)
    assert len(seen.tenants) == MAX_TENANTS + 1
    assert (seen.tenants[0].tenant, seen.tenants[1].tenant) == ("bank", f"tenant-{MAX_TENANTS + 8}")
    assert seen.tenants[-1] == TenantPicture(OTHER_TENANTS, 0, 0, {"device": 0}, (), 10, 20)


def test_a_session_is_named_for_the_tier_that_has_most_of_it() -> None:
    class Tier:
        def __init__(self, tier: str, blocks: dict[tuple[str, str], int]) -> None:
            self.tier, self.blocks = tier, blocks

        def sizes(self) -> Iterable[tuple[tuple[str, str], int]]:
            return self.blocks.items()

        def kept_of(self, session: tuple[str, str]) -> HeldPicture | None:
            blocks = self.blocks.get(session)
            return None if blocks is None else HeldPicture(self.tier, blocks, 32 * blocks, "worth", None)

        def blocks_by_tenant(self) -> Mapping[str, int]:
            return {}

    dram, disk = Tier("dram", {("t", "a"): 5, ("t", "b"): 3}), Tier("disk", {("t", "b"): 9, ("t", "c"): 6})
    b, c = largest([dram, disk], 2, lambda _: 0.5)
    assert (b.session, [(held.tier, held.blocks) for held in b.held]) == ("b", [("dram", 3), ("disk", 9)])
    assert (c.session, [(held.tier, held.blocks) for held in c.held]) == ("c", [("disk", 6)])
    assert largest([dram, disk], 0, lambda _: 0.5) == ()


def test_why_the_device_keeps_a_session_is_told() -> None:
    clock = Clock()
    table = LeaseTable(100, clock, lambda block_id: block_id)

    def finished(session: str, tenant: str, first: int, share: float = 0.0) -> None:
        blocks = [LeasedBlock(first + place, 32 * (place + 1), place) for place in range(3)]
        table.finished(Lease(session, tenant, 10.0, tenant_share=share), blocks)

    finished("a", "t", 0, share=0.03)
    finished("b", "u", 10)
    assert table.kept_of(("t", "a")) == HeldPicture("device", 3, 96, "lease", 10.0)
    table.arrived(Lease("a", "t", 10.0))
    assert table.kept_of(("t", "a")) == HeldPicture("device", 3, 96, "in_use", None)
    finished("a", "t", 0, share=0.03)
    clock.now += 10
    table.expire()
    assert table.kept_of(("t", "a")) == HeldPicture("device", 3, 96, "share", None)
    assert table.kept_of(("u", "b")) == HeldPicture("device", 3, 96, "worth", None)
    assert table.kept_of(("u", "a")) is None


WHOLE = KvPicture(
    block_size=32,
    tiers=(DEVICE, TierPicture("disk", "quarantined", 4096, 10, 0, 0, 0)),
    tenants=(TenantPicture("bank", 1, 1, {"device": 3, "disk": 4}, (0.1, 0.1, 0.1), 4, 5),),
    sessions=(
        SessionPicture("bank", "session", None, (HeldPicture("device", 3, 96, "in_use", None),)),
        SessionPicture("bank", "other", 0.1, (HeldPicture("disk", 3, 96, "share", 2.0),)),
    ),
    sessions_total=2,
    leased_sessions_total=1,
    worths_hits_per_s=(0.1, 0.1, 0.1),
    reclaimed_blocks_total=4,
    expired_leases_total=5,
    ignored_leases_total=6,
    engine_life="5f2c",
    disk=DiskPicture(
        stored_blocks_total=7,
        loaded_blocks_total=8,
        evicted_blocks_total=9,
        expired_blocks_total=10,
        waiting_bytes=11,
        not_stored_total=dict.fromkeys(NOT_STORED, 1),
        faults_total=dict.fromkeys(DISK_FAULTS, 2),
        last_error="Input/output error (EIO)",
        last_error_age_s=0.5,
    ),
    canary=CanaryPicture(12, 0.001, quarantined=False, compared_age_s=8.0, dropped_samples_total=1),
    recall=RecallPicture(13, 14, 15, 16.5),
)


def test_a_picture_is_read_as_it_was_written() -> None:
    for each in (
        WHOLE,
        replace(WHOLE, worths_hits_per_s=(), sessions=(), tenants=(), disk=None, canary=None, recall=None),
    ):
        assert KvPicture.from_wire(json.loads(json.dumps(each.to_wire()))) == each


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("block_size",), -1),
        (("sessions_total",), True),
        (("tiers", 0, "tier"), "tape"),
        (("tiers", 0, "state"), ["ok"]),
        (("tiers", 0, "used_blocks"), 1.5),
        (("tiers",), [None] * 4),
        (("tiers", 0, "sessions"), None),
        (("tenants", 0, "tenant"), "a b"),
        (("tenants", 0, "blocks"), {"tape": 1}),
        (("tenants", 0, "blocks", "device"), -1),
        (("tenants", 0, "leased_sessions"), None),
        (("tenants", 0, "worths_hits_per_s"), [math.inf]),
        (("tenants", 0, "reclaimed_blocks_total"), -1),
        (("engine_life",), "a life"),
        (("sessions", 0, "worth_hits_per_s"), "much"),
        (("sessions", 1, "held", 0, "ends_in_s"), math.inf),
        (("sessions", 1, "held", 0, "kept_for"), "love"),
        (("sessions", 1, "held"), [None] * 4),
        (("sessions",), "none"),
        (("worths_hits_per_s",), [0.1, math.nan, 0.1]),
        (("more",), 1),
        (("disk", "last_error"), "two\nlines"),
        (("disk", "last_error"), "x" * 201),
        (("disk", "faults_total"), {"damaged": 1}),
        (("disk", "not_stored_total", "slow"), -1),
        (("canary", "quarantined"), 0),
        (("canary", "worst_error"), math.nan),
        (("canary", "compared_age_s"), -1.0),
        (("canary", "dropped_samples_total"), None),
        (("recall", "used_blocks_total"), -1),
        (("recall", "paused_for_s"), -0.5),
    ],
)
def test_what_is_no_picture_is_refused(where: tuple[Any, ...], value: object) -> None:
    wire: Any = json.loads(json.dumps(WHOLE.to_wire()))
    inner = wire
    for step in where[:-1]:
        inner = inner[step]
    inner[where[-1]] = value
    with pytest.raises(MalformedMessage):
        KvPicture.from_wire(wire)


def test_of_worths_of_several_the_middle_is_not_made_up() -> None:
    assert worths_together([]) == worths_together([()]) == ()
    assert worths_together([(), (0.1, 0.2, 0.9)]) == (0.1, 0.2, 0.9)
    assert worths_together([(0.1, 0.2, 0.9), (0.05, 0.5, 0.6)]) == (0.05, 0.9)
    assert worths_together([(0.1, 0.9), (0.2, 0.3, 0.4)]) == (0.1, 0.9)


def test_so_many_sessions_may_be_asked_for() -> None:
    assert (read_sessions_asked(None), read_sessions_asked("0"), read_sessions_asked(str(MAX_SESSIONS))) == (0, 0, 1000)
    for given in ("1001", "-1", "1.5", "", "\u0663", "9" * 5000):
        with pytest.raises(MalformedMessage):
            read_sessions_asked(given)


def test_one_session_is_asked_for_by_both_its_labels() -> None:
    assert read_session_asked(None, None) is None
    assert read_session_asked("t-1", "s-1") == ("t-1", "s-1")
    for tenant, session in ((None, "s-1"), ("t-1", None), ("t 1", "s-1"), ("t-1", "s" * 65)):
        with pytest.raises(MalformedMessage):
            read_session_asked(tenant, session)
