"""Events fit OCSF 1.8.0, are one line each, and show at the receiver what was changed on the way."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from appliance.audit.entry import Draft, Entry, open_record, seal
from appliance.audit.events import CATALOGUE, ENGINE_READY, SYSTEM, Actor, Event, EventClass, Outcome
from appliance.audit.reading import LogReader
from appliance.audit.siem import ocsf, syslog
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.excerpt import ExcerptEmpty, excerpt
from appliance.audit.siem.formats import CheckpointEvent, Disclosed, Withheld
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.shipper import MOST_UNACKNOWLEDGED, Shipper
from appliance.audit.siem.transport import ExportUnreachable, Message
from appliance.audit.siem.verify_export import ExportDiffers, verify_export
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing
from tests.unit.audit.making import KEY, ORIGIN, Keys, drafts, open_log, sign
from tests.unit.audit.test_retention import Days, Node

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
    """A transport whose receiver keeps what it is sent, and ends the connection when it is told."""

    messages_at_once = 64

    def __init__(self, max_payload_bytes: int) -> None:
        self.max_payload_bytes = max_payload_bytes
        self.messages: list[Message] = []
        self.after = 10**9
        self.acknowledged: int | None = None
        self.most = 0  # that were sent and not acknowledged
        self.looks = 0

    async def connect(self) -> "Sink":
        if self.acknowledged is not None:
            self.acknowledged = 0
        self.looks = 0
        return self

    async def send(self, messages: Sequence[Message]) -> None:
        self.check()
        assert len(messages) <= self.messages_at_once
        self.messages += messages
        if self.acknowledged is not None:
            self.most = max(self.most, len(self.messages) - self.acknowledged)

    def check(self) -> None:
        if len(self.messages) >= self.after:
            raise ExportUnreachable("h takes nothing", cause="it is gone", remedy="")

    async def ended_within(self, seconds: float) -> bool:
        if self.acknowledged is not None and self.looks < 3:
            self.looks += 1
            self.acknowledged = len(self.messages)
            return False
        raise _Done

    async def close(self, *, in_good_order: bool = False) -> None:
        return

    def lines(self) -> list[str]:
        return [message.payload.decode("ascii") for message in self.messages]


class _Done(BaseException):
    """The shipper has nothing more to send."""


class World:
    """A log of 600 entries, a destination, and clocks that are set by hand."""

    def __init__(self, folder: Path, *, max_payload_bytes: int = 8000) -> None:
        self.directory, self.cursor = folder / "audit", folder / "siem" / "to.cursor"
        self.log = open_log(self.directory)
        self.keys = NoKeys()
        self.sink = Sink(max_payload_bytes)
        self.now_s = 0.0
        self.pauses: list[float] = []
        self.sealed = False
        self.log.append(drafts(range(600)))
        self.log.publish(sign)
        (self.directory / "log.vkey").write_text(f"{KEY.verifier()}\n")
        self.shipper = self.new_shipper()

    def new_shipper(self) -> Shipper:
        return Shipper(
            "to",
            Ocsf(),
            self.sink,
            self.directory,
            self.cursor,
            size=self._size,
            opener=KeyOpener(self.keys),
            monotonic=lambda: self.now_s,
            pause=self._pause,
        )

    async def ship(self) -> list[str]:
        with pytest.raises(_Done):
            await self.shipper.run()
        return self.sink.lines()

    async def _size(self) -> int:
        return self.log.size

    async def _pause(self, seconds: float) -> None:
        if seconds > 0.1:
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
        opened = Disclosed.of(frame.entry, *_opened(frame.entry, frame.sealed))
        for disclosed in (opened, Disclosed.without(frame.entry, Withheld.SHREDDED)):
            made = ocsf.entry_event(ORIGIN, disclosed)
            _validate(made)
            line = ocsf.line_of(made)
            assert re.fullmatch(rb"[ -~]+", line)
            assert ocsf.read_event(json.loads(line)) == disclosed
    log.close()


def _opened(entry: bytes, sealed: bytes) -> tuple[dict[str, Any], bytes]:
    opened = open_record(Entry.unpack(entry), sealed, Keys())
    return opened.record, opened.salt


def test_checkpoints_and_tests_fit_the_schema() -> None:
    _validate(ocsf.checkpoint_event(ORIGIN, CheckpointEvent("note", 3, 5, (b"p" * 32, b"q" * 32)), 1))
    _validate(ocsf.trial_event(ORIGIN, 1))


def test_a_message_is_rfc_5424_in_a_frame_of_rfc_5425_whatever_names_hold() -> None:
    made = syslog.framed(Message(b"{}", 1_700_000_000_123, 3, "", "id"), syslog.header_field(NASTY, 255))
    length, _, rest = made.partition(b" ")
    assert int(length) == len(rest)
    head = rest.decode("ascii").split(" ")
    assert head[:2] == ["<108>1", "2023-11-14T22:13:20.123Z"]
    assert (len(head), head[3:]) == (8, ["holdfast", "-", "-", "-", "{}"])


def test_the_longest_payload_and_the_longest_header_are_one_message() -> None:
    receiver = syslog.Receiver("h", 1, "h", Path(), Path(), Path())
    transport = syslog.SyslogTls(receiver, hostname="n" * 300, max_message_bytes=8000)
    payload = b"x" * transport.max_payload_bytes
    made = syslog.framed(Message(payload, 253402300799_000, 1, "k" * 99, ""), transport._hostname)
    assert len(made.partition(b" ")[2]) <= 8000


@pytest.mark.anyio
async def test_what_is_shipped_verifies_at_the_receiver(tmp_path: Path) -> None:
    world = World(tmp_path)
    lines = await world.ship()
    found = verify_export(lines, KEY.verifier())
    assert (found.first, found.end, found.proved_to, found.repeated, found.withheld) == (0, 600, 600, 0, 0)
    world.log.append(drafts(range(600, 900)))
    world.log.publish(sign)
    later = (await world.ship())[len(lines) :]
    found = verify_export(later, KEY.verifier())
    assert (found.first, found.end, found.proved_to) == (0, 900, 900)  # nothing had settled: all of it comes again


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
    made = ocsf.entry_event(ORIGIN, Disclosed.of(frame.entry, *_opened(frame.entry, frame.sealed)))
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
    short = World(tmp_path / "short", max_payload_bytes=1500)
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


@pytest.mark.anyio
async def test_what_is_acknowledged_is_delivered_at_once_and_not_sent_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sink.acknowledged = 0
    lines = await world.ship()
    assert world.shipper.view().delivered == 600
    assert Cursor(world.cursor, ORIGIN).load() == Position(600, 600)
    world.log.append(drafts(range(600, 610)))
    world.shipper = world.new_shipper()
    later = (await world.ship())[len(lines) :]
    assert [json.loads(line)["metadata"]["sequence"] for line in later] == list(range(600, 610))


@pytest.mark.anyio
async def test_what_is_not_acknowledged_is_bounded(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.log.append(drafts(range(600, MOST_UNACKNOWLEDGED + 3000)))
    world.sink.acknowledged = 0
    await world.ship()
    assert world.sink.most <= MOST_UNACKNOWLEDGED + 1024
    assert world.shipper.view().delivered == MOST_UNACKNOWLEDGED + 3000


@pytest.mark.anyio
async def test_an_excerpt_proves_itself_whatever_part_it_is(tmp_path: Path) -> None:
    world = World(tmp_path)
    for first, end in ((0, 600), (0, 1), (599, 600), (17, 301), (256, 512)):
        pieces = [piece async for piece in excerpt(world.directory, Ocsf(), world.keys, first=first, end=end)]
        lines = b"".join(pieces).decode("ascii").splitlines()
        found = verify_export(lines, KEY.verifier())
        assert (found.first, found.end, found.proved_from, found.proved_to) == (first, end, first, end)
        with pytest.raises(ExportDiffers):
            verify_export([line for at, line in enumerate(lines) if at != (end - first) // 2], KEY.verifier())
    with pytest.raises(ExcerptEmpty):
        await anext(excerpt(world.directory, Ocsf(), world.keys, first=600))


async def test_a_destination_of_a_log_that_was_shortened_begins_with_what_is_kept(tmp_path: Path) -> None:
    node = Node(tmp_path / "audit", Days())
    node.live(120)
    removed = await node.retention.run()
    assert removed is not None
    (node.directory / "log.vkey").write_text(f"{KEY.verifier()}\n")
    sink = Sink(8000)

    async def size() -> int:
        return node.log.size

    async def pause(seconds: float) -> None:
        del seconds

    shipper = Shipper(
        "to", Ocsf(), sink, node.directory, tmp_path / "to.cursor", size=size, opener=KeyOpener(NoKeys()), pause=pause
    )
    with pytest.raises(_Done):
        await shipper.run()
    assert shipper.view().error is None
    found = verify_export(sink.lines(), KEY.verifier())
    assert (found.first, found.end) == (removed.kept_from, node.log.size)
    assert found.proved_from == removed.kept_from


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
    made = ocsf.entry_event(ORIGIN, Disclosed.without(entry.pack(), Withheld.DAMAGED))
    assert made["class_uid"] == 0
    _validate(made)
    log.close()
