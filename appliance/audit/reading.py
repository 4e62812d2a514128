"""Reads a log that somebody else writes: entries, sealed records and hashes, by their number.

Rules:

- Nothing is verified here: who needs that calls `verify_log`, or checks a proof.
- What is read is what the newest checkpoint names, and behind it what the journal has. A log that grows meanwhile is
  read as it was when the reader was made.
"""

import bisect
import contextlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit.entry import CLASS_AT, ENTRY_BYTES, WALL_NS_AT, Entry
from appliance.audit.files import read_file
from appliance.audit.journal import Frame, read_journal
from appliance.audit.log import CHECKPOINT, JOURNAL, record_path
from appliance.audit.notes import decode_note, size_of_note
from appliance.audit.tree import HASH_BYTES, TILE_WIDTH, TileHashes, tile_path
from appliance.errors import Fault, HoldfastError

_CACHED_BUNDLES: Final = 8
STRIDE: Final = 2 + ENTRY_BYTES
_WALL_CLOCKS: Final = struct.Struct(">" + f"{2 + WALL_NS_AT}xq{ENTRY_BYTES - WALL_NS_AT - 8}x" * TILE_WIDTH)


class NoSuchEntry(HoldfastError, LookupError):
    """The log has no entry of that number, or does not have it any more."""

    code: ClassVar[str] = "audit_no_such_entry"
    fault: ClassVar[Fault] = Fault.MISSING


class EntryRemoved(NoSuchEntry):
    """The log had the entry; it was removed when it was older than the retention."""

    code: ClassVar[str] = "audit_entry_removed"


class LogUnreadable(HoldfastError, OSError):
    """There is no log, or a file of it cannot be read."""

    code: ClassVar[str] = "audit_log_unreadable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class LogReader:
    """The log in `directory`, as it is now.

    Attributes:
        note: its newest checkpoint, signed; empty: there is none yet.
        published: how many entries that names.
        size: how many there are.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._bundles: OrderedDict[int, list[Frame]] = OrderedDict()
        # The checkpoint first: the journal lets go only of what an earlier one names.
        self.note = self._note()
        self.published = size_of_note(self.note) if self.note else 0
        try:
            journal = read_journal(directory / JOURNAL)
        except OSError as error:
            raise unreadable(directory / JOURNAL, error) from None
        if journal is None:
            raise LogUnreadable(
                f"there is no audit log in {directory}",
                cause=f"{directory / JOURNAL} is not there",
                remedy="Name the folder of the log with --log",
            )
        self._base = journal.base
        self._tail = journal.frames
        self.size = max(self.published, self._base + len(self._tail))

    @property
    def bundled(self) -> int:
        """The entries before this one are in bundles alone; the journal has let go of them."""
        return self._base

    @property
    def oldest(self) -> int:
        """The first entry that is still there. Those before it were removed; by whom, verification says.

        Raises:
            LogUnreadable: that cannot be seen.
        """
        bundles = range(self._base // TILE_WIDTH)
        if not bundles or self._is_kept(0):
            return 0
        return bisect.bisect_left(bundles, True, key=self._is_kept) * TILE_WIDTH

    def frame(self, sequence: int) -> Frame:
        """An entry's bytes and its sealed record.

        Raises:
            EntryRemoved: it is not there any more.
            NoSuchEntry: there is none of that number.
            LogUnreadable: its file cannot be read.
        """
        if not 0 <= sequence < self.size:
            raise NoSuchEntry(
                f"the audit log has no entry {sequence}",
                cause=f"it has {self.size}, counted from 0",
                remedy="`holdfast audit status` tells how many there are",
            )
        if sequence >= self._base + len(self._tail):
            raise LogUnreadable(
                "the audit log's journal is damaged",
                cause=f"it ends before entry {sequence}, which a checkpoint names",
                remedy="`holdfast audit verify` names what is wrong",
            )
        if sequence >= self._base:
            return self._tail[sequence - self._base]
        bundle, place = divmod(sequence, TILE_WIDTH)
        return self._bundle(bundle)[place]

    def entry(self, sequence: int) -> Entry:
        """An entry's fields. Raises as `frame`."""
        return Entry.unpack(self.frame(sequence).entry)

    def backwards(self, end: int, start: int = 0) -> Iterator[tuple[Entry, bytes]]:
        """The entries of [start, end) that are still there, with their sealed records, the newest first.

        Raises as `frame`.
        """
        for sequence in range(end - 1, start - 1, -1):
            try:
                frame = self.frame(sequence)
            except EntryRemoved:
                return
            yield Entry.unpack(frame.entry), frame.sealed

    def newest(self, classes: Collection[int], *, most: int) -> Iterator[tuple[Entry, bytes]]:
        """Those of the newest `most` entries that are of these classes and still there, the newest first, with their
        sealed records.

        Of the others it reads the class alone, and no record: far faster than `backwards`. Raises as `frame`.
        """
        start = max(0, self.size - most)
        for bundle in range((self.size - 1) // TILE_WIDTH, start // TILE_WIDTH - 1, -1):
            first, end = max(start, bundle * TILE_WIDTH), min(self.size, (bundle + 1) * TILE_WIDTH)
            try:
                found = self._classes(bundle, first, end)
                for sequence in range(end - 1, first - 1, -1):
                    if found[sequence - first] in classes:
                        frame = self.frame(sequence)
                        yield Entry.unpack(frame.entry), frame.sealed
            except EntryRemoved:
                return

    def _classes(self, bundle: int, first: int, end: int) -> Sequence[int]:
        """The classes of the entries of [first, end), which are of one bundle."""
        if (bundle + 1) * TILE_WIDTH > self._base:
            frames = [self.frame(sequence) for sequence in range(first, end)]
            return [int.from_bytes(frame.entry[CLASS_AT : CLASS_AT + 2], "big") for frame in frames]
        self._must_be_kept(bundle)
        data = _read(self._directory / tile_path("entries", bundle))
        if len(data) != STRIDE * TILE_WIDTH:
            raise _damaged(bundle, len(data) // STRIDE)
        high, low = data[2 + CLASS_AT :: STRIDE], data[3 + CLASS_AT :: STRIDE]
        places = range(first - bundle * TILE_WIDTH, end - bundle * TILE_WIDTH)
        return [high[place] << 8 | low[place] for place in places]

    def wall_clocks(self, start: int, end: int) -> Sequence[int]:
        """What the wall clock said at each entry of [start, end), in nanoseconds; they are of one bundle.

        Of a bundle it takes nothing else apart, and reads no record: far faster than `frame`. Raises as that does.
        """
        bundle = start // TILE_WIDTH
        if (bundle + 1) * TILE_WIDTH > self._base:
            return [self.entry(sequence).wall_ns for sequence in range(start, end)]
        self._must_be_kept(bundle)
        data = _read(self._directory / tile_path("entries", bundle))
        if len(data) != _WALL_CLOCKS.size:
            raise _damaged(bundle, len(data) // STRIDE)
        return _WALL_CLOCKS.unpack(data)[start - bundle * TILE_WIDTH : end - bundle * TILE_WIDTH]

    def hashes(self, size: int | None = None) -> TileHashes:
        """The hashes of what a checkpoint of `size` entries names; by default the newest."""
        return hashes_of(self._directory, self.published if size is None else size)

    def _note(self) -> str:
        path = self._directory / CHECKPOINT
        try:
            return decode_note(read_file(path))
        except FileNotFoundError:
            return ""
        except OSError as error:
            raise unreadable(path, error) from None

    def _is_kept(self, bundle: int) -> bool:
        return is_kept(self._directory, bundle)

    def _must_be_kept(self, bundle: int) -> None:
        if not self._is_kept(bundle) and bundle * TILE_WIDTH < (oldest := self.oldest):
            raise removed(bundle * TILE_WIDTH, oldest)

    def _bundle(self, index: int) -> list[Frame]:
        frames = self._bundles.get(index)
        if frames is None:
            self._must_be_kept(index)
            frames = self._bundles[index] = read_bundle(self._directory, index)
            if len(self._bundles) > _CACHED_BUNDLES:
                self._bundles.popitem(last=False)
        return frames


def hashes_of(directory: Path, size: int) -> TileHashes:
    """The hashes of the tree of `size` entries, which a checkpoint of the log in `directory` names."""

    def read_tile(level: int, index: int, width: int) -> bytes:
        path = directory / tile_path(level, index, width)
        try:
            return read_file(path)
        except OSError as error:
            wider = read_wider(directory, partial(tile_path, level, index), width)
            if wider is None:
                raise unreadable(path, error) from None
            return wider[: width * HASH_BYTES]

    return TileHashes(read_tile, size)


def read_wider(directory: Path, name_of: Callable[[int], str], width: int) -> bytes | None:
    """What newer checkpoints put in the place of the part of `width` that `name_of` names; it begins with that part.

    From the narrowest on: one that vanishes meanwhile has a wider one in its place already. None: there is none.
    """
    for more in range(width + 1, TILE_WIDTH + 1):
        with contextlib.suppress(OSError):
            return read_file(directory / name_of(more))
    return None


def is_kept(directory: Path, bundle: int) -> bool:
    """Whether the log in `directory` still has a full bundle.

    Raises:
        LogUnreadable: that cannot be seen.
    """
    path = directory / record_path(bundle)  # a removal takes the records first
    try:
        return path.exists()
    except OSError as error:
        raise unreadable(path, error) from None


def read_bundle(directory: Path, index: int) -> list[Frame]:
    """The entries of a full bundle of the log in `directory`, with their sealed records.

    Raises:
        LogUnreadable: it is not whole, or cannot be read.
    """
    entries = _read(directory / tile_path("entries", index))
    sealed = list(prefixed_parts(_read(directory / record_path(index))))
    frames = [
        Frame(entries[at + 2 : at + STRIDE], record)
        for at, record in zip(range(0, len(entries), STRIDE), sealed, strict=False)
    ]
    if len(frames) != TILE_WIDTH:
        raise _damaged(index, len(frames))
    return frames


def prefixed_parts(data: bytes) -> Iterator[bytes]:
    """The parts of a file, each with 16 bits of length before it; one that is cut off is none."""
    at, size = 0, len(data)
    while at + 2 <= size:
        end = at + 2 + (data[at] << 8 | data[at + 1])
        if end > size:
            return
        yield data[at + 2 : end]
        at = end


def removed(first: int, oldest: int) -> EntryRemoved:
    """That the entries from `first` on are not there any more."""
    return EntryRemoved(
        f"the entries from {first} on are not in the audit log any more",
        cause=f"the oldest that it keeps is entry {oldest}; those before it were removed",
        remedy="`holdfast audit status` tells how long entries are kept, `holdfast audit verify` whether they were "
        "removed rightfully; a backup, or the SIEM, may have them",
    )


def unreadable(path: Path, error: OSError) -> LogUnreadable:
    """What the system's error means to a person."""
    return LogUnreadable(
        "the audit log cannot be read",
        cause=f"{path}: {error.strerror or error}",
        remedy="Read it as the appliance's user, or from a copy of the whole folder",
    )


def _damaged(bundle: int, entries: int) -> LogUnreadable:
    return LogUnreadable(
        f"the bundle from entry {bundle * TILE_WIDTH} on is damaged",
        cause=f"it has {entries} entries instead of {TILE_WIDTH}",
        remedy="`holdfast audit verify` names what is wrong",
    )


def _read(path: Path) -> bytes:
    try:
        return read_file(path)
    except OSError as error:
        raise unreadable(path, error) from None
