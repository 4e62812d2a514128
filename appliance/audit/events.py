"""The catalogue: every kind of event that the log can hold, once.

Rules:

- The number of a class is in the log's plaintext: it is never given to another class.
- The documentation (`docs/audit-events.md`) and what a SIEM is sent are made from this.
- No event holds what a person or a model said. Every field is bounded; what was cut is named in `cut`.
- Administrative acts are under the system's key: shredding a tenant never hides what an administrator did.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

MAX_TEXT: Final = 256  # characters of a field
_UNPRINTABLE: Final = dict.fromkeys((*range(32), *range(127, 160)), "�")


class Outcome(enum.StrEnum):
    """How it ended."""

    SUCCESS = "success"
    FAILURE = "failure"
    REFUSED = "refused"


class Scope(enum.StrEnum):
    """Under whose key an event is."""

    TENANT = "tenant"
    SYSTEM = "system"
    NOBODY = "nobody"  # in plaintext: what verification has to know


@dataclass(frozen=True, slots=True)
class EventClass:
    """One kind of event.

    Attributes:
        number: its name in the log's plaintext.
        action: its name in records.
        meaning: one sentence for who reads the log.
        scope: whose key seals it.
        ocsf: class and activity of OCSF 1.8.0.
    """

    number: int
    action: str
    meaning: str
    scope: Scope
    ocsf: tuple[int, int]


# OCSF 1.8.0: 3001 Account Change, 3002 Authentication, 3004 Entity Management, 6002 Application Lifecycle, 6003 API
# Activity.
LOG_RECOVERED: Final = EventClass(
    1, "log.recovered", "A start cut off the end of the log that was not whole.", Scope.SYSTEM, (6002, 99)
)
STORE_MARKED: Final = EventClass(
    2,
    "store.marked",
    "The database and the log took note of each other; `mark` only grows, as do `destinations`, the version of the "
    "SIEM's, and `witnesses`, that of the accepted ones. `older_copy` is one that was found and nobody has "
    "acknowledged.",
    Scope.SYSTEM,
    (6002, 99),
)
OLDER_COPY: Final = EventClass(
    3,
    "older_copy.found",
    "The log or the database had been put back to an older copy, and no restore had been announced; `unknown`: the log "
    "has no mark within reach, so that cannot be told.",
    Scope.SYSTEM,
    (6002, 99),
)
ENTRIES_REMOVED: Final = EventClass(
    4,
    "log.entries_removed",
    "Retention is about to remove the entries from `first` to `last`; `missing` were gone before they were due.",
    Scope.NOBODY,
    (6002, 99),
)
RETENTION_OVERRIDDEN: Final = EventClass(
    5,
    "retention.overridden",
    "Entries are kept for less than six months: by whose word, and why.",
    Scope.SYSTEM,
    (6002, 99),
)
ENTRIES_MISSING: Final = EventClass(
    6,
    "log.entries_missing",
    "Old entries, from `first` on, are gone, and retention has not removed them.",
    Scope.SYSTEM,
    (6002, 99),
)
OLDER_COPY_ACKNOWLEDGED: Final = EventClass(
    7, "older_copy.acknowledged", "An administrator knows of the older copy: the alarm ends.", Scope.SYSTEM, (6002, 99)
)
LOG_TAMPERED: Final = EventClass(
    8,
    "log.tampered",
    "A check found that the log on the disk is not what was written, from `first` on.",
    Scope.SYSTEM,
    (6002, 99),
)
GATEWAY_STARTED: Final = EventClass(10, "gateway.started", "A gateway began to serve.", Scope.SYSTEM, (6002, 3))
GATEWAY_STOPPED: Final = EventClass(11, "gateway.stopped", "A gateway ended in good order.", Scope.SYSTEM, (6002, 4))
ENGINE_READY: Final = EventClass(12, "engine.ready", "An engine began to serve a model.", Scope.SYSTEM, (6002, 3))
ENGINE_LOST: Final = EventClass(13, "engine.lost", "An engine stopped answering.", Scope.SYSTEM, (6002, 4))
CONFIG_RECORDED: Final = EventClass(
    14,
    "config.recorded",
    "A first start, or one that did not know the last one's settings: their digest, and which of them weaken security.",
    Scope.SYSTEM,
    (3004, 1),
)
CONFIG_CHANGED: Final = EventClass(
    15,
    "config.changed",
    "A setting is another one than at the last start; `weakens` says what it gives up.",
    Scope.SYSTEM,
    (3004, 3),
)
MODEL_CHANGED: Final = EventClass(
    16, "model.changed", "The model is another one than at the last start.", Scope.SYSTEM, (3004, 3)
)
KV_QUARANTINED: Final = EventClass(
    17,
    "kv.quarantined",
    "KV that came back from a tier was not what the model computes: nothing is restored any more. Said again at each "
    "start while it is so.",
    Scope.SYSTEM,
    (6002, 99),
)
VAULT_OPENED: Final = EventClass(
    20, "vault.opened", "The root key was opened: by whom, or by a start with a key file.", Scope.SYSTEM, (3002, 1)
)
VAULT_REFUSED: Final = EventClass(21, "vault.refused", "Somebody failed to open the vault.", Scope.SYSTEM, (3002, 1))
VAULT_SEALED: Final = EventClass(22, "vault.sealed", "The vault was sealed.", Scope.SYSTEM, (3002, 2))
KEYS_ROTATED: Final = EventClass(
    23,
    "keys.rotated",
    "The key that wraps a tenant's keys, or the system's, was replaced by another; `keys` are under the new one. Not "
    "`erased`: what the old one wrapped is in the database's files until that can be done.",
    Scope.SYSTEM,
    (3004, 3),
)
AUTHENTICATED: Final = EventClass(
    30,
    "key.authenticated",
    "A request that came to no turn brought a valid key; of those that only looked at how the appliance does, `count` "
    "since the last such event.",
    Scope.TENANT,
    (3002, 1),
)
NOT_AUTHENTICATED: Final = EventClass(
    31,
    "key.refused",
    "Requests brought no valid key; `count` of them since the last such event.",
    Scope.SYSTEM,
    (3002, 1),
)
MALFORMED: Final = EventClass(
    32,
    "request.malformed",
    "Requests were refused before anybody was asked for; `count` of them since the last such event.",
    Scope.SYSTEM,
    (6003, 99),
)
TURN_ADMITTED: Final = EventClass(
    40,
    "turn.admitted",
    "A request brought a valid key (`key_id`), and its turn was let through to the engine.",
    Scope.TENANT,
    (6003, 1),
)
TURN_COMPLETED: Final = EventClass(
    41, "turn.completed", "A turn ended; it is kept unless `turn.not_kept` follows.", Scope.TENANT, (6003, 1)
)
TURN_INTERRUPTED: Final = EventClass(
    42,
    "turn.interrupted",
    "A turn was broken off; what there was of it is kept unless `turn.not_kept` follows.",
    Scope.TENANT,
    (6003, 1),
)
REQUEST_REFUSED: Final = EventClass(
    43,
    "request.refused",
    "A request of a known caller was refused, or failed of a defect; of those that a limit refused (rate, concurrency, "
    "quota), `count` since the last such event.",
    Scope.TENANT,
    (6003, 99),
)
MODELS_READ: Final = EventClass(44, "models.read", "A caller asked which models there are.", Scope.TENANT, (6003, 2))
SESSION_ENDED: Final = EventClass(46, "session.ended", "A client said that a session is over.", Scope.TENANT, (6003, 4))
TURN_NOT_KEPT: Final = EventClass(
    45, "turn.not_kept", "A turn ended and could not be stored: its client was told so.", Scope.TENANT, (6003, 1)
)
TENANT_CREATED: Final = EventClass(50, "tenant.created", "A tenant was made.", Scope.SYSTEM, (3004, 1))
TENANT_CHANGED: Final = EventClass(
    51, "tenant.changed", "What a tenant chose is another thing now.", Scope.SYSTEM, (3004, 3)
)
TENANT_REMOVED: Final = EventClass(
    52, "tenant.removed", "A tenant that was made for a proof was removed with all of its own.", Scope.SYSTEM, (3004, 4)
)
TENANT_SHREDDED: Final = EventClass(
    53,
    "tenant.shredded",
    "A tenant was shredded: all of its keys, its sessions and its API keys are gone. Its earlier records stay in the "
    "log and can be read by nobody. Not `erased`: its wrapped keys are in the database's files until that can be done.",
    Scope.SYSTEM,
    (3004, 4),
)
KEY_CREATED: Final = EventClass(
    60, "key.created", "An API key was made: whose, and what it may do.", Scope.SYSTEM, (3004, 1)
)
KEY_REVOKED: Final = EventClass(61, "key.revoked", "An API key was revoked.", Scope.SYSTEM, (3004, 4))
PRINCIPAL_CREATED: Final = EventClass(
    62, "principal.created", "A principal was made: its role, and what it may do.", Scope.SYSTEM, (3001, 1)
)
SESSIONS_LISTED: Final = EventClass(
    70, "sessions.listed", "Somebody listed sessions: how many were shown.", Scope.SYSTEM, (6003, 2)
)
TRANSCRIPT_READ: Final = EventClass(
    71, "transcript.read", "Somebody read a transcript: how many `turns` of it.", Scope.SYSTEM, (6003, 2)
)
SESSION_SHREDDED: Final = EventClass(
    72, "session.shredded", "A session's key was destroyed: how many `turns` it had.", Scope.SYSTEM, (6003, 4)
)
BACKUP_MADE: Final = EventClass(
    80, "backup.made", "A copy of the database was written: the backup's `bytes`.", Scope.SYSTEM, (6003, 2)
)
BACKUP_RESTORED: Final = EventClass(
    81,
    "backup.restored",
    "The database was put back from a backup before this start: how old that was (`backup_age_s`), how many entries "
    "the log had (`log_entries`), and whether it goes on (`log`).",
    Scope.SYSTEM,
    (6002, 99),
)
ADMIN_ACTED: Final = EventClass(
    90,
    "admin.acted",
    "The admin API was asked for something; refused or failure: what was asked came to nothing, for `reason`.",
    Scope.SYSTEM,
    (6003, 99),
)
ADMIN_REFUSED: Final = EventClass(
    91,
    "admin.refused",
    "The admin API refused somebody who may not ask for that; `count` of who is nobody here.",
    Scope.SYSTEM,
    (6003, 99),
)
AUDIT_READ: Final = EventClass(95, "audit.read", "Somebody read the audit log.", Scope.SYSTEM, (6003, 2))
AUDIT_WITNESSED: Final = EventClass(
    96,
    "audit.witnessed",
    "A witness, by its public key, co-signed a checkpoint, and is accepted from then on. `begun_anew`: why it was not "
    "known any more who had been accepted before.",
    Scope.SYSTEM,
    (6003, 99),
)
EXPORT_ADDED: Final = EventClass(
    110, "export.added", "A destination of the audit log was added.", Scope.SYSTEM, (3004, 1)
)
EXPORT_REMOVED: Final = EventClass(
    111, "export.removed", "A destination of the audit log was removed.", Scope.SYSTEM, (3004, 4)
)
EXPORT_TESTED: Final = EventClass(
    112, "export.tested", "A destination of the audit log was sent a test event.", Scope.SYSTEM, (6003, 99)
)
AUDIT_EXPORTED: Final = EventClass(
    113,
    "audit.exported",
    "Somebody took a part of the audit log out of it: how many `entries`.",
    Scope.SYSTEM,
    (6003, 2),
)

ISOLATION_PROVED: Final = EventClass(
    120,
    "isolation.proved",
    "Somebody had it proved what crosses from session to session; `verdict` says what came of it.",
    Scope.SYSTEM,
    (6003, 99),
)

CATALOGUE: Final[Mapping[int, EventClass]] = {
    known.number: known for known in list(globals().values()) if isinstance(known, EventClass)
}
BY_ACTION: Final[Mapping[str, EventClass]] = {known.action: known for known in CATALOGUE.values()}


@dataclass(frozen=True, slots=True)
class Actor:
    """Who did it.

    Attributes:
        kind: `principal`, `user` of the machine, `system`, or `anyone`.
        id: a principal's id, or a user's number.
    """

    kind: str
    id: str = ""
    role: str = ""


SYSTEM: Final = Actor("system")
ANYONE: Final = Actor("anyone")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Attributes:
        tenant_id: whose; empty: the system's.
        source: the address that it came from.
        target: what was acted on: kind and id.
        reason: a code, where it did not succeed.
        counts: numbers with units in their names: `prompt_tokens`, `bytes`, `duration_ms`, `count`.
        details: more, by name.
    """

    kind: EventClass
    actor: Actor
    outcome: Outcome = Outcome.SUCCESS
    tenant_id: str = ""
    source: str = ""
    target: tuple[str, str] = ("", "")
    reason: str = ""
    request_id: str = ""
    session_id: str = ""
    counts: Mapping[str, int | float] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)

    def scope(self, system_scope: str) -> str:
        """Whose key seals it."""
        return self.tenant_id if self.kind.scope is Scope.TENANT and self.tenant_id else system_scope

    def record(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """What is sealed: names to values, without what is empty, every text bounded; names in their sorted order.

        Args:
            versions: of what runs here; in their sorted order too.
        """
        cut: list[str] = []

        def put(place: dict[str, Any], name: str, text: str, full_name: str = "") -> None:
            if text:
                plain = len(text) <= MAX_TEXT and text.isascii() and text.isprintable()
                place[name] = text if plain else _bounded(full_name or name, text, cut)

        actor: dict[str, Any] = {}
        put(actor, "id", self.actor.id, "actor.id")
        put(actor, "kind", self.actor.kind, "actor.kind")
        put(actor, "role", self.actor.role, "actor.role")
        after: dict[str, Any] = {"outcome": self.outcome.value}
        put(after, "reason", self.reason)
        put(after, "request_id", self.request_id)
        put(after, "session_id", self.session_id)
        put(after, "source", self.source)
        kind, identifier = self.target
        if kind:
            after["target"] = target = {"id": ""}
            put(target, "id", identifier, "target.id")
            put(target, "kind", kind, "target.kind")
        put(after, "tenant_id", self.tenant_id)
        after["versions"] = versions
        details = dict(sorted(self.details.items()))
        for name, text in details.items():
            put(details, name, text, f"details.{name}")
        record: dict[str, Any] = {"action": self.kind.action, "actor": actor}
        if self.counts:
            record["counts"] = dict(sorted(self.counts.items()))
        if cut:
            record["cut"] = cut
        if details:
            record["details"] = details
        return record | after


def _bounded(name: str, text: str, cut: list[str]) -> str:
    if len(text) > MAX_TEXT:
        cut.append(name)
        text = text[:MAX_TEXT]
    # Lone surrogates have no UTF-8, and control characters would be commands to who prints the record.
    return text.translate(_UNPRINTABLE).encode("utf-8", "replace").decode()


def documentation() -> str:
    """The catalogue as a page: `docs/audit-events.md`."""
    rows = [
        f"| {known.number} | `{known.action}` | {known.meaning} | {known.scope} | {known.ocsf[0]}:{known.ocsf[1]} |"
        for known in CATALOGUE.values()
    ]
    return "\n".join((_PAGE, *rows, ""))


_PAGE: Final = """\
# Events of the audit log

Made from the catalogue in `appliance/audit/events.py`; a test compares the two. *key*: whose key seals the record, the
tenant's, the system's, or nobody's. *OCSF*: class and activity in OCSF 1.8.0.

A record holds `action`, `outcome` (success, failure, refused), `actor` (kind, id, role), `versions`, and where
there is something to say `tenant_id`, `source`, `target` (kind, id), `reason` (an error's code), `request_id`,
`session_id`, `counts`, `details`. No field is longer than 256 characters; `cut` names those that were. Sequence, wall
clock, monotonic clock and boot are the entry's own. Nobody's records are in plaintext, for who verifies the log
without a key. What a person or a model said is in no event; where a tenant chose it, `turn.admitted` has a keyed
`prompt_digest` and the end of a turn an `answer_digest`. What somebody did on the admin API has the id of its request,
the `key_id` of a key that was brought, and the session that it was done to.

What has a `count` is told once a minute: one event for each class, actor, address, reason and key, with the target and
the request of the first. Where there are more than 64 such kinds, of strangers or of known callers, the rest is one
event for each class, and for each tenant of known callers, with the reason `others`.

| number | action | meaning | key | OCSF |
|---|---|---|---|---|"""
