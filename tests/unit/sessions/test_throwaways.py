"""Tenants that were made for a proof go with everything of theirs, be it at the next start, and nobody else does."""

from typing import Any

import pytest
from sqlalchemy import Connection, Table, func, insert, select

from appliance.identity import Caller, Identity, Role, Scopes, Tenant
from appliance.sessions import Outcome, SessionHints, Sessions, Throwaways, Turn, TurnKind, TurnState
from appliance.settings import SessionSettings
from appliance.store import DatabaseKeys, Store, tables
from appliance.vault import KeyPurpose, RootKey, Vault

pytestmark = pytest.mark.anyio

OWNED = (
    tables.tenants,
    tables.principals,
    tables.api_keys,
    tables.sessions,
    tables.turns,
    tables.trees,
    tables.chain,
)


@pytest.fixture
def identity(store: Store, vault: Vault) -> Identity:
    return Identity(store, vault)


@pytest.fixture
def sessions(store: Store, vault: Vault) -> Sessions:
    return Sessions(store, vault, SessionSettings(), block_size=4)


async def _used(identity: Identity, sessions: Sessions, store: Store, name: str) -> Tenant:
    """A tenant with a principal, a key, a tree of two sessions with a turn each, and tokens of a day."""
    tenant = await identity.create_tenant(name)
    principal = await identity.create_principal(tenant, "agent", Role.CLIENT)
    key, _ = await identity.create_key(principal, Scopes())
    caller = Caller(principal, tenant, key)
    for hints in (SessionHints("one"), SessionHints("two", parent_client_id="one")):
        turn = Turn(TurnKind.CHAT, "demo", [{"role": "user", "content": f"I am {name}"}], {}, hints)
        session = await sessions.resolve(caller, turn)
        await sessions.record(session, turn, _outcome(f"{name} {hints}"))
    tokens = insert(tables.quota_days).values(api_key_id=key.key_id, day="2026-01-01", tokens=5)
    await store.transact(lambda db: db.execute(tokens))
    return tenant


def _outcome(response_id: str) -> Outcome:
    return Outcome(
        response_id=response_id,
        state=TurnState.COMPLETE,
        answer={"role": "assistant", "content": "hello"},
        prompt_token_ids=[1, 2, 3],
        completion_token_ids=[4],
        prompt_tokens=3,
        cached_tokens=0,
        completion_tokens=1,
        finish_reason="stop",
        started_at=1.0,
        ended_at=2.0,
    )


def _count(store: Store, table: Table, *where: Any) -> int:
    def count(db: Connection) -> int:
        return int(db.execute(select(func.count()).select_from(table).where(*where)).scalar_one())

    return store.read_blocking(count)


def _rows(store: Store, tenant: Tenant) -> dict[str, int]:
    return {table.name: _count(store, table, table.c.tenant_id == tenant.tenant_id) for table in OWNED}


async def test_everything_of_a_marked_tenant_goes_and_nothing_of_anothers(
    identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    kept = await _used(identity, sessions, store, "kept")
    others, keys = _rows(store, kept), _count(store, tables.keys)
    assert all(others.values()), "the test speaks of rows in every table"
    throwaway = await _used(identity, sessions, store, "throwaway")
    throwaways = Throwaways(store, vault)
    await throwaways.mark(throwaway.tenant_id)
    assert await throwaways.remove_all() == [throwaway.tenant_id]
    assert set(_rows(store, throwaway).values()) == {0}
    assert _rows(store, kept) == others
    assert _count(store, tables.quota_days) == 1
    left = {purpose.value for purpose in (KeyPurpose.AUDIT, KeyPurpose.WRAPPING)}
    assert _count(store, tables.keys) == keys + len(left), "no session's key stays, and of the tenant's only two"
    assert [each.tenant_id for each in await identity.tenants()] == [kept.tenant_id]


async def test_what_a_proof_left_that_was_cut_off_goes_at_the_next_start_though_the_vault_is_sealed(
    identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    tenant = await _used(identity, sessions, store, "throwaway")
    await Throwaways(store, vault).mark(tenant.tenant_id)
    after_the_crash = Throwaways(store, Vault(DatabaseKeys(store)))
    assert await after_the_crash.remove_all() == [tenant.tenant_id]
    assert set(_rows(store, tenant).values()) == {0}
    assert await after_the_crash.remove_all() == [], "the mark went with it"


async def test_a_tenant_that_was_marked_and_never_made_is_forgotten(store: Store, vault: Vault) -> None:
    throwaways = Throwaways(store, vault)
    await throwaways.mark("ten_never")
    assert await throwaways.remove_all() == ["ten_never"]
    assert await throwaways.remove_all() == []


async def test_records_of_a_removed_tenant_in_the_audit_log_can_still_be_read(
    identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    tenant = await _used(identity, sessions, store, "throwaway")
    key_id = vault.audit_key_id(tenant.tenant_id)
    secret = vault.audit_secret(key_id, "record")
    throwaways = Throwaways(store, vault)
    await throwaways.mark(tenant.tenant_id)
    await throwaways.remove_all()
    later = Vault(DatabaseKeys(store))
    later.open(RootKey(b"r" * 32))
    assert later.audit_secret(key_id, "record") == secret
