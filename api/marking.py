"""Keeps the marks by which the audit log and the database remember each other.

Rules:

- A mark that cannot be made now is made later; nothing waits for one.
- A restore is in the log before log and database are compared.
"""

import asyncio
import contextlib
import logging

from api.services import Services
from appliance.audit.events import OLDER_COPY, STORE_MARKED, SYSTEM, Event, Outcome
from appliance.audit.marks import (
    DESTINATIONS,
    OLDER,
    WITNESSES,
    Marks,
    found,
    is_explained,
    marks_of_store,
    remember,
    remembered_by_log,
)
from appliance.audit.reading import LogReader
from appliance.audit.restores import announced, recorded
from appliance.errors import HoldfastError
from appliance.vault import VaultSealed

_EVERY_S = 60.0
_LOG = logging.getLogger("holdfast.audit")


async def keep_marks(services: Services) -> None:
    """Compare log and database once the vault is open, then mark both. Runs until cancelled.

    Every minute, and when the SIEM's destinations have changed: a mark names their version.
    """
    await services.audit.opened.wait()
    last = 0
    while True:
        services.exports.changed.clear()
        try:
            if last == 0:
                last = await _compare(services)
                services.audit.compared.set()
            last = await mark(services, last)
        except VaultSealed:
            pass  # that it is sealed is told elsewhere
        except (HoldfastError, OSError) as error:
            _LOG.warning("log and database are not marked: %s", error)
            if not services.audit.compared.is_set():
                services.audit.retention.held = f"log and database could not be compared: {error}"
            await asyncio.sleep(_EVERY_S)  # whatever changes meanwhile: what is full is full for a while
            continue
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EVERY_S):
                await services.exports.changed.wait()


async def tell_restores(services: Services) -> None:
    """Record the restores that no start has recorded yet; once, whatever becomes of their announcement.

    Raises:
        AuditUnavailable: they are recorded later.
    """
    state_dir, lifecycle = services.settings.state_dir, services.lifecycle
    if lifecycle.restores_told:
        return
    try:
        events = announced(state_dir)
    except (OSError, ValueError, TypeError) as error:
        _LOG.error("what a restore announced cannot be read, and does not count: %s", error)
        return
    if events:
        await services.audit.record(*events, privileged=True)
        lifecycle.restores_told = True
        try:
            await asyncio.to_thread(recorded, state_dir)
        except OSError as error:
            _LOG.error("what a restore announced cannot be removed, and the next start records it again: %s", error)


async def mark(services: Services, last: int) -> int:
    """Make the mark after `last`; its number.

    Raises:
        HoldfastError: the log or the database cannot be written, or the vault is sealed.
    """
    number = last + 1
    await remember(services.store, Marks(meant=number, made=last))
    counts = {"mark": number}
    if (version := services.exports.version) is not None:
        counts[DESTINATIONS] = version
    if (version := services.audit.witnesses.version) is not None:
        counts[WITNESSES] = version
    details = {OLDER: services.audit.older} if services.audit.older else {}
    _refuse_sealed(services)
    await services.audit.record(Event(STORE_MARKED, SYSTEM, counts=counts, details=details))
    _refuse_sealed(services)  # if it was sealed before it was written: whether the log has the mark is left open
    await remember(services.store, Marks(meant=number, made=number))
    return number


def _refuse_sealed(services: Services) -> None:
    """A mark in plaintext counts for nothing: whoever can write the log's folder can make one."""
    if services.vault.sealed:
        raise VaultSealed


async def _compare(services: Services) -> int:
    """Tell of an older copy; the largest mark that either of them knows."""
    audit = services.audit
    await tell_restores(services)
    await asyncio.to_thread(audit.witnesses.learn)
    marks = await services.store.read(marks_of_store)
    log = await asyncio.to_thread(lambda: remembered_by_log(LogReader(audit.directory), services.vault))
    which = found(marks, log.mark)
    audit.older = log.older
    if log.restore is not None and (not which or is_explained(which, marks, log)):
        told = log.restore
        audit.restored = f"from a backup of {told.made_at}, by the user {told.uid}: entry {told.sequence}"
        _LOG.info("the database was put back %s", audit.restored)
    elif which:
        audit.older = which
        _LOG.warning("%s", audit.alarm)
        counts = {"mark_of_log": log.mark or 0, "mark_of_database": marks.made}
        event = Event(OLDER_COPY, SYSTEM, Outcome.FAILURE, target=("copy", which), counts=counts)
        await audit.record(event, privileged=True)
    return max(marks.meant, log.mark or 0)
