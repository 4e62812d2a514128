"""Tells the audit log, at each start, what is set otherwise than at the last one.

Rule: what cannot be recorded now is recorded later, as long as the gateway runs; the next start compares with what was.
"""

import asyncio
import logging

from api.services import Services
from appliance.audit.configuration import (
    Configuration,
    Model,
    changes,
    effective,
    fingerprint,
    last_start,
    recorded,
    remember,
    weaknesses,
)
from appliance.errors import HoldfastError
from appliance.vault import TamperedValue

_AGAIN_S = 60.0
_AT_ONCE = 50  # events to one append
_LOG = logging.getLogger("holdfast.audit")


async def tell_configuration(services: Services) -> None:
    """Record what changed since the last start, once the vault is open."""
    await services.audit.opened.wait()
    now = Configuration(effective(services.settings), await asyncio.to_thread(_model, services))
    while True:
        try:
            await _tell(services, now)
        except (HoldfastError, OSError) as error:
            _LOG.warning("what is set otherwise than at the last start is not recorded yet: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


async def _tell(services: Services, now: Configuration) -> None:
    audit, vault, weak = services.audit, services.vault, weaknesses(services.settings)
    try:
        before, why = await asyncio.to_thread(last_start, audit.directory, vault), ""
    except TamperedValue as error:
        before, why = None, error.code
    events = [recorded(now, weak, why=why)] if before is None else changes(before, now, weak)
    for first in range(0, len(events), _AT_ONCE):
        await audit.record(*events[first : first + _AT_ONCE], privileged=True)
    await asyncio.to_thread(remember, audit.directory, vault, now)


def _model(services: Services) -> Model:
    process = services.engine_process
    if process is None:
        return Model("", str(services.settings.engine.socket), "")
    return Model(process.spec.served_name, str(process.spec.model), fingerprint(process.spec.model))
