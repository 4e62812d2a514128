"""The tier on disk: what it keeps, for whom, and that it lies there encrypted."""

import os
import stat
from pathlib import Path

import pytest

from appliance.engine.inside.disk.store import Presence
from tests.unit.inside.disk.tier import (
    ANA,
    BEN,
    CHUNK_BYTES,
    EVE,
    Make,
    Slow,
    chunk_key,
    content,
    tier_key,
    until,
)


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
    slow = Slow(monkeypatch, "write")
    job = tier.begin(ANA, range(3))
    slow.reached.wait(10)
    tier.store.drop(ANA)
    slow.go_on.set()
    assert tier.wait(job).keys == ()
    tier.settle()
    assert tier.files() == []


def test_the_heads_of_a_session_come_first_when_it_is_to_be_recalled(make: Make) -> None:
    tier = make()
    tier.write(ANA, [3, 1, 2])
    assert list(tier.store.positions_of(ANA).items()) == [(chunk_key(ANA, number), number) for number in (1, 2, 3)]
    assert (tier.store.chunks_of(ANA), tier.store.chunks_of(BEN)) == (3, 0)
    assert tier.store.positions_of(BEN) == {}
