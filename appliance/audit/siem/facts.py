"""What an event says, before it is written in a SIEM's language; and the proof that it carries, for every format.

Rules:

- `Facts` is a function of the origin, the entry and the record: no format looks at a record itself.
- The proof is one JSON object of printable ASCII. What it carries is believed only after `carried_by`; and an event
  only when its format makes the same one again from that: `made_again`.
- What a reader meets here may be forged: whatever it holds, it is refused with `EventInvalid` or `EntryInvalid`.
"""

import functools
import ipaddress
import json
import re
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from appliance.audit.entry import Entry, check_commitment
from appliance.audit.events import CATALOGUE
from appliance.audit.siem.formats import (
    Carried,
    CheckpointEvent,
    Disclosed,
    Format,
    Withheld,
    checkpoint_id,
    from_base64,
    invalid,
    stable_id,
    to_base64,
    trial_id,
)
from appliance.audit.siem.severity import Severity, severity_of
from appliance.audit.siem.transport import Message
from appliance.audit.tree import leaf_hash
from appliance.errors import HoldfastError

VENDOR: Final = "Holdfast"
PRODUCT: Final = "Holdfast"
PROOF_KEY: Final = "HoldfastAuditProof"  # as CEF wants it: vendor, product, what it is
CHECKPOINT_ACTION: Final = "audit.checkpoint"
TRIAL_ACTION: Final = "audit.export.test"
_EPOCH: Final = datetime(1970, 1, 1)  # noqa: DTZ001  (its zone is written by who uses it)
_NO_CLASS: Final = (0, 99)  # OCSF's base event
ONE_LINE: Final = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False)  # printable ASCII
_TEXT: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False)
# What ends a line, moves a cursor, turns the direction of writing, or is not seen. Not `str.isprintable`: each version
# of Python answers that by another version of Unicode, and an event must be the same one wherever it is made.
_HIDDEN: Final = re.compile(
    "[\x00-\x1f\x7f-\xa0\xad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u1680\u17b4\u17b5"
    "\u180b-\u180f\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\u3164\ud800-\uf8ff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff"
    "\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U0010ffff]"
)
# JSON can say these and receivers cannot: to a text of C a NUL is the end, and half of a pair has no UTF-8.
_UNSAYABLE: Final = re.compile("[\0\ud800-\udfff]")


class Facts(NamedTuple):
    """What an event says. A text that there is none of is empty, and so is a mapping.

    Attributes:
        event_class: its number in the catalogue; 0: no entry of the log.
        id: what it is known by, however often it is sent.
        ocsf: class and activity of OCSF 1.8.0.
        outcome: success, failure, refused.
        address: the source, where that is an IP address, in its one spelling, without an IPv6 scope.
        version: of the software that recorded it.
        withheld: why there is no record.
        proof: see `carried_by`.
    """

    event_class: int
    id: str
    wall_ms: int
    action: str
    meaning: str
    ocsf: tuple[int, int]
    severity: Severity
    origin: str
    proof: Mapping[str, Any]
    sequence: int | None = None
    outcome: str = ""
    reason: str = ""
    actor_kind: str = ""
    actor_id: str = ""
    actor_role: str = ""
    tenant_id: str = ""
    source: str = ""
    address: ipaddress.IPv4Address | ipaddress.IPv6Address | None = None
    target_kind: str = ""
    target_id: str = ""
    request_id: str = ""
    session_id: str = ""
    version: str = ""
    withheld: str = ""
    counts: Mapping[str, int | float] = {}
    details: Mapping[str, str] = {}

    @property
    def group(self) -> str:
        """What its action begins with: `turn` of `turn.admitted`."""
        return self.action.partition(".")[0]

    @property
    def actor(self) -> str:
        """Who, for people: an id, or the kind where there is none."""
        return self.actor_id or self.actor_kind


def facts_of_entry(origin: str, disclosed: Disclosed, mapping: int) -> Facts:
    """What an entry's event says.

    Args:
        mapping: the number of the format's mapping.

    Raises:
        EntryInvalid: the bytes are no entry.
        EventInvalid: the record is no record of ours.
    """
    entry = Entry.unpack(disclosed.packed)
    record = {} if disclosed.content is None else record_of(disclosed.content)
    known = CATALOGUE.get(entry.event_class)
    actor, target = _object(record, "actor"), _object(record, "target")
    source = _text(record, "source")
    return Facts(
        event_class=entry.event_class,
        id=stable_id(origin, entry.sequence),
        wall_ms=entry.wall_ns // 1_000_000,
        action=f"class {entry.event_class}" if known is None else known.action,
        meaning=f"An event of class {entry.event_class}." if known is None else known.meaning,
        ocsf=_NO_CLASS if known is None else known.ocsf,
        severity=severity_of(entry.event_class, record.get("outcome")),
        origin=origin,
        proof=_entry_proof(origin, disclosed, entry.sequence, mapping),
        sequence=entry.sequence,
        outcome=_text(record, "outcome"),
        reason=_text(record, "reason"),
        actor_kind=_text(actor, "kind"),
        actor_id=_text(actor, "id"),
        actor_role=_text(actor, "role"),
        tenant_id=_text(record, "tenant_id"),
        source=source,
        address=_address(source),
        target_kind=_text(target, "kind"),
        target_id=_text(target, "id"),
        request_id=_text(record, "request_id"),
        session_id=_text(record, "session_id"),
        version=_text(_object(record, "versions"), "holdfast"),
        withheld=str(disclosed.withheld or ""),
        counts={name: count for name, count in _object(record, "counts").items() if _is_number(count)},
        details={name: str(text) for name, text in _object(record, "details").items()},
    )


def facts_of_checkpoint(origin: str, checkpoint: CheckpointEvent, wall_ms: int, mapping: int) -> Facts:
    """What a checkpoint's event says."""
    proof: dict[str, Any] = {
        "mapping": mapping,
        "origin": origin,
        "checkpoint": checkpoint.note,
        "start": checkpoint.start,
        "size": checkpoint.size,
        "peaks": [to_base64(peak) for peak in checkpoint.peaks],
        "time": wall_ms,
    }
    if checkpoint.end is not None:
        proof |= {"end": checkpoint.end, "rest": [to_base64(root) for root in checkpoint.rest]}
    meaning = "The audit log's signed checkpoint of everything up to here."
    known_by = checkpoint_id(origin, checkpoint)
    return Facts(0, known_by, wall_ms, CHECKPOINT_ACTION, meaning, _NO_CLASS, Severity.INFORMATIONAL, origin, proof)


def facts_of_trial(origin: str, wall_ms: int, mapping: int) -> Facts:
    """What the event says that a destination is tried with."""
    proof = {"mapping": mapping, "origin": origin, "test": True, "time": wall_ms}
    meaning = "A test of the way to the SIEM: nothing happened."
    known_by = trial_id(origin, wall_ms)
    return Facts(0, known_by, wall_ms, TRIAL_ACTION, meaning, _NO_CLASS, Severity.INFORMATIONAL, origin, proof)


def proof_text(facts: Facts) -> str:
    """The proof as printable ASCII."""
    return ONE_LINE.encode(facts.proof)


def object_text(values: Mapping[str, Any]) -> str:
    """Some values of a record as one field; empty: there are none."""
    return _TEXT.encode(values) if values else ""


def utc_moment(wall_ms: int) -> str:
    """A moment of UTC in ISO 8601, with milliseconds and without the zone.

    Raises:
        OverflowError: the calendar has no such year.
    """
    return (_EPOCH + timedelta(milliseconds=wall_ms)).isoformat(timespec="milliseconds")


def shown(text: str, limit: int) -> str:
    """A text as one that a field may hold: what is not to be seen is written `<U+202E>`, and what is too long is cut.

    The exact text is in the record that the proof carries.
    """
    if len(text) <= limit and text.isascii() and text.isprintable():
        return text
    seen = _HIDDEN.sub(_mark, text)
    return seen if len(seen) <= limit else f"{seen[: limit - 1]}\u2026"


def record_of(content: bytes) -> dict[str, Any]:
    """A record as an event says it: what no receiver could read is written `<U+0000>`. The proof carries it exactly.

    Raises:
        EventInvalid: it is no record of ours.
    """
    try:
        record = json.loads(content.decode())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise invalid("its record is no JSON object")
    return _sayable(record) if b"\\u" in content else record  # as UTF-8 nothing else has to be escaped


# At the receiver


def read_object(text: str) -> dict[str, Any]:
    """One JSON object, in which no name comes twice: readers differ in which of the two they take.

    Raises:
        EventInvalid: it is none.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise invalid(f"what it holds cannot be read as JSON: {error}"[:200]) from None
    if not isinstance(found, dict):
        raise invalid("it holds no JSON object")
    return found


def check_same(event: dict[str, Any], made: dict[str, Any]) -> None:
    """See that an event is the one that was made again. 1, 1.0 and true are one to Python, and three to receivers.

    Raises:
        EventInvalid: names the fields that differ.
    """
    if event == made and _spelt(event) == _spelt(made):
        return
    names = event.keys() | made.keys()
    differing = sorted(name for name in names if _spelt(event.get(name)) != _spelt(made.get(name)))
    raise invalid(f"what it says is not what its entry and record say: {', '.join(differing)}"[:300])


def _spelt(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def made_again(format_: Format, proof: object, mapping: int) -> tuple[Carried, Message]:
    """What a proof carries, and the event that the format makes of that.

    Raises:
        EventInvalid: it is no proof of ours, or of another mapping.
        EntryInvalid: its record is not the one that its entry commits to.
    """
    if not isinstance(proof, dict):
        raise invalid("it carries no proof")
    if proof.get("mapping") != mapping:
        raise invalid(f"its mapping is {str(proof.get('mapping'))[:20]}, and this version knows {mapping}")
    try:
        carried = carried_by(proof)
        if carried.content is None:
            return carried, format_.trial(carried.origin, int(proof["time"]))
        if isinstance(carried.content, CheckpointEvent):
            return carried, format_.checkpoint(carried.origin, carried.content, int(proof["time"]))
        return carried, format_.entry(carried.origin, carried.content)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise invalid(f"its proof cannot be read: {type(error).__name__}") from None


def carried_by(proof: Mapping[str, Any]) -> Carried:
    """What a proof carries; a record is the one that its entry commits to. May raise whatever a wrong type raises."""
    origin = str(proof["origin"])
    if "test" in proof:
        return Carried(origin, None)
    if "checkpoint" in proof:
        end = proof.get("end")
        checkpoint = CheckpointEvent(
            note=str(proof["checkpoint"]),
            start=int(proof["start"]),
            size=int(proof["size"]),
            peaks=tuple(from_base64(peak) for peak in proof["peaks"]),
            end=None if end is None else int(end),
            rest=tuple(from_base64(root) for root in proof.get("rest", ())),
        )
        return Carried(origin, checkpoint)
    packed = from_base64(proof["entry"])
    if "withheld" in proof:
        return Carried(origin, Disclosed.without(packed, Withheld(proof["withheld"])))
    content, salt = str(proof["record"]).encode(), from_base64(proof["salt"])
    check_commitment(Entry.unpack(packed), salt, content)
    return Carried(origin, Disclosed(packed, content, salt))


def _entry_proof(origin: str, disclosed: Disclosed, sequence: int, mapping: int) -> dict[str, Any]:
    proof: dict[str, Any] = {
        "mapping": mapping,
        "origin": origin,
        "sequence": sequence,
        "leaf_hash": leaf_hash(disclosed.packed).hex(),
        "entry": to_base64(disclosed.packed),
    }
    if disclosed.content is None:
        return proof | {"withheld": str(disclosed.withheld)}
    return proof | {"salt": to_base64(disclosed.salt), "record": disclosed.content.decode()}


def _sayable(value: Any) -> Any:
    if isinstance(value, str):
        return _UNSAYABLE.sub(_mark, value)
    if isinstance(value, dict):
        return {_UNSAYABLE.sub(_mark, name): _sayable(each) for name, each in value.items()}
    return [_sayable(each) for each in value] if isinstance(value, list) else value


def _mark(found: re.Match[str]) -> str:
    return f"<U+{ord(found[0]):04X}>"


def _object(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = record.get(name)
    return found if isinstance(found, dict) else {}


def _text(record: Mapping[str, Any], name: str) -> str:
    found = record.get(name)
    return found if isinstance(found, str) else ""


def _is_number(value: object) -> bool:
    """A number that JSON has."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


@functools.lru_cache(1024)
def _address(source: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(source)
    except ValueError:
        return None
    return ipaddress.IPv6Address(int(address)) if isinstance(address, ipaddress.IPv6Address) else address


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name comes twice in one object")
    return made
