"""The log on disk: what was appended is there after a start, whatever ended the run before."""

import contextlib
import errno
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.entry import Entry
from appliance.audit.journal import RESERVE_BYTES, Journal, JournalUnusable, read_journal
from appliance.audit.log import CHECKPOINT, JOURNAL, LogDamaged, LogInUse, LogUnwritable
from appliance.audit.verify import verify_log
from tests.unit.audit.making import KEY, draft, drafts, make_log, open_log, real_clock, sign

VERIFIER = KEY.verifier()


def test_entries_are_numbered_and_stamped_in_their_order(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert log.append(drafts(range(3))) == 0
    assert log.append(drafts(range(3, 5))) == 3
    assert log.size == 5
    log.publish(sign)
    log.close()
    content = read_journal(tmp_path / JOURNAL)
    assert content is not None
    entries = [Entry.unpack(frame.entry) for frame in content.frames]
    assert [entry.sequence for entry in entries] == [0, 1, 2, 3, 4]
    assert entries[2].wall_ns < entries[3].wall_ns


@pytest.mark.parametrize("size", [1, 255, 256, 257, 4095, 4096, 4097, 5000])
def test_a_log_goes_on_where_it_was(tmp_path: Path, size: int) -> None:
    make_log(tmp_path, size, batch=700)
    log = open_log(tmp_path)
    assert log.size == size
    log.append(drafts(range(size, size + 300)))
    log.publish(sign)
    log.close()
    assert verify_log(tmp_path, VERIFIER).size == size + 300


def test_checkpoints_at_any_size_hold(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    rng = random.Random(5)  # noqa: S311 (the same sizes every time)
    size = 0
    while size < 2000:
        more = rng.randint(1, 170)
        log.append(drafts(range(size, size + more)))
        size += more
        log.publish(sign)
        assert verify_log(tmp_path, VERIFIER).size == size
    log.close()


def test_upper_tiles_are_taken_up_after_a_start(tmp_path: Path) -> None:
    one = draft()
    log = open_log(tmp_path)
    for _ in range(17):
        log.append([one] * 4096)
        log.publish(sign)
    log.close()
    log = open_log(tmp_path)
    log.append([one] * 500)
    log.publish(sign)
    log.close()
    assert (tmp_path / "tile/1/000").stat().st_size == 256 * 32
    assert verify_log(tmp_path, VERIFIER).size == 17 * 4096 + 500


@pytest.mark.parametrize("damage", ["cut", "zeros", "flipped", "garbage"])
def test_a_last_record_that_is_not_whole_is_cut_off_and_told(tmp_path: Path, damage: str) -> None:
    log = open_log(tmp_path)
    log.append(drafts(range(3)))
    end = log._journal.length
    log.append(drafts([3]))
    whole = log._journal.length
    log.close()
    journal = tmp_path / JOURNAL
    content = bytearray(journal.read_bytes())
    if damage == "cut":
        content = content[: end + (whole - end) // 2]
    elif damage == "zeros":
        content[end + 30 : whole] = bytes(whole - end - 30)
    elif damage == "flipped":
        content[whole - 50] ^= 1
    else:
        content[end:whole] = os.urandom(whole - end)
    journal.write_bytes(content)
    log = open_log(tmp_path)
    assert log.size == 3
    assert log.cut_bytes > 0
    log.append(drafts([4]))
    log.publish(sign)
    log.close()
    assert verify_log(tmp_path, VERIFIER).size == 4


def test_a_tail_of_zeros_alone_is_no_loss(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    with (tmp_path / JOURNAL).open("ab") as file:
        file.write(bytes(100_000))
    log = open_log(tmp_path)
    assert (log.size, log.cut_bytes) == (3, 0)
    log.close()


def test_the_journal_cut_at_every_byte_keeps_what_is_before(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    ends = [log._journal.length]
    for one in range(4):
        log.append(drafts([one]))
        ends.append(log._journal.length)
    log.close()
    content = (tmp_path / JOURNAL).read_bytes()
    for length in range(ends[0], ends[-1], 7):
        (tmp_path / JOURNAL).write_bytes(content[:length])
        log = open_log(tmp_path)
        assert log.size == sum(end <= length for end in ends[1:])
        log.close()


def test_two_processes_cannot_append(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(LogInUse):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def test_a_log_shorter_than_its_checkpoint_is_not_gone_on_with(tmp_path: Path) -> None:
    make_log(tmp_path, 10)
    (tmp_path / JOURNAL).unlink()
    with pytest.raises(LogDamaged, match="10 entries"):
        open_log(tmp_path)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["pwrite", "fdatasync", "posix_fallocate"])
def test_what_the_disk_refuses_is_not_in_the_log_and_the_next_append_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    log = open_log(tmp_path)
    log.append(drafts(range(2)))

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    many = drafts(range(2, 1500)) if call == "posix_fallocate" else drafts([2])
    many = many * 10 if call == "posix_fallocate" else many
    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(LogUnwritable) as refused:
            log.append(many)
    assert JOURNAL in refused.value.cause
    assert os.strerror(number) in refused.value.cause
    assert log.size == 2
    assert log.append(drafts([7])) == 2
    log.close()
    log = open_log(tmp_path)
    assert (log.size, log.cut_bytes) == (3, 0)
    log.close()


def test_a_full_disk_leaves_room_for_an_administrator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = open_log(tmp_path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    some = drafts(range(100))
    taken = 0
    with contextlib.suppress(LogUnwritable):
        while taken < 100_000:
            log.append(some)
            taken += 100
    with pytest.raises(LogUnwritable, match="No space"):
        log.append(some)
    for privileged in range(RESERVE_BYTES // 100_000):
        log.append(drafts(range(100)), privileged=True)
        assert log.size == taken + 100 * (privileged + 1)
    log.close()


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["open", "pwrite", "fsync", "replace"])
def test_a_checkpoint_that_cannot_be_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    """The disk fails at the first such call, then at the second, and so on, until none is left to fail."""
    log = open_log(tmp_path)
    log.append(drafts(range(600)))
    real, calls, fails_at, failed = getattr(os, call), 0, 0, True

    def sometimes(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise OSError(number, os.strerror(number))
        return real(*given, **named)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, sometimes)
        while failed:
            calls, fails_at = 0, fails_at + 1
            with contextlib.suppress(LogUnwritable):
                log.publish(sign)
            failed, calls = calls >= fails_at, fails_at
            log.append(drafts([fails_at]))
    assert fails_at > 4
    log.publish(sign)
    size = log.size
    log.close()
    assert verify_log(tmp_path, VERIFIER).size == size == 600 + fails_at


def test_files_are_for_their_user_only(tmp_path: Path) -> None:
    directory = tmp_path / "audit"
    make_log(directory, 600)
    assert directory.stat().st_mode & 0o777 == 0o700
    for path in directory.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_file_that_is_no_journal_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b"something else entirely, and longer than a head")
    with pytest.raises(JournalUnusable):
        Journal.open(tmp_path / JOURNAL)
    assert (tmp_path / JOURNAL).read_bytes().startswith(b"something")


def _append_until_killed(directory: Path, told: int) -> None:
    """Append, and write how many entries there are to `told`, first those that were found."""
    log = open_log(directory, clock=real_clock)
    os.write(told, b"%d\n" % log.size)
    while True:
        log.append(drafts(range(log.size, log.size + 10)))
        os.write(told, b"%d\n" % log.size)
        if log.size % 320 == 0:
            log.publish(sign)


@pytest.mark.timeout(600)
def test_killed_at_any_moment_no_acknowledged_entry_is_lost(tmp_path: Path) -> None:
    rng = random.Random(3)  # noqa: S311 (no secret)
    acknowledged = 0
    for _ in range(300):
        told, telling = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _append_until_killed(tmp_path, telling)
            finally:
                os._exit(1)
        os.close(telling)
        with os.fdopen(told) as said:
            found = int(said.readline())
            assert found >= acknowledged
            for _ in range(rng.randint(0, 6)):
                said.readline()
            os.kill(child, signal.SIGKILL)
            acknowledged = max([found, *map(int, said.read().split())])
        os.waitpid(child, 0)
    log = open_log(tmp_path, clock=real_clock)
    assert log.size >= acknowledged > 3000
    log.publish(sign)
    log.close()
    assert verify_log(tmp_path, VERIFIER).size >= acknowledged
    assert (tmp_path / CHECKPOINT).exists()


def test_the_reserve_is_there_after_the_journal_was_begun_anew_and_on_a_full_disk_it_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = draft()
    log = open_log(tmp_path)
    log.append([one] * 5000)
    log.publish(sign)
    assert log._journal.base > 0

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    base = log._journal.base
    with contextlib.suppress(LogUnwritable):
        for _ in range(100):
            log.append([one] * 100)
    log.append([one] * 500, privileged=True)
    log.publish(sign)
    assert log._journal.base == base
    log.append([one] * 100, privileged=True)
    log.close()
    assert verify_log(tmp_path, VERIFIER).unsigned == 100


def _restart(directory: Path, kill_at: int) -> bool:
    """A start and its first checkpoint, in a process that is killed before its `kill_at`th step; whether it ended."""
    child = os.fork()
    if child == 0:
        taken = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def step(*arguments: Any, **named: Any) -> Any:
                nonlocal taken
                taken += 1
                if taken == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **named)

            return step

        try:
            for name in ("open", "pwrite", "fsync", "fdatasync", "replace", "rename", "unlink", "rmdir", "mkdir"):
                setattr(os, name, counted(getattr(os, name)))
            log = open_log(directory)
            log.append(drafts([4999]))
            log.publish(sign)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("published", "more", "let_go_after"), [(600, 0, 16), (600, 200, 16), (500, 300, 2)])
def test_killed_at_any_step_of_a_start_the_folder_verifies_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: int, more: int, let_go_after: int
) -> None:
    monkeypatch.setattr("appliance.audit.log._LET_GO_AFTER", let_go_after)
    made = tmp_path / "made"
    log = open_log(made)
    log.append(drafts(range(published)))
    log.publish(sign)
    log.append(drafts(range(published, published + more)))
    log.close()
    found = []
    for kill_at in range(1, 1000):
        directory = Path(shutil.copytree(made, tmp_path / "log"))
        ended = _restart(directory, kill_at)
        found.append(verify_log(directory, VERIFIER).size)
        # The next start finishes it, and leaves nothing half done.
        assert _restart(directory, 0)
        assert verify_log(directory, VERIFIER).unsigned == 0
        assert not list(directory.rglob("*.new"))
        assert len(list(directory.rglob("*.p/*"))) == 3 + (directory / "tile/1").exists()
        shutil.rmtree(directory)
        if ended:
            break
    assert ended
    assert sorted(set(found)) == [published, published + more + 1]
    assert found == sorted(found)
