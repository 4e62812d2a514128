"""What a witness answers over the network, to logs that grow, to logs that were cut, and to strangers."""

import asyncio
import base64
import fcntl
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from api.witness_service import SILENT_S, SIZE_TYPE, Answer, WitnessService
from appliance.audit import witness as witness_module
from appliance.audit.files import write_whole
from appliance.audit.notes import Algorithm, Checkpoint, KeyInvalid, SigningKey, sign_checkpoint
from appliance.audit.witness import MAX_REQUEST_BYTES, Witness, verify_reply, write_request
from appliance.audit.witnessing import make_request
from tests.unit.audit.making import KEY, ORIGIN, drafts, make_log, open_log, sign

pytestmark = pytest.mark.anyio

WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
NOW_S = 1_800_000_000


@pytest.fixture
def log(tmp_path: Path) -> Path:
    make_log(tmp_path / "audit", 300)
    return tmp_path / "audit"


@pytest.fixture
def service(tmp_path: Path) -> WitnessService:
    return new_service(tmp_path)


def new_service(tmp_path: Path, **different: Any) -> WitnessService:
    return WitnessService(
        Witness(tmp_path / "witness", WITNESS), [KEY.verifier()], now=lambda: float(NOW_S), **different
    )


def grow(directory: Path, first: int, end: int) -> None:
    log = open_log(directory)
    log.append(drafts(range(first, end)))
    log.publish(sign)
    log.close()


def note_of(request: bytes) -> str:
    return request.partition(b"\n\n")[2].decode()


def with_another_root(size: int) -> str:
    return sign_checkpoint(Checkpoint(ORIGIN, size, b"r" * 32), KEY)


async def call(
    service: WitnessService, *parts: bytes, path: str = "/add-checkpoint", method: str = "POST", ends: bool = True
) -> Answer | None:
    """What came back for a body that comes in `parts`; None: nothing. Not `ends`: the rest never comes."""
    coming: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": not ends or place + 1 < len(parts)}
        for place, part in enumerate(parts)
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not coming:
            await asyncio.Event().wait()
        return coming.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    await service({"type": "http", "method": method, "path": path}, receive, send)
    if not sent:
        return None
    headers = dict(sent[0]["headers"])
    kind, length = headers.pop(b"content-type"), headers.pop(b"content-length")
    assert int(length) == len(sent[1]["body"])
    return Answer(sent[0]["status"], sent[1]["body"], kind, tuple(headers.items()))


async def test_a_log_that_grows_is_cosigned_by_the_bytes_of_the_protocol(service: WitnessService, log: Path) -> None:
    first = make_request(log, old_size=0)
    assert first.startswith(b"old 0\n\n" + ORIGIN.encode() + b"\n300\n")
    answer = await call(service, first)
    assert answer is not None
    assert answer.status == 200
    assert answer.body.startswith(b"\xe2\x80\x94 witness.example ")
    assert answer.body.count(b"\n") == 1
    assert verify_reply(answer.body, note_of(first), WITNESS.verifier()).time_s == NOW_S
    grow(log, 300, 700)
    second = make_request(log, old_size=300)
    lines = second.partition(b"\n\n")[0].split(b"\n")
    assert lines[0] == b"old 300"
    assert all(len(base64.b64decode(line, validate=True)) == 32 for line in lines[1:])
    again = await call(service, second[:100], second[100:])
    assert again is not None
    verify_reply(again.body, note_of(second), WITNESS.verifier())


async def test_who_asks_again_from_the_size_that_the_witness_has_is_answered(
    service: WitnessService, log: Path
) -> None:
    await call(service, make_request(log, old_size=0))
    assert await call(service, make_request(log, old_size=0)) == Answer(409, b"300\n", SIZE_TYPE)
    again = await call(service, make_request(log, old_size=300))
    assert again is not None
    assert again.status == 200


@pytest.mark.parametrize(
    ("harm", "status"),
    [
        ("no request", 400),
        ("a proof line that is no hash", 400),
        ("no checkpoint", 400),
        ("an old size that is larger than the checkpoint's", 400),
        ("another log", 404),
        ("another key", 403),
        ("a changed root", 403),
    ],
)
async def test_what_is_no_request_of_a_known_log_is_refused(
    service: WitnessService, log: Path, harm: str, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    request = make_request(log, old_size=0)
    checkpoint = Checkpoint(ORIGIN, 300, b"r" * 32)
    other = SigningKey("other.example", b"o" * 32)
    sent = {
        "no request": b"hello",
        "a proof line that is no hash": request.replace(b"old 0\n", b"old 0\nAAAA\n"),
        "no checkpoint": b"old 0\n\nhello\n\n" + request.partition(b"\n\n")[2].partition(b"\n\n")[2],
        "an old size that is larger than the checkpoint's": request.replace(b"old 0", b"old 301"),
        "another log": write_request(0, [], sign_checkpoint(Checkpoint(other.name, 300, b"r" * 32), other)),
        "another key": write_request(0, [], sign_checkpoint(checkpoint, SigningKey(ORIGIN, b"o" * 32))),
        "a changed root": write_request(0, [], note_of(request).replace("\n300\n", "\n301\n")),
    }[harm]
    answer = await call(service, sent)
    assert answer is not None
    assert (answer.status, answer.kind) == (status, b"text/plain; charset=utf-8")
    assert not list((log.parent / "witness").glob("*.note"))
    assert caplog.text == ""


@pytest.mark.parametrize("harm", ["rollback", "fork", "two trees of one size"])
async def test_a_rollback_and_a_fork_are_refused_and_said_in_one_line(
    service: WitnessService, log: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = make_request(log, old_size=0)
    grow(log, 300, 700)
    await call(service, make_request(log, old_size=0))
    request, status, body, told = {
        "rollback": (old, 409, b"700\n", f"rollback: log={ORIGIN} witness_size=700 size=300 "),
        "fork": (
            write_request(700, [b"h" * 32], with_another_root(900)),
            422,
            b"the consistency proof does not hold\n",
            f"fork: log={ORIGIN} witness_size=700 size=900 root={b'r'.hex() * 32}",
        ),
        "two trees of one size": (
            write_request(700, [], with_another_root(700)),
            409,
            b"700\n",
            f"fork: log={ORIGIN} witness_size=700 size=700 ",
        ),
    }[harm]
    answer = await call(service, request)
    assert answer is not None
    assert (answer.status, answer.body) == (status, body)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert told in caplog.text
    good = await call(service, make_request(log, old_size=700))
    assert good is not None
    assert good.status == 200


async def test_other_paths_and_methods_are_not_answered(service: WitnessService, log: Path) -> None:
    request = make_request(log, old_size=0)
    for path, method, status in (
        ("/", "POST", 404),
        ("/add-checkpoint/", "POST", 404),
        ("/add-checkpoint", "GET", 405),
    ):
        answer = await call(service, request, path=path, method=method)
        assert answer is not None
        assert answer.status == status


async def test_a_request_has_a_size_and_a_deadline(tmp_path: Path, service: WitnessService) -> None:
    long = await call(service, *[b"x" * 4096] * (MAX_REQUEST_BYTES // 4096 + 1), ends=False)
    assert long is not None
    assert long.status == 413
    hasty = new_service(tmp_path, body_deadline_s=0.0)
    slow = await call(hasty, b"old 0\n", ends=False)
    assert slow is not None
    assert slow.status == 408


@pytest.fixture
def held_lock(tmp_path: Path) -> Iterator[int]:
    """As `holdfast audit witness cosign` holds it while it works."""
    (tmp_path / "witness").mkdir(mode=0o700)
    descriptor = os.open(tmp_path / "witness" / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield descriptor
    os.close(descriptor)


async def test_beside_another_writer_nothing_is_cosigned(service: WitnessService, log: Path, held_lock: int) -> None:
    busy = await call(service, make_request(log, old_size=0))
    assert busy is not None
    assert (busy.status, busy.headers) == (503, ((b"retry-after", b"1"),))
    fcntl.flock(held_lock, fcntl.LOCK_UN)
    free = await call(service, make_request(log, old_size=0))
    assert free is not None
    assert free.status == 200


async def test_requests_that_come_at_once_are_worked_at_one_after_the_other(
    service: WitnessService, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that go on from one size, the second finds the first one's: no rolling back (tlog-witness)."""
    longer = log.parent / "longer"
    make_log(longer, 300)
    grow(longer, 300, 700)
    requests = [make_request(longer, old_size=0), make_request(log, old_size=0)]
    real, begun, go_on = write_whole, threading.Event(), threading.Event()

    def write_slowly(path: Path, content: bytes) -> None:
        begun.set()
        assert go_on.wait(10)
        real(path, content)

    monkeypatch.setattr(witness_module, "write_whole", write_slowly)
    first = asyncio.create_task(call(service, requests[0]))
    await asyncio.to_thread(begun.wait, 10)
    second = asyncio.create_task(call(service, requests[1]))
    go_on.set()
    answers = [await first, await second]
    assert [answer.status for answer in answers if answer is not None] == [200, 409]


async def test_a_state_that_cannot_be_written_cosigns_nothing_and_is_told(
    service: WitnessService, log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(witness_module, "write_whole", full)
    answer = await call(service, make_request(log, old_size=0))
    assert answer is not None
    assert (answer.status, b"\xe2\x80\x94" in answer.body) == (500, False)
    assert "No space left" in caplog.text


async def test_a_log_that_does_not_come_any_more_is_told_once(
    tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    service = new_service(tmp_path, monotonic=lambda: now_s)
    lines = []
    again = make_request(log, old_size=0)
    assert await call(service, again)
    again = make_request(log, old_size=300)
    for then_s, comes in ((SILENT_S - 1, True), (2 * SILENT_S - 2, False), (2 * SILENT_S, False), (2 * SILENT_S, True)):
        now_s = then_s
        if comes:
            size = 300 + int(now_s)
            grow(log, size - int(SILENT_S) + 1 if size > 1000 else 300, size)
            answer = await call(service, make_request(log, old_size=300 if size < 1000 else 300 + int(SILENT_S) - 1))
            assert answer is not None
            assert answer.status == 200
        else:
            await call(service, b"anybody else")
            await call(service, again)  # what it signed before, which anybody may have kept
        service.tell_silent()
        lines.append(
            len([record for record in caplog.records if "log=" in record.message and "REFUSED" not in record.message])
        )
    assert lines == [0, 0, 1, 2]
    assert f"SILENT: log={ORIGIN} for_s=601" in caplog.text
    assert f"came again: log={ORIGIN} after_s=601" in caplog.text


def test_a_log_has_one_key_and_it_is_a_logs(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "witness", WITNESS)
    for keys in ([KEY.verifier(), SigningKey(ORIGIN, b"o" * 32).verifier()], [WITNESS.verifier()]):
        with pytest.raises(KeyInvalid):
            WitnessService(witness, keys)


async def test_old_checkpoints_that_are_sent_again_and_again_fill_no_journal_and_hide_no_fork(
    tmp_path: Path, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now_s = 0.0
    service = new_service(tmp_path, monotonic=lambda: now_s)
    old = make_request(log, old_size=0)
    grow(log, 300, 400)
    newest = make_request(log, old_size=0)
    assert await call(service, newest)
    damaged = write_request(400, [b"h" * 32], note_of(newest))
    for again, status in ((old.replace(b"old 0\n", b"old 300\n", 1), 409), (damaged, 422)):
        for _ in range(100):
            answer = await call(service, again)
            assert answer is not None
            assert answer.status in (status, 409)
    assert caplog.text.count("REFUSED rollback") == caplog.text.count("REFUSED fork") == 10
    await call(service, write_request(400, [], with_another_root(400)))
    assert f"REFUSED fork: log={ORIGIN} witness_size=400 size=400 root={b'r'.hex() * 32}" in caplog.text
    service.tell_unsaid()
    assert "times more" not in caplog.text
    now_s = 61.0
    service.tell_unsaid()
    assert caplog.text.count(f"REFUSED 90 times more: log={ORIGIN}") == 2
    caplog.clear()
    for _ in range(11):
        await call(service, old)
    service.tell_unsaid(at_once=True)
    assert f"REFUSED 1 times more: log={ORIGIN}" in caplog.text
    service.tell_unsaid(at_once=True)
    assert caplog.text.count("times more") == 1
