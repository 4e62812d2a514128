"""A restore of the database, as the command that did it tells the log.

Rules:

- It is done while nothing runs, so it leaves an announcement in the state that it puts in place, by the same rename.
  The next start records it and then takes the announcement away; where one is killed in between, or cannot take it
  away, the start after that records it again.
- Whoever may write the state directory can announce a restore. What nobody can do is restore unseen: the event stays.
- An announcement speaks of one database, by the mark that this means to make. Another older copy is not covered by it.
"""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from appliance.audit.events import BACKUP_RESTORED, Actor, Event
from appliance.audit.reading import LogReader
from appliance.audit.signing import public_key
from appliance.errors import HoldfastError

ANNOUNCED: Final = "restored.jsonl"  # in the state directory; one line a restore that no start has recorded yet
CARRIED_OVER: Final = "carried-over"
SET_ASIDE: Final = "set-aside"
NONE_THERE: Final = "none-there"


@dataclass(frozen=True, slots=True)
class Restore:
    """What was put back, and what became of the log; times in epoch seconds.

    Attributes:
        mark: what the restored database meant to make last.
        log: `CARRIED_OVER`: it goes on; `SET_ASIDE`: the restored database has no key for it; `NONE_THERE`.
        log_key, log_entries: its public key, and how many entries it had then; where none was there, those that the
            backup tells of.
        log_folder: in the state directory; empty: none was there.
    """

    restored_at: float
    backup_made_at: float
    backup_version: str
    mark: int
    log: str
    log_key: str
    log_entries: int
    log_folder: str

    def line(self) -> bytes:
        """For the announcement."""
        return json.dumps(asdict(self)).encode() + b"\n"

    def event(self, uid: int) -> Event:
        """For the log. `uid`: of the user who did it."""
        counts = {
            "backup_age_s": round(self.restored_at - self.backup_made_at),
            "log_entries": self.log_entries,
            "mark": self.mark,
        }
        details = {
            "backup_made_at": _moment(self.backup_made_at),
            "backup_version": self.backup_version,
            "log": self.log,
            "log_folder": self.log_folder,
            "log_key": self.log_key,
            "restored_at": _moment(self.restored_at),
        }
        return Event(BACKUP_RESTORED, Actor("user", str(uid)), target=("database", ""), counts=counts, details=details)


def announced(state_dir: Path) -> list[Event]:
    """The restores that no start has recorded yet, as events. Reads a small file.

    Raises:
        OSError, ValueError, TypeError: the file cannot be read, or is no announcement.
    """
    path = state_dir / ANNOUNCED
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    # The file's owner is who made it: nobody but root can give a file away.
    uid = path.stat().st_uid
    return [Restore(**json.loads(line)).event(uid) for line in lines]


def recorded(state_dir: Path) -> None:
    """They are in the log: the announcement has done its work."""
    (state_dir / ANNOUNCED).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Told:
    """What an event of the log tells of a restore; `made_at` is the backup's moment, `uid` of who put it back."""

    sequence: int
    uid: str
    made_at: str
    mark: int
    carried_over: bool

    @classmethod
    def of(cls, sequence: int, record: Mapping[str, Any]) -> "Told | None":
        """None: it is not what a restore says of itself."""
        try:
            details, mark = record["details"], int(record["counts"]["mark"])
            carried_over = details["log"] == CARRIED_OVER
            return cls(sequence, str(record["actor"]["id"]), str(details["backup_made_at"]), mark, carried_over)
        except (KeyError, TypeError, ValueError):
            return None


def describe(directory: Path) -> tuple[str, int]:
    """The public key of the log in `directory`, and how many entries it has; nothing, where that cannot be read."""
    key, entries = "", 0
    with contextlib.suppress(HoldfastError):
        entries = LogReader(directory).size
    with contextlib.suppress(HoldfastError):
        key = str(public_key(directory))
    return key, entries


def _moment(epoch_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(epoch_s))
