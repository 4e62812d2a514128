"""The node checks its own log: what was changed on the disk is an alarm and an event."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.audit import checking as module
from appliance.audit.accepted import WitnessesTampered
from appliance.audit.checking import Checking
from appliance.audit.events import LOG_TAMPERED, Event
from appliance.audit.log import CHECKPOINT, WITNESSED
from appliance.audit.notes import Algorithm, SigningKey, VerifierKey, cosign
from appliance.audit.recorder import AuditUnavailable
from tests.unit.audit.making import KEY, draft, open_log, sign

pytestmark = pytest.mark.anyio


class Trail:
    """What a node says of its log, and what is recorded of it."""

    def __init__(self, size: int, key: str = str(KEY.verifier())) -> None:
        self.recorded: list[Event] = []
        self.witnesses: dict[VerifierKey, int] | WitnessesTampered = {}
        self._said = {"public_key": key, "checkpoint_size": size}

    async def checkpoint(self) -> dict[str, Any]:
        return self._said

    async def accepted_witnesses(self) -> dict[VerifierKey, int]:
        if isinstance(self.witnesses, WitnessesTampered):
            raise self.witnesses
        return self.witnesses

    async def record(self, *events: Event, privileged: bool = False) -> int:
        assert privileged
        self.recorded += events
        return 0


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    log = open_log(tmp_path)
    log.append([draft(number) for number in range(600)])
    log.publish(sign)
    log.close()
    return tmp_path


async def test_a_log_that_is_as_it_was_written_is_whole(directory: Path) -> None:
    trail = Trail(600)
    checking = Checking(trail, directory, monotonic=lambda: 7.0)
    await checking.check()
    assert checking.last is not None
    assert (checking.last.at, checking.last.size, checking.alarm, trail.recorded) == (7.0, 600, "", [])


async def test_a_changed_byte_is_an_alarm_until_it_is_put_back_and_an_event_once(directory: Path) -> None:
    trail = Trail(600)
    checking = Checking(trail, directory)
    tile = directory / "tile/entries/001"
    as_written = tile.read_bytes()
    tile.write_bytes(as_written[:1000] + bytes([as_written[1000] ^ 1]) + as_written[1001:])
    for _ in range(2):
        await checking.check()
        assert checking.last is not None
        assert checking.last.size == 0
        assert "261" in checking.alarm
    assert [event.kind for event in trail.recorded] == [LOG_TAMPERED]
    tile.write_bytes(as_written)
    await checking.check()
    assert checking.alarm == ""
    tile.unlink()
    await checking.check()
    assert len(trail.recorded) == 2


async def test_a_log_that_was_put_back_to_an_older_copy_or_signed_by_another_is_not_whole(directory: Path) -> None:
    for trail in (Trail(601), Trail(600, str(SigningKey("other", b"o" * 32).verifier()))):
        checking = Checking(trail, directory)
        await checking.check()
        assert checking.alarm
        assert [event.kind for event in trail.recorded] == [LOG_TAMPERED]


async def test_a_node_holds_its_log_to_the_witnesses_that_it_accepted(directory: Path) -> None:
    witness = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
    kept = directory / WITNESSED / "600"
    kept.parent.mkdir()
    note = (directory / CHECKPOINT).read_text()
    kept.write_text(note + cosign(note, witness, 1_700_000_000))
    trail = Trail(600)
    checking = Checking(trail, directory)

    async def alarm() -> str:
        await checking.check()
        return checking.alarm

    assert "witness.example (key" in await alarm(), "nobody accepted it"
    trail.witnesses = {witness.verifier(): 600}
    assert await alarm() == ""
    as_written = kept.read_text()
    kept.write_text(as_written.replace("witness.example", "witness.exemple"))
    assert str(kept) in await alarm()
    kept.unlink()
    assert "what witness.example co-signed last is missing" in await alarm()
    kept.write_text(as_written)
    trail.witnesses = WitnessesTampered("it is not known who they are", cause="a file is gone", remedy="Put it back")
    assert await alarm() == "it is not known who they are: a file is gone"
    (directory / "tile/0/000").unlink()
    assert "what holds entry 0 is missing" in await alarm()
    assert {event.kind for event in trail.recorded} == {LOG_TAMPERED}


async def test_a_witness_that_is_accepted_while_the_log_is_checked_is_no_alarm(directory: Path) -> None:
    witness = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)

    class Accepting(Trail):
        asked = 0

        async def accepted_witnesses(self) -> dict[VerifierKey, int]:
            self.asked += 1
            if self.asked == 1:  # the first answer is from before, the co-signature is there already
                kept = directory / WITNESSED / "600"
                kept.parent.mkdir()
                note = (directory / CHECKPOINT).read_text()
                kept.write_text(note + cosign(note, witness, 1_700_000_000))
                return {}
            return {witness.verifier(): 600}

    trail = Accepting(600)
    checking = Checking(trail, directory)
    await checking.check()
    assert (checking.alarm, trail.recorded) == ("", [])


async def test_a_log_that_cannot_be_looked_at_is_an_alarm_and_no_event(directory: Path) -> None:
    trail = Trail(600, "no key")
    checking = Checking(trail, directory)
    await checking.check()
    assert checking.alarm
    assert trail.recorded == []


async def test_what_could_not_be_recorded_is_recorded_by_the_next_check(directory: Path) -> None:
    class Refusing(Trail):
        refusals = 1

        async def record(self, *events: Event, privileged: bool = False) -> int:
            if self.refusals:
                self.refusals -= 1
                raise AuditUnavailable("nothing is recorded", cause="a full disk", remedy="Make room")
            return await super().record(*events, privileged=privileged)

    trail = Refusing(601)
    checking = Checking(trail, directory)
    with pytest.raises(AuditUnavailable):
        await checking.check()
    assert checking.alarm
    await checking.check()
    assert [event.kind for event in trail.recorded] == [LOG_TAMPERED]


async def test_a_log_that_could_not_be_looked_at_is_looked_at_again_soon(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn = asyncio.create_subprocess_exec
    pauses_s: list[float] = []
    alarms: list[bool] = []

    async def killed_once(*command: str, **named: Any) -> asyncio.subprocess.Process:
        process = await spawn(*command, **named)
        if len(pauses_s) == 1:
            process.kill()
        return process

    async def pause(seconds: float) -> None:
        pauses_s.append(seconds)
        alarms.append(bool(checking.alarm))
        if len(pauses_s) == 4:
            raise asyncio.CancelledError
        if len(pauses_s) == 3:
            (directory / "tile/entries/001").unlink()

    known = {**vars(asyncio), "create_subprocess_exec": killed_once, "sleep": pause}
    monkeypatch.setattr(module, "asyncio", SimpleNamespace(**known))
    checking = Checking(Trail(600), directory)
    with pytest.raises(asyncio.CancelledError):
        await checking.run()
    assert pauses_s == [60.0, 600.0, 86_400.0, 86_400.0]
    assert alarms == [False, True, False, True], "what was changed is no reason for haste: nobody has put it right"


async def test_a_check_that_is_broken_off_leaves_no_process(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn = asyncio.create_subprocess_exec
    started: asyncio.Future[asyncio.subprocess.Process] = asyncio.get_running_loop().create_future()

    async def spawned(*command: str, **named: Any) -> asyncio.subprocess.Process:
        process = await spawn(*command, **named)
        started.set_result(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", spawned)
    checking = asyncio.create_task(Checking(Trail(600), directory).check())
    process = await started
    checking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await checking
    assert process.returncode is not None
