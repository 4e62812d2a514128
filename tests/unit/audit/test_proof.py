"""A proof stands by itself: who has it and the log's public key needs neither the log nor its keys."""

from pathlib import Path

import pytest

from appliance.audit.entry import EntryInvalid, open_record
from appliance.audit.log import CHECKPOINT, WITNESSED
from appliance.audit.notes import Algorithm, NoteInvalid, SigningKey, cosign
from appliance.audit.proof import ProofUnreadable, prove, verify_proof
from appliance.audit.reading import LogReader, LogUnreadable, NoSuchEntry
from appliance.audit.tree import ProofInvalid
from appliance.audit.witness import Witness
from appliance.audit.witnessing import cosigned_note, last_seen, make_request, take_reply
from appliance.errors import HoldfastError
from tests.unit.audit.making import KEY, Keys, drafts, make_log, open_log, sign

WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
OTHER_WITNESS = SigningKey("other.example", b"o" * 32, Algorithm.COSIGNATURE)
SEEN_S = 1_800_000_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("proved") / "audit"
    make_log(directory, 600)
    return directory


@pytest.mark.parametrize("sequence", [0, 255, 256, 599])
def test_an_entry_is_proved_without_its_record(made: Path, sequence: int) -> None:
    found = verify_proof(prove(LogReader(made), sequence), KEY.verifier())
    assert (found.entry.sequence, found.checkpoint.size, found.record) == (sequence, 600, None)


def test_a_disclosed_record_is_checked_with_it(made: Path) -> None:
    log = LogReader(made)
    frame = log.frame(300)
    opened = open_record(log.entry(300), frame.sealed, Keys())
    proof = prove(log, 300, salt=opened.salt, record=opened.record)
    assert verify_proof(proof, KEY.verifier()).record == opened.record
    with pytest.raises(EntryInvalid):
        verify_proof(prove(log, 300, salt=opened.salt, record={**opened.record, "outcome": "failure"}), KEY.verifier())


def test_a_changed_proof_does_not_hold(made: Path) -> None:
    proof = prove(LogReader(made), 300)
    for at in range(0, len(proof), 3):
        if proof[at] == "\n":
            continue
        changed = proof[:at] + ("A" if proof[at] != "A" else "B") + proof[at + 1 :]
        with pytest.raises(HoldfastError):
            verify_proof(changed, KEY.verifier())


def test_a_proof_of_another_entry_or_log_does_not_hold(made: Path) -> None:
    log = LogReader(made)
    one, other = prove(log, 10).split("\n"), prove(log, 11).split("\n")
    with pytest.raises(ProofInvalid):
        verify_proof("\n".join([one[0], other[1], *one[2:]]), KEY.verifier())
    with pytest.raises(NoteInvalid):
        verify_proof("\n".join(one), SigningKey(KEY.name, b"o" * 32).verifier())
    with pytest.raises(ProofUnreadable):
        verify_proof("hello", KEY.verifier())


def test_what_no_checkpoint_names_yet_is_read_and_not_proved(tmp_path: Path) -> None:
    make_log(tmp_path, 300)
    log = open_log(tmp_path)
    log.append(drafts(range(300, 310)))
    reader = LogReader(tmp_path)
    assert (reader.published, reader.size) == (300, 310)
    assert reader.entry(309).sequence == 309
    with pytest.raises(NoSuchEntry, match="newest checkpoint"):
        prove(reader, 305)
    with pytest.raises(NoSuchEntry):
        reader.frame(310)
    log.close()


def test_a_reader_outlives_newer_checkpoints(tmp_path: Path) -> None:
    """Partial tiles that it would read have been put away: wider ones serve as well."""
    make_log(tmp_path, 300)
    reader = LogReader(tmp_path)
    log = open_log(tmp_path)
    for first in (300, 400, 500, 600):
        log.append(drafts(range(first, first + 100)))
        log.publish(sign)
    log.close()
    assert verify_proof(prove(reader, 299), KEY.verifier()).checkpoint.size == 300


@pytest.fixture
def witnessed(tmp_path: Path) -> Path:
    """A log of 900 entries that a witness saw at 300 and, an hour later, at 600."""
    log, witness = tmp_path / "audit", Witness(tmp_path / "witness", WITNESS)
    make_log(log, 300)
    for number, end in enumerate((600, 900)):
        request = make_request(log, old_size=last_seen(log, WITNESS.verifier()))
        reply = witness.cosign(request, KEY.verifier(), SEEN_S + 3600 * number)
        take_reply(log, request, reply, KEY.verifier(), WITNESS.verifier())
        grown = open_log(log)
        grown.append(drafts(range(end - 300, end)))
        grown.publish(sign)
        grown.close()
    return log


def _proof_for(log: Path, sequence: int) -> str:
    return prove(LogReader(log), sequence, note=cosigned_note(log, sequence, WITNESS.verifier()))


def test_a_witness_says_when_an_entry_was_there(witnessed: Path) -> None:
    for sequence, size, seen_s in ((0, 300, SEEN_S), (299, 300, SEEN_S), (300, 600, SEEN_S + 3600)):
        found = verify_proof(_proof_for(witnessed, sequence), KEY.verifier(), WITNESS.verifier())
        assert (found.checkpoint.size, found.seen_s) == (size, seen_s)
    assert verify_proof(_proof_for(witnessed, 0), KEY.verifier()).seen_s is None, "nobody asked for a witness"


def test_of_two_co_signatures_of_one_witness_the_earlier_counts(witnessed: Path) -> None:
    again = cosign((witnessed / WITNESSED / "300").read_text(), WITNESS, SEEN_S + 60)
    found = verify_proof(_proof_for(witnessed, 7) + again, KEY.verifier(), WITNESS.verifier())
    assert found.seen_s == SEEN_S


def test_a_time_that_no_witness_vouches_for_is_refused(witnessed: Path) -> None:
    with pytest.raises(NoSuchEntry, match=r"none of those in .* names it"):
        cosigned_note(witnessed, 600, WITNESS.verifier())
    with pytest.raises(NoSuchEntry):
        cosigned_note(witnessed, 0, OTHER_WITNESS.verifier())
    for proof, witness in (
        (prove(LogReader(witnessed), 0), WITNESS),
        (_proof_for(witnessed, 0), OTHER_WITNESS),
        (_proof_for(witnessed, 0), SigningKey(WITNESS.name, b"x" * 32, Algorithm.COSIGNATURE)),
    ):
        with pytest.raises(NoteInvalid, match="does not show when"):
            verify_proof(proof, KEY.verifier(), witness.verifier())
    lines = _proof_for(witnessed, 0).splitlines(keepends=True)
    moved = cosign((witnessed / CHECKPOINT).read_text(), WITNESS, SEEN_S)  # of another checkpoint
    with pytest.raises(NoteInvalid, match="does not show when"):
        verify_proof("".join([*lines[:-1], moved]), KEY.verifier(), WITNESS.verifier())


def test_under_a_checkpoint_of_another_history_nothing_is_proved(witnessed: Path, tmp_path: Path) -> None:
    make_log(tmp_path / "other", 200)
    kept = witnessed / WITNESSED / "200"
    other = (tmp_path / "other" / CHECKPOINT).read_text()
    kept.write_text(other + cosign(other, WITNESS, SEEN_S))
    with pytest.raises(ProofInvalid):
        _proof_for(witnessed, 0)


def test_entries_are_read_backwards(made: Path) -> None:
    assert [entry.sequence for entry, _ in LogReader(made).backwards(260, 250)] == list(range(259, 249, -1))


def test_where_no_log_is_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(LogUnreadable, match="no audit log"):
        LogReader(tmp_path)
