"""The log and the database remember each other: whichever of the two is put back to an older copy is found.

Rules:

- A mark is a number that only grows. The database says first that it means to make it, then the log has it, then the
  database says that the log has it. However a run ends in between, the next start is not alarmed.
- The log is older than the database when it lacks a mark that the database says it has; the database is older than the
  log when the log has a mark that the database never meant to make.
- A mark names the version of the SIEM's destinations, too, and of the accepted witnesses: a file of them that is put
  back to an older copy is found.
- What the log says in plaintext counts for nothing here, but a restore, which is told while the vault is sealed, too:
  whoever can write the log's folder can append it. No mark is made while the vault is sealed.
- Absence of evidence is no evidence: where no mark is found within reach, it cannot be told, and that is told.
- Putting a backup back is an administrator's right: a restore is an event of the log, and what it explains is no alarm.
- What no restore explains is an event and an alarm. Each mark carries it on, through every start, until an
  administrator acknowledges it.
"""

import contextlib
import json
from typing import Final, NamedTuple

from sqlalchemy import Connection, delete, insert, select

from appliance.audit.entry import PLAINTEXT, EntryKeys, open_record
from appliance.audit.events import AUDIT_WITNESSED, BACKUP_RESTORED, OLDER_COPY_ACKNOWLEDGED, STORE_MARKED
from appliance.audit.reading import LogReader
from appliance.audit.restores import Told
from appliance.store import Store, tables

DESTINATIONS: Final = "destinations"  # what a mark calls their version
WITNESSES: Final = "witnesses"  # of the accepted witnesses
OLDER: Final = "older_copy"  # what it calls the copy that nobody has acknowledged
_NAME: Final = "audit-mark"
UNKNOWN: Final = "unknown"  # what it calls one of which nobody can tell whether there is one
MOST_LOOKED_AT: Final = 10_000_000  # entries; a mark is made every minute, in which 1,300,000 were written at most
_REMEMBERED: Final = frozenset({STORE_MARKED.number, OLDER_COPY_ACKNOWLEDGED.number, BACKUP_RESTORED.number})
_SAYING: Final = frozenset({STORE_MARKED.number, AUDIT_WITNESSED.number})  # whose counts name versions


class Marks(NamedTuple):
    """What the database says: the mark that it meant to make last, and the last that the log has."""

    meant: int
    made: int


def marks_of_store(db: Connection) -> Marks:
    """What the database remembers; a new one remembers nothing."""
    meta = tables.meta
    value = db.execute(select(meta.c.value).where(meta.c.name == _NAME)).scalar()
    return Marks(*json.loads(value)) if value is not None else Marks(0, 0)


async def remember(store: Store, marks: Marks) -> None:
    """Write what the database says of marks.

    Raises:
        StoreFull, StoreUnavailable: it says what it said before.
    """
    meta = tables.meta

    def write(db: Connection) -> None:
        db.execute(delete(meta).where(meta.c.name == _NAME))
        db.execute(insert(meta).values(name=_NAME, value=json.dumps(marks)))

    await store.transact(write)


class Remembered(NamedTuple):
    """What the log says.

    Attributes:
        mark: the last one in it; 0: there is none; None: it is too far back, or was removed.
        older: which copy was found to be older, or `UNKNOWN`, and nobody has acknowledged it; empty: neither.
        restore: the newest since that mark; None: there was none.
    """

    mark: int | None
    older: str = ""
    restore: Told | None = None


def remembered_by_log(log: LogReader, keys: EntryKeys) -> Remembered:
    """What the log says of marks, and of restores since. Blocks.

    Raises:
        LogUnreadable, EntryInvalid: the log's files do not do.
        HoldfastError: the vault is sealed.
    """
    acknowledged, restore = False, None
    for entry, sealed in log.newest(_REMEMBERED, most=MOST_LOOKED_AT):
        if entry.flags & PLAINTEXT and entry.event_class != BACKUP_RESTORED.number:
            continue
        if entry.event_class == OLDER_COPY_ACKNOWLEDGED.number:
            acknowledged = True
        elif entry.event_class == BACKUP_RESTORED.number and restore is None:
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # in plaintext: anybody's
                restore = Told.of(entry.sequence, open_record(entry, sealed, keys).record)
        elif entry.event_class == STORE_MARKED.number:
            record = open_record(entry, sealed, keys).record
            older = "" if acknowledged else str(record.get("details", {}).get(OLDER, ""))
            return Remembered(int(record["counts"]["mark"]), older, restore)
    return Remembered(0 if _is_within_reach(log) else None, "", restore)


def last_said(log: LogReader, keys: EntryKeys, name: str) -> int | None:
    """What the newest entry says that names the version called `name`; 0: none ever did. None: it cannot be told.

    Blocks, and raises as `remembered_by_log`.
    """
    for entry, sealed in log.newest(_SAYING, most=MOST_LOOKED_AT):
        if entry.flags & PLAINTEXT:
            continue
        counts = open_record(entry, sealed, keys).record.get("counts", {})
        if name in counts:
            return int(counts[name])
    return 0 if _is_within_reach(log) else None


def _is_within_reach(log: LogReader) -> bool:
    """Whether all that was ever in the log was looked at."""
    return log.size <= MOST_LOOKED_AT and log.oldest == 0


def found(marks: Marks, in_log: int | None) -> str:
    """Which of the two was put back to an older copy: `log`, `database`, or neither; `UNKNOWN`: that cannot be told."""
    if in_log is None:
        return UNKNOWN
    if in_log < marks.made:
        return "log"
    if in_log > marks.meant:
        return "database"
    return ""


def is_explained(which: str, marks: Marks, log: Remembered) -> bool:
    """Whether a restore that was announced is why one of the two is older."""
    restore = log.restore
    if which == UNKNOWN or restore is None or restore.mark != marks.meant:
        return False
    # A log that was carried over is as new as it was. A new one, made where the backup was put, has no mark yet.
    return which == "database" or (not restore.carried_over and log.mark == 0)
