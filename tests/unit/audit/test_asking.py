"""Who asks a witness, and what it makes of what a witness answers: an honest one, and those that are not."""

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from api.witness_service import WitnessService
from appliance.audit.asking import Answer, Asker, Outcome, Post, Told, WitnessAt, WitnessUnreachable, newest_note
from appliance.audit.log import CHECKPOINT
from appliance.audit.notes import Algorithm, SigningKey
from appliance.audit.witness import Witness, read_request
from appliance.audit.witnessing import request_for, take_reply
from tests.unit.audit.making import KEY, drafts, make_log, open_log, sign

pytestmark = pytest.mark.anyio

WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
OTHER = SigningKey("other.example", b"o" * 32, Algorithm.COSIGNATURE)
AT = WitnessAt("other-node", "https://witness.example", str(WITNESS.verifier()), "/ca.pem")


class End(BaseException):
    """Enough was seen."""


class Asked:
    """A witness in memory, which counts what it was asked; `before` is called first, each time."""

    def __init__(self, place: Path, key: SigningKey = WITNESS) -> None:
        self._service = WitnessService(Witness(place, key), [KEY.verifier()])
        self.requests: list[bytes] = []
        self.before: Callable[[], None] = lambda: None

    async def __call__(self, request: bytes) -> Answer:
        self.requests.append(request)
        self.before()
        answer = self._service.answer(request)
        return Answer(answer.status, answer.body)

    @property
    def old_sizes(self) -> list[int]:
        return [read_request(request).old_size for request in self.requests]


class Says:
    """A witness that answers this, in this order, whatever it is asked; the last for ever."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)

    async def __call__(self, request: bytes) -> Answer:
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    make_log(tmp_path / "audit", 300)
    return tmp_path / "audit"


@pytest.fixture
def witness(tmp_path: Path) -> Asked:
    return Asked(tmp_path / "witness")


def grow(directory: Path, first: int, end: int) -> None:
    log = open_log(directory)
    log.append(drafts(range(first, end)))
    log.publish(sign)
    log.close()


def asker(log: Path, post: Post, *, seen: int = 0) -> Asker:
    return Asker(AT, log, seen=seen, post=post, tell=lambda _: None)


async def asked(log: Path, post: Post, *, seen: int = 0) -> Told:
    told, _ = await asker(log, post, seen=seen).ask()
    assert told is not None
    return told


async def test_what_is_cosigned_is_what_an_import_takes(log: Path, witness: Asked) -> None:
    asks = asker(log, witness)
    for end in (300, 700, 1100):
        told, _ = await asks.ask()
        assert told is not None
        assert (told.outcome, told.size) == (Outcome.COSIGNED, end)
        assert Told.read(json.loads(told.line())) == told
        taken = take_reply(log, told.request.encode(), told.reply.encode(), KEY.verifier(), WITNESS.verifier())
        assert taken.size == end
        grow(log, end, end + 400)
    assert witness.old_sizes == [0, 300, 700]


async def test_a_start_that_knows_less_or_more_than_the_witness_asks_again_from_its_size(
    log: Path, witness: Asked, tmp_path: Path
) -> None:
    await asked(log, witness)
    grow(log, 300, 700)
    assert (await asked(log, witness, seen=0)).outcome is Outcome.COSIGNED
    assert witness.old_sizes == [0, 0, 300]
    # A witness that lost its state says that it saw nothing: that is told.
    told = await asked(log, Asked(tmp_path / "empty"), seen=700)
    assert (told.outcome, told.witness_size) == (Outcome.COSIGNED, 0)


async def test_a_log_that_was_cut_or_put_back_is_refused_and_so_it_is_when_it_has_grown_again(
    log: Path, witness: Asked, tmp_path: Path
) -> None:
    shutil.copytree(log, tmp_path / "older")
    grow(log, 300, 700)
    await asked(log, witness)
    older = tmp_path / "older"
    told = await asked(older, witness, seen=300)
    assert (told.outcome, told.size, told.witness_size) == (Outcome.SHORTER, 300, 700)
    grow(older, 5000, 5500)
    told = await asked(older, witness, seen=300)
    assert (told.outcome, told.size, told.witness_size) == (Outcome.FORKED, 800, 700)


async def test_a_power_failure_that_takes_a_checkpoint_and_no_entry_is_no_alarm(log: Path, witness: Asked) -> None:
    before = (log / CHECKPOINT).read_bytes()
    grow(log, 300, 400)
    await asked(log, witness)
    (log / CHECKPOINT).write_bytes(before)
    told = await asked(log, witness)
    assert told.error is not None
    assert (told.outcome, "no checkpoint for them yet" in told.error["cause"]) == (Outcome.FAILED, True)
    grow(log, 400, 401)
    assert (await asked(log, witness)).outcome is Outcome.COSIGNED


async def test_a_power_failure_that_takes_a_tile_is_no_alarm(log: Path, witness: Asked) -> None:
    await asked(log, witness)
    grow(log, 300, 400)
    (tile,) = (log / "tile" / "0" / "001.p").iterdir()
    tile.write_bytes(bytes(tile.stat().st_size))
    told = await asked(log, witness, seen=300)
    assert told.error is not None
    assert (told.outcome, told.error["code"]) == (Outcome.FAILED, "audit_log_unreadable")
    tile.write_bytes(b"")
    assert (await asked(log, witness, seen=300)).outcome is Outcome.FAILED
    assert witness.old_sizes == [0]  # nobody was shown a proof that does not hold


async def test_another_history_of_the_same_size_is_refused(log: Path, witness: Asked, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_log(other, 299)
    grow(other, 5000, 5001)
    await asked(log, witness)
    told = await asked(other, witness, seen=300)
    assert (told.outcome, told.size, told.witness_size) == (Outcome.FORKED, 300, 300)
    # Without a size in the body, as the document allows there.
    assert (await asked(log, Says(Answer(409, b"")), seen=300)).outcome is Outcome.FORKED


async def test_a_checkpoint_that_was_carried_meanwhile_is_no_alarm(log: Path, witness: Asked) -> None:
    """The witness is asked in another way, for a newer one, between our look at the log and its answer."""

    def carry() -> None:
        witness.before = lambda: None
        grow(log, 300, 700)
        note = newest_note(log)
        witness._service.answer(request_for(log, note, 0))

    witness.before = carry
    told = await asked(log, witness)
    assert (told.outcome, told.size) == (Outcome.COSIGNED, 700)


@pytest.mark.parametrize(
    ("answers", "code", "told"),
    [
        ([Answer(404, b"no log\n")], "witness_does_not_know_log", "it answered 404: no log"),
        ([Answer(403, b"")], "witness_does_not_know_log", "it answered 403"),
        ([Answer(500, b"\x1b[31mno\n")], "witness_unreachable", "it answered 500: [31mno"),
        ([Answer(302, b"")], "witness_unreachable", "302"),
        ([Answer(409, b"many\n")], "witness_unreachable", "409"),
        ([Answer(409, b"0\n")], "witness_unreachable", "409"),
        ([Answer(422, b"")], "witness_unreachable", "422"),
        ([Answer(409, b"%d\n" % size) for size in (1, 2, 3, 4)], "witness_unreachable", "another size each time"),
        ([Answer(200, b"")], "witness_reply_invalid", "0 bytes"),
        ([Answer(200, b"hello\n")], "witness_reply_invalid", "signature line"),
        ([Answer(200, b"\xff\n")], "witness_reply_invalid", "UTF-8"),
    ],
)
async def test_what_no_witness_answers_is_a_failure_and_no_alarm(
    log: Path, answers: Sequence[Answer], code: str, told: str
) -> None:
    found = await asked(log, Says(*answers))
    assert found.outcome is Outcome.FAILED
    assert found.error is not None
    assert found.error["code"] == code
    assert told in found.error["cause"]


async def test_a_signature_of_somebody_else_or_on_something_else_is_not_taken(log: Path, tmp_path: Path) -> None:
    others = await asked(log, Asked(tmp_path / "other", OTHER))
    assert others.error is not None
    assert others.error["code"] == "witness_reply_invalid"
    make_log(tmp_path / "another", 301)
    strange = await Asked(tmp_path / "witness")(request_for(tmp_path / "another", newest_note(tmp_path / "another"), 0))
    wrong = await asked(log, Says(strange))
    assert wrong.error is not None
    assert wrong.error["code"] == "witness_reply_invalid"


async def run_until(asks: Asker) -> None:
    with pytest.raises(End):
        await asks.run()


async def test_each_checkpoint_is_asked_for_once_and_the_newest_only(log: Path, witness: Asked) -> None:
    told: list[Told] = []
    looks = 0

    async def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 5:
            grow(log, 300, 400)
            grow(log, 400, 500)
        if looks == 10:
            raise End

    await run_until(Asker(AT, log, seen=0, post=witness, tell=told.append, sleep=sleep))
    assert [each.size for each in told] == [300, 500]
    assert witness.old_sizes == [0, 300]


async def test_what_fails_is_asked_again_after_pauses_that_grow_and_differ(log: Path, witness: Asked) -> None:
    told: list[Told] = []
    pauses: list[float] = []
    jitter = iter([1.0, 0.0] * 10)

    async def down(request: bytes) -> Answer:
        if len(pauses) == 9:
            return await witness(request)
        raise WitnessUnreachable("down", cause="down", remedy="up")

    async def sleep(seconds: float) -> None:
        if told[-1].outcome is Outcome.COSIGNED:
            raise End
        pauses.append(seconds)

    await run_until(Asker(AT, log, seen=0, post=down, tell=told.append, sleep=sleep, jitter=lambda: next(jitter)))
    assert pauses == [1.0, 1.0, 4.0, 4.0, 16.0, 16.0, 60.0, 30.0, 60.0]
    assert [each.outcome for each in told] == [Outcome.FAILED] * 9 + [Outcome.COSIGNED]


async def test_a_refusal_is_asked_again_with_the_next_checkpoint(log: Path) -> None:
    told: list[Told] = []
    looks = 0

    async def sleep(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            grow(log, 300, 400)
        if looks == 6:
            raise End

    await run_until(Asker(AT, log, seen=0, post=Says(Answer(409, b"5000\n")), tell=told.append, sleep=sleep))
    assert [(each.outcome, each.size) for each in told] == [(Outcome.SHORTER, 300), (Outcome.SHORTER, 400)]


async def test_whatever_does_not_end_or_breaks_is_a_failure_of_that_witness(log: Path) -> None:
    async def hangs(request: bytes) -> Answer:
        await asyncio.Event().wait()
        raise AssertionError

    async def breaks(request: bytes) -> Answer:
        raise RuntimeError("a library's defect")

    hung, _ = await Asker(AT, log, seen=0, post=hangs, tell=lambda _: None, round_s=0.2).ask()
    broken, _ = await asker(log, breaks).ask()
    assert hung is not None
    assert hung.error is not None
    assert "not done within" in hung.error["cause"]
    assert broken is not None
    assert broken.error is not None
    assert "a library's defect" in broken.error["cause"]


async def test_a_log_without_a_checkpoint_or_that_cannot_be_read_asks_nobody(log: Path, witness: Asked) -> None:
    (log / CHECKPOINT).unlink()
    assert await asker(log, witness).ask() == (None, "")
    (log / CHECKPOINT).mkdir()
    told = await asked(log, witness)
    assert told.error is not None
    assert told.error["code"] == "audit_log_unreadable"
    assert witness.requests == []
