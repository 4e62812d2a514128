"""Keeps the marks by which the audit log and the database remember each other.

Rule: a mark that cannot be made now is made later; nothing waits for one.
"""

import asyncio
import contextlib
import logging

from api.services import Services
from appliance.audit.events import OLDER_COPY, STORE_MARKED, SYSTEM, Event, Outcome
from appliance.audit.marks import DESTINATIONS, Marks, found, last_mark_of_log, marks_of_store, remember
from appliance.audit.reading import LogReader
from appliance.errors import HoldfastError

_EVERY_S = 60.0
_LOG = logging.getLogger("holdfast.audit")


async def keep_marks(services: Services) -> None:
    """Compare log and database once the vault is open, then mark both. Runs until cancelled.

    Every minute, and when the SIEM's destinations have changed: a mark names their version.
    """
    await services.audit.opened.wait()
    last = 0
    while True:
        with contextlib.suppress(HoldfastError):
            if last == 0:
                last = await _compare(services)
            last = await mark(services, last)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EVERY_S):
                await services.exports.changed.wait()


async def mark(services: Services, last: int) -> int:
    """Make the mark after `last`; its number.

    Raises:
        HoldfastError: the log or the database cannot be written, or the vault is sealed.
    """
    number = last + 1
    await remember(services.store, Marks(meant=number, made=last))
    services.exports.changed.clear()
    counts = {"mark": number}
    if (version := services.exports.version) is not None:
        counts[DESTINATIONS] = version
    await services.audit.record(Event(STORE_MARKED, SYSTEM, counts=counts))
    await remember(services.store, Marks(meant=number, made=number))
    return number


async def _compare(services: Services) -> int:
    """Tell of an older copy; the largest mark that either of them knows."""
    marks = await services.store.read(marks_of_store)
    in_log = await asyncio.to_thread(lambda: last_mark_of_log(LogReader(services.audit.directory), services.vault))
    which = found(marks, in_log)
    if which:
        services.audit.alarm = f"the {which} was put back to an older copy, as it was found at the start"
        _LOG.warning("%s", services.audit.alarm)
        counts = {"mark_of_log": in_log or 0, "mark_of_database": marks.made}
        event = Event(OLDER_COPY, SYSTEM, Outcome.FAILURE, target=("copy", which), counts=counts)
        await services.audit.record(event, privileged=True)
    return max(marks.meant, in_log or 0)
