"""Removes entries that are older than the retention: their bundles and sealed records; their hashes stay.

Rules:

- Age is counted by a clock that nobody sets: what the log itself lived through since, by the monotonic clock of its
  entries. Between two boots it is the wall clock's difference, of which at most `MOST_OFF_S` counts. A clock that was
  set to any year makes nothing old and nothing young.
- One run removes at most a `_MOST_OF_KEPT`th of the bundles that there are, and a day lies between two runs: whatever
  goes wrong goes wrong slowly, and each step is an event.
- What is removed is the beginning of the log, whole bundles, each of whose entries is old enough; only what a signed
  checkpoint names, the journal has let go of, and no destination still needs.
- First the event, then a signed checkpoint that names it, then the files, in their order. Whoever ends the run in
  between leaves a log that verifies; the next run goes on. The event may take of an administrator's reserve, as a
  removal makes room; so it is recorded once, however often the checkpoint has to be tried.
- The event is in plaintext: verification, which has no key, tells by it what was removed rightfully. What retention
  finds missing it did not remove: it tells of it, and counts it apart in its own events.
"""

import asyncio
import bisect
import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, NamedTuple, Protocol

from appliance.audit.entry import PLAINTEXT, Entry, EntryInvalid, check_commitment
from appliance.audit.events import ENTRIES_MISSING, ENTRIES_REMOVED, SYSTEM, Event, Outcome
from appliance.audit.files import sync_directory
from appliance.audit.journal import Frame
from appliance.audit.log import record_path
from appliance.audit.reading import LogReader
from appliance.audit.tree import TILE_WIDTH, root_of, tile_path
from appliance.errors import Fault, HoldfastError

DAY_NS: Final = 86_400 * 1_000_000_000
MOST_OFF_S: Final = 7 * 86_400
_MOST_OF_KEPT: Final = 4
_BETWEEN_RUNS_NS: Final = 23 * 3600 * 1_000_000_000  # a little less than the day at which the next one comes
_AT_ONCE: Final = 1000  # bundles, of one directory
_SALT_BYTES: Final = 16
_LOG = logging.getLogger("holdfast.audit")


class RemovalUnsigned(HoldfastError):
    """No checkpoint names the event of a removal, which therefore does not happen."""

    code: ClassVar[str] = "audit_removal_unsigned"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class Trail(Protocol):
    """What retention needs of the node's log."""

    async def record(self, *events: Event, privileged: bool = False) -> int:
        """Append events; the last one's sequence."""

    async def checkpoint(self) -> dict[str, Any]:
        """Have a checkpoint made; the status then."""


@dataclass(frozen=True, slots=True)
class Removal:
    """What an event of the log says was removed.

    Attributes:
        sequence: the event itself; `frame`: its bytes.
        first: the first entry that this removal took.
        kept_from: the first entry that it left; all before it are gone, by this removal or by earlier ones.
        missing: how many entries were gone before they were due, in this removal and in all earlier ones.
        size, root: the signed tree at that time.
        days: the retention that was set.
    """

    sequence: int
    frame: Frame
    first: int
    kept_from: int
    missing: int
    size: int
    root: bytes
    days: int

    @property
    def wall_ns(self) -> int:
        """When it was recorded."""
        return Entry.unpack(self.frame.entry).wall_ns


class Plan(NamedTuple):
    """What is to be removed now."""

    first: int
    kept_from: int
    missing: int
    size: int
    root: bytes

    def event(self, days: int) -> Event:
        """What is recorded before it is done."""
        counts = {
            "first": self.first,
            "last": self.kept_from - 1,
            "count": self.kept_from - self.first,
            "missing": self.missing,
            "size": self.size,
            "retention_days": days,
        }
        return Event(ENTRIES_REMOVED, SYSTEM, counts=counts, details={"root": self.root.hex()})


class LivedTime:
    """How long a log lived, up to each of its entries, in nanoseconds; 0 at `start`. Blocks: it reads the log.

    Raises:
        LogUnreadable, EntryRemoved: an entry from `start` on is not there.
    """

    def __init__(self, log: LogReader, start: int) -> None:
        self._log = log
        self._boots: list[tuple[int, int, int]] = []  # first entry, its monotonic time, what was lived before it
        self.total_ns = 0
        while start < log.size:
            first = log.entry(start)
            self._boots.append((start, first.monotonic_ns, self.total_ns))
            end = self._end_of_boot(start, first.boot_id)
            last = log.entry(end - 1)
            self.total_ns += max(0, last.monotonic_ns - first.monotonic_ns)
            if end < log.size:
                self.total_ns += min(max(0, log.entry(end).wall_ns - last.wall_ns), MOST_OFF_S * 1_000_000_000)
            start = end

    def at(self, sequence: int) -> int:
        """What was lived up to an entry."""
        boot = bisect.bisect_right(self._boots, sequence, key=lambda each: each[0]) - 1
        _, began_ns, before_ns = self._boots[boot]
        return before_ns + max(0, self._log.entry(sequence).monotonic_ns - began_ns)

    def _end_of_boot(self, start: int, boot_id: bytes) -> int:
        """The entry behind the last one of a boot: a boot does not come again."""
        step = 1
        while start + step < self._log.size and self._log.entry(start + step).boot_id == boot_id:
            step *= 2
        within = range(start + step // 2, min(start + step, self._log.size))
        return within.start + bisect.bisect_left(
            within, True, key=lambda sequence: self._log.entry(sequence).boot_id != boot_id
        )


class Retention:
    """Keeps a node's log as long as it has to be, and no longer.

    Args:
        days: of 24 hours each that an entry is kept.

    Attributes:
        needed_from: the smallest entry that some destination does not have yet; None: all have all. One that cannot
            tell raises, and nothing is removed.
        alarm: what an administrator has to know; empty: nothing.
        held: why nothing was removed that is old enough; empty: nothing is.
        oldest: the first entry that is kept, and its wall clock; None: not looked at yet.
    """

    def __init__(self, trail: Trail, directory: Path, *, days: int) -> None:
        self._trail = trail
        self._directory = directory
        self.days = days
        self.needed_from: Callable[[], int | None] = lambda: None
        self.alarm = ""
        self.held = ""
        self.oldest: tuple[int, int] | None = None
        self._last: Removal | None = None
        self._searched_to = 0
        self._announced: tuple[int, Plan] | None = None  # the newest event, and what it says
        self._missing: tuple[int, int] | None = None  # what the alarm tells of: from, and up to

    async def run(self) -> Removal | None:
        """Remove what is old enough, if it is time; what was removed. To be called every hour or so.

        Raises:
            HoldfastError: nothing was removed, or not all of it; the next call goes on.
        """
        self.held = ""
        log = await asyncio.to_thread(LogReader, self._directory)
        removed = await asyncio.to_thread(self._last_removal, log)
        oldest = await asyncio.to_thread(self._look_at_oldest, log)
        rightful = 0 if removed is None else removed.kept_from
        if removed is not None and (oldest < rightful or self._is_half_removed(rightful)):
            await self._remove(oldest, rightful)
            await asyncio.to_thread(self._look_at_oldest, log)
            return removed
        await self._look_for_missing(rightful, oldest)
        plan = await asyncio.to_thread(self._plan, log, removed)
        if plan is None:
            return None
        sequence, plan = await self._announce(plan)
        said = await self._trail.checkpoint()
        if said["checkpoint_size"] <= sequence:
            raise RemovalUnsigned(
                "old entries of the audit log are not removed",
                cause=f"no checkpoint names entry {sequence}, which says that they are",
                remedy="`holdfast audit status` tells why there is no checkpoint; it is tried again",
            )
        await self._remove(oldest, plan.kept_from)
        log = await asyncio.to_thread(LogReader, self._directory)  # with the event in it
        await asyncio.to_thread(self._look_at_oldest, log)
        return await asyncio.to_thread(self._last_removal, log)

    def _last_removal(self, log: LogReader) -> Removal | None:
        """The newest removal that a checkpoint names. What was searched once is not searched again."""
        if self._last is None and log.oldest == 0:
            return None  # not one file is gone: what an earlier run may have announced is announced anew
        found = newest_removal(log, log.published, self._searched_to)
        self._searched_to = max(self._searched_to, log.published)
        self._last = found or self._last
        return self._last

    def _is_half_removed(self, kept_from: int) -> bool:
        """Whether the last bundle of a removal has lost its records and not its entries."""
        return (self._directory / tile_path("entries", kept_from // TILE_WIDTH - 1)).exists()

    def _look_at_oldest(self, log: LogReader) -> int:
        oldest = log.oldest
        if oldest < log.size:
            self.oldest = (oldest, log.entry(oldest).wall_ns)
        return oldest

    def _plan(self, log: LogReader, removed: Removal | None) -> Plan | None:
        oldest = log.oldest // TILE_WIDTH
        lived = LivedTime(log, log.oldest)
        if removed is not None and lived.total_ns - lived.at(removed.sequence) < _BETWEEN_RUNS_NS:
            return None
        newest_old_ns = lived.total_ns - self.days * DAY_NS
        may_go = range(oldest, min(log.bundled, log.published) // TILE_WIDTH)
        end = oldest + bisect.bisect_left(
            may_go, True, key=lambda bundle: lived.at(bundle * TILE_WIDTH + TILE_WIDTH - 1) > newest_old_ns
        )
        end = min(end, oldest + -(-(log.size // TILE_WIDTH - oldest) // _MOST_OF_KEPT))
        needed_from = self.needed_from()
        if needed_from is not None and needed_from // TILE_WIDTH < end:
            end = max(oldest, needed_from // TILE_WIDTH)
            self.held = f"a destination does not have entry {needed_from} yet"
        if end == oldest:
            return None
        first = 0 if removed is None else removed.kept_from
        missing = (0 if removed is None else removed.missing) + oldest * TILE_WIDTH - first
        root = root_of(log.hashes(), log.published)
        return Plan(first, end * TILE_WIDTH, missing, log.published, root)

    async def _announce(self, plan: Plan) -> tuple[int, Plan]:
        """The event of a removal, and what it says: what was announced and fits goes on."""
        if self._announced is not None:
            sequence, announced = self._announced
            same = (announced.first, announced.missing) == (plan.first, plan.missing)
            if same and announced.kept_from <= plan.kept_from:
                return sequence, announced
        self._announced = await self._trail.record(plan.event(self.days), privileged=True), plan
        return self._announced

    async def _look_for_missing(self, rightful: int, oldest: int) -> None:
        """Tell of each loss once. The alarm ends when everything is back."""
        if self._missing is not None and oldest <= self._missing[0]:
            self._missing, self.alarm = None, ""
        told_to = 0 if self._missing is None else self._missing[1]
        if oldest <= max(rightful, told_to):
            return
        counts = {"first": rightful, "last": oldest - 1, "count": oldest - rightful}
        await self._trail.record(Event(ENTRIES_MISSING, SYSTEM, Outcome.FAILURE, counts=counts), privileged=True)
        self._missing = rightful, oldest
        self.alarm = (
            f"the entries from {rightful} to {oldest - 1} of the audit log are gone, and retention did not remove them"
        )
        _LOG.warning("%s", self.alarm)

    async def _remove(self, oldest: int, kept_from: int) -> None:
        # The bundle before the oldest may have lost its records and not its entries.
        first, end = max(0, oldest // TILE_WIDTH - 1), kept_from // TILE_WIDTH
        while first < end:
            until = min(end, (first // _AT_ONCE + 1) * _AT_ONCE)
            await asyncio.to_thread(remove_bundles, self._directory, first, until)
            first = until


def remove_bundles(directory: Path, first: int, end: int) -> None:
    """Remove the records and entries of the bundles [first, end), which share a directory; they are gone for good.

    Raises:
        RemovalFailed: some are still there.
    """
    try:
        for bundle in range(first, end):
            for name in (record_path(bundle), tile_path("entries", bundle)):
                (directory / name).unlink(missing_ok=True)
        for name in (record_path(first), tile_path("entries", first)):
            folder = (directory / name).parent
            with contextlib.suppress(FileNotFoundError):
                sync_directory(folder)
            if end % _AT_ONCE == 0:
                # No bundle will ever be written there again. It may be the folder of the thousands, too.
                with contextlib.suppress(OSError):
                    folder.rmdir()
    except OSError as error:
        raise RemovalFailed(
            "old entries of the audit log cannot be removed",
            cause=f"{error.filename}: {error.strerror}",
            remedy="Mend the rights of the folder, or its file system; it is tried again within the hour",
        ) from None


class RemovalFailed(HoldfastError, OSError):
    """The files of a removal that was recorded are still there."""

    code: ClassVar[str] = "audit_removal_failed"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


def newest_removal(log: LogReader, end: int, start: int) -> Removal | None:
    """The newest removal that the entries of [start, end) tell of. Blocks: it reads them from the end.

    Raises:
        LogUnreadable: an entry cannot be read.
    """
    for sequence in range(end - 1, max(start, log.oldest) - 1, -1):
        removal = removal_of(log.frame(sequence), sequence)
        if removal is not None:
            return removal
    return None


def removal_of(frame: Frame, sequence: int) -> Removal | None:
    """What an entry says was removed; None: it is about something else."""
    if frame.entry[1] != PLAINTEXT or frame.entry[2:4] != ENTRIES_REMOVED.number.to_bytes(2, "big"):
        return None
    salt, content = frame.sealed[:_SALT_BYTES], frame.sealed[_SALT_BYTES:]
    try:
        check_commitment(Entry.unpack(frame.entry), salt, content)
        record = json.loads(content)
        counts, root = record["counts"], bytes.fromhex(record["details"]["root"])
        said = Removal(
            sequence=sequence,
            frame=frame,
            first=int(counts["first"]),
            kept_from=int(counts["last"]) + 1,
            missing=int(counts["missing"]),
            size=int(counts["size"]),
            root=root,
            days=int(counts["retention_days"]),
        )
    except (EntryInvalid, ValueError, KeyError, TypeError):
        return None
    # It removes whole bundles, and only what was signed before it.
    sound = 0 <= said.first < said.kept_from <= said.size <= sequence and said.kept_from % TILE_WIDTH == 0
    return said if sound else None
