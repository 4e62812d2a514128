"""The file that an append waits for: frames of entry and sealed record, many to one `fdatasync`.

Rules:

- What `append` returned is on the disk, under the journal's name. What it raised for is not in the log, and never will
  be.
- Space is taken ahead of the frames: what follows the last one is zeros, on a full disk too. The last `RESERVE_BYTES`
  of it are for privileged entries: an administrator can still act, and leave a record of it, when nobody is served.
- A frame is whole, or the journal ends before it: the length, the sequence and a CRC-32 say so. What ends it is
  overwritten with zeros, and how much that was is told: by each start until something was appended, which tells it.

A frame: a 16-bit length of the sealed record, the entry, the sealed record, CRC-32 of these; big-endian.
"""

import contextlib
import errno
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from appliance.audit.entry import ENTRY_BYTES, FORMAT
from appliance.audit.files import read_all, read_file, sync_directory, write_at

RESERVE_BYTES: Final = 512 << 10
_AHEAD_BYTES: Final = 4 << 20
_HEAD: Final = struct.Struct(">16sQ")
FRAMES_AT: Final = _HEAD.size
_MAGIC: Final = b"holdfast-audit-1"
_LENGTH: Final = struct.Struct(">H")
_CRC: Final = struct.Struct(">I")
_SEQUENCE: Final = struct.Struct(">Q")
_SEQUENCE_AT: Final = 4


class Frame(NamedTuple):
    """An entry's bytes, and its sealed record."""

    entry: bytes
    sealed: bytes


class Recovered(NamedTuple):
    """What a start found: the frames, and the bytes behind them that were no frame."""

    frames: list[Frame]
    cut_bytes: int


class JournalUnusable(Exception):
    """The journal cannot be read or written; `number` is the system's error, `path` the file."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(f"{path}: {os.strerror(number)}")
        self.path = path
        self.number = number


class Journal:
    """An open journal. Made by `Journal.open`; one process has it."""

    def __init__(self, path: Path, descriptor: int, base: int, end: int, taken: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self.base = base  # the sequence of its first frame
        self._end = end  # everything before it is on the disk
        self._taken = taken  # the length of the file
        self._dirty_until = end  # what lies between the two may not be zeros
        self._cut_bytes = 0  # what a start cut off, until the next append: its last byte is left, and is no zero
        self._name_is_durable = False  # the directory is synced since the file was put there

    @classmethod
    def open(cls, path: Path) -> tuple["Journal", Recovered]:
        """Open or create it, and cut off what is not whole. What is appended next is to tell of that.

        Raises:
            JournalUnusable: it cannot be read or written, or is no journal.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if path.exists() else _write_new(path, 0, b"")
        except OSError as error:
            raise JournalUnusable(path, error.errno or errno.EIO) from error
        try:
            content = read_all(descriptor)
            magic, base = _HEAD.unpack_from(content) if len(content) >= _HEAD.size else (b"", 0)
            if magic != _MAGIC:
                raise JournalUnusable(path, errno.EILSEQ)
            frames, end = _frames(content, base)
            cut_bytes = len(content[end:].rstrip(b"\0"))
            journal = cls(path, descriptor, base, end, len(content))
            journal._cut_bytes = cut_bytes
            journal._dirty_until += cut_bytes
            journal._clean()
            # Whoever wrote the last frames, or put the file there, may have been killed before it was on the disk.
            os.fsync(descriptor)
            journal._sync_name()
            with contextlib.suppress(OSError):
                journal._take(0, RESERVE_BYTES)
        except OSError as error:
            os.close(descriptor)
            raise JournalUnusable(path, error.errno or errno.EIO) from error
        except JournalUnusable:
            os.close(descriptor)
            raise
        return journal, Recovered(frames, cut_bytes)

    @property
    def length(self) -> int:
        """Bytes up to the last frame."""
        return self._end

    def append(self, frames: Sequence[Frame], *, privileged: bool) -> None:
        """Write frames and wait until they are on the disk.

        Raises:
            JournalUnusable: none of them is in the log; `errno.ENOSPC`: only privileged ones would be.
        """
        data = b"".join([_packed(frame) for frame in frames])
        try:
            self._sync_name()
            self._clean()
            self._take(len(data), 0 if privileged else RESERVE_BYTES)
            self._dirty_until = self._end + len(data)
            write_at(self._descriptor, data, self._end)
            os.fdatasync(self._descriptor)
        except OSError as error:
            # After a failed sync nobody knows what is on the disk: it is overwritten now, or before the next append.
            with contextlib.suppress(OSError):
                self._clean()
            raise JournalUnusable(self._path, error.errno or errno.EIO) from error
        told_until = self._end + self._cut_bytes
        self._end += len(data)
        if self._cut_bytes:
            self._cut_bytes = 0
            self._dirty_until = max(self._end, told_until)
            with contextlib.suppress(OSError):
                self._clean()

    def shorten(self, base: int, frames: Sequence[Frame]) -> None:
        """Begin anew at `base` with the frames that follow it: what was before is in tiles now.

        The new file is the journal as soon as it has the name. Until that is on the disk, nothing is appended.

        Raises:
            JournalUnusable: there is no room for a new one and its reserve; the journal is as it was.
        """
        data = b"".join([_packed(frame) for frame in frames])
        try:
            descriptor = _write_new(self._path, base, data)
        except OSError as error:
            raise JournalUnusable(self._path, error.errno or errno.EIO) from error
        replaced, self._descriptor = self._descriptor, descriptor
        self.base = base
        self._end = self._dirty_until = _HEAD.size + len(data)
        self._taken = self._end + RESERVE_BYTES
        self._name_is_durable = False
        with contextlib.suppress(OSError):
            os.close(replaced)
        with contextlib.suppress(OSError):
            self._sync_name()

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)

    def _take(self, size: int, reserve: int) -> None:
        """Make sure of space for `size` bytes, and of `reserve` behind them."""
        if self._end + size + reserve <= self._taken:
            return
        free = os.fstatvfs(self._descriptor)
        for ahead in (_AHEAD_BYTES, RESERVE_BYTES):
            wanted = size + ahead
            if ahead == _AHEAD_BYTES and free.f_bavail * free.f_frsize < 2 * wanted:
                continue  # an attempt that fails holds what is left for a moment, and others write there, too
            try:
                os.posix_fallocate(self._descriptor, self._end, wanted)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
            else:
                # The length is metadata: once synced here, it need not be with every append.
                os.fsync(self._descriptor)
                self._taken = self._end + wanted
                return
        if self._end + size + reserve > self._taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync_name(self) -> None:
        """Have the file found under its name, whatever happens to the machine."""
        if not self._name_is_durable:
            sync_directory(self._path.parent)
            self._name_is_durable = True

    def _clean(self) -> None:
        """Write zeros over what was written behind the last frame. The space stays taken."""
        if self._dirty_until > self._end:
            rest = bytearray(self._dirty_until - self._end)
            if 0 < self._cut_bytes <= len(rest):
                rest[self._cut_bytes - 1] = 1
            write_at(self._descriptor, bytes(rest), self._end)
            os.fsync(self._descriptor)
            self._dirty_until = self._end


class JournalContent(NamedTuple):
    """What a journal holds.

    Attributes:
        base: the sequence of the first frame.
        end_bytes: where the frames end.
        rest_bytes: how much is behind the frames that is not zeros.
    """

    base: int
    frames: list[Frame]
    end_bytes: int
    rest_bytes: int


def first_sequence(descriptor: int) -> int:
    """The sequence of the first frame of an open journal; it stands at `FRAMES_AT`.

    Raises:
        OSError: it cannot be read, or is none: `EILSEQ`.
    """
    head = os.pread(descriptor, _HEAD.size, 0)
    magic, base = _HEAD.unpack(head) if len(head) == _HEAD.size else (b"", 0)
    if magic != _MAGIC:
        raise OSError(errno.EILSEQ, os.strerror(errno.EILSEQ))
    return int(base)


def read_journal(path: Path) -> JournalContent | None:
    """Read a journal without opening it for writing; None: there is none."""
    try:
        content = read_file(path, most=None)
    except FileNotFoundError:
        return None
    magic, base = _HEAD.unpack_from(content) if len(content) >= _HEAD.size else (b"", 0)
    if magic != _MAGIC:
        return JournalContent(0, [], 0, len(content))
    frames, end = _frames(content, base)
    return JournalContent(base, frames, end, len(content[end:].rstrip(b"\0")))


def _packed(frame: Frame) -> bytes:
    data = _LENGTH.pack(len(frame.sealed)) + frame.entry + frame.sealed
    return data + _CRC.pack(zlib.crc32(data))


def frames_of(content: bytes, first: int, *, most: int) -> tuple[list[Frame], int]:
    """The whole frames that a part of a journal begins with, `first` the first one's sequence, and their length."""
    return _frames(content, first, at=0, most=most)


def _frames(content: bytes, base: int, *, at: int = _HEAD.size, most: int | None = None) -> tuple[list[Frame], int]:
    """The whole frames from `at` on, at most so many, and where they end."""
    frames: list[Frame] = []
    while at + _LENGTH.size + ENTRY_BYTES + _CRC.size <= len(content) and len(frames) != most:
        (length,) = _LENGTH.unpack_from(content, at)
        begin = at + _LENGTH.size
        middle = begin + ENTRY_BYTES
        end = middle + length
        if end + _CRC.size > len(content) or content[begin] != FORMAT:
            break
        if _SEQUENCE.unpack_from(content, begin + _SEQUENCE_AT) != (base + len(frames),):
            break
        if _CRC.unpack_from(content, end) != (zlib.crc32(content[at:end]),):
            break
        frames.append(Frame(content[begin:middle], content[middle:end]))
        at = end + _CRC.size
    return frames, at


def _write_new(path: Path, base: int, data: bytes) -> int:
    """Put a new journal in the place of an old one, or of none; its descriptor. The directory is not synced."""
    staged = path.with_name(f"{path.name}.new")
    descriptor = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        content = _HEAD.pack(_MAGIC, base) + data
        write_at(descriptor, content, 0)
        os.posix_fallocate(descriptor, len(content), RESERVE_BYTES)
        os.fsync(descriptor)
        staged.replace(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
