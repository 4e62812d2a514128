"""Tenants that were used, and what is stored of them."""

from typing import Any

from sqlalchemy import Table, func, insert, select

from appliance.identity import Caller, Identity, Role, Scopes, Tenant
from appliance.sessions import Outcome, SessionHints, Sessions, Turn, TurnKind, TurnState
from appliance.store import Store, tables

OWNED = (
    tables.tenants,
    tables.principals,
    tables.api_keys,
    tables.sessions,
    tables.turns,
    tables.trees,
    tables.chain,
)


async def a_caller(identity: Identity, tenant: Tenant) -> tuple[Caller, str]:
    """A new client of a tenant's, and the secret of its API key."""
    principal = await identity.create_principal(tenant, "agent", Role.CLIENT)
    key, secret = await identity.create_key(principal, Scopes())
    return Caller(principal, tenant, key), secret


async def used(identity: Identity, sessions: Sessions, store: Store, tenant: Tenant) -> Tenant:
    """A tenant with a principal, a key, a tree of two sessions with a turn each, and tokens of a day."""
    name = tenant.name
    caller, _ = await a_caller(identity, tenant)
    assert caller.key is not None
    key = caller.key
    for hints in (SessionHints("one"), SessionHints("two", parent_client_id="one")):
        turn = Turn(TurnKind.CHAT, "demo", [{"role": "user", "content": f"I am {name}"}], {}, hints)
        session = await sessions.resolve(caller, turn)
        await sessions.record(session, turn, outcome(f"{name} {hints}"))
    tokens = insert(tables.quota_days).values(api_key_id=key.key_id, day="2026-01-01", tokens=5)
    await store.transact(lambda db: db.execute(tokens))
    return tenant


def outcome(response_id: str) -> Outcome:
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


def count(store: Store, table: Table, *where: Any) -> int:
    query = select(func.count()).select_from(table).where(*where)
    return store.read_blocking(lambda db: int(db.execute(query).scalar_one()))


def rows(store: Store, tenant: Tenant) -> dict[str, int]:
    return {table.name: count(store, table, table.c.tenant_id == tenant.tenant_id) for table in OWNED}
