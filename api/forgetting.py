"""Forgetting a session, with what of it the tenant's other sessions could reach."""

from api.services import Services
from appliance.identity import Caller, Isolation
from appliance.sessions import Forgotten


async def forget_session(services: Services, caller: Caller, session_id: str) -> Forgotten:
    """Shred a session, and put what is resident of it out of reach.

    Where a tenant shares everything, what is resident is under the tenant's salt: its epoch is raised. First, because a
    session that was forgotten cannot be forgotten again.

    Raises:
        UnknownSession: there is none, or it is not this caller's to forget.
    """
    known = await services.sessions.forgettable(caller, session_id)
    tenant = await services.identity.tenant(known.tenant_id)
    if tenant.isolation is Isolation.TENANT:
        await services.identity.raise_cache_epoch(tenant)
    return await services.sessions.forget(caller, session_id)
