"""Names of tenants in settings: looked up, and no tenant's row is opened for it."""

from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import update

from api.tenant_names import settings_of_nobody
from appliance.identity import Identity
from appliance.store import Store, tables
from appliance.vault import TamperedValue, Vault, VaultSealed

pytestmark = pytest.mark.anyio


async def test_a_name_is_known_though_no_tenants_row_opens(store: Store, vault: Vault) -> None:
    identity = Identity(store, vault)
    await identity.create_tenant("treasury")
    await identity.create_tenant("others")
    await store.transact(lambda db: db.execute(update(tables.tenants).values(isolation="tenant")))
    with pytest.raises(TamperedValue):
        await identity.tenants()
    names = {'sessions.tenants."treasury"': "treasury", 'sessions.tenants."tresury"': "tresury"}
    services: Any = SimpleNamespace(settings=SimpleNamespace(tenant_names=names), identity=identity)
    assert await settings_of_nobody(services) == ['sessions.tenants."tresury"']
    vault.seal()
    with pytest.raises(VaultSealed):
        await settings_of_nobody(services)
    names.clear()
    assert await settings_of_nobody(services) == []
