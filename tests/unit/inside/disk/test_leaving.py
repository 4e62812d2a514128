"""What leaves the disk: the least worth, by bounds, shares and caps, and what nobody asked for."""

import json
import os
import stat
import time
from typing import Any

import pytest

from appliance.engine.inside.disk.files import ChunkName, Owner
from appliance.engine.inside.disk.index import DiskIndex
from appliance.engine.inside.quotas import Quota
from appliance.engine.picture import HeldPicture
from tests.unit.inside.disk.tier import (
    ANA,
    BEN,
    EVE,
    FILE_BYTES,
    Clock,
    Make,
    Tier,
    chunk_key,
    until,
)


def test_the_least_worth_goes_first_tail_first(make: Make) -> None:
    worth = {ANA: 1.0, BEN: 2.0, EVE: 3.0}
    tier = make(chunks=10, worth=worth.__getitem__)
    tier.write(ANA, range(5))
    tier.write(BEN, range(5))
    tier.write(EVE, range(3))
    assert tier.read(ANA, range(5)) == [0, 1]
    assert tier.read(BEN, range(5)) == list(range(5))
    assert tier.store.status().evicted_chunks == 3
    tier.settle()


def test_the_files_never_take_more_than_the_bound(make: Make) -> None:
    tier = make(chunks=20)
    for number in range(30):
        tier.write(Owner("acme", f"s{number}"), range(7))
        assert len(tier.files()) * FILE_BYTES <= tier.store.status().capacity_bytes
    tier.settle()
    assert tier.store.status().bytes <= tier.store.status().capacity_bytes


def test_a_session_larger_than_the_disk_keeps_its_head(make: Make) -> None:
    tier = make(chunks=10)
    done = tier.write(ANA, range(15))
    assert not done.whole
    assert tier.read(ANA, range(15)) == list(range(10))
    assert tier.store.status().not_stored == {"too_large": 5}


def test_another_tenants_chunks_go_down_to_its_share_and_no_further(make: Make) -> None:
    tier = make(chunks=10, worth={ANA: 1.0, BEN: 2.0, EVE: 9.0}.__getitem__)
    tier.write(ANA, range(4), tenant_share=0.5)
    tier.write(BEN, range(4), tenant_share=0.5)
    tier.write(EVE, range(7))
    assert tier.read(ANA, range(4)) == [0]
    assert tier.read(BEN, range(4)) == [0, 1, 2, 3]
    assert tier.read(EVE, range(7)) == [0, 1, 2, 3, 4]
    assert tier.store.status().not_stored == {"quota": 2}
    assert [tier.store.is_lost(EVE, number) for number in (4, 5)] == [False, True]
    assert not tier.store.is_lost(ANA, 3)  # that was no quota of its tenant's
    tier.write(ANA, range(4))  # its tenant has no share any more
    tier.write(EVE, range(7))
    assert tier.read(EVE, range(7)) == list(range(7))


def test_a_session_keeps_its_head_up_to_its_cap(make: Make) -> None:
    tier = make(chunks=10)
    done = tier.write(ANA, [4, 1, 3, 0, 2], session_cap=0.3)
    assert set(done.keys) == {chunk_key(ANA, number) for number in range(3)}
    assert tier.store.status().not_stored == {"quota": 2}
    assert [tier.store.is_lost(ANA, number) for number in (2, 3)] == [False, True]
    tier.write(ANA, range(3, 5))
    assert tier.read(ANA, range(5)) == list(range(5))
    assert not tier.store.is_lost(ANA, 3)


def test_at_its_tenants_cap_a_session_pushes_the_tenants_others_out_and_nobody_elses(make: Make) -> None:
    tier = make(chunks=10, worth={ANA: 5.0, BEN: 6.0, EVE: 1.0}.__getitem__)
    tier.write(EVE, range(3))
    tier.write(ANA, range(4), tenant_cap=0.5)
    tier.write(BEN, range(3), tenant_cap=0.5)
    assert tier.read(ANA, range(4)) == [0, 1]
    assert [tier.store.is_lost(ANA, number) for number in (1, 2)] == [False, True]
    tier.write(BEN, range(9), tenant_cap=0.5)
    assert tier.read(BEN, range(9)) == list(range(5))
    assert tier.read(EVE, range(3)) == list(range(3))


def test_behind_a_chunk_that_a_quota_kept_out_nothing_is_written(make: Make) -> None:
    tier = make(chunks=10)
    tier.write(ANA, range(3), session_cap=0.2)
    tier.write(ANA, range(3, 5))
    assert tier.read(ANA, range(5)) == [0, 1]
    tier.write(ANA, range(2, 5))
    assert tier.read(ANA, range(5)) == list(range(5))


def test_what_there_is_of_a_session_is_told_with_its_reason_and_its_end(make: Make) -> None:
    clock = Clock()
    tier = make(ttl_s=100.0, now=clock)
    tier.write(ANA, range(3), tenant_share=0.5)
    clock.now = 30.0
    tier.write(EVE, [7])
    clock.now = 40.0
    assert list(tier.store.sizes()) == [(EVE, 1), (ANA, 3)]
    assert tier.store.kept_of(ANA) == HeldPicture("disk", 3, 2, "share", 60.0)
    assert tier.store.kept_of(EVE) == HeldPicture("disk", 1, 7, "worth", 90.0)
    assert tier.store.kept_of(BEN) is None
    assert tier.store.blocks_by_tenant() == {"acme": 3, "other": 1}


def test_a_share_holds_after_a_restart_before_its_tenant_comes_again(make: Make) -> None:
    first = make(chunks=10)
    first.write(ANA, range(4), tenant_share=0.2)
    first.write(EVE, range(2), tenant_share=0.1)
    until(lambda: _shares_of(first) == {"acme": 0.2, "other": 0.1})
    assert stat.S_IMODE((first.root / "shares").stat().st_mode) == 0o600
    tier = make(chunks=10)
    tier.write(Owner("crowd", "x"), range(9))
    assert tier.read(ANA, range(4)) == [0, 1]
    assert len(tier.read(EVE, range(2))) >= 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"acme": 7.0, "a/b": 0.1, "other": "1"}', "[" * 100_000])
def test_shares_that_were_damaged_guarantee_nothing(make: Make, text: str) -> None:
    first = make(chunks=10)
    first.write(ANA, range(4), tenant_share=0.2)
    until(lambda: _shares_of(first) == {"acme": 0.2})
    (first.root / "shares").write_text(text)
    assert make(chunks=10).write(EVE, range(10)).whole


def test_among_thousands_of_sessions_those_that_a_quota_is_about_are_found() -> None:
    index = DiskIndex(4000, 3600.0)
    crowd = [Owner("crowd", f"s{number}") for number in range(3960)]
    for owner in (*crowd, *[EVE] * 40):
        index.found(ChunkName(owner, chunk_key(owner, len(index)), 32, b"copy"), 0.0)
    friend = index.used(Owner(EVE.tenant, "friend"), 1.0)
    for tenant, share in (("crowd", 0.99), (EVE.tenant, 0.005)):
        index.quotas.in_force(tenant, Quota(share))
    fits, gone = index.make_way(friend, range(30), Quota(tenant_cap=0.0125), lambda _: 0.0)
    assert (fits, {name.owner for name in gone}) == (30, {EVE})
    assert index.make_way(index.used(ANA, 1.0), range(100), Quota(), lambda _: 0.0) == (index.room, [])
    assert index.quotas.is_lost(ANA, index.room)


def test_a_smaller_bound_after_a_restart_holds_at_once(make: Make) -> None:
    make(chunks=50).write(ANA, range(50))
    tier = make(chunks=10)
    assert tier.store.status().chunks <= 10
    tier.settle()
    assert 0 in tier.read(ANA, range(50))


def test_a_session_that_was_not_used_for_too_long_goes_as_a_whole(make: Make) -> None:
    clock = Clock()
    tier = make(ttl_s=100.0, now=clock)
    tier.write(ANA, range(3))
    clock.now = 60.0
    tier.write(BEN, range(3))
    tier.read(ANA, [0])
    clock.now = 161.0  # BEN was used 101 s ago; so was ANA
    tier.write(EVE, [1])
    tier.settle()
    assert {file.parent.name for file in tier.files()} == {"other~eve"}
    assert tier.store.status().expired_chunks == 6


def test_a_session_expires_over_a_restart_and_a_wall_clock_that_was_set_back_keeps_it(make: Make) -> None:
    make(wall=lambda: 1e9).write(ANA, [1])
    for folder in make().root.rglob("*~*"):
        os.utime(folder, (1e9, 1e9))
    assert make(wall=lambda: 1e9 - 1e6).store.status().chunks == 1
    assert make(wall=lambda: 1e9 + 3599).store.status().chunks == 1
    tier = make(wall=lambda: 1e9 + 3601)
    assert tier.store.status().chunks == 0
    tier.settle()


def test_a_wall_clock_that_steps_by_a_day_and_back_while_the_tier_runs_expires_nothing(make: Make) -> None:
    now, wall = Clock(), Clock()
    wall.now = 1e9
    tier = make(now=now, wall=wall)
    for owner, step_s in ((ANA, 86_400.0), (BEN, -2 * 86_400.0), (EVE, 86_400.0)):
        tier.write(owner, [1])
        wall.now += step_s
        now.now += 60.0
    assert [tier.read(owner, [1]) for owner in (ANA, BEN, EVE)] == [[1]] * 3
    tier.settle()
    assert tier.store.status().expired_chunks == 0
    tier.store.close()
    assert make(wall=wall).store.status().chunks == 3  # and who was used at a time that is to come is not lost


def test_a_session_whose_tail_leaves_is_used_no_later_for_that(make: Make) -> None:
    now, wall = Clock(), Clock()
    worth = {ANA: 1.0, BEN: 2.0, EVE: 3.0}
    both: dict[str, Any] = {"chunks": 10, "ttl_s": 43_200.0, "now": now, "wall": wall}
    tier = make(worth=worth.__getitem__, **both)
    tier.write(ANA, range(5))
    tier.write(BEN, range(5))
    ends_at = time.time()
    for owner, ago_s in ((ANA, 40_000.0), (BEN, 39_900.0)):
        now.now, wall.now = 40_000 - ago_s, ends_at - ago_s
        tier.read(owner, [0])
    now.now, wall.now = 40_000.0, ends_at
    tier.write(EVE, range(2))  # pushes the tail of ANA out
    tier.settle()
    tier.store.close()  # what is removed is removed, and its folder has its time again
    tier = make(**both)
    left_s = {owner: kept.ends_in_s for owner in (ANA, BEN) if (kept := tier.store.kept_of(owner)) is not None}
    assert left_s == {ANA: pytest.approx(3_200, abs=5), BEN: pytest.approx(3_300, abs=5)}
    tier.write(EVE, range(2, 4))  # of equal worth: who was unused longest leaves
    tier.settle()
    assert {owner: tier.store.chunks_of(owner) for owner in (ANA, BEN)} == {ANA: 1, BEN: 5}


def test_what_a_broken_write_left_makes_its_session_no_younger(make: Make) -> None:
    make().write(ANA, [1])
    (folder,) = make().root.rglob("*~*")
    (file,) = folder.iterdir()
    (folder / f"{file.name}.part").touch()
    os.utime(folder, (1e9, 1e9))
    for _ in range(2):
        kept = make(wall=lambda: 1e9 + 600).store.kept_of(ANA)
        assert kept is not None
        assert kept.ends_in_s == pytest.approx(3000, abs=5)


def test_what_is_read_ahead_does_not_keep_its_session_from_expiring(make: Make) -> None:
    now = [0.0]
    tier = make(now=lambda: now[0], wall=lambda: now[0], ttl_s=100.0)
    tier.write(ANA, [1])
    tier.write(BEN, [1])
    (folder,) = (path.parent for path in tier.files() if "ana" in path.parent.name)
    os.utime(folder, (1.0, 1.0))
    now[0] = 90.0
    assert tier.read(ANA, [1], ahead=True) == [1]
    assert tier.read(BEN, [1]) == [1]
    assert folder.stat().st_mtime == 1.0
    now[0] = 101.0
    tier.write(EVE, [1])  # the threads look at the clock when they have something to do
    until(lambda: tier.store.status().expired_chunks == 1)
    assert (tier.store.chunks_of(ANA), tier.store.chunks_of(BEN)) == (0, 1)


def _shares_of(tier: Tier) -> object:
    file = tier.root / "shares"
    return json.loads(file.read_text()) if file.exists() else None
