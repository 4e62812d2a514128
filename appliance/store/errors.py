"""What can go wrong with the store, and what a driver's error means.

Rule: no message holds a value that was to be written. Drivers put values into theirs; only constraint and column names
are taken over.
"""

import os
import re
import resource
import sqlite3
from pathlib import Path
from typing import ClassVar

from sqlalchemy import exc

from appliance.errors import Fault, HoldfastError

_NEARLY_FULL_BYTES = 1 << 20
_NAME_TOO_FAR = 200


class StoreUnavailable(HoldfastError):
    """The database cannot be reached or used just now."""

    code: ClassVar[str] = "store_unavailable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class ErasureHeld(StoreUnavailable):
    """What was deleted may still be on the disk: a read holds it there."""


class StoreBusy(HoldfastError):
    """More is waiting to be written or read than may wait."""

    code: ClassVar[str] = "store_busy"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class StoreFull(HoldfastError):
    """There is no room left where the database is."""

    code: ClassVar[str] = "store_full"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class StoreConflict(HoldfastError):
    """A write contradicts what is stored: a name that is taken, a row that is not there."""

    code: ClassVar[str] = "store_conflict"
    fault: ClassVar[Fault] = Fault.CONFLICT


class StoreDefect(HoldfastError):
    """A statement or a value is not one that the database takes: a defect of ours."""

    code: ClassVar[str] = "store_defect"
    fault: ClassVar[Fault] = Fault.INTERNAL


class StoreInUse(HoldfastError):
    """Another process, or another `Store`, has the database open."""

    code: ClassVar[str] = "store_in_use"
    fault: ClassVar[Fault] = Fault.CONFLICT


class StoreEmpty(HoldfastError):
    """There is a sealed root key, and the database that it belongs to is not there, or has nothing in it."""

    code: ClassVar[str] = "store_empty"
    fault: ClassVar[Fault] = Fault.CONFLICT

    def __init__(self, place: str, cause: str) -> None:
        super().__init__(
            "the database is empty, or not this appliance's",
            cause=f"{place}: {cause}",
            remedy="Put it back from a backup: `holdfast restore FILE --replace NAME`; or name in store.url the one "
            "that this appliance had. Nothing was made in its place",
        )


class SchemaTooNew(HoldfastError):
    """The database was written by a newer version."""

    code: ClassVar[str] = "schema_too_new"
    fault: ClassVar[Fault] = Fault.CONFLICT


class SchemaUnreleased(HoldfastError):
    """The database was written by a version in development, before any release."""

    code: ClassVar[str] = "schema_unreleased"
    fault: ClassVar[Fault] = Fault.CONFLICT


class BackupUnsupported(HoldfastError):
    """This database is backed up with its own tools."""

    code: ClassVar[str] = "backup_unsupported"
    fault: ClassVar[Fault] = Fault.CALLER


class BackupFailed(HoldfastError):
    """A backup could not be written; what was there before is untouched."""

    code: ClassVar[str] = "backup_failed"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


def meaning(error: BaseException, place: str, path: Path | None) -> BaseException:
    """What a driver's `error` means to a person; an error that no database raised comes back as it is.

    Args:
        place: what the database is called in messages; holds no password.
        path: its file, or None where it is a server.
    """
    if isinstance(error, exc.DBAPIError) and error.orig is not None:
        if isinstance(error, exc.IntegrityError):
            return StoreConflict(
                "the change contradicts what is stored",
                cause=_constraint(error.orig),
                remedy="Choose another name or id, or read again what is there",
            )
        if _is_defect(error):
            return StoreDefect(
                f"{place} does not take a statement of ours",
                cause=_first_line(error.orig),
                remedy="Report this with the log; nothing of this change was written, and others are not concerned",
            )
        return _operational(error.orig, place, path)
    if isinstance(error, exc.TimeoutError):
        return StoreBusy(
            f"{place} has no connection free",
            cause="every connection has been in use for the longest time that a read waits",
            remedy="Send fewer requests at once, then try again",
        )
    if isinstance(error, sqlite3.Error):
        return _operational(error, place, path)
    return error


def busy(place: str, bound: int) -> StoreBusy:
    return StoreBusy(
        f"{place} cannot keep up",
        cause=f"{bound} reads or writes are waiting, and no more may wait",
        remedy="Send fewer requests at once, then try again; a slow disk shows in the time of a commit",
    )


def closed(place: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{place} is closed", cause="the appliance is stopping", remedy="Try again when it has started"
    )


def _operational(error: BaseException, place: str, path: Path | None) -> HoldfastError:
    if _is_full(error, path):
        where = f"{path.parent if path is not None else place}"
        return StoreFull(
            f"there is no room left in {where}",
            cause=f"{place} could not be extended; nothing of this change was written",
            remedy=f"Free space on the file system of {where} (`df -h`): writing goes on by itself",
        )
    locked = isinstance(error, sqlite3.Error) and _sqlite_code(error) in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
    if locked:
        return StoreUnavailable(
            f"{place} is locked",
            cause="another process has been writing to it for the longest time that a write waits",
            remedy="End whatever else has the file open (`fuser -v FILE`), then try again",
        )
    return StoreUnavailable(
        f"{place} cannot be used",
        cause=_first_line(error),
        remedy="Look at the database's own log and its disk, then try again; `holdfast doctor` names what is wrong",
    )


def _is_defect(error: exc.DBAPIError) -> bool:
    if isinstance(error, exc.ProgrammingError | exc.DataError | exc.NotSupportedError):
        return True
    if not isinstance(error.orig, sqlite3.Error):
        return False
    # sqlite3 says InterfaceError for a value that it cannot bind, and SQLITE_ERROR for a table that is not there.
    return isinstance(error, exc.InterfaceError) or _sqlite_code(error.orig) == sqlite3.SQLITE_ERROR


def _is_full(error: BaseException, path: Path | None) -> bool:
    sqlstate = getattr(error, "sqlstate", None)
    if sqlstate is not None:
        return bool(sqlstate == "53100")  # disk_full, PostgreSQL appendix A
    if not isinstance(error, sqlite3.Error):
        return False
    code = _sqlite_code(error)
    if code == sqlite3.SQLITE_FULL:
        return True
    # Extending the shared-memory file, or a file beyond a limit on its size, is reported as a mere I/O error.
    return code == sqlite3.SQLITE_IOERR and path is not None and _has_no_room(path)


def _has_no_room(path: Path) -> bool:
    longest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        space = os.statvfs(path.parent)
        sizes = [file.stat().st_size for file in path.parent.glob(f"{path.name}*")]
    except OSError:
        return False
    at_its_limit = longest != resource.RLIM_INFINITY and max(sizes, default=0) + _NEARLY_FULL_BYTES > longest
    return at_its_limit or space.f_bavail * space.f_frsize < _NEARLY_FULL_BYTES


def _sqlite_code(error: sqlite3.Error) -> int:
    """The primary result code, without the extension in the higher bits."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def _constraint(error: BaseException) -> str:
    diagnosis = getattr(error, "diag", None)
    if diagnosis is not None:
        return f"constraint {diagnosis.constraint_name or diagnosis.column_name or 'unknown'}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\s+", " ", text[0])[:_NAME_TOO_FAR]
