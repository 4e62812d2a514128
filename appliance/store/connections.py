"""How a database is connected to, durably and with bounds.

Rules:

- A commit that was acknowledged is on the disk: WAL with `synchronous=FULL` on SQLite, `synchronous_commit=on` on
  PostgreSQL.
- Readers cannot write. What waits for a lock, a connection or a statement has a deadline.
- Parameters never reach a log or an error: `hide_parameters`.
- A SQLite file has one owner at a time: what is cached in memory would not see another owner's writes.
"""

import fcntl
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import ConnectionPoolEntry

from appliance.store.errors import StoreEmpty, StoreInUse, StoreUnavailable

READERS = 4
_LOCK_WAIT_S = 5.0
_STATEMENT_S = 30
_WAL_KEPT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Connections:
    """A database's one writing connection and its reading ones.

    Attributes:
        place: what the database is called in messages; holds no password.
        path: its file, or None where it is a server.
        ownership: the descriptor whose lock says that the file is ours, or None.
    """

    writer: Engine
    readers: Engine
    place: str
    path: Path | None
    ownership: int | None

    @property
    def exclusive(self) -> bool:
        return self.ownership is not None

    def close(self) -> None:
        """Close every connection, the writing one last: it empties the WAL."""
        self.readers.dispose()
        self.writer.dispose()
        if self.ownership is not None:
            os.close(self.ownership)


def connect(url: str, *, create: bool) -> Connections:
    """Prepare the engines of `url`; nothing is connected yet.

    Raises:
        StoreEmpty: a SQLite file is not there, or has nothing in it, and none is to be created.
        StoreInUse: another process has the SQLite file open.
        StoreUnavailable: the URL or the place that it names cannot be used.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise _unusable("the store's URL", "it is not a database URL") from None
    match parsed.get_backend_name():
        case "sqlite":
            return _sqlite(parsed, create=create)
        case "postgresql":
            return _postgresql(parsed)
        case other:
            raise _unusable("the store's URL", f"it names {other}, and only SQLite and PostgreSQL are supported")


def _sqlite(url: URL, *, create: bool) -> Connections:
    if not url.database or url.database == ":memory:":
        raise _unusable("the store's URL", "a database in memory would not outlive the process")
    path = Path(url.database).absolute()
    if not create:
        _refuse_empty(path)
    ownership = _own(path)
    options: dict[str, Any] = {
        "connect_args": {"isolation_level": None, "timeout": _LOCK_WAIT_S, "check_same_thread": False},
        "hide_parameters": True,
        "max_overflow": 0,
        "pool_timeout": _STATEMENT_S,
    }
    local = URL.create("sqlite+pysqlite", database=str(path))
    writer = create_engine(local, pool_size=1, **options)
    readers = create_engine(local, pool_size=READERS, **options)
    event.listen(writer, "connect", _prepare_writer)
    event.listen(readers, "connect", _prepare_reader)
    event.listen(writer, "begin", _begin_immediate)
    event.listen(readers, "begin", _begin)
    return Connections(writer, readers, str(path), path, ownership)


def _refuse_empty(path: Path) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise StoreEmpty(str(path), "there is no such file") from None
    except OSError as error:
        raise _unusable(str(path), error.strerror or type(error).__name__) from None
    if not size:
        raise StoreEmpty(str(path), "the file has nothing in it")


def _own(path: Path) -> int:
    """Create the file, 0600, and lock its neighbour `…-lock` for as long as the descriptor is open.

    The lock is not on the database file itself: closing any descriptor of it would drop SQLite's own locks.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    lock = path.with_name(f"{path.name}-lock")
    try:
        descriptor = os.open(lock, flags, 0o600)
    except OSError as error:
        raise _unusable(str(path), error.strerror or type(error).__name__) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
        os.close(descriptor)
        raise StoreInUse(
            f"{path} is in use",
            cause=f"process {holder} has it open" if holder.isdigit() else "another process has it open",
            remedy="Talk to the running appliance (`holdfast status`), or stop it with `holdfast down`",
        ) from None
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        pass  # on a full disk the name of the holder is missing from a message, and that is all
    try:
        # Before any connection exists: closing a descriptor of the file later would drop their locks.
        os.close(os.open(path, flags, 0o600))
    except OSError as error:
        os.close(descriptor)
        raise _unusable(str(path), error.strerror or type(error).__name__) from None
    return descriptor


def _prepare_writer(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    _pragmas(
        connection,
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
        "temp_store=MEMORY",
        "wal_autocheckpoint=0",  # Checkpoints does it
        f"journal_size_limit={_WAL_KEPT_BYTES}",
    )


def _prepare_reader(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    _pragmas(connection, "query_only=ON", "temp_store=MEMORY")


def _pragmas(connection: sqlite3.Connection, *pragmas: str) -> None:
    for pragma in pragmas:
        connection.execute(f"PRAGMA {pragma}").fetchall()


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _postgresql(url: URL) -> Connections:
    settings = {
        "synchronous_commit": "on",
        "statement_timeout": f"{_STATEMENT_S}s",
        "lock_timeout": f"{_LOCK_WAIT_S:.0f}s",
        "idle_in_transaction_session_timeout": f"{_STATEMENT_S}s",
    }
    options: dict[str, Any] = {
        "connect_args": {
            "connect_timeout": int(_LOCK_WAIT_S),
            "application_name": "holdfast",
            "options": " ".join(f"-c {name}={value}" for name, value in settings.items()),
        },
        "hide_parameters": True,
        "max_overflow": 0,
        "pool_pre_ping": True,
        "pool_timeout": _STATEMENT_S,
    }
    driver = url.set(drivername="postgresql+psycopg")
    writer = create_engine(driver, pool_size=1, **options)
    readers = create_engine(driver, pool_size=READERS, execution_options={"postgresql_readonly": True}, **options)
    return Connections(writer, readers, url.render_as_string(hide_password=True), None, None)


def _unusable(place: str, cause: str) -> StoreUnavailable:
    return StoreUnavailable(
        f"{place} cannot be used", cause=cause, remedy="Correct the setting store.url, or the place that it names"
    )
