"""Follows a log that somebody else appends to: from any entry on, a few at a time, holding none of it.

Rules:

- Nothing is verified here: who needs that calls `verify_log`.
- What was read is not read again: a journal is read from where the last frames of it ended, a bundle is read once.
- Entries that the appender has not answered for may yet be taken back: who follows says how far it has.
"""

import bisect
import os
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from appliance.audit.files import open_regular, read_file
from appliance.audit.journal import FRAMES_AT, Frame, first_sequence, frames_of
from appliance.audit.log import CHECKPOINT, JOURNAL
from appliance.audit.notes import decode_note, size_of_note
from appliance.audit.reading import LogUnreadable, hashes_of, is_kept, read_bundle, unreadable
from appliance.audit.tree import TILE_WIDTH, Frontier, leaf_hash

_READ_BYTES: Final = 256 << 10  # of the journal at once: more than the longest frame


class Published(NamedTuple):
    """A checkpoint as it was signed, and how many entries it names; 0: there is none."""

    note: str
    size: int


class LogFollower:
    """The log in `directory`. One task uses it; everything here blocks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._next = 0  # where in the journal the next entry stands, if it is still the same journal
        self._at = FRAMES_AT
        self._bundle: tuple[int, list[Frame]] = (-1, [])
        self._note = (-1, -1, Published("", 0))

    def published(self) -> Published:
        """Its newest checkpoint.

        Raises:
            LogUnreadable: it cannot be read.
        """
        path = self._directory / CHECKPOINT
        try:
            status = path.stat()
            if self._note[:2] != (status.st_ino, status.st_mtime_ns):
                note = decode_note(read_file(path))
                published = Published(note, size_of_note(note))
                self._note = (status.st_ino, status.st_mtime_ns, published)
        except FileNotFoundError:
            return Published("", 0)
        except OSError as error:
            raise unreadable(path, error) from None
        return self._note[2]

    def frames(self, first: int, end: int, *, most: int) -> list[Frame]:
        """Entries from `first` on, at most `most` and none from `end` on; fewer where a file ends.

        Raises:
            LogUnreadable: they are not there, or cannot be read.
        """
        most = min(most, end - first)
        if most <= 0:
            return []
        path = self._directory / JOURNAL
        try:
            descriptor = open_regular(path)
            try:
                base = first_sequence(descriptor)
                if first >= base:
                    return self._from_journal(descriptor, base, first, most)
            finally:
                os.close(descriptor)
        except LogUnreadable:
            raise
        except OSError as error:
            raise unreadable(path, error) from None
        index, place = divmod(first, TILE_WIDTH)
        if self._bundle[0] != index:
            self._bundle = (index, read_bundle(self._directory, index))
        return self._bundle[1][place : place + most]

    def oldest(self, first: int) -> int:
        """The first entry from `first` on that is still there: those before it were removed, by whom verification says.

        Raises:
            LogUnreadable: that cannot be seen.
        """
        path = self._directory / JOURNAL
        try:
            descriptor = open_regular(path)
            try:
                base = first_sequence(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise unreadable(path, error) from None
        kept = partial(is_kept, self._directory)
        if first >= base or kept(first // TILE_WIDTH):
            return first
        bundles = range(first // TILE_WIDTH, base // TILE_WIDTH)
        return (bundles.start + bisect.bisect_left(bundles, True, key=kept)) * TILE_WIDTH

    def peaks(self, size: int) -> tuple[bytes, ...]:
        """The roots of the complete subtrees of the first `size` entries, which a checkpoint names.

        Raises:
            LogUnreadable: a tile cannot be read.
        """
        return Frontier.read(hashes_of(self._directory, self.published().size), size).peaks

    def leaf(self, sequence: int) -> bytes:
        """The hash of an entry; it stays where the entry was removed.

        Raises:
            LogUnreadable, TileInvalid: it cannot be read.
        """
        published = self.published().size
        if sequence < published:
            return hashes_of(self._directory, published).hash_at(0, sequence)
        return leaf_hash(self.frames(sequence, sequence + 1, most=1)[0].entry)

    def _from_journal(self, descriptor: int, base: int, first: int, most: int) -> list[Frame]:
        # Another journal may stand in the place of the one that was read, and have its inode: what is not where it
        # was left is looked for from the beginning.
        found = [] if first < self._next else self._go_on(descriptor, first, most)
        if not found:
            self._next, self._at = base, FRAMES_AT
            found = self._go_on(descriptor, first, most)
        if not found:
            raise LogUnreadable(
                "the audit log cannot be read",
                cause=f"{self._directory / JOURNAL} ends before entry {first}, which its appender has written",
                remedy="`holdfast audit verify` names what is wrong with the log",
            )
        return found

    def _go_on(self, descriptor: int, first: int, most: int) -> list[Frame]:
        found: list[Frame] = []
        while len(found) < most:
            content = os.pread(descriptor, _READ_BYTES, self._at)
            wanted = first + most - self._next
            frames, length = frames_of(content, self._next, most=wanted)
            if not frames:
                break
            found += frames[max(0, first - self._next) :]
            self._next += len(frames)
            self._at += length
        return found
