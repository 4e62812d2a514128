"""Recording through a real appender: durable when it returns, and told when it is not."""

import asyncio
import contextlib
import json
import math
import os
import resource
import select
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import accumulate, cycle
from pathlib import Path
from typing import Any

import pytest

from appliance.audit import protocol
from appliance.audit.entry import Entry, canonical, check_commitment, open_record
from appliance.audit.events import (
    ANYONE,
    AUTHENTICATED,
    CATALOGUE,
    LOG_RECOVERED,
    NOT_AUTHENTICATED,
    REQUEST_REFUSED,
    VAULT_REFUSED,
    Actor,
    Event,
    EventClass,
    Outcome,
)
from appliance.audit.journal import read_journal
from appliance.audit.launch import SOCKET_NAME, AppenderFailed, Launcher
from appliance.audit.log import CHECKPOINT, JOURNAL
from appliance.audit.node import NodeAudit
from appliance.audit.notes import SigningKey, open_checkpoint
from appliance.audit.recorder import AuditUnavailable, Recorder, spelled
from appliance.audit.verify import verify_log
from appliance.vault import KeyMissing, Vault, VaultSealed
from tests.unit.audit.making import KEY, Keys, draft, event, open_log
from tests.unit.vault.keystore import MemoryKeys

pytestmark = pytest.mark.anyio


class Recording:
    """A recorder with its appender."""

    def __init__(self, directory: Path) -> None:
        self.keys: Keys | None = Keys()
        self.log = directory / "audit"
        run_dir = directory / "run"
        run_dir.mkdir(mode=0o700, exist_ok=True)
        self.launcher = Launcher(self.log, run_dir)
        self.now_s = 0.0
        self.recorder = Recorder(
            lambda: self.keys,
            system_scope="system",
            versions={"vllm": "1", "holdfast": "0"},
            monotonic=lambda: self.now_s,
        )

    def entries(self) -> list[Entry]:
        content = read_journal(self.log / JOURNAL)
        assert content is not None
        return [Entry.unpack(frame.entry) for frame in content.frames]


@contextlib.asynccontextmanager
async def recording(directory: Path) -> AsyncIterator[Recording]:
    made = Recording(directory)
    running = asyncio.create_task(made.recorder.run(made.launcher.connect))
    try:
        yield made
    finally:
        running.cancel()
        await made.launcher.stop()


async def test_what_record_returned_for_is_on_the_disk(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        assert await it.recorder.record(event(1)) == 0
        assert await it.recorder.record(event(2), event(3)) == 2
        content = read_journal(it.log / JOURNAL)
        assert content is not None
        opened = [open_record(Entry.unpack(frame.entry), frame.sealed, Keys()).record for frame in content.frames]
        assert [record["request_id"] for record in opened] == ["req_1", "req_2", "req_3"]


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda kind: str(kind.action))
def test_a_record_is_spelled_in_its_one_way(kind: EventClass) -> None:
    nasty = "".join(map(chr, (*range(0x300), 0x2028, 0xD800, 0xFFFE, 0x1F600))) + '"\\/'
    plain = Event(kind, Actor("principal", "prn_1", "client"), tenant_id="ten_1", target=("model", "m"))
    whole = replace(
        plain,
        outcome=Outcome.REFUSED,
        source="::1",
        reason=nasty,
        request_id=nasty[0x80:],
        session_id=nasty[0x280:],
        counts=dict(zip(kind.counts, cycle((1, 2**63, -5)), strict=False)),
        details=dict(zip(kind.details, cycle((nasty[-40:], "", "x" * 300)), strict=False)),
    )
    floats = dict(zip(kind.counts, cycle((1e22, 0.1 + 0.2, 1e-7)), strict=False))
    for each in (Event(kind, ANYONE), plain, whole, replace(whole, counts=floats)):
        assert spelled(each, {"holdfast": "0", "python": "3"}) == canonical(
            each.record({"python": "3", "holdfast": "0"})
        )


async def test_what_is_sealed_is_the_records_one_spelling(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.record(event(1))
        content = read_journal(it.log / JOURNAL)
        assert content is not None
        entry = Entry.unpack(content.frames[0].entry)
        opened = open_record(entry, content.frames[0].sealed, Keys())
        check_commitment(entry, opened.salt, canonical(opened.record))


def _appender_runs(program: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An appender that is started runs `program` instead."""
    spawn = asyncio.create_subprocess_exec

    async def started(python: str, *_: str, **named: Any) -> asyncio.subprocess.Process:
        return await spawn(python, "-P", "-c", program, str(directory), **named)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", started)


_COUNTING = """
import os, sys
from appliance.audit import appender

sync = os.fdatasync

def counted(descriptor):
    sync(descriptor)
    with open(sys.argv[1] + ".syncs", "ab") as syncs:
        syncs.write(b".")

os.fdatasync = counted
sys.exit(appender.main())
"""


async def test_many_at_once_share_their_syncs_and_keep_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _appender_runs(_COUNTING, tmp_path / "audit", monkeypatch)
    async with recording(tmp_path) as it:
        assert await it.recorder.record(event(0)) == 0
        assert (tmp_path / "audit.syncs").read_bytes() == b"."
        sequences = await asyncio.gather(*(it.recorder.record(event(number)) for number in range(1, 501)))
        assert sequences == list(range(1, 501))
        # The first goes at once, the others sixteen to a frame, and a frame has one sync at most.
        assert len((tmp_path / "audit.syncs").read_bytes()) <= 2 + math.ceil(499 / 16)


async def test_whoever_is_sent_in_one_frame_gets_the_sequence_of_its_own_last_entry(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        sizes = [1 + number % 3 for number in range(200)]
        sequences = await asyncio.gather(*(it.recorder.record(*(event(1),) * size) for size in sizes))
        assert sequences == [last - 1 for last in accumulate(sizes)]
        assert await it.recorder.record(event(1)) == sum(sizes)


async def test_one_that_gave_up_leaves_the_others_of_its_frame_their_answers(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.record(event(0))
        begun = [it.recorder.record(event(number)) for number in range(1, 41)]
        for answer in begun[::3]:
            answer.cancel()
        sequences = [await answer for answer in begun if not answer.cancelled()]
        assert sequences == [number for number in range(1, 41) if number % 3 != 1]
        assert len(it.entries()) == 41


async def test_what_waits_is_bounded_and_what_was_answered_does_not_count(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        for _ in range(3):
            begun = [it.recorder.record(event(1)) for _ in range(4096)]
            with pytest.raises(AuditUnavailable, match="nothing is served") as refused:
                await it.recorder.record(event(1))
            assert "4096 events wait already" in refused.value.cause
            await asyncio.gather(*begun)


async def test_an_append_that_fits_into_no_frame_is_refused_and_harms_no_other(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.record(event(1))
        long = [event(1)] * 1500
        longest = [event(1)] * 10_000
        waiting = [it.recorder.record(event(1)), it.recorder.record(*long), it.recorder.record(event(1))]
        with pytest.raises(ValueError, match=r"10000 events of \d+ bytes do not fit into a frame"):
            await it.recorder.record(*longest)
        assert [await each for each in waiting] == [1, 1501, 1502]


async def test_a_checkpoint_is_signed_when_the_key_is_there_and_at_the_end(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.record(event(1))
        assert (await it.recorder.status())["signs"] is False
        assert not (it.log / CHECKPOINT).exists()
        await it.recorder.sign_with(KEY.to_bytes())
        assert (await it.recorder.checkpoint())["checkpoint_size"] == 1
        await it.recorder.record(*(event(number) for number in range(2000)))
        while (await it.recorder.status())["checkpoint_size"] < 2001:
            """It is written beside the appends; the test's deadline is the bound."""
        await it.recorder.record(event(1))
    assert open_checkpoint((it.log / CHECKPOINT).read_text(), KEY.verifier()).size == 2002
    assert verify_log(it.log, KEY.verifier()).unsigned == 0
    assert not (tmp_path / "run" / SOCKET_NAME).exists()


_STRANGER = """
import contextlib, socket, sys
answer = b""
with socket.socket(socket.AF_UNIX) as appender, contextlib.suppress(BrokenPipeError, ConnectionResetError):
    appender.connect("audit.sock")
    appender.settimeout(20)
    appender.sendall(bytes.fromhex(sys.argv[1]))
    answer = appender.recv(1)
sys.exit(answer != b"")
"""


@pytest.mark.parametrize("kind", [protocol.APPEND, protocol.STATUS, protocol.SIGNING_KEY], ids=str)
async def test_another_process_of_the_same_user_is_not_heard(kind: int, tmp_path: Path) -> None:
    bodies = {
        protocol.APPEND: protocol.pack_drafts([draft(7)]),
        protocol.SIGNING_KEY: SigningKey("x", b"x" * 32).to_bytes(),
    }
    async with recording(tmp_path) as it:
        await it.recorder.sign_with(KEY.to_bytes())
        await it.recorder.record(event(1))
        frame = protocol.pack(kind, 1, bodies.get(kind, b"")).hex()
        stranger = await asyncio.create_subprocess_exec(sys.executable, "-c", _STRANGER, frame, cwd=tmp_path / "run")
        assert await stranger.wait() == 0, "it was answered"
        await it.recorder.record(event(2))
        assert len(it.entries()) == 2
        assert (await it.recorder.status())["public_key"] == str(KEY.verifier())


@pytest.mark.parametrize("privileged", [False, True])
async def test_an_appender_that_is_killed_is_started_again_and_repeats_nothing(
    tmp_path: Path, privileged: bool
) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.sign_with(KEY.to_bytes())
        await it.recorder.record(event(0))
        done = 1
        for _ in range(8):
            pid = it.launcher.pid
            assert pid is not None
            waiting = [it.recorder.record(event(number), privileged=privileged) for number in range(200)]
            await asyncio.sleep(0)
            os.kill(pid, signal.SIGKILL)
            done += len(await asyncio.gather(*waiting))
            entries = it.entries()
            assert len(entries) == len({entry.nonce for entry in entries})
            # A kill in the middle of a write leaves a torn record, and that it was cut off is an entry.
            recovered = sum(entry.event_class == LOG_RECOVERED.number for entry in entries)
            assert len(entries) == done + recovered
        assert (await it.recorder.checkpoint())["signs"] is True
    assert verify_log(it.log, KEY.verifier()).size == done + recovered


_DYING = """
import os, signal, sys
from appliance.audit import appender

send = appender.Appender._send

def send_or_die(self, producer):
    die = sys.argv[1] + ".die"
    if producer.unsent and os.path.exists(die):
        os.unlink(die)
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, producer)

appender.Appender._send = send_or_die
sys.exit(appender.main())
"""


@pytest.mark.parametrize("privileged", [False, True])
async def test_killed_between_the_sync_and_its_answer_it_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privileged: bool
) -> None:
    _appender_runs(_DYING, tmp_path / "audit", monkeypatch)
    async with recording(tmp_path) as it:
        await it.recorder.record(event(0))
        (tmp_path / "audit.die").touch()
        assert await it.recorder.record(event(1), event(2), privileged=privileged) == 2
        assert not (tmp_path / "audit.die").exists(), "it was killed"
        assert len(it.entries()) == 3


def _kill_once_the_journal_has_let_go(journal: Path, pid: int, size: int) -> None:
    """Blocks: no answer is read meanwhile. `size`: of the log then."""
    until = time.monotonic() + 30
    while not (content := read_journal(journal)) or not content.base or content.base + len(content.frames) < size:
        assert time.monotonic() < until, "the journal never was so long, or never let go"
        time.sleep(0.01)
    ended = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([ended], [], [])
    os.close(ended)


async def test_what_lay_answered_and_unread_while_the_journal_let_it_go_is_not_repeated(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.sign_with(KEY.to_bytes())
        for _ in range(4):
            await it.recorder.record(*(event(number) for number in range(1000)))
        await it.recorder.checkpoint()
        await it.recorder.record(*(event(number) for number in range(800)))
        begun = [it.recorder.record(event(number)) for number in range(300)]
        assert it.launcher.pid is not None
        # The last few may not be sent yet: they are gathered until the loop comes round.
        _kill_once_the_journal_has_let_go(it.log / JOURNAL, it.launcher.pid, 5080)
        assert not any(answer.done() for answer in begun)
        # Who writes to a socket that is closed is told so before anything is read from it.
        begun += [it.recorder.record(event(number)) for number in range(16)]
        assert await asyncio.gather(*begun) == list(range(4800, 5116))
        assert (await it.recorder.status())["size"] == 5116


async def test_who_joins_appends_that_everybody_gave_up_is_answered(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.record(event(0))
        busy = it.recorder.record(event(1))  # the appender has something to do: what follows is gathered
        given_up = it.recorder.record(event(2))
        given_up.cancel()
        it.recorder._sweep()
        joined = it.recorder.record(event(3))
        async with asyncio.timeout(5):
            assert (await busy, await joined) == (1, 3)


async def test_many_events_of_one_append_count_as_many_that_wait(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        long = [it.recorder.record(*(event(1),) * 1000) for _ in range(4)]
        with pytest.raises(AuditUnavailable) as refused:
            await it.recorder.record(*(event(1),) * 97)
        assert "4000 events wait already" in refused.value.cause
        assert await it.recorder.record(*(event(1),) * 96) == 4095
        await asyncio.gather(*long)
        assert await it.recorder.record(event(1)) == 4096


async def test_what_cannot_be_written_is_told_with_the_file_and_the_cause(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        await it.recorder.record(event(1))
        pid = it.launcher.pid
        assert pid is not None
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
        many = (event(1),) * 100
        with contextlib.suppress(AuditUnavailable):
            for _ in range(1000):
                await it.recorder.record(*many)
        with pytest.raises(AuditUnavailable) as refused:
            await it.recorder.record(*many)
        assert str(it.log / JOURNAL) in refused.value.cause
        assert "File too large" in refused.value.cause
        assert it.recorder.error is not None
        assert (await it.recorder.status())["error"]["code"] == "audit_log_unwritable"


async def test_a_log_that_another_appender_has_is_told(tmp_path: Path) -> None:
    (tmp_path / "audit").mkdir()
    log = open_log(tmp_path / "audit")
    made = Recording(tmp_path)
    with pytest.raises(AppenderFailed, match="has an appender already"):
        await made.launcher.connect(asyncio.Protocol())
    log.close()


async def test_an_appender_whose_starter_was_killed_gives_the_log_up(tmp_path: Path) -> None:
    """Nobody has connected with it yet, and nobody will."""
    starting = """
import asyncio, os, signal, sys
from pathlib import Path
from appliance.audit.launch import Launcher

class Kill(asyncio.Protocol):
    pass

async def main():
    launcher = Launcher(Path(sys.argv[1]) / "audit", Path(sys.argv[1]) / "run")
    loop = asyncio.get_running_loop()
    loop.create_unix_connection = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    await launcher.connect(Kill())

asyncio.run(main())
"""
    (tmp_path / "run").mkdir(mode=0o700)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", starting, str(tmp_path))
    assert await process.wait() == -signal.SIGKILL
    async with recording(tmp_path) as it:
        assert await it.recorder.record(event(1)) == 0


async def test_while_the_vault_is_sealed_events_are_recorded_in_plaintext(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        it.keys = None
        await it.recorder.record(Event(VAULT_REFUSED, ANYONE, Outcome.REFUSED, source="uid 1000"))
        with pytest.raises(VaultSealed):
            await it.recorder.record(event(1))
        content = read_journal(it.log / JOURNAL)
        assert content is not None
        assert b"vault.refused" in content.frames[0].sealed


def _refused(number: int) -> Event:
    client = Actor("principal", "pri_1", "client")
    return Event(REQUEST_REFUSED, client, Outcome.REFUSED, tenant_id=f"ten_{number}", reason="too_many_requests")


STRANGER = Event(NOT_AUTHENTICATED, ANYONE, Outcome.REFUSED, source="10.0.0.1", reason="key_unknown")


def _records(it: Recording) -> list[dict[str, Any]]:
    content = read_journal(it.log / JOURNAL)
    assert content is not None
    return [open_record(Entry.unpack(frame.entry), frame.sealed, Keys()).record for frame in content.frames]


def _counted(it: Recording) -> list[tuple[str, str, int]]:
    return [(record["action"], record["reason"], record["counts"]["count"]) for record in _records(it)]


async def test_what_cannot_be_told_while_the_vault_is_sealed_is_told_later_and_the_rest_at_once(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        for _ in range(3):
            it.recorder.count(_refused(1))
            it.recorder.count(STRANGER)
        it.keys = None
        with pytest.raises(VaultSealed):
            await it.recorder.tell_counted()
        assert _counted(it) == [("key.refused", "key_unknown", 3)]
        it.recorder.count(_refused(1))
        it.keys = Keys()
        it.now_s = 61.0
        await it.recorder.tell_counted()
        assert _counted(it)[1:] == [("request.refused", "too_many_requests", 4)]
        await it.recorder.tell_counted(at_once=True)
        assert len(it.entries()) == 2


async def test_what_cannot_be_told_stays_bounded(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        it.keys = None
        for minute in range(10):
            for number in range(100):
                it.recorder.count(replace(_refused(1), reason=f"{minute} {number}"))
            it.now_s += 61.0
            with pytest.raises(VaultSealed):
                await it.recorder.tell_counted()
        it.keys = Keys()
        await it.recorder.tell_counted(at_once=True)
        assert sum(count for _, _, count in _counted(it)) == 1000
        assert len(it.entries()) <= 66 + 9


def _looked(number: int, source: str = "10.0.0.1") -> Event:
    client = Actor("principal", "pri_1", "client")
    return Event(AUTHENTICATED, client, tenant_id="ten_1", source=source, target=("key", f"ak_{number}"))


async def test_keys_of_one_principal_are_told_apart_and_strangers_take_no_known_callers_place(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        for number in range(1000):
            it.recorder.count(replace(STRANGER, source=f"10.1.{number // 256}.{number % 256}"))
        for _ in range(5):
            it.recorder.count(_looked(1))
            it.recorder.count(_looked(2))
        await it.recorder.tell_counted()
        known = [record for record in _records(it) if record["action"] == "key.authenticated"]
        assert [(each["target"]["id"], each["counts"]["count"]) for each in known] == [("ak_1", 5), ("ak_2", 5)]
        assert len(it.entries()) == 65 + 2


async def test_what_a_limit_refused_is_told_by_the_key_that_ran_into_it(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        for number, times in ((1, 3), (2, 4)):
            for _ in range(times):
                it.recorder.count(replace(_refused(1), details={"key_id": f"ak_{number}"}))
        await it.recorder.tell_counted()
        told = [(each["details"]["key_id"], each["counts"]["count"]) for each in _records(it)]
        assert told == [("ak_1", 3), ("ak_2", 4)]


async def test_known_callers_that_are_too_many_to_tell_apart_are_told_by_their_tenants(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        for number in range(64):
            it.recorder.count(_looked(1, source=f"10.0.0.{number}"))
        for tenant in (1, 2, 1):
            it.recorder.count(_refused(tenant))
        it.recorder.count(_looked(2))
        it.recorder.count(STRANGER)
        await it.recorder.tell_counted()
        rest = [
            (record["action"], record.get("tenant_id"), record["reason"], record["counts"]["count"])
            for record in _records(it)
            if record.get("reason")
        ]
        assert rest == [
            ("request.refused", "ten_1", "others", 2),
            ("request.refused", "ten_2", "others", 1),
            ("key.authenticated", "ten_1", "others", 1),
            ("key.refused", None, "key_unknown", 1),
        ]


async def test_of_a_tenant_that_was_shredded_it_is_told_how_often_it_was(tmp_path: Path) -> None:
    class Shredded(Keys):
        def audit_key_id(self, scope: str) -> bytes:
            if scope == "ten_1":
                raise KeyMissing(scope)
            return super().audit_key_id(scope)

    async with recording(tmp_path) as it:
        it.keys = Shredded()
        it.recorder.count(_refused(1))
        with pytest.raises(KeyMissing):
            await it.recorder.tell_counted()
        await it.recorder.tell_counted(at_once=True)
        assert _counted(it) == [("request.refused", "others", 1)]


async def test_who_tells_what_was_counted_outlives_a_sealed_vault_and_so_does_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.audit.node._TELL_S", 0.01)
    (tmp_path / "run").mkdir(mode=0o700)
    audit = NodeAudit(tmp_path, Vault(MemoryKeys()), versions={})
    await audit.start()
    tries, tried_again = 0, asyncio.Event()
    tell = audit._recorder.tell_counted

    async def tell_counted(*, at_once: bool = False) -> None:
        nonlocal tries
        tries += 1
        if tries == 3:
            tried_again.set()
        await tell(at_once=at_once or tries <= 3)

    monkeypatch.setattr(audit._recorder, "tell_counted", tell_counted)
    audit.count(_refused(1))
    await tried_again.wait()
    audit.count(STRANGER)
    await audit.stop()
    content = read_journal(tmp_path / "audit" / JOURNAL)
    assert content is not None
    assert [json.loads(frame.sealed[16:])["action"] for frame in content.frames] == ["key.refused"]


async def test_what_anybody_can_cause_is_counted_and_told_once_a_minute(tmp_path: Path) -> None:
    async with recording(tmp_path) as it:
        for number in range(100_000):
            source = f"10.0.{number // 256 % 256}.{number % 256}"
            it.recorder.count(Event(NOT_AUTHENTICATED, ANYONE, Outcome.REFUSED, source=source, reason="key_unknown"))
            if number in (10, 50_000):
                await it.recorder.tell_counted()
        assert len(it.entries()) == 11
        it.now_s = 61.0
        await it.recorder.tell_counted()
        content = read_journal(it.log / JOURNAL)
        assert content is not None
        records = [open_record(Entry.unpack(frame.entry), frame.sealed, Keys()).record for frame in content.frames]
        assert len(records) <= 11 + 65
        assert sum(record["counts"]["count"] for record in records) == 100_000
        assert records[-1]["reason"] == "others"
