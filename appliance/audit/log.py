"""The log on disk: the journal that appends wait for, and the tiles that everybody reads.

Rules:

- One process has a log: `lock` is held from before anything is read until the process ends.
- Nothing here has a key. Drafts come sealed; a checkpoint is signed by who called `publish`.
- Tiles, bundles and records follow from the journal: they may be written twice, and the journal lets go of an entry
  only when all that holds it is on the disk.
- At every moment the folder holds all that its checkpoint names: a file is put in its place whole, the checkpoint
  comes after what it names, and what it replaced goes after it.
- A log that is shorter than its own checkpoint is not gone on with: something was taken away.

C2SP tlog-tiles; the layout is in docs/decisions/0010-audit-log.md.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from appliance.audit.entry import ENTRY_BYTES, Draft, Entry, EntryInvalid, number
from appliance.audit.files import read_file, sync_directory, write_at
from appliance.audit.journal import Frame, Journal, JournalUnusable
from appliance.audit.tree import (
    EMPTY_ROOT,
    HASH_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    Frontier,
    leaf_hash,
    root_of_row,
    tile_path,
)
from appliance.errors import Fault, HoldfastError

CHECKPOINT: Final = "checkpoint"
JOURNAL: Final = "journal"
WITNESSED: Final = "checkpoints"
PUBLIC_KEY: Final = "log.vkey"
_LOCK: Final = "lock"
_LET_GO_AFTER: Final = 16  # bundles: the journal is written anew that seldom
_SYNCED_TOGETHER: Final = 64  # files, which are open meanwhile
_LENGTH: Final = struct.Struct(">H")


class LogInUse(HoldfastError):
    """Another process appends to the log."""

    code: ClassVar[str] = "audit_log_in_use"
    fault: ClassVar[Fault] = Fault.CONFLICT


class LogDamaged(HoldfastError):
    """The log is not what its own checkpoint says."""

    code: ClassVar[str] = "audit_log_damaged"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class LogUnwritable(HoldfastError, OSError):
    """The log cannot be read or written."""

    code: ClassVar[str] = "audit_log_unwritable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class Stamp(NamedTuple):
    """A moment by both clocks; nanoseconds."""

    wall_ns: int
    monotonic_ns: int


class Head(NamedTuple):
    """The tree at a size."""

    size: int
    root: bytes


class Found(NamedTuple):
    """The checkpoint that an earlier run left, as its file says; nothing of it is verified.

    `age_s`: by the wall clock and the file's time, when the log was opened; at least 0.
    """

    size: int
    age_s: float


class Publication(NamedTuple):
    """What makes the tree at a size readable: files that are kept, and parts that the next publication replaces."""

    head: Head
    kept: dict[str, bytes]
    parts: dict[str, bytes]


class AuditLog:
    """An open log. Made by `AuditLog.open`."""

    def __init__(
        self, directory: Path, lock: int, journal: Journal, *, boot_id: bytes, clock: Callable[[], Stamp]
    ) -> None:
        self._directory = directory
        self._lock = lock
        self._journal = journal
        self._boot_id = boot_id
        self._clock = clock
        self._tail: list[Frame] = []  # from the journal's base
        # What each level of tiles has since its last full one: of 0 leaf hashes, of the others roots of tiles below.
        # An append leaves the hashing of its leaves to `prepare`: nobody waits for it.
        self._rows: list[list[bytes]] = [[]]
        self._next_bundle = journal.base // TILE_WIDTH
        self._owed: dict[str, bytes] = {}  # full tiles that are not known to be on the disk
        self.cut_bytes = 0
        self.published = Head(0, EMPTY_ROOT)  # by this run
        self.found: Found | None = None

    @classmethod
    def open(cls, directory: Path, *, boot_id: bytes, clock: Callable[[], Stamp]) -> "AuditLog":
        """Open or create the log in `directory`, and recover it. Where `cut_bytes` of it were cut off, what is appended
        first is to tell so: until then, each start finds them anew.

        Raises:
            LogInUse: another process has it.
            LogDamaged: entries that were published are missing.
            LogUnwritable: it cannot be read or written.
        """
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise unwritable(directory, error.errno or errno.EIO) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise LogInUse(
                "the audit log has an appender already",
                cause=f"another process holds {directory / _LOCK}",
                remedy="One node has one log and one appender: end the other one",
            ) from None
        try:
            journal, recovered = Journal.open(directory / JOURNAL)
            log = cls(directory, lock, journal, boot_id=boot_id, clock=clock)
            log.cut_bytes = recovered.cut_bytes
            log._take_up(recovered.frames)
        except JournalUnusable as error:
            os.close(lock)
            raise unwritable(error.path, error.number) from None
        except OSError as error:
            os.close(lock)
            raise unwritable(directory, error.errno or errno.EIO) from None
        except BaseException:
            os.close(lock)
            raise
        return log

    @property
    def size(self) -> int:
        """How many entries it has; all of them are on the disk."""
        return self._journal.base + len(self._tail)

    def recent_nonces(self, at_least: int) -> list[tuple[int, bytes]]:
        """The sequence and the nonce of each entry of the journal; of bundled ones too, if these are not `at_least`."""
        entries = [Entry.unpack(frame.entry) for frame in self._tail]
        end, stride = self._journal.base // TILE_WIDTH, _LENGTH.size + ENTRY_BYTES
        more = max(0, at_least - len(entries))
        for index in range(max(0, end - -(-more // TILE_WIDTH)), end):
            # What retention removed, or somebody damaged, stops no start.
            with contextlib.suppress(OSError, EntryInvalid):
                data = read_file(self._directory / tile_path("entries", index))
                entries += [Entry.unpack(data[at + _LENGTH.size : at + stride]) for at in range(0, len(data), stride)]
        return [(entry.sequence, entry.nonce) for entry in entries]

    def append(self, drafts: Sequence[Draft], *, privileged: bool = False) -> int:
        """Number, stamp and write drafts; they are on the disk when this returns. The first one's sequence.

        Raises:
            LogUnwritable: none of them is in the log.
        """
        first, stamp = self.size, self._clock()
        frames = [
            Frame(
                number(
                    draft,
                    sequence=first + place,
                    wall_ns=stamp.wall_ns,
                    monotonic_ns=stamp.monotonic_ns,
                    boot_id=self._boot_id,
                ),
                draft.sealed,
            )
            for place, draft in enumerate(drafts)
        ]
        try:
            self._journal.append(frames, privileged=privileged)
        except JournalUnusable as error:
            raise unwritable(error.path, error.number) from None
        self._tail += frames
        return first

    def hash_appended(self) -> None:
        """Hash what was appended since: whoever has a moment for it need not find that for a publication."""
        hashed = self._next_bundle * TILE_WIDTH + len(self._rows[0])
        self._rows[0] += [leaf_hash(frame.entry) for frame in self._tail[hashed - self._journal.base :]]

    def publish(self, sign: Callable[[Head], str]) -> Head:
        """Write tiles for everything that was appended, and the checkpoint that `sign` makes of it.

        Raises:
            LogUnwritable: nothing is lost; call it again.
        """
        publication = self.prepare()
        self.write(publication, sign(publication.head))
        self.conclude(publication)
        return publication.head

    def prepare(self) -> Publication:
        """What there is to publish now. Writes nothing."""
        self._fill_tiles()
        return Publication(Head(self.size, self._root()), dict(self._owed), self._parts())

    def write(self, publication: Publication, note: str) -> None:
        """Write a publication and its checkpoint. Blocks, and may do so in another thread: it changes only files.

        Raises:
            LogUnwritable: it can be written again, or a later one in its place.
        """
        try:
            kept = list(publication.kept.items())
            for first in range(0, len(kept), _SYNCED_TOGETHER):
                self._put_durably(dict(kept[first : first + _SYNCED_TOGETHER]))
            for directory in sorted(self._folders(publication.kept), reverse=True):
                sync_directory(directory)
            for name, content in publication.parts.items():
                self._put(name, content)
            self._put_durably({CHECKPOINT: note.encode()})
            sync_directory(self._directory)
            self._drop_replaced(publication)
        except OSError as error:
            raise unwritable(Path(error.filename or self._directory), error.errno or errno.EIO) from None

    def conclude(self, publication: Publication) -> None:
        """A publication was written: the journal need not hold what it keeps."""
        for name in publication.kept:
            self._owed.pop(name, None)
        self.published = publication.head
        if not self._owed:
            self._let_go()

    def close(self) -> None:
        """Give the log up."""
        self._journal.close()
        os.close(self._lock)

    # Starting

    def _take_up(self, frames: list[Frame]) -> None:
        base = self._journal.base
        level, complete = 1, base // TILE_WIDTH
        while complete:
            pending = complete % TILE_WIDTH
            row = [root_of_row(self._read_tile(level - 1, index)) for index in range(complete - pending, complete)]
            self._rows.append(row)
            level, complete = level + 1, complete // TILE_WIDTH
        self._tail = frames
        self.found = self._find_checkpoint()
        claimed = 0 if self.found is None else self.found.size
        if claimed > self.size:
            raise LogDamaged(
                f"the audit log in {self._directory} is shorter than its checkpoint",
                cause=f"its checkpoint is of {claimed} entries, and {self.size} are there",
                remedy="Put the whole folder back as it was; `holdfast audit verify` names what is wrong with it",
            )

    def _find_checkpoint(self) -> Found | None:
        path = self._directory / CHECKPOINT
        try:
            lines = path.read_text(encoding="utf-8").split("\n", 2)
            written_ns = path.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        if len(lines) < 2 or not (lines[1].isascii() and lines[1].isdigit()):
            return None
        return Found(int(lines[1]), max(0, self._clock().wall_ns - written_ns) / 1e9)

    def _read_tile(self, level: int, index: int) -> bytes:
        path = self._directory / tile_path(level, index)
        tile = path.read_bytes()
        if len(tile) != TILE_WIDTH * HASH_BYTES:
            raise LogDamaged(
                f"{path} is not a whole tile",
                cause=f"it has {len(tile)} bytes",
                remedy="Restore the file from a copy; `holdfast audit verify` names what is wrong",
            )
        return tile

    # Publishing

    def _fill_tiles(self) -> None:
        """Move what fills tiles from the rows to what is owed to the disk."""
        self.hash_appended()
        while len(self._rows[0]) >= TILE_WIDTH:
            index = self._next_bundle
            first = index * TILE_WIDTH - self._journal.base
            frames = self._tail[first : first + TILE_WIDTH]
            self._owed[tile_path("entries", index)] = _bundle([frame.entry for frame in frames])
            self._owed[record_path(index)] = _bundle([frame.sealed for frame in frames])
            self._fill_tile(0, index)
            self._next_bundle += 1

    def _fill_tile(self, level: int, index: int) -> None:
        tile = b"".join(self._rows[level][:TILE_WIDTH])
        del self._rows[level][:TILE_WIDTH]
        self._owed[tile_path(level, index)] = tile
        if level + 1 == len(self._rows):
            self._rows.append([])
        self._rows[level + 1].append(root_of_row(tile))
        if len(self._rows[level + 1]) == TILE_WIDTH:
            self._fill_tile(level + 1, index // TILE_WIDTH)

    def _parts(self) -> dict[str, bytes]:
        """For readers of the format only: a start does not need them, so nothing waits for the disk."""
        parts: dict[str, bytes] = {}
        for level, row in enumerate(self._rows):
            if not row:
                continue
            index = self.size >> (TILE_HEIGHT * (level + 1))
            parts[tile_path(level, index, len(row))] = b"".join(row)
            if level == 0:
                frames = self._tail[index * TILE_WIDTH - self._journal.base :]
                parts[tile_path("entries", index, len(row))] = _bundle([frame.entry for frame in frames])
                parts[record_path(index, len(row))] = _bundle([frame.sealed for frame in frames])
        return parts

    def _put(self, name: str, content: bytes) -> None:
        """Put a file in its place, whole: nobody sees a part of it, whatever ends this process."""
        os.close(self._staged(name, content))
        self._unstage(name)

    def _put_durably(self, files: Mapping[str, bytes]) -> None:
        """As `_put`, and they are on the disk. All are written before the first is synced, so that they share syncs."""
        with contextlib.ExitStack() as opened:
            descriptors = []
            for name, content in files.items():
                descriptors.append(self._staged(name, content))
                opened.callback(os.close, descriptors[-1])
            for descriptor in descriptors:
                os.fsync(descriptor)
        for name in files:
            self._unstage(name)

    def _staged(self, name: str, content: bytes) -> int:
        path = self._directory / name
        _make_private(path.parent)
        descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_at(descriptor, content, 0)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    def _unstage(self, name: str) -> None:
        path = self._directory / name
        path.with_name(f"{path.name}.new").replace(path)

    def _folders(self, names: Iterable[str]) -> set[Path]:
        """Those that files are in, up to the log's own."""
        folders = {self._directory}
        for name in names:
            folder = (self._directory / name).parent
            while folder not in folders:
                folders.add(folder)
                folder = folder.parent
        return folders

    def _drop_replaced(self, publication: Publication) -> None:
        """Remove the parts that the checkpoint before named, and this one does not."""
        for name in publication.kept:
            shutil.rmtree(self._directory / f"{name}.p", ignore_errors=True)
        for name in publication.parts:
            path = self._directory / name
            for other in path.parent.iterdir():
                if other.name != path.name:
                    other.unlink()

    def _let_go(self) -> None:
        """Begin the journal anew where bundles end, once enough of them are written."""
        bundled = self._next_bundle * TILE_WIDTH
        if bundled - self._journal.base >= _LET_GO_AFTER * TILE_WIDTH:
            kept = self._tail[bundled - self._journal.base :]
            # Where there is no room for a new one, the old one does: it only holds what is in bundles once more.
            with contextlib.suppress(JournalUnusable):
                self._journal.shorten(bundled, kept)
                self._tail = kept

    def _root(self) -> bytes:
        edge = Frontier()
        for level, row in reversed(list(enumerate(self._rows))):
            for node in row:
                edge.append_subtree(TILE_HEIGHT * level, node)
        return edge.root()


def record_path(index: int, width: int = TILE_WIDTH) -> str:
    """Where the sealed records of a bundle are."""
    return tile_path("entries", index, width).replace("tile/entries/", "record/", 1)


def unwritable(path: Path, number_: int) -> LogUnwritable:
    """What the system's error means to a person."""
    return LogUnwritable(
        "the audit log cannot be written",
        cause=f"{path}: {os.strerror(number_)}",
        remedy="Make room on its file system"
        if number_ in (errno.ENOSPC, errno.EDQUOT)
        else "Mend the file system, or the rights of the folder; the log goes on by itself then",
    )


def _make_private(directory: Path) -> None:
    """Make a folder and those above it; `Path.mkdir` gives only the last one its mode."""
    if not directory.is_dir():
        _make_private(directory.parent)
        directory.mkdir(mode=0o700, exist_ok=True)


def _bundle(parts: Sequence[bytes]) -> bytes:
    return b"".join([_LENGTH.pack(len(part)) + part for part in parts])
