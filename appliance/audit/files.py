"""Files of the log, read and written so that nobody waits for ever and nothing is half there.

Rule: a log may be a copy that somebody made to harm its reader. What is no regular file is not read (whoever opens a
pipe waits for its writer), nor is more than a file can have if nobody changed it.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Final

_MOST_BYTES: Final = 32 << 20  # a bundle of the longest records has half as many


def open_regular(path: Path, *, most: int | None = None) -> int:
    """A descriptor of a regular file, to read it.

    Args:
        most: bytes that it may have.

    Raises:
        OSError: it cannot be opened, or is no regular file; `errno.EFBIG`: it has more.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        if most is not None and found.st_size > most:
            raise OSError(errno.EFBIG, f"it is longer than {most} bytes", str(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, *, most: int | None = _MOST_BYTES) -> bytes:
    """What is in a file.

    Args:
        most: bytes that it may have; None: as many as there is memory for.

    Raises:
        OSError: as `open_regular`.
    """
    descriptor = open_regular(path, most=most)
    try:
        return read_all(descriptor)
    except MemoryError:
        raise OSError(errno.EFBIG, "it is longer than there is memory for", str(path)) from None
    finally:
        os.close(descriptor)


def read_all(descriptor: int) -> bytes:
    """What is in an open file, from its beginning."""
    size = os.fstat(descriptor).st_size
    parts = []
    at = 0
    while at < size and (part := os.pread(descriptor, size - at, at)):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at a place."""
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], offset + written)


def write_whole(path: Path, content: bytes) -> None:
    """Put a private file in the place of the one before; it is on the disk when this returns.

    Raises:
        OSError: the one before is there, or the new one: whole, whichever it is.
    """
    staged = path.with_name(f"{path.name}.new")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(staged, flags, 0o600)
    try:
        write_at(descriptor, content, 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    staged.replace(path)
    sync_directory(path.parent)
