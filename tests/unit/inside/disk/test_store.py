"""The tier on disk: what it keeps, what it refuses, and that no fault of a disk's or of a key's is more than a miss."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.inside.disk.files import ChunkFiles, ChunkName, Owner
from appliance.engine.inside.disk.index import DiskIndex
from appliance.engine.inside.disk.store import _WRITERS, DiskStore, Piece, Presence
from appliance.engine.inside.quotas import Quota
from appliance.engine.picture import HeldPicture
from tests.unit.inside.disk.tier import (
    ANA,
    BEN,
    CHUNK_BYTES,
    EVE,
    FILE_BYTES,
    FINGERPRINT,
    Gateway,
    Tier,
    chunk_key,
    content,
    tier_key,
    until,
)

Make = Callable[..., Tier]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes tiers on one folder, one after the other."""
    made: list[DiskStore] = []

    def tier(**arguments: Any) -> Tier:
        for store in made:
            store.close()
        made.clear()
        new = Tier(tmp_path / "tier", **arguments)
        made.append(new.store)
        return new

    yield tier
    for store in made:
        store.close()


def test_what_was_written_is_read_again(make: Make) -> None:
    tier = make()
    assert tier.write(ANA, range(10)).whole
    assert tier.read(ANA, range(12)) == list(range(10))
    assert tier.store.status().stored_chunks == 10
    assert tier.store.status().loaded_chunks == 10


def test_an_engine_that_is_started_again_finds_what_was_there(make: Make) -> None:
    make().write(ANA, range(5))
    tier = make()
    assert tier.store.find(chunk_key(ANA, 4), "acme") is not Presence.ABSENT
    assert tier.read(ANA, range(5)) == list(range(5))


def test_a_chunk_that_is_there_is_not_written_again(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1])
    (before,) = tier.files()
    assert tier.write(BEN, []).whole
    assert tier.write(ANA, [1]).keys == (chunk_key(ANA, 1),)
    assert tier.files() == [before]


def test_nothing_of_a_chunk_or_of_a_key_is_in_a_file(make: Make) -> None:
    tier = make()
    tier.write(ANA, range(3))
    plain = [bytes(content(chunk_key(ANA, number))) for number in range(3)]
    for file in tier.root.rglob("*"):
        text = file.read_bytes() if file.is_file() else b""
        assert tier_key(ANA) not in text
        for chunk in plain:
            assert not any(chunk[at : at + 16] in text for at in range(0, CHUNK_BYTES, 1024))


def test_files_are_0600_in_folders_of_0700_whatever_the_mask_is(make: Make, tmp_path: Path) -> None:
    (tmp_path / "tier").mkdir(mode=0o755)
    before = os.umask(0)
    try:
        tier = make()
        tier.write(ANA, [1])
    finally:
        os.umask(before)
    for path in (tier.root, *tier.root.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("at", [0, 14, 20, 30, 60, 110, 2000, 4079, 4080, 4095, 4096, 40_000, FILE_BYTES - 1])
def test_a_byte_that_was_flipped_is_found_and_the_file_goes(make: Make, at: int) -> None:
    tier = make()
    tier.write(ANA, [1, 2])
    broken, _ = tier.files()
    _flip(broken, at)
    assert tier.read(ANA, [1, 2]) in ([1], [2])
    assert tier.store.status().faults == {"damaged": 1}
    assert "damaged" in tier.store.status().last_error
    tier.settle()
    assert not broken.exists()


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, FILE_BYTES - 1, FILE_BYTES + 1])
def test_a_file_of_another_size_is_a_miss(make: Make, size: int) -> None:
    make().write(ANA, [1])
    tier = make()
    os.truncate(tier.files()[0], size)
    assert tier.read(ANA, [1]) == []
    assert tier.store.status().faults == {"damaged": 1}
    tier.settle()
    assert tier.files() == []


def test_a_file_that_has_gone_is_a_miss(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1, 2])
    tier.files()[0].unlink()
    assert len(tier.read(ANA, [1, 2])) == 1
    assert tier.store.status().faults == {"lost": 1}


@pytest.mark.parametrize("fault", ["damaged", "lost"])
@pytest.mark.parametrize("end", ["computed", "dropped"])
def test_a_chunk_that_could_not_be_read_is_withheld_until_it_is_computed_or_its_session_goes(
    make: Make, fault: str, end: str
) -> None:
    tier = make()
    tier.write(ANA, [1, 2])
    first, second = (chunk_key(ANA, number) for number in (1, 2))
    file = next(tier.root.rglob(f"acme~ana/{first.hex()}-*"))
    if fault == "damaged":
        _flip(file, 2000)
    else:
        file.unlink()
    assert tier.store.find(first, "acme") is Presence.HERE
    assert tier.read(ANA, [1, 2]) == [2]
    assert tier.store.status().faults == {fault: 1}
    for _ in range(2):  # whoever asks is told, and as often as it asks
        assert tier.store.find(first, "acme") is Presence.WITHHELD
    assert tier.store.had(first, "acme")
    assert tier.store.find(second, "acme") is Presence.HERE
    assert tier.store.find(first, EVE.tenant) is Presence.ABSENT
    if end == "computed":
        tier.store.computed([first])
    else:
        tier.store.drop_labelled({ANA.session})
    assert tier.store.find(first, "acme") is Presence.ABSENT
    assert not tier.store.had(first, "acme")


def test_a_chunk_without_a_key_is_withheld_and_one_whose_session_is_gone_is_absent(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.without = {ANA}
    tier = make(gateway=gateway)
    until(lambda: tier.store.find(chunk_key(ANA, 1), "acme") is not Presence.ASK_AGAIN)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.WITHHELD
    gateway.keys.answered(ANA, None, gone=True)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ABSENT


def test_of_chunks_that_could_not_be_read_so_many_are_remembered(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._MOST_UNREADABLE", 2)
    tier = make()
    tier.write(ANA, range(3))
    for file in tier.files():
        file.unlink()
    for number in range(3):
        tier.read(ANA, [number])
    found = [tier.store.find(chunk_key(ANA, number), "acme") for number in range(3)]
    assert found == [Presence.ABSENT, Presence.WITHHELD, Presence.WITHHELD]


def test_files_that_were_swapped_do_not_open(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1, 2])
    one, two = tier.files()
    aside = one.with_name("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert tier.read(ANA, [1, 2]) == []
    assert tier.store.status().faults == {"damaged": 2}


def test_a_file_in_another_sessions_folder_does_not_open(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1])
    tier.write(BEN, [1])
    tier.store.drop(ANA)
    until(lambda: not tier.found("acme~ana"))
    (file,) = tier.files()
    stolen = file.parent.with_name("acme~ana")
    stolen.mkdir(mode=0o700)
    file.rename(stolen / file.name)
    again = make()
    assert again.read(BEN, [1]) == []
    assert again.store.status().faults == {"damaged": 1}


def test_another_models_chunks_are_not_found_and_go(make: Make) -> None:
    make().write(ANA, [1])
    tier = make(fingerprint=b"g" * 32)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ABSENT
    until(lambda: not (tier.root / FINGERPRINT.hex()[:32]).exists())
    assert not tier.files()
    assert tier.write(ANA, [1]).whole


def test_what_is_not_the_tiers_stays_where_it_is(make: Make, tmp_path: Path) -> None:
    others = [
        tmp_path / "tier" / "models" / "harbour" / "weights",
        tmp_path / "tier" / ("A" * 32) / "file",
        tmp_path / "tier" / ("a" * 33) / "file",
        tmp_path / "tier" / FINGERPRINT.hex()[:32] / "acme~ana" / "notes",
        tmp_path / "tier" / FINGERPRINT.hex()[:32] / "notes" / "file",
        tmp_path / "elsewhere" / "file",
    ]
    for other in others:
        other.parent.mkdir(parents=True)
        other.write_text("somebody's")
    link = tmp_path / "tier" / ("b" * 32)
    link.symlink_to(tmp_path / "elsewhere")
    foreign = tmp_path / "tier" / ("c" * 32)
    foreign.mkdir()
    (foreign / "link").symlink_to(tmp_path / "elsewhere")
    tier = make()
    tier.write(ANA, [1])
    until(lambda: not foreign.exists())
    assert [other.read_text() for other in others] == ["somebody's"] * len(others)
    assert link.is_symlink()


@pytest.mark.parametrize("linked", ["tier", f"tier/{FINGERPRINT.hex()[:32]}"])
def test_a_link_is_not_taken_for_the_tiers_folder(make: Make, tmp_path: Path, linked: str) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o755)
    (tmp_path / linked).parent.mkdir(exist_ok=True)
    (tmp_path / linked).symlink_to(tmp_path / "elsewhere")
    tier = make()
    assert "link" in tier.store.status().last_error
    assert not tier.write(ANA, [1]).whole
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o755
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_another_models_file_under_this_ones_name_does_not_open(make: Make) -> None:
    first = make()
    first.write(ANA, [1])
    (old,) = first.files()
    kept = old.read_bytes()
    second = make(fingerprint=b"g" * 32)
    second.write(ANA, [1])
    until(lambda: not old.parent.parent.exists())
    (new,) = second.files()
    new.write_bytes(kept)
    assert second.read(ANA, [1]) == []


def test_another_tenant_gets_nothing_by_the_same_key(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1])
    assert tier.store.find(chunk_key(ANA, 1), "other") is Presence.ABSENT
    assert tier.read(ANA, [1], tenant="other") == []
    assert tier.read(ANA, [1]) == [1]


def test_a_child_reads_what_its_parent_wrote_with_the_parents_key(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1])
    tier.write(BEN, [2])
    assert tier.store.find(chunk_key(ANA, 1), BEN.tenant) is Presence.HERE
    assert tier.read(ANA, [1], tenant=BEN.tenant) == [1]


def test_a_session_that_is_dropped_is_not_found_and_its_files_and_its_key_go(make: Make) -> None:
    tier = make()
    tier.write(ANA, range(5))
    tier.write(EVE, range(5))
    tier.store.drop(ANA)
    assert tier.store.find(chunk_key(ANA, 0), "acme") is Presence.ABSENT
    assert len(tier.gateway.keys) == 1
    until(lambda: not tier.found("acme~ana"))
    assert tier.read(EVE, range(5)) == list(range(5))


def test_what_is_being_written_when_its_session_is_dropped_does_not_stay(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make()
    slow = _Slow(monkeypatch, "write")
    job = tier.begin(ANA, range(3))
    slow.reached.wait(10)
    tier.store.drop(ANA)
    slow.go_on.set()
    assert tier.wait(job).keys == ()
    tier.settle()
    assert tier.files() == []


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
    clock = _Clock()
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


def test_shares_that_a_disk_does_not_take_are_written_when_it_does(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._FIRST_PAUSE_S", 0.01)
    refusals = [OSError(errno.ENOSPC, "full")] * 2
    real = ChunkFiles.write_shares

    def write(files: ChunkFiles, shares: dict[str, float]) -> None:
        if refusals:
            raise refusals.pop()
        real(files, shares)

    monkeypatch.setattr(ChunkFiles, "write_shares", write)
    tier = make()
    tier.write(ANA, [1], tenant_share=0.2)
    until(lambda: _shares_of(tier) == {"acme": 0.2})
    assert "ENOSPC" in tier.store.status().last_error


def _shares_of(tier: Tier) -> object:
    file = tier.root / "shares"
    return json.loads(file.read_text()) if file.exists() else None


def test_a_quarantine_holds_after_restarts_until_the_folder_is_emptied(make: Make) -> None:
    tier = make()
    tier.write(ANA, [1])
    assert not tier.store.quarantined
    tier.store.quarantine()
    mark = tier.root / "quarantined"
    until(mark.exists)
    assert stat.S_IMODE(mark.stat().st_mode) == 0o600
    tier.store.quarantine()  # found once more
    for fingerprint in (FINGERPRINT, b"another model's".ljust(32)):
        assert make(fingerprint=fingerprint).store.quarantined
    make().store.close()
    shutil.rmtree(tier.root)
    assert not make().store.quarantined


def test_a_quarantine_that_a_disk_does_not_take_is_written_when_it_does(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._FIRST_PAUSE_S", 0.01)
    refusals = [OSError(errno.ENOSPC, "full")] * 2
    real = ChunkFiles.write_quarantine

    def write(files: ChunkFiles) -> None:
        if refusals:
            raise refusals.pop()
        real(files)

    monkeypatch.setattr(ChunkFiles, "write_quarantine", write)
    tier = make()
    tier.store.quarantine()
    until((tier.root / "quarantined").exists)
    assert "ENOSPC" in tier.store.status().last_error


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
    clock = _Clock()
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
    now, wall = _Clock(), _Clock()
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
    now, wall = _Clock(), _Clock()
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


def test_no_key_is_a_miss_and_costs_nothing_but_that(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.without = {ANA}
    tier = make(gateway=gateway)
    tier.store.find(chunk_key(ANA, 1), "acme")
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.WITHHELD
    assert tier.read(ANA, [1]) == []
    assert not tier.write(ANA, [2]).whole
    assert tier.store.status().not_stored == {"no_key": 1}
    assert tier.store.status().faults["no_key"] == 2
    assert len(tier.files()) == 1  # it is of use again when there is a key


def test_a_key_that_was_revoked_while_its_session_is_on_the_disk_takes_the_session_along(make: Make) -> None:
    make().write(ANA, [1, 2])
    gateway = Gateway()
    gateway.gone = {ANA}
    tier = make(gateway=gateway)
    assert tier.read(ANA, [1]) == []
    assert tier.store.find(chunk_key(ANA, 2), "acme") is Presence.ABSENT
    until(lambda: not tier.found("acme~ana"))


def test_a_session_that_was_forgotten_while_no_engine_ran_leaves_the_disk_without_being_asked_for(make: Make) -> None:
    first = make()
    for owner in (ANA, BEN, EVE):
        first.write(owner, range(3))
    gateway = Gateway()
    gateway.gone, gateway.without = {ANA}, {EVE}
    tier = make(gateway=gateway)
    until(lambda: {file.parent.name for file in tier.files()} == {"acme~ben", "other~eve"})
    until(lambda: not tier.found("acme~ana"))
    assert len(gateway.keys) == 0  # nobody used one
    assert tier.store.status().faults == {}
    assert sorted(gateway.asked) == [ANA, BEN, EVE]


def test_whoever_the_gateway_could_not_tell_of_is_asked_for_again_until_it_can(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._ASK_AGAIN_S", 0.01)
    first = make()
    for owner in (ANA, BEN):
        first.write(owner, range(3))
    gateway = Gateway()
    gateway.without = {ANA, BEN}  # the vault is sealed
    tier = make(gateway=gateway)
    until(lambda: gateway.asked.count(ANA) > 1)
    gateway.gone = {ANA}
    until(lambda: not tier.found("acme~ana"))
    gateway.without = set()
    tier.settle()
    assert tier.read(BEN, range(3)) == [0, 1, 2]


def test_another_key_than_it_was_written_with_does_not_open_it(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.silent = True
    tier = make(gateway=gateway)
    tier.store.expect(ANA)
    gateway.keys.answered(ANA, tier_key(BEN))
    assert tier.read(ANA, [1]) == []
    assert tier.store.status().faults == {"damaged": 1}


def test_who_asks_while_the_key_is_on_its_way_is_told_to_ask_again(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.silent = True
    tier = make(gateway=gateway)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ASK_AGAIN
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.ASK_AGAIN
    assert gateway.asked.count(ANA) <= 2  # the start asks once, too
    gateway.answer(ANA)
    assert tier.store.find(chunk_key(ANA, 1), "acme") is Presence.HERE


def test_the_heads_of_a_session_come_first_when_it_is_to_be_recalled(make: Make) -> None:
    tier = make()
    tier.write(ANA, [3, 1, 2])
    assert list(tier.store.positions_of(ANA).items()) == [(chunk_key(ANA, number), number) for number in (1, 2, 3)]
    assert (tier.store.chunks_of(ANA), tier.store.chunks_of(BEN)) == (3, 0)
    assert tier.store.positions_of(BEN) == {}


def test_whoever_expects_a_session_hears_whether_its_key_is_there(make: Make) -> None:
    gateway = Gateway()
    gateway.silent = True
    gateway.without = {BEN}
    tier = make(gateway=gateway)
    assert tier.store.expect(ANA) is Presence.ASK_AGAIN
    gateway.answer(ANA)
    assert tier.store.expect(ANA) is Presence.HERE
    tier.store.expect(BEN)
    gateway.answer(BEN)
    assert tier.store.expect(BEN) is Presence.ABSENT
    assert tier.store.status().faults == {}  # nobody missed anything


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


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_left_alone_for_a_while(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    clock = _Clock()
    tier = make(now=clock)
    real = os.write
    writes: list[int] = []

    def refuse(descriptor: int, data: memoryview) -> int:
        writes.append(len(data))
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("appliance.engine.inside.disk.files.os.write", refuse)
    assert not tier.write(ANA, [1]).whole
    assert not tier.write(ANA, [2]).whole
    assert len(writes) == 1
    status = tier.store.status()
    assert status.not_stored == {"error": 2}
    assert errno.errorcode[number] in status.last_error
    assert status.paused
    monkeypatch.setattr("appliance.engine.inside.disk.files.os.write", real)
    clock.now += 1.5
    assert tier.write(ANA, [3]).whole
    assert not tier.store.status().paused
    assert tier.read(ANA, [1, 2, 3]) == [3]
    assert len(tier.files()) == 1


def test_what_is_dropped_goes_at_once_from_a_disk_that_takes_nothing(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = make(now=_Clock())
    tier.write(ANA, range(3))
    write = os.write

    def refuse(descriptor: int, data: memoryview) -> int:
        if len(data) == FILE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", refuse)
    tier.write(BEN, [1])
    tier.store.drop(ANA)
    until(lambda: not tier.found("acme~ana"))
    assert tier.store.status().paused


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS])
def test_what_a_disk_does_not_let_go_of_goes_when_it_does_and_nothing_is_written_before(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    clock = _Clock()
    tier = make(now=clock)
    tier.write(ANA, range(3))
    tier.write(BEN, [1])
    real = os.unlink

    def refuse(path: Path, **_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "unlink", refuse)
    tier.store.drop(ANA)
    until(lambda: tier.store.status().paused)
    assert errno.errorcode[number] in tier.store.status().last_error
    assert not tier.write(BEN, [2]).whole
    assert tier.read(BEN, [1]) == [1]
    assert tier.store.chunks_of(ANA) == 0
    assert len(tier.files()) == 4
    monkeypatch.setattr(os, "unlink", real)
    clock.now += 100.0
    tier.write(BEN, [3])  # the threads look at the clock when they have something to do
    until(lambda: not tier.found("acme~ana"))
    assert tier.write(BEN, [4]).whole
    tier.settle()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_when_the_engine_starts_is_read_and_what_is_old_goes(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = make()
    before.write(ANA, range(3))
    before.write(BEN, range(3))
    before.store.close()
    (old,) = before.found("acme~ben")
    os.utime(old, (1.0, 1.0))
    real = os.open

    def past_the_probe(path: Path, flags: int, mode: int = 0o777) -> int:
        return real(path, flags & ~os.O_DIRECT, mode)  # where a file system does not take that it is not probed further

    def refuse(descriptor: int, data: memoryview) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("appliance.engine.inside.disk.files.os.open", past_the_probe)
    monkeypatch.setattr("appliance.engine.inside.disk.files.os.write", refuse)
    tier = make()
    assert tier.store.status().on
    assert tier.read(ANA, range(3)) == [0, 1, 2]
    until(lambda: not old.exists())
    assert tier.store.status().expired_chunks == 3
    assert not tier.found("probe*")


def test_a_disk_that_cannot_be_read_is_a_miss(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    tier.write(ANA, [1])

    def refuse(descriptor: int, buffers: list[memoryview]) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("appliance.engine.inside.disk.files.os.readv", refuse)
    assert tier.read(ANA, [1]) == []
    assert tier.store.status().faults == {"error": 1}
    assert "EIO" in tier.store.status().last_error


def test_what_is_too_much_for_a_slow_disk_is_dropped_and_reading_goes_on(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._MAX_WAITING_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr("appliance.engine.inside.disk.store._WRITERS", 2)
    clock = _Clock()
    tier = make(now=clock)
    tier.write(BEN, [1])
    slow = _Slow(monkeypatch, "write")
    held_up = tier.begin(ANA, range(6))
    slow.reached.wait(10)
    until(lambda: tier.store.status().waiting_bytes == 4 * CHUNK_BYTES)
    assert tier.write(EVE, [1]).keys == ()  # at once: its room above is wanted
    assert tier.read(BEN, [1]) == [1]
    clock.now += 3.0
    slow.go_on.set()
    assert len(tier.wait(held_up).keys) == 2  # those that were in hand; the rest had waited for too long
    assert tier.store.status().not_stored == {"slow": 1 + 4}


def test_what_waits_behind_writes_that_hang_is_let_go_of_in_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    tier = make(now=clock)
    tier.write(BEN, [1])
    slow = _Slow(monkeypatch, "write")
    in_hand = [tier.begin(ANA, [number]) for number in range(_WRITERS)]
    until(lambda: slow.calls == _WRITERS)
    waiting = tier.begin(ANA, [10, 11])
    assert tier.store.status().answers
    clock.now += 3.0
    assert tier.wait(waiting).keys == ()  # its room above is wanted, and no thread is free to say so
    assert tier.write(EVE, [1]).keys == ()  # nor is anything more taken in
    status = tier.store.status()
    assert (status.not_stored, status.waiting_bytes) == ({"slow": 3}, 0)
    assert (status.answers, status.last_error) == (False, "the disk does not answer")
    assert tier.read(BEN, [1]) == [1]
    slow.go_on.set()
    until(lambda: tier.store.status().stored_chunks == 1 + len(in_hand))
    until(lambda: tier.store.status().answers)
    assert tier.write(EVE, [2]).whole


def test_a_store_that_is_closed_tells_what_became_of_every_job(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = make()
    slow = _Slow(monkeypatch, "write")
    jobs = [tier.begin(ANA, [number]) for number in range(5)]
    slow.reached.wait(10)
    closing = threading.Thread(target=tier.store.close)
    closing.start()
    slow.go_on.set()
    closing.join(10)
    assert sorted(done.job for done in tier.store.finished()) == jobs
    tier.store.drain()


def test_a_disk_that_does_not_answer_at_all_keeps_the_memory_from_being_given_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._STOP_S", 0.05)
    tier = make()
    slow = _Slow(monkeypatch, "write")
    tier.begin(ANA, [1])
    slow.reached.wait(10)
    with pytest.raises(TimeoutError):
        tier.store.close()
    slow.go_on.set()


def test_a_disk_that_does_not_answer_a_read_has_nothing_until_it_does(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._STOP_S", 0.05)
    passed_s = [0.0]
    tier = make(now=lambda: passed_s[0])
    tier.write(ANA, [1])
    tier.write(BEN, [1])
    slow = _Slow(monkeypatch, "readv")
    buffer = memoryview(bytearray(CHUNK_BYTES))
    tier.store.load(99, "acme", [Piece(chunk_key(ANA, 1), 1, buffer)])
    slow.reached.wait(10)
    assert tier.store.find(chunk_key(BEN, 1), "acme") is Presence.HERE
    passed_s[0] += 2.5
    assert tier.store.find(chunk_key(BEN, 1), "acme") is Presence.WITHHELD
    assert tier.store.find(chunk_key(BEN, 2), "acme") is Presence.ABSENT
    status = tier.store.status()
    assert not status.answers
    assert status.last_error == "the disk does not answer"
    with pytest.raises(TimeoutError):
        tier.store.drain()
    slow.go_on.set()
    assert tier.wait(99).whole
    assert tier.store.find(chunk_key(BEN, 1), "acme") is Presence.HERE
    assert tier.store.status().answers


def test_a_disk_that_reads_more_slowly_than_is_of_use_does_not_answer(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._SLOWEST_READ_BYTES_S", CHUNK_BYTES)  # one a second
    monkeypatch.setattr("appliance.engine.inside.disk.store._READERS", 1)
    passed_s = [0.0]
    tier = make(now=lambda: passed_s[0])
    tier.write(ANA, range(5))
    begun, go_on = threading.Semaphore(0), threading.Semaphore(0)
    read = ChunkFiles.read

    def one_by_one(*arguments: Any) -> None:
        begun.release()
        assert go_on.acquire(timeout=20)
        read(*arguments)

    monkeypatch.setattr(ChunkFiles, "read", one_by_one)
    passed_s[0] = 100.0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    tier.store.load(99, "acme", [Piece(chunk_key(ANA, number), number, buffer) for number in range(5)])
    answers = []
    for _ in range(5):
        assert begun.acquire(timeout=20)
        passed_s[0] += 1.9
        answers.append(tier.store.answers())
        go_on.release()
    assert answers == [True, True, True, False, False]
    assert tier.wait(99).whole
    assert tier.store.answers()


def test_two_engines_do_not_share_a_folder(make: Make) -> None:
    first = make()
    first.write(ANA, [1])
    second = Tier(first.root)
    assert not second.store.status().on
    assert "EBUSY" in second.store.status().last_error
    assert not second.write(ANA, [2]).whole
    assert second.store.find(chunk_key(ANA, 1), "acme") is Presence.ABSENT
    assert first.read(ANA, [1]) == [1]
    second.store.close()


def test_a_folder_that_could_not_be_used_is_when_it_can(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._HOUSEKEEPING_S", 0.01)
    first = make()
    first.write(ANA, [1, 2])
    first.write(BEN, [1])
    second = Tier(first.root)
    assert not second.store.status().on
    second.gateway.gone = {BEN}  # forgotten meanwhile
    first.store.close()
    until(lambda: second.store.status().on)
    assert second.read(ANA, [1, 2]) == [1, 2]
    assert second.write(EVE, [3]).whole
    until(lambda: not second.found("acme~ben"))
    second.store.close()


def test_a_folder_that_is_in_quarantine_by_the_time_it_can_be_used_is_left_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._HOUSEKEEPING_S", 0.01)
    first = make()
    first.write(ANA, [1])
    second = Tier(first.root)
    first.store.quarantine()
    until((first.root / "quarantined").exists)
    first.store.close()
    until(lambda: "quarantine" in second.store.status().last_error)
    assert not second.store.status().on
    assert second.read(ANA, [1]) == []
    second.store.quarantine()  # from what it found itself: it has nothing that it could restore any more
    until(lambda: second.store.status().on)
    second.store.close()


def test_a_folder_that_cannot_be_made_turns_the_tier_off(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    tier = Tier(tmp_path / "file" / "tier")
    assert not tier.store.status().on
    assert "ENOTDIR" in tier.store.status().last_error
    assert tier.write(ANA, [1]).keys == ()
    assert tier.store.status().not_stored == {"off": 1}
    tier.store.close()


def test_a_link_in_place_of_a_file_is_not_followed(make: Make, tmp_path: Path) -> None:
    tier = make()
    tier.write(ANA, [1])
    (file,) = tier.files()
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert tier.read(ANA, [1]) == []
    assert elsewhere.exists()


@pytest.mark.parametrize("fault", ["full", "read-only", "full-by-limit"])
def test_a_disk_that_is_full_or_read_only_is_slower_and_never_wrong(tmp_path: Path, fault: str) -> None:
    with _child(fault, str(tmp_path)) as child:
        told = json.loads(child.communicate(timeout=60)[0])
    assert told["before"]  # there was room
    assert told["refused"] > 0
    assert told["kept"] == told["before"]  # what was there is read, byte for byte
    assert told["error"] in ("ENOSPC", "EROFS", "EFBIG")
    assert told["parts"] == 0
    assert told["after"] > told["before"]


@pytest.mark.parametrize("written", [1, 7, 20, 33, 50, 71, 90, 120])
def test_an_engine_that_was_killed_while_it_wrote_leaves_nothing_false(
    make: Make, tmp_path: Path, written: int
) -> None:
    with _child("write", str(tmp_path / "tier")) as child:
        assert child.stdout is not None
        told = [int(child.stdout.readline()) for _ in range(written)]
        child.kill()
        told += [int(line) for line in child.stdout.read().split()]
    tier = make(chunks=10_000)
    assert set(told) <= set(tier.read(ANA, range(max(told) + 8)))
    assert tier.store.status().faults == {}
    tier.settle()
    assert not list(tier.root.rglob("*.part"))


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Slow:
    """A disk that does not answer until it may go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.calls = 0
        real = getattr(os, call)

        def slow(*arguments: Any) -> Any:
            self.calls += 1
            self.reached.set()
            assert self.go_on.wait(20)
            return real(*arguments)

        monkeypatch.setattr(f"appliance.engine.inside.disk.files.os.{call}", slow)


def _flip(file: Path, at: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        byte = opened.read(1)
        opened.seek(at)
        opened.write(bytes([byte[0] ^ 0x10]))


def _child(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.unit.inside.disk.child", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4])
