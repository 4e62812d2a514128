"""Finds entries by time, class, tenant, actor and session, and opens what was found.

Rules:

- The plaintext header and the keyed tags decide first: only what they let through is decrypted.
- The newest comes first; a search is bounded in what it returns and in what it looks at, and says where it stopped.
- A record that cannot be opened (its tenant was shredded) is returned without its content, never left out.
- A record in plaintext has no tags and is the system's: what it says decides.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from appliance.audit.entry import NO_ID, AuditKeys, Entry, EntryInvalid, open_record, search_tag
from appliance.audit.events import CATALOGUE
from appliance.audit.reading import LogReader, removed
from appliance.errors import HoldfastError
from appliance.vault import SYSTEM_SCOPE

MOST_LOOKED_AT: Final = 200_000


@dataclass(frozen=True, slots=True)
class Query:
    """What is looked for; None: any.

    Attributes:
        since_ns, until_ns: wall clock, nanoseconds since the epoch; `until_ns` itself is not found.
        scope: a tenant's id, or the system's.
        action: a name of the catalogue; `*` stands for anything: `turn.*`.
        before: entries below this number only: where an earlier search stopped.
    """

    since_ns: int | None = None
    until_ns: int | None = None
    scope: str | None = None
    action: str | None = None
    actor: str | None = None
    session: str | None = None
    outcome: str | None = None
    before: int | None = None
    limit: int = 50


class Found(NamedTuple):
    """An entry, and its record if it could be opened; else why not."""

    entry: Entry
    record: dict[str, Any] | None
    salt: bytes
    why_not: str


@dataclass(slots=True)
class Findings:
    """What was found; `go_on_before`: look for more below this number. None: there is no more.

    `oldest`: the first entry that is kept. What was before it is not found.
    """

    found: list[Found] = field(default_factory=list)
    go_on_before: int | None = None
    oldest: int = 0


def search(log: LogReader, keys: AuditKeys, query: Query) -> Findings:
    """Search a log, the newest entries first. Blocks: it reads files.

    Raises:
        EntryRemoved: all that could be found was removed.
        LogUnreadable: the log's files do not do.
        HoldfastError: the vault is sealed, or there is no such scope.
    """
    classes = None
    if query.action is not None:
        classes = {number for number, known in CATALOGUE.items() if fnmatch.fnmatchcase(known.action, query.action)}
    key_ids = None if query.scope is None else {keys.audit_key_id(query.scope)}
    if key_ids is not None and query.scope == SYSTEM_SCOPE:
        key_ids.add(NO_ID)
    oldest = log.oldest
    start = oldest if query.since_ns is None else log.first_at(query.since_ns)
    end = log.size if query.until_ns is None else log.first_at(query.until_ns)
    end = end if query.before is None else min(end, query.before)
    if 0 < oldest >= end:
        raise removed(0, oldest)
    actor, session = _Tags(keys, "actor", query.actor), _Tags(keys, "session", query.session)
    findings = Findings(oldest=oldest)
    for looked_at, (entry, sealed) in enumerate(log.backwards(end, start)):
        if looked_at >= MOST_LOOKED_AT or len(findings.found) >= query.limit:
            findings.go_on_before = entry.sequence + 1
            break
        if classes is not None and entry.event_class not in classes:
            continue
        if key_ids is not None and entry.key_id not in key_ids:
            continue
        if not actor.match(entry, entry.actor_tag) or not session.match(entry, entry.session_tag):
            continue
        opened = look_at(entry, sealed, keys)
        if _is_meant(opened, query):
            findings.found.append(opened)
    return findings


def look_at(entry: Entry, sealed: bytes, keys: AuditKeys) -> Found:
    """An entry with its record, or with why it cannot be opened."""
    try:
        opened = open_record(entry, sealed, keys)
    except EntryInvalid:
        raise
    except HoldfastError as error:
        return Found(entry, None, b"", error.message)
    return Found(entry, opened.record, opened.salt, "")


class _Tags:
    """Compares the tags of one value under whichever key an entry has; a key is asked for once."""

    def __init__(self, keys: AuditKeys, label: str, value: str | None) -> None:
        self._keys = keys
        self._label = label
        self._value = value
        self._by_key: dict[bytes, bytes | None] = {}

    def match(self, entry: Entry, tag: bytes) -> bool:
        if self._value is None:
            return True
        if entry.key_id == NO_ID:
            return True
        if entry.key_id not in self._by_key:
            try:
                wanted = search_tag(self._keys, entry.key_id, self._label, self._value)
            except HoldfastError:
                wanted = None
            self._by_key[entry.key_id] = wanted
        return self._by_key[entry.key_id] == tag


def _is_meant(found: Found, query: Query) -> bool:
    """What the tags cannot say for certain: they are short, and there is none for the outcome."""
    record = found.record
    if record is None:
        return query.outcome is None
    actor: dict[str, str] = record.get("actor", {})
    wanted: list[tuple[str | None, Callable[[], object]]] = [
        (query.actor, lambda: actor.get("id", "")),
        (query.session, lambda: record.get("session_id")),
        (query.outcome, lambda: record.get("outcome")),
    ]
    return all(value is None or value == look() for value, look in wanted)
