"""Tenants, principals and keys over a real store: found by hash, refused at once, never shown again."""

import dataclasses
import logging

import pytest
from sqlalchemy import select, update

from appliance.identity import (
    Identity,
    InvalidApiKey,
    NameTaken,
    NotAnAdministrator,
    Permission,
    Principal,
    Role,
    Scopes,
    Tenant,
    UnknownIdentity,
)
from appliance.store import Store, tables
from appliance.vault import KeyPurpose, TamperedValue, Vault, VaultSealed

pytestmark = pytest.mark.anyio


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def identity(store: Store, vault: Vault, clock: Clock) -> Identity:
    return Identity(store, vault, now=clock)


@pytest.fixture
async def tenant(identity: Identity) -> Tenant:
    return await identity.create_tenant("research", idle_timeout_s=20.0)


@pytest.fixture
async def principal(identity: Identity, tenant: Tenant) -> Principal:
    return await identity.create_principal(tenant, "agent", Role.CLIENT)


async def test_a_key_says_who_brings_it(identity: Identity, tenant: Tenant, principal: Principal) -> None:
    scopes = Scopes(
        models=frozenset({"demo"}),
        requests_per_minute=3,
        concurrent_requests=2,
        tokens_per_day=1000,
        permissions=frozenset({Permission.TRANSCRIPT_READ}),
    )
    key, secret = await identity.create_key(principal, scopes, label="ci")
    caller = await identity.authenticate(secret)
    assert (caller.principal, caller.tenant, caller.key) == (principal, tenant, key)
    assert caller.key is not None
    assert caller.key.scopes == scopes


async def test_a_revoked_key_is_refused_at_the_very_next_request(identity: Identity, principal: Principal) -> None:
    key, secret = await identity.create_key(principal, Scopes())
    assert await identity.authenticate(secret)  # type: ignore[truthy-bool]
    await identity.revoke_key(key.key_id)
    with pytest.raises(InvalidApiKey, match="revoked"):
        await identity.authenticate(secret)


async def test_a_key_is_refused_from_the_second_of_its_expiry(
    identity: Identity, principal: Principal, clock: Clock
) -> None:
    _, secret = await identity.create_key(principal, Scopes(), expires_at=clock.now + 60)
    clock.now += 59.9
    await identity.authenticate(secret)
    clock.now += 0.1
    with pytest.raises(InvalidApiKey, match="expired"):
        await identity.authenticate(secret)


@pytest.mark.parametrize("secret", ["", "hf_", "hf_" + "A" * 43, "x" * 10_000, "hf_\u00e9", "' OR 1=1 --"])
async def test_what_is_no_key_is_refused(identity: Identity, principal: Principal, secret: str) -> None:
    await identity.create_key(principal, Scopes())
    with pytest.raises(InvalidApiKey) as caught:
        await identity.authenticate(secret)
    assert not secret or len(secret) < 4 or secret not in str(caught.value)


async def test_revoking_again_keeps_the_time_of_the_first(
    identity: Identity, principal: Principal, clock: Clock
) -> None:
    key, _ = await identity.create_key(principal, Scopes())
    first = await identity.revoke_key(key.key_id)
    clock.now += 10
    assert await identity.revoke_key(key.key_id) == first
    with pytest.raises(UnknownIdentity):
        await identity.revoke_key("ak_unknown")


async def test_no_secret_and_no_name_is_in_the_store_or_in_a_log(
    identity: Identity, store: Store, principal: Principal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key, secret = await identity.create_key(principal, Scopes(), label="Quetzal")
    await identity.authenticate(secret)
    for table in (tables.tenants, tables.principals, tables.api_keys):
        rows = await store.read(lambda db, table=table: [tuple(row) for row in db.execute(select(table))])  # type: ignore[misc]
        stored = repr(rows)
        for word in (secret, secret[3:], "Quetzal", "research", "agent"):
            assert word not in stored
    assert secret not in caplog.text
    assert secret not in repr(key)


async def test_names_are_unique_where_they_belong(identity: Identity, tenant: Tenant, principal: Principal) -> None:
    with pytest.raises(NameTaken, match="research"):
        await identity.create_tenant("research")
    with pytest.raises(NameTaken):
        await identity.create_principal(tenant, "agent", Role.CLIENT)
    other = await identity.create_tenant("sales")
    await identity.create_principal(other, "agent", Role.CLIENT)
    assert [each.name for each in await identity.principals(other)] == ["agent"]


async def test_a_tenant_is_found_by_name_and_by_id(identity: Identity, tenant: Tenant) -> None:
    assert await identity.tenant("research") == tenant
    assert await identity.tenant(tenant.tenant_id) == tenant
    with pytest.raises(UnknownIdentity, match="sales"):
        await identity.tenant("sales")


async def test_the_administrator_is_known_by_uid(identity: Identity) -> None:
    granted = frozenset({Permission.TRANSCRIPT_READ})
    made = await identity.create_principal(None, "root", Role.ADMIN, uid=1000, permissions=granted)
    caller = await identity.caller_of_uid(1000)
    assert caller.principal == made
    assert caller.tenant is None
    with pytest.raises(NotAnAdministrator, match="1001"):
        await identity.caller_of_uid(1001)
    with pytest.raises(NameTaken):
        await identity.create_principal(None, "second", Role.ADMIN, uid=1000)


async def test_rotating_a_tenants_key_changes_nothing_for_its_users(
    identity: Identity, store: Store, vault: Vault, tenant: Tenant, principal: Principal
) -> None:
    _, secret = await identity.create_key(principal, Scopes(), label="ci")
    salt = vault.mac(tenant.tenant_id, KeyPurpose.SALT, "label")
    for scope in (tenant, None, tenant):
        assert await identity.rotate_keys(scope) > 0
    reopened = Identity(store, vault)
    assert (await reopened.authenticate(secret)).tenant == tenant
    assert vault.mac(tenant.tenant_id, KeyPurpose.SALT, "label") == salt


async def test_a_name_moved_to_another_row_is_refused_and_the_row_named(
    identity: Identity, store: Store, tenant: Tenant
) -> None:
    other = await identity.create_tenant("sales")
    tenants = tables.tenants

    def swap(db: object) -> None:
        from sqlalchemy import Connection

        assert isinstance(db, Connection)
        stolen = select(tenants.c.name).where(tenants.c.tenant_id == tenant.tenant_id).scalar_subquery()
        db.execute(update(tenants).where(tenants.c.tenant_id == other.tenant_id).values(name=stolen))

    await store.transact(swap)
    with pytest.raises(TamperedValue, match=other.tenant_id):
        await identity.tenants()


async def test_a_row_put_under_a_newer_version_is_refused(identity: Identity, store: Store, tenant: Tenant) -> None:
    await store.transact(lambda db: db.execute(update(tables.tenants).values(row_version=2)))
    with pytest.raises(TamperedValue, match=tenant.tenant_id):
        await identity.tenants()


async def test_sealed_nobody_can_be_told_from_anybody(identity: Identity, vault: Vault, principal: Principal) -> None:
    _, secret = await identity.create_key(principal, Scopes())
    await identity.authenticate(secret)
    vault.seal()
    with pytest.raises(VaultSealed):
        await identity.authenticate(secret)


async def test_a_store_that_others_write_to_is_asked_every_time(
    identity: Identity, store: Store, principal: Principal
) -> None:
    key, secret = await identity.create_key(principal, Scopes())
    await identity.authenticate(secret)
    # As another gateway would revoke it.
    api_keys = tables.api_keys
    await store.transact(
        lambda db: db.execute(update(api_keys).where(api_keys.c.key_id == key.key_id).values(revoked_at=1.0))
    )
    if store.exclusive:
        return
    with pytest.raises(InvalidApiKey):
        await identity.authenticate(secret)


def test_a_negative_limit_is_no_limit_at_all_and_refused() -> None:
    with pytest.raises(ValueError, match="tokens_per_day"):
        dataclasses.replace(Scopes(), tokens_per_day=-1)
