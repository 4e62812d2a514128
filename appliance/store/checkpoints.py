"""Copies SQLite's write-ahead log back into the database file: beside the writer, not in the way of a commit.

Rules:

- A checkpoint never blocks a reader, and a commit never waits for a checkpoint of more than `_OVERDUE_FRAMES`.
- The log is bounded: once it is overdue, the writer copies the rest between two commits, while it stands still. Only a
  read that lasts holds it back.
- A checkpoint that fails loses nothing, and is tried again with the next commits.

https://www.sqlite.org/wal.html#ckpt
"""

import sqlite3
import threading
from pathlib import Path

from appliance.store.errors import StoreUnavailable

_EVERY_CHANGE_SETS = 100
_OVERDUE_FRAMES = 8192  # 32 MiB of pages
_WAIT_S = 5.0


class Checkpoints:
    """The thread that checkpoints one database file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=_WAIT_S, check_same_thread=False)
        self._one_at_a_time = threading.Lock()
        self._wanted = threading.Event()
        self._overdue = False
        self._closed = False
        self._since = 0
        self._thread = threading.Thread(target=self._run, name="store-checkpoints", daemon=True)
        self._thread.start()

    def committed(self, change_sets: int) -> None:
        """Told by the writer after each commit, in its thread and outside of a transaction."""
        self._since += change_sets
        if self._overdue:
            self._copy_back()
            self._since = 0
        elif self._since >= _EVERY_CHANGE_SETS:
            self._since = 0
            self._wanted.set()

    def cut(self) -> None:
        """Copy everything back and cut the log to nothing. The writer must stand still.

        Raises:
            StoreUnavailable: a read held the log for too long.
        """
        with self._one_at_a_time:
            held_back, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if held_back:
            raise StoreUnavailable(
                "deleted keys may still be on the disk",
                cause=f"a read held the write-ahead log for more than {_WAIT_S:.0f} s",
                remedy="Do it again when the reads that run now are over",
            )

    def close(self) -> None:
        self._closed = True
        self._wanted.set()
        self._thread.join()
        self._connection.close()

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closed:
                return
            self._copy_back()

    def _copy_back(self) -> None:
        with self._one_at_a_time:
            try:
                _, frames, copied = self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error:
                return
        self._overdue = frames > _OVERDUE_FRAMES and copied < frames
