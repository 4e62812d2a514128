"""A checkpoint travels to a witness and back, and the log is held to it from then on."""

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from appliance.audit import files, verify, witnessing
from appliance.audit.files import write_at
from appliance.audit.following import LogFollower
from appliance.audit.log import CHECKPOINT, JOURNAL, WITNESSED
from appliance.audit.notes import Algorithm, NoteInvalid, SigningKey, cosign
from appliance.audit.reading import LogUnreadable, NoSuchEntry
from appliance.audit.verify import LogTampered, verify_log
from appliance.audit.witness import ReplyInvalid, Witness
from appliance.audit.witnessing import (
    largest_witnessed,
    last_cosigned,
    last_seen,
    make_request,
    take_reply,
    thin_out,
)
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
    assert last_seen(another, WITNESS_KEY) == 300
    assert largest_witnessed(another, LOG_KEY, [WITNESS_KEY]) == (300, 1_700_000_000, "witness.example")
    with pytest.raises(LogTampered):
        verify_log(another, LOG_KEY, witnesses=[WITNESS_KEY])


def test_the_last_co_signature_has_its_witness_and_its_time(tmp_path: Path) -> None:
    log, later = tmp_path / "audit", SigningKey("later.example", b"l" * 32, Algorithm.COSIGNATURE)
    make_log(log, 300)
    request = make_request(log, old_size=0)
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) is None, "it was asked for, and nobody has answered"
    for key, time_s in ((WITNESS, 1_700_000_000), (later, 1_700_000_007)):
        reply = Witness(tmp_path / key.name, key).cosign(request, LOG_KEY, time_s)
        take_reply(log, request, reply, LOG_KEY, key.verifier())
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY, later.verifier()]) == (300, 1_700_000_007, "later.example")


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
    accepted = [WITNESS_KEY, stranger.verifier()]
    assert largest_witnessed(log, LOG_KEY, accepted) == (400, 1_700_000_000, "stranger.example")
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) == (300, 1_700_000_000, WITNESS_KEY.name)
    assert largest_witnessed(log, LOG_KEY, []) is None
    newest.write_text(note + cosign((log / WITNESSED / "300").read_text(), WITNESS, 1_700_000_000))  # of another
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) == (300, 1_700_000_000, WITNESS_KEY.name)
    newest.unlink()
    (log / WITNESSED / "300").rename(newest)
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY]) is None, "a name says nothing"


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
    assert (largest_witnessed(tmp_path, LOG_KEY, [WITNESS_KEY]), last_seen(tmp_path, WITNESS_KEY)) == (None, 0)
    follower = LogFollower(tmp_path)
    for look in (follower.published, lambda: follower.frames(0, 3, most=3), lambda: follower.oldest(0)):
        with pytest.raises(LogUnreadable):
            look()


def _witnessed_every(tmp_path: Path, step_s: int, count: int) -> Path:
    """A log of which a checkpoint was co-signed every `step_s`, the first at a full hour; sizes 1, 2, …."""
    log, witness, seen = tmp_path / "audit", Witness(tmp_path / "witness", WITNESS), 0
    for number in range(count):
        _grow(log, number, number + 1)
        request = make_request(log, old_size=seen)
        reply = witness.cosign(request, LOG_KEY, 1_699_999_200 + number * step_s)
        seen = take_reply(log, request, reply, LOG_KEY, WITNESS_KEY).size
    return log


def _sizes(log: Path) -> list[int]:
    return sorted(int(path.name) for path in (log / WITNESSED).iterdir())


def test_of_many_co_signatures_the_first_of_each_minute_and_the_newest_stay(tmp_path: Path) -> None:
    log = _witnessed_every(tmp_path, 20, 11)
    assert thin_out(log, [WITNESS_KEY]) == 6
    assert _sizes(log) == [1, 4, 7, 10, 11]
    assert thin_out(log, [WITNESS_KEY]) == 0
    assert last_cosigned(log, WITNESS_KEY) == (11, 1_699_999_200 + 200)
    assert verify_log(log, LOG_KEY, witnesses=[WITNESS_KEY]).witnessed["witness.example"][0] == 11


def test_after_a_day_the_first_of_each_hour_stays(tmp_path: Path) -> None:
    log = _witnessed_every(tmp_path, 12 * 60, 130)  # five an hour for 26 hours
    thin_out(log, [WITNESS_KEY])
    assert _sizes(log) == [1, 6, *range(11, 131)]


def test_what_was_carried_to_somebody_else_or_not_co_signed_yet_stays(tmp_path: Path) -> None:
    log = _witnessed_every(tmp_path, 1, 6)
    request, other = make_request(log, old_size=0), SigningKey("other.example", b"o" * 32, Algorithm.COSIGNATURE)
    take_reply(log, request, Witness(tmp_path / "other", other).cosign(request, LOG_KEY, 9), LOG_KEY, other.verifier())
    _grow(log, 6, 7)
    make_request(log, old_size=0)
    thin_out(log, [WITNESS_KEY])
    assert _sizes(log) == [1, 6, 7]
    assert largest_witnessed(log, LOG_KEY, [WITNESS_KEY, other.verifier()]) == (6, 1_699_999_205, "witness.example")
    thin_out(log, [other.verifier()])
    assert _sizes(log) == [1, 6, 7]


def test_a_checkpoint_that_goes_while_the_log_is_verified_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = _witnessed_every(tmp_path, 1, 3)
    real = files.read_file

    def thinned_meanwhile(path: Path) -> bytes:
        if path.name == "1":
            (log / WITNESSED / "2").unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(verify, "read_file", thinned_meanwhile)
    assert verify_log(log, LOG_KEY, witnesses=[WITNESS_KEY]).witnessed["witness.example"][0] == 3
