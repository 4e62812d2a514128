"""The log on disk: what was appended is there after a start, whatever ended the run before."""

import contextlib
import errno
import os
import platform
import random
import shutil
import signal
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.appender import open_log as open_and_tell
from appliance.audit.entry import Entry, open_record
from appliance.audit.events import LOG_RECOVERED
from appliance.audit.journal import RESERVE_BYTES, Journal, JournalUnusable, read_journal
from appliance.audit.log import CHECKPOINT, JOURNAL, LogDamaged, LogInUse, LogUnwritable
from appliance.audit.verify import verify_log
from tests.unit.audit.making import BOOT, KEY, Keys, draft, drafts, make_log, open_log, real_clock, sign

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


def test_who_has_opened_a_log_has_it_until_it_is_closed(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(LogInUse):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def _append_when_told(directory: Path, gate: int, told: int, end: int) -> None:
    """Once `gate` is closed, open the log and append; say what came of it, and keep the log until `end` is closed."""
    os.read(gate, 1)
    said = b"f"
    try:
        log = open_log(directory, clock=real_clock)
        log.append(drafts(range(10)))
        said = b"a"
    except LogInUse:
        said = b"r"
    finally:
        os.write(told, said)
    os.read(end, 1)


def test_of_two_processes_that_try_to_append_one_does_and_the_other_is_refused(tmp_path: Path) -> None:
    for round_ in range(1, 11):
        (gate, opening), (said, told), (end, ending) = os.pipe(), os.pipe(), os.pipe()
        children = []
        for _ in range(2):
            if (child := os.fork()) == 0:
                try:
                    os.close(opening)
                    os.close(ending)
                    _append_when_told(tmp_path, gate, told, end)
                finally:
                    os._exit(0)
            children.append(child)
        os.close(opening)  # both at once
        answers = os.read(said, 1) + os.read(said, 1)
        with pytest.raises(LogInUse):
            open_log(tmp_path)
        os.close(ending)
        for child in children:
            os.waitpid(child, 0)
        for descriptor in (gate, said, told, end):
            os.close(descriptor)
        assert sorted(answers) == sorted(b"ar")
        log = open_log(tmp_path, clock=real_clock)
        assert log.size == 10 * round_
        log.publish(sign)
        log.close()
    assert verify_log(tmp_path, KEY.verifier()).size == 100


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


_BEGINNING_ANEW = ("open", "pwrite", "posix_fallocate", "fsync", "replace", "close")


@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for a while"])
@pytest.mark.parametrize(
    ("call", "number"),
    [*((call, number) for call in _BEGINNING_ANEW for number in (errno.EIO, errno.ENOSPC)), ("open", errno.EMFILE)],
)
def test_wherever_beginning_the_journal_anew_fails_nothing_acknowledged_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, lasts: bool
) -> None:
    """The first such call fails, then the second, and so on, until none is left to fail."""
    monkeypatch.setattr("appliance.audit.log._LET_GO_AFTER", 1)
    real, calls, fails_at, failed = getattr(os, call), 0, 0, True

    def sometimes(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        fails = calls == fails_at or (lasts and calls > fails_at)
        if not fails or call == "close":
            done = real(*given, **named)
        if fails:
            raise OSError(number, os.strerror(number))
        return done

    while failed:
        directory = tmp_path / str(fails_at)
        log = open_log(directory)
        log.append(drafts(range(300)))
        publication = log.prepare()
        log.write(publication, sign(publication.head))
        calls, fails_at, acknowledged = 0, fails_at + 1, 300
        with monkeypatch.context() as patched:
            patched.setattr(os, call, sometimes)
            log.conclude(publication)
            failed = calls >= fails_at
            with contextlib.suppress(LogUnwritable):
                acknowledged = 1 + log.append(drafts([300]))
        assert log.size == acknowledged
        acknowledged = 2 + log.append(drafts([301, 302]))
        log.close()
        log = open_log(directory)
        assert (log.size, log.cut_bytes) == (acknowledged, 0)
        log.publish(sign)
        log.close()
        assert verify_log(directory, VERIFIER).size == acknowledged
    assert fails_at > 1


def test_nothing_is_appended_to_a_journal_whose_name_is_not_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.audit.log._LET_GO_AFTER", 1)
    log = open_log(tmp_path)
    log.append(drafts(range(300)))
    publication = log.prepare()
    log.write(publication, sign(publication.head))

    def refuse(_: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patched:
        patched.setattr("appliance.audit.journal.sync_directory", refuse)
        log.conclude(publication)
        for privileged in (False, True):
            with pytest.raises(LogUnwritable, match="Input/output error"):
                log.append(drafts([300]), privileged=privileged)
    assert log.append(drafts([300])) == 300
    assert log._journal.base == 256
    log.close()
    log = open_log(tmp_path)
    assert log.size == 301
    log.close()


def test_a_start_has_on_the_disk_what_the_run_before_may_have_left_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked whether an entry is there answers for it."""
    make_log(tmp_path, 3)
    synced, fsync = set(), os.fsync

    def seen(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    open_log(tmp_path).close()
    assert synced >= {tmp_path.stat().st_ino, (tmp_path / JOURNAL).stat().st_ino}


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


_STEPS = (
    *("open", "pwrite", "posix_fallocate", "fsync", "fdatasync"),
    *("replace", "rename", "unlink", "rmdir", "mkdir"),
)


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


def _until_killed(work: Callable[[], None], kill_at: int) -> bool:
    """Do something in a process that is killed before its `kill_at`th step; whether it ended."""
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
            for name in _STEPS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFEXITED(status)


def _restart(directory: Path, kill_at: int) -> bool:
    """A start and its first checkpoint."""

    def work() -> None:
        log = open_log(directory)
        log.append(drafts([4999]))
        log.publish(sign)

    return _until_killed(work, kill_at)


def _told(journal: Path) -> list[int]:
    """How many bytes starts said they cut off."""
    content = read_journal(journal)
    assert content is not None
    entries = [(Entry.unpack(frame.entry), frame.sealed) for frame in content.frames]
    return [
        open_record(entry, sealed, Keys()).record["counts"]["bytes"]
        for entry, sealed in entries
        if entry.event_class == LOG_RECOVERED.number
    ]


_TAILS = {"a byte": b"x", "less than the event": b"\0" * 100 + b"y", "more than the event": b"z" * 9000}


def _torn(directory: Path, tail: bytes) -> Path:
    """A log of three entries with something behind them."""
    log = open_log(directory, clock=real_clock)
    log.append(drafts(range(3)))
    end = log._journal.length
    log.close()
    with (directory / JOURNAL).open("r+b") as file:
        file.seek(end)
        file.write(tail)
    return directory


def test_that_the_tail_was_cut_says_what_software_cut_it(tmp_path: Path) -> None:
    open_and_tell(_torn(tmp_path / "made", b"x"), boot_id=BOOT, clock=real_clock).close()
    content = read_journal(tmp_path / "made" / JOURNAL)
    assert content is not None
    cut = content.frames[-1]
    record = open_record(Entry.unpack(cut.entry), cut.sealed, Keys()).record
    assert record["action"] == "log.recovered"
    assert record["versions"] == {"holdfast": version("holdfast"), "python": platform.python_version()}


@pytest.mark.parametrize("tail", _TAILS.values(), ids=_TAILS)
def test_killed_at_any_step_a_start_that_cut_the_log_has_said_so_in_the_end(tmp_path: Path, tail: bytes) -> None:
    made = _torn(tmp_path / "made", tail)
    for kill_at in range(1, 100):
        directory = Path(shutil.copytree(made, tmp_path / str(kill_at)))

        def start(directory: Path = directory) -> None:
            open_and_tell(directory, boot_id=BOOT, clock=real_clock).close()

        ended = _until_killed(start, kill_at)
        start()
        told = _told(directory / JOURNAL)
        # Killed after the event, before the rest was overwritten, a start cut that, too.
        assert told[0] == len(tail)
        assert len(told) <= 2
        start()
        assert _told(directory / JOURNAL) == told
        log = open_log(directory, clock=real_clock)
        log.publish(sign)
        log.close()
        assert verify_log(directory, VERIFIER).size == 3 + len(told)
        if ended:
            break
    assert ended
    assert kill_at > 4


@pytest.mark.parametrize("tail", _TAILS.values(), ids=_TAILS)
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "fdatasync"])
def test_a_start_that_could_not_say_what_it_cut_leaves_it_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, tail: bytes
) -> None:
    real, calls, fails_at, failed = getattr(os, call), 0, 0, True

    def sometimes(*given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= fails_at:
            raise OSError(number, os.strerror(number))
        return real(*given, **named)

    made = _torn(tmp_path / "made", tail)
    while failed:
        directory = Path(shutil.copytree(made, tmp_path / str(fails_at)))
        calls, fails_at = 0, fails_at + 1
        with monkeypatch.context() as patched:
            patched.setattr(os, call, sometimes)
            with contextlib.suppress(LogUnwritable):
                open_and_tell(directory, boot_id=BOOT, clock=real_clock).close()
            failed = calls >= fails_at
        open_and_tell(directory, boot_id=BOOT, clock=real_clock).close()
        told = _told(directory / JOURNAL)
        assert told[0] == len(tail)
        assert len(told) <= 2
    assert fails_at > 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("published", "more", "let_go_after"), [(300, 0, 16), (300, 60, 16), (250, 30, 2)])
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
