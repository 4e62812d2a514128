"""Tells the audit log, at each start, what is set otherwise than at the last one.

Rules:

- What cannot be recorded now is recorded later, as long as the gateway runs; the next start compares with what was.
- What is recorded is not recorded again because the rest, or the copy that the next start compares with, found no room.
  Nor does it take of what is kept for administrators.
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
from appliance.audit.events import Event
from appliance.errors import HoldfastError
from appliance.vault import TamperedValue

_AGAIN_S = 60.0
_AT_ONCE = 50  # events to one append
_LOG = logging.getLogger("holdfast.audit")


async def tell_configuration(services: Services) -> None:
    """Record what changed since the last start, once the vault is open."""
    await services.audit.opened.wait()
    now = Configuration(effective(services.settings), await asyncio.to_thread(_model, services))
    untold: list[Event] | None = None
    while True:
        try:
            if untold is None:
                untold = await _changes(services, now)
            while untold:
                await services.audit.record(*untold[:_AT_ONCE])
                del untold[:_AT_ONCE]
            await asyncio.to_thread(remember, services.audit.directory, services.vault, now)
        except (HoldfastError, OSError) as error:
            _LOG.warning("what is set otherwise than at the last start is not recorded yet: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return


async def _changes(services: Services, now: Configuration) -> list[Event]:
    weak = weaknesses(services.settings)
    try:
        before, why = await asyncio.to_thread(last_start, services.audit.directory, services.vault), ""
    except TamperedValue as error:
        before, why = None, error.code
    return [recorded(now, weak, why=why)] if before is None else changes(before, now, weak)


def _model(services: Services) -> Model:
    process = services.engine_process
    if process is None:
        return Model("", str(services.settings.engine.socket), "")
    return Model(process.spec.served_name, str(process.spec.model), fingerprint(process.spec.model))
