"""An entry of the log as an event of OCSF 1.8.0, and back.

Rules:

- What `formats` asks of every format. The number of the mapping is `MAPPING`; the proof is in `unmapped.holdfast`.
- An event is one line of printable ASCII: JSON, in which everything else is escaped.

https://schema.ocsf.io/1.8.0
"""

import functools
import ipaddress
from typing import Any, Final

from appliance.audit.entry import Entry, check_commitment
from appliance.audit.events import CATALOGUE
from appliance.audit.siem.facts import ONE_LINE, check_same, read_object, record_of
from appliance.audit.siem.formats import (
    Carried,
    CheckpointEvent,
    Disclosed,
    Withheld,
    checkpoint_id,
    from_base64,
    invalid,
    stable_id,
    to_base64,
    trial_id,
)
from appliance.audit.siem.severity import severity_of
from appliance.audit.siem.transport import Message
from appliance.audit.tree import leaf_hash
from appliance.errors import HoldfastError

MAPPING: Final = 1
SCHEMA: Final = "1.8.0"
PRODUCT: Final = "Holdfast"
_OTHER: Final = 99
_BASE_EVENT: Final = (0, _OTHER)
_ACCOUNT_CHANGE, _AUTHENTICATION, _ENTITY_MANAGEMENT = 3001, 3002, 3004
_APPLICATION_LIFECYCLE, _API_ACTIVITY = 6002, 6003
_SEVERITIES: Final = {1: "Informational", 2: "Low", 3: "Medium"}
_STATUSES: Final = {
    "success": (1, "Success"),
    "failure": (2, "Failure"),
    "refused": (2, "Failure"),
}
_USER_TYPES: Final = {"admin": (2, "Admin"), "client": (4, "Service")}


class Ocsf:
    """The format, as `formats.Format` has it."""

    name: Final = "ocsf"

    def entry(self, origin: str, disclosed: Disclosed) -> Message:
        """See `Format.entry`."""
        try:
            return _message(entry_event(origin, disclosed))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, HoldfastError):
                raise
            raise invalid(f"its record holds what none of ours does: {type(error).__name__}") from None

    def checkpoint(self, origin: str, checkpoint: CheckpointEvent, wall_ms: int) -> Message:
        """See `Format.checkpoint`."""
        return _message(checkpoint_event(origin, checkpoint, wall_ms))

    def trial(self, origin: str, wall_ms: int) -> Message:
        """See `Format.trial`."""
        return _message(trial_event(origin, wall_ms))

    def find(self, line: str) -> int:
        """An object with one of our proofs in it. See `Format.find`."""
        return line.find("{") if '"unmapped"' in line else -1

    def read(self, text: str) -> Carried:
        """See `Format.read`."""
        event = read_object(text)
        return Carried(origin_of(event), read_event(event))


def entry_event(origin: str, disclosed: Disclosed) -> dict[str, Any]:
    """The event of an entry.

    Raises:
        EntryInvalid: the bytes are no entry.
        EventInvalid: the record is no record of ours.
    """
    entry = Entry.unpack(disclosed.packed)
    record: dict[str, Any] = {}
    proof: dict[str, Any] = {
        "mapping": MAPPING,
        "origin": origin,
        "sequence": entry.sequence,
        "leaf_hash": leaf_hash(disclosed.packed).hex(),
        "entry": to_base64(disclosed.packed),
    }
    if disclosed.content is None:
        proof["withheld"] = str(disclosed.withheld)
    else:
        record = record_of(disclosed.content)
        proof |= {"salt": to_base64(disclosed.salt), "record": disclosed.content.decode()}
    known = CATALOGUE.get(entry.event_class)
    class_uid, activity_id = _BASE_EVENT if known is None else known.ocsf
    outcome = record.get("outcome")
    severity = severity_of(entry.event_class, outcome).value
    status_id, status = _STATUSES.get(str(outcome), (0, "Unknown"))
    event = _head(class_uid, activity_id, entry.wall_ns // 1_000_000, severity) | {
        "status_id": status_id,
        "status": status,
        "message": f"An event of class {entry.event_class}." if known is None else known.meaning,
        "metadata": _metadata(stable_id(origin, entry.sequence), str(record.get("versions", {}).get("holdfast", "")))
        | {"sequence": entry.sequence, "log_provider": origin},
        "unmapped": {"holdfast": proof},
    }
    action = f"class {entry.event_class}" if known is None else known.action
    event["metadata"]["event_code"] = action
    if activity_id == _OTHER:
        event["activity_name"] = action
    _add_subjects(event, class_uid, action, record)
    _add_figures(event, record)
    return event


def checkpoint_event(origin: str, checkpoint: CheckpointEvent, wall_ms: int) -> dict[str, Any]:
    """The event that carries a checkpoint behind the entries that it names."""
    return _head(*_BASE_EVENT, wall_ms, 1) | {
        "activity_name": "audit.checkpoint",
        "message": "The audit log's signed checkpoint of everything up to here.",
        "metadata": _metadata(checkpoint_id(origin, checkpoint), "")
        | {"event_code": "audit.checkpoint", "log_provider": origin},
        "unmapped": {
            "holdfast": {
                "mapping": MAPPING,
                "origin": origin,
                "checkpoint": checkpoint.note,
                "start": checkpoint.start,
                "size": checkpoint.size,
                "peaks": [to_base64(peak) for peak in checkpoint.peaks],
            }
            | (
                {}
                if checkpoint.end is None
                else {"end": checkpoint.end, "rest": [to_base64(root) for root in checkpoint.rest]}
            )
        },
    }


def trial_event(origin: str, wall_ms: int) -> dict[str, Any]:
    """The event that a destination is tried with: no entry of the log."""
    return _head(*_BASE_EVENT, wall_ms, 1) | {
        "activity_name": "audit.export.test",
        "message": "A test of the way to the SIEM: nothing happened.",
        "metadata": _metadata(trial_id(origin, wall_ms), "")
        | {"event_code": "audit.export.test", "log_provider": origin},
        "unmapped": {"holdfast": {"mapping": MAPPING, "origin": origin, "test": True}},
    }


def _message(event: dict[str, Any]) -> Message:
    metadata = event["metadata"]
    return Message(line_of(event), event["time"], event["severity_id"], metadata["event_code"], metadata["uid"])


def line_of(event: dict[str, Any]) -> bytes:
    """The event as one line of printable ASCII."""
    return ONE_LINE.encode(event).encode("ascii")


# At the receiver


def read_event(event: dict[str, Any]) -> Disclosed | CheckpointEvent | None:
    """What an event carries, checked against all that it says. None: it is a trial.

    Raises:
        EventInvalid: it is no event of ours, or one that was altered.
        EntryInvalid: its record is not the one that its entry commits to.
    """
    proof = _proof(event)
    if proof.get("mapping") != MAPPING:
        raise invalid(f"its mapping is {proof.get('mapping')!r}, and this version knows {MAPPING}")
    try:
        origin = str(proof["origin"])
        if "test" in proof:
            made = trial_event(origin, int(event["time"]))
            carried: Disclosed | CheckpointEvent | None = None
        elif "checkpoint" in proof:
            peaks = tuple(from_base64(peak) for peak in proof["peaks"])
            rest = tuple(from_base64(root) for root in proof.get("rest", ()))
            end = proof.get("end")
            carried = CheckpointEvent(
                str(proof["checkpoint"]),
                int(proof["start"]),
                int(proof["size"]),
                peaks,
                None if end is None else int(end),
                rest,
            )
            made = checkpoint_event(origin, carried, int(event["time"]))
        else:
            carried = _disclosed(proof)
            made = entry_event(origin, carried)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise invalid(f"its proof cannot be read: {type(error).__name__}") from None
    check_same(event, made)
    return carried


def origin_of(event: dict[str, Any]) -> str:
    """The log that an event says it is of.

    Raises:
        EventInvalid: it is no event of ours.
    """
    return str(_proof(event).get("origin"))


def _proof(event: dict[str, Any]) -> dict[str, Any]:
    unmapped = event.get("unmapped")
    proof = unmapped.get("holdfast") if isinstance(unmapped, dict) else None
    if not isinstance(proof, dict):
        raise invalid("it has no unmapped.holdfast")
    return proof


def _disclosed(proof: dict[str, Any]) -> Disclosed:
    packed = from_base64(proof["entry"])
    if "withheld" in proof:
        return Disclosed.without(packed, Withheld(proof["withheld"]))
    disclosed = Disclosed(packed, str(proof["record"]).encode(), from_base64(proof["salt"]))
    check_commitment(Entry.unpack(packed), disclosed.salt, disclosed.content or b"")
    return disclosed


# The parts of an event


def _head(class_uid: int, activity_id: int, wall_ms: int, severity_id: int) -> dict[str, Any]:
    return {
        "class_uid": class_uid,
        "category_uid": class_uid // 1000,
        "activity_id": activity_id,
        "type_uid": class_uid * 100 + activity_id,
        "time": wall_ms,
        "severity_id": severity_id,
        "severity": _SEVERITIES[severity_id],
    }


def _metadata(uid: str, version: str) -> dict[str, Any]:
    product = {"name": PRODUCT, "vendor_name": PRODUCT} | ({"version": version} if version else {})
    return {"version": SCHEMA, "product": product, "uid": uid, "log_name": "audit"}


def _add_subjects(event: dict[str, Any], class_uid: int, action: str, record: dict[str, Any]) -> None:
    """Who, from where, on what: each class has its own places for them."""
    if tenant_id := record.get("tenant_id"):
        event["metadata"]["tenant_uid"] = tenant_id
    if request_id := record.get("request_id"):
        event["metadata"]["correlation_uid"] = request_id
    user = _user(record)
    target = record.get("target", {})
    if class_uid == _APPLICATION_LIFECYCLE:
        event["app"] = {"name": target.get("id") or PRODUCT}
        return
    if class_uid not in (_ACCOUNT_CHANGE, _AUTHENTICATION, _ENTITY_MANAGEMENT, _API_ACTIVITY):
        return
    event["actor"] = {"user": user}
    if class_uid == _API_ACTIVITY or record.get("source"):
        event["src_endpoint"] = _endpoint(record)
    if class_uid == _ACCOUNT_CHANGE:
        event["user"] = {"uid": target.get("id") or "unknown"}
    elif class_uid == _AUTHENTICATION:
        event["user"] = user
        event["service"] = {"name": "vault" if target.get("kind") == "vault" else PRODUCT}
    elif class_uid == _ENTITY_MANAGEMENT:
        event["entity"] = {
            "type_id": _OTHER,
            "type": target.get("kind") or "unknown",
            "uid": target.get("id") or "unknown",
        }
    else:
        event["api"] = {"operation": action, "service": {"name": PRODUCT}}
        if request_id:
            event["api"]["request"] = {"uid": request_id}
        resources = [{"type": target["kind"], "name": target.get("id") or target["kind"]}] if target else []
        if session_id := record.get("session_id"):
            resources.append({"type": "session", "name": session_id})
        if resources:
            event["resources"] = resources


def _add_figures(event: dict[str, Any], record: dict[str, Any]) -> None:
    counts = record.get("counts", {})
    if reason := record.get("reason"):
        event["status_detail"] = reason
    if "duration_ms" in counts:
        event["duration"] = int(counts["duration_ms"])
    if "count" in counts:
        event["count"] = int(counts["count"])
    for name in ("counts", "details"):
        if record.get(name):
            event["unmapped"][name] = record[name]


def _user(record: dict[str, Any]) -> dict[str, Any]:
    actor = record.get("actor", {})
    kind = actor.get("kind", "")
    if kind == "system":
        return {"type_id": 3, "type": "System", "name": "holdfast"}
    if not actor.get("id"):
        return {"type_id": 0, "type": "Unknown", "name": "unknown"}
    type_id, type_ = _USER_TYPES.get(actor.get("role", ""), (1, "User"))
    user: dict[str, Any] = {"type_id": type_id, "type": type_, "uid": actor["id"]}
    if tenant_id := record.get("tenant_id"):
        user["org"] = {"uid": tenant_id}
    return user


def _endpoint(record: dict[str, Any]) -> dict[str, Any]:
    """An address as `ip`; what is none, a user of the machine say, as a name."""
    source = record.get("source")
    if not source:
        return {"name": "unknown"}
    address = _address(source)
    return {"ip": address} if address else {"name": source}


@functools.lru_cache(1024)
def _address(source: str) -> str:
    """An address as OCSF has it; empty: it is none."""
    try:
        # OCSF bounds an address at 40 characters: an IPv6 scope is no part of it.
        return str(ipaddress.ip_address(source)).partition("%")[0]
    except ValueError:
        return ""
