"""Tells the audit log that the gateway begins, and has the log signed once the vault is open.

Rules:

- Where the start cannot be recorded the gateway begins and admits nothing: health says why. It is tried until it is
  done. What was answered too late may be in the log twice.
- Whoever opens the vault has the log signed at once; where that fails it is tried here until it is done.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence

from api.marking import tell_restores
from api.services import Services
from appliance.audit.configuration import digest, effective
from appliance.audit.events import GATEWAY_STARTED, SYSTEM, TENANT_REMOVED, VAULT_OPENED, Event
from appliance.errors import HoldfastError

_AGAIN_S = 5.0
_LOG = logging.getLogger("holdfast.audit")


async def record_start(services: Services, removed: Sequence[str]) -> None:
    """Record the start, then have the log signed; over when both are done.

    Args:
        removed: tenants of a proof that was cut off.
    """
    details = {"pid": str(os.getpid()), "settings": digest(effective(services.settings))}
    events = [Event(GATEWAY_STARTED, SYSTEM, details=details)]
    if not services.vault.sealed:  # a key file opened it: nobody asked for that
        events.append(Event(VAULT_OPENED, SYSTEM, target=("vault", services.vault.root_id)))
    events += [Event(TENANT_REMOVED, SYSTEM, tenant_id=each, target=("tenant", each)) for each in removed]
    said = ""
    while True:
        try:
            await tell_restores(services)
            await services.audit.record(*events, privileged=True)
            break
        except (HoldfastError, OSError) as error:
            said = _said_once("the gateway's start is not recorded yet", error, said)
            await asyncio.sleep(_AGAIN_S)
    if removed:
        with contextlib.suppress(HoldfastError):  # then it is recorded once more
            await services.throwaways.recorded(removed)
    await _sign(services)


async def _sign(services: Services) -> None:
    opened, said = services.audit.opened, ""
    while not opened.is_set():
        if not services.vault.sealed:
            try:
                await services.audit.sign()
            except (HoldfastError, OSError) as error:
                said = _said_once("the audit log is not signed yet", error, said)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN_S):
                await opened.wait()


def _said_once(what: str, why: Exception, said: str) -> str:
    """Log why something failed, unless that was `said` last; what to give next time."""
    if str(why) != said:
        _LOG.error("%s: %s", what, why)
    return str(why)
