"""Batches of events in files, as they cross a data diode: what a manifest says, and how a receiver checks a folder.

Rules:

- A batch is a file of lines; its manifest is a signed note beside it, which names it, its size and SHA-256, its first
  and last event, its number in the series, and the SHA-256 of the manifest before it. So one that was altered, left
  out, renamed, exchanged or brought again is found.
- A series is what one state of the sender counts, from 1. A sender that lost its state begins another one, and says so
  by that: what is missing at the end of a series is found by the events' own sequence (`verify_export`).
- The key is the destination's own, not the log's: it says who packed the batch. What the events say, the log's
  checkpoints in them prove.

Format of a note: C2SP signed-note.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from appliance.audit.notes import (
    MAX_NOTE_BYTES,
    NoteInvalid,
    SigningKey,
    VerifierKey,
    decode_note,
    open_note,
    parse_number,
    sign_note,
)
from appliance.errors import Fault, HoldfastError

BATCH: Final = ".log"
MANIFEST: Final = ".manifest"
PUBLIC_KEY: Final = "batches.vkey"  # beside the batches
NO_PREVIOUS: Final = "0" * 64
_FIRST_LINE: Final = "holdfast batch v1"  # with spaces: no checkpoint begins so
_NAME: Final = re.compile(r"batch-([0-9a-f]{16})-([0-9]{12})")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
MAX_LINE: Final = 4 << 20  # characters
_CHUNK: Final = 1 << 20


class BatchInvalid(HoldfastError, ValueError):
    """A batch is not what its manifest says, or one is missing."""

    code: ClassVar[str] = "audit_batch_invalid"
    fault: ClassVar[Fault] = Fault.CONFLICT


class Manifest(NamedTuple):
    """What is said about a batch.

    Attributes:
        series: 16 hexadecimal digits.
        number: in the series, from 1.
        size: bytes.
        sha256: of the batch, hexadecimal.
        events: how many lines it has.
        first, last: the stable ids of its first and last event.
        previous: SHA-256 of the text of the manifest before it, hexadecimal; zeros for the first.
    """

    series: str
    number: int
    size: int
    sha256: str
    events: int
    first: str
    last: str
    previous: str

    @property
    def name(self) -> str:
        """What its two files are called, without their endings."""
        return f"batch-{self.series}-{self.number:012d}"

    @property
    def text(self) -> str:
        """What is signed."""
        return (
            f"{_FIRST_LINE}\n{self.name}{BATCH}\nbytes {self.size}\nsha256 {self.sha256}\nevents {self.events}\n"
            f"first {self.first}\nlast {self.last}\nprevious {self.previous}\n"
        )

    @property
    def digest(self) -> str:
        """What the manifest behind it says of it."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def sign(self, key: SigningKey) -> bytes:
        """The manifest's file."""
        return sign_note(self.text, key).encode()

    @classmethod
    def parse(cls, text: str) -> "Manifest":
        """Read the text of a manifest. Nothing is said about who signed it.

        Raises:
            NoteInvalid: it is none.
        """
        lines = text.split("\n")
        names = [line.partition(" ")[0] for line in lines[2:-1]]
        named = _NAME.fullmatch(lines[1].removesuffix(BATCH)) if len(lines) == 9 else None
        if (
            lines[0] != _FIRST_LINE
            or named is None
            or names != ["bytes", "sha256", "events", "first", "last", "previous"]
        ):
            raise _no_manifest()
        size, sha256, events, first, last, previous = (line.partition(" ")[2] for line in lines[2:-1])
        made = cls(
            named[1], int(named[2]), parse_number(size, "its size"), sha256, parse_number(events, "its events"), first,
            last, previous,
        )  # fmt: skip
        if made.text != text or not _HASH.fullmatch(sha256) or not _HASH.fullmatch(previous):
            raise _no_manifest()
        return made


class Taken(NamedTuple):
    """The last batch of a series that a receiver has: its number, and its manifest's digest."""

    number: int
    digest: str


@dataclass(slots=True)
class Batches:
    """What a folder holds, every batch of it checked.

    Attributes:
        paths: the batches, series by series, in their order.
        numbers: the first and the last number of each series.
        taken: the last of each, with what was known from before.
    """

    paths: list[Path] = field(default_factory=list)
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)
    taken: dict[str, Taken] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The events, without the ends of their lines. Reads the files again."""
        for path in self.paths:
            yield from lines_of(path)


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a file, without their ends. Of one that is too long to be an event come pieces that are, too."""
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        while line := file.readline(MAX_LINE + 2):
            yield line.removesuffix("\n")


def verify_batches(folder: Path, key: VerifierKey, *, known: Mapping[str, Taken] | None = None) -> Batches:
    """Check the batches in a folder. Blocks.

    Args:
        key: the destination's, from elsewhere.
        known: the last of each series that was taken before: what it names must go on from there.

    Raises:
        BatchInvalid: names the file, and what is wrong with it.
    """
    manifests: dict[str, list[Manifest]] = {}
    names = {path.stem for path in folder.iterdir() if _NAME.fullmatch(path.stem) and path.suffix in (BATCH, MANIFEST)}
    for name in sorted(names):
        for path in (folder / f"{name}{MANIFEST}", folder / f"{name}{BATCH}"):
            if path.exists() and not path.is_file():
                raise _invalid(path.name, "it is no file")
        manifest = _checked(folder, name, key)
        manifests.setdefault(manifest.series, []).append(manifest)
    found = Batches(taken=dict(known or {}))
    for series, ordered in manifests.items():
        _in_order(ordered, found.taken.get(series))
        found.paths += [folder / f"{manifest.name}{BATCH}" for manifest in ordered]
        found.numbers[series] = (ordered[0].number, ordered[-1].number)
        found.taken[series] = Taken(ordered[-1].number, ordered[-1].digest)
    if not found.paths:
        raise _invalid(str(folder), "there is no batch in it")
    return found


def _checked(folder: Path, name: str, key: VerifierKey) -> Manifest:
    """A batch's manifest, once both hold."""
    path = folder / f"{name}{MANIFEST}"
    try:
        with path.open("rb") as file:
            note = decode_note(file.read(MAX_NOTE_BYTES + 1))
        manifest = Manifest.parse(open_note(note, key))
        if manifest.name != name:
            raise _invalid(path.name, f"it is the manifest of {manifest.name}")
        path = folder / f"{name}{BATCH}"
        size, sha256 = _hashed(path)
    except OSError as error:
        raise _invalid(path.name, error.strerror or type(error).__name__) from None
    except NoteInvalid as error:
        raise _invalid(path.name, error.cause) from None
    if (size, sha256) != (manifest.size, manifest.sha256):
        raise _invalid(path.name, f"it has {size} bytes and the SHA-256 {sha256}, and its manifest names other ones")
    return manifest


def _in_order(manifests: list[Manifest], taken: Taken | None) -> None:
    before = taken
    for manifest in manifests:
        if taken is not None and manifest.number <= taken.number:
            cause = f"it was brought again: everything up to number {taken.number} was taken before"
            raise _invalid(manifest.name, cause)
        expected = manifest.number if before is None else before.number + 1
        if manifest.number != expected:
            raise _invalid(f"batch-{manifest.series}-{expected:012d}", f"it is missing: {manifest.name} follows")
        if (before is not None and manifest.previous != before.digest) or (
            (manifest.number == 1) != (manifest.previous == NO_PREVIOUS)
        ):
            raise _invalid(manifest.name, "it does not follow from the batch before it")
        before = Taken(manifest.number, manifest.digest)


def _hashed(path: Path) -> tuple[int, str]:
    hashed, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            hashed.update(chunk)
            size += len(chunk)
    return size, hashed.hexdigest()


def _no_manifest() -> NoteInvalid:
    return NoteInvalid(
        "the note is refused", cause="it is no manifest of a batch", remedy="Bring the batch and its manifest again"
    )


def _invalid(name: str, cause: str) -> BatchInvalid:
    return BatchInvalid(
        f"{name} does not hold",
        cause=cause,
        remedy="Keep what is there as it is, and compare it with what the sender wrote; bring the batch again if it is "
        "there still",
    )
