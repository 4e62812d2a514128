"""A log and its witness, with a medium that is carried between them, and those who would rather it were not."""

import base64
import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from appliance.audit import witness as witness_module
from appliance.audit.notes import (
    Algorithm,
    Checkpoint,
    KeyInvalid,
    NoteInvalid,
    SigningKey,
    cosign,
    sign_checkpoint,
    verify_cosignature,
)
from appliance.audit.tree import EMPTY_ROOT, Frontier, consistency_proof, leaf_hash, node_hash, root_of
from appliance.audit.witness import (
    MAX_REPLY_BYTES,
    MAX_REQUEST_BYTES,
    LogForked,
    LogShrunk,
    OldSizeDiffers,
    ReplyInvalid,
    RequestInvalid,
    Witness,
    WitnessBusy,
    WitnessStateUnusable,
    read_request,
    verify_reply,
    write_request,
)

_ORIGIN = "holdfast.example/vault-3"
_LOG_KEY = SigningKey(_ORIGIN, b"l" * 32)
_WITNESS_KEY = SigningKey("witness.example/w1", b"w" * 32, Algorithm.COSIGNATURE)
_NOW = 1_800_000_000


class _Log:
    """A log in memory: what it holds is what it is told."""

    def __init__(self, size: int, *, key: SigningKey = _LOG_KEY, tale: str = "entry") -> None:
        self._key = key
        self._leaves = [leaf_hash(f"{tale} {index}".encode()) for index in range(size)]

    def hash_at(self, level: int, index: int) -> bytes:
        if level == 0:
            return self._leaves[index]
        return node_hash(self.hash_at(level - 1, 2 * index), self.hash_at(level - 1, 2 * index + 1))

    def rewritten(self, index: int) -> "_Log":
        other = _Log(len(self._leaves), key=self._key)
        other._leaves[index] = leaf_hash(b"what really happened")
        return other

    def note(self, size: int) -> str:
        return sign_checkpoint(Checkpoint(self._key.name, size, root_of(self, size)), self._key)

    def request(self, old_size: int, size: int) -> bytes:
        return write_request(old_size, consistency_proof(self, old_size, size), self.note(size))


@pytest.fixture
def log() -> _Log:
    return _Log(64)


@pytest.fixture
def witness(tmp_path: Path) -> Witness:
    return Witness(tmp_path / "witness", _WITNESS_KEY)


def _state(tmp_path: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((tmp_path / "witness").iterdir())}


def test_a_log_is_cosigned_as_it_grows(log: _Log, witness: Witness) -> None:
    seen = 0
    for day, size in enumerate((5, 8, 8, 40, 64)):
        reply = witness.cosign(log.request(seen, size), _LOG_KEY.verifier(), _NOW + day)
        cosignature = verify_reply(reply, log.note(size), _WITNESS_KEY.verifier())
        assert cosignature.time_s == _NOW + day
        assert verify_cosignature(log.note(size) + cosignature.line, _WITNESS_KEY.verifier()) == _NOW + day
        seen = size
    assert witness.last(_LOG_KEY.verifier()) == Checkpoint(_ORIGIN, 64, root_of(log, 64))


def test_an_empty_log_is_cosigned_and_gone_on_from(log: _Log, witness: Witness) -> None:
    witness.cosign(log.request(0, 0), _LOG_KEY.verifier(), _NOW)
    assert witness.last(_LOG_KEY.verifier()) == Checkpoint(_ORIGIN, 0, EMPTY_ROOT)
    witness.cosign(log.request(0, 3), _LOG_KEY.verifier(), _NOW)


def test_a_request_has_the_form_of_tlog_witness(log: _Log) -> None:
    proof = consistency_proof(log, 3, 8)
    request = log.request(3, 8)
    lines = "".join(f"{base64.b64encode(node).decode()}\n" for node in proof)
    assert request.decode() == f"old 3\n{lines}\n{log.note(8)}"
    assert read_request(request).proof == tuple(proof)
    assert log.request(0, 8).decode() == f"old 0\n\n{log.note(8)}"


def test_what_a_witness_saw_outlives_it(log: _Log, tmp_path: Path) -> None:
    Witness(tmp_path / "witness", _WITNESS_KEY).cosign(log.request(0, 30), _LOG_KEY.verifier(), _NOW)
    again = Witness(tmp_path / "witness", _WITNESS_KEY)
    with pytest.raises(OldSizeDiffers) as caught:
        again.cosign(log.request(0, 64), _LOG_KEY.verifier(), _NOW)
    assert caught.value.witness_size == 30
    assert "this witness saw 30" in caught.value.cause
    assert "from 30" in caught.value.remedy
    again.cosign(log.request(30, 64), _LOG_KEY.verifier(), _NOW)


def test_a_witness_that_saw_nothing_says_so(log: _Log, witness: Witness) -> None:
    with pytest.raises(OldSizeDiffers) as caught:
        witness.cosign(log.request(30, 64), _LOG_KEY.verifier(), _NOW)
    assert caught.value.witness_size == 0
    assert witness.last(_LOG_KEY.verifier()) is None


def test_the_state_is_on_the_disk_before_the_cosignature_leaves(
    log: _Log, witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness.cosign(log.request(0, 10), _LOG_KEY.verifier(), _NOW)
    before = _state(tmp_path)
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    witness.cosign(log.request(10, 20), _LOG_KEY.verifier(), _NOW)
    state = next(name for name in before if name.endswith(".note"))
    assert synced == [f"{state}.new", "witness"]

    def broken(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    kept = _state(tmp_path)[state]
    with pytest.raises(WitnessStateUnusable, match="Input/output error"):
        witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)
    assert _state(tmp_path)[state] == kept


def test_a_fork_is_refused_and_changes_nothing(log: _Log, witness: Witness, tmp_path: Path) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    before = _state(tmp_path)
    fork = log.rewritten(7)
    for request in (fork.request(20, 20), fork.request(20, 50), fork.request(12, 20)):
        with pytest.raises(LogForked) as caught:
            witness.cosign(request, _LOG_KEY.verifier(), _NOW)
        assert "evidence" in caught.value.remedy
    assert _state(tmp_path) == before
    witness.cosign(log.request(20, 50), _LOG_KEY.verifier(), _NOW)


def test_a_fork_after_what_was_witnessed_is_found_the_next_time(log: _Log, witness: Witness) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    witness.cosign(log.request(20, 40), _LOG_KEY.verifier(), _NOW)
    with pytest.raises(LogForked):
        witness.cosign(log.rewritten(30).request(40, 64), _LOG_KEY.verifier(), _NOW)


def test_a_shrunk_log_is_refused(log: _Log, witness: Witness) -> None:
    witness.cosign(log.request(0, 50), _LOG_KEY.verifier(), _NOW)
    for request in (log.request(20, 40), log.request(0, 49), log.request(0, 0)):
        with pytest.raises(LogShrunk, match="the witness saw 50"):
            witness.cosign(request, _LOG_KEY.verifier(), _NOW)


def test_a_replayed_request_is_refused(log: _Log, witness: Witness) -> None:
    first, second = log.request(0, 20), log.request(20, 40)
    witness.cosign(first, _LOG_KEY.verifier(), _NOW)
    witness.cosign(second, _LOG_KEY.verifier(), _NOW)
    with pytest.raises(LogShrunk, match="a request from before"):
        witness.cosign(first, _LOG_KEY.verifier(), _NOW)
    with pytest.raises(OldSizeDiffers):
        witness.cosign(second, _LOG_KEY.verifier(), _NOW)


def test_a_lost_reply_is_asked_for_again_from_the_size_that_the_witness_has(log: _Log, witness: Witness) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    reply = witness.cosign(log.request(20, 20), _LOG_KEY.verifier(), _NOW + 5)
    assert verify_reply(reply, log.note(20), _WITNESS_KEY.verifier()).time_s == _NOW + 5


def test_a_log_of_another_name_or_key_is_refused(log: _Log, witness: Witness, tmp_path: Path) -> None:
    elsewhere = SigningKey("holdfast.example/vault-4", b"l" * 32)
    with pytest.raises(NoteInvalid):
        witness.cosign(_Log(20, key=elsewhere).request(0, 20), _LOG_KEY.verifier(), _NOW)
    with pytest.raises(NoteInvalid):
        witness.cosign(log.request(0, 20), elsewhere.verifier(), _NOW)
    with pytest.raises(NoteInvalid):
        witness.cosign(_Log(20, key=SigningKey(_ORIGIN, b"m" * 32)).request(0, 20), _LOG_KEY.verifier(), _NOW)
    assert not (tmp_path / "witness").exists()


def test_two_logs_have_a_state_each(log: _Log, witness: Witness) -> None:
    key = SigningKey("holdfast.example/vault-4", b"m" * 32)
    other = _Log(10, key=key, tale="another")
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    witness.cosign(other.request(0, 10), key.verifier(), _NOW)
    witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)
    last = witness.last(key.verifier())
    assert last is not None
    assert last.size == 10


def test_an_origin_goes_on_under_its_first_key_only(log: _Log, witness: Witness) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    new_key = SigningKey(_ORIGIN, b"n" * 32)
    with pytest.raises(WitnessStateUnusable, match="needs an origin of its own"):
        witness.cosign(_Log(30, key=new_key).request(20, 30), new_key.verifier(), _NOW)


def test_every_changed_byte_of_a_request_is_refused(log: _Log, witness: Witness) -> None:
    witness.cosign(log.request(0, 11), _LOG_KEY.verifier(), _NOW)
    request = log.request(11, 23)
    for at in range(len(request)):
        for change in (1, 0x20, 0x80):
            changed = bytearray(request)
            changed[at] ^= change
            with pytest.raises((RequestInvalid, NoteInvalid, LogForked, OldSizeDiffers)):
                witness.cosign(bytes(changed), _LOG_KEY.verifier(), _NOW)
    witness.cosign(request, _LOG_KEY.verifier(), _NOW)


def test_every_cut_request_is_refused(log: _Log, witness: Witness) -> None:
    request = log.request(0, 11)
    for end in range(len(request)):
        with pytest.raises((RequestInvalid, NoteInvalid)):
            witness.cosign(request[:end], _LOG_KEY.verifier(), _NOW)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda request: request.replace(b"old 3\n", b"old 03\n"),
        lambda request: request.replace(b"old 3\n", b"old -3\n"),
        lambda request: request.replace(b"old 3\n", b"old  3\n"),
        lambda request: request.replace(b"old 3\n", b"3\n"),
        lambda request: request.replace(b"old 3\n", b"old 3\r\n"),
        lambda request: request.replace(b"old 3\n", b"old 3\nAAAA\n"),
        lambda request: request.replace(b"old 3\n", b"old 3\n" + b"A" * 42 + b"B=\n"),
        lambda request: request.replace(b"old 3\n", b"old 3\n" + (b"A" * 43 + b"=\n") * 64),
        lambda request: request.replace(b"old 3\n", b"old 9\n"),  # more than the checkpoint has
        lambda request: request.replace(b"old 3\n", b"old \xc2\xb3\n"),
        lambda request: b"\n" + request,
        lambda request: request + b"x" * MAX_REQUEST_BYTES,
        lambda _: b"old 3\n\n" + b"x" * (MAX_REQUEST_BYTES - 10),
        lambda _: b"",
    ],
)
def test_what_is_no_request_is_refused(log: _Log, witness: Witness, spoil: Callable[[bytes], bytes]) -> None:
    with pytest.raises(RequestInvalid) as caught:
        witness.cosign(spoil(log.request(3, 8)), _LOG_KEY.verifier(), _NOW)
    assert "export" in caught.value.remedy


def test_a_request_that_no_witness_could_read_is_not_written(log: _Log) -> None:
    for old_size, proof in ((-1, []), (3, [b"short"]), (3, [EMPTY_ROOT] * 64), (1 << 63, [])):
        with pytest.raises(RequestInvalid):
            write_request(old_size, proof, log.note(8))


@pytest.mark.parametrize("damage", [b"", b"nonsense", b"\xff"])
def test_a_damaged_state_is_named_and_nothing_is_cosigned(
    log: _Log, witness: Witness, tmp_path: Path, damage: bytes
) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    state = next((tmp_path / "witness").glob("*.note"))
    state.write_bytes(damage)
    with pytest.raises(WitnessStateUnusable) as caught:
        witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)
    assert str(state) in caught.value.message
    assert "backup" in caught.value.remedy
    assert state.read_bytes() == damage


def test_a_state_that_was_left_half_written_does_not_count(log: _Log, witness: Witness, tmp_path: Path) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    state = next((tmp_path / "witness").glob("*.note"))
    state.with_name(f"{state.name}.new").write_bytes(b"half")
    witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)


def test_a_state_that_cannot_be_made_is_named(log: _Log, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for state_dir in (tmp_path / "file", tmp_path / "nowhere" / "witness"):
        with pytest.raises(WitnessStateUnusable) as caught:
            Witness(state_dir, _WITNESS_KEY).cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
        assert str(state_dir) in caught.value.message


def test_a_state_is_not_followed_through_a_link(log: _Log, witness: Witness, tmp_path: Path) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    state = next((tmp_path / "witness").glob("*.note"))
    state.rename(tmp_path / "elsewhere")
    state.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WitnessStateUnusable):
        witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)


def test_the_state_is_not_written_through_a_link(log: _Log, witness: Witness, tmp_path: Path) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    state = next((tmp_path / "witness").glob("*.note"))
    (tmp_path / "victim").write_bytes(b"precious")
    state.with_name(f"{state.name}.new").symlink_to(tmp_path / "victim")
    with pytest.raises(WitnessStateUnusable):
        witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_the_state_is_closed_to_others(log: _Log, witness: Witness, tmp_path: Path) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    assert (tmp_path / "witness").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "witness").iterdir())


def test_one_request_at_a_time(log: _Log, witness: Witness, tmp_path: Path) -> None:
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    with (tmp_path / "witness" / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(WitnessBusy):
            witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)
        with pytest.raises(WitnessBusy):
            witness.last(_LOG_KEY.verifier())
    witness.cosign(log.request(20, 30), _LOG_KEY.verifier(), _NOW)


def test_a_log_s_key_makes_no_witness(tmp_path: Path) -> None:
    with pytest.raises(KeyInvalid):
        Witness(tmp_path, _LOG_KEY)


def test_a_time_that_cannot_be_leaves_the_state_as_it_was(log: _Log, witness: Witness) -> None:
    with pytest.raises(NoteInvalid):
        witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), -1)
    assert witness.last(_LOG_KEY.verifier()) is None


def test_other_witnesses_lines_in_a_reply_are_passed_over(log: _Log) -> None:
    other = SigningKey("witness.example/w2", b"x" * 32, Algorithm.COSIGNATURE)
    note = log.note(20)
    lines = [cosign(note, other, _NOW), cosign(note, _WITNESS_KEY, _NOW), cosign(note, _WITNESS_KEY, _NOW + 1)]
    found = verify_reply("".join(lines).encode(), note, _WITNESS_KEY.verifier())
    assert found == (lines[2], _NOW + 1)


def test_a_reply_to_another_checkpoint_is_refused(log: _Log) -> None:
    reply = cosign(log.note(20), _WITNESS_KEY, _NOW).encode()
    with pytest.raises(ReplyInvalid, match="altered, or forged"):
        verify_reply(reply, log.note(21), _WITNESS_KEY.verifier())


def test_the_note_s_own_cosignatures_do_not_stand_in_for_the_reply(log: _Log) -> None:
    other = SigningKey("witness.example/w2", b"x" * 32, Algorithm.COSIGNATURE)
    note = log.note(20) + cosign(log.note(20), _WITNESS_KEY, _NOW)
    with pytest.raises(ReplyInvalid, match="did not co-sign"):
        verify_reply(cosign(note, other, _NOW).encode(), note, _WITNESS_KEY.verifier())


def test_every_changed_byte_of_a_reply_is_refused(log: _Log) -> None:
    note = log.note(20)
    reply = cosign(note, _WITNESS_KEY, _NOW).encode()
    for at in range(len(reply)):
        for change in (1, 0x20, 0x80):
            changed = bytearray(reply)
            changed[at] ^= change
            with pytest.raises(ReplyInvalid):
                verify_reply(bytes(changed), note, _WITNESS_KEY.verifier())


@pytest.mark.parametrize("reply", [b"", b"\n", b"20\n", b"\xff\n", b"x" * (MAX_REPLY_BYTES + 1)])
def test_what_is_no_reply_is_refused(log: _Log, reply: bytes) -> None:
    with pytest.raises(ReplyInvalid):
        verify_reply(reply, log.note(20), _WITNESS_KEY.verifier())


def test_a_reply_is_signature_lines_and_nothing_else(log: _Log) -> None:
    line = cosign(log.note(20), _WITNESS_KEY, _NOW).encode()
    for reply in (line + b"\n", b"\n" + line, line + b"\n" + line, line.rstrip(b"\n"), line + b"and more\n"):
        with pytest.raises(ReplyInvalid):
            verify_reply(reply, log.note(20), _WITNESS_KEY.verifier())


def test_a_forged_proof_of_a_real_fork_is_refused(log: _Log, witness: Witness) -> None:
    """The log signs a rewritten tree and sends the honest tree's proof along."""
    witness.cosign(log.request(0, 20), _LOG_KEY.verifier(), _NOW)
    fork = log.rewritten(3)
    edge = Frontier.read(fork, 40)
    note = sign_checkpoint(Checkpoint(_ORIGIN, edge.size, edge.root()), _LOG_KEY)
    with pytest.raises(LogForked, match="does not hold"):
        witness.cosign(write_request(20, consistency_proof(log, 20, 40), note), _LOG_KEY.verifier(), _NOW)


def test_the_bounds_of_the_module_let_the_longest_proof_through(log: _Log) -> None:
    assert len(write_request(3, [EMPTY_ROOT] * witness_module.MAX_PROOF_HASHES, log.note(8))) < MAX_REQUEST_BYTES
