"""Finds entries by time, class, tenant, actor and session, and opens what was found.

Rules:

- The plaintext header and the keyed tags decide first: only what they let through is decrypted.
- A time is compared with each entry's own wall clock, whatever the order: a clock may have been set, to any year and
  back. What a bundle's clocks rule out is looked at no further, and counts as one look.
- The newest number comes first; a search is bounded in what it returns and in what it looks at, and says where it
  stopped.
- A record that cannot be opened (its tenant was shredded) is returned without its content, never left out.
- A record in plaintext has no tags and is the system's: what it says decides.
"""

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from appliance.audit.entry import NO_ID, AuditKeys, Entry, EntryInvalid, open_record, search_tag
from appliance.audit.events import CATALOGUE
from appliance.audit.reading import EntryRemoved, LogReader, removed
from appliance.audit.tree import TILE_WIDTH
from appliance.errors import HoldfastError
from appliance.vault import SYSTEM_SCOPE

MOST_LOOKED_AT: Final = 200_000
_EARLIEST_NS: Final = -(1 << 63)  # what an entry's wall clock can say
_LATEST_NS: Final = (1 << 63) - 1


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
    """Search a log, from its end. Blocks: it reads files; for a time, the clocks of as many entries as it takes.

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
    end = log.size if query.before is None else min(log.size, query.before)
    if 0 < oldest >= end:
        raise removed(0, oldest)
    actor, session = _Tags(keys, "actor", query.actor), _Tags(keys, "session", query.session)
    findings = Findings(oldest=oldest)
    any_of_the_time = False
    for looked_at, (sequence, is_of_the_time) in enumerate(_looks(log, query, oldest, end)):
        if looked_at >= MOST_LOOKED_AT or len(findings.found) >= query.limit:
            findings.go_on_before = sequence + 1
            break
        if not is_of_the_time:
            continue
        any_of_the_time = True
        try:
            frame = log.frame(sequence)
        except EntryRemoved:
            break
        entry, sealed = Entry.unpack(frame.entry), frame.sealed
        if classes is not None and entry.event_class not in classes:
            continue
        if key_ids is not None and entry.key_id not in key_ids:
            continue
        if not actor.match(entry, entry.actor_tag) or not session.match(entry, entry.session_tag):
            continue
        opened = look_at(entry, sealed, keys)
        if _is_meant(opened, query):
            findings.found.append(opened)
    nothing = not any_of_the_time and findings.go_on_before is None and query.before is None
    if oldest and nothing and query.until_ns is not None and query.until_ns <= log.entry(oldest).wall_ns:
        raise removed(0, oldest)
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


def _looks(log: LogReader, query: Query, start: int, end: int) -> Iterator[tuple[int, bool]]:
    """The entries of [start, end) that are of the time, from the end, each with True.

    A bundle without one is passed over, its last entry with False. Ends where entries are removed meanwhile.
    """
    since_ns = _EARLIEST_NS if query.since_ns is None else query.since_ns
    until_ns = _LATEST_NS + 1 if query.until_ns is None else query.until_ns
    for bundle in range((end - 1) // TILE_WIDTH, start // TILE_WIDTH - 1, -1):
        first, behind = max(start, bundle * TILE_WIDTH), min(end, (bundle + 1) * TILE_WIDTH)
        places = range(behind - 1, first - 1, -1)
        if query.since_ns is None and query.until_ns is None:
            yield from ((sequence, True) for sequence in places)
            continue
        try:
            clocks = log.wall_clocks(first, behind)
        except EntryRemoved:
            return
        meant: list[int] = []
        if max(clocks) >= since_ns and min(clocks) < until_ns:
            meant = [sequence for sequence in places if since_ns <= clocks[sequence - first] < until_ns]
        if meant:
            yield from ((sequence, True) for sequence in meant)
        else:
            yield behind - 1, False


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
