"""Copies SQLite's write-ahead log back into the database file: beside the writer, not in the way of a commit.

Rules:

- A checkpoint blocks no reader, and a commit does not wait for one as long as the thread keeps up.
- The log is bounded: where it outgrows `_OVERDUE_BYTES`, the writer stands still, copies the rest and cuts it. Only a
  read that lasts holds that back, until the log has grown by as much again.
- A checkpoint that fails loses nothing, and is tried again with the next commits.

https://www.sqlite.org/wal.html#ckpt
"""

import os
import sqlite3
import threading
from pathlib import Path

_EVERY_CHANGE_SETS = 100
_OVERDUE_BYTES = 32 << 20
_WAIT_S = 0.05  # for reads that do not last: every commit waits as long


class Checkpoints:
    """The thread that checkpoints one database file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._one_at_a_time = threading.Lock()
        self._wanted = threading.Event()
        self._log = f"{path}-wal"
        self._longest = _OVERDUE_BYTES
        self._closed = False
        self._since = 0
        self._thread = threading.Thread(target=self._run, name="store-checkpoints", daemon=True)
        self._thread.start()

    def committed(self, change_sets: int) -> None:
        """Told by the writer after each commit, in its thread and outside of a transaction."""
        self._since += change_sets
        if (length := self._length()) > self._longest:
            self._longest = _OVERDUE_BYTES if self.cut() else length + _OVERDUE_BYTES
        elif self._since >= _EVERY_CHANGE_SETS:
            self._since = 0
            self._wanted.set()

    def cut(self) -> bool:
        """Copy everything back and cut the log to nothing, in the writer's thread.

        False: a read holds the log, or the disk takes no more.
        """
        with self._one_at_a_time:
            try:
                self._connection.execute(f"PRAGMA busy_timeout = {int(_WAIT_S * 1000)}").fetchone()
                held_back, _, _ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            except sqlite3.Error:
                return False
        return not held_back

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
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error:
                return  # a disk that is full, say; the writer will say so

    def _length(self) -> int:
        try:
            return os.stat(self._log).st_size  # noqa: PTH116 (after every commit: a Path is slower)
        except OSError:
            return 0
