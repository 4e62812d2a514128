"""Tells the audit log of whom there was before there was a log: what `holdfast init` made.

Rules:

- It is told at the first start, once the vault is open. What could not be recorded then is recorded later, by this
  start or the next: each looks for what is older than the log and not named in it, while the log is short and whole.
- What is told of is named once.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from sqlalchemy import select

from api import trail
from api.services import Services
from appliance.audit.entry import EntryInvalid, EntryKeys, open_record
from appliance.audit.events import KEY_CREATED, PRINCIPAL_CREATED, SYSTEM, TENANT_CREATED, Event, EventClass
from appliance.audit.reading import LogReader
from appliance.errors import HoldfastError
from appliance.store import tables
from appliance.vault import KeyMissing, TamperedValue

_AGAIN_S = 60.0
_AT_ONCE = 50  # events to one append
_SHORT: Final = 10_000  # entries: of a log that is searched; while sealed, refusals come before a first start's own
_MADE: Final = frozenset({TENANT_CREATED.number, PRINCIPAL_CREATED.number, KEY_CREATED.number})
_LOG = logging.getLogger("holdfast.audit")


async def tell_founding(services: Services) -> None:
    """Record tenants, principals and keys that are older than the log and not in it, once the vault is open."""
    await services.audit.opened.wait()
    untold: list[Event] | None = None
    while True:
        try:
            if untold is None:
                untold = await _untold(services)
            while untold:
                await services.audit.record(*untold[:_AT_ONCE], privileged=True)
                del untold[:_AT_ONCE]
        except (TamperedValue, EntryInvalid) as error:
            _LOG.error("what there was before the first start is not recorded: %s", error)
            return
        except (HoldfastError, OSError) as error:
            _LOG.warning("what there was before the first start is not recorded yet: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


async def _untold(services: Services) -> list[Event]:
    told = await asyncio.to_thread(_told, services.audit.directory, services.vault)
    if told is None:
        return []
    until = min(services.lifecycle.started_at, told.began_s)
    return [event for event in await _founding(services, until) if event.target not in told.named]


class _Told(NamedTuple):
    """What the log says: when it began, epoch seconds, and everything that it names as made."""

    began_s: float
    named: set[tuple[str, str]]


def _told(directory: Path, keys: EntryKeys) -> _Told | None:
    """None: it is long, or not whole any more: what was to be told was told, or cannot be looked for."""
    log = LogReader(directory)
    if log.oldest > 0 or not 0 < log.size <= _SHORT:
        return None
    named = set()
    for entry, sealed in log.backwards(log.size):
        if entry.event_class in _MADE:
            with contextlib.suppress(KeyMissing):  # of what a restored database knows nothing of
                target = open_record(entry, sealed, keys).record["target"]
                named.add((target["kind"], target["id"]))
    return _Told(log.entry(0).wall_ns / 1e9, named)


async def _founding(services: Services, until: float) -> list[Event]:
    identity = services.identity
    principals = tables.principals
    older = select(principals.c.principal_id, principals.c.uid).where(principals.c.created_at <= until)
    uids = {row.principal_id: row.uid for row in await services.store.read(lambda db: db.execute(older).all())}
    tenants = [tenant for tenant in await identity.tenants() if tenant.created_at <= until]
    people = [each for tenant in (None, *tenants) for each in await identity.principals(tenant)]
    people = [each for each in people if each.principal_id in uids]
    by_id = {each.principal_id: each for each in people}
    keys = [key for key in await identity.keys() if key.principal_id in by_id and key.created_at <= until]

    def made(kind: EventClass, target: tuple[str, str], tenant_id: str | None, details: Mapping[str, str]) -> Event:
        details = {**details, "made": "before the first start"}
        return Event(kind, SYSTEM, tenant_id=tenant_id or "", target=target, details=details)

    events = [
        made(TENANT_CREATED, ("tenant", each.tenant_id), each.tenant_id, trail.details_of_tenant(each))
        for each in tenants
    ]
    for person in people:
        uid = uids[person.principal_id]
        details = trail.details_of_principal(person) | ({} if uid is None else {"uid": str(uid)})
        events.append(made(PRINCIPAL_CREATED, ("principal", person.principal_id), person.tenant_id, details))
    for key in keys:
        whose = trail.details_of_key(key, by_id[key.principal_id])
        events.append(made(KEY_CREATED, ("key", key.key_id), key.tenant_id, whose))
    return events
