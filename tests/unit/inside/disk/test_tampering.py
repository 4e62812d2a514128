"""Files that were changed, moved, swapped, linked or taken away outside: found, never used, and a miss."""

import os
import stat
from pathlib import Path

import pytest

from appliance.engine.inside.disk.store import Presence
from tests.unit.inside.disk.tier import (
    ANA,
    BEN,
    EVE,
    FILE_BYTES,
    FINGERPRINT,
    Gateway,
    Make,
    chunk_key,
    flip,
    tier_key,
    until,
)


@pytest.mark.parametrize("at", [0, 14, 20, 30, 60, 110, 2000, 4079, 4080, 4095, 4096, 40_000, FILE_BYTES - 1])
def test_a_byte_that_was_flipped_is_found_and_the_file_goes(make: Make, at: int) -> None:
    tier = make()
    tier.write(ANA, [1, 2])
    broken, _ = tier.files()
    flip(broken, at)
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
        flip(file, 2000)
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


def test_another_key_than_it_was_written_with_does_not_open_it(make: Make) -> None:
    make().write(ANA, [1])
    gateway = Gateway()
    gateway.silent = True
    tier = make(gateway=gateway)
    tier.store.expect(ANA)
    gateway.keys.answered(ANA, tier_key(BEN))
    assert tier.read(ANA, [1]) == []
    assert tier.store.status().faults == {"damaged": 1}


def test_a_link_in_place_of_a_file_is_not_followed(make: Make, tmp_path: Path) -> None:
    tier = make()
    tier.write(ANA, [1])
    (file,) = tier.files()
    elsewhere = tmp_path / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert tier.read(ANA, [1]) == []
    assert elsewhere.exists()
