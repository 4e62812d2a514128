"""Old entries go when they are old, by a clock that nobody sets; the log stays whole, and theft is no retention."""

import asyncio
import hashlib
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from appliance.audit.entry import seal
from appliance.audit.events import ENTRIES_MISSING, ENTRIES_REMOVED, STORE_MARKED, SYSTEM, Event
from appliance.audit.log import AuditLog, Stamp
from appliance.audit.marks import remembered_by_log
from appliance.audit.notes import Algorithm, SigningKey
from appliance.audit.proof import prove, verify_proof
from appliance.audit.reading import EntryRemoved, LogReader, LogUnreadable
from appliance.audit.retention import (
    DAY_NS,
    LivedTime,
    Removal,
    RemovalFailed,
    RemovalUnsigned,
    Retention,
    newest_removal,
)
from appliance.audit.search import Query, search
from appliance.audit.tree import tile_path
from appliance.audit.verify import LogTampered, Verified, verify_log
from appliance.audit.witness import Witness
from appliance.audit.witnessing import make_request, take_reply
from appliance.errors import HoldfastError
from tests.unit.audit.making import KEY, Keys, draft, open_log, sign

VERIFIER = KEY.verifier()
HOUR_NS = DAY_NS // 24
PER_DAY = 64
YEAR_NS = 365 * DAY_NS


class Days:
    """Both clocks, moved by the test."""

    def __init__(self) -> None:
        self.wall_ns = 1_700_000_000_000_000_000
        self.monotonic_ns = DAY_NS
        self.boot = b"b" * 16

    def __call__(self) -> Stamp:
        return Stamp(self.wall_ns, self.monotonic_ns)

    def pass_ns(self, time_ns: int) -> None:
        self.wall_ns += time_ns
        self.monotonic_ns += time_ns


class Node:
    """A node's log, as retention has it; with a clock of its own, and no process beside the test's."""

    def __init__(self, directory: Path, clock: Days, *, days: int = 100) -> None:
        self.directory = directory
        self.clock = clock
        self.keys = Keys()
        self.log: AuditLog = open_log(directory, clock=clock, boot_id=clock.boot)
        self.retention = Retention(self, directory, days=days)
        self.signs = True
        self._events = 0

    async def record(self, *events: Event, privileged: bool = False) -> int:
        return self.log.append([self._draft(event) for event in events], privileged=privileged)

    async def checkpoint(self) -> dict[str, Any]:
        if self.signs:
            self.log.publish(sign)
        return {"checkpoint_size": self.log.published.size}

    def live(self, days: int) -> None:
        """Let days pass, with the same number of entries in each."""
        for _ in range(days):
            for _ in range(4):
                self.clock.pass_ns(DAY_NS // 4)
                self.log.append([draft()] * (PER_DAY // 4))
            self.log.publish(sign)

    def run(self) -> Removal | None:
        return asyncio.run(self.retention.run())

    def restart(self, *, rebooted: bool = False) -> None:
        self.log.close()
        if rebooted:
            self.clock.boot = os.urandom(16)
            self.clock.monotonic_ns = 0
        self.begin()

    def begin(self) -> None:
        self.log = open_log(self.directory, clock=self.clock, boot_id=self.clock.boot)
        self.retention = Retention(self, self.directory, days=self.retention.days)

    def events(self, number: int) -> list[int]:
        log = LogReader(self.directory)
        return [s for s in range(log.oldest, log.size) if log.entry(s).event_class == number]

    def _draft(self, event: Event) -> Any:
        self._events += 1
        plain = event.kind is ENTRIES_REMOVED
        return seal(
            event.kind.number,
            event.record({"holdfast": "0"}),
            keys=None if plain else self.keys,
            scope="system",
            actor="",
            session="",
            random=hashlib.sha256(b"event %d" % self._events).digest(),
        )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Days]:
    """A log of 120 days, 30 bundles, and the clock at its end."""
    directory = tmp_path_factory.mktemp("made")
    clock = Days()
    node = Node(directory, clock)
    node.live(120)
    node.log.close()
    return directory, clock


@pytest.fixture
def node(made: tuple[Path, Days], tmp_path: Path) -> Node:
    clock = Days()
    vars(clock).update(vars(made[1]))
    return Node(Path(shutil.copytree(made[0], tmp_path / "log")), clock)


def _bundles(directory: Path, folder: str) -> list[int]:
    return sorted(int(path.name) for path in (directory / folder).iterdir() if path.is_file())


def test_what_is_older_than_the_retention_is_removed_and_the_rest_holds(node: Node) -> None:
    whole = verify_log(node.directory, VERIFIER)
    assert whole.removed is None
    removed = node.run()
    assert removed is not None
    # 120 days of 64 entries; all entries of a bundle (4 days) are 100 days old, or it stays.
    assert (removed.first, removed.kept_from, removed.missing, removed.days) == (0, 5 * 256, 0, 100)
    assert _bundles(node.directory, "record")[0] == _bundles(node.directory, "tile/entries")[0] == 5
    assert _bundles(node.directory, "tile/0")[0] == 0
    found = verify_log(node.directory, VERIFIER)
    assert found.removed is not None
    assert (found.removed.count, found.removed.kept_from, found.removed.said_by) == (1280, 1280, removed.sequence)
    assert found.size == whole.size + 1
    assert (removed.size, removed.root) == (whole.size, whole.root)
    assert node.retention.oldest == (1280, LogReader(node.directory).entry(1280).wall_ns)


def test_a_removal_is_announced_once_however_often_its_checkpoint_fails(node: Node) -> None:
    node.signs = False
    for _ in range(3):
        with pytest.raises(RemovalUnsigned):
            node.run()
    (announced,) = node.events(ENTRIES_REMOVED.number)
    assert _bundles(node.directory, "record")[0] == 0
    node.signs = True
    removed = node.run()
    assert removed is not None
    assert (removed.sequence, removed.kept_from) == (announced, 1280)
    assert _bundles(node.directory, "record")[0] == 5
    assert verify_log(node.directory, VERIFIER).removed is not None


def test_an_announced_removal_is_not_done_where_a_destination_has_come_to_need_it(node: Node) -> None:
    node.signs = False
    with pytest.raises(RemovalUnsigned):
        node.run()
    node.signs = True
    node.retention.needed_from = lambda: 512
    removed = node.run()
    assert removed is not None
    assert removed.kept_from == 512
    assert _bundles(node.directory, "record")[0] == 2


def test_an_entry_goes_within_a_day_of_being_old_and_not_before(node: Node) -> None:
    node.live(100)
    ages = []
    for _ in range(20):
        node.live(1)
        node.run()
        log = LogReader(node.directory)
        ages.append((node.clock.wall_ns - log.entry(log.oldest + 255).wall_ns) / DAY_NS)
    # Of the oldest bundle, the youngest entry: the bundle before it, four days older, went when it was a hundred.
    assert all(96 <= age < 101 for age in ages[5:]), ages
    assert verify_log(node.directory, VERIFIER).removed is not None


def test_removed_entries_give_a_clear_error_and_kept_ones_are_proved(node: Node) -> None:
    before = LogReader(node.directory)
    node.run()
    log = LogReader(node.directory)
    for reader in (before, log):
        with pytest.raises(EntryRemoved, match="from 256 on are not in the audit log any more") as removed:
            reader.entry(300)
        assert "1280" in removed.value.cause
    assert verify_proof(prove(log, 1280), VERIFIER).entry.sequence == 1280
    with pytest.raises(EntryRemoved):
        prove(log, 1279)
    assert [entry.sequence for entry, _ in log.backwards(1300)][-1] == 1280
    assert [entry.sequence for entry, _ in before.backwards(1300)][-1] == 1280


def test_a_search_ends_at_the_oldest_and_says_so(node: Node) -> None:
    node.run()
    log = LogReader(node.directory)
    found = search(log, node.keys, Query(before=1290))
    assert (len(found.found), found.go_on_before, found.oldest) == (10, None, 1280)
    assert len(search(log, node.keys, Query(since_ns=0, before=1285)).found) == 5
    for gone in (Query(before=1280), Query(until_ns=log.entry(1280).wall_ns)):
        with pytest.raises(EntryRemoved):
            search(log, node.keys, gone)


@pytest.mark.parametrize("years", [2, -2])
@pytest.mark.parametrize("rebooted", [False, True])
def test_a_clock_that_is_set_makes_nothing_old(node: Node, years: int, rebooted: bool) -> None:
    node.retention.days = 121
    assert node.run() is None
    if rebooted:
        node.restart(rebooted=True)
    node.retention.days = 130
    node.clock.wall_ns += years * YEAR_NS
    node.log.append([draft()] * 300)
    node.log.publish(sign)
    assert node.run() is None
    assert LogReader(node.directory).oldest == 0
    # Set right again: the log goes by what it lived through, neither more nor less.
    node.clock.wall_ns -= years * YEAR_NS
    node.live(20)
    removed = node.run()
    assert removed is not None
    lived_days = 20 + 120 + (7 if rebooted and years > 0 else 0)
    assert removed.kept_from <= (lived_days - 130) * PER_DAY + 256
    assert verify_log(node.directory, VERIFIER).clock_steps


def test_time_that_the_machine_was_off_counts_for_a_week_at_most(node: Node) -> None:
    log = LogReader(node.directory)
    before_ns = LivedTime(log, 0).total_ns
    for off_days in (3, 30):
        node.clock.pass_ns(off_days * DAY_NS)
        node.restart(rebooted=True)
        node.log.append([draft()])
    lived_ns = LivedTime(LogReader(node.directory), 0).total_ns - before_ns
    assert lived_ns == (3 + 7) * DAY_NS


def test_one_run_removes_at_most_a_quarter_and_the_next_is_a_day_later(node: Node) -> None:
    node.retention.days = 7
    bundles = node.log.size // 256
    removed = node.run()
    assert removed is not None
    assert removed.kept_from == 256 * -(-bundles // 4)
    for _ in range(3):
        assert node.run() is None
        node.restart()
        node.retention.days = 7
    node.clock.pass_ns(DAY_NS)
    node.log.append([draft()])
    node.log.publish(sign)
    again = node.run()
    assert again is not None
    assert again.first == removed.kept_from
    assert verify_log(node.directory, VERIFIER).removed is not None


def test_what_a_destination_needs_stays(node: Node) -> None:
    node.retention.needed_from = lambda: 700
    removed = node.run()
    assert removed is not None
    assert removed.kept_from == 512
    assert "700" in node.retention.held


def test_what_no_checkpoint_names_is_not_removed_nor_by_an_event_that_none_names(node: Node) -> None:
    node.signs = False
    with pytest.raises(RemovalUnsigned):
        node.run()
    assert LogReader(node.directory).oldest == 0
    node.signs = True
    assert node.run() is not None


def test_files_that_cannot_be_removed_are_named_and_removed_later(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.unlink

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path.name == "002":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, missing_ok=missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(RemovalFailed, match="002: Permission denied"):
            node.run()
    assert verify_log(node.directory, VERIFIER).removed is not None
    node.run()
    assert LogReader(node.directory).oldest == 1280


def _steps(node: Node, kill_at: int) -> bool:
    """A run in a process of its own that is killed before its `kill_at`th step; whether it came to its end."""
    node.log.close()
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
            node.begin()
            node.log.publish(sign)
            for name in ("pwrite", "fsync", "fdatasync", "replace"):
                setattr(os, name, counted(getattr(os, name)))
            Path.unlink = counted(Path.unlink)  # type: ignore[method-assign]
            node.run()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not os.WIFEXITED(status) or os.WEXITSTATUS(status) == 0
    node.begin()
    return os.WIFEXITED(status)


@pytest.mark.timeout(300)
def test_killed_at_any_step_the_log_verifies_and_the_removal_is_finished(
    made: tuple[Path, Days], tmp_path: Path
) -> None:
    whole = verify_log(made[0], VERIFIER).size
    half_done = 0
    for kill_at in range(1, 1000):
        clock = Days()
        vars(clock).update(vars(made[1]))
        node = Node(Path(shutil.copytree(made[0], tmp_path / "log")), clock)
        ended = _steps(node, kill_at)
        node.log.publish(sign)  # as an appender does at its start
        found = verify_log(node.directory, VERIFIER)
        assert found.size >= whole
        half_done += found.removed is not None and found.removed.count < 1280
        node.run()
        assert node.retention.oldest is not None
        assert LogReader(node.directory).oldest == node.retention.oldest[0] == 1280
        assert _bundles(node.directory, "record")[0] == _bundles(node.directory, "tile/entries")[0] == 5
        after = verify_log(node.directory, VERIFIER)
        assert after.removed is not None
        assert (after.removed.count, after.removed.missing) == (1280, 0)
        node.log.close()
        shutil.rmtree(node.directory)
        if ended:
            break
    assert ended
    assert half_done >= 8, "it was killed between the files, too"


def _verify_meanwhile(node: Node, act: Callable[[int], object]) -> Verified:
    """Verify, and have something done after each bundle."""

    def progress(done: int, _of: int) -> None:
        act(done // 256)

    return verify_log(node.directory, VERIFIER, progress=progress)


@pytest.mark.parametrize("checked", [1, 3, 5, 30])
def test_a_removal_while_the_log_is_verified_is_no_tampering(node: Node, checked: int) -> None:
    whole = verify_log(node.directory, VERIFIER).size
    found = _verify_meanwhile(node, lambda done: node.run() if done == checked else None)
    assert LogReader(node.directory).oldest == 1280
    if checked >= 5:
        assert (found.size, found.removed) == (whole, None)
    else:
        assert found.removed is not None
        assert (found.size, found.removed.count) == (whole + 1, 1280 - 256 * checked)


def test_a_removal_behind_an_earlier_one_while_the_log_is_verified_is_no_tampering(node: Node) -> None:
    node.run()
    node.live(10)

    def remove(done: int) -> None:
        if done == 2:
            assert node.run() is not None

    found = _verify_meanwhile(node, remove)
    assert found.removed is not None
    oldest = LogReader(node.directory).oldest
    assert found.removed.count == found.removed.kept_from == oldest > 1280
    assert found.size == node.log.size


def test_entries_that_filled_a_bundle_and_were_removed_while_the_log_is_verified_are_no_tampering(
    node: Node,
) -> None:
    """What a checkpoint named last is in a part; a part that is removed is one that grew first."""
    node.live(1)

    def outlive(done: int) -> None:
        if done == 30:
            node.live(500)
            while node.run() is not None:
                node.live(1)

    found = _verify_meanwhile(node, outlive)
    assert LogReader(node.directory).oldest > 31 * 256
    assert found.removed is not None
    assert found.removed.count == found.removed.kept_from - 30 * 256


def test_what_is_deleted_behind_a_removal_while_the_log_is_verified_is_found(node: Node) -> None:
    def remove(done: int) -> None:
        if done == 2:
            node.run()
            (node.directory / "record/005").unlink()
            (node.directory / "tile/entries/005").unlink()

    with pytest.raises(LogTampered, match="entry 1280 is missing"):
        _verify_meanwhile(node, remove)


def test_a_log_that_is_replaced_while_it_is_verified_is_found(node: Node, tmp_path: Path) -> None:
    """The one that takes its place holds in itself, and its removal is signed, but it is not what was signed before."""
    clock = Days()
    clock.pass_ns(1)
    other = Node(tmp_path / "other", clock)
    other.live(130)
    other.run()

    def replace(done: int) -> None:
        if done == 2:
            shutil.rmtree(node.directory)
            shutil.copytree(other.directory, node.directory)

    with pytest.raises(LogTampered, match="not the one of its checkpoint"):
        _verify_meanwhile(node, replace)


@pytest.mark.parametrize("name", ["record/000", "tile/entries/000", "record/007", "tile/entries/007"])
def test_a_bundle_that_somebody_deleted_is_no_retention(node: Node, name: str) -> None:
    (node.directory / name).unlink()
    with pytest.raises(LogTampered, match=f"entry {256 * int(name[-3:])} is missing"):
        verify_log(node.directory, VERIFIER)


def test_what_is_deleted_behind_a_removal_is_found_and_named(node: Node) -> None:
    node.run()
    (node.directory / "record/005").unlink()
    (node.directory / "tile/entries/005").unlink()
    with pytest.raises(LogTampered, match="entry 1280 is missing") as found:
        verify_log(node.directory, VERIFIER)
    assert "those before 1280" in found.value.cause


def test_retention_tells_of_what_it_finds_missing_and_never_owns_it(node: Node) -> None:
    node.retention.days = 118
    for bundle in (0, 1):
        (node.directory / f"record/00{bundle}").unlink()
        (node.directory / f"tile/entries/00{bundle}").unlink()
    assert node.run() is None
    assert node.run() is None
    assert "from 0 to 511" in node.retention.alarm
    node.log.publish(sign)
    assert len(node.events(ENTRIES_MISSING.number)) == 1
    with pytest.raises(LogTampered, match="entry 0 is missing"):
        verify_log(node.directory, VERIFIER)
    node.retention.days = 100
    removed = node.run()
    assert removed is not None
    assert (removed.first, removed.missing) == (0, 512)
    node.live(5)
    node.run()
    found = verify_log(node.directory, VERIFIER)
    assert found.removed is not None
    assert found.removed.missing == 512
    assert found.removed.said_by > removed.sequence


def _take(node: Node, bundles: int) -> None:
    for bundle in range(bundles):
        for name in (f"record/{bundle:03d}", f"tile/entries/{bundle:03d}"):
            (node.directory / name).rename(node.directory / f"taken-{name.replace('/', '-')}")


def _put_back(node: Node, bundles: int) -> None:
    for bundle in range(bundles):
        for name in (f"record/{bundle:03d}", f"tile/entries/{bundle:03d}"):
            (node.directory / f"taken-{name.replace('/', '-')}").rename(node.directory / name)


def test_the_alarm_ends_when_what_was_missing_is_back_and_another_loss_is_another_event(node: Node) -> None:
    node.retention.days = 1000
    _take(node, 2)
    node.run()
    assert "from 0 to 511" in node.retention.alarm
    _put_back(node, 2)
    node.run()
    assert node.retention.alarm == ""
    _take(node, 2)
    node.run()
    _put_back(node, 2)
    _take(node, 4)
    for _ in range(2):
        node.run()
        assert "from 0 to 1023" in node.retention.alarm
    node.log.publish(sign)
    assert len(node.events(ENTRIES_MISSING.number)) == 3


def test_the_alarm_of_what_is_gone_does_not_end_because_its_time_has_come(node: Node) -> None:
    _take(node, 2)
    removed = node.run()
    assert removed is not None
    assert (removed.kept_from, removed.missing) == (1280, 512)
    node.live(5)
    node.run()
    assert "from 0 to 511" in node.retention.alarm


def test_a_hole_stops_retention(node: Node) -> None:
    node.retention.days = 100
    (node.directory / "record/004").unlink()
    with pytest.raises((LogUnreadable, EntryRemoved)):
        node.run()
    assert LogReader(node.directory).oldest == 0


def test_a_removal_that_is_only_claimed_counts_for_nothing(node: Node) -> None:
    """Its bytes are changed in the bundle, or it stands in the journal behind the checkpoint."""
    node.signs = False
    with pytest.raises(RemovalUnsigned):
        node.run()
    node.log.close()
    for folder in ("record", "tile/entries"):
        (node.directory / folder / "000").unlink()
    with pytest.raises(LogTampered, match="entry 0 is missing"):
        verify_log(node.directory, VERIFIER)


def test_a_removal_of_another_log_is_found(node: Node) -> None:
    event = Event(
        ENTRIES_REMOVED,
        SYSTEM,
        counts={"first": 0, "last": 255, "count": 256, "missing": 0, "size": 300, "retention_days": 1},
        details={"root": bytes(32).hex()},
    )
    asyncio.run(node.record(event))
    node.log.publish(sign)
    assert newest_removal(LogReader(node.directory), node.log.size, 0) is not None
    for folder in ("record", "tile/entries"):
        (node.directory / folder / "000").unlink()
    with pytest.raises(LogTampered, match="removed entries of another log"):
        verify_log(node.directory, VERIFIER)


@pytest.mark.parametrize("entry", [0, 255, 256, 1279])
def test_a_changed_hash_of_a_removed_entry_is_found(node: Node, entry: int) -> None:
    node.run()
    path = node.directory / tile_path(0, entry // 256)
    content = bytearray(path.read_bytes())
    content[entry % 256 * 32] ^= 1
    path.write_bytes(content)
    with pytest.raises(LogTampered) as found:
        verify_log(node.directory, VERIFIER)
    assert found.value.sequence == entry // 256 * 256


@pytest.mark.parametrize("tile", ["tile/0/000", "tile/0/001"])
def test_a_hash_tile_of_removed_entries_must_be_there(node: Node, tile: str) -> None:
    node.run()
    (node.directory / tile).unlink()
    with pytest.raises(LogTampered, match="missing"):
        verify_log(node.directory, VERIFIER)


def test_a_witness_from_before_the_removal_is_still_held_to(node: Node, tmp_path: Path) -> None:
    witness = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
    (node.directory / "log.vkey").write_text(f"{VERIFIER}\n")
    for now_s in (1_700_000_000, 1_700_000_001):
        request = make_request(node.directory, old_size=0 if now_s == 1_700_000_000 else 7680)
        reply = Witness(tmp_path / "witness", witness).cosign(request, VERIFIER, now_s)
        take_reply(node.directory, request, reply, VERIFIER, witness.verifier())
        node.run()
    found = verify_log(node.directory, VERIFIER, witnesses=[witness.verifier()])
    assert found.removed is not None
    assert found.witnessed["witness.example"][0] == 7681


def test_a_log_goes_on_after_a_removal_and_an_older_copy_of_it_too(node: Node, tmp_path: Path) -> None:
    kept = shutil.copytree(node.directory, tmp_path / "kept")
    node.run()
    node.restart()
    node.live(5)
    assert verify_log(node.directory, VERIFIER).removed is not None
    node.log.close()
    shutil.rmtree(node.directory)
    shutil.copytree(kept, node.directory)
    node.begin()
    assert node.run() is not None
    assert verify_log(node.directory, VERIFIER).removed is not None


def test_of_a_mark_that_was_removed_nothing_can_be_told(node: Node) -> None:
    log = LogReader(node.directory)
    assert remembered_by_log(log, node.keys).mark == 0
    node.run()
    assert remembered_by_log(LogReader(node.directory), node.keys).mark is None
    asyncio.run(node.record(Event(STORE_MARKED, SYSTEM, counts={"mark": 9})))
    assert remembered_by_log(LogReader(node.directory), node.keys).mark == 9


def test_a_destination_that_cannot_tell_stops_the_removal(node: Node) -> None:
    def unknown() -> int | None:
        raise HoldfastError("a destination's cursor cannot be read", cause="", remedy="")

    node.retention.needed_from = unknown
    with pytest.raises(HoldfastError, match="cursor"):
        node.run()
    assert LogReader(node.directory).oldest == 0


@pytest.mark.parametrize("name", ["checkpoint", "journal"])
@pytest.mark.parametrize("content", [b"abc", b"x" * 5000])
def test_a_file_that_is_none_of_the_log_is_an_error_of_ours(tmp_path: Path, name: str, content: bytes) -> None:
    node = Node(tmp_path / "audit", Days())
    node.live(3)
    (node.directory / name).write_bytes(content)
    with pytest.raises(HoldfastError):
        node.run()
