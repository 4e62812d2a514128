"""What the engine is answered of tenants that are kept strictly."""

from functools import partial

import pytest
from sqlalchemy import delete, update

from api.tier_keys import key_of, strict_labels
from appliance.engine.tier_keys import SessionGone
from appliance.identity import Caller, Identity, Role, Scopes
from appliance.sessions import Outcome, Session, Sessions, Turn, TurnKind, TurnState
from appliance.sessions.labels import LabelNotKnown
from appliance.sessions.turn import SessionHints
from appliance.settings import SessionSettings, TenantRetention
from appliance.store import Store, tables
from appliance.vault import KeyPurpose, RootKey, Vault, VaultSealed

pytestmark = pytest.mark.anyio


async def _said(identity: Identity, sessions: Sessions, name: str) -> Session:
    """A session of a new tenant, with one turn."""
    tenant = await identity.create_tenant(name)
    principal = await identity.create_principal(tenant, "agent", Role.CLIENT)
    key, _ = await identity.create_key(principal, Scopes())
    turn = Turn(TurnKind.CHAT, "demo", [{"role": "user", "content": "Hello."}], {}, SessionHints())
    session = await sessions.resolve(Caller(principal, tenant, key), turn)
    answer = {"role": "assistant", "content": "Hello."}
    await sessions.record(
        session, turn, Outcome("chatcmpl-1", TurnState.COMPLETE, answer, [1, 2], [3], 2, 0, 1, "stop", 1.0, 2.0)
    )
    return session


async def test_what_tiers_have_of_a_tenant_that_became_strict_is_gone(store: Store, vault: Vault) -> None:
    identity = Identity(store, vault)
    before = Sessions(store, vault, SessionSettings())
    soft = await _said(identity, before, "soft")
    strict = await _said(identity, before, "strict")
    retention = {"strict": TenantRetention(retention="strict"), "soft": TenantRetention(kv_cap=0.5)}
    await store.transact(
        lambda db: db.execute(update(tables.tenants).values(isolation="tenant"))
    )  # no row opens any more
    settings = SessionSettings(tenants={**retention, "nobody": TenantRetention(retention="strict")})
    after = Sessions(store, vault, settings)
    answer = key_of(after, partial(strict_labels, settings, identity, vault))
    vault.seal()
    for session in (soft, strict):  # nothing is gone because nobody can say now whose it is
        with pytest.raises(VaultSealed):
            await answer(session.tenant_label, session.lease_label)
    vault.open(RootKey(b"r" * 32))
    with pytest.raises(SessionGone):
        await answer(strict.tenant_label, strict.lease_label)
    assert len(await answer(soft.tenant_label, soft.lease_label)) == 32


@pytest.mark.parametrize("fault", ["missing", "damaged"])
async def test_a_tenant_whose_key_cannot_be_had_costs_no_other_tenant_anything(
    store: Store, vault: Vault, fault: str
) -> None:
    identity = Identity(store, vault)
    before = Sessions(store, vault, SessionSettings())
    whole = await _said(identity, before, "whole")
    broken = await _said(identity, before, "broken")
    keys = tables.keys
    salt = (keys.c.scope == broken.tenant_id) & (keys.c.purpose == KeyPurpose.SALT.value)
    change = delete(keys).where(salt) if fault == "missing" else update(keys).where(salt).values(wrapped=bytes(40))
    await store.transact(lambda db: db.execute(change))
    vault.seal()
    vault.open(RootKey(b"r" * 32))
    settings = SessionSettings(tenants={"broken": TenantRetention(retention="strict")})
    answer = key_of(Sessions(store, vault, settings), partial(strict_labels, settings, identity, vault))
    for _ in range(2):
        assert len(await answer(whole.tenant_label, whole.lease_label)) == 32
    for label in (broken.lease_label, "0" * 32):
        with pytest.raises(LabelNotKnown):
            await answer(broken.tenant_label, label)
