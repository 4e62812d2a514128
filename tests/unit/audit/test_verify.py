"""Whoever changes a log is found, and the first entry that is wrong is named."""

import itertools
import os
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from appliance.audit.entry import ENTRY_BYTES
from appliance.audit.journal import Journal, read_journal
from appliance.audit.log import CHECKPOINT, JOURNAL, PUBLIC_KEY, WITNESSED, Head
from appliance.audit.notes import Algorithm, Checkpoint, SigningKey, VerifierKey, cosign, sign_checkpoint
from appliance.audit.tree import HASH_BYTES
from appliance.audit.verify import LogTampered, Verified, verify_log
from tests.unit.audit.making import KEY, Clock, draft, drafts, make_log, open_log, sign

VERIFIER = KEY.verifier()
WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
SECOND = SigningKey("second.example", b"2" * 32, Algorithm.COSIGNATURE)
OTHER = SigningKey(KEY.name, b"o" * 32)


def _verify(directory: Path, *witnesses: VerifierKey, at_least: int = 0) -> Verified:
    return verify_log(directory, VERIFIER, witnesses=witnesses, at_least=at_least)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log of 600 entries: two bundles and a part."""
    directory = tmp_path_factory.mktemp("made")
    make_log(directory, 600)
    return directory


@pytest.fixture
def log(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "log"))


def test_a_whole_log_holds(log: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = verify_log(log, VERIFIER, progress=lambda done, of: seen.append((done, of)))
    assert (found.size, found.unsigned, found.boots, found.clock_steps) == (600, 0, 1, [])
    assert seen[-1] == (600, 600)


@pytest.mark.parametrize(
    "name", ["tile/0/001", "tile/entries/001", "record/000", "tile/0/002.p/88", CHECKPOINT, JOURNAL, f"{WITNESSED}/600"]
)
def test_nobody_waits_at_a_pipe_in_the_place_of_a_file(log: Path, name: str) -> None:
    path = log / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(LogTampered) as caught:
        _verify(log)
    assert str(path) in caught.value.cause


@pytest.mark.parametrize("name", ["tile/0/001", "record/000", CHECKPOINT, JOURNAL])
def test_a_file_longer_than_any_can_be_is_not_read(log: Path, name: str) -> None:
    os.truncate(log / name, 1 << 42)
    with pytest.raises(LogTampered) as caught:
        _verify(log)
    assert f"{log / name}: it is longer than" in caught.value.cause


def test_memory_does_not_grow_with_the_log(tmp_path: Path) -> None:
    log, one = open_log(tmp_path), draft()
    peaks = []
    for size in (8_192, 32_768):
        while log.size < size:
            log.append([one] * 4096)
            log.publish(sign)
        # Twice: the interpreter's table of names is made anew now and then, and is counted then.
        peaks.append(min(_peak_bytes(lambda: _verify(tmp_path)) for _ in range(2)))
    log.close()
    # One byte kept of each entry more would be 24,576.
    assert peaks[1] - peaks[0] < 20_000, peaks


def _peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _put(path: Path, at: int, byte: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([byte]))


def _entry_at(name: str, content: bytes) -> list[int | None]:
    """The entry that each byte of a file is of."""
    if name == "tile/0/000.p/3":
        return [at // HASH_BYTES for at in range(len(content))]
    head, entry_bytes, sum_bytes = (24, ENTRY_BYTES, 4) if name == JOURNAL else (0, 0, 0)
    found: list[int | None] = [None] * head
    for sequence in range(3) if name.startswith((JOURNAL, "tile/entries", "record")) else ():
        length = int.from_bytes(content[len(found) : len(found) + 2], "big")
        found += [sequence] * (2 + length + entry_bytes + sum_bytes)
    return found + [None] * (len(content) - len(found))


def _co_signed(log: Path, *, larger: Sequence[int] = ()) -> None:
    """Have two witnesses co-sign the newest checkpoint, and one of them each that is made when the log has grown."""
    note = (log / CHECKPOINT).read_text()
    _witness(log, note)
    size = note.split("\n")[1]
    path = log / WITNESSED / size
    path.write_text(path.read_text() + cosign(note, SECOND, 1_700_000_000))
    for first, end in pairwise([int(size), *larger]):
        again = open_log(log)
        again.append(drafts(range(first, end)))
        again.publish(sign)
        again.close()
        _witness(log, (log / CHECKPOINT).read_text())


BOTH = (WITNESS.verifier(), SECOND.verifier())


@pytest.mark.parametrize("named", [BOTH, BOTH[:1], ()], ids=["both", "one", "none"])
def test_every_flipped_bit_of_a_co_signed_checkpoint_is_found_and_its_file_named(
    tmp_path: Path, named: tuple[VerifierKey, ...]
) -> None:
    """Whoever is named: an older checkpoint that the witness co-signed, too, does not stand in for the newer one."""
    make_log(tmp_path, 3)
    _co_signed(tmp_path, larger=[5])
    assert verify_log(tmp_path, VERIFIER, witnesses=BOTH).unknown == {}
    for path in sorted((tmp_path / WITNESSED).iterdir()):
        content = path.read_bytes()
        for at, bit in itertools.product(range(len(content)), range(8)):
            _put(path, at, content[at] ^ (1 << bit))
            with pytest.raises(LogTampered) as found:
                verify_log(tmp_path, VERIFIER, witnesses=named)
            assert str(tmp_path / WITNESSED) in found.value.cause, (path, at, bit)
            if named == BOTH:
                assert str(path) in found.value.cause, (path, at, bit)
        path.write_bytes(content)


def test_a_line_of_a_witness_that_was_not_named_is_an_error_unless_it_may_pass_and_is_counted(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    _co_signed(tmp_path, larger=[5])
    second = f"second.example (key {BOTH[1].key_id.hex()})"
    with pytest.raises(LogTampered) as found:
        _verify(tmp_path, BOTH[0])
    assert f"{tmp_path / WITNESSED / '3'} has a line of {second}" in found.value.cause
    assert "--witness" in found.value.remedy
    passed = verify_log(tmp_path, VERIFIER, witnesses=BOTH[:1], allow_unknown=True)
    assert (passed.unknown, passed.witnessed) == ({second: 1}, {"witness.example": (5, 1_700_000_000)})
    assert passed.record()["unknown_witnesses"] == {second: 1}
    assert len(verify_log(tmp_path, VERIFIER, allow_unknown=True).unknown) == 2


@pytest.mark.parametrize("wrong", ["twice", "name", "witness signed another"])
def test_a_kept_checkpoint_is_the_logs_signature_and_co_signatures_and_nothing_else(tmp_path: Path, wrong: str) -> None:
    make_log(tmp_path, 3)
    _co_signed(tmp_path)
    path = tmp_path / WITNESSED / "3"
    note = path.read_text()
    if wrong == "twice":
        path.write_text(note + next(line for line in note.splitlines(keepends=True) if KEY.name + " " in line))
    elif wrong == "name":
        path.rename(path.with_name("4"))
    else:
        path.write_text(note + cosign(sign(Head(2, b"r" * 32)), WITNESS, 9))
    with pytest.raises(LogTampered) as found:
        _verify(tmp_path, *BOTH)
    assert str(tmp_path / WITNESSED) in found.value.cause


def test_the_newest_that_a_witness_co_signed_cannot_be_taken_away_from_who_knows_of_it(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    _co_signed(tmp_path, larger=[5])
    saw = {BOTH[0]: 5, BOTH[1]: 3}
    assert verify_log(tmp_path, VERIFIER, witnesses=BOTH, saw=saw).size == 5
    (tmp_path / WITNESSED / "5").unlink()
    with pytest.raises(LogTampered, match=r"what witness\.example co-signed last is missing"):
        verify_log(tmp_path, VERIFIER, witnesses=BOTH, saw=saw)


def test_two_witnesses_of_one_name_are_two(tmp_path: Path) -> None:
    """One whose directory was lost begins anew with another key."""
    make_log(tmp_path, 3)
    note = (tmp_path / CHECKPOINT).read_text()
    _witness(tmp_path, note)
    anew = SigningKey(WITNESS.name, b"n" * 32, Algorithm.COSIGNATURE)
    with pytest.raises(LogTampered, match="co-signed nothing"):
        _verify(tmp_path, WITNESS.verifier(), anew.verifier())
    path = tmp_path / WITNESSED / "3"
    path.write_text(path.read_text() + cosign(note, anew, 1_700_000_001))
    assert _verify(tmp_path, WITNESS.verifier(), anew.verifier()).unknown == {}
    with pytest.raises(LogTampered, match="cannot be checked"):
        _verify(tmp_path, WITNESS.verifier())


def test_a_public_key_that_was_exchanged_beside_the_log_is_found(log: Path) -> None:
    (log / PUBLIC_KEY).write_text(f"{VERIFIER}\n")
    assert _verify(log).size == 600
    (log / PUBLIC_KEY).write_text(f"{OTHER.verifier()}\n")
    with pytest.raises(LogTampered, match="public key that lies with the log"):
        _verify(log)


@pytest.mark.timeout(600)
def test_flipped_bytes_of_a_log_with_full_and_upper_tiles_are_found_in_every_file(tmp_path: Path) -> None:
    """Every byte of every small file; of the large ones, which 257 entries fill, every 499th."""
    make_log(tmp_path, 255)
    _co_signed(tmp_path, larger=[256, 257])
    (tmp_path / PUBLIC_KEY).write_text(f"{VERIFIER}\n")
    journal = tmp_path / JOURNAL
    os.truncate(journal, len(journal.read_bytes().rstrip(b"\0")) + 1)  # without the megabytes that it took ahead
    files = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert {"tile/0/000", "tile/1/000.p/1", "tile/0/001.p/1", "checkpoints/255", "checkpoints/257"} <= files.keys()
    for name, path in files.items():
        content = path.read_bytes()
        end = len(content.rstrip(b"\0"))
        step = 1 if end < 500 else 499
        for at in range(0, end, step):
            _put(path, at, content[at] ^ 0x01)
            with pytest.raises(LogTampered):
                verify_log(tmp_path, VERIFIER, witnesses=BOTH, pause=lambda: None)
            _put(path, at, content[at])
        assert path.read_bytes() == content, name
    assert _verify(tmp_path, *BOTH).size == 257


@pytest.mark.timeout(600)
def test_every_flipped_byte_of_a_small_log_is_found_and_its_entry_named(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    _co_signed(tmp_path)
    (tmp_path / PUBLIC_KEY).write_text(f"{VERIFIER}\n")
    journal = tmp_path / JOURNAL
    os.truncate(journal, len(journal.read_bytes().rstrip(b"\0")) + 5_000)  # of the megabytes that it took ahead
    assert _verify(tmp_path, *BOTH).size == 3
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size):
        content = path.read_bytes()
        entries = _entry_at(str(path.relative_to(tmp_path)), content)
        # Behind the frames lie zeros that were taken ahead: a few of them stand for all.
        end = len(content.rstrip(b"\0"))
        for at in [*range(end), *range(end, len(content), 1_003)]:
            _put(path, at, content[at] ^ 0x01)
            with pytest.raises(LogTampered) as found:
                verify_log(tmp_path, VERIFIER, witnesses=BOTH, pause=lambda: None)
            assert entries[at] in (None, found.value.sequence), (path, at)
            _put(path, at, content[at])
    assert _verify(tmp_path, *BOTH).size == 3


@pytest.mark.parametrize("added", [b"\0", b"x", b"\0\0", b"\0\x05hello"])
def test_whatever_is_added_to_a_file_is_found(log: Path, added: bytes) -> None:
    """But for the lock, which holds nothing, and zeros at the end of the journal, which are space that was taken."""
    files = [path for path in log.rglob("*") if path.is_file() and path.name not in ("lock", "log.vkey")]
    for path in files:
        if path.name == "journal" and not added.strip(b"\0"):
            continue
        content = path.read_bytes()
        path.write_bytes(content + added)
        with pytest.raises(LogTampered):
            verify_log(log, VERIFIER, pause=lambda: None)
        path.write_bytes(content)


@pytest.mark.parametrize("entry", [0, 255, 256, 511, 512, 599])
def test_the_first_changed_entry_is_named(log: Path, entry: int) -> None:
    bundle, place = divmod(entry, 256)
    name = f"{bundle:03}" if bundle < 2 else "002.p/88"
    for folder, at in (("tile/entries", place * (ENTRY_BYTES + 2) + 2 + 100), ("tile/0", place * 32)):
        path = log / folder / name
        content = bytearray(path.read_bytes())
        content[at] ^= 0x80
        path.write_bytes(content)
        with pytest.raises(LogTampered) as found:
            _verify(log)
        assert found.value.sequence == entry
        assert str(entry) in found.value.message
        content[at] ^= 0x80
        path.write_bytes(content)


def test_a_changed_record_names_its_entry(log: Path) -> None:
    path = log / "record/001"
    content = bytearray(path.read_bytes())
    at = 0
    for _ in range(10):
        at += 2 + int.from_bytes(content[at : at + 2], "big")
    content[at + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(LogTampered, match="record of entry 266 was changed"):
        _verify(log)


def _damage(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("what", ["record", "entry", "tile"])
@pytest.mark.parametrize("later", ["length of a record", "length of an entry", "cut"])
def test_of_several_that_are_wrong_the_first_is_named(log: Path, what: str, later: str) -> None:
    record = (log / "record/001").read_bytes()
    starts = [0]
    while starts[-1] < len(record):
        starts.append(starts[-1] + 2 + int.from_bytes(record[starts[-1] : starts[-1] + 2], "big"))
    stride = ENTRY_BYTES + 2
    if later == "length of a record":
        _damage(log / "record/001", starts[20])
    elif later == "length of an entry":
        _damage(log / "tile/entries/001", 20 * stride)
    else:
        os.truncate(log / "tile/entries/001", 20 * stride + 50)
    with pytest.raises(LogTampered) as found:
        _verify(log)
    assert found.value.sequence == 256 + 20
    if what == "record":
        _damage(log / "record/001", starts[10] + 40)
    elif what == "entry":
        _damage(log / "tile/entries/001", 10 * stride + 22)  # its monotonic clock: that of the next one goes back
    else:
        _damage(log / "tile/0/001", 10 * HASH_BYTES)
    with pytest.raises(LogTampered) as found:
        _verify(log)
    assert found.value.sequence == 256 + 10


def test_swapped_entries_are_found(log: Path) -> None:
    path = log / "tile/entries/000"
    content = path.read_bytes()
    stride = ENTRY_BYTES + 2
    one, two = content[10 * stride : 11 * stride], content[11 * stride : 12 * stride]
    path.write_bytes(content[: 10 * stride] + two + one + content[12 * stride :])
    with pytest.raises(LogTampered) as found:
        _verify(log)
    assert found.value.sequence == 10


@pytest.mark.parametrize(
    "name", ["tile/0/001", "tile/entries/001", "record/001", "tile/1/000.p/2", JOURNAL, CHECKPOINT]
)
def test_what_is_missing_is_named(log: Path, name: str) -> None:
    (log / name).unlink()
    with pytest.raises(LogTampered) as found:
        _verify(log)
    assert name.split("/")[0] in found.value.cause


def test_a_deleted_log_is_found(tmp_path: Path) -> None:
    with pytest.raises(LogTampered, match="no checkpoint"):
        _verify(tmp_path)


def test_a_log_written_anew_with_another_key_is_found(log: Path) -> None:
    head = Head(600, _verify(log).root)
    (log / CHECKPOINT).write_text(sign_checkpoint(Checkpoint(KEY.name, head.size, head.root), OTHER))
    with pytest.raises(LogTampered, match="does not hold"):
        _verify(log)


def test_a_checkpoint_of_another_log_is_found(log: Path) -> None:
    stranger = SigningKey("other.example", b"s" * 32)
    (log / CHECKPOINT).write_text(sign_checkpoint(Checkpoint("other.example", 600, _verify(log).root), stranger))
    with pytest.raises(LogTampered):
        _verify(log)


def _witness(log: Path, note: str, time_s: int = 1_700_000_000) -> None:
    folder = log / WITNESSED
    folder.mkdir(exist_ok=True)
    (folder / note.split("\n")[1]).write_text(note + cosign(note, WITNESS, time_s))


def test_a_restored_older_copy_is_found_by_what_a_witness_saw(tmp_path: Path) -> None:
    log, older = tmp_path / "log", tmp_path / "older"
    make_log(log, 300)
    shutil.copytree(log, older)
    again = open_log(log)
    again.append(drafts(range(300, 400)))
    again.publish(sign)
    again.close()
    _witness(log, (log / CHECKPOINT).read_text())
    assert _verify(log, WITNESS.verifier()).witnessed == {"witness.example": (400, 1_700_000_000)}
    shutil.copytree(log / WITNESSED, older / WITNESSED)
    with pytest.raises(LogTampered, match="cut off"):
        _verify(older, WITNESS.verifier())
    shutil.rmtree(older / WITNESSED)
    with pytest.raises(LogTampered, match="cut off"):
        _verify(older, at_least=400)


def test_a_forked_history_is_found_by_what_a_witness_saw(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    make_log(one, 300)
    _witness(one, (one / CHECKPOINT).read_text())
    forked = open_log(other)
    forked.append(drafts(range(1000, 1300)))
    forked.append(drafts(range(300, 400)))
    forked.publish(sign)
    forked.close()
    shutil.copytree(one / WITNESSED, other / WITNESSED)
    with pytest.raises(LogTampered, match="another log of 300 entries"):
        _verify(other, WITNESS.verifier())


def test_a_log_that_the_witness_never_saw_is_told(log: Path) -> None:
    with pytest.raises(LogTampered, match="co-signed nothing"):
        _verify(log, WITNESS.verifier())


def test_a_forged_co_signature_is_found(log: Path) -> None:
    note = (log / CHECKPOINT).read_text()
    impostor = SigningKey(WITNESS.name, b"x" * 32, Algorithm.COSIGNATURE)
    folder = log / WITNESSED
    folder.mkdir()
    (folder / "600").write_text(note + cosign(note, impostor, 5))
    with pytest.raises(LogTampered):
        _verify(log, WITNESS.verifier())


@pytest.mark.parametrize("years", [-2, 2])
def test_a_clock_that_was_set_is_told_and_is_no_tampering(tmp_path: Path, years: int) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    log.append(drafts(range(3)))
    step_ns = years * 365 * 86_400 * 1_000_000_000
    clock.wall_ns += step_ns
    log.append(drafts(range(3, 6)))
    log.publish(sign)
    log.close()
    (step,) = _verify(tmp_path).clock_steps
    assert step.sequence == 3
    assert abs(step.step_ns - step_ns) < 1_000_000_000


def test_a_monotonic_clock_that_goes_back_within_a_boot_is_tampering(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    log.append(drafts(range(3)))
    clock.monotonic_ns -= 5_000_000_000
    log.append(drafts(range(3, 6)))
    log.publish(sign)
    log.close()
    with pytest.raises(LogTampered, match="entry 3 is older"):
        _verify(tmp_path)


def test_a_new_boot_begins_its_monotonic_clock_anew(tmp_path: Path) -> None:
    clock = Clock()
    log = open_log(tmp_path, clock=clock)
    log.append(drafts(range(3)))
    log.close()
    clock.monotonic_ns = 1
    log = open_log(tmp_path, clock=clock, boot_id=b"c" * 16)
    log.append(drafts(range(3, 6)))
    log.publish(sign)
    log.close()
    assert _verify(tmp_path).boots == 2


def test_entries_behind_the_checkpoint_are_checked_and_counted_apart(log: Path) -> None:
    again = open_log(log)
    again.append(drafts(range(600, 610)))
    again.close()
    assert _verify(log).unsigned == 10


def test_a_journal_that_says_otherwise_than_the_bundles_is_found(log: Path, tmp_path: Path) -> None:
    other = open_log(tmp_path / "other")
    other.append(drafts(range(400)))
    other.append(drafts([1000, *range(401, 600)]))
    other.close()
    content = read_journal(tmp_path / "other" / JOURNAL)
    ours = read_journal(log / JOURNAL)
    assert content is not None
    assert ours is not None
    # Its frames are whole, and one of them is another one.
    frames = [*ours.frames[:400], content.frames[400], *ours.frames[401:]]
    journal, _ = Journal.open(tmp_path / "made anew")
    journal.append(frames, privileged=True)
    journal.close()
    (tmp_path / "made anew").replace(log / JOURNAL)
    with pytest.raises(LogTampered, match="entry 400 is two"):
        _verify(log)
