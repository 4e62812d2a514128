"""An entry of the log as a document of ECS, the Elastic Common Schema, and back.

Rules:

- What `formats` asks of every format. The number of the mapping is `MAPPING`; what ECS has no field for is under
  `holdfast`, a name of our own as ECS advises, and there the proof is in `proof`.
- Categories follow from the OCSF class and activity in the catalogue: a new kind of event has them at once.
- A document is one line of printable ASCII: JSON, in which everything else is escaped.

ECS 8.17: field reference, categorization fields and the types that each category expects.
"""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from appliance.audit.siem.facts import (
    ONE_LINE,
    PRODUCT,
    Facts,
    check_same,
    facts_of_checkpoint,
    facts_of_entry,
    facts_of_trial,
    made_again,
    read_object,
    utc_moment,
)
from appliance.audit.siem.formats import Carried, CheckpointEvent, Disclosed
from appliance.audit.siem.transport import Message

MAPPING: Final = 1
VERSION: Final = "8.17.0"
_MARK: Final = re.compile(r'"ecs"\s*:\s*\{\s*"version"')
_SERVICE: Final = PRODUCT.lower()
_ACCOUNT_CHANGE, _AUTHENTICATION, _ENTITY_MANAGEMENT = 3001, 3002, 3004
_APPLICATION_LIFECYCLE, _API_ACTIVITY = 6002, 6003
_CATEGORIES: Final[Mapping[int, str]] = {
    _ACCOUNT_CHANGE: "iam",
    _AUTHENTICATION: "authentication",
    _ENTITY_MANAGEMENT: "iam",
    _APPLICATION_LIFECYCLE: "process",
    _API_ACTIVITY: "api",
}
# By class, then by activity; an activity that is not named is `info`.
_TYPES: Final[Mapping[int, Mapping[int, str]]] = {
    _ACCOUNT_CHANGE: {1: "creation", 6: "deletion"},
    _AUTHENTICATION: {1: "start", 2: "end"},
    _ENTITY_MANAGEMENT: {1: "creation", 3: "change", 4: "deletion"},
    _APPLICATION_LIFECYCLE: {3: "start", 4: "end"},
    _API_ACTIVITY: {1: "creation", 2: "access", 3: "change", 4: "deletion"},
}
_DENIABLE: Final = frozenset({"api"})  # categories in which ECS expects the type `denied`
_OUTCOMES: Final[Mapping[str, str]] = {"success": "success", "failure": "failure", "refused": "failure"}
FIELDS: Final = (
    ("@timestamp", "when it happened, UTC"),
    ("message", "what the event means"),
    ("event.kind", "`event`"),
    ("event.category, event.type", "see the table of classes; `denied` besides for an API call that was refused"),
    ("event.action", "action"),
    ("event.code", "number of the class"),
    ("event.outcome", "success, failure (also for refused), unknown (withheld)"),
    ("event.reason", "`reason`: an error's code"),
    ("event.severity", "severity, 1 to 10"),
    ("event.duration", "`counts.duration_ms`, in nanoseconds"),
    ("event.id", "origin/sequence"),
    ("event.sequence", "sequence in the log"),
    ("event.provider", "origin of the log"),
    ("event.module, event.dataset", "`holdfast`, `holdfast.audit`"),
    ("service.name, service.type, service.version", "`holdfast`, and the version that recorded it"),
    ("user.id, user.roles", "`actor.id`, `actor.role`"),
    ("organization.id", "`tenant_id`"),
    ("source.address, source.ip", "`source`; `ip` where it is an address"),
    ("http.request.id", "`request_id`"),
    ("related.ip, related.user", "the same again, to search by"),
    ("holdfast", "`outcome`, `actor_kind`, `session_id`, `target`, `counts`, `details`, `withheld`, `proof`"),
)


class Ecs:
    """The format, as `formats.Format` has it."""

    name: Final = "ecs"

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
        """An object that says it is of ECS; inside of a text this is escaped. See `Format.find`."""
        return line.find("{") if _MARK.search(line) else -1

    def read(self, text: str) -> Carried:
        """See `Format.read`."""
        document = read_object(text)
        ours = document.get("holdfast")
        carried, made = made_again(self, ours.get("proof") if isinstance(ours, dict) else None, MAPPING)
        check_same(document, json.loads(made.payload))
        return carried


def categories(ocsf: tuple[int, int]) -> tuple[str, str] | None:
    """Category and type for a class and activity of OCSF; None: ECS has none for it, and then the fields stay away."""
    class_uid, activity_id = ocsf
    if class_uid not in _CATEGORIES:
        return None
    return _CATEGORIES[class_uid], _TYPES[class_uid].get(activity_id, "info")


def _message(facts: Facts) -> Message:
    line = ONE_LINE.encode(_document(facts)).encode("ascii")
    return Message(line, facts.wall_ms, facts.severity.value, facts.action, facts.id)


def _document(facts: Facts) -> dict[str, Any]:
    actor = facts.actor_id
    address = str(facts.address or "")
    return {
        "@timestamp": f"{utc_moment(facts.wall_ms)}Z",
        "ecs": {"version": VERSION},
        "message": facts.meaning,
        "event": _event(facts),
        "service": _with({"name": _SERVICE, "type": _SERVICE}, version=facts.version),
    } | _with(
        {},
        user=_with({}, id=actor, roles=[facts.actor_role] if actor and facts.actor_role else []),
        organization=_with({}, id=facts.tenant_id),
        source=_with({}, address=facts.source, ip=address),
        http={"request": {"id": facts.request_id}} if facts.request_id else {},
        related=_with({}, ip=[address] if address else [], user=[actor] if actor else []),
        holdfast=_with(
            {},
            outcome=facts.outcome,
            actor_kind=facts.actor_kind,
            session_id=facts.session_id,
            target=_with({}, kind=facts.target_kind, id=facts.target_id),
            counts=dict(facts.counts),
            details=dict(facts.details),
            withheld=facts.withheld,
            proof=dict(facts.proof),
        ),
    )


def _event(facts: Facts) -> dict[str, Any]:
    event: dict[str, Any] = {
        "kind": "event",
        "action": facts.action,
        "outcome": _OUTCOMES.get(facts.outcome, "unknown"),
        "severity": facts.severity.of_ten,
        "id": facts.id,
        "provider": facts.origin,
        "module": _SERVICE,
        "dataset": f"{_SERVICE}.audit",
    }
    if (found := categories(facts.ocsf)) is not None:
        category, type_ = found
        denied = ["denied"] if facts.outcome == "refused" and category in _DENIABLE else []
        event |= {"category": [category], "type": sorted([type_, *denied])}
    if facts.event_class:
        event["code"] = str(facts.event_class)
    if facts.sequence is not None:
        event["sequence"] = facts.sequence
    if "duration_ms" in facts.counts:
        event["duration"] = int(facts.counts["duration_ms"] * 1_000_000)
    return _with(event, reason=facts.reason)


def _with(given: dict[str, Any], **named: Any) -> dict[str, Any]:
    """What was given, and those of the named that are not empty."""
    return given | {name: value for name, value in named.items() if value}
