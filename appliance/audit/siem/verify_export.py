"""Checks at the receiver what arrived there: with the log's public key, and nothing of the appliance's.

What an export proves, and by what:

- Each event is made again from the entry and the record in it: one altered anywhere differs. The record is the one that
  the entry commits to, the salt shows it.
- The entries follow each other without a gap, by their own sequence.
- A checkpoint's event names the entries [start, size) that were sent since the one before, and the roots of what was
  before `start`: from these and the entries' leaves its signed root follows (RFC 6962), or an entry was dropped, added
  or exchanged. So any part of an export that holds one such stretch can be checked by itself.
- What is behind the last checkpoint is proved by none yet, and what is before the first stretch is not proved here.
  Both are counted. A tail that is missing together with its checkpoints is found with a checkpoint from elsewhere.

An event may arrive more than once (`shipper`): equal ones are counted, different ones are an error.
Memory: about 150 bytes an entry.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from appliance.audit.entry import Entry
from appliance.audit.notes import Checkpoint, VerifierKey, open_checkpoint
from appliance.audit.siem.destinations import FORMATS
from appliance.audit.siem.formats import Carried, CheckpointEvent, Disclosed
from appliance.audit.tree import Frontier, cover, leaf_hash
from appliance.errors import Fault, HoldfastError

MAX_LINE: Final = 4 << 20  # characters
_MOST_NAMED: Final = 20


class ExportDiffers(HoldfastError, ValueError):
    """What arrived is not what the log has."""

    code: ClassVar[str] = "audit_export_differs"
    fault: ClassVar[Fault] = Fault.CONFLICT


@dataclass(slots=True)
class ExportVerified:
    """What was found to hold.

    Attributes:
        first, end: the entries [first, end) are there, without a gap.
        proved_from, proved_to: those of them that a checkpoint proves.
        repeated: events that came again.
        withheld: entries that came without their record.
        withheld_named: the first of them, with why.
        tests: events that say that they are a test.
    """

    origin: str
    first: int = 0
    end: int = 0
    proved_from: int = 0
    proved_to: int = 0
    checkpoints: int = 0
    repeated: int = 0
    withheld: int = 0
    withheld_named: dict[int, str] = field(default_factory=dict)
    tests: int = 0

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {name: getattr(self, name) for name in self.__slots__}


def verify_export(lines: Iterable[str], key: VerifierKey, *, checkpoint: str | None = None) -> ExportVerified:
    """Check what a receiver wrote: an event a line, in any of our formats, alone or behind a header of the receiver's.

    An empty line is none.

    Args:
        checkpoint: a signed one from elsewhere: what arrived must reach it, and follow from it.

    Raises:
        ExportDiffers: names the line or the entry, and what is wrong with it.
        NoteInvalid: the checkpoint from elsewhere was not signed by the key.
    """
    told = None if checkpoint is None else open_checkpoint(checkpoint, key)
    found = ExportVerified(key.name)
    leaves: dict[int, bytes] = {}
    stretches: dict[int, tuple[int, tuple[bytes, ...], Checkpoint]] = {}
    excerpts: dict[tuple[int, int], tuple[CheckpointEvent, Checkpoint]] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            carried = _carried(line, key.name).content
            if isinstance(carried, CheckpointEvent):
                signed = _signed(carried, key)
                if carried.end is None:
                    stretches[carried.size] = (carried.start, carried.peaks, signed)
                else:
                    excerpts[carried.start, carried.end] = (carried, signed)
            elif carried is None:
                found.tests += 1
            else:
                _take(carried, leaves, found)
        except HoldfastError as error:
            raise _differs(
                f"line {number}{_whose(line, key.name)} does not hold", f"{error.message}: {error.cause}"
            ) from error
    if not leaves:
        raise _differs("there is nothing to check", "no line holds an entry of the log")
    found.first, found.end = min(leaves), max(leaves) + 1
    if len(leaves) != found.end - found.first:
        missing = next(each for each in range(found.first, found.end) if each not in leaves)
        raise _differs(
            f"entry {missing} is missing",
            f"entries {found.first} to {found.end - 1} arrived without {found.end - found.first - len(leaves)} of them",
        )
    _prove_excerpts(leaves, excerpts, found)
    if stretches or told is not None or not excerpts:
        _prove(leaves, stretches, told, found)
    return found


def _prove_excerpts(
    leaves: dict[int, bytes], excerpts: dict[tuple[int, int], tuple[CheckpointEvent, Checkpoint]], found: ExportVerified
) -> None:
    """Compute the signed root of each part of the log that was taken out of it by itself."""
    for (start, end), (carried, signed) in sorted(excerpts.items()):
        if start < found.first or end > found.end:
            raise _differs(
                f"entry {start if start < found.first else found.end} is missing",
                f"the checkpoint of entries {start} to {end - 1} names it, and it did not arrive",
            )
        edge = Frontier(start, carried.peaks)
        for sequence in range(start, end):
            edge.append(leaves[sequence])
        for (level, _), root in zip(cover(end, carried.size), carried.rest, strict=True):
            edge.append_subtree(level, root)
        if edge.root() != signed.root:
            raise _differs(
                f"one of the entries {start} to {end - 1} is not the log's",
                "their checkpoint does not follow from them: one was added, or exchanged for another",
            )
        if found.checkpoints == 0:
            found.proved_from, found.proved_to = start, end
        elif start <= found.proved_to:
            found.proved_to = max(found.proved_to, end)
        found.checkpoints += 1


def _prove(
    leaves: dict[int, bytes],
    stretches: dict[int, tuple[int, tuple[bytes, ...], Checkpoint]],
    told: Checkpoint | None,
    found: ExportVerified,
) -> None:
    """Compute every signed root from the leaves, from the first stretch on that is whole."""
    whole = sorted((start, peaks) for start, peaks, _ in stretches.values() if start >= found.first)
    start, peaks = (0, ()) if found.first == 0 else whole[0] if whole else (-1, ())
    if start < 0:
        raise _differs(
            "nothing proves these entries",
            f"they begin with entry {found.first}, and no checkpoint's stretch begins there or behind it",
            "Add what the receiver has from before, or from behind, up to the next checkpoint",
        )
    roots = {
        size: (signed, f"the checkpoint of {size} entries that arrived") for size, (*_, signed) in stretches.items()
    }
    if told is not None:
        roots.setdefault(told.size, (told, f"the given checkpoint of {told.size} entries"))
        if told.size > found.end:
            raise _differs(
                f"entry {found.end} is missing", f"the given checkpoint names {told.size} entries, {found.end} arrived"
            )
        if roots[told.size][0].root != told.root:
            raise _differs("the log is not one", f"two signed checkpoints of {told.size} entries differ")
    edge = Frontier(start, peaks)
    found.proved_from = found.proved_to = start
    for size in sorted(size for size in roots if size > start):
        signed, named = roots[size]
        if size > found.end:
            raise _differs(f"entry {found.end} is missing", f"{named} names it, and {found.end} is where they end")
        while edge.size < size:
            edge.append(leaves[edge.size])
        if edge.root() != signed.root:
            raise _differs(
                f"one of the entries {found.proved_to} to {size - 1} is not the log's",
                f"{named} does not follow from them: one was added, or exchanged for another",
            )
        found.checkpoints += 1
        found.proved_to = size
    if found.proved_to == start:
        raise _differs(
            "nothing proves these entries",
            "no checkpoint is among them",
            "Wait for the next one, which comes within a minute, or give one with --checkpoint",
        )


def _take(carried: Disclosed, leaves: dict[int, bytes], found: ExportVerified) -> None:
    sequence = Entry.unpack(carried.packed).sequence
    leaf = leaf_hash(carried.packed)
    if sequence in leaves:
        if leaves[sequence] != leaf:
            raise _differs(f"entry {sequence} came twice", "and the two differ")
        found.repeated += 1
        return
    leaves[sequence] = leaf
    if carried.withheld is not None:
        found.withheld += 1
        if len(found.withheld_named) < _MOST_NAMED:
            found.withheld_named[sequence] = carried.withheld.value


def _signed(carried: CheckpointEvent, key: VerifierKey) -> Checkpoint:
    signed = open_checkpoint(carried.note, key)
    if signed.size != carried.size or not 0 <= carried.start < carried.size:
        raise _differs("its checkpoint is another one", f"it is of {signed.size} entries, and not of {carried.size}")
    if len(carried.peaks) != carried.start.bit_count() or any(len(peak) != 32 for peak in carried.peaks):
        raise _differs("its checkpoint proves nothing", "its hashes are not those of a tree of that size")
    end = carried.size if carried.end is None else carried.end
    rest = list(cover(end, carried.size)) if carried.start < end <= carried.size else None
    if rest is None or len(rest) != len(carried.rest) or any(len(root) != 32 for root in carried.rest):
        raise _differs("its checkpoint proves nothing", "its hashes do not lead to a tree of that size")
    return signed


def _carried(line: str, origin: str) -> Carried:
    """What a line carries, in whichever format it is."""
    if len(line) > MAX_LINE:
        raise _differs("it is too long", f"it has more than {MAX_LINE} characters")
    text = line.rstrip("\r\n")
    # The first that begins: what a field of an event holds may look like the beginning of another one.
    begun = [(begin, name) for name, known in FORMATS.items() if (begin := known.find(text)) >= 0]
    if not begun:
        raise _differs("it is no event", f"it holds none of {', '.join(FORMATS)}")
    begin, name = min(begun)
    carried = FORMATS[name].read(text[begin:])
    if carried.origin != origin:
        raise _differs("it is another log's", f"it is of {carried.origin[:100]!r}, and the key of {origin!r}")
    return carried


def _whose(line: str, origin: str) -> str:
    """Which entry a line says it is of, by its stable id, for whoever looks for it."""
    said = re.search(rf"{re.escape(origin)}/(\d{{1,19}})(?!\d)", line[:MAX_LINE])
    return f" (entry {said[1]})" if said else ""


def _differs(message: str, cause: str, remedy: str = "") -> ExportDiffers:
    return ExportDiffers(
        message,
        cause=cause,
        remedy=remedy
        or "Keep the file as it is; compare it with the log at the appliance: `holdfast audit verify`, `audit show`",
    )
