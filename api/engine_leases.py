"""Telling the engine that what it holds of some sessions is not wanted any more.

Rules:

- What the engine could not be told it is told again until it answers: what was forgotten must not stay in a tier, nor
  its key in the engine, because the engine was busy or away for a moment. An answer is to what was asked before it: a
  session that is to go once more meanwhile is still due.
- Telling it twice costs a session that went on meanwhile its KV, which is speed and nothing else.
- So many are remembered at most. Beyond them the oldest is given up, and the log says so.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from api.services import Services
from appliance.engine.protocol import MAX_RELEASES
from appliance.errors import HoldfastError

_DEADLINE_S: Final = 5.0
_PAUSES_S: Final = (1.0, 60.0)  # after the first failure, and at most
_LOG = logging.getLogger("holdfast.engine")


async def release(services: Services, lease_labels: Sequence[str]) -> bool:
    """Have the engine let go of leases, and of the blocks that nobody else uses; whether it could be told in time."""
    due = services.lifecycle.unreleased
    due.update({label: object() for label in lease_labels})
    while len(due) > MAX_RELEASES:
        del due[next(iter(due))]
        _LOG.error("The engine was not told to let go of a session: too many wait for it. Start it again.")
    told = dict(due)
    if not told:
        return True
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await services.engine.leases(release=tuple(told))
    except (HoldfastError, TimeoutError):
        services.lifecycle.release_again.set()
        return False
    for label, asked in told.items():
        if due.get(label) is asked:
            del due[label]
    return True


async def keep_releasing(services: Services, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
    """Tell the engine again what it could not be told. Runs until cancelled."""
    pause_s, longest_s = _PAUSES_S
    while True:
        await services.lifecycle.release_again.wait()
        services.lifecycle.release_again.clear()
        await sleep(pause_s)
        pause_s = _PAUSES_S[0] if await release(services, ()) else min(2 * pause_s, longest_s)
