"""Events fit OCSF 1.8.0, are one line each, and show at the receiver what was changed on the way."""

import json
import re
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import pytest
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from appliance.audit.entry import Draft, Entry, seal
from appliance.audit.events import CATALOGUE, ENGINE_READY, SYSTEM, Actor, Event, EventClass, Outcome
from appliance.audit.reading import LogReader
from appliance.audit.siem import ocsf, syslog
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.shipper import Destination, Shipper
from appliance.audit.siem.verify_export import ExportDiffers, verify_export
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing
from tests.unit.audit.making import KEY, ORIGIN, Keys, drafts, open_log, sign

NASTY = 'a\nb\0c|d=e\x1b[31m\x7f\u2028\u202e\ud800 <34>1 \U0001f600 "\\' + "x" * 400
_SCHEMA = OcsfJsonSchemaEmbedded(get_ocsf_schema("1.8.0"))


def _draft(event: Event) -> Draft:
    record = event.record({"holdfast": "0"})
    return seal(event.kind.number, record, keys=Keys(), scope="s", actor="", session="", random=b"r" * 32)


def _validate(event: dict[str, Any]) -> None:
    name = _SCHEMA.lookup_class_name_from_uid(event["class_uid"])
    jsonschema.Draft202012Validator(_SCHEMA.get_class_schema(name)).validate(event)
    assert event["category_uid"] == event["class_uid"] // 1000
    assert event["type_uid"] == 100 * event["class_uid"] + event["activity_id"]


class NoKeys(Keys):
    """Keys of which those that were shredded are missing, as the vault has it."""

    def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
        if key_id in self.shredded:
            raise KeyMissing("key_" + key_id.hex())
        return super().audit_secret(key_id, label, *parts)


class Sink:
    """A receiver that keeps what it is sent, and ends the connection when it is told."""

    dies: ClassVar[bool] = False

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.after = 10**9

    async def send(self, frames: list[bytes]) -> None:
        self.check()
        self.frames += frames

    def check(self) -> None:
        if len(self.frames) >= self.after:
            receiver = syslog.Receiver("h", 1, "h", Path(), Path(), Path())
            raise syslog.unreachable(receiver, "it is gone")

    async def ended_within(self, seconds: float) -> bool:
        raise _Done

    async def close(self, *, in_good_order: bool = False) -> None:
        return

    def lines(self) -> list[str]:
        lines = []
        for frame in self.frames:
            length, _, message = frame.partition(b" ")
            assert int(length) == len(message)
            lines.append(message.decode("ascii"))
        return lines


class _Done(BaseException):
    """The shipper has nothing more to send."""


class World:
    """A log of 600 entries, a destination, and clocks that are set by hand."""

    def __init__(self, folder: Path, *, max_message_bytes: int = 8000) -> None:
        self.directory, self.cursor = folder / "audit", folder / "siem" / "to.cursor"
        self.log = open_log(self.directory)
        self.keys = NoKeys()
        self.sink = Sink()
        self.now_s = 0.0
        self.pauses: list[float] = []
        self.log.append(drafts(range(600)))
        self.log.publish(sign)
        (self.directory / "log.vkey").write_text(f"{KEY.verifier()}\n")
        receiver = syslog.Receiver("h", 1, "h", Path(), Path(), Path())
        self.shipper = Shipper(
            Destination("to", receiver, max_message_bytes, "host"),
            self.directory,
            self.cursor,
            size=self._size,
            keys=self.keys,
            connect=self._connect,
            monotonic=lambda: self.now_s,
            pause=self._pause,
        )

    async def ship(self) -> list[str]:
        with pytest.raises(_Done):
            await self.shipper.run()
        return self.sink.lines()

    async def _size(self) -> int:
        return self.log.size

    async def _connect(self, receiver: syslog.Receiver) -> Sink:
        return self.sink

    async def _pause(self, seconds: float) -> None:
        if seconds:
            self.pauses.append(seconds)
            self.sink.after = 10**9


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda kind: kind.action)
@pytest.mark.parametrize("outcome", Outcome)
def test_every_class_fits_the_schema_whatever_it_holds(kind: EventClass, outcome: Outcome, tmp_path: Path) -> None:
    event = Event(
        kind, Actor("principal", NASTY, NASTY), outcome, tenant_id=NASTY, source=NASTY, target=(NASTY, NASTY),
        reason=NASTY, request_id=NASTY, session_id=NASTY, counts={"duration_ms": 1.5, "count": 3}, details={"n": NASTY},
    )  # fmt: skip
    log = open_log(tmp_path)
    log.append([_draft(event), _draft(Event(kind, SYSTEM, outcome)), _draft(Event(kind, Actor("user", "1"), outcome))])
    reader = LogReader(tmp_path)
    for sequence in range(3):
        frame = reader.frame(sequence)
        opened = ocsf.Disclosed.of(frame.entry, *_opened(frame.entry, frame.sealed))
        for disclosed in (opened, ocsf.Disclosed.without(frame.entry, ocsf.Withheld.SHREDDED)):
            made = ocsf.entry_event(ORIGIN, disclosed)
            _validate(made)
            line = ocsf.line_of(made)
            assert re.fullmatch(rb"[ -~]+", line)
            assert ocsf.read_event(json.loads(line)) == disclosed
    log.close()


def _opened(entry: bytes, sealed: bytes) -> tuple[dict[str, Any], bytes]:
    from appliance.audit.entry import open_record

    opened = open_record(Entry.unpack(entry), sealed, Keys())
    return opened.record, opened.salt


def test_checkpoints_and_tests_fit_the_schema() -> None:
    _validate(ocsf.checkpoint_event(ORIGIN, ocsf.CheckpointEvent("note", 3, 5, (b"p" * 32, b"q" * 32)), 1))
    _validate(ocsf.trial_event(ORIGIN, 1))


def test_a_message_is_rfc_5424_whatever_names_hold() -> None:
    made = syslog.message(b"{}", wall_ms=1_700_000_000_123, severity_id=3, host=NASTY, kind="")
    head = made.decode("ascii").split(" ")
    assert head[:2] == ["<108>1", "2023-11-14T22:13:20.123Z"]
    assert (len(head), head[3:]) == (8, ["holdfast", "-", "-", "-", "{}"])
    assert syslog.frame(b"abc") == b"3 abc"


@pytest.mark.anyio
async def test_what_is_shipped_verifies_at_the_receiver(tmp_path: Path) -> None:
    world = World(tmp_path)
    lines = await world.ship()
    found = verify_export(lines, KEY.verifier())
    assert (found.first, found.end, found.proved_to, found.repeated, found.withheld) == (0, 600, 600, 0, 0)
    world.log.append(drafts(range(600, 900)))
    world.log.publish(sign)
    later = (await world.ship())[len(lines) :]
    assert verify_export(later, KEY.verifier()).repeated == 0 or verify_export(later, KEY.verifier()).first == 0


@pytest.mark.anyio
async def test_what_was_changed_on_the_way_is_found(tmp_path: Path) -> None:
    lines = await World(tmp_path).ship()
    key = KEY.verifier()
    dropped = lines[:41] + lines[42:]
    with pytest.raises(ExportDiffers, match="entry 41 is missing"):
        verify_export(dropped, key)
    with pytest.raises(ExportDiffers, match="is missing"):
        verify_export(lines[:598] + lines[600:], key)  # the last two, and the checkpoint is there
    for old, new in (('"Success"', '"Failure"'), ("req_41", "req_42"), ('"ten_1"', '"ten_0"'), ("{", '{"added":1,')):
        altered = [*lines[:41], lines[41].replace(old, new, 1), *lines[42:]]
        with pytest.raises(ExportDiffers, match=r"line 42 \(entry 41\)"):
            verify_export(altered, key)
    foreign = open_log(tmp_path / "foreign")
    foreign.append(drafts(range(1000, 1600)))
    frame = LogReader(tmp_path / "foreign").frame(41)
    made = ocsf.entry_event(ORIGIN, ocsf.Disclosed.of(frame.entry, *_opened(frame.entry, frame.sealed)))
    exchanged = [*lines[:41], ocsf.line_of(made).decode(), *lines[42:]]
    with pytest.raises(ExportDiffers, match="is not the log's"):
        verify_export(exchanged, key)
    with pytest.raises(ExportDiffers, match="came twice"):
        verify_export([*exchanged, lines[41]], key)
    assert verify_export([*lines, lines[41]], key).repeated == 1
    with pytest.raises(ExportDiffers, match="nothing proves"):
        verify_export(lines[:-1], key)
    with pytest.raises(ExportDiffers, match="does not hold"):
        verify_export([*lines, "Nov 24 somebody: hello"], key)
    foreign.close()


@pytest.mark.anyio
async def test_a_shredded_record_and_a_long_one_go_without_content(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.keys.shredded.add(world.keys.audit_key_id("ten_1"))
    found = verify_export(await world.ship(), KEY.verifier())
    assert (found.end, found.withheld, found.withheld_named[1]) == (600, 300, "shredded")
    short = World(tmp_path / "short", max_message_bytes=1200)
    assert verify_export(await short.ship(), KEY.verifier()).withheld == 600


@pytest.mark.anyio
async def test_after_a_lost_connection_what_is_not_settled_is_sent_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sink.after = 300
    lines = await world.ship()
    found = verify_export(lines, KEY.verifier())
    assert (found.end, found.proved_to) == (600, 600)
    assert found.repeated == len(lines) - 601 > 0
    assert 0.5 <= world.pauses[0] <= 1.0
    assert not world.cursor.exists()


def test_pauses_grow_and_are_bounded(tmp_path: Path) -> None:
    shipper = World(tmp_path).shipper
    pauses = []
    for _ in range(40):
        shipper._failed(HoldfastError("x", cause="y", remedy="z"), 0.0)
        pauses.append(shipper._pause_s())
    assert pauses[0] <= 1.0
    assert min(pauses[10:]) >= 30.0
    assert max(pauses) <= 60.0


def test_a_cursor_is_whole_or_the_one_before(tmp_path: Path) -> None:
    cursor = Cursor(tmp_path / "siem" / "a.cursor", "o")
    assert cursor.load() == Position()
    cursor.save(Position(5, 3))
    (tmp_path / "siem" / "a.cursor.new").write_bytes(b'{"next": 9')  # a process that ended while it wrote
    assert cursor.load() == Position(5, 3)
    assert Cursor(tmp_path / "siem" / "a.cursor", "another").load() == Position()
    (tmp_path / "siem" / "a.cursor").write_bytes(b'{"next": 9')
    assert cursor.load() == Position()


def test_an_unknown_class_is_a_base_event(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append([_draft(Event(ENGINE_READY, SYSTEM))])
    entry = Entry.unpack(LogReader(tmp_path).frame(0).entry)._replace(event_class=65000)
    made = ocsf.entry_event(ORIGIN, ocsf.Disclosed.without(entry.pack(), ocsf.Withheld.DAMAGED))
    assert made["class_uid"] == 0
    _validate(made)
    log.close()
