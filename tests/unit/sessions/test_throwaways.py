"""Tenants that were made for a proof go with everything of theirs, be it at the next start, and nobody else does."""

import contextlib
from collections.abc import Sequence

import pytest

from appliance.identity import Identity, Isolation, Tenant
from appliance.sessions import Sessions, Throwaways
from appliance.settings import SessionSettings
from appliance.store import Change, DatabaseKeys, Store, StoreUnavailable, tables
from appliance.vault import KeyPurpose, RootKey, Vault
from tests.unit.sessions.tenants import count, rows, used

pytestmark = pytest.mark.anyio


@pytest.fixture
def identity(store: Store, vault: Vault) -> Identity:
    return Identity(store, vault)


@pytest.fixture
def sessions(store: Store, vault: Vault) -> Sessions:
    return Sessions(store, vault, SessionSettings(), block_size=4)


async def _made(throwaways: Throwaways, identity: Identity) -> Tenant:
    return await throwaways.create_tenant(identity, "throwaway", isolation=Isolation.SESSION)


async def test_everything_of_a_marked_tenant_goes_and_nothing_of_anothers(
    identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    kept = await used(identity, sessions, store, await identity.create_tenant("kept"))
    others, keys = rows(store, kept), count(store, tables.keys)
    assert all(others.values()), "the test speaks of rows in every table"
    throwaways = Throwaways(store, vault)
    throwaway = await used(identity, sessions, store, await _made(throwaways, identity))
    assert await throwaways.remove_all() == [throwaway.tenant_id]
    assert set(rows(store, throwaway).values()) == {0}
    assert rows(store, kept) == others
    assert count(store, tables.quota_days) == 1
    left = {purpose.value for purpose in (KeyPurpose.AUDIT, KeyPurpose.WRAPPING)}
    assert count(store, tables.keys) == keys + len(left), "no session's key stays, and of the tenant's only two"
    assert [each.tenant_id for each in await identity.tenants()] == [kept.tenant_id]


async def test_what_a_proof_left_that_was_cut_off_goes_at_the_next_start_though_the_vault_is_sealed(
    identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    tenant = await used(identity, sessions, store, await _made(Throwaways(store, vault), identity))
    after_the_crash = Throwaways(store, Vault(DatabaseKeys(store)))
    assert await after_the_crash.remove_all() == [tenant.tenant_id]
    assert set(rows(store, tenant).values()) == {0}
    assert await after_the_crash.remove_all() == [tenant.tenant_id], "that it was removed is not recorded yet"
    await after_the_crash.recorded([tenant.tenant_id])
    assert await after_the_crash.remove_all() == []


async def test_no_moment_leaves_a_tenant_that_is_not_marked(
    identity: Identity, store: Store, vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def cut_off(*_: object) -> None:
        raise StoreUnavailable("gone", cause="the gateway was killed", remedy="start it")

    write = store.write

    with monkeypatch.context() as patch:

        async def last_write(changes: Sequence[Change]) -> None:
            await write(changes)
            patch.setattr(store, "write", cut_off)
            patch.setattr(store, "transact", cut_off)

        patch.setattr(store, "write", last_write)
        with contextlib.suppress(StoreUnavailable):
            await _made(Throwaways(store, vault), identity)
    (left,) = await identity.tenants()
    assert await Throwaways(store, vault).remove_all() == [left.tenant_id]
    assert await identity.tenants() == []


async def test_records_of_a_removed_tenant_in_the_audit_log_can_still_be_read(
    identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    throwaways = Throwaways(store, vault)
    tenant = await used(identity, sessions, store, await _made(throwaways, identity))
    key_id = vault.audit_key_id(tenant.tenant_id)
    secret = vault.audit_secret(key_id, "record")
    await throwaways.remove_all()
    later = Vault(DatabaseKeys(store))
    later.open(RootKey(b"r" * 32))
    assert later.audit_secret(key_id, "record") == secret
