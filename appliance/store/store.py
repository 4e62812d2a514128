"""The database: read from anywhere, written by one thread that commits in groups.

Rules:

- A write is durable when it returns, and not there at all when it raises.
- What reads or waits to be written is bounded in number and in time.
- A value reaches neither a log nor an error.
- Whether others may write to the same database is known (`exclusive`): only what is exclusive may be cached.

Example:
    store = Store.open("sqlite:////var/lib/holdfast/holdfast.db")
    await store.write([Change(INSERT_NAME, {"name": "schema", "value": "1"})])
    value = await store.read(lambda db: db.execute(SELECT_VALUE).scalar())
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Sequence
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from sqlalchemy import Connection, Engine, bindparam, delete, insert, literal, select

from appliance.store import connections, erasure, schema, tables
from appliance.store.checkpoints import Checkpoints
from appliance.store.connections import Connections
from appliance.store.erasures import Erasures
from appliance.store.errors import BackupFailed, BackupUnsupported, ErasureHeld, busy, closed, meaning
from appliance.store.writer import Change, Waiting, Writer

T = TypeVar("T")

_WAITING_READS = 4096
_ERASE_TRIES = 10
_ERASE_PAUSE_S = 0.5
_PROBE = "written-to"
_LOOK = select(literal(1))
_PROBED = insert(tables.meta)
_FORGET_PROBE = delete(tables.meta).where(tables.meta.c.name == bindparam("b_name"))


class Store:
    """An open database. Made by `Store.open`.

    Attributes:
        erasures: what was deleted and is to be erased.
    """

    def __init__(self, connected: Connections) -> None:
        self._connections = connected
        self._checkpoints = None if connected.path is None else Checkpoints(connected.path)
        committed = _nothing if self._checkpoints is None else self._checkpoints.committed
        self._writer = Writer(connected.writer, connected.place, self._meaning, committed)
        self._readers = futures.ThreadPoolExecutor(connections.READERS, thread_name_prefix="store-reader")
        self._reading = 0
        self._closed = False
        self.dialect: str = connected.writer.dialect.name
        self.erasures = Erasures(self)

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Open a database, and create or migrate its tables. Blocks.

        Args:
            url: `sqlite:////absolute/path` or `postgresql://user@host/name`.
            create: whether what is not there is made; what was written by an earlier version is migrated always.

        Raises:
            StoreEmpty: it is not there, or has no tables, and nothing is to be created.
            SchemaTooNew: a newer version wrote it.
            StoreInUse: another process has the file open.
            StoreUnavailable, StoreFull: it cannot be reached, or not be created.
        """
        connected = connections.connect(url, create=create)
        try:
            schema.upgrade(connected.writer, connected.place, create=create)
            return cls(connected)
        except BaseException as error:
            connected.close()
            explained = meaning(error, connected.place, connected.path)
            if explained is error:
                raise
            raise explained from None

    @property
    def exclusive(self) -> bool:
        """Whether nobody else can write to this database while it is open here."""
        return self._connections.exclusive

    @property
    def place(self) -> str:
        """What the database is called in messages: its path, or its URL without the password."""
        return self._connections.place

    @property
    def waiting_writes(self) -> int:
        """How many change sets wait for the writer."""
        return self._writer.depth

    async def read(self, query: Callable[[Connection], T]) -> T:
        """What `query` returns, which runs in a thread on one snapshot and cannot write.

        Raises:
            StoreBusy: too many reads are waiting.
            StoreUnavailable: the database cannot be reached.
        """
        if self._closed:
            raise closed(self.place)
        if self._reading >= _WAITING_READS:
            raise busy(self.place, _WAITING_READS)
        self._reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, self.read_blocking, query)
        finally:
            self._reading -= 1

    def read_blocking(self, query: Callable[[Connection], T]) -> T:
        """As `read`, in this thread."""
        if self._closed:
            raise closed(self.place)
        try:
            with self._connections.readers.begin() as db:
                return query(db)
        except Exception as error:
            explained = self._meaning(error)
            if explained is error:
                raise
            raise explained from None

    async def write(self, changes: Sequence[Change]) -> None:
        """Write `changes` in their order, all or none; durable on return. Cancelled, it is written all the same.

        Raises:
            StoreConflict, StoreDefect: they contradict what is stored, or are nothing that could be.
            StoreFull, StoreBusy, StoreUnavailable: nothing was written.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._writer.put(Waiting(future, loop, changes=changes))
        await future

    def write_blocking(self, changes: Sequence[Change]) -> None:
        """As `write`, in this thread. Never from within `transact`."""
        future: futures.Future[None] = futures.Future()
        self._writer.put(Waiting(future, None, changes=changes))
        future.result()

    async def transact(self, work: Callable[[Connection], T]) -> T:
        """What `work` returns, which runs alone in the writer's thread, in a transaction; committed on return.

        `work` must not use the vault to encrypt, nor this store: both would wait for the writer.

        Raises:
            StoreConflict, StoreFull, StoreBusy, StoreUnavailable: nothing was written.
            Exception: whatever `work` raised; nothing was written.
        """

        def alone(engine: Engine) -> T:
            with engine.begin() as db:
                return work(db)

        return await self._alone(alone)

    async def check(self) -> None:
        """Whether this can be read and, where the last write failed, written to again.

        Raises:
            StoreFull, StoreBusy, StoreUnavailable: it cannot.
        """
        if self._writer.failure is not None:
            await self.write(
                [Change(_FORGET_PROBE, {"b_name": _PROBE}), Change(_PROBED, {"name": _PROBE, "value": ""})]
            )
        await self.read(lambda db: db.execute(_LOOK).scalar())

    async def erase(self, *, is_rewritten: bool = False) -> None:
        """Make the deletion of keys true on disk: what was deleted is in no file of the database when this returns.

        A backup or another long read holds this up for some seconds, and commits for a moment only.

        Args:
            is_rewritten: nothing was deleted since this raised `ErasureHeld`.

        Raises:
            ErasureHeld: somebody reads what was deleted; call it again.
            StoreFull, StoreUnavailable: deleted bytes may still be there; call it again.
        """
        step: Callable[[Engine], bool] = erasure.rewrite_postgresql_keys
        if self._checkpoints is not None:
            if not is_rewritten:
                await self._alone(erasure.rewrite_sqlite_keys)
            step = partial(_cut, self._checkpoints)
        for tries_left in reversed(range(_ERASE_TRIES)):
            if await self._alone(step):
                return
            if tries_left:
                await asyncio.sleep(_ERASE_PAUSE_S)
        raise ErasureHeld(
            "deleted keys may still be on the disk",
            cause="a backup or another read holds them there, or the disk takes no more",
            remedy="Do it again when the backup that runs now is over and the disk has room",
        )

    async def backup(self, path: Path) -> None:
        """Write a consistent copy of the running SQLite database to the new file `path`, 0600.

        Raises:
            BackupUnsupported: the database is a server's.
            BackupFailed: `path` exists or cannot be written.
        """
        source = self._connections.path
        if source is None:
            raise BackupUnsupported(
                f"{self.place} is not backed up by the appliance",
                cause="it is a server's, and has its own tools",
                remedy="Use pg_dump or pg_basebackup, and keep root.sealed with it",
            )
        await asyncio.get_running_loop().run_in_executor(self._readers, _copy, source, path)

    def close(self) -> None:
        """Write what is waiting, then close. Blocks; closing again does nothing."""
        if self._closed:
            return
        self._writer.close()
        self._closed = True
        self._readers.shutdown()
        if self._checkpoints is not None:
            self._checkpoints.close()
        self._connections.close()

    async def _alone(self, work: Callable[[Engine], T]) -> T:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._writer.put(Waiting(future, loop, alone=work))
        return await future

    def _meaning(self, error: BaseException) -> BaseException:
        return meaning(error, self._connections.place, self._connections.path)


def _cut(checkpoints: Checkpoints, _: Engine) -> bool:
    return checkpoints.cut()


def _nothing(change_sets: int) -> None:
    """A server keeps its own log."""


def _copy(source: Path, path: Path) -> None:
    """`VACUUM INTO`: one snapshot, without what was deleted; complete and on the disk when `path` appears."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        os.close(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(source, isolation_level=None)
        try:
            connection.execute("VACUUM INTO ?", (str(staged),))
        finally:
            connection.close()
        _sync(staged)
        os.link(staged, path)  # unlike a rename, never replaces anything
        _sync(path.parent)
    except (OSError, sqlite3.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BackupFailed(
            f"no backup was written to {path}",
            cause=reason or type(error).__name__,
            remedy="Choose a new file in a directory with room for a copy of the database",
        ) from None
    finally:
        staged.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
