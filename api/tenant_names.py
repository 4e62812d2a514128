"""Settings that go by a tenant's name, and names among them that no tenant has.

Rule: such a setting is told of, wherever an operator looks, and is never an error: its tenant may be made later. Until
then it applies to nobody: a tenant whose name was mistyped in it is kept as everybody is.
"""

import asyncio
import logging

from api.services import Services
from appliance.errors import HoldfastError

_AGAIN_S = 60.0
_LOG = logging.getLogger("holdfast.gateway")


async def settings_of_nobody(services: Services) -> list[str]:
    """The settings whose tenant does not exist, each as `holdfast.toml` writes it.

    Raises:
        HoldfastError: tenants cannot be found by their names now; the vault is sealed, or the store fails.
    """
    named = services.settings.tenant_names
    known = await services.identity.taken_names(set(named.values()))
    return [setting for setting, name in named.items() if name not in known]


async def tell_settings_of_nobody(services: Services) -> None:
    """Say them in the log, once the vault is open."""
    await services.audit.opened.wait()
    while True:
        try:
            for setting in await settings_of_nobody(services):
                _LOG.warning("%s applies to nobody: no tenant has that name", setting)
        except HoldfastError as error:
            _LOG.warning("whether settings name tenants that do not exist is not known: %s", error)
            await asyncio.sleep(_AGAIN_S)
        else:
            return
