"""What a log was given since a proof began, and whether that is known to be all of it.

Rules:

- The log's file is held open from that moment on: what was written to it is read, whatever becomes of its name.
- A log that was turned over once is read in both its files. What is gone, or too much, is said.
"""

import os
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

_MOST_BYTES: Final = 32 << 20


class Added(NamedTuple):
    """A text to look at. `missing`: why there is more that cannot be looked at; empty: this is all."""

    text: bytes
    missing: str = ""


class GrowingLog:
    """A log, of which is told what was written to it since this was made. Its methods block: they read files.

    Args:
        path: the log; what is set aside of it has the same name with `.1`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = _opened(path)
        self._size = 0 if self._began is None else os.fstat(self._began.fileno()).st_size

    def close(self) -> None:
        """Let the file go."""
        if self._began is not None:
            self._began.close()

    def added(self) -> Added:
        """What was written since."""
        newest = _opened(self._path)  # before the other: one that is turned over meanwhile is found twice, not never
        aside = _opened(self._path.with_name(f"{self._path.name}.1"))
        try:
            return self._added(newest, aside)
        except OSError as error:
            return Added(b"", f"it cannot be read: {error.strerror}")
        finally:
            for file in (newest, aside):
                if file is not None:
                    file.close()

    def _added(self, newest: BinaryIO | None, aside: BinaryIO | None) -> Added:
        files, from_byte, missing = [self._began, aside, newest], self._size, ""
        if newest is None:
            missing = "there is no log that can be read"
        elif self._began is not None and os.path.samestat(_stat(self._began), _stat(newest)):
            files = [self._began]
            if _stat(newest).st_size < self._size:
                from_byte, missing = 0, "the log was cut"
        elif self._began is not None and aside is not None and os.path.samestat(_stat(self._began), _stat(aside)):
            files = [self._began, newest]
        elif self._began is not None or aside is not None:
            missing = "the log was turned over more than once"
        text = bytearray()
        for file in files:
            if file is not None:
                file.seek(from_byte if file is self._began else 0)
                text += file.read(_MOST_BYTES + 1 - len(text))
        if len(text) > _MOST_BYTES:
            missing = f"the log was given more than {_MOST_BYTES} bytes"
        return Added(bytes(text), missing)


def _opened(path: Path) -> BinaryIO | None:
    try:
        return path.open("rb")
    except OSError:
        return None


def _stat(file: BinaryIO) -> os.stat_result:
    return os.fstat(file.fileno())
