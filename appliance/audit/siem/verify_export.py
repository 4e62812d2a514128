"""Checks at the receiver what arrived there: with the log's public key, and nothing of the appliance's.

What an export proves, and by what:

- Each event is made again from the entry and the record in it: one altered anywhere differs. The record is the one that
  the entry commits to, the salt shows it.
- The entries follow each other without a gap, by their own sequence.
- A checkpoint's event names the entries [start, size) that were sent since the one before, and the roots of what was
  before `start`: from these and the entries' leaves its signed root follows (RFC 6962), or an entry was dropped, added
  or exchanged. So any part of an export that holds one such stretch can be checked by itself.
- What is behind the last checkpoint is proved by none yet, which is normal. What is before it and in no stretch is not
  proved: that is a shortcoming, and so is a checkpoint that could not be used. A tail that is missing together with its
  checkpoints is found with a checkpoint from elsewhere.
- What is known from the check before (`known`) takes the place of what came before: the entries go on from there, and
  none at the seam is left unproved. One that comes again is compared as far back as leaves are known.
- A record that is withheld is missing, and why is no more than a claim: the entry does not show it, and whoever could
  change events on the way can take out a record. What the entry shows to be untrue is refused: what was in plaintext,
  and what is under the system's key, is never shredded.

An event may arrive more than once (`shipper`): equal ones are counted, different entries are an error. Where an entry
came with its record and without, in whichever order, the record counts, and that is told.
Memory: about 150 bytes an entry, twice that for one without its record.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple

from appliance.audit.entry import PLAINTEXT, Entry
from appliance.audit.events import CATALOGUE, Scope
from appliance.audit.notes import Checkpoint, VerifierKey, open_checkpoint
from appliance.audit.siem.batches import MAX_LINE
from appliance.audit.siem.destinations import FORMATS
from appliance.audit.siem.formats import Carried, CheckpointEvent, Disclosed, Withheld
from appliance.audit.siem.known import KEPT, Known
from appliance.audit.tree import Frontier, cover, leaf_hash
from appliance.errors import Fault, HoldfastError

_MOST_NAMED: Final = 20
_MOST_UNPROVED: Final = 1 << 16  # entries: so many checkpoints do not stay away
_GIVEN: Final = "the given checkpoint"


class ExportDiffers(HoldfastError, ValueError):
    """What arrived is not what the log has."""

    code: ClassVar[str] = "audit_export_differs"
    fault: ClassVar[Fault] = Fault.CONFLICT


@dataclass(slots=True)
class ExportVerified:
    """What arrived, and what of it is proved. A stretch [start, end) is of entries.

    Attributes:
        first, end: the entries [first, end) are there, without a gap. That alone proves none of them.
        asked_from: what is before this entry need not be proved.
        proved: the stretches that checkpoints prove, in order; between two of them lies something else.
        checkpoints: how many proved something.
        unusable: checkpoints that could not be used, the first of them, with why.
        unusable_count: how many there are.
        repeated: events that came again.
        stripped: entries that came with their record and, another time, without.
        withheld: entries that only came without their record.
        withheld_named: the first of them, with why, as the sender says.
        tests: events that say that they are a test.
        uncomparable: entries that came again from before what is known of their leaves.
        goes_on: what is known now; None: nothing from which the next check could go on.
    """

    origin: str
    first: int = 0
    end: int = 0
    asked_from: int = 0
    proved: list[tuple[int, int]] = field(default_factory=list)
    checkpoints: int = 0
    unusable: list[str] = field(default_factory=list)
    unusable_count: int = 0
    repeated: int = 0
    stripped: int = 0
    withheld: int = 0
    withheld_named: dict[int, str] = field(default_factory=dict)
    tests: int = 0
    uncomparable: int = 0
    goes_on: Known | None = None

    @property
    def proved_from(self) -> int:
        """The first entry that is proved."""
        return self.proved[0][0] if self.proved else self.first

    @property
    def proved_to(self) -> int:
        """One more than the last entry that is proved."""
        return self.proved[-1][1] if self.proved else self.first

    def unproved(self) -> list[tuple[int, int]]:
        """The stretches that are there and not proved, but for what is behind the last checkpoint."""
        begins = [self.first, *(end for _, end in self.proved)]
        return [(begin, start) for begin, (start, _) in zip(begins, self.proved, strict=False) if begin < start]

    def shortcomings(self, *, allow_withheld: bool = False) -> list[str]:
        """What is wanting although nothing contradicts the log, a sentence each; none: all that was asked for holds."""
        found = [
            f"entries {max(start, self.asked_from)} to {end - 1} are not proved"
            for start, end in self.unproved()
            if end > self.asked_from
        ]
        found += [told for told in self.unusable if told.startswith(_GIVEN)]
        if self.withheld and not allow_withheld:
            found.append(f"{self.withheld} entries came without their record")
        if self.uncomparable:
            found.append(f"{self.uncomparable} entries came again from before what is known of them")
        if self.goes_on is not None and self.end - self.proved_to > _MOST_UNPROVED:
            found.append(f"{self.end - self.proved_to} entries came and no checkpoint for them")
        return found

    def record(self) -> dict[str, Any]:
        """For programs."""
        told = {name: getattr(self, name) for name in self.__slots__ if name != "goes_on"}
        return told | {"proved_from": self.proved_from, "proved_to": self.proved_to}


class _Stretch(NamedTuple):
    """A part of the log that a checkpoint can be computed from: [start, size), behind the subtrees `peaks`."""

    start: int
    size: int
    peaks: tuple[bytes, ...]
    signed: Checkpoint


@dataclass(slots=True)
class _Arrived:
    """The entries by their sequence: their leaves, and why records are withheld of those that came without only.

    Attributes:
        begin: what is before this entry is known from before, but for its leaves.
    """

    begin: int = 0
    leaves: dict[int, bytes] = field(default_factory=dict)
    withheld: dict[int, set[Withheld]] = field(default_factory=dict)
    stripped: set[int] = field(default_factory=set)
    repeated: int = 0
    uncomparable: int = 0


def verify_export(
    lines: Iterable[str],
    key: VerifierKey,
    *,
    checkpoint: str | None = None,
    asked_from: int | None = None,
    known: Known | None = None,
) -> ExportVerified:
    """Check what a receiver wrote: an event a line, in any of our formats, alone or behind a header of the receiver's.

    An empty line is none.

    Args:
        checkpoint: a signed one from elsewhere: what arrived must reach it, and follow from it.
        asked_from: the first entry that must be there; None: what arrived begins where it does.
        known: from the check before: what arrived goes on from there.

    Raises:
        ExportDiffers: names the line or the entry, and what is wrong with it.
        NoteInvalid: the checkpoint from elsewhere was not signed by the key.
    """
    told = None if checkpoint is None else open_checkpoint(checkpoint, key)
    found = ExportVerified(key.name)
    arrived = _Arrived()
    leaves = arrived.leaves
    if known is not None:
        arrived.begin = known.first
        leaves.update(enumerate(known.leaves, known.first))
    stretches: dict[tuple[int, int], _Stretch] = {}
    excerpts: dict[tuple[int, int], tuple[CheckpointEvent, Checkpoint]] = {}
    roots = {} if told is None else {told.size: told.root}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            carried = _carried(line, key.name).content
            if isinstance(carried, CheckpointEvent):
                signed = _signed(carried, key)
                if roots.setdefault(signed.size, signed.root) != signed.root:
                    raise _differs("the log is not one", f"two signed checkpoints of {signed.size} entries differ")
                if carried.end is None:
                    stretches[carried.start, carried.size] = _Stretch(
                        carried.start, carried.size, carried.peaks, signed
                    )
                else:
                    excerpts[carried.start, carried.end] = (carried, signed)
            elif carried is None:
                found.tests += 1
            else:
                _take(carried, arrived)
        except HoldfastError as error:
            raise _differs(
                f"line {number}{_whose(line, key.name)} does not hold", f"{error.message}: {error.cause}"
            ) from error
    if not leaves and known is None:
        raise _differs("there is nothing to check", "no line holds an entry of the log")
    begin = min(leaves, default=0) if known is None else known.first
    found.first = begin if known is None else known.edge.size
    found.end = max(leaves) + 1 if leaves else found.first
    found.asked_from = found.first if asked_from is None else asked_from
    if asked_from is not None and not found.first <= asked_from < found.end:
        raise _differs(
            f"entry {asked_from} is missing", f"it was asked for, and entries {found.first} to {found.end - 1} arrived"
        )
    if len(leaves) != found.end - begin:
        missing = next(each for each in range(begin, found.end) if each not in leaves)
        raise _differs(
            f"entry {missing} is missing",
            f"entries {begin} to {found.end - 1} arrived without {found.end - begin - len(leaves)} of them",
        )
    _prove_excerpts(leaves, excerpts, found)
    edge = _prove(leaves, list(stretches.values()), told, found, known)
    if not found.proved and known is None:
        raise _nothing_proves(found, bool(stretches))
    found.repeated, found.stripped, found.withheld = arrived.repeated, len(arrived.stripped), len(arrived.withheld)
    found.uncomparable = arrived.uncomparable
    if edge is not None:
        kept = range(max(begin, edge.size - KEPT), found.end)
        found.goes_on = Known(key.name, edge, kept.start, tuple(leaves[sequence] for sequence in kept))
    for sequence, whys in sorted(arrived.withheld.items())[:_MOST_NAMED]:
        found.withheld_named[sequence] = ", ".join(sorted(whys))
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
        found.checkpoints += 1
        _add(found, start, end)


def _prove(
    leaves: dict[int, bytes],
    stretches: list[_Stretch],
    told: Checkpoint | None,
    found: ExportVerified,
    known: Known | None,
) -> Frontier | None:
    """Compute every signed root from the leaves, from what is known on, or from the first stretch on that is whole.

    The edge of what is proved; None: there was nothing to begin with.
    """
    start: int
    peaks: tuple[bytes, ...] | None
    if known is not None:
        start, peaks = known.edge.size, known.edge.peaks
        stretches = [each for each in stretches if each.size >= start]  # those before are known
    elif found.first == 0:
        start, peaks = 0, ()
    else:
        whole = sorted(each[:3] for each in stretches if each.start >= found.first)
        start, peaks = (whole[0][0], whole[0][2]) if whole else (found.end, None)
    roots: dict[int, tuple[Checkpoint, str]] = {}
    for each in sorted(stretches):
        if peaks is None or each.size < start or (each.size == start and known is None):
            _unusable(found, f"the checkpoint of entries {each.start} to {each.size - 1}", each.start)
        else:
            roots[each.size] = (each.signed, f"the checkpoint of {each.size} entries that arrived")
    if told is not None:
        if told.size > found.end:
            raise _differs(f"entry {found.end} is missing", f"{_GIVEN} names {told.size} entries, {found.end} arrived")
        if told.size < start or peaks is None:
            _unusable(found, f"{_GIVEN} of {told.size} entries", 0)
        else:
            roots.setdefault(told.size, (told, f"{_GIVEN} of {told.size} entries"))
    if peaks is None:
        return None
    edge = Frontier(start, peaks)
    proved_to = start
    for size in sorted(roots):
        signed, named = roots[size]
        if size > found.end:
            raise _differs(f"entry {found.end} is missing", f"{named} names it, and {found.end} is where they end")
        while edge.size < size:
            edge.append(leaves[edge.size])
        if edge.root() != signed.root:
            raise _differs(
                f"one of the entries {proved_to} to {size - 1} is not the log's"
                if size > start
                else f"what is before entry {start} is not the log's",
                f"{named} does not follow from them: one was added, or exchanged for another",
            )
        found.checkpoints += 1
        proved_to = size
    if proved_to > start:
        _add(found, start, proved_to)
    return edge


def _add(found: ExportVerified, start: int, end: int) -> None:
    """Put a proved stretch to the others, and make one of those that touch."""
    joined: list[tuple[int, int]] = []
    for begin, stop in sorted([*found.proved, (start, end)]):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((begin, stop))
    found.proved = joined


def _unusable(found: ExportVerified, named: str, needed: int) -> None:
    found.unusable_count += 1
    if len(found.unusable) < _MOST_NAMED or named.startswith(_GIVEN):
        found.unusable.append(f"{named} needs entry {needed}, which is not here")


def _nothing_proves(found: ExportVerified, any_came: bool) -> ExportDiffers:
    if not any_came and not found.unusable:
        return _differs(
            "nothing proves these entries",
            "no checkpoint is among them",
            "Wait for the next one, which comes within a minute, or give one with --checkpoint",
        )
    why = f": {'; '.join(found.unusable[:3])}" if found.unusable else ""
    return _differs(
        "nothing proves these entries",
        f"they begin with entry {found.first}, and no checkpoint's stretch begins there or behind it{why}",
        "Add what the receiver has from before, or from behind, up to the next checkpoint",
    )


def _take(carried: Disclosed, arrived: _Arrived) -> None:
    entry = Entry.unpack(carried.packed)
    sequence, leaf = entry.sequence, leaf_hash(carried.packed)
    if carried.withheld is Withheld.SHREDDED and not _can_be_shredded(entry):
        raise _differs(
            f"the record of entry {sequence} was taken out",
            "it is said to be shredded, and it was under no tenant's key: nothing shreds it",
        )
    if sequence < arrived.begin:
        arrived.uncomparable += 1
        return
    known = sequence in arrived.leaves
    if known and arrived.leaves[sequence] != leaf:
        raise _differs(f"entry {sequence} came twice", "and the two differ")
    arrived.leaves[sequence] = leaf
    arrived.repeated += known
    had_record = known and sequence not in arrived.withheld
    if carried.withheld is None:
        if known and not had_record:
            del arrived.withheld[sequence]
            arrived.stripped.add(sequence)
    elif had_record:
        arrived.stripped.add(sequence)
    else:
        arrived.withheld.setdefault(sequence, set()).add(carried.withheld)


def _can_be_shredded(entry: Entry) -> bool:
    """Whether its record was under a tenant's key, as far as the entry shows: an unknown class may be anything."""
    kind = CATALOGUE.get(entry.event_class)
    return not entry.flags & PLAINTEXT and (kind is None or kind.scope is Scope.TENANT)


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
