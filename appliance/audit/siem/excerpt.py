"""A part of the log as lines of one format, with what proves it: for who carries events to a SIEM, or an auditor, by
hand.

Rule: the last line is a checkpoint's event that leads from the part's entries, and from nothing else, to a signed root.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit.entry import EntryKeys
from appliance.audit.following import LogFollower
from appliance.audit.reading import hashes_of
from appliance.audit.siem.formats import CheckpointEvent, Format
from appliance.audit.siem.opening import disclosed
from appliance.audit.signing import public_key
from appliance.audit.tree import Frontier, cover
from appliance.errors import Fault, HoldfastError

_READ_AT_ONCE: Final = 256
_MADE_AT_ONCE: Final = 8  # about half a millisecond of the loop


class ExcerptEmpty(HoldfastError, ValueError):
    """There is nothing in the part of the log that was asked for."""

    code: ClassVar[str] = "audit_excerpt_empty"
    fault: ClassVar[Fault] = Fault.CALLER


async def excerpt(
    directory: Path,
    form: Format,
    keys: EntryKeys,
    *,
    first: int = 0,
    end: int | None = None,
    wall_s: Callable[[], float] = time.time,
) -> AsyncGenerator[bytes, None]:
    """The lines of the entries [first, end), of what the newest checkpoint names, each with its end.

    Args:
        end: None: what the newest checkpoint names.

    Raises:
        ExcerptEmpty: no such entry is under a checkpoint.
        LogUnreadable, SigningKeyMissing: there is no log to read.
        VaultSealed: records cannot be opened.
    """
    log = LogFollower(directory)
    published = await asyncio.to_thread(log.published)
    end = published.size if end is None else min(end, published.size)
    if first >= end:
        raise ExcerptEmpty(
            "there is nothing in that part of the log",
            cause=f"the newest checkpoint names {published.size} entries, counted from 0",
            remedy="Name a part of them; `holdfast audit status` tells how many there are",
        )
    origin = (await asyncio.to_thread(public_key, directory)).name
    at = first
    while at < end:
        frames = await asyncio.to_thread(log.frames, at, end, most=_READ_AT_ONCE)
        for begin in range(0, len(frames), _MADE_AT_ONCE):
            some = frames[begin : begin + _MADE_AT_ONCE]
            yield b"".join([form.entry(origin, disclosed(frame, keys)).payload + b"\n" for frame in some])
            await asyncio.sleep(0.001)  # it is in the gateway's loop, which has other things to do
        at += len(frames)
    hashes = hashes_of(directory, published.size)
    peaks, rest = await asyncio.to_thread(
        lambda: (
            Frontier.read(hashes, first).peaks,
            tuple(hashes.hash_at(*node) for node in cover(end, published.size)),
        )
    )
    event = CheckpointEvent(published.note, first, published.size, peaks, end, rest)
    yield form.checkpoint(origin, event, int(wall_s() * 1000)).payload + b"\n"
