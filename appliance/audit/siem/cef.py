"""An entry of the log as an event of CEF, ArcSight's Common Event Format, and back.

Rules:

- What `formats` asks of every format. The number of the mapping is `MAPPING`; the proof is in `HoldfastAuditProof`, the
  last field of the extension.
- `CEF:0`, which every receiver reads: addresses in `src` are IPv4, an IPv6 one is in `c6a2`.
- Fields are the dictionary's, no longer than it says. In the header `|` and `\\` are escaped, in the extension `=`,
  `\\` and the ends of lines; what else is not to be seen is written as `facts.shown` does.

Implementing ArcSight Common Event Format, versions 0.1 and 1.2: header, character encoding, extension dictionary.
"""

import functools
import ipaddress
import re
from collections.abc import Callable
from typing import Final, NamedTuple

from appliance.audit.siem.facts import (
    PRODUCT,
    PROOF_KEY,
    VENDOR,
    Facts,
    facts_of_checkpoint,
    facts_of_entry,
    facts_of_trial,
    made_again,
    object_text,
    proof_text,
    read_object,
    shown,
)
from appliance.audit.siem.formats import Carried, CheckpointEvent, Disclosed, invalid
from appliance.audit.siem.transport import Message

MAPPING: Final = 1
_BEGIN: Final = f"CEF:0|{VENDOR}|{PRODUCT}|"
_MAX_VERSION, _MAX_CLASS_ID, _MAX_NAME = 31, 1023, 512
_HEADER: Final = str.maketrans({"\\": r"\\", "|": r"\|"})
_EXTENSION: Final = str.maketrans({"\\": r"\\", "=": r"\=", "\n": r"\n", "\r": r"\r"})
_PLAIN: Final = re.compile(r"[ -<>-\[\]-~]*")  # printable ASCII, and nothing to escape
_ESCAPED: Final = re.compile(r"\\(.)")
_MEANT: Final = {"n": "\n", "r": "\r"}


class Field(NamedTuple):
    """A field of the extension.

    Attributes:
        limit: the longest text that the dictionary allows, in characters.
        label: for a field whose name says nothing, what goes into the `Label` beside it.
    """

    name: str
    limit: int
    holds: str
    value: Callable[[Facts], str]
    label: str = ""


FIELDS: Final = (
    Field("rt", 20, "when it happened, epoch milliseconds", lambda facts: str(facts.wall_ms)),
    Field("externalId", 40, "sequence in the log", lambda facts: "" if facts.sequence is None else str(facts.sequence)),
    Field("flexString1", 1023, "origin/sequence: what to know a repeated event by", lambda facts: facts.id, "id"),
    Field("deviceExternalId", 255, "origin of the log", lambda facts: facts.origin),
    Field("cat", 1023, "what its action begins with", lambda facts: facts.group),
    Field("act", 63, "action", lambda facts: facts.action),
    Field("outcome", 63, "outcome: success, failure, refused", lambda facts: facts.outcome),
    Field("reason", 1023, "`reason`: an error's code", lambda facts: facts.reason),
    Field("suser", 1023, "`actor.id`, or `actor.kind` where there is none", lambda facts: facts.actor),
    Field("suid", 1023, "`actor.id`", lambda facts: facts.actor_id),
    Field("spriv", 1023, "`actor.role`", lambda facts: facts.actor_role),
    Field("src", 15, "`source`, an IPv4 address", lambda facts: _ip(facts, ipaddress.IPv4Address)),
    Field(
        "c6a2", 39, "`source`, an IPv6 address", lambda facts: _ip(facts, ipaddress.IPv6Address), "Source IPv6 Address"
    ),
    Field("shost", 1023, "`source`, where it is no address", lambda facts: "" if facts.address else facts.source),
    Field("duid", 1023, "`target.id`", lambda facts: facts.target_id),
    Field("cnt", 20, "`counts.count`", lambda facts: _count(facts, "count")),
    Field("cn1", 20, "`counts.duration_ms`, whole", lambda facts: _count(facts, "duration_ms"), "duration_ms"),
    Field("cs1", 4000, "`tenant_id`", lambda facts: facts.tenant_id, "tenant_id"),
    Field("cs2", 4000, "`session_id`", lambda facts: facts.session_id, "session_id"),
    Field("cs3", 4000, "`request_id`", lambda facts: facts.request_id, "request_id"),
    Field("cs4", 4000, "`target.kind`", lambda facts: facts.target_kind, "target_kind"),
    Field("cs5", 4000, "`details`, JSON", lambda facts: object_text(facts.details), "details"),
    Field("cs6", 4000, "`counts`, JSON", lambda facts: object_text(facts.counts), "counts"),
    Field("msg", 1023, "why the record is withheld", lambda facts: _withheld(facts)),
)


class Cef:
    """The format, as `formats.Format` has it."""

    name: Final = "cef"

    def entry(self, origin: str, disclosed: Disclosed) -> Message:
        """See `Format.entry`."""
        return _message(facts_of_entry(origin, disclosed, MAPPING))

    def checkpoint(self, origin: str, checkpoint: CheckpointEvent, wall_ms: int) -> Message:
        """See `Format.checkpoint`."""
        return _message(facts_of_checkpoint(origin, checkpoint, wall_ms, MAPPING))

    def trial(self, origin: str, wall_ms: int) -> Message:
        """See `Format.trial`."""
        return _message(facts_of_trial(origin, wall_ms, MAPPING))

    def find(self, line: str) -> int:
        """See `Format.find`."""
        return line.find(_BEGIN)

    def read(self, text: str) -> Carried:
        """See `Format.read`."""
        # No value before it can hold this: an equals sign in one is escaped.
        proof = text.partition(f" {PROOF_KEY}=")[2]
        carried, made = made_again(self, read_object(_unescaped(proof)), MAPPING)
        if (expected := made.payload.decode()) != text:
            raise invalid(f"what it says is not what its entry and record say: {differing_field(expected, text)}")
        return carried


def differing_field(expected: str, found: str) -> str:
    """Which field of a CEF event two lines differ in first, for people."""
    same = next((at for at, (one, other) in enumerate(zip(expected, found, strict=False)) if one != other), len(found))
    names = re.findall(r"(?:^|[| ])([A-Za-z][A-Za-z0-9]*)=", expected[: same + 1])
    return names[-1] if names else "its header"


def _message(facts: Facts) -> Message:
    header = "|".join(
        _in_header(text, limit)
        for text, limit in (
            (facts.version or "unknown", _MAX_VERSION),
            (facts.action, _MAX_CLASS_ID),
            (facts.meaning, _MAX_NAME),
            (str(facts.severity.of_ten), 2),
        )
    )
    extension: list[str] = []
    for field in FIELDS:
        if value := field.value(facts):
            extension.append(f"{field.name}={_escaped(value, field.limit)}")
            if field.label:
                extension.append(f"{field.name}Label={field.label}")
    proof = proof_text(facts).replace("\\", r"\\").replace("=", r"\=")  # it is JSON: it has no ends of lines
    extension.append(f"{PROOF_KEY}={proof}")
    line = f"{_BEGIN}{header}|{' '.join(extension)}"
    return Message(line.encode(), facts.wall_ms, facts.severity.value, facts.action, facts.id)


@functools.lru_cache(1024)  # they are few: a version, an action, what it means
def _in_header(text: str, limit: int) -> str:
    return shown(text, limit).translate(_HEADER)


def _escaped(value: str, limit: int) -> str:
    """A value of the extension. It may have several lines: their ends are CEF's own to escape."""
    if len(value) <= limit and _PLAIN.fullmatch(value):
        return value
    lines = re.split(r"([\n\r])", value)
    seen = "".join(part if part in ("\n", "\r") else shown(part, limit) for part in lines)
    return (seen if len(seen) <= limit else f"{seen[: limit - 1]}\u2026").translate(_EXTENSION)


def _unescaped(value: str) -> str:
    return _ESCAPED.sub(lambda found: _MEANT.get(found[1], found[1]), value)


def _ip(facts: Facts, version: type[ipaddress.IPv4Address] | type[ipaddress.IPv6Address]) -> str:
    return str(facts.address) if isinstance(facts.address, version) else ""


def _count(facts: Facts, name: str) -> str:
    return str(int(facts.counts[name])) if name in facts.counts else ""


def _withheld(facts: Facts) -> str:
    return f"The record is withheld: {facts.withheld}" if facts.withheld else ""
