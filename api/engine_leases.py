"""Telling the engine that what it holds of some sessions is not wanted any more."""

import asyncio
from collections.abc import Sequence
from typing import Final

from api.services import Services
from appliance.errors import HoldfastError

_DEADLINE_S: Final = 5.0


async def release(services: Services, lease_labels: Sequence[str]) -> bool:
    """Have the engine let go of leases, and of the blocks that nobody else uses; whether it could be told in time."""
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await services.engine.leases(release=lease_labels)
    except (HoldfastError, TimeoutError):
        return False
    return True
