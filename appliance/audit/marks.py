"""The log and the database remember each other: whichever of the two is put back to an older copy is found.

Rules:

- A mark is a number that only grows. The database says first that it means to make it, then the log has it, then the
  database says that the log has it. However a run ends in between, the next start is not alarmed.
- The log is older than the database when it lacks a mark that the database says it has; the database is older than the
  log when the log has a mark that the database never meant to make.
- A mark names the version of the SIEM's destinations, too: a file of them that is put back to an older copy is found.
- What was found is told once, as an event, and goes on: putting a backup back is an administrator's right, and this is
  how everybody else learns of it.
"""

import json
from typing import Final, NamedTuple

from sqlalchemy import Connection, delete, insert, select

from appliance.audit.entry import EntryKeys, open_record
from appliance.audit.events import STORE_MARKED
from appliance.audit.reading import LogReader
from appliance.store import Store, tables

DESTINATIONS: Final = "destinations"  # what a mark calls their version
_NAME: Final = "audit-mark"
MOST_LOOKED_AT: Final = 100_000


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


def last_mark_of_log(log: LogReader, keys: EntryKeys) -> int | None:
    """The last mark in the log; 0: there is none in it; None: it is too far back, or was removed. Blocks.

    Raises:
        LogUnreadable, EntryInvalid: the log's files do not do.
        HoldfastError: the vault is sealed.
    """
    return _last_of_log(log, keys, "mark")


def version_of_destinations(log: LogReader, keys: EntryKeys) -> int:
    """What the last mark says that knew which destinations there were; 0: none that can be found. Raises as above."""
    return _last_of_log(log, keys, DESTINATIONS) or 0


def _last_of_log(log: LogReader, keys: EntryKeys, count: str) -> int | None:
    for looked_at, (entry, sealed) in enumerate(log.backwards(log.size)):
        if looked_at >= MOST_LOOKED_AT:
            return None
        if entry.event_class == STORE_MARKED.number:
            counts = open_record(entry, sealed, keys).record["counts"]
            if count in counts:
                return int(counts[count])
    return 0 if log.oldest == 0 else None


def found(marks: Marks, in_log: int | None) -> str:
    """Which of the two was put back to an older copy: `log`, `database`, or neither."""
    if in_log is None:
        return ""
    if in_log < marks.made:
        return "log"
    if in_log > marks.meant:
        return "database"
    return ""
