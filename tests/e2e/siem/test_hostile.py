"""Hostile text in every field, in every format, into real receivers: each event is one message, and reads back whole.

Rule: the receivers are told to leave what comes as it is: what they would escape would hide a defect of ours. What they
take in is compared with what was sent, byte for byte; then they read it themselves, with the parsers that they have
(liblognorm's CEF, libfastjson and json-c, a split at LEEF's delimiter).
"""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from appliance.audit.entry import Draft, seal
from appliance.audit.events import (
    GATEWAY_STARTED,
    KEY_CREATED,
    PRINCIPAL_CREATED,
    TURN_ADMITTED,
    VAULT_REFUSED,
    Actor,
    Event,
    Outcome,
)
from appliance.audit.siem import leef, syslog
from appliance.audit.siem.destinations import FORMATS
from appliance.audit.siem.relp import RelpTls
from appliance.audit.siem.syslog import SyslogTls
from appliance.audit.siem.transport import Message, Transport
from tests.e2e.siem.receivers import receiver_at
from tests.e2e.siem.shipping import Shipped, until
from tests.rsyslog import Pki, Receiver, Rsyslog
from tests.syslog_ng import SyslogNg
from tests.unit.audit.making import Keys
from tests.unit.audit.siem_parsers import parse_cef, parse_leef

pytestmark = pytest.mark.anyio
HOSTILE: Final = (
    "a\n<34>1 2026-01-01T00:00:00Z evil su - - - root logged in",
    "a\r\n33 <34>1 - evil su - - - root logged in",
    "\n\r\n\r",
    "a\0b\0",
    "\0",
    "a|b||c\\|d",
    "a=b==c\\=d suser=root act=none",
    "\\",
    "\\\\|\\\\=\\n\\r\\\\n",
    "a^b^act=none\tc\td",
    "\x1b[31m\x1b]0;title\x07\x9b31m\x7f\b\b",
    "a\u2028b\u2029c\x85d\u202ee\u200bf\ufeff",
    '"},"actor":{"user":{"uid":"root"}},"x":{"y":"',
    "CEF:0|Holdfast|Holdfast|1|a|b|1|act=none HoldfastAuditProof={}",
    'LEEF:2.0|Holdfast|Holdfast|1|a|^|act=none {"unmapped":{"holdfast":{}}} {"ecs":{"version":"8"}}',
    "%msg% ${MSG} $(echo) `id` $!all-json {{7*7}} '; DROP TABLE events; --",
    " lead and trail ",
    "@cee: {} BOM\ufeff",
    "\ud800 alone \udfff",
    "\U0001f600" * 100,
    "x" * 1500,  # longer than any field may be
    "x" * 4400,  # so long that the record has to stay away
)
KINDS: Final = (GATEWAY_STARTED, KEY_CREATED, PRINCIPAL_CREATED, TURN_ADMITTED, VAULT_REFUSED)  # a class of OCSF each
_LONGEST: Final = 65_536
_RSYSLOG = """
global(workDirectory="{folder}" maxMessageSize="64k"
       parser.escapeControlCharactersOnReceive="off" parser.dropTrailingLFOnReception="off"
       defaultNetstreamDriver="ossl" defaultNetstreamDriverCAFile="{pki}/ca.pem"
       defaultNetstreamDriverCertFile="{pki}/server.pem" defaultNetstreamDriverKeyFile="{pki}/server.key")
module(load="imtcp" streamDriver.name="ossl" streamDriver.mode="1" streamDriver.authMode="x509/name"
       permittedPeer=["client"])
module(load="imrelp" tls.tlslib="openssl")
module(load="mmnormalize")
module(load="mmjsonparse")
module(load="mmfields")
template(name="raw" type="string" string="%rawmsg%\\n")
template(name="parsed" type="string" string="%$!all-json%\\n")
{input}
action(type="omfile" file="{folder}/received" template="raw" asyncWriting="off" flushOnTXEnd="on")
action({parser})
action(type="omfile" file="{folder}/parsed" template="parsed" asyncWriting="off" flushOnTXEnd="on")
"""
_RSYSLOG_INPUTS = {
    "tls": 'input(type="imtcp" address="127.0.0.1" port="{port}")',
    "relp": 'input(type="imrelp" address="127.0.0.1" port="{port}" tls="on" tls.authMode="name" '
    'tls.permittedPeer=["client"] tls.caCert="{pki}/ca.pem" tls.myCert="{pki}/server.pem" '
    'tls.myPrivKey="{pki}/server.key")',
}
_RSYSLOG_PARSERS = {
    "cef": 'type="mmnormalize" rulebase="{folder}/rulebase"',
    "leef": 'type="mmfields" separator="^"',
    "ocsf": 'type="mmjsonparse" cookie=""',
    "ecs": 'type="mmjsonparse" cookie=""',
}
_SYSLOG_NG = """@version: 3.35
options {{ log-msg-size(65536); stats-freq(0); }};
source network_tls {{
  syslog(ip("127.0.0.1") port({port}) transport("tls") flags(store-raw-message) tls(
    key-file("{pki}/server.key") cert-file("{pki}/server.pem") ca-file("{pki}/ca.pem") peer-verify(required-trusted)));
}};
destination raw {{ file("{folder}/received" template("${{RAWMSG}}\\n")); }};
parser own {{ {parser} }};
destination parsed {{ file("{folder}/parsed" template("$(format-json --key p.*)\\n")); }};
log {{ source(network_tls); destination(raw); parser(own); destination(parsed); flags(flow-control); }};
"""
_COLUMNS = ",".join(f'"p.f{number}"' for number in range(1, 40))
_SYSLOG_NG_PARSERS = {  # it has none for CEF
    "leef": f"csv-parser(columns({_COLUMNS}) delimiters(chars(\"^\")) quote-pairs('') flags(greedy));",
    "ocsf": 'json-parser(prefix("p."));',
    "ecs": 'json-parser(prefix("p."));',
}


class Put(NamedTuple):
    """What was put into the fields of an entry; `exact`: as it is, and not as `Event.record` leaves it."""

    text: str
    exact: bool


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


def _rsyslog(folder: Path, pki: Pki, form: str, transport: str) -> Receiver:
    made = Rsyslog(folder, pki)
    (folder / "rulebase").write_text("version=2\nrule=:%.:cef%\n")
    names = {"folder": folder, "pki": pki.folder, "port": made.port}
    config = _RSYSLOG.format(
        **names, input=_RSYSLOG_INPUTS[transport].format(**names), parser=_RSYSLOG_PARSERS[form].format(**names)
    )
    (folder / "rsyslog.conf").write_text(config)
    return made


def _syslog_ng(folder: Path, pki: Pki, form: str, transport: str) -> Receiver:
    made = SyslogNg(folder, pki)
    parser = _SYSLOG_NG_PARSERS.get(form, "")
    config = _SYSLOG_NG.format(folder=folder, pki=pki.folder, port=made.port, parser=parser)
    (folder / "syslog-ng.conf").write_text(config if parser else config.replace("parser(own);", ""))
    return made


def _drafts() -> Iterator[tuple[Put, Draft]]:
    """Every hostile text in every class, as an event of ours holds it, and in a record that nobody has cleaned."""
    for text in HOSTILE:
        for kind in KINDS:
            event = Event(
                kind, Actor(text, text, text), Outcome.REFUSED, tenant_id=text, source=text, target=(text, text),
                reason=text, request_id=text, session_id=text,
                counts=dict.fromkeys(kind.counts, 3), details={next(iter(kind.details)): text},
            )  # fmt: skip
            raw = {
                "action": text, "outcome": text, "actor": {"kind": text, "id": text, "role": text},
                "versions": {"holdfast": text}, "target": {"kind": text, "id": text}, "counts": {"count": 3},
                "details": {"name": text}, "tenant_id": text, "source": text, "reason": text, "request_id": text,
                "session_id": text,
            }  # fmt: skip
            for put, record in (
                (Put(text, exact=False), event.record({"holdfast": "0"})),
                (Put(text, exact=True), json.dumps(raw, sort_keys=True, separators=(",", ":")).encode()),
            ):
                random = hashlib.sha256(f"{kind.number} {put}".encode(errors="surrogatepass")).digest()
                yield put, seal(kind.number, record, keys=Keys(), scope="s", actor="", session="", random=random)


@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize(
    ("make", "transport"),
    [(_rsyslog, "tls"), (_rsyslog, "relp"), (_syslog_ng, "tls")],
    ids=["rsyslog", "rsyslog-relp", "syslog-ng"],
)
async def test_hostile_text_ends_no_message_and_no_field(
    make: Callable[[Path, Pki, str, str], Receiver],
    transport: str,
    form: str,
    tmp_path: Path,
    pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[bytes] = []

    def noting(message: Message, hostname: str) -> bytes:
        sent.append(line(message, hostname))
        return sent[-1]

    line = syslog.line
    for module in ("syslog", "relp"):
        monkeypatch.setattr(f"appliance.audit.siem.{module}.line", noting)
    receiver = make(tmp_path / "receiver", pki, form, transport)
    await asyncio.to_thread(receiver.start)
    try:
        to = receiver_at(receiver.port, pki, client="client")
        made: Transport = (SyslogTls if transport == "tls" else RelpTls)(
            to, hostname="node", max_message_bytes=_LONGEST
        )
        shipped = Shipped(tmp_path, made, form=FORMATS[form], entries=1)
        puts, drafts = zip(*_drafts(), strict=True)
        shipped.log.append(drafts)
        async with shipped.running() as shipper:
            await until(lambda: shipper.view().sent == len(drafts) + 1)
            read_by_itself = form != "cef" or make is _rsyslog
            for name in ("received", "parsed")[: 1 + read_by_itself]:
                await until(lambda name=name: _lines(receiver.folder / name)[len(sent) :] == [b""])  # type: ignore[misc]
    finally:
        await asyncio.to_thread(receiver.stop)
    assert shipped.errors == []
    assert _lines(receiver.folder / "received") == [*sent, b""], "each is one message, byte for byte"
    payloads = [each.split(b" ", 7)[7].decode() for each in sent]
    assert not any(re.search("[\0-\x1f\x7f-\x9f\u2028\u2029\u202e\ud800-\udfff]", each) for each in payloads)
    of_entries = [(at, each) for at, each in enumerate(payloads) if "audit.checkpoint" not in each][1:]
    assert len(of_entries) == len(puts)
    theirs = [json.loads(each or b"{}") for each in _lines(receiver.folder / "parsed")]
    for put, (at, payload) in zip(puts, of_entries, strict=True):
        _check_read(form, payload, put)
        if read_by_itself:
            _check_same(form, payload, theirs[at])


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n") if path.exists() else []


def _only(details: dict[str, str]) -> str:
    (text,) = details.values()
    return text


def _check_read(form: str, payload: str, put: Put) -> None:
    """That a reader who knows the specification alone finds the text in the fields that it was put into."""
    carried = FORMATS[form].read(payload).content
    assert carried is not None
    if len(put.text) == 4400 and put.exact:
        assert getattr(carried, "withheld", None) == "too long"
        return
    names: tuple[str, ...]
    if form == "cef":
        fields = parse_cef(payload).extension
        names = ("reason", "suid", "spriv", "duid", "cs1", "cs2", "cs3", "cs4")
    elif form == "leef":
        fields = parse_leef(payload).attributes
        names = ("reason", "usrName", "accountName", "role", "requestId", "sessionId")
    elif form == "ecs":
        event = json.loads(payload)
        fields = {
            "reason": event["event"]["reason"], "user": event["user"]["id"], "tenant": event["organization"]["id"],
            "request": event["http"]["request"]["id"], "source": event["source"]["address"],
            "session": event["holdfast"]["session_id"], "detail": _only(event["holdfast"]["details"]),
        }  # fmt: skip
        names = tuple(fields)
    else:
        event = json.loads(payload)
        fields = {
            "reason": event["status_detail"], "tenant": event["metadata"]["tenant_uid"],
            "request": event["metadata"]["correlation_uid"], "detail": _only(event["unmapped"]["details"]),
        }  # fmt: skip
        names = tuple(fields)
    for name in names:
        assert _begins_like(fields[name], put), (name, fields[name], put)


def _begins_like(value: str, put: Put) -> bool:
    """Whether a value is the text, with marks for what is not to be seen, up to where it was cut."""
    meant = put.text
    if not put.exact:  # what `Event.record` makes of it
        meant = re.sub("[\0-\x1f\x7f-\x9f]", "\ufffd", meant[:256]).encode("utf-8", "replace").decode()
    seen = re.sub(r"<U\+([0-9A-F]{4,6})>", lambda found: chr(int(found[1], 16)), value)
    if seen.endswith("\u2026"):
        return len(value) >= 255 and meant.startswith(re.sub(r"<U[^>]*$", "", seen[:-1]))
    return seen == meant


def _check_same(form: str, payload: str, theirs: dict[str, Any]) -> None:
    """That a receiver's own parser reads what the specification's reader does."""
    if form == "cef":
        ours = parse_cef(payload)
        names = ("DeviceVendor", "DeviceProduct", "DeviceVersion", "SignatureID", "Name", "Severity")
        assert [theirs[name] for name in names] == ours.header[1:]
        extension = dict(theirs["Extensions"])
        extension["rt"] = extension.pop("t")  # liblognorm takes the first letter for a space
        assert extension == ours.extension
    elif form == "leef":
        fields = theirs.get("p", theirs)
        found = [fields[f"f{number}"] for number in range(1, 40) if fields.get(f"f{number}")]
        assert found == [*payload.split(leef.DELIMITER)]
        assert [each.partition("=")[0] for each in found[2:]] == [*parse_leef(payload).attributes][1:]
    else:
        _check_leaves(json.loads(payload), theirs.get("p", theirs))


def _check_leaves(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """syslog-ng has texts alone, and lists in a way of its own."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, dict):
            _check_leaves(value, theirs[name])
        elif not isinstance(value, list) or isinstance(theirs[name], list):
            assert str(value) == str(theirs[name]), name
