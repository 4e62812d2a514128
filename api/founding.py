"""Tells the audit log, at the first start, of whom there was before there was a log: what `holdfast init` made.

Rules:

- It is told once, when the vault is open first. A log that tells of a principal, or that is long, is none of a first
  start.
- What cannot be recorded now is recorded later, as long as the gateway runs.
"""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from sqlalchemy import select

from api import trail
from api.services import Services
from appliance.audit.events import KEY_CREATED, PRINCIPAL_CREATED, SYSTEM, TENANT_CREATED, Event, EventClass
from appliance.audit.reading import LogReader
from appliance.errors import HoldfastError
from appliance.store import tables
from appliance.vault import TamperedValue

_AGAIN_S = 60.0
_AT_ONCE = 50  # events to one append
_SHORT: Final = 10_000  # entries: of a log that may be a first start's; while sealed, refusals come before
_LOG = logging.getLogger("holdfast.audit")


async def tell_founding(services: Services) -> None:
    """Record tenants, principals and keys that are older than the log, once the vault is open."""
    await services.audit.opened.wait()
    while True:
        try:
            if await asyncio.to_thread(_is_first_start, services.audit.directory):
                events = await _founding(services)
                for first in range(0, len(events), _AT_ONCE):
                    await services.audit.record(*events[first : first + _AT_ONCE], privileged=True)
        except TamperedValue as error:
            _LOG.error("what there was before the first start is not recorded: %s", error)
            return
        except (HoldfastError, OSError) as error:
            _LOG.warning("what there was before the first start is not recorded yet: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


def _is_first_start(directory: Path) -> bool:
    log = LogReader(directory)
    if log.oldest > 0 or log.size > _SHORT:
        return False
    return all(log.entry(sequence).event_class != PRINCIPAL_CREATED.number for sequence in range(log.size))


async def _founding(services: Services) -> list[Event]:
    identity, until = services.identity, services.lifecycle.started_at
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
        details = trail.details_of_key(key, by_id[key.principal_id])
        events.append(made(KEY_CREATED, ("key", key.key_id), key.tenant_id, details))
    return events
