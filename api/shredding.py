"""Shredding a tenant: its turns end, its keys are destroyed, the engine lets go of it, and the audit log says so.

Rules:

- In this order, and safe when killed between any two steps: nothing is lost before the keys are destroyed, and from
  then on a mark in the database has the rest done, by this gateway or the next (`appliance.sessions.shredding`).
- The engine need not be told at the next start: one that starts has nothing on its device or in DRAM, and what it finds
  on its disk it asks for the keys of, which there are none of.
- It is recorded under the system's key, so not before the vault is open.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from api.engine_leases import release
from api.services import Services
from appliance.audit import Actor, Event
from appliance.audit.events import TENANT_SHREDDED
from appliance.engine.protocol import MAX_RELEASES
from appliance.errors import HoldfastError
from appliance.sessions import ShreddedTenant, TenantShredded
from appliance.vault import VaultSealed

_TURNS_END_S: Final = 5.0  # to be committed and told; what takes longer is not kept
_LOOK_EVERY_S: Final = 0.02
_AGAIN_S: Final = 5.0
_LOG = logging.getLogger("holdfast.gateway")


@dataclass(frozen=True, slots=True)
class Shredded:
    """A tenant that is no more.

    Attributes:
        erased: nothing of its keys is left in the database's files; False: that could not be done yet, and will be.
        released: the engine was told to let go of all that it held.
    """

    tenant: ShreddedTenant
    erased: bool
    released: bool


async def shred_tenant(services: Services, tenant_id: str, actor: Actor, source: str, *, damage: str = "") -> Shredded:
    """Shred a tenant; that it was is in the audit log when this returns.

    Args:
        damage: why its row could not be opened, as the code of an error; empty: it could.

    Raises:
        UnknownIdentity: there is no such tenant any more.
        AuditUnavailable: it is shredded, and recorded as soon as it can be.
        HoldfastError: nothing is shredded, or the store could not say.
    """
    shredding = services.shredding
    try:
        shredded, labels = await shredding.shred(
            tenant_id, actor, source, damage=damage, end_turns=partial(_end_turns, services, tenant_id)
        )
        services.ledger.forget_tenant(tenant_id)
        services.metrics.forget_tenant(tenant_id)
        released = bool(labels) or not shredded.sessions  # without labels it cannot be told of any
        for first in range(0, len(labels), MAX_RELEASES):
            released = await release(services, labels[first : first + MAX_RELEASES]) and released
        finished = await finish(services)
    except BaseException:
        shredding.left.set()
        raise
    if tenant_id in finished:
        erased = finished[tenant_id]
    else:  # somebody else has finished it
        erased = await services.store.erasures.erase()
    return Shredded(shredded, erased, released)


async def finish(services: Services) -> dict[str, bool]:
    """Do what is left to do of the tenants that are marked; their ids, each with whether its keys are erased.

    Raises:
        VaultSealed, AuditUnavailable: it is to be done again.
    """
    shredding, finished = services.shredding, {}
    async with shredding.finishing:
        for shredded in await shredding.unfinished():
            await shredding.remove_rows(shredded)
            finished[shredded.tenant_id] = erased = await services.store.erasures.erase()
            if services.vault.sealed:
                raise VaultSealed
            await services.audit.record(_event(shredded, erased=erased), privileged=True)
            await shredding.recorded(shredded)
    return finished


async def keep_finishing(services: Services, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep) -> None:
    """Finish what a gateway that was killed has left, once the vault is open, and what this one leaves.

    Runs until cancelled.
    """
    await services.audit.opened.wait()
    while True:
        services.shredding.left.clear()
        try:
            await finish(services)
        except (HoldfastError, OSError) as error:
            _LOG.warning("a tenant's shredding is not finished: %s", error)
            await sleep(_AGAIN_S)
        else:
            await services.shredding.left.wait()


async def _end_turns(services: Services, tenant_id: str) -> None:
    """Break off a tenant's turns, those too that come to run meanwhile, and wait until they have ended."""
    until = services.monotonic() + _TURNS_END_S
    while running := [turn for turn in services.lifecycle.turns if turn.tenant_id == tenant_id]:
        for turn in running:
            turn.interrupt(TenantShredded())
        if services.monotonic() >= until:
            _LOG.warning("%d turns of a tenant that is shredded have not ended, and are not kept", len(running))
            return
        await asyncio.sleep(_LOOK_EVERY_S)


def _event(shredded: ShreddedTenant, *, erased: bool) -> Event:
    return Event(
        TENANT_SHREDDED,
        shredded.actor,
        tenant_id=shredded.tenant_id,
        source=shredded.source,
        target=("tenant", shredded.tenant_id),
        counts={"sessions": shredded.sessions, "turns": shredded.turns},
        details={"erased": str(erased).lower(), **({"row": shredded.damage} if shredded.damage else {})},
    )
