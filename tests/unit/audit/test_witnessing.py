"""A checkpoint travels to a witness and back, and the log is held to it from then on."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from appliance.audit import witnessing
from appliance.audit.files import write_at
from appliance.audit.following import LogFollower
from appliance.audit.log import CHECKPOINT, JOURNAL, WITNESSED
from appliance.audit.notes import Algorithm, NoteInvalid, SigningKey, cosign
from appliance.audit.reading import LogUnreadable, NoSuchEntry
from appliance.audit.verify import LogTampered, verify_log
from appliance.audit.witness import ReplyInvalid, Witness
from appliance.audit.witnessing import largest_witnessed, last_seen, make_request, take_reply
from tests.unit.audit.making import KEY, drafts, make_log, open_log, sign

WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
LOG_KEY, WITNESS_KEY = KEY.verifier(), WITNESS.verifier()


def _grow(directory: Path, first: int, end: int) -> None:
    log = open_log(directory)
    log.append(drafts(range(first, end)))
    log.publish(sign)
    log.close()


def test_a_log_is_witnessed_again_and_again(tmp_path: Path) -> None:
    log, witness = tmp_path / "audit", Witness(tmp_path / "witness", WITNESS)
    make_log(log, 300)
    for number, end in enumerate((700, 1000, 1100)):
        request = make_request(log, old_size=last_seen(log, WITNESS_KEY))
        reply = witness.cosign(request, LOG_KEY, 1_700_000_000 + number)
        seen = take_reply(log, request, reply, LOG_KEY, WITNESS_KEY).size
        assert last_seen(log, WITNESS_KEY) == seen
        assert verify_log(log, LOG_KEY, witnesses=[WITNESS_KEY]).witnessed == {
            "witness.example": (seen, 1_700_000_000 + number)
        }
        _grow(log, seen, end)


def test_a_reply_comes_back_after_the_log_has_grown(tmp_path: Path) -> None:
    log, witness = tmp_path / "audit", Witness(tmp_path / "witness", WITNESS)
    make_log(log, 300)
    request = make_request(log, old_size=0)
    reply = witness.cosign(request, LOG_KEY, 1_700_000_000)
    _grow(log, 300, 5000)
    assert take_reply(log, request, reply, LOG_KEY, WITNESS_KEY).size == 300
    assert verify_log(log, LOG_KEY, witnesses=[WITNESS_KEY]).witnessed["witness.example"][0] == 300


def test_two_witnesses_can_co_sign_one_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "audit"
    make_log(log, 300)
    request = make_request(log, old_size=0)
    keys = []
    for name in ("one", "two"):
        key = SigningKey(f"{name}.example", name.encode().ljust(32), Algorithm.COSIGNATURE)
        reply = Witness(tmp_path / name, key).cosign(request, LOG_KEY, 1_700_000_000)
        take_reply(log, request, reply, LOG_KEY, key.verifier())
        take_reply(log, request, reply, LOG_KEY, key.verifier())
        keys.append(key.verifier())
    assert set(verify_log(log, LOG_KEY, witnesses=keys).witnessed) == {"one.example", "two.example"}


class _Lock:
    """A lock that tells when somebody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.is_waited_for = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.is_waited_for.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("second", ["reply", "request"])
def test_of_what_comes_at_once_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: str) -> None:
    log, lock = tmp_path / "audit", _Lock()
    make_log(log, 300)
    request = make_request(log, old_size=0)
    keys = [SigningKey(f"{name}.example", name.encode().ljust(32), Algorithm.COSIGNATURE) for name in ("one", "two")]
    replies = [Witness(tmp_path / key.name, key).cosign(request, LOG_KEY, 1_700_000_000) for key in keys]

    def come() -> None:
        if second == "reply":
            take_reply(log, request, replies[1], LOG_KEY, keys[1].verifier())
        else:
            make_request(log, old_size=0)

    coming = threading.Thread(target=come)

    def write_while_another_comes(*given: Any) -> None:
        if coming.ident is None:
            coming.start()
            assert lock.is_waited_for.wait(10)
        write_at(*given)

    monkeypatch.setattr(witnessing, "_KEEPING", lock)
    monkeypatch.setattr(witnessing, "write_at", write_while_another_comes)
    take_reply(log, request, replies[0], LOG_KEY, keys[0].verifier())
    coming.join()
    wanted = keys if second == "reply" else keys[:1]
    assert set(verify_log(log, LOG_KEY, witnesses=[key.verifier() for key in wanted]).witnessed) == {
        key.name for key in wanted
    }


def test_a_reply_to_something_else_is_not_kept(tmp_path: Path) -> None:
    log, other = tmp_path / "audit", tmp_path / "other"
    make_log(log, 300)
    make_log(other, 301)
    request, strange = make_request(log, old_size=0), make_request(other, old_size=0)
    reply = Witness(tmp_path / "witness", WITNESS).cosign(strange, LOG_KEY, 1_700_000_000)
    with pytest.raises(ReplyInvalid):
        take_reply(log, request, reply, LOG_KEY, WITNESS_KEY)
    with pytest.raises(NoteInvalid):
        take_reply(log, request, reply, SigningKey(KEY.name, b"o" * 32).verifier(), WITNESS_KEY)
    assert last_seen(log, WITNESS_KEY) == 0


def test_a_log_restored_from_before_it_was_witnessed_is_found(tmp_path: Path) -> None:
    log, older = tmp_path / "audit", tmp_path / "older"
    witness = Witness(tmp_path / "witness", WITNESS)
    make_log(log, 300)
    shutil.copytree(log, older)
    _grow(log, 300, 400)
    request = make_request(log, old_size=0)
    reply = witness.cosign(request, LOG_KEY, 1_700_000_000)
    # The reply is brought to the copy that was restored meanwhile.
    take_reply(older, request, reply, LOG_KEY, WITNESS_KEY)
    with pytest.raises(LogTampered, match="cut off"):
        verify_log(older, LOG_KEY, witnesses=[WITNESS_KEY])


def test_a_request_takes_the_place_of_no_co_signed_checkpoint(tmp_path: Path) -> None:
    log, another, witness = tmp_path / "audit", tmp_path / "another", Witness(tmp_path / "witness", WITNESS)
    make_log(log, 300)
    request = make_request(log, old_size=0)
    take_reply(log, request, witness.cosign(request, LOG_KEY, 1_700_000_000), LOG_KEY, WITNESS_KEY)
    make_log(another, 299)
    _grow(another, 600, 601)
    shutil.copytree(log / WITNESSED, another / WITNESSED)
    make_request(another, old_size=0)
    assert last_seen(another, WITNESS_KEY) == largest_witnessed(another, LOG_KEY, [WITNESS_KEY]) == 300
    with pytest.raises(LogTampered):
        verify_log(another, LOG_KEY, witnesses=[WITNESS_KEY])


def test_witnessed_is_what_an_accepted_witness_co_signed_and_no_line_alone(tmp_path: Path) -> None:
    log, witness = tmp_path / "audit", Witness(tmp_path / "witness", WITNESS)
    stranger = SigningKey("stranger.example", b"x" * 32, Algorithm.COSIGNATURE)
    make_log(log, 300)
    request = make_request(log, old_size=0)
    take_reply(log, request, witness.cosign(request, LOG_KEY, 1_700_000_000), LOG_KEY, WITNESS_KEY)
    _grow(log, 300, 400)
    note = (log / CHECKPOINT).read_text()
    newest = log / WITNESSED / "400"
    newest.write_text(note + cosign(note, stranger, 1_700_000_000))
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY, stranger.verifier()]) == 400
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) == 300
    assert largest_witnessed(log, LOG_KEY, []) == 0
    newest.write_text(note + cosign((log / WITNESSED / "300").read_text(), WITNESS, 1_700_000_000))  # of another
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) == 300
    newest.unlink()
    (log / WITNESSED / "300").rename(newest)
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) == 0, "a name says nothing"


def test_there_is_nothing_to_co_sign_before_the_first_checkpoint(tmp_path: Path) -> None:
    open_log(tmp_path).close()
    with pytest.raises(NoSuchEntry, match="nothing to co-sign"):
        make_request(tmp_path, old_size=0)


def test_who_looks_at_a_running_log_does_not_wait_at_a_pipe(tmp_path: Path) -> None:
    make_log(tmp_path, 3)
    (tmp_path / WITNESSED).mkdir(exist_ok=True)
    for path in (tmp_path / WITNESSED / "3", tmp_path / CHECKPOINT, tmp_path / JOURNAL):
        path.unlink(missing_ok=True)
        os.mkfifo(path)
    assert largest_witnessed(tmp_path, LOG_KEY, [WITNESS_KEY]) == last_seen(tmp_path, WITNESS_KEY) == 0
    follower = LogFollower(tmp_path)
    for look in (follower.published, lambda: follower.frames(0, 3, most=3), lambda: follower.oldest(0)):
        with pytest.raises(LogUnreadable):
            look()
