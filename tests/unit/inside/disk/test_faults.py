"""Disks that are full, read-only, slow, hang or fail, engines that are killed: no fault is more than a miss."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from appliance.engine.inside.disk.files import ChunkFiles
from appliance.engine.inside.disk.jobs import Piece
from appliance.engine.inside.disk.store import _WRITERS, Presence
from tests.unit.inside.disk.tier import (
    ANA,
    BEN,
    CHUNK_BYTES,
    EVE,
    FILE_BYTES,
    FINGERPRINT,
    Clock,
    Make,
    Slow,
    Tier,
    chunk_key,
    until,
)


def test_shares_that_a_disk_does_not_take_are_written_when_it_does(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.engine.inside.disk.store._AGAIN_S", 0.01)
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
    monkeypatch.setattr("appliance.engine.inside.disk.store._AGAIN_S", 0.01)
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


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_is_left_alone_for_a_while(
    make: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    clock = Clock()
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
    tier = make(now=Clock())
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
    clock = Clock()
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
    monkeypatch.setattr("appliance.engine.inside.disk.write_queue._MAX_WAITING_BYTES", 4 * CHUNK_BYTES)
    monkeypatch.setattr("appliance.engine.inside.disk.store._WRITERS", 2)
    clock = Clock()
    tier = make(now=clock)
    tier.write(BEN, [1])
    slow = Slow(monkeypatch, "write")
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
    clock = Clock()
    tier = make(now=clock)
    tier.write(BEN, [1])
    slow = Slow(monkeypatch, "write")
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
    slow = Slow(monkeypatch, "write")
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
    slow = Slow(monkeypatch, "write")
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
    slow = Slow(monkeypatch, "readv")
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
    monkeypatch.setattr("appliance.engine.inside.disk.health._SLOWEST_READ_BYTES_S", CHUNK_BYTES)  # one a second
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


def _shares_of(tier: Tier) -> object:
    file = tier.root / "shares"
    return json.loads(file.read_text()) if file.exists() else None


def _child(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tests.unit.inside.disk.child", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[4])
