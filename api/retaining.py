"""Has old entries of the audit log removed, once log and database were compared: old ones may tell of an older copy.

Rules:

- A retention of less than six months is an event, with whose word it is and why, before anything is removed by it.
- What cannot be removed now is removed later; nothing waits for it.
"""

import asyncio
import logging
import os

from api.services import Services
from appliance.audit.events import RETENTION_OVERRIDDEN, Actor, Event
from appliance.errors import HoldfastError
from appliance.settings import SIX_MONTHS_DAYS, AuditSettings

_EVERY_S = 3600.0
_AGAIN_S = 60.0
_LOG = logging.getLogger("holdfast.audit")


async def keep_retention(services: Services) -> None:
    """Remove what is old enough, every hour. Runs until cancelled."""
    await services.audit.compared.wait()
    settings, retention = services.settings.audit, services.audit.retention
    told = settings.retention_days >= SIX_MONTHS_DAYS
    while True:
        try:
            if not told:
                await services.audit.record(overridden(settings), privileged=True)
                told = True
            removed = await retention.run()
        except HoldfastError as error:
            retention.held = f"{error.message}: {error.cause}"
            _LOG.warning("%s", retention.held)
            await asyncio.sleep(_AGAIN_S)
            continue
        except Exception as error:  # a defect, or a file that is no file of the log: not the end of the gateway
            retention.held = f"the removal of old entries failed: {type(error).__name__}"
            _LOG.exception("the removal of old entries failed")
            await asyncio.sleep(_AGAIN_S)
            continue
        if removed is not None:
            _LOG.info("removed the entries of the audit log before %d", removed.kept_from)
        await asyncio.sleep(_EVERY_S)


def overridden(settings: AuditSettings) -> Event:
    """That a retention under six months is in force."""
    override = settings.retention_override
    return Event(
        RETENTION_OVERRIDDEN,
        Actor("user", str(os.geteuid())),
        counts={"retention_days": settings.retention_days},
        details={} if override is None else {"by": override.by, "why": override.reason},
    )
