"""What the gateway makes of what came of asking its witnesses: what it keeps, what it tells, and to whom."""

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from appliance.audit import witnesses as witnesses_module
from appliance.audit.accepted import WitnessesTampered
from appliance.audit.asking import Outcome, Told, WitnessAt, WitnessUnreachable
from appliance.audit.events import Event
from appliance.audit.log import PUBLIC_KEY
from appliance.audit.notes import Algorithm, Checkpoint, SigningKey, VerifierKey
from appliance.audit.recorder import AuditUnavailable
from appliance.audit.verify import verify_log
from appliance.audit.witness import Witness
from appliance.audit.witnesses import SILENT_S, View, Witnesses, witnesses_of
from appliance.audit.witnessing import last_seen, make_request, take_reply
from appliance.settings import SettingsError, WitnessSettings
from tests.unit.audit.making import KEY, drafts, make_log, open_log, sign

pytestmark = pytest.mark.anyio

WITNESS = SigningKey("witness.example", b"w" * 32, Algorithm.COSIGNATURE)
OTHER = SigningKey("other.example", b"o" * 32, Algorithm.COSIGNATURE)
VKEY = str(WITNESS.verifier())
AT = WitnessAt("other-node", "https://witness.example", VKEY, "/ca.pem")
DOWN = WitnessUnreachable("it does not co-sign", cause="connection refused", remedy="look").record()
NOW_S = 1_700_000_000.0


class Trail:
    """Remembers events, unless it is broken."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.events: list[Event] = []
        self.accepted: list[VerifierKey] = []
        self.broken = False

    async def record(self, *events: Event, privileged: bool = False) -> int:
        assert privileged
        if self.broken:
            raise AuditUnavailable("nothing is recorded", cause="full", remedy="make room")
        self.events += events
        return 0

    async def keep_cosignature(
        self, request: bytes, reply: bytes, witness: VerifierKey
    ) -> tuple[Checkpoint, dict[str, int], dict[str, str]]:
        seen = take_reply(self.log, request, reply, KEY.verifier(), witness)
        self.accepted.append(witness)
        return seen, {"witnesses": len(self.accepted)}, {"size": str(seen.size)}

    async def accepted_witnesses(self) -> dict[VerifierKey, int]:
        return dict.fromkeys(self.accepted, 0)

    @property
    def told(self) -> list[tuple[str, str, Mapping[str, Any]]]:
        return [(event.kind.action, event.reason, event.counts) for event in self.events]


class Clock:
    """Wall time that is set by hand."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def log(tmp_path: Path) -> Path:
    make_log(tmp_path / "audit", 300)
    (tmp_path / "audit" / PUBLIC_KEY).write_text(f"{KEY.verifier()}\n")
    return tmp_path / "audit"


@pytest.fixture
def trail(log: Path) -> Trail:
    return Trail(log)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def witnesses(log: Path, trail: Trail, clock: Clock) -> Witnesses:
    return Witnesses(log, [AT], trail, wall=clock)


def cosigned(log: Path, place: Path, *, key: SigningKey = WITNESS, old_size: int = 0) -> Told:
    request = make_request(log, old_size=old_size)
    reply = Witness(place, key).cosign(request, KEY.verifier(), 1_800_000_000)
    size = int(request.decode().partition("\n\n")[2].split("\n")[1])
    return Told("other-node", Outcome.COSIGNED, size, None, request.decode(), reply.decode())


def grow(directory: Path, first: int, end: int) -> None:
    log = open_log(directory)
    log.append(drafts(range(first, end)))
    log.publish(sign)
    log.close()


async def test_a_co_signature_is_kept_and_is_an_event_once(
    witnesses: Witnesses, log: Path, trail: Trail, tmp_path: Path, clock: Clock
) -> None:
    await witnesses.take(cosigned(log, tmp_path / "w"))
    grow(log, 300, 400)
    clock.now_s += 60
    await witnesses.take(cosigned(log, tmp_path / "w", old_size=300))
    assert witnesses.views() == [View("other-node", AT.url, 400, NOW_S + 60)]
    assert verify_log(log, KEY.verifier(), witnesses=[WITNESS.verifier()]).witnessed["witness.example"][0] == 400
    assert trail.told == [("audit.witnessed", "", {"witnesses": 1})]
    assert (trail.accepted, trail.events[0].details) == ([WITNESS.verifier()], {"size": "300"})
    assert trail.events[0].target == ("witness", VKEY)
    assert witnesses.alarm == ""


async def test_one_that_co_signs_all_along_is_accepted_again_where_the_list_was_begun_anew(
    witnesses: Witnesses, log: Path, trail: Trail, tmp_path: Path
) -> None:
    await witnesses.take(cosigned(log, tmp_path / "w"))
    trail.accepted.clear()
    grow(log, 300, 400)
    await witnesses.take(cosigned(log, tmp_path / "w", old_size=300))
    assert trail.accepted == [WITNESS.verifier()]
    assert [kind for kind, _, _ in trail.told] == ["audit.witnessed", "audit.witnessed"]


async def test_what_a_log_is_held_to_grows_by_the_hour(
    witnesses: Witnesses, log: Path, trail: Trail, tmp_path: Path, clock: Clock
) -> None:
    await witnesses.take(cosigned(log, tmp_path / "w"))
    for size, passes_s in ((400, 3599.0), (500, 1.0)):
        grow(log, size - 100, size)
        clock.now_s += passes_s
        await witnesses.take(cosigned(log, tmp_path / "w", old_size=size - 100))
    assert len(trail.accepted) == 2
    assert [kind for kind, _, _ in trail.told] == ["audit.witnessed"]


async def test_while_it_is_not_known_who_was_accepted_what_is_co_signed_is_kept(
    witnesses: Witnesses, log: Path, trail: Trail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def tampered() -> dict[VerifierKey, int]:
        raise WitnessesTampered("it is not known", cause="it was changed", remedy="look")

    monkeypatch.setattr(trail, "accepted_witnesses", tampered)
    await witnesses.take(cosigned(log, tmp_path / "w"))
    assert last_seen(log, WITNESS.verifier()) == 300
    assert [(view.error, view.silent_since_s) for view in witnesses.views()] == [(None, None)]


async def test_what_the_process_hands_over_is_believed_only_when_it_is_verified(
    witnesses: Witnesses, log: Path, trail: Trail, tmp_path: Path
) -> None:
    strange = cosigned(log, tmp_path / "o", key=OTHER)
    make_log(tmp_path / "another", 200)
    another = cosigned(tmp_path / "another", tmp_path / "w")
    for told in (
        strange,
        Told("other-node", Outcome.COSIGNED, 300, None, another.request, strange.reply),
        Told("other-node", Outcome.COSIGNED, 300, None, "hello", "there"),
    ):
        await witnesses.take(told)
        (view,) = witnesses.views()
        assert (view.size, view.cosigned_s) == (0, None)
        assert view.error is not None
    assert last_seen(log, WITNESS.verifier()) == 0
    assert trail.told == []


@pytest.mark.parametrize(
    ("outcome", "reason", "told"),
    [(Outcome.SHORTER, "shorter", "cut off, or an old copy"), (Outcome.FORKED, "forked", "written anew")],
)
async def test_a_refusal_is_an_alarm_an_event_and_a_line_until_the_witness_co_signs_again(
    witnesses: Witnesses,
    log: Path,
    trail: Trail,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    outcome: Outcome,
    reason: str,
    told: str,
) -> None:
    for size in (300, 310):
        await witnesses.take(Told("other-node", outcome, size, 700))
    await witnesses.take(Told("other-node", Outcome.FAILED, 310, error=DOWN))  # one that goes down then does not end it
    assert told in witnesses.alarm
    assert "700" in witnesses.alarm
    assert "holdfast audit verify" in witnesses.alarm
    assert told in caplog.text
    assert trail.told == [("witness.refused", reason, {"size": 300, "witness_size": 700})]
    await witnesses.take(cosigned(log, tmp_path / "w"))
    assert witnesses.alarm == ""
    assert [kind for kind, _, _ in trail.told] == ["witness.refused", "audit.witnessed"]


async def test_a_witness_that_is_down_says_since_when_and_after_a_while_in_the_log(
    witnesses: Witnesses, log: Path, trail: Trail, tmp_path: Path, clock: Clock
) -> None:
    await witnesses.take(cosigned(log, tmp_path / "w"))
    clock.now_s += 40
    for _ in range(3):
        await witnesses.take(Told("other-node", Outcome.FAILED, 300, error=DOWN))
        clock.now_s += SILENT_S / 2 - 1
    (view,) = witnesses.views()
    assert (view.silent_since_s, view.size, view.cosigned_s) == (NOW_S + 40, 300, NOW_S)
    said = f"co-signed nothing for {3 * (SILENT_S / 2 - 1):.0f} s (last {40 + 3 * (SILENT_S / 2 - 1):.0f} s ago): "
    assert said + "connection refused" in view.trouble(clock())
    assert witnesses.alarm == ""
    assert [kind for kind, _, _ in trail.told] == ["audit.witnessed"]
    for _ in range(2):
        await witnesses.take(Told("other-node", Outcome.FAILED, 300, error=DOWN))
    assert trail.told[1:] == [("witness.silent", "witness_unreachable", {})]
    grow(log, 300, 400)
    await witnesses.take(cosigned(log, tmp_path / "w", old_size=300))
    assert [kind for kind, _, _ in trail.told] == ["audit.witnessed", "witness.silent", "audit.witnessed"]
    assert witnesses.views()[0].trouble(clock()) == ""


async def test_what_cannot_be_recorded_is_recorded_when_it_is_told_again(witnesses: Witnesses, trail: Trail) -> None:
    trail.broken = True
    await witnesses.take(Told("other-node", Outcome.SHORTER, 300, 700))
    assert "REFUSES" in witnesses.alarm
    trail.broken = False
    await witnesses.take(Told("other-node", Outcome.SHORTER, 301, 700))
    assert trail.told == [("witness.refused", "shorter", {"size": 301, "witness_size": 700})]


async def test_a_witness_that_forgot_is_told(
    witnesses: Witnesses, log: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await witnesses.take(cosigned(log, tmp_path / "w"))
    grow(log, 300, 400)
    again = cosigned(log, tmp_path / "empty")
    await witnesses.take(Told("other-node", Outcome.COSIGNED, 400, 0, again.request, again.reply))
    assert "had forgotten: it saw 0 entries, and co-signed 300 before" in caplog.text


class Script:
    """Stands in for the process that asks: each start runs the next of these, and then one that lives and is silent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *sources: str) -> None:
        self._sources = list(sources)
        self.started = 0
        real = asyncio.create_subprocess_exec

        async def start(*command: str, **given: Any) -> Any:
            self.started += 1
            source = self._sources.pop(0) if self._sources else "import sys; sys.stdin.read()"
            return await real(sys.executable, "-c", source, **given)

        monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
        monkeypatch.setattr(witnesses_module, "_PAUSE_S", 0.0)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  (what another process is about to do)
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def running(witnesses: Witnesses) -> Any:
    task = asyncio.create_task(witnesses.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_the_process_that_asks_is_told_whom_and_started_again_when_it_ends_or_says_nonsense(
    log: Path, trail: Trail, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = cosigned(log, tmp_path / "w")
    take_reply(log, told.request.encode(), told.reply.encode(), KEY.verifier(), WITNESS.verifier())
    refuses = Told("other-node", Outcome.SHORTER, 300, 700).line().decode()
    script = Script(
        monkeypatch,
        f"open({str(tmp_path / 'asked')!r}, 'w').write(input()); print({refuses!r}, flush=True)",
        "print('nonsense', flush=True); input(); input()",
    )
    its = Witnesses(log, [AT], trail, wall=clock)
    async with running(its):
        await until(lambda: script.started == 3 and its.pid is not None)
        (view,) = its.views()
        assert "700" in view.refused
        assert (view.size, view.cosigned_s) == (300, 1_800_000_000.0)
        assert view.error is not None
        assert "JSONDecodeError" in view.error["cause"]
    assert its.pid is None
    (asked,) = json.loads((tmp_path / "asked").read_text())
    assert (asked["seen"], asked["at"]["vkey"]) == (300, VKEY)


async def test_the_process_that_asks_is_killed_when_it_hangs(
    log: Path, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch)
    its = Witnesses(log, [AT], trail, longest_silence_s=0.1)
    async with running(its):
        await until(lambda: script.started >= 3)
        error = its.views()[0].error
        assert error is not None
        assert "said nothing for 0.1 s" in error["cause"]


async def test_where_there_is_no_witness_there_is_no_process(
    log: Path, trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Script(monkeypatch)
    await Witnesses(log, [], trail).run()
    assert script.started == 0


async def test_the_real_process_asks_and_ends_with_the_gateway(log: Path, trail: Trail, tmp_path: Path) -> None:
    at = WitnessAt("other-node", "https://127.0.0.1:1", VKEY, str(tmp_path / "no-ca.pem"))
    its = Witnesses(log, [at], trail)
    async with running(its):
        await until(lambda: its.views()[0].error is not None)
        error = its.views()[0].error
        assert error is not None
        assert "No such file" in error["cause"]
    assert its.pid is None


def settings(**different: Any) -> WitnessSettings:
    return WitnessSettings.model_validate({"url": "https://w.example:8443/w1", "vkey": VKEY, "ca": "/ca", **different})


def test_settings_name_witnesses_each_with_a_witnesss_key_of_its_own() -> None:
    found = witnesses_of(
        {"a": settings(), "b": settings(vkey=str(OTHER.verifier()), certificate="/c", private_key="/k")}
    )
    assert [(each.name, each.certificate, each.private_key) for each in found] == [("a", None, None), ("b", "/c", "/k")]
    for name, vkey in (("a", "no key"), ("b", str(KEY.verifier())), ("c", VKEY)):
        with pytest.raises(SettingsError, match=rf"audit\.witness\.{name}\.vkey"):
            witnesses_of({"z": settings(), name: settings(vkey=vkey)})


@pytest.mark.parametrize(
    "different",
    [
        {"url": "http://w.example"},
        {"url": "https://"},
        {"url": "https://me:secret@w.example"},
        {"url": "https://w.example/?a=b"},
        {"url": "https://w.example:99999"},
        {"certificate": "/c"},
        {"private_key": "/k"},
        {"unknown": 1},
    ],
)
def test_what_cannot_be_asked_is_no_setting(different: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        settings(**different)
