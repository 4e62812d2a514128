"""A tenant that is shredded goes with every key of its own and no other; killed at any step, wholly or not at all."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, bindparam, select, update

from appliance.audit import Actor
from appliance.identity import Caller, Identity, InvalidApiKey, Principal, Role, Tenant, UnknownIdentity
from appliance.sessions import (
    SessionForgotten,
    SessionHints,
    Sessions,
    Shredding,
    TenantShredded,
    Turn,
    TurnKind,
    UnknownSession,
    removal,
)
from appliance.settings import SessionSettings
from appliance.store import Change, DatabaseKeys, Store, StoreUnavailable, tables
from appliance.vault import KeyMissing, KeyPurpose, RootKey, Vault, VaultSealed
from tests.unit.sessions.tenants import a_caller, count, outcome, rows, used

pytestmark = pytest.mark.anyio

ADMINISTRATOR = Actor("principal", "prn_1", "admin")
APPLIANCE = Caller(Principal("prn_1", None, "administrator", Role.ADMIN, frozenset()))
ASKED = Turn(TurnKind.CHAT, "demo", [{"role": "user", "content": "hello"}], {}, SessionHints("one"))


@pytest.fixture
def identity(store: Store, vault: Vault) -> Identity:
    return Identity(store, vault)


@pytest.fixture
def sessions(store: Store, vault: Vault) -> Sessions:
    return Sessions(store, vault, SessionSettings(), block_size=4)


@pytest.fixture
def shredding(store: Store, vault: Vault, identity: Identity, sessions: Sessions) -> Shredding:
    return Shredding(store, vault, identity, sessions)


@pytest.fixture
def in_small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "_SESSIONS_AT_ONCE", 1)
    monkeypatch.setattr(removal, "_TURNS_AT_ONCE", 1)


async def _nothing() -> None:
    """No turn runs."""


async def _shred(
    shredding: Shredding, tenant: Tenant, end_turns: Callable[[], Awaitable[None]] = _nothing
) -> tuple[Any, list[str]]:
    return await shredding.shred(tenant.tenant_id, ADMINISTRATOR, "uid=1000", end_turns=end_turns)


def _again(store: Store) -> Shredding:
    """After a restart."""
    vault = Vault(DatabaseKeys(store))
    vault.open(RootKey(b"r" * 32))
    return Shredding(store, vault, Identity(store, vault), Sessions(store, vault, SessionSettings()))


def _keys_of(store: Store, tenant: Tenant) -> list[bytes]:
    """A tenant's wrapped keys, and its sessions'."""
    keys, sessions = tables.keys.c, tables.sessions.c
    own = select(sessions.session_id).where(sessions.tenant_id == tenant.tenant_id)
    query = select(keys.wrapped).where((keys.scope == tenant.tenant_id) | keys.scope.in_(own))
    return [bytes(each) for each in store.read_blocking(lambda db: db.execute(query).scalars().all())]


@contextlib.contextmanager
def _killed_at(monkeypatch: pytest.MonkeyPatch, store: Store, step: str) -> Iterator[None]:
    """What is asked of the store at that step never comes to anything."""

    async def cut_off(*_: object) -> None:
        raise StoreUnavailable("gone", cause="the gateway was killed", remedy="start it")

    with monkeypatch.context() as patch:
        patch.setattr(store, step, cut_off)
        with pytest.raises(StoreUnavailable):
            yield


@pytest.mark.usefixtures("in_small_steps")
async def test_everything_of_a_tenant_goes_with_all_of_its_keys_and_nothing_of_anothers(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store
) -> None:
    kept = await used(identity, sessions, store, await identity.create_tenant("kept"))
    others, keys = rows(store, kept), count(store, tables.keys)
    tenant = await used(identity, sessions, store, await identity.create_tenant("shredded"))
    await identity.rotate_keys(tenant)  # which leaves a retired one
    wrapped = _keys_of(store, tenant)
    shredded, labels = await _shred(shredding, tenant)
    assert (shredded.tenant_id, shredded.sessions, shredded.turns) == (tenant.tenant_id, 2, 2)
    assert shredded.actor == ADMINISTRATOR
    assert len(set(labels)) == 2
    await shredding.remove_rows(shredded)
    assert set(rows(store, tenant).values()) == {0}
    assert rows(store, kept) == others
    assert count(store, tables.quota_days) == 1
    assert count(store, tables.keys) == keys, "no key of the tenant's stays, nor of its sessions'"
    assert [each.tenant_id for each in await identity.tenants()] == [kept.tenant_id]
    assert len(wrapped) == 8  # two that wrap, four others, and two sessions'
    assert await store.erasures.erase()
    if store.dialect == "sqlite":
        path = Path(store.place)
        files = b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))
        assert [each for each in wrapped if each in files] == []


async def test_its_records_in_the_audit_log_can_be_read_by_nobody(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    tenant = await used(identity, sessions, store, await identity.create_tenant("shredded"))
    key_id = vault.audit_key_id(tenant.tenant_id)
    await _shred(shredding, tenant)
    for asked in (vault, _again(store)._vault):
        with pytest.raises(KeyMissing):
            asked.audit_secret(key_id, "record")
        with pytest.raises(KeyMissing):
            asked.mac(tenant.tenant_id, KeyPurpose.AUDIT, "digest-prompt", b"hello")


async def test_its_keys_are_refused_from_the_moment_on_in_which_it_is_shredded(
    shredding: Shredding, identity: Identity
) -> None:
    tenant, other = await identity.create_tenant("shredded"), await identity.create_tenant("other")
    _, secret = await a_caller(identity, tenant)
    _, others = await a_caller(identity, other)
    await identity.authenticate(secret)
    refused = []

    async def ask() -> None:
        await identity.authenticate(others)
        with pytest.raises(InvalidApiKey, match="being shredded") as error:
            await identity.authenticate(secret)
        refused.append(error)

    await _shred(shredding, tenant, ask)
    assert refused
    with pytest.raises(InvalidApiKey):
        await identity.authenticate(secret)
    await identity.authenticate(others)


async def test_a_turn_that_runs_meanwhile_is_written_down_nowhere_and_no_other_begins(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store
) -> None:
    tenant = await identity.create_tenant("shredded")
    caller, _ = await a_caller(identity, tenant)
    first, later = await sessions.resolve(caller, ASKED), await sessions.resolve(caller, ASKED)
    await sessions.record(first, ASKED, outcome("before"))

    async def ends_too_late() -> None:
        with pytest.raises(TenantShredded):
            await sessions.resolve(caller, ASKED)

    shredded, (label,) = await _shred(shredding, tenant, ends_too_late)
    assert label == first.lease_label
    with pytest.raises(SessionForgotten):
        await sessions.record(later, ASKED, outcome("late"))
    assert later.was_ended(), "the engine is told of it again"
    with pytest.raises(KeyMissing):
        await sessions.resolve(caller, ASKED)
    await shredding.remove_rows(shredded)
    assert set(rows(store, tenant).values()) == {0}
    assert _keys_of(store, tenant) == []


async def test_a_turn_that_is_being_written_down_is_waited_for(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await identity.create_tenant("shredded")
    caller, _ = await a_caller(identity, tenant)
    session = await sessions.resolve(caller, ASKED)
    write, is_writing, may_write = store.write, asyncio.Event(), asyncio.Event()

    async def slowly(changes: list[Change]) -> None:
        is_writing.set()
        await may_write.wait()
        await write(changes)

    monkeypatch.setattr(store, "write", slowly)
    recording = asyncio.create_task(sessions.record(session, ASKED, outcome("slow")))
    await is_writing.wait()

    async def go_on_in_a_moment() -> None:
        asyncio.get_running_loop().call_soon(may_write.set)

    shredded, _ = await _shred(shredding, tenant, go_on_in_a_moment)
    await recording
    assert (shredded.sessions, shredded.turns) == (1, 1)
    await shredding.remove_rows(shredded)
    assert set(rows(store, tenant).values()) == {0}


async def test_a_turn_that_ends_while_its_keys_are_destroyed_is_not_written_down(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await identity.create_tenant("shredded")
    caller, _ = await a_caller(identity, tenant)
    session = await sessions.resolve(caller, ASKED)
    transact, refused = store.transact, []

    async def just_before(work: Callable[[Connection], object]) -> object:
        with pytest.raises(SessionForgotten) as error:
            await sessions.record(session, ASKED, outcome("late"))
        refused.append(error)
        return await transact(work)

    with monkeypatch.context() as patch:
        patch.setattr(store, "transact", just_before)
        await _shred(shredding, tenant)
    assert refused
    assert rows(store, tenant)["sessions"] == 0


async def test_killed_before_its_keys_are_destroyed_nothing_has_happened(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await identity.create_tenant("shredded")
    caller, secret = await a_caller(identity, tenant)
    await sessions.record(await sessions.resolve(caller, ASKED), ASKED, outcome("before"))
    before, keys = rows(store, tenant), _keys_of(store, tenant)
    with _killed_at(monkeypatch, store, "transact"):
        await _shred(shredding, tenant)
    assert (rows(store, tenant), _keys_of(store, tenant)) == (before, keys)
    assert await _again(store).unfinished() == []
    assert (await identity.authenticate(secret)).tenant == tenant
    session = await sessions.resolve(caller, ASKED)
    await sessions.record(session, ASKED, outcome("after"))
    assert [each.turns for each in await sessions.summaries(APPLIANCE)] == [2], "its session goes on"


@pytest.mark.usefixtures("in_small_steps")
async def test_killed_after_that_at_any_step_the_next_start_finishes_it(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenant = await used(identity, sessions, store, await identity.create_tenant("shredded"))
    shredded, _ = await _shred(shredding, tenant)
    assert _keys_of(store, tenant) == []
    with _killed_at(monkeypatch, store, "transact"):
        await shredding.remove_rows(shredded)
    once = _again(store)
    assert await once.unfinished() == [shredded], "who asked and how much there was is known still"
    await store.transact(lambda db: removal.remove_some_sessions(db, tenant.tenant_id))
    assert await once.unfinished() == [shredded]
    again = _again(store)
    await again.remove_rows(shredded)
    assert set(rows(store, tenant).values()) == {0}
    assert await again.unfinished() == [shredded], "that it was shredded is not recorded yet"
    await again.recorded(shredded)
    assert await again.unfinished() == []


async def test_rows_that_are_still_to_go_are_in_nobodys_way(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store
) -> None:
    await used(identity, sessions, store, await identity.create_tenant("kept"))
    tenant = await used(identity, sessions, store, await identity.create_tenant("shredded"))
    gone = [each.session_id for each in await sessions.summaries(APPLIANCE, tenant_id=tenant.tenant_id)]
    await _shred(shredding, tenant)
    assert rows(store, tenant)["sessions"] == 2
    assert len(await sessions.summaries(APPLIANCE)) == 2
    for session_id in gone:
        with pytest.raises(UnknownSession):
            await sessions.summary(APPLIANCE, session_id)
    assert (await identity.create_tenant("shredded")).tenant_id != tenant.tenant_id, "its name is another's to have"


async def test_a_tenant_is_shredded_once(shredding: Shredding, identity: Identity, store: Store) -> None:
    tenant = await identity.create_tenant("shredded")
    outcomes = await asyncio.gather(_shred(shredding, tenant), _shred(shredding, tenant), return_exceptions=True)
    assert [type(each) for each in outcomes] == [tuple, UnknownIdentity]
    assert len(await shredding.unfinished()) == 1


async def test_a_tenant_whose_key_is_damaged_can_be_shredded(
    shredding: Shredding, identity: Identity, sessions: Sessions, store: Store, vault: Vault
) -> None:
    tenant = await used(identity, sessions, store, await identity.create_tenant("shredded"))
    keys = tables.keys
    damaged = (
        update(keys)
        .where(keys.c.scope == tenant.tenant_id, keys.c.purpose == KeyPurpose.SALT.value)
        .values(wrapped=bindparam("b_wrapped"))
    )
    await store.write([Change(damaged, {"b_wrapped": bytes(40)})])
    vault.forget(tenant.tenant_id)
    _, labels = await _shred(shredding, tenant)
    assert labels == []
    assert _keys_of(store, tenant) == []


async def test_a_mark_that_was_made_outside_is_not_believed(
    shredding: Shredding, identity: Identity, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    tenant, other = await identity.create_tenant("shredded"), await identity.create_tenant("other")
    await _shred(shredding, tenant)
    meta = tables.meta.c
    name = removal.SHREDDED + tenant.tenant_id
    mark = await store.read(lambda db: db.execute(select(meta.value).where(meta.name == name)).scalar_one())
    insert = tables.meta.insert()
    await store.write([Change(insert, {"name": removal.SHREDDED + other.tenant_id, "value": mark})])
    await store.write([Change(insert, {"name": f"{removal.SHREDDED}ten_1", "value": "a word"})])
    assert [each.tenant_id for each in await shredding.unfinished()] == [tenant.tenant_id]
    assert caplog.text.count("is not believed") == 2


async def test_nothing_is_shredded_while_the_vault_is_sealed(
    shredding: Shredding, identity: Identity, vault: Vault, store: Store
) -> None:
    tenant = await identity.create_tenant("shredded")
    keys = _keys_of(store, tenant)
    vault.seal()
    with pytest.raises(VaultSealed):
        await _shred(shredding, tenant)
    assert _keys_of(store, tenant) == keys
