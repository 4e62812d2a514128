"""The catalogue: every kind of event that the log can hold, once.

Rules:

- The number of a class is in the log's plaintext: it is never given to another class.
- The documentation (`docs/audit-events.md`) and what a SIEM is sent are made from this.
- No event holds what a person or a model said. Every field is bounded; what was cut is named in `cut`.
- Which counts and details an event may have is said here, by class. Another name is a defect of who makes the event:
  `UndeclaredName`. What was read out of a log is no `Event`: a log of any version is read, whatever names it holds.
- Administrative acts are under the system's key: shredding a tenant never hides what an administrator did.
"""

import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

MAX_TEXT: Final = 256  # characters of a field
_MOST_NAMED: Final = 16  # undeclared names that `cut` holds
_Value = TypeVar("_Value")
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
        counts, details: those that it may have: name and meaning; `duration_ms` any may.
        is_grave: somebody should look, however it ended; see `siem.severity`.
    """

    number: int
    action: str
    meaning: str
    scope: Scope
    ocsf: tuple[int, int]
    counts: Mapping[str, str] = field(default_factory=dict, hash=False)
    details: Mapping[str, str] = field(default_factory=dict, hash=False)
    is_grave: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "counts", {**self.counts, **{n: m for n, m in OF_ANY_REQUEST.items() if n not in self.counts}}
        )


OF_ANY_REQUEST: Final = {"duration_ms": "how long ago its request had come, milliseconds"}
_COUNT: Final = {"count": "how many, since the last such event"}
_BROUGHT: Final = {"key_id": "the API key that was brought, where one was"}
_MADE: Final = {"made": "`before the first start`, where it was made when there was no log"}
_ERASED: Final = {"erased": "`true`, or `false`: its wrapped keys are in the database's files until that can be done"}
_ROUTE: Final = {"route": "method and path of what was asked for"}
_TURN: Final = {
    "prompt_tokens": "tokens of the prompt",
    "cached_tokens": "those of them that did not have to be computed",
    "completion_tokens": "tokens that were generated",
    "answer_bytes": "length of what it said, without reasoning and tool calls",
    "duration_ms": "from the request to its end, milliseconds",
}
_ANSWER: Final = {"answer_digest": "keyed digest of the answer, where the tenant chose to have it"}


# OCSF 1.8.0: 3001 Account Change, 3002 Authentication, 3004 Entity Management, 6002 Application Lifecycle, 6003 API
# Activity.
LOG_RECOVERED: Final = EventClass(
    1,
    "log.recovered",
    "A start cut off the end of the log that was not whole.",
    Scope.SYSTEM,
    (6002, 99),
    counts={"bytes": "how many were cut off"},
    is_grave=True,
)
STORE_MARKED: Final = EventClass(
    2,
    "store.marked",
    "The database and the log took note of each other; `mark` only grows, as do `destinations`, the version of the "
    "SIEM's, and `witnesses`, that of the accepted ones. `older_copy` is one that was found and nobody has "
    "acknowledged.",
    Scope.SYSTEM,
    (6002, 99),
    counts={
        "mark": "the mark's number",
        "destinations": "the version of the SIEM's destinations",
        "witnesses": "the version of the accepted witnesses",
    },
    details={
        "older_copy": "what was found to be an older copy, and nobody has acknowledged: `log`, `database` or `unknown`"
    },
)
OLDER_COPY: Final = EventClass(
    3,
    "older_copy.found",
    "The log or the database had been put back to an older copy, and no restore had been announced; `unknown`: the log "
    "has no mark within reach, so that cannot be told.",
    Scope.SYSTEM,
    (6002, 99),
    counts={
        "mark_of_log": "the newest mark that the log knows",
        "mark_of_database": "the newest mark that the database knows",
    },
    is_grave=True,
)
ENTRIES_REMOVED: Final = EventClass(
    4,
    "log.entries_removed",
    "Retention is about to remove the entries from `first` to `last`; `missing` were gone before they were due.",
    Scope.NOBODY,
    (6002, 99),
    counts={
        "first": "the first entry that this removal takes",
        "last": "the last that is gone",
        "count": "from the first to the last",
        "missing": "how many were gone before they were due, in this removal and in all before",
        "size": "entries that the signed log had",
        "retention_days": "the retention that is set, days of 24 hours",
    },
    details={"root": "the signed log's root, hexadecimal"},
)
RETENTION_OVERRIDDEN: Final = EventClass(
    5,
    "retention.overridden",
    "Entries are kept for less than six months: by whose word, and why.",
    Scope.SYSTEM,
    (6002, 99),
    counts={"retention_days": "the retention that is set, days of 24 hours"},
    details={"by": "by whose word", "why": "the reason given"},
)
ENTRIES_MISSING: Final = EventClass(
    6,
    "log.entries_missing",
    "Old entries, from `first` on, are gone, and retention has not removed them.",
    Scope.SYSTEM,
    (6002, 99),
    counts={"first": "the first entry that is gone", "last": "the last of them", "count": "from the first to the last"},
    is_grave=True,
)
OLDER_COPY_ACKNOWLEDGED: Final = EventClass(
    7,
    "older_copy.acknowledged",
    "An administrator knows of the older copy: the alarm ends.",
    Scope.SYSTEM,
    (6002, 99),
    details=_BROUGHT,
)
LOG_TAMPERED: Final = EventClass(
    8,
    "log.tampered",
    "A check found that the log on the disk is not what was written, from `first` on; that the list of accepted "
    "witnesses is not; or that somebody else's co-signature is there.",
    Scope.SYSTEM,
    (6002, 99),
    counts={"first": "the first entry that does not hold; none where no entry shows it"},
    is_grave=True,
)
GATEWAY_STARTED: Final = EventClass(
    10,
    "gateway.started",
    "A gateway began to serve.",
    Scope.SYSTEM,
    (6002, 3),
    details={"pid": "its process", "settings": "digest of the settings that are in force"},
)
GATEWAY_STOPPED: Final = EventClass(11, "gateway.stopped", "A gateway ended in good order.", Scope.SYSTEM, (6002, 4))
ENGINE_READY: Final = EventClass(12, "engine.ready", "An engine began to serve a model.", Scope.SYSTEM, (6002, 3))
ENGINE_LOST: Final = EventClass(
    13,
    "engine.lost",
    "An engine stopped answering.",
    Scope.SYSTEM,
    (6002, 4),
    is_grave=True,
)
CONFIG_RECORDED: Final = EventClass(
    14,
    "config.recorded",
    "A first start, or one that did not know the last one's settings: their digest, and which of them weaken security.",
    Scope.SYSTEM,
    (3004, 1),
    details={
        "digest": "digest of the settings",
        "model": "the model's name",
        "model_path": "where it is",
        "model_fingerprint": "what tells its folder from another's",
        "weak": "the settings that weaken security",
    },
)
CONFIG_CHANGED: Final = EventClass(
    15,
    "config.changed",
    "A setting is another one than at the last start; `weakens` says what it gives up.",
    Scope.SYSTEM,
    (3004, 3),
    details={"old": "the value at the last start", "new": "the value now", "weakens": "what it gives up of security"},
)
MODEL_CHANGED: Final = EventClass(
    16,
    "model.changed",
    "The model is another one than at the last start.",
    Scope.SYSTEM,
    (3004, 3),
    details={
        "old": "the name at the last start",
        "old_path": "where it was",
        "old_fingerprint": "what told its folder from another's",
        "new": "the name now",
        "new_path": "where it is",
        "new_fingerprint": "what tells its folder from another's",
    },
)
KV_QUARANTINED: Final = EventClass(
    17,
    "kv.quarantined",
    "KV that came back from a tier was not what the model computes: nothing is restored any more. Said again at each "
    "start while it is so.",
    Scope.SYSTEM,
    (6002, 99),
    counts={"compared_blocks": "blocks that were compared until then"},
    details={"worst_error": "the largest difference that was found; `no number` where it was none"},
    is_grave=True,
)
VAULT_OPENED: Final = EventClass(
    20,
    "vault.opened",
    "The root key was opened: by whom, or by a start with a key file.",
    Scope.SYSTEM,
    (3002, 1),
    details=_BROUGHT,
)
VAULT_REFUSED: Final = EventClass(
    21,
    "vault.refused",
    "Somebody failed to open the vault.",
    Scope.SYSTEM,
    (3002, 1),
    details=_BROUGHT,
    is_grave=True,
)
VAULT_SEALED: Final = EventClass(
    22,
    "vault.sealed",
    "The vault was sealed.",
    Scope.SYSTEM,
    (3002, 2),
    details=_BROUGHT,
)
KEYS_ROTATED: Final = EventClass(
    23,
    "keys.rotated",
    "The key that wraps a tenant's keys, or the system's, was replaced by another; `keys` are under the new one. Not "
    "`erased`: what the old one wrapped is in the database's files until that can be done.",
    Scope.SYSTEM,
    (3004, 3),
    details={"keys": "how many are under the new key"} | _ERASED | _BROUGHT,
)
AUTHENTICATED: Final = EventClass(
    30,
    "key.authenticated",
    "A request that came to no turn brought a valid key; of those that only looked at how the appliance does, `count` "
    "since the last such event.",
    Scope.TENANT,
    (3002, 1),
    counts=_COUNT,
)
NOT_AUTHENTICATED: Final = EventClass(
    31,
    "key.refused",
    "Requests brought no valid key; `count` of them since the last such event.",
    Scope.SYSTEM,
    (3002, 1),
    counts=_COUNT,
    is_grave=True,
)
MALFORMED: Final = EventClass(
    32,
    "request.malformed",
    "Requests were refused before anybody was asked for, headers came too late, or TLS handshakes failed; `count` of "
    "them since the last such event.",
    Scope.SYSTEM,
    (6003, 99),
    counts=_COUNT,
)
TURN_ADMITTED: Final = EventClass(
    40,
    "turn.admitted",
    "A request brought a valid key (`key_id`), and its turn was let through to the engine.",
    Scope.TENANT,
    (6003, 1),
    counts={"prompt_bytes": "length of the prompt"},
    details={
        "key_id": "the API key that was brought",
        "prompt_digest": "keyed digest of what was asked, where the tenant chose to have it",
    },
)
TURN_COMPLETED: Final = EventClass(
    41,
    "turn.completed",
    "A turn ended; it is kept unless `turn.not_kept` follows.",
    Scope.TENANT,
    (6003, 1),
    counts=_TURN,
    details=_ANSWER,
)
TURN_INTERRUPTED: Final = EventClass(
    42,
    "turn.interrupted",
    "A turn was broken off; what there was of it is kept unless `turn.not_kept` follows.",
    Scope.TENANT,
    (6003, 1),
    counts=_TURN,
    details=_ANSWER,
)
REQUEST_REFUSED: Final = EventClass(
    43,
    "request.refused",
    "A request of a known caller, with the key `key_id`, was refused, or failed of a defect; of those that a limit "
    "refused (rate, concurrency, quota), `count` since the last such event.",
    Scope.TENANT,
    (6003, 99),
    counts=_COUNT,
    details={"key_id": "the API key that was brought"},
)
MODELS_READ: Final = EventClass(44, "models.read", "A caller asked which models there are.", Scope.TENANT, (6003, 2))
SESSION_ENDED: Final = EventClass(46, "session.ended", "A client said that a session is over.", Scope.TENANT, (6003, 4))
TURN_NOT_KEPT: Final = EventClass(
    45,
    "turn.not_kept",
    "A turn ended and could not be stored: its client was told so.",
    Scope.TENANT,
    (6003, 1),
    is_grave=True,
)
TENANT_CREATED: Final = EventClass(
    50,
    "tenant.created",
    "A tenant was made.",
    Scope.SYSTEM,
    (3004, 1),
    details={"isolation": "what its sessions share"} | _MADE | _BROUGHT,
)
TENANT_CHANGED: Final = EventClass(
    51,
    "tenant.changed",
    "What a tenant chose is another thing now.",
    Scope.SYSTEM,
    (3004, 3),
    details={"setting": "what was chosen", "old": "what it was", "new": "what it is"} | _BROUGHT,
)
TENANT_REMOVED: Final = EventClass(
    52, "tenant.removed", "A tenant that was made for a proof was removed with all of its own.", Scope.SYSTEM, (3004, 4)
)
TENANT_SHREDDED: Final = EventClass(
    53,
    "tenant.shredded",
    "A tenant was shredded: all of its keys, its sessions and its API keys are gone. Its earlier records stay in the "
    "log and can be read by nobody. Not `erased`: its wrapped keys are in the database's files until that can be done. "
    "`row`: its own row was damaged, and how; it was named by its id alone.",
    Scope.SYSTEM,
    (3004, 4),
    counts={"sessions": "how many it had", "turns": "how many they had"},
    details={"row": "its own row was damaged, and how"} | _ERASED,
)
KEY_CREATED: Final = EventClass(
    60,
    "key.created",
    "An API key was made: whose, and what it may do.",
    Scope.SYSTEM,
    (3004, 1),
    details={
        "principal_id": "whose it is",
        "role": "the principal's role",
        "permissions": "what it may do",
        "models": "the models that it may ask; all where it names none",
        "requests_per_minute": "its bound, where it has one",
        "concurrent_requests": "its bound, where it has one",
        "tokens_per_day": "its bound, where it has one",
        "expires_at": "when it expires, seconds since the epoch, where it does",
    }
    | _MADE
    | _BROUGHT,
)
KEY_REVOKED: Final = EventClass(
    61,
    "key.revoked",
    "An API key was revoked.",
    Scope.SYSTEM,
    (3004, 4),
    details=_BROUGHT,
)
PRINCIPAL_CREATED: Final = EventClass(
    62,
    "principal.created",
    "A principal was made: its role, and what it may do.",
    Scope.SYSTEM,
    (3001, 1),
    details={
        "role": "its role",
        "permissions": "what it may do",
        "uid": "the user of the machine that it is, where it is one",
    }
    | _MADE
    | _BROUGHT,
)
SESSIONS_LISTED: Final = EventClass(
    70,
    "sessions.listed",
    "Somebody listed sessions: how many were shown.",
    Scope.SYSTEM,
    (6003, 2),
    counts={"sessions": "how many were shown"},
    details=_BROUGHT,
)
TRANSCRIPT_READ: Final = EventClass(
    71,
    "transcript.read",
    "Somebody read a transcript: how many `turns` of it.",
    Scope.SYSTEM,
    (6003, 2),
    counts={"turns": "how many were shown"},
    details=_BROUGHT,
)
SESSION_SHREDDED: Final = EventClass(
    72,
    "session.shredded",
    "A session's key was destroyed: how many `turns` it had.",
    Scope.SYSTEM,
    (6003, 4),
    counts={"turns": "how many it had"},
    details=_ERASED | _BROUGHT,
)
BACKUP_MADE: Final = EventClass(
    80,
    "backup.made",
    "A copy of the database is given out: the backup's `bytes`. Failure: it was cut off after so many `bytes`.",
    Scope.SYSTEM,
    (6003, 2),
    counts={"bytes": "the backup's size, or how much of it was given out"},
    details=_BROUGHT,
)
BACKUP_RESTORED: Final = EventClass(
    81,
    "backup.restored",
    "The database was put back from a backup before this start: how old that was (`backup_age_s`), how many entries "
    "the log had (`log_entries`), and whether it goes on (`log`).",
    Scope.SYSTEM,
    (6002, 99),
    counts={
        "backup_age_s": "how old the backup was, seconds",
        "log_entries": "entries that the log had",
        "mark": "the newest mark that the backup knows",
    },
    details={
        "backup_made_at": "the backup's moment, UTC",
        "backup_version": "the software that made it",
        "log": "what became of the log: `carried-over`, `set-aside` or `none-there`",
        "log_folder": "where the former log was put, where it does not go on",
        "log_key": "the former log's public key",
        "restored_at": "when it was put back, UTC",
    },
    is_grave=True,
)
ADMIN_ACTED: Final = EventClass(
    90,
    "admin.acted",
    "The admin API was asked for something; refused or failure: what was asked came to nothing, for `reason`.",
    Scope.SYSTEM,
    (6003, 99),
    details=_ROUTE | _BROUGHT,
)
ADMIN_REFUSED: Final = EventClass(
    91,
    "admin.refused",
    "The admin API refused somebody who may not ask for that; `count` of who is nobody here.",
    Scope.SYSTEM,
    (6003, 99),
    counts=_COUNT,
    details=_ROUTE | _BROUGHT,
    is_grave=True,
)
AUDIT_READ: Final = EventClass(
    95,
    "audit.read",
    "Somebody read the audit log: how many `entries` were shown, and how many of their `records` could be opened.",
    Scope.SYSTEM,
    (6003, 2),
    counts={"entries": "how many were shown", "records": "how many of them could be opened"},
    details={
        "since_ns": "entries from this wall clock on, nanoseconds since the epoch",
        "until_ns": "entries before it",
        "scope": "under whose key",
        "action": "of which action",
        "actor": "of whom",
        "session": "of which session",
        "outcome": "how they ended",
        "before": "entries below this number",
        "limit": "at most so many",
        "text": "of what a digest was asked for: `prompt` or `answer`",
    }
    | _BROUGHT,
)
AUDIT_WITNESSED: Final = EventClass(
    96,
    "audit.witnessed",
    "A witness, by its public key, co-signed a checkpoint, and is accepted from then on: one that was carried to it; "
    "over the network the first since a start, or since it had refused or been silent.",
    Scope.SYSTEM,
    (6003, 99),
    counts={"witnesses": "the version of the accepted ones"},
    details={
        "size": "entries that the checkpoint names",
        "begun_anew": "why it was not known any more who had been accepted before",
    }
    | _BROUGHT,
)
WITNESS_REFUSED: Final = EventClass(
    97,
    "witness.refused",
    "A witness refuses to co-sign this log: it saw a longer one (`reason` is shorter: cut off, or an old copy), or "
    "another history (forked).",
    Scope.SYSTEM,
    (6002, 99),
    counts={"size": "entries of this log", "witness_size": "entries that the witness saw"},
    is_grave=True,
)
WITNESS_SILENT: Final = EventClass(
    98,
    "witness.silent",
    "A witness that is asked over the network has co-signed nothing for five minutes, for `reason`.",
    Scope.SYSTEM,
    (6002, 99),
    is_grave=True,
)
EXPORT_ADDED: Final = EventClass(
    110,
    "export.added",
    "A destination of the audit log was added.",
    Scope.SYSTEM,
    (3004, 1),
    details={"format": "in which format", "url": "to where; not of one that was refused as it is"} | _BROUGHT,
)
EXPORT_REMOVED: Final = EventClass(
    111,
    "export.removed",
    "A destination of the audit log was removed.",
    Scope.SYSTEM,
    (3004, 4),
    details={"url": "to where", "delivered": "entries that it had got"} | _BROUGHT,
)
EXPORT_TESTED: Final = EventClass(
    112,
    "export.tested",
    "A destination of the audit log was sent a test event.",
    Scope.SYSTEM,
    (6003, 99),
    details=_BROUGHT,
)
AUDIT_EXPORTED: Final = EventClass(
    113,
    "audit.exported",
    "Somebody took a part of the audit log out of it: how many `entries`. Failure: it was cut off after `bytes`.",
    Scope.SYSTEM,
    (6003, 2),
    counts={"entries": "how many", "bytes": "how much was given out before it was cut off"},
    details={"first": "the first entry", "end": "the first that is not in it any more"} | _BROUGHT,
)

ISOLATION_PROVED: Final = EventClass(
    120,
    "isolation.proved",
    "Somebody had it proved what crosses from session to session; `verdict` says what came of it.",
    Scope.SYSTEM,
    (6003, 99),
    details={"verdict": "`PASS`, `FAIL`, `UNKNOWN` or `NOT CONFIGURED`", "failed": "the checks that failed"} | _BROUGHT,
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


class UndeclaredName(UserWarning, ValueError):
    """An event was made with a count or a detail that its class does not declare: a defect of who makes it.

    A warning, which tests turn into an error: no test passes an emitter that has one. Where the appliance runs it goes
    to the gateway's log, and the event is recorded: to lose it, or to refuse a turn for the sake of a name, would
    harm more. The record is without what nobody declared, for nobody has seen to it that it may be in the log; `cut`
    names it.
    """


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened.

    Warns:
        UndeclaredName: a count or a detail is none of its class's.

    Attributes:
        tenant_id: whose; empty: the system's.
        source: the address that it came from.
        target: what was acted on: kind and id.
        reason: a code, where it did not succeed.
        counts: numbers with units in their names: `prompt_tokens`, `bytes`, `duration_ms`, `count`; as `kind` has them.
        details: more, by name; as `kind` has them.
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

    def __post_init__(self) -> None:
        if self.counts.keys() <= self.kind.counts.keys() and self.details.keys() <= self.kind.details.keys():
            return
        undeclared = [
            *(f"counts.{name}" for name in sorted(self.counts.keys() - self.kind.counts.keys())),
            *(f"details.{name}" for name in sorted(self.details.keys() - self.kind.details.keys())),
        ]
        told = f"{self.kind.action} has no {', '.join(undeclared)}: say in appliance/audit/events.py what it means"
        warnings.warn(UndeclaredName(told), stacklevel=3)  # behind the dataclass's `__init__`

    def scope(self, system_scope: str) -> str:
        """Whose key seals it."""
        return self.tenant_id if self.kind.scope is Scope.TENANT and self.tenant_id else system_scope

    def record(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """What is sealed: names to values, without what is empty or undeclared, every text bounded; names sorted.

        Args:
            versions: of what runs here; in their sorted order too.
        """
        cut: list[str] = []
        by = self.actor
        actor = {"id": _text("actor.id", by.id, cut)} if by.id else {}
        actor["kind"] = _text("actor.kind", by.kind, cut)
        if by.role:
            actor["role"] = _text("actor.role", by.role, cut)
        record: dict[str, Any] = {"action": self.kind.action, "actor": actor}
        if self.counts and (counts := _declared("counts", self.counts, self.kind.counts, cut)):
            record["counts"] = counts
        if self.details and (details := _declared("details", self.details, self.kind.details, cut)):
            record["details"] = {name: _text(f"details.{name}", text, cut) for name, text in details.items()}
        record["outcome"] = self.outcome._value_
        if self.reason:
            record["reason"] = _text("reason", self.reason, cut)
        if self.request_id:
            record["request_id"] = _text("request_id", self.request_id, cut)
        if self.session_id:
            record["session_id"] = _text("session_id", self.session_id, cut)
        if self.source:
            record["source"] = _text("source", self.source, cut)
        kind, identifier = self.target
        if kind:
            record["target"] = {"id": _text("target.id", identifier, cut), "kind": _text("target.kind", kind, cut)}
        if self.tenant_id:
            record["tenant_id"] = _text("tenant_id", self.tenant_id, cut)
        record["versions"] = versions
        return dict(sorted((record | {"cut": cut}).items())) if cut else record


def _text(name: str, text: str, cut: list[str]) -> str:
    """`text` as a record holds it: as it is, unless it is too long, or has what is to be replaced."""
    return text if len(text) <= MAX_TEXT and text.isascii() and text.isprintable() else _bounded(name, text, cut)


def _bounded(name: str, text: str, cut: list[str]) -> str:
    if len(text) > MAX_TEXT:
        cut.append(name)
        text = text[:MAX_TEXT]
    # Lone surrogates have no UTF-8, and control characters would be commands to who prints the record.
    return text.translate(_UNPRINTABLE).encode("utf-8", "replace").decode()


def _declared(
    place: str, given: Mapping[str, _Value], declared: Mapping[str, str], cut: list[str]
) -> dict[str, _Value]:
    """What is given, in the order of its names. What is not declared is left out, and named in `cut`."""
    if given.keys() <= declared.keys():
        return dict(sorted(given.items()))
    undeclared = sorted(given.keys() - declared.keys())
    cut += [_bounded("", f"{place}.{name}", []) for name in undeclared[:_MOST_NAMED]]
    if len(undeclared) > _MOST_NAMED:
        cut.append(f"{place}: {len(undeclared) - _MOST_NAMED} more")
    return {name: given[name] for name in sorted(given.keys() & declared.keys())}


def documentation() -> str:
    """The catalogue as a page: `docs/audit-events.md`."""
    rows = [
        f"| {known.number} | `{known.action}` | {known.meaning} | {known.scope} | {known.ocsf[0]}:{known.ocsf[1]} |"
        for known in CATALOGUE.values()
    ]
    names = [
        f"| `{known.action}` | `{place}.{name}` | {meaning} |"
        for known in CATALOGUE.values()
        for place, declared in (("counts", known.counts), ("details", known.details))
        for name, meaning in declared.items()
        if (name, meaning) not in OF_ANY_REQUEST.items()
    ]
    return "\n".join((_PAGE, *rows, _NAMES, *names, ""))


_PAGE: Final = """\
# Events of the audit log

Made from the catalogue in `appliance/audit/events.py`; a test compares the two. *key*: whose key seals the record, the
tenant's, the system's, or nobody's. *OCSF*: class and activity in OCSF 1.8.0.

A record holds `action`, `outcome` (success, failure, refused), `actor` (kind, id, role), `versions`, and where
there is something to say `tenant_id`, `source`, `target` (kind, id), `reason` (an error's code), `request_id`,
`session_id`, and the `counts` and `details` of its class ([below](#counts-and-details)). No field is longer than 256
characters; `cut` names those that were, and any count or detail that is none of its class: a defect of the software,
which leaves it out and says so in the gateway's log. Sequence, wall clock, monotonic clock and boot are the entry's
own. Nobody's records are in plaintext, for who verifies the log without a key. What a person or a model said is in no
event; where a tenant chose it, `turn.admitted` has a keyed `prompt_digest` and the end of a turn an `answer_digest`.
What a known caller asked for, on the admin API too, has `counts.duration_ms`: how long ago the request had come when
this was recorded, milliseconds. What somebody did on the admin API has the id of its request, the `key_id` of a key
that was brought, and the session that it was done to.

What has a `count` is told once a minute: one event for each class, actor, address, reason and key, with the target,
the request and the duration of the first. Where there are more than 64 such kinds, of strangers or of known callers,
the rest is one event for each class, and for each tenant of known callers, with the reason `others`.

| number | action | meaning | key | OCSF |
|---|---|---|---|---|"""
_NAMES: Final = """
## Counts and details

Each is there where there is something to say. What an earlier version has written may hold others, and is read and
verified all the same.

| action | field | what it is |
|---|---|---|"""
