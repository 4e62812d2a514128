"""Checks a whole log with its public key and nothing else.

Rules:

- Verification raises, and names the first entry that is wrong and the file that says so.
- Everything is read once, bundle by bundle: memory does not grow with the log.
- What is checked: the checkpoint's signature; every entry's number, format and sealed record; every tile against the
  entries; the root; every co-signed checkpoint; both clocks. Nobody's key is needed, and nothing is decrypted.
- A kept checkpoint has the log's signature once, and besides it co-signatures of the witnesses that were named, each
  of which is checked. Any other line is tampering, unless who asks lets it pass: then it is named and counted.
- What follows the newest checkpoint is in the journal alone. It is checked as far as it can be, and counted apart:
  whoever can write the folder can still cut it off.
- What retention removed is missing rightfully, as far as the log's own newest removal says and no further: its hashes
  are taken from the tree, and the root holds over them.
- A clock that was set is no tampering: it is reported with the entry at which it was.
- A log may be written meanwhile. What holds is what one checkpoint names: the newest at the beginning. A part of a tile
  that is gone is read from the wider one in its place, but only if a newer checkpoint is signed. Where a bundle is
  gone, the pass goes on to the newest checkpoint, which may name its removal, and holds it to the one before.
"""

import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import islice
from operator import gt, sub
from pathlib import Path
from typing import Any, ClassVar, Final

from appliance.audit.entry import ENTRY_BYTES, FORMAT
from appliance.audit.files import read_file
from appliance.audit.journal import Frame, JournalContent, read_journal
from appliance.audit.log import CHECKPOINT, JOURNAL, PUBLIC_KEY, WITNESSED, record_path
from appliance.audit.notes import (
    Checkpoint,
    NoteInvalid,
    VerifierKey,
    cosignatures,
    decode_note,
    open_checkpoint,
    signers,
)
from appliance.audit.reading import STRIDE, LogReader, prefixed_parts, read_wider
from appliance.audit.retention import Removal, newest_removal
from appliance.audit.tree import (
    HASH_BYTES,
    TILE_HEIGHT,
    TILE_WIDTH,
    Frontier,
    leaf_hash,
    leaf_hashes,
    root_of_row,
    tile_path,
)
from appliance.errors import Fault, HoldfastError

_ENTRY_LENGTH: Final = struct.pack(">H", ENTRY_BYTES)
_FIELDS: Final = struct.Struct(">BxxxQqQ16s112x32s")  # format, sequence, wall, monotonic, boot id, sealed hash
_CLOCK_STEP_NS: Final = 1_000_000_000
_MOST_STEPS: Final = 1000
_MOST_VIEWS: Final = 10
_MOST_PAUSES: Final = 10
_PAUSE_S: Final = 0.2

Progress = Callable[[int, int], None]
Cut = Callable[[bytes], bytes]


class LogTampered(HoldfastError, ValueError):
    """The log is not what was written.

    Attributes:
        sequence: the first entry that is wrong; None: it is not an entry that is wrong.
    """

    code: ClassVar[str] = "audit_log_tampered"
    fault: ClassVar[Fault] = Fault.CONFLICT

    def __init__(self, message: str, *, cause: str, sequence: int | None = None, remedy: str = "") -> None:
        remedy = remedy or (
            "Keep this copy as it is, and compare it with a witness's checkpoint and with what the SIEM received"
        )
        super().__init__(message, cause=cause, remedy=remedy)
        self.sequence = sequence


@dataclass(frozen=True, slots=True)
class ClockStep:
    """A place where the wall clock and the monotonic one disagree.

    Attributes:
        sequence: the first entry after it.
        step_ns: how far the wall clock was set forward; back, if negative.
    """

    sequence: int
    step_ns: int


@dataclass(frozen=True, slots=True)
class Removed:
    """What retention removed.

    Attributes:
        count: entries whose bundles are not there.
        kept_from: what the log says: all before this one are removed, or about to be.
        missing: how many of them were gone before they were due, as retention found.
        said_by: the entry that says so; `said_ns`: when, `days`: the retention that was set then.
    """

    count: int
    kept_from: int
    missing: int
    said_by: int
    said_ns: int
    days: int


@dataclass(slots=True)
class Verified:
    """What was found to hold.

    Attributes:
        size: entries under the checkpoint.
        unsigned: entries behind it, which only the journal has.
        boots: how many starts of the machine wrote them.
        witnessed: the largest size that each witness co-signed, and when, in seconds since the epoch.
        unknown: of co-signatures that nobody checked: whose they say they are, and how many checkpoints have one.
        clock_steps: where the wall clock was set; at most 1,000 of them.
        removed: what is not there any more, rightfully; None: everything is there.
    """

    origin: str
    size: int
    root: bytes
    first_wall_ns: int | None = None
    last_wall_ns: int | None = None
    unsigned: int = 0
    boots: int = 0
    witnessed: dict[str, tuple[int, int]] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    clock_steps: list[ClockStep] = field(default_factory=list)
    removed: Removed | None = None

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "origin": self.origin,
            "size": self.size,
            "root": self.root.hex(),
            "unsigned": self.unsigned,
            "boots": self.boots,
            "first_wall_ns": self.first_wall_ns,
            "last_wall_ns": self.last_wall_ns,
            "witnessed": {name: {"size": size, "time_s": time_s} for name, (size, time_s) in self.witnessed.items()},
            "unknown_witnesses": dict(self.unknown),
            "clock_steps": [{"sequence": step.sequence, "step_ns": step.step_ns} for step in self.clock_steps],
            "removed": None if self.removed is None else asdict(self.removed),
        }


def _pause() -> None:
    time.sleep(_PAUSE_S)


def verify_log(
    directory: Path,
    key: VerifierKey,
    *,
    witnesses: Sequence[VerifierKey] = (),
    saw: Mapping[VerifierKey, int] | None = None,
    allow_unknown: bool = False,
    at_least: int = 0,
    progress: Progress | None = None,
    pause: Callable[[], None] = _pause,
) -> Verified:
    """Check the log in `directory`.

    Args:
        key: the log's public key. From outside of the folder: whoever changes the log can change `log.vkey`.
        witnesses: whose co-signatures are checked; each must have co-signed something.
        saw: sizes that some of them are known to have co-signed, or larger ones; 0: it need not have co-signed any.
        allow_unknown: count co-signatures of other witnesses, which cannot be checked; else they are tampering.
        at_least: a size that the log is known to have had.
        progress: told of entries done, and of all; there may become more of them.
        pause: waits a moment for an append that is being written; called a bounded number of times.

    Raises:
        LogTampered: names the first entry that is wrong, or the file.
    """
    _check_public_key(directory, key)
    witnessed, unknown = _witnessed(directory, key, witnesses)
    if unknown and not allow_unknown:
        raise next(iter(unknown.values()))[0]
    view = _view(directory, key, pause)
    checkpoint = view.checkpoint
    for seen in witnessed:
        if seen.checkpoint.size > checkpoint.size:
            raise LogTampered(
                "the log was cut off",
                cause=f"a witness saw {seen.checkpoint.size} entries ({seen.path}), "
                f"and the checkpoint is of {checkpoint.size}",
                sequence=checkpoint.size,
            )
    if checkpoint.size < at_least:
        raise LogTampered(
            "the log was cut off",
            cause=f"it has {checkpoint.size} entries, and had {at_least}",
            sequence=checkpoint.size,
        )
    run = _Run(view, key, pause, witnessed)
    run.entries(progress)
    run.journal()
    run.found.unknown = {name: len(told) for name, told in unknown.items()}
    for witness in witnesses:
        size, known = run.saw.get(witness, 0), (saw or {}).get(witness)
        if size < (known or 0):
            raise LogTampered(
                f"what {witness.name} co-signed last is missing",
                cause=f"it saw {known} entries, and the largest checkpoint with its co-signature in "
                f"{directory / WITNESSED} is of {size}",
            )
        if witness not in run.saw and known != 0:
            raise LogTampered(
                f"{witness.name} co-signed nothing of this log",
                cause=f"there is no checkpoint with its co-signature in {directory / WITNESSED}",
            )
    return run.found


@dataclass(frozen=True, slots=True)
class _View:
    """A log at one moment: a checkpoint, and a journal that goes on from there."""

    directory: Path
    checkpoint: Checkpoint
    journal: JournalContent | None


class _Run:
    """One pass over a log."""

    def __init__(self, view: _View, key: VerifierKey, pause: Callable[[], None], witnessed: "list[_Witnessed]") -> None:
        self._directory = view.directory
        self._key = key
        self._pause = pause
        self._view = view
        self._earlier: list[Checkpoint] = []  # where the pass was to end before, and has not come to yet
        self._edge = Frontier()
        self._roots: list[list[bytes]] = []  # of full tiles, by the level above, since that level's last full tile
        self._pending = sorted(witnessed, key=lambda each: each.checkpoint.size)
        self._boot = b""
        self._boots: set[bytes] = set()
        self._clocks = (0, 0)
        self._removal: Removal | None = None  # the newest, looked up once something is missing
        self._root_at_removal = b""  # of the tree that it says it knew
        self.saw: dict[VerifierKey, int] = {}  # the largest size that each witness co-signed
        self.found = Verified(view.checkpoint.origin, view.checkpoint.size, view.checkpoint.root)

    @property
    def _size(self) -> int:
        return self._view.checkpoint.size

    def entries(self, progress: Progress | None) -> None:
        """Everything under the checkpoint."""
        while self._edge.size < self._size:
            first = self._edge.size
            bundle, width = first // TILE_WIDTH, min(TILE_WIDTH, self._size - first)
            frames = _Frames([], [])
            found = self._frames(bundle, width)
            if found is None:
                hashes = self._hashes_of_missing(bundle, width)
            else:
                frames, damage = found
                tile = self._tile(0, bundle, width, first)
                hashes = self._checked(frames, first, tile)
                if damage is not None:
                    # An entry before it may be another one, too.
                    self._compare(0, bundle, width, hashes, tile[: len(hashes) * HASH_BYTES])
                    raise damage
                self._compare(0, bundle, width, hashes, tile)
            self._check_removal(first, hashes, frames)
            self._check_earlier(first, hashes)
            self._check_witnessed(first, hashes)
            self._check_journal(first, hashes, frames)
            if len(hashes) == TILE_WIDTH:
                self._add_tile(hashes)
            else:
                for each in hashes:
                    self._edge.append(each)
            if progress is not None:
                progress(self._edge.size, self._size)
        self._check_upper_tiles()
        root = self._edge.root()
        if root != self._view.checkpoint.root:
            raise _another(self._view.checkpoint, root)
        removal = self._removal
        if removal is not None and self._root_at_removal != removal.root:
            raise LogTampered(
                f"entry {removal.sequence} removed entries of another log",
                cause=f"it says that {removal.size} entries had the root {removal.root.hex()}",
                sequence=removal.sequence,
            )
        self.found.size, self.found.root = self._size, root
        self.found.boots = len(self._boots)

    def journal(self) -> None:
        """What the journal has that no checkpoint names yet."""
        content = self._view.journal
        if content is None:
            raise LogTampered("the journal is missing", cause=f"{self._directory / JOURNAL} is not there")
        if content.base > self._size or content.base % TILE_WIDTH:
            raise LogTampered(
                "the journal does not follow the log",
                cause=f"{self._directory / JOURNAL} begins at {content.base}, and the checkpoint is of {self._size}",
                sequence=self._size,
            )
        end = content.base + len(content.frames)
        if end < self._size or content.rest_bytes:
            raise LogTampered(
                f"the journal is damaged at entry {end}",
                cause=f"{self._directory / JOURNAL} has {content.rest_bytes} bytes there that are no entry",
                sequence=end,
            )
        self._checked(_Frames.of(content.frames[self._size - content.base :]), self._size, None)
        self.found.unsigned = end - self._size

    def _check_journal(self, first: int, hashes: list[bytes], frames: "_Frames") -> None:
        """What the journal has once more of a bundle; `frames` are none where it was removed."""
        content = self._view.journal
        if content is None:
            return
        begin, end = max(first, content.base), min(first + len(hashes), content.base + len(content.frames))
        for sequence in range(begin, end):
            again = content.frames[sequence - content.base]
            at = sequence - first
            differ = again != frames.at(at) if len(frames) else leaf_hash(again.entry) != hashes[at]
            if differ:
                raise LogTampered(
                    f"entry {sequence} is two",
                    cause=f"{self._directory / JOURNAL} and the bundles differ",
                    sequence=sequence,
                )

    def _hashes_of_missing(self, bundle: int, width: int) -> list[bytes]:
        """The leaf hashes of a bundle that retention removed: the root has them, so they hold or it does not."""
        first = bundle * TILE_WIDTH
        if self._removal is None or first >= self._removal.kept_from:
            self._go_on_to_newest()
            self._removal = self._newest_removal(first) or self._removal
        removal = self._removal
        if removal is None or first >= removal.kept_from:
            said = "the log tells of no removal" if removal is None else f"removed are those before {removal.kept_from}"
            names = (tile_path("entries", bundle, width), record_path(bundle, width))
            paths = [self._directory / name for name in names]
            missing = [path for path in paths if not path.exists()] or paths
            raise LogTampered(
                f"what holds entry {first} is missing",
                cause=f"there is no {' and no '.join(map(str, missing))}, and {said}",
                sequence=first,
            )
        count = TILE_WIDTH if self.found.removed is None else self.found.removed.count + TILE_WIDTH
        self.found.removed = Removed(
            count, removal.kept_from, removal.missing, removal.sequence, removal.wall_ns, removal.days
        )
        path = self._directory / tile_path(0, bundle)
        tile = self._tile(0, bundle, TILE_WIDTH, first)
        if len(tile) != TILE_WIDTH * HASH_BYTES:
            raise LogTampered(
                f"entry {first} and the tree differ", cause=f"{path} has {len(tile)} bytes", sequence=first
            )
        return [tile[at : at + HASH_BYTES] for at in range(0, len(tile), HASH_BYTES)]

    def _go_on_to_newest(self) -> None:
        """Have the pass end at the checkpoint that is the newest now; that of before is on its way."""
        view = _view(self._directory, self._key, self._pause)
        if view.checkpoint.size < self._size:
            raise LogTampered(
                "the log was cut off while it was read",
                cause=f"its checkpoint was of {self._size} entries, and is of {view.checkpoint.size}",
                sequence=view.checkpoint.size,
            )
        if view.checkpoint != self._view.checkpoint:
            self._earlier.append(self._view.checkpoint)
        self._view = view

    def _newest_removal(self, start: int) -> Removal | None:
        try:
            return newest_removal(LogReader(self._directory), self._size, start)
        except HoldfastError:
            return None  # the log is damaged there, too: what is missing here comes first

    def _check_removal(self, first: int, hashes: list[bytes], frames: "_Frames") -> None:
        """What was believed of the removal stands in the tree; the root of the tree that it says it knew."""
        removal = self._removal
        if removal is None:
            return
        place = removal.sequence - first
        if 0 <= place < len(frames) and frames.at(place) != removal.frame:
            raise LogTampered(
                f"entry {removal.sequence} is two", cause="it changed while it was read", sequence=removal.sequence
            )
        if first < removal.size <= first + len(hashes):
            self._root_at_removal = self._root_at(removal.size, first, hashes)

    def _check_earlier(self, first: int, hashes: list[bytes]) -> None:
        """The checkpoints that the pass was to end at before they were followed by newer ones."""
        while self._earlier and self._earlier[0].size <= first + len(hashes):
            earlier = self._earlier.pop(0)
            root = self._root_at(earlier.size, first, hashes)
            if root != earlier.root:
                raise _another(earlier, root)

    def _root_at(self, size: int, first: int, hashes: list[bytes]) -> bytes:
        """The tree's root at a size within the bundle whose hashes these are."""
        edge = Frontier(self._edge.size, self._edge.peaks)
        for each in hashes[: size - first]:
            edge.append(each)
        return edge.root()

    def _frames(self, bundle: int, width: int) -> tuple["_Frames", LogTampered | None] | None:
        """A bundle's entries with their sealed records, and what is behind them that is none; None: it is not there."""
        first = bundle * TILE_WIDTH
        entries_path = self._directory / tile_path("entries", bundle, width)
        records_path = self._directory / record_path(bundle, width)
        names = partial(tile_path, "entries", bundle), partial(record_path, bundle)
        data = self._part(names[0], width, first, lambda wider: wider[: width * STRIDE])
        held = self._part(names[1], width, first, lambda wider: _first_parts(wider, width))
        if data is None or held is None:
            return None
        records = list(islice(prefixed_parts(held), width))
        starts = range(0, min(len(data) // STRIDE, width) * STRIDE, STRIDE)
        wrong = len(starts)
        if any(data[byte : starts.stop : STRIDE].count(_ENTRY_LENGTH[byte]) != wrong for byte in (0, 1)):
            wrong = next(place for place, at in enumerate(starts) if data[at : at + 2] != _ENTRY_LENGTH)
        place = min(wrong, len(records))
        frames = _Frames([data[at + 2 : at + STRIDE] for at in starts[:place]], records[:place])
        if place < width:
            return frames, LogTampered(
                f"entry {first + place} is damaged",
                cause=f"{entries_path if place == wrong else records_path} does not hold it whole",
                sequence=first + place,
            )
        more_bytes = {
            entries_path: len(data) - width * STRIDE,
            records_path: len(held) - sum(map(len, records)) - 2 * width,
        }
        for path, rest_bytes in more_bytes.items():
            if rest_bytes:
                return frames, LogTampered(
                    f"there is something behind entry {first + width - 1}",
                    cause=f"{path} has {rest_bytes} bytes more than {width} entries",
                    sequence=first + width,
                )
        return frames, None

    def _tile(self, level: int, index: int, width: int, sequence: int) -> bytes:
        names = partial(tile_path, level, index)
        tile = self._part(names, width, sequence, lambda wider: wider[: width * HASH_BYTES])
        if tile is None:
            raise LogTampered(
                f"what holds entry {sequence} is missing",
                cause=f"there is no {self._directory / tile_path(level, index, width)}",
                sequence=sequence,
            )
        return tile

    def _part(self, name_of: Callable[[int], str], width: int, sequence: int, cut: Cut) -> bytes | None:
        """A tile of some kind, or what is cut of the wider one that newer checkpoints put in its place; None: none."""
        path = self._directory / name_of(width)
        try:
            return read_file(path)
        except FileNotFoundError:
            if width == TILE_WIDTH or _newest(self._directory, self._key).size <= self._size:
                return None
            wider = read_wider(self._directory, name_of, width)
            return None if wider is None else cut(wider)
        except OSError as error:
            raise LogTampered(
                f"what holds entry {sequence} cannot be read", cause=f"{path}: {error.strerror}", sequence=sequence
            ) from None

    def _checked(self, frames: "_Frames", first: int, tile: bytes | None) -> list[bytes]:
        """The leaf hashes of frames that are what they have to be, up to the first that the tile does not have, if any.

        An entry that was changed blames the clock of the next one only once the tile has it.
        """
        if not len(frames):
            return []
        entries, records = frames.entries, frames.records
        hashes = leaf_hashes(entries)
        formats, sequences, walls, monotonics, boots, sealed_hashes = zip(
            *_FIELDS.iter_unpack(b"".join(entries)), strict=True
        )
        wall, monotonic = self._clocks
        ahead = [*map(sub, walls, monotonics), wall - monotonic]
        # All that holds of the whole at once, as it does of nearly every bundle, need not be asked of each entry.
        if (
            formats.count(FORMAT) != len(frames)
            or sequences != tuple(range(first, first + len(frames)))
            or boots.count(self._boot) != len(frames)
            or monotonics[0] < monotonic
            or any(map(gt, monotonics, monotonics[1:]))
            or max(ahead) - min(ahead) >= _CLOCK_STEP_NS
            or sealed_hashes != tuple([sha256(record).digest() for record in records])
        ):
            self._check_each(frames, first, hashes, tile)
        found = self.found
        if found.first_wall_ns is None:
            found.first_wall_ns = walls[0]
        found.last_wall_ns = walls[-1]
        self._boot, self._clocks = boots[-1], (walls[-1], monotonics[-1])
        return hashes

    def _check_each(self, frames: "_Frames", first: int, hashes: list[bytes], tile: bytes | None) -> None:
        """Name the first frame that is not what it has to be, or the steps of the clock that there are."""
        boot = self._boot
        wall, monotonic = self._clocks
        each = zip(frames.entries, frames.records, hashes, strict=True)
        for expected, (entry, sealed, leaf) in enumerate(each, first):
            known, sequence, now_wall, now_monotonic, now_boot, sealed_hash = _FIELDS.unpack(entry)
            if known != FORMAT or sequence != expected:
                raise LogTampered(
                    f"entry {expected} is another one",
                    cause=f"it has the format {known} and the number {sequence}",
                    sequence=expected,
                )
            if sha256(sealed).digest() != sealed_hash:
                raise LogTampered(
                    f"the record of entry {expected} was changed",
                    cause="it is not the one whose hash the entry holds",
                    sequence=expected,
                )
            at = (expected - first) * HASH_BYTES
            if tile is not None and tile[at : at + HASH_BYTES] != leaf:
                return  # who compares the whole tile names it
            if now_boot != boot:
                boot = now_boot
                self._boots.add(boot)
                if now_wall < wall:
                    self._step(expected, now_wall - wall)
            elif now_monotonic < monotonic:
                raise LogTampered(
                    f"entry {expected} is older than the one before it",
                    cause=f"within one boot its clock goes back by {(monotonic - now_monotonic) / 1e9:.3f} s",
                    sequence=expected,
                )
            elif not -_CLOCK_STEP_NS < (now_wall - wall) - (now_monotonic - monotonic) < _CLOCK_STEP_NS:
                self._step(expected, (now_wall - wall) - (now_monotonic - monotonic))
            wall, monotonic = now_wall, now_monotonic

    def _step(self, sequence: int, step_ns: int) -> None:
        if len(self.found.clock_steps) < _MOST_STEPS:
            self.found.clock_steps.append(ClockStep(sequence, step_ns))

    def _check_tile(self, level: int, index: int, width: int, hashes: list[bytes]) -> None:
        tile = self._tile(level, index, width, index << (TILE_HEIGHT * (level + 1)))
        self._compare(level, index, width, hashes, tile)

    def _compare(self, level: int, index: int, width: int, hashes: list[bytes], tile: bytes) -> None:
        if tile == b"".join(hashes):
            return
        first = index << (TILE_HEIGHT * (level + 1))
        path = self._directory / tile_path(level, index, width)
        place = next(
            (place for place, each in enumerate(hashes) if tile[place * HASH_BYTES : (place + 1) * HASH_BYTES] != each),
            width,
        )
        entry = first + (place << (TILE_HEIGHT * level))
        raise LogTampered(
            f"entry {entry} and the tree differ",
            cause=f"{path} does not hold the hash of what is there",
            sequence=entry,
        )

    def _add_tile(self, hashes: list[bytes]) -> None:
        """A full tile of level 0: its root, and those of the levels above that it fills."""
        root, level = root_of_row(b"".join(hashes)), 1
        self._edge.append_subtree(TILE_HEIGHT, root)
        while True:
            if len(self._roots) < level:
                self._roots.append([])
            row = self._roots[level - 1]
            row.append(root)
            if len(row) < TILE_WIDTH:
                return
            end = self._edge.size >> (TILE_HEIGHT * (level + 1))
            self._check_tile(level, end - 1, TILE_WIDTH, row)
            root = root_of_row(b"".join(row))
            row.clear()
            level += 1

    def _check_upper_tiles(self) -> None:
        """Those that are not full."""
        for level, row in enumerate(self._roots, 1):
            if row:
                self._check_tile(level, self._size >> (TILE_HEIGHT * (level + 1)), len(row), row)

    def _check_witnessed(self, first: int, hashes: list[bytes]) -> None:
        """The co-signed checkpoints that end in this bundle."""
        while self._pending and self._pending[0].checkpoint.size <= first + len(hashes):
            seen = self._pending.pop(0)
            if self._root_at(seen.checkpoint.size, first, hashes) != seen.checkpoint.root:
                raise LogTampered(
                    f"a witness saw another log of {seen.checkpoint.size} entries",
                    cause=f"{seen.path} is co-signed, and has another root: the log's history was written anew",
                )
            for witness, time_s in seen.by.items():
                self.saw[witness] = seen.checkpoint.size
                self.found.witnessed[witness.name] = (seen.checkpoint.size, time_s)


@dataclass(frozen=True, slots=True)
class _Frames:
    """Entries that follow one another, and beside them their sealed records: no object for each."""

    entries: list[bytes]
    records: list[bytes]

    @classmethod
    def of(cls, frames: Sequence[Frame]) -> "_Frames":
        return cls([frame.entry for frame in frames], [frame.sealed for frame in frames])

    def __len__(self) -> int:
        return len(self.entries)

    def at(self, place: int) -> Frame:
        return Frame(self.entries[place], self.records[place])


@dataclass(frozen=True, slots=True)
class _Witnessed:
    """A checkpoint that witnesses co-signed, and when each of them did."""

    path: Path
    checkpoint: Checkpoint
    by: dict[VerifierKey, int]


def _view(directory: Path, key: VerifierKey, pause: Callable[[], None]) -> _View:
    """What the log is now.

    The journal lets go of entries that a checkpoint names: it may have done so since the one that was read.
    """
    for _ in range(_MOST_VIEWS):
        checkpoint = _newest(directory, key)
        try:
            view = _View(directory, checkpoint, _journal(directory, checkpoint.size, pause))
        except OSError as error:
            raise LogTampered(
                "the journal cannot be read",
                cause=f"{directory / JOURNAL}: {error.strerror}",
                sequence=checkpoint.size,
            ) from None
        if view.journal is None or view.journal.base <= checkpoint.size:
            break
    return view


def _journal(directory: Path, size: int, pause: Callable[[], None]) -> JournalContent | None:
    """The journal; what is behind its frames counts as nothing once frames have taken its place.

    An append that is being written looks like one that was damaged, but becomes whole.
    """
    content = seen = read_journal(directory / JOURNAL)
    for _ in range(_MOST_PAUSES):
        if content is None or seen is None or not content.rest_bytes or content.base + len(content.frames) < size:
            break
        if content.base != seen.base:
            seen = content
        elif content.end_bytes >= seen.end_bytes + seen.rest_bytes:
            return content._replace(rest_bytes=0)
        pause()
        content = read_journal(directory / JOURNAL)
    return content


def _newest(directory: Path, key: VerifierKey) -> Checkpoint:
    path = directory / CHECKPOINT
    try:
        note = decode_note(read_file(path))
        checkpoint, by = open_checkpoint(note, key), signers(note)
    except OSError as error:
        raise LogTampered("there is no checkpoint", cause=f"{path}: {error.strerror}") from None
    except NoteInvalid as error:
        raise LogTampered("the checkpoint does not hold", cause=f"{path}: {error.cause}") from None
    if by != [key.signer]:
        raise LogTampered(
            "the checkpoint is not as it was written",
            cause=f"{path} has other signature lines than one of {key.name}",
        )
    return checkpoint


def _check_public_key(directory: Path, key: VerifierKey) -> None:
    """The key that lies with the log is its key; a copy may lack it."""
    path = directory / PUBLIC_KEY
    try:
        kept = read_file(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LogTampered("the log's public key cannot be read", cause=f"{path}: {error.strerror}") from None
    if kept != f"{key}\n".encode():
        raise LogTampered(
            "the public key that lies with the log is another one",
            cause=f"{path} is not {key}",
        )


def _witnessed(
    directory: Path, key: VerifierKey, witnesses: Sequence[VerifierKey]
) -> tuple[list[_Witnessed], dict[str, list[LogTampered]]]:
    """What is kept with co-signatures; and the lines of others than `witnesses`, by whose they say that they are."""
    found, unknown = [], dict[str, list[LogTampered]]()
    known = {key.signer, *(witness.signer for witness in witnesses)}
    folder = directory / WITNESSED
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.name.startswith("."):
            continue  # it is being written
        try:
            note = decode_note(read_file(path))
            checkpoint = open_checkpoint(note, key)
            lines = Counter(signers(note))
            by = {}
            for witness in witnesses:
                if witness.signer in lines:
                    by[witness] = max(each.time_s for each in cosignatures(note, witness))
        except FileNotFoundError:
            continue  # a running appliance keeps one of many (`witnessing.thin_out`)
        except OSError as error:
            raise LogTampered("a co-signed checkpoint cannot be read", cause=f"{path}: {error.strerror}") from None
        except NoteInvalid as error:
            raise LogTampered("a co-signed checkpoint does not hold", cause=f"{path}: {error.cause}") from None
        if path.name != str(checkpoint.size) or lines[key.signer] != 1:
            raise LogTampered(
                "a co-signed checkpoint is not as it was written",
                cause=f"{path} is of {checkpoint.size} entries, and {key.name} signed it {lines[key.signer]} times",
            )
        for signer in sorted(lines.keys() - known):
            unknown.setdefault(str(signer), []).append(_unknown(path, str(signer)))
        found.append(_Witnessed(path, checkpoint, by))
    return found, unknown


def _unknown(path: Path, signer: str) -> LogTampered:
    return LogTampered(
        "a co-signature cannot be checked",
        cause=f"{path} has a line of {signer}, which is none of the witnesses that were named",
        remedy="Name every witness of this log with --witness, and do not believe one that nobody accepted: the line "
        "may have been changed. --allow-unknown-witnesses checks the rest, and counts such lines",
    )


def _another(checkpoint: Checkpoint, root: bytes) -> LogTampered:
    return LogTampered(
        "the log is not the one of its checkpoint",
        cause=f"its {checkpoint.size} entries have the root {root.hex()}, and {checkpoint.root.hex()} is signed",
    )


def _first_parts(data: bytes, count: int) -> bytes:
    """The first parts of a file, each with 16 bits of length before it."""
    at = 0
    for _ in range(count):
        at += 2 + int.from_bytes(data[at : at + 2], "big")
    return data[:at]
