"""CEF, LEEF and ECS: whatever a field holds, a reader that knows the specification alone gets back what was put in."""

import base64
import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.audit.entry import Entry, EntryInvalid, canonical, number, seal
from appliance.audit.events import (
    CATALOGUE,
    ENTRIES_MISSING,
    OLDER_COPY,
    SYSTEM,
    TURN_ADMITTED,
    Actor,
    Event,
    EventClass,
    Outcome,
)
from appliance.audit.reading import LogReader
from appliance.audit.siem import cef, ecs, leef
from appliance.audit.siem.destinations import FORMATS
from appliance.audit.siem.facts import PROOF_KEY, shown
from appliance.audit.siem.formats import Carried, CheckpointEvent, Disclosed, EventInvalid, Format, Withheld
from appliance.audit.siem.severity import Severity, severity_of
from appliance.audit.siem.verify_export import ExportDiffers, verify_export
from appliance.audit.tree import Frontier, leaf_hash
from appliance.errors import HoldfastError
from tests.unit.audit.making import BOOT, KEY, ORIGIN, Keys, drafts, event, open_log, sign
from tests.unit.audit.siem_parsers import parse_cef, parse_leef

NASTY = 'a\nb\r\0c|d=e^f\t\x1b[31m\x7f\x85\u2028\u202e\u200b <34>1 \U0001f600 "\\ suser=root CEF:0|x| {"unmapped":{}}'
OURS: tuple[Format, ...] = (cef.Cef(), leef.Leef(), ecs.Ecs())
TEXT = st.one_of(
    st.text(max_size=40),
    st.text(st.sampled_from('\\|=^ \t\n\r\0\x1b\x85\u2028\u202e"{}:,<>Uu+aé0'), max_size=40),
    st.sampled_from((NASTY, NASTY * 10, "x" * 5000, " lead", "trail ", "\\", "=", "|", "^", "a\\", "10.1.2.3", "::1")),
)

# The extension dictionary of CEF 0.1: what a field may hold, in characters; a number where it has to be one.
CEF_LENGTHS = {
    "act": 63, "cat": 1023, "deviceExternalId": 255, "duid": 1023, "externalId": 40, "flexString1": 1023,
    "flexString1Label": 128, "msg": 1023, "outcome": 63, "reason": 1023, "shost": 1023, "spriv": 1023, "suid": 1023,
    "suser": 1023, **{f"cs{one}": 4000 for one in range(1, 7)}, **{f"cs{one}Label": 1023 for one in range(1, 7)},
    "cn1Label": 1023, "c6a2Label": 1023,
}  # fmt: skip
CEF_NUMBERS = {"rt", "cnt", "cn1"}
# Predefined attributes of LEEF that have a bound, and those without one that are used here.
LEEF_LENGTHS = {"usrName": 255, "accountName": 255}
LEEF_PREDEFINED = {
    "devTime",
    "devTimeFormat",
    "sev",
    "cat",
    "src",
    "identSrc",
    "usrName",
    "accountName",
    "role",
    "resource",
}
# ECS: the types that each category expects.
ECS_TYPES = {
    "api": {"access", "admin", "allowed", "change", "creation", "deletion", "denied", "end", "info", "start", "user"},
    "authentication": {"start", "end", "info"},
    "iam": {"admin", "change", "creation", "deletion", "group", "info", "user"},
    "process": {"access", "change", "end", "info", "start"},
}


def disclosed_of(kind: int, record: dict[str, Any], *, wall_ns: int = 1_700_000_000_123_456_789) -> Disclosed:
    """An entry with a record that nobody has bounded or cleaned."""
    random = bytes(range(32))
    draft = seal(kind, {}, keys=Keys(), scope="s", actor="", session="", random=random)
    content = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    commitment = hashlib.sha256(b"\x02" + random[16:] + content).digest()
    draft = draft._replace(commitment=commitment)
    return Disclosed(number(draft, sequence=41, wall_ns=wall_ns, monotonic_ns=7, boot_id=BOOT), content, random[16:])


@st.composite
def records(draw: st.DrawFn) -> dict[str, Any]:
    """Records as nobody would make them."""
    number_ = st.one_of(st.integers(-(2**40), 2**40), st.floats(-1e9, 1e9))
    return {
        "action": draw(TEXT),
        "outcome": draw(st.one_of(st.sampled_from(("success", "failure", "refused")), TEXT)),
        "actor": {name: draw(TEXT) for name in ("kind", "id", "role")},
        "versions": {"holdfast": draw(TEXT)},
        **{name: draw(TEXT) for name in ("tenant_id", "source", "reason", "request_id", "session_id")},
        "target": {"kind": draw(TEXT), "id": draw(TEXT)},
        "counts": draw(st.dictionaries(st.sampled_from(("count", "duration_ms", "a=b|c^d")), number_)),
        "details": draw(st.dictionaries(TEXT, TEXT, max_size=3)),
    }


def back(value: str) -> str:
    """The text that `shown` was given, if that had no such mark in it."""
    return re.sub(r"<U\+([0-9A-F]{4,6})>", lambda found: chr(int(found[1], 16)), value)


def holds(value: str, put_in: str, limit: int) -> bool:
    """Whether a value is what was put in; one that was cut says so, and begins like it."""
    if value == put_in:
        return True
    if value.endswith("…") and len(value) == limit:
        return put_in.startswith(back(re.sub(r"<[^>]*$", "", value[:-1]))) or "<U+" in put_in
    return back(value) == back(put_in)


def sayable(text: str) -> str:
    """A text as JSON may say it to a receiver that takes a NUL for its end."""
    return text.replace("\0", "<U+0000>")


def is_one_line(payload: bytes) -> bool:
    """One line of what can be seen."""
    text = payload.decode()
    return len(text.splitlines()) == 1 and not any(
        unicodedata.category(each) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for each in text
    )


@settings(max_examples=150)
@given(records(), st.sampled_from(sorted(CATALOGUE)))
def test_cef_gives_back_what_was_put_in(record: dict[str, Any], kind: int) -> None:
    disclosed = disclosed_of(kind, record)
    made = cef.Cef().entry(ORIGIN, disclosed)
    assert is_one_line(made.payload)
    line = made.payload.decode()
    event = parse_cef(line)
    known = CATALOGUE[kind]
    assert event.header[:3] == ["CEF:0", "Holdfast", "Holdfast"]
    assert holds(event.header[3], record["versions"]["holdfast"] or "unknown", 31)
    assert event.header[4:6] == [known.action, known.meaning]
    assert 0 <= int(event.header[6]) <= 10
    put_in = {
        "act": known.action, "outcome": record["outcome"], "reason": record["reason"], "suid": record["actor"]["id"],
        "suser": record["actor"]["id"] or record["actor"]["kind"], "spriv": record["actor"]["role"],
        "cs1": record["tenant_id"], "cs2": record["session_id"], "cs3": record["request_id"],
        "duid": record["target"]["id"], "cs4": record["target"]["kind"], "externalId": "41",
        "deviceExternalId": ORIGIN, "flexString1": f"{ORIGIN}/41", "rt": "1700000000123",
    }  # fmt: skip
    for name, text in put_in.items():
        assert (name in event.extension) == bool(text), name
        assert not text or holds(event.extension[name], text, CEF_LENGTHS.get(name, 20)), name
    for name, value in event.extension.items():
        assert len(value) <= CEF_LENGTHS.get(name, 40) or name == PROOF_KEY, name
        assert name in CEF_LENGTHS or name in CEF_NUMBERS or name in ("src", "c6a2", PROOF_KEY), name
        assert name not in CEF_NUMBERS or re.fullmatch(r"-?\d+", value), name
    _check_proof(json.loads(event.extension[PROOF_KEY]), disclosed)
    assert cef.Cef().read(line[cef.Cef().find(line) :]) == Carried(ORIGIN, disclosed)


@settings(max_examples=150)
@given(records(), st.sampled_from(sorted(CATALOGUE)))
def test_leef_gives_back_what_was_put_in(record: dict[str, Any], kind: int) -> None:
    disclosed = disclosed_of(kind, record)
    made = leef.Leef().entry(ORIGIN, disclosed)
    assert is_one_line(made.payload)
    line = made.payload.decode()
    event = parse_leef(line)
    known = CATALOGUE[kind]
    assert event.header[:3] == ["LEEF:2.0", "Holdfast", "Holdfast"]
    assert holds(event.header[3], record["versions"]["holdfast"] or "unknown", 255)
    assert event.header[4] == known.action
    limits = {each.name: each.limit for each in leef.ATTRIBUTES}
    target = record["target"]
    put_in = {
        "cat": record["outcome"], "reason": record["reason"],
        "usrName": record["actor"]["id"] or record["actor"]["kind"],
        "accountName": record["tenant_id"], "role": record["actor"]["role"], "sessionId": record["session_id"],
        "requestId": record["request_id"], "logOrigin": ORIGIN, "logSequence": "41", "logEntry": f"{ORIGIN}/41",
        "resource": f"{target['kind']}/{target['id']}" if target["id"] else target["kind"], "msg": known.meaning,
        "devTime": "2023-11-14T22:13:20.123+0000", "devTimeFormat": "yyyy-MM-dd'T'HH:mm:ss.SSSZ",
    }  # fmt: skip
    for name, text in put_in.items():
        assert (name in event.attributes) == bool(text), name
        assert not text or holds(event.attributes[name], text, limits[name]), name
    assert set(event.attributes) <= set(limits) | {PROOF_KEY}
    assert 1 <= int(event.attributes["sev"]) <= 10
    assert all(len(event.attributes.get(name, "")) <= limit for name, limit in LEEF_LENGTHS.items())
    assert all(len(value) <= limits.get(name, 10**6) for name, value in event.attributes.items())
    _check_proof(json.loads(event.attributes[PROOF_KEY]), disclosed)
    assert leef.Leef().read(line[leef.Leef().find(line) :]) == Carried(ORIGIN, disclosed)


@settings(max_examples=150)
@given(records(), st.sampled_from(sorted(CATALOGUE)))
def test_ecs_gives_back_what_was_put_in(record: dict[str, Any], kind: int) -> None:
    disclosed = disclosed_of(kind, record)
    made = ecs.Ecs().entry(ORIGIN, disclosed)
    assert re.fullmatch(rb"[ -~]+", made.payload)
    event = json.loads(made.payload)
    assert event["ecs"]["version"].startswith("8.")
    assert event["@timestamp"] == "2023-11-14T22:13:20.123Z"
    assert event["event"]["action"] == CATALOGUE[kind].action
    assert event.get("organization", {}).get("id", "") == sayable(record["tenant_id"])
    assert event.get("user", {}).get("id", "") == sayable(record["actor"]["id"])
    assert event.get("http", {}).get("request", {}).get("id", "") == sayable(record["request_id"])
    assert event.get("source", {}).get("address", "") == sayable(record["source"])
    assert event["event"].get("reason", "") == sayable(record["reason"])
    put_in = {sayable(name): sayable(text) for name, text in record["details"].items()}
    assert event["holdfast"].get("details", {}) == put_in
    assert event["holdfast"].get("counts", {}) == record["counts"]
    _check_proof(event["holdfast"]["proof"], disclosed)
    assert ecs.Ecs().read(made.payload.decode()) == Carried(ORIGIN, disclosed)


def _check_proof(proof: dict[str, Any], disclosed: Disclosed) -> None:
    assert (proof["origin"], proof["sequence"]) == (ORIGIN, 41)
    assert proof["leaf_hash"] == leaf_hash(disclosed.packed).hex()
    assert proof["record"].encode() == disclosed.content


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
def test_what_would_end_a_text_at_a_receiver_is_in_none(format_: Format) -> None:
    """A NUL is the end of a text to libfastjson and json-c, and half of a pair has no UTF-8."""
    text = "before\0after\ud800"
    record = Event(TURN_ADMITTED, Actor("principal", "pri_1"), target=("model", "m")).record({}) | {
        "reason": text, "session_id": text, "details": {text: text}
    }  # fmt: skip
    disclosed = disclosed_of(TURN_ADMITTED.number, record)
    line = format_.entry(ORIGIN, disclosed).payload.decode()
    fields = line.replace('"' + json.dumps(disclosed.content and disclosed.content.decode())[1:-1] + '"', "")
    assert "before<U+0000>after<U+D800>" in fields
    assert not re.search(r"\0|(?<!\\)\\u0000|(?<!\\)\\ud800", fields)
    assert format_.read(line) == Carried(ORIGIN, disclosed)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
@settings(max_examples=100)
@given(data=st.data())
def test_an_event_that_was_altered_anywhere_is_refused(format_: Format, data: st.DataObject) -> None:
    disclosed = disclosed_of(40, data.draw(records()))
    line = format_.entry(ORIGIN, disclosed).payload.decode()
    at = data.draw(st.integers(0, len(line) - 1))
    put = data.draw(st.sampled_from([each for each in 'x0=|^\\ "{}' if each != line[at]]))
    altered = line[:at] + put + line[at + 1 :]
    if (begin := format_.find(altered)) < 0:
        return
    try:
        carried = format_.read(altered[begin:])
    except HoldfastError:
        return
    # JSON says the same in several ways; what it carries is what was sent then.
    assert altered[begin:].startswith("{")
    assert carried == Carried(ORIGIN, disclosed)


@pytest.mark.parametrize("other", [lambda number: f"{number}.0", lambda _: "true", lambda number: f'"{number}"'])
@pytest.mark.parametrize("format_", [FORMATS["ocsf"], FORMATS["ecs"]], ids=["ocsf", "ecs"])
def test_a_number_that_became_another_thing_of_the_same_worth_is_refused(
    format_: Format, other: Callable[[str], str]
) -> None:
    """To Python 1, 1.0 and true are one; a receiver may look for one of them."""
    line = format_.entry(ORIGIN, disclosed_of(TURN_ADMITTED.number, event().record({}))).payload.decode()
    format_.read(line)
    ones = [found.span(1) for found in re.finditer(r'":(1)[,}]', line)]
    assert ones
    for begin, end in ones:
        with pytest.raises(HoldfastError):
            format_.read(line[:begin] + other(line[begin:end]) + line[end:])


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda each: each.action)
def test_every_class_comes_through_every_format(format_: Format, kind: EventClass) -> None:
    for outcome in Outcome:
        event = Event(
            kind, Actor("principal", NASTY, NASTY), outcome, tenant_id=NASTY, source=NASTY, target=(NASTY, NASTY),
            reason=NASTY, request_id=NASTY, session_id=NASTY,
            counts=dict.fromkeys(kind.counts, 1.5), details=dict.fromkeys(kind.details, NASTY),
        )  # fmt: skip
        bare = Event(kind, SYSTEM, outcome)
        whole = event.record({"holdfast": "0.1"})
        of_another_version = whole | {"counts": {"duration_ms": 1.5, "n": 2}, "details": {"n": whole["reason"]}}
        for record in (whole, of_another_version, bare.record({})):
            disclosed = disclosed_of(kind.number, record)
            for each in (disclosed, *(Disclosed.without(disclosed.packed, why) for why in Withheld)):
                made = format_.entry(ORIGIN, each)
                line = f"<110>1 2023-11-14T22:13:20.123Z node holdfast - x - {made.payload.decode()}"
                assert format_.read(line[format_.find(line) :]) == Carried(ORIGIN, each)
                assert (made.kind, made.wall_ms, made.stable_id) == (kind.action, 1_700_000_000_123, f"{ORIGIN}/41")
                assert made.severity_id in list(Severity)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
def test_a_record_that_the_entry_does_not_commit_to_is_refused(format_: Format) -> None:
    disclosed = disclosed_of(40, Event(TURN_ADMITTED, Actor("principal", "pri_1")).record({}))
    other = Event(TURN_ADMITTED, Actor("principal", "pri_2")).record({})
    whole = format_.entry(ORIGIN, disclosed._replace(content=canonical(other)))
    with pytest.raises(EntryInvalid, match="commits to"):
        format_.read(whole.payload.decode())


def test_severity_is_the_same_in_every_format() -> None:
    for kind in CATALOGUE.values():
        for outcome in Outcome:
            disclosed = disclosed_of(kind.number, Event(kind, SYSTEM, outcome).record({}))
            assert len({known.entry(ORIGIN, disclosed).severity_id for known in FORMATS.values()}) == 1
    put_back = disclosed_of(OLDER_COPY.number, Event(OLDER_COPY, SYSTEM, Outcome.FAILURE).record({}))
    assert cef.Cef().entry(ORIGIN, put_back).severity_id == Severity.MEDIUM
    assert (
        severity_of(ENTRIES_MISSING.number, "failure") is severity_of(ENTRIES_MISSING.number, None) is Severity.MEDIUM
    )


@pytest.mark.parametrize("kind", CATALOGUE.values(), ids=lambda each: each.action)
@pytest.mark.parametrize("outcome", Outcome)
def test_categories_of_ecs_are_those_that_it_allows(kind: EventClass, outcome: Outcome) -> None:
    event = json.loads(
        ecs.Ecs().entry(ORIGIN, disclosed_of(kind.number, Event(kind, SYSTEM, outcome).record({}))).payload
    )
    assert event["event"]["kind"] == "event"
    assert event["event"]["outcome"] in ("success", "failure")
    [category] = event["event"]["category"]
    assert set(event["event"]["type"]) <= ECS_TYPES[category]
    assert ("denied" in event["event"]["type"]) == (outcome is Outcome.REFUSED and category == "api")


@pytest.mark.parametrize(
    ("source", "where", "text"),
    [
        ("10.1.2.3", ("src", "src", "ip"), "10.1.2.3"),
        ("2001:DB8::1", ("c6a2", "src", "ip"), "2001:db8::1"),
        ("fe80::1%eth0", ("c6a2", "src", "ip"), "fe80::1"),
        ("uid 1000", ("shost", "sourceName", "address"), "uid 1000"),
    ],
)
def test_an_address_is_where_the_format_has_addresses(source: str, where: tuple[str, str, str], text: str) -> None:
    event = Event(TURN_ADMITTED, Actor("principal", "pri_1"), source=source)
    disclosed = disclosed_of(40, event.record({}))
    in_cef = parse_cef(cef.Cef().entry(ORIGIN, disclosed).payload.decode()).extension
    in_leef = parse_leef(leef.Leef().entry(ORIGIN, disclosed).payload.decode()).attributes
    in_ecs = json.loads(ecs.Ecs().entry(ORIGIN, disclosed).payload)["source"]
    assert (in_cef[where[0]], in_leef[where[1]], in_ecs[where[2]]) == (text, text, text)
    assert sum(name in in_cef for name in ("src", "c6a2", "shost")) == 1
    assert sum(name in in_leef for name in ("src", "sourceName")) == 1


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
@pytest.mark.parametrize("wall_ns", [-(1 << 63), -1, 0, (1 << 63) - 1])
def test_a_clock_that_is_anywhere_is_written(format_: Format, wall_ns: int) -> None:
    disclosed = disclosed_of(40, Event(TURN_ADMITTED, SYSTEM).record({}), wall_ns=wall_ns)
    made = format_.entry(ORIGIN, disclosed)
    assert format_.read(made.payload.decode()) == Carried(ORIGIN, disclosed)


@pytest.mark.parametrize("format_", OURS, ids=lambda each: each.name)
def test_checkpoints_and_trials_come_through(format_: Format) -> None:
    checkpoint = CheckpointEvent(f"{ORIGIN}\n5\nabc=\n\n\u2014 x y^z\n", 3, 5, (b"p" * 32, b"q" * 32))
    made = format_.checkpoint(ORIGIN, checkpoint, 1_700_000_000_123)
    assert is_one_line(made.payload)
    assert made.stable_id == f"{ORIGIN}/checkpoint/3-5"
    assert format_.read(made.payload.decode()) == Carried(ORIGIN, checkpoint)
    excerpt = checkpoint._replace(end=4, rest=(b"r" * 32,))
    assert format_.read(format_.checkpoint(ORIGIN, excerpt, 1).payload.decode()) == Carried(ORIGIN, excerpt)
    trial = format_.trial(ORIGIN, 1_700_000_000_123)
    assert (trial.kind, trial.stable_id) == ("audit.export.test", f"{ORIGIN}/test/1700000000123")
    assert format_.read(trial.payload.decode()) == Carried(ORIGIN, None)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
@pytest.mark.parametrize(
    "proof",
    [
        "", "[" * 100_000, "null", "[]", '{"mapping":1}', '{"mapping":2,"origin":"o"}',
        '{"mapping":1,"origin":"o","test":1}', '{"mapping":1,"origin":"o","test":1,"time":1e999}',
        '{"mapping":1,"origin":"o","test":1,"time":99999999999999999999}',
        '{"mapping":1,"origin":"o","checkpoint":"c","start":0,"size":1,"peaks":5,"time":1}',
        '{"mapping":1,"origin":"o","entry":"AAAA","withheld":"shredded"}',
        '{"mapping":1,"mapping":1,"origin":"o","test":1}',
        '{"mapping":1,"origin":"\\ud800","test":1,"time":1}',
    ],
)  # fmt: skip
def test_a_forged_proof_is_refused_and_nothing_else(format_: Format, proof: str) -> None:
    lines = {
        "cef": f"CEF:0|Holdfast|Holdfast|1|a|b|1|act=a {PROOF_KEY}={proof}",
        "leef": f"LEEF:2.0|Holdfast|Holdfast|1|a|^|sev=1^{PROOF_KEY}={proof}",
        "ocsf": f'{{"time":1,"unmapped":{{"holdfast":{proof}}}}}',
        "ecs": f'{{"ecs":{{"version":"8.17.0"}},"holdfast":{{"proof":{proof}}}}}',
    }
    line = lines[format_.name]
    assert format_.find(line) == 0
    with pytest.raises(HoldfastError):
        format_.read(line)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
@pytest.mark.parametrize(
    "record", ['{"counts":{"duration_ms":1e999,"count":1e999}}', '{"actor":[],"target":5}', "[" * 10_000]
)
def test_a_forged_record_is_refused_or_read_and_nothing_else(format_: Format, record: str) -> None:
    """Who forges a record forges the entry that commits to it: what shows that is the log's tree."""
    disclosed = disclosed_of(40, {})
    random = disclosed.salt
    commitment = hashlib.sha256(b"\x02" + random + record.encode()).digest()
    packed = Entry.unpack(disclosed.packed)._replace(commitment=commitment).pack()
    genuine = format_.entry(ORIGIN, disclosed).payload.decode()
    for old, new in ((disclosed.packed, packed), (leaf_hash(disclosed.packed), leaf_hash(packed))):
        for write in (lambda data: base64.b64encode(data).decode(), bytes.hex):
            genuine = genuine.replace(write(old).replace("=", r"\=" if format_.name == "cef" else "="), write(new))
    text = json.dumps(record)[1:-1].replace("\\", r"\\" if format_.name == "cef" else "\\")
    forged = genuine.replace('"record":"{}"', f'"record":"{text}"')
    assert forged != genuine
    with contextlib.suppress(HoldfastError):
        assert isinstance(format_.read(forged).content, Disclosed)


def test_what_was_altered_is_named() -> None:
    event = Event(TURN_ADMITTED, Actor("principal", "pri_1", "client"), tenant_id="ten_1", source="10.1.2.3")
    disclosed = disclosed_of(40, event.record({"holdfast": "0.1"}))
    for format_, old, new, named in (
        (cef.Cef(), "suid=pri_1", "suid=pri_2", "suid"),
        (cef.Cef(), "|1|rt=", "|6|rt=", "its header"),
        (leef.Leef(), "|turn.admitted|", "|turn.completed|", "its header"),
        (leef.Leef(), "accountName=ten_1", "accountName=ten_2", "accountName"),
        (ecs.Ecs(), '"ip":"10.1.2.3"', '"ip":"10.1.2.4"', "source"),
    ):
        line = format_.entry(ORIGIN, disclosed).payload.decode()
        with pytest.raises(EventInvalid, match=named):
            format_.read(line.replace(old, new, 1))


def test_what_is_cut_says_so() -> None:
    assert shown("abc", 3) == "abc"
    assert shown("abcd", 3) == "ab…"
    assert shown("Zoë \u202e", 20) == "Zoë <U+202E>"


@pytest.mark.parametrize("format_", FORMATS.values(), ids=lambda each: each.name)
def test_an_export_in_any_format_is_proved(format_: Format, tmp_path: Path) -> None:
    log = open_log(tmp_path)
    log.append(drafts(range(60)))
    log.publish(sign)
    reader = LogReader(tmp_path)
    lines = [_line(format_, reader, sequence) for sequence in range(60)]
    peaks = Frontier.read(reader.hashes(), 0).peaks
    checkpoint = format_.checkpoint(ORIGIN, CheckpointEvent(reader.note, 0, 60, peaks), 1).payload.decode()
    found = verify_export([*lines, format_.trial(ORIGIN, 5).payload.decode(), checkpoint], KEY.verifier())
    assert (found.end, found.proved_to, found.tests) == (60, 60, 1)
    with pytest.raises(ExportDiffers, match="entry 41 is missing"):
        verify_export([*lines[:41], *lines[42:], checkpoint], KEY.verifier())
    with pytest.raises(ExportDiffers, match=r"line 42 \(entry 41\)"):
        verify_export([*lines[:41], lines[41].replace("req_41", "req_42", 1), *lines[42:], checkpoint], KEY.verifier())
    mixed = [_line(each, reader, at) for at, each in zip(range(60), [*FORMATS.values()] * 15, strict=True)]
    assert verify_export([*mixed, checkpoint], KEY.verifier()).proved_to == 60
    log.close()


def test_an_event_that_holds_the_beginning_of_another_is_read_as_what_it_is(tmp_path: Path) -> None:
    event = Event(
        TURN_ADMITTED, Actor("principal", 'CEF:0|Holdfast|Holdfast| {"unmapped":1} LEEF:2.0|Holdfast|Holdfast|')
    )
    log = open_log(tmp_path)
    record = event.record({})
    log.append([seal(40, record, keys=Keys(), scope="s", actor="", session="", random=b"r" * 32)])
    log.publish(sign)
    reader = LogReader(tmp_path)
    disclosed = Disclosed(reader.frame(0).entry, canonical(record), b"r" * 16)
    for format_ in FORMATS.values():
        checkpoint = format_.checkpoint(ORIGIN, CheckpointEvent(reader.note, 0, 1, ()), 1)
        lines = [format_.entry(ORIGIN, disclosed).payload.decode(), checkpoint.payload.decode()]
        assert verify_export(lines, KEY.verifier()).proved_to == 1
    log.close()


def _line(format_: Format, reader: LogReader, sequence: int) -> str:
    from appliance.audit.entry import open_record

    frame = reader.frame(sequence)
    opened = open_record(Entry.unpack(frame.entry), frame.sealed, Keys())
    return format_.entry(ORIGIN, Disclosed.of(frame.entry, opened.record, opened.salt)).payload.decode()
