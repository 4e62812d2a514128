"""Events fit OCSF 1.8.0, are one line each, and show at the receiver what was changed on the way."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner
from ocsf_json_schema import OcsfJsonSchemaEmbedded, get_ocsf_schema

from appliance.audit.entry import Draft, Entry, open_record, seal
from appliance.audit.events import CATALOGUE, ENGINE_READY, SYSTEM, TURN_ADMITTED, Actor, Event, EventClass, Outcome
from appliance.audit.reading import LogReader
from appliance.audit.siem import ocsf, syslog
from appliance.audit.siem.cursor import Cursor, Position
from appliance.audit.siem.destinations import FORMATS
from appliance.audit.siem.excerpt import ExcerptEmpty, excerpt
from appliance.audit.siem.formats import CheckpointEvent, Disclosed, Format, Withheld
from appliance.audit.siem.ocsf import Ocsf
from appliance.audit.siem.opening import KeyOpener
from appliance.audit.siem.shipper import MOST_UNACKNOWLEDGED, SETTLE_S, Shipper
from appliance.audit.siem.transport import ExportUnreachable, Message
from appliance.audit.siem.verify_export import ExportDiffers, verify_export
from appliance.audit.tree import leaf_hash
from appliance.cli import holdfast
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing
from tests.unit.audit.making import KEY, ORIGIN, Keys, drafts, open_log, sign
from tests.unit.audit.test_retention import Days, Node

NASTY = 'a\nb\0c|d=e\x1b[31m\x7f\u2028\u202e\ud800 <34>1 \U0001f600 "\\' + "x" * 400
_SCHEMA = OcsfJsonSchemaEmbedded(get_ocsf_schema("1.8.0"))


def _draft(event: Event) -> Draft:
    return _sealed(event.kind, event.record({"holdfast": "0"}))


def _sealed(kind: EventClass, record: dict[str, Any]) -> Draft:
    return seal(kind.number, record, keys=Keys(), scope="s", actor="", session="", random=b"r" * 32)


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
        self.only_arrived: int | None = None
        self.most = 0  # that were sent and not acknowledged
        self.looks = self.connections = 0

    async def connect(self) -> "Sink":
        self.connections += 1
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

    def arrived(self) -> int:
        return len(self.messages) if self.only_arrived is None else self.only_arrived

    async def ended_within(self, seconds: float) -> bool:
        if self.acknowledged is not None and self.looks < 3:
            self.looks += 1
            self.acknowledged = len(self.messages)
            return False
        raise _Done

    async def close(self, *, in_good_order: bool = False) -> None:
        return

    def lines(self) -> list[str]:
        return [message.payload.decode() for message in self.messages]


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
        self.wall_s: Callable[[], float] = time.time
        self.pauses: list[float] = []
        self.ends_with_an_error = False
        self.log.append(drafts(range(600)))
        self.log.publish(sign)
        (self.directory / "log.vkey").write_text(f"{KEY.verifier()}\n")
        self.shipper = self.new_shipper()

    def new_shipper(self, *, random: Random | None = None, form: Format | None = None) -> Shipper:
        return Shipper(
            "to",
            form or Ocsf(),
            self.sink,
            self.directory,
            self.cursor,
            size=self._size,
            opener=KeyOpener(self.keys),
            monotonic=lambda: self.now_s,
            wall_s=lambda: self.wall_s(),
            random=random,
            pause=self._pause,
        )

    async def ship(self) -> list[str]:
        with pytest.raises(_Done):
            await self.shipper.run()
        return self.sink.lines()

    async def _size(self) -> int:
        return self.log.size

    async def _pause(self, seconds: float) -> None:
        if self.ends_with_an_error and self.shipper.view().error is not None:
            raise _Done
        if seconds > 0.1:
            self.pauses.append(seconds)
            self.sink.after = 10**9


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda kind: kind.action)
@pytest.mark.parametrize("outcome", Outcome)
def test_every_class_fits_the_schema_whatever_it_holds(kind: EventClass, outcome: Outcome, tmp_path: Path) -> None:
    event = Event(
        kind, Actor("principal", NASTY, NASTY), outcome, tenant_id=NASTY, source=NASTY, target=(NASTY, NASTY),
        reason=NASTY, request_id=NASTY, session_id=NASTY,
        counts=dict.fromkeys(kind.counts, 1.5), details=dict.fromkeys(kind.details, NASTY),
    )  # fmt: skip
    whole = event.record({"holdfast": "0"})
    named = {"counts": {"duration_ms": 1.5, "count": 3, "n": 4}, "details": {"n": whole["reason"]}}
    of_another_version = _sealed(kind, whole | named)
    log = open_log(tmp_path)
    log.append([_draft(event), of_another_version])
    log.append([_draft(Event(kind, SYSTEM, outcome)), _draft(Event(kind, Actor("user", "1"), outcome))])
    reader = LogReader(tmp_path)
    for sequence in range(4):
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


def _stripped(line: str, why: Withheld = Withheld.SHREDDED) -> str:
    """What somebody on the way makes of an event to take its record out."""
    carried = ocsf.read_event(json.loads(line))
    assert isinstance(carried, Disclosed)
    return ocsf.line_of(ocsf.entry_event(ORIGIN, Disclosed.without(carried.packed, why))).decode()


@pytest.mark.anyio
@pytest.mark.parametrize(
    "record", [b"[]", b"{", b"\xff", b'{"actor":[]}', b'{"counts":{"duration_ms":"a"}}', b'{"details":1}']
)
@pytest.mark.parametrize("form", FORMATS.values(), ids=lambda each: each.name)
async def test_a_record_that_is_none_of_ours_holds_up_nothing_behind_it(
    form: Format, record: bytes, tmp_path: Path
) -> None:
    world = World(tmp_path)
    strange = seal(40, record, keys=Keys(), scope="s", actor="", session="", random=b"r" * 32)
    world.log.append([strange, *drafts(range(601, 611))])
    world.log.publish(sign)
    world.shipper = world.new_shipper(form=form)
    lines = await world.ship()
    assert world.shipper.view().error is None
    found = verify_export(lines, KEY.verifier())
    assert (found.end, found.proved_to) == (611, 611)
    assert found.withheld_named in ({}, {600: "damaged"})


@pytest.mark.anyio
async def test_a_record_that_was_taken_out_on_the_way_is_missed(tmp_path: Path) -> None:
    lines = await World(tmp_path).ship()
    found = verify_export([*lines[:7], _stripped(lines[7]), *lines[8:]], KEY.verifier())
    assert (found.withheld, found.withheld_named) == (1, {7: "shredded"})
    assert found.shortcomings() == ["1 entries came without their record"]
    assert found.shortcomings(allow_withheld=True) == []
    for order in ([lines[7], _stripped(lines[7])], [_stripped(lines[7]), lines[7]]):
        found = verify_export([*lines[:7], *order, *lines[8:]], KEY.verifier())
        assert (found.repeated, found.stripped, found.withheld, found.shortcomings()) == (1, 1, 0, [])
    both = [_stripped(lines[7]), _stripped(lines[7], Withheld.TOO_LONG)]
    assert verify_export([*lines[:7], *both, *lines[8:]], KEY.verifier()).withheld_named == {7: "shredded, too long"}


@pytest.mark.parametrize(("kind", "keys"), [(ENGINE_READY, Keys()), (TURN_ADMITTED, None)])
def test_what_was_under_no_tenants_key_is_never_shredded(kind: EventClass, keys: Keys | None, tmp_path: Path) -> None:
    record = Event(kind, SYSTEM, tenant_id="ten_1").record({"holdfast": "0"})
    log = open_log(tmp_path)
    log.append([seal(kind.number, record, keys=keys, scope="s", actor="", session="", random=b"r" * 32)])
    log.publish(sign)
    reader = LogReader(tmp_path)
    checkpoint = ocsf.checkpoint_event(ORIGIN, CheckpointEvent(reader.note, 0, 1, ()), 1)
    for why in (Withheld.DAMAGED, Withheld.SHREDDED):
        event = ocsf.entry_event(ORIGIN, Disclosed.without(reader.frame(0).entry, why))
        lines = [ocsf.line_of(each).decode() for each in (event, checkpoint)]
        if why is Withheld.DAMAGED:
            assert verify_export(lines, KEY.verifier()).withheld == 1
            continue
        with pytest.raises(ExportDiffers, match=r"entry 0.*does not hold") as refused:
            verify_export(lines, KEY.verifier())
        assert "was taken out" in refused.value.cause
    log.close()


async def _two_stretches(folder: Path) -> list[str]:
    """Entries 0 to 599 and their checkpoint, and 600 to 899 and theirs."""
    world = World(folder)
    world.sink.acknowledged = 0
    await world.ship()
    world.log.append(drafts(range(600, 900)))
    world.log.publish(sign)
    return await world.ship()


@pytest.mark.anyio
async def test_only_what_a_checkpoint_proves_is_said_to_be_proved(tmp_path: Path) -> None:
    lines, key = await _two_stretches(tmp_path), KEY.verifier()
    assert len(lines) == 902
    note = LogReader(tmp_path / "audit").note
    found = verify_export(lines, key, checkpoint=note, asked_from=0)
    assert (found.proved, found.checkpoints, found.unproved(), found.shortcomings()) == ([(0, 900)], 2, [], [])
    found = verify_export(lines[1:], key)
    assert (found.first, found.proved, found.unproved()) == (1, [(600, 900)], [(1, 600)])
    assert found.unusable == ["the checkpoint of entries 0 to 599 needs entry 0, which is not here"]
    assert found.shortcomings() == ["entries 1 to 599 are not proved"]
    assert verify_export(lines[1:], key, asked_from=600).shortcomings() == []
    assert verify_export(lines[1:], key, asked_from=599).shortcomings() == ["entries 599 to 599 are not proved"]
    for asked_from, some in ((0, lines[1:]), (900, lines)):
        with pytest.raises(ExportDiffers, match=f"entry {asked_from} is missing"):
            verify_export(some, key, asked_from=asked_from)
    with pytest.raises(ExportDiffers, match="nothing proves") as refused:
        verify_export(lines[1:601], key)
    assert "needs entry 0" in refused.value.cause
    tail = verify_export(lines[:-1], key)
    assert (tail.end, tail.proved, tail.shortcomings()) == (900, [(0, 600)], [])


@pytest.mark.anyio
async def test_a_given_checkpoint_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    lines, key = await _two_stretches(tmp_path), KEY.verifier()
    events = [json.loads(line)["unmapped"]["holdfast"] for line in lines]
    note = next(event["checkpoint"] for event in events if event.get("size") == 600)
    assert verify_export(lines[601:], key, checkpoint=note).shortcomings() == []  # its root follows from the peaks
    cut = [line for line, event in zip(lines, events, strict=True) if event.get("size") != 600][300:]
    assert verify_export(cut, key, checkpoint=note, asked_from=600).shortcomings() == []
    log = open_log(tmp_path / "short")
    log.append(drafts(range(10)))
    log.publish(sign)
    told = ["the given checkpoint of 10 entries needs entry 0, which is not here"]
    short = LogReader(tmp_path / "short").note
    assert verify_export(cut, key, checkpoint=short, asked_from=600).shortcomings() == told
    log.close()


@pytest.mark.anyio
async def test_excerpts_with_something_between_them_prove_only_themselves(tmp_path: Path) -> None:
    world, lines = World(tmp_path), list[str]()
    for first, end in ((0, 10), (10, 20), (20, 30)):
        pieces = [piece async for piece in excerpt(world.directory, Ocsf(), world.keys, first=first, end=end)]
        lines += b"".join(pieces).decode("ascii").splitlines()
    assert verify_export(lines, KEY.verifier()).proved == [(0, 30)]
    found = verify_export(lines[:21] + lines[22:], KEY.verifier())
    assert (found.proved, found.unproved()) == ([(0, 10), (20, 30)], [(10, 20)])
    assert found.shortcomings() == ["entries 10 to 19 are not proved"]


@pytest.mark.anyio
async def test_the_command_says_what_is_proved_and_fails_on_what_is_wanting(tmp_path: Path) -> None:
    lines = await _two_stretches(tmp_path)
    path = tmp_path / "arrived"

    def run(arrived: list[str], *words: str) -> tuple[int, str]:
        path.write_text("\n".join(arrived))
        command = ["audit", "verify-export", str(path), "--key", str(KEY.verifier()), *words]
        done = CliRunner().invoke(holdfast, command)
        return done.exit_code, done.output

    status, said = run(lines)
    assert (status, "entries 0 to 899 are proved, by 2 checkpoints" in said, "NOT" in said) == (0, True, False)
    status, said = run(lines[1:])
    assert status == 6
    assert "entries 600 to 899 are proved, by 1 checkpoints" in said
    assert "entries 1 to 599 came and are NOT PROVED\n" in said
    assert "the checkpoint of entries 0 to 599 needs entry 0, which is not here" in said
    status, said = run(lines[1:], "--from", "600")
    assert (status, "NOT PROVED, and were not asked for" in said) == (0, True)
    without = [*lines[:7], _stripped(lines[7]), *lines[8:]]
    status, said = run(without)
    assert (status, "what the sender claims: 7 (shredded)" in said) == (6, True)
    assert run(without, "--allow-withheld")[0] == 0
    status, said = run([*lines, _stripped(lines[7])])
    assert (status, "1 entries both with their record, which counts, and without it" in said) == (0, True)


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
async def test_what_a_slow_receiver_has_not_taken_in_counts_for_nothing_however_long_it_is_sent(tmp_path: Path) -> None:
    """It may lie in our own kernel: with the connection it is gone."""
    world = World(tmp_path)
    delivered = []
    looks = [(SETTLE_S + 1, 0), (SETTLE_S + 1, 600), (SETTLE_S + 1, 601), (SETTLE_S - 1, 601), (1, 601), (0, 601)]

    class Slow(Sink):
        async def ended_within(self, seconds: float) -> bool:
            delivered.append(world.shipper.view().delivered)
            if not looks:
                raise _Done
            passed_s, self.only_arrived = looks.pop(0)
            world.now_s += passed_s
            return False

    world.sink = Slow(8000)
    world.sink.only_arrived = 0
    world.shipper = world.new_shipper()
    await world.ship()
    assert delivered == [0, 0, 0, 0, 0, 600, 600]


@pytest.mark.anyio
async def test_an_error_is_told_until_the_receiver_takes_more_than_it_failed_with(tmp_path: Path) -> None:
    """One that stands still takes as much as the kernels hold, each time anew: it does not look well meanwhile."""
    world = World(tmp_path)
    takes = [256, 256, 10**9]
    told: list[list[bool]] = []

    class StandsStill(Sink):
        async def connect(self) -> Sink:
            self.only_arrived = 0
            told.append([])
            return await super().connect()

        async def send(self, messages: Sequence[Message]) -> None:
            told[-1].append(world.shipper.view().error is not None)
            self.only_arrived = (self.only_arrived or 0) + len(messages)
            if self.only_arrived > takes[self.connections - 1]:
                raise ExportUnreachable("h takes no events", cause="it took nothing for 20 s", remedy="")

    world.sink = StandsStill(8000)
    world.shipper = world.new_shipper()
    await world.ship()
    assert told == [[False] * 5, [True] * 5, [True] * 8 + [False] * 3]
    assert world.shipper.view().error is None
    last = world.shipper.view().last_error
    assert last is not None
    assert last["cause"] == "it took nothing for 20 s"
    assert world.shipper.view().last_error_s is not None


@pytest.mark.anyio
async def test_what_is_acknowledged_is_delivered_at_once_and_not_sent_again(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sink.acknowledged = 0
    lines = await world.ship()
    assert world.shipper.view().delivered == 600
    assert Cursor(world.cursor, ORIGIN).load()[:2] == (600, 600)
    world.log.append(drafts(range(600, 610)))
    world.shipper = world.new_shipper()
    later = (await world.ship())[len(lines) :]
    assert [json.loads(line)["metadata"]["sequence"] for line in later] == list(range(600, 610))


@pytest.mark.anyio
async def test_what_comes_while_nothing_is_looked_at_is_as_old_as_the_last_look_at_most(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sink.acknowledged = 0
    await world.ship()
    world.wall_s = lambda: 5e9
    await world.shipper._look()  # and no other one: the receiver stands still
    world.log.append(drafts(range(1)))
    world.wall_s = lambda: 5e9 + 20
    behind = world.shipper.view(world.log.size)
    assert (behind.lag_entries, behind.lag_s) == (1, 20)
    assert world.shipper.view().lag_s == 0, "there is nothing that it knows of"


async def test_what_was_sent_makes_nothing_that_comes_after_it_older(tmp_path: Path) -> None:
    class Still(Sink):
        async def send(self, messages: Sequence[Message]) -> None:
            if len(self.messages) >= 640:
                raise _Done
            await super().send(messages)

    world = World(tmp_path)
    for number in range(100):
        world.log.append(drafts(range(number, number + 1)))
    world.sink = Still(8000)
    world.shipper = world.new_shipper()
    await world.ship()
    read = LogReader(world.directory)
    world.wall_s = lambda: read.entry(639).wall_ns / 1e9 + 90
    behind = world.shipper.view()
    assert (behind.sent, behind.lag_entries) == (640, 60)
    assert read.entry(512).wall_ns < read.entry(639).wall_ns, "of those that were read together"
    assert behind.lag_s == pytest.approx(90)


async def test_while_the_appender_is_gone_the_lag_grows(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sink.acknowledged = 0
    await world.ship()
    world.wall_s = lambda: 5e9
    await world.shipper._look()

    async def gone() -> int:
        raise ExportUnreachable("the appender", cause="it is gone", remedy="")

    world.shipper._ask_size = gone
    world.wall_s = lambda: 5e9 + 60
    await world.shipper._look()
    assert world.shipper.view(world.log.size + 1).lag_s == 60


async def test_a_destination_that_was_never_reached_says_how_far_it_is_behind(tmp_path: Path) -> None:
    class Blackholed(Sink):
        async def connect(self) -> Sink:
            raise _Done

    world = World(tmp_path)
    world.sink = Blackholed(8000)
    world.shipper = world.new_shipper()
    await world.ship()
    oldest_s = LogReader(world.directory).entry(0).wall_ns / 1e9
    world.wall_s = lambda: oldest_s + 90
    behind = world.shipper.view()
    assert behind.lag_entries == 600
    assert behind.lag_s == pytest.approx(90)


async def test_a_cursor_that_cannot_be_saved_ends_no_connection_and_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    world.sink.acknowledged, world.now_s = 0, 10.0

    def full(cursor: Cursor, position: Position) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Cursor, "save", full)
        await world.ship()
    view = world.shipper.view()
    assert (world.sink.connections, len(world.sink.messages), view.delivered) == (1, 601, 600)
    assert view.error is not None
    assert view.error["code"] == "audit_export_cursor_unsaved"
    assert view.error["cause"] == f"{world.cursor}: No space left on device"
    world.now_s = 20.0
    await world.ship()
    assert world.shipper.view().error is None
    assert Cursor(world.cursor, ORIGIN).load().next == 600


def _put_back(world: World, folder: Path) -> None:
    """A copy of the log takes its place, as it does while nothing runs."""
    world.log.close()
    shutil.rmtree(world.directory)
    shutil.copytree(folder, world.directory)
    world.log = open_log(world.directory)
    world.shipper = world.new_shipper()


async def _cannot_be_sent(world: World) -> str:
    """Why nothing is sent."""
    sent, world.ends_with_an_error = len(world.sink.messages), True
    await world.ship()
    world.ends_with_an_error = False
    error = world.shipper.view().error
    assert error is not None
    assert (error["code"], len(world.sink.messages)) == ("audit_export_log_shorter", sent)
    assert not world.shipper.view().of_this_log
    return error["cause"]


@pytest.mark.anyio
@pytest.mark.parametrize("published", [False, True])
async def test_an_older_copy_of_the_log_is_not_sent_however_long_it_becomes(tmp_path: Path, published: bool) -> None:
    world = World(tmp_path)
    world.sink.acknowledged = 0
    older, newest = tmp_path / "older", tmp_path / "newest"
    shutil.copytree(world.directory, older)
    world.log.append(drafts(range(600, 900)))
    await world.ship()
    shutil.copytree(world.directory, newest)
    _put_back(world, older)
    assert await _cannot_be_sent(world) == "900 entries were sent, and the log has 600"
    world.log.append(drafts(range(1600, 1950)))
    if published:
        world.log.publish(sign)
    another = "entry 899 was sent, and the log has another one in its place"
    assert await _cannot_be_sent(world) == another  # the same process
    world.shipper = world.new_shipper()
    assert await _cannot_be_sent(world) == another
    _put_back(world, newest)
    world.log.append(drafts(range(900, 910)))
    later = (await world.ship())[901:]
    assert world.shipper.view().of_this_log
    assert [json.loads(line)["metadata"]["sequence"] for line in later] == list(range(900, 910))


@pytest.mark.anyio
async def test_an_older_copy_that_has_what_was_sent_is_gone_on_with(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.sink.acknowledged = 0
    await world.ship()
    shutil.copytree(world.directory, tmp_path / "older")
    world.log.append(drafts(range(600, 700)))
    _put_back(world, tmp_path / "older")
    world.log.append(drafts(range(1600, 1610)))
    assert len(await world.ship()) == 611
    assert world.shipper.view().error is None


@pytest.mark.anyio
async def test_a_cursor_that_names_no_entry_takes_the_logs(tmp_path: Path) -> None:
    """Such as `export add --from` makes."""
    world = World(tmp_path)
    world.sink.acknowledged = 0
    cursor = Cursor(world.cursor, ORIGIN)
    cursor.save(Position(600, 600))
    await world.ship()
    assert cursor.load() == Position(600, 600, leaf_hash(LogReader(world.directory).frame(599).entry).hex())
    cursor.save(Position(600, 600, "00"))
    world.shipper = world.new_shipper()
    assert "entry 599 was sent" in await _cannot_be_sent(world)


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


def test_a_pause_has_a_random_part_of_half_its_length(tmp_path: Path) -> None:
    """Those who lost one receiver do not all come at once."""

    class Drawn(Random):
        part = 0.0

        def random(self) -> float:
            return self.part

    drawn = Drawn()
    shipper = World(tmp_path).new_shipper(random=drawn)
    for _ in range(20):
        shipper._failed(HoldfastError("x", cause="y", remedy="z"), 0.0)
    pauses = []
    for part in (0.0, 0.5, 1.0):
        drawn.part = part
        pauses.append(shipper._pause_s())
    assert pauses == [30.0, 45.0, 60.0]
    drawing = World(tmp_path / "own").shipper
    assert len({drawing._pause_s() for _ in range(8)}) > 1, "it draws one of its own"


def test_a_cursor_is_whole_or_the_one_before(tmp_path: Path) -> None:
    cursor = Cursor(tmp_path / "siem" / "a.cursor", "o")
    assert cursor.load() == Position()
    cursor.save(Position(5, 3, "ab"))
    (tmp_path / "siem" / "a.cursor.new").write_bytes(b'{"next": 9')  # a process that ended while it wrote
    assert cursor.load() == Position(5, 3, "ab")
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
