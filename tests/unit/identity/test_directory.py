"""Tenants, principals and API keys, on both kinds of database."""

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, Table, delete, event, select, text, update

from appliance.identity import (
    Caller,
    Identity,
    InvalidApiKey,
    Isolation,
    NameTaken,
    NotAnAdministrator,
    Permission,
    Principal,
    Role,
    RotatedKeys,
    Scopes,
    Tenant,
    UnknownIdentity,
)
from appliance.store import Change, DatabaseKeys, Erasures, Store, StoreFull, StoreUnavailable, tables
from appliance.vault import Binding, KeyPurpose, RootKey, TamperedValue, Vault, VaultSealed


class Clock:
    def __init__(self) -> None:
        self.at = 1_000.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def identity(store: Store, vault: Vault, clock: Clock) -> Identity:
    return Identity(store, vault, now=clock)


@pytest.fixture
async def tenant(identity: Identity) -> Tenant:
    return await identity.create_tenant("Harbour Bank")


@pytest.fixture
async def client(identity: Identity, tenant: Tenant) -> Principal:
    return await identity.create_principal(tenant, "teller", Role.CLIENT)


def reopened(store: Store) -> Identity:
    """Who there is, as another process would find them."""
    vault = Vault(DatabaseKeys(store))
    vault.open(RootKey(b"r" * 32))
    return Identity(store, vault)


# Tenants and principals


async def test_a_tenant_is_found_by_its_name_and_by_its_id(identity: Identity, store: Store) -> None:
    made = await identity.create_tenant("Harbour Bank", idle_timeout_s=30.0)
    assert await reopened(store).tenant("Harbour Bank") == made
    assert await reopened(store).tenant(made.tenant_id) == made
    assert made.idle_timeout_s == 30.0
    assert made.isolation == "session"


async def test_an_unknown_tenant_is_named(identity: Identity) -> None:
    with pytest.raises(UnknownIdentity, match="Nobody"):
        await identity.tenant("Nobody")


async def test_the_name_of_a_tenant_is_taken_once(identity: Identity, tenant: Tenant) -> None:
    with pytest.raises(NameTaken, match="Harbour Bank"):
        await identity.create_tenant("Harbour Bank")
    assert await identity.tenants() == [tenant]


async def test_two_tenants_made_at_once_cannot_share_a_name(identity: Identity) -> None:
    made = await asyncio.gather(*(identity.create_tenant("Same") for _ in range(4)), return_exceptions=True)
    assert sorted(type(each).__name__ for each in made) == ["NameTaken"] * 3 + ["Tenant"]


async def test_principals_of_different_tenants_may_share_a_name(identity: Identity, tenant: Tenant) -> None:
    other = await identity.create_tenant("Other")
    one = await identity.create_principal(tenant, "teller", Role.CLIENT)
    another = await identity.create_principal(other, "teller", Role.OPERATOR)
    assert await identity.principals(tenant) == [one]
    assert await identity.principals(other) == [another]
    with pytest.raises(NameTaken, match="teller"):
        await identity.create_principal(tenant, "teller", Role.AUDITOR)


async def test_the_local_administrator_is_known_by_uid_and_nobody_else_is(identity: Identity, store: Store) -> None:
    permissions = frozenset({Permission.TRANSCRIPT_READ})
    root = await identity.create_principal(None, "administrator", Role.ADMIN, uid=1000, permissions=permissions)
    caller = await reopened(store).caller_of_uid(1000)
    assert caller.principal == root
    assert caller.tenant is None
    assert caller.key is None
    with pytest.raises(NotAnAdministrator, match="1001"):
        await identity.caller_of_uid(1001)


async def test_a_uid_is_one_principals(identity: Identity) -> None:
    await identity.create_principal(None, "administrator", Role.ADMIN, uid=1000)
    with pytest.raises(NameTaken):
        await identity.create_principal(None, "another", Role.ADMIN, uid=1000)


# API keys


async def test_a_key_says_whose_it_is_and_what_it_may(identity: Identity, tenant: Tenant, client: Principal) -> None:
    scopes = Scopes(
        models=frozenset({"small", "large"}),
        requests_per_minute=60,
        concurrent_requests=4,
        tokens_per_day=100_000,
        permissions=frozenset({Permission.TRANSCRIPT_READ}),
    )
    key, secret = await identity.create_key(client, scopes, label="night batch", expires_at=2_000.0)
    for _ in range(2):  # read from the database, then remembered
        caller = await identity.authenticate(secret)
        assert (caller.principal, caller.tenant, caller.key) == (client, tenant, key)
    assert key.scopes == scopes
    assert key.label == "night batch"


async def test_a_secret_has_256_bits_and_is_another_one_each_time(identity: Identity, client: Principal) -> None:
    secrets = {(await identity.create_key(client, Scopes()))[1] for _ in range(5)}
    assert len(secrets) == 5
    assert {len(secret) for secret in secrets} == {46}
    assert all(secret.startswith("hf_") for secret in secrets)


@pytest.mark.parametrize("secret", ["", "hf_", "hf_" + "A" * 43, "hf_" + "é" * 43, "\ud800" * 46, "x" * 1_000_000])
async def test_an_unknown_key_is_refused(identity: Identity, client: Principal, secret: str) -> None:
    await identity.create_key(client, Scopes())
    with pytest.raises(InvalidApiKey) as error:
        await identity.authenticate(secret)
    assert error.value.code == "invalid_api_key"
    assert not secret or secret not in str(error.value)


async def test_a_revoked_key_is_refused_at_the_very_next_request(identity: Identity, client: Principal) -> None:
    key, secret = await identity.create_key(client, Scopes())
    await identity.authenticate(secret)
    revoked = await identity.revoke_key(key.key_id)
    assert revoked.revoked_at == 1_000.0
    with pytest.raises(InvalidApiKey, match="revoked"):
        await identity.authenticate(secret)


async def test_a_look_at_the_database_that_a_revocation_overtook_is_not_remembered(
    identity: Identity, store: Store, client: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, secret = await identity.create_key(client, Scopes())
    read, looked, go_on = store.read, asyncio.Event(), asyncio.Event()

    async def slow(query: Callable[[Connection], object]) -> object:
        found = await read(query)
        looked.set()
        await go_on.wait()
        return found

    monkeypatch.setattr(store, "read", slow)
    early = asyncio.create_task(identity.authenticate(secret))
    await looked.wait()
    monkeypatch.setattr(store, "read", read)
    await identity.revoke_key(key.key_id)
    go_on.set()
    await early  # it asked before
    with pytest.raises(InvalidApiKey, match="revoked"):
        await identity.authenticate(secret)


async def test_a_key_that_another_gateway_revoked_is_refused_at_the_very_next_request(
    identity: Identity, store: Store, database_url: str, client: Principal
) -> None:
    key, secret = await identity.create_key(client, Scopes())
    await identity.authenticate(secret)
    if store.exclusive:
        return  # there is no other gateway: the file has one owner, which tests/unit/store holds
    other_store = Store.open(database_url)
    await reopened(other_store).revoke_key(key.key_id)
    other_store.close()
    with pytest.raises(InvalidApiKey, match="revoked"):
        await identity.authenticate(secret)


async def test_revoking_again_changes_nothing(identity: Identity, client: Principal, clock: Clock) -> None:
    key, _ = await identity.create_key(client, Scopes())
    first = await identity.revoke_key(key.key_id)
    clock.at = 5_000.0
    assert await identity.revoke_key(key.key_id) == first


async def test_a_key_that_is_not_there_cannot_be_revoked(identity: Identity) -> None:
    with pytest.raises(UnknownIdentity, match="ak_nothing"):
        await identity.revoke_key("ak_nothing")


async def test_only_its_own_tenant_or_the_appliance_revokes_a_key(
    identity: Identity, tenant: Tenant, client: Principal
) -> None:
    key, secret = await identity.create_key(client, Scopes())
    other = await identity.create_tenant("Other")
    with pytest.raises(UnknownIdentity, match=key.key_id):
        await identity.revoke_key(key.key_id, tenant_id=other.tenant_id)
    await identity.authenticate(secret)
    assert (await identity.revoke_key(key.key_id, tenant_id=tenant.tenant_id)).revoked_at == 1_000.0


async def test_a_key_expires_at_its_time_though_it_was_remembered(
    identity: Identity, client: Principal, clock: Clock
) -> None:
    _, secret = await identity.create_key(client, Scopes(), expires_at=2_000.0)
    clock.at = 1_999.9
    await identity.authenticate(secret)
    clock.at = 2_000.0
    with pytest.raises(InvalidApiKey, match="expired"):
        await identity.authenticate(secret)


async def test_a_new_key_keeps_its_principal(identity: Identity, client: Principal) -> None:
    old, old_secret = await identity.create_key(client, Scopes())
    _, new_secret = await identity.create_key(client, Scopes())
    await identity.revoke_key(old.key_id)
    assert (await identity.authenticate(new_secret)).principal == client
    with pytest.raises(InvalidApiKey):
        await identity.authenticate(old_secret)


async def test_keys_are_listed_by_tenant(identity: Identity, tenant: Tenant, client: Principal) -> None:
    other = await identity.create_tenant("Other")
    stranger = await identity.create_principal(other, "stranger", Role.CLIENT)
    mine, _ = await identity.create_key(client, Scopes())
    theirs, _ = await identity.create_key(stranger, Scopes())
    assert await identity.keys(tenant) == [mine]
    assert {key.key_id for key in await identity.keys()} == {mine.key_id, theirs.key_id}


async def test_a_remembered_key_costs_no_read_where_nobody_else_writes(
    identity: Identity, store: Store, client: Principal
) -> None:
    _, secret = await identity.create_key(client, Scopes())
    await identity.authenticate(secret)
    statements: list[str] = []

    def count(connection: object, cursor: object, statement: str, *rest: object) -> None:
        statements.append(statement)

    event.listen(store._connections.readers, "before_cursor_execute", count)
    await identity.authenticate(secret)
    assert bool(statements) == (not store.exclusive)


async def test_nobody_is_known_while_the_vault_is_sealed(identity: Identity, vault: Vault, client: Principal) -> None:
    _, secret = await identity.create_key(client, Scopes())
    await identity.authenticate(secret)
    vault.seal()
    with pytest.raises(VaultSealed):
        await identity.authenticate(secret)


# What is kept


async def test_no_name_label_or_secret_is_stored_or_logged(
    identity: Identity,
    store: Store,
    tenant: Tenant,
    client: Principal,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    _, secret = await identity.create_key(client, Scopes(), label="night batch")
    await identity.authenticate(secret)

    def everything(db: Connection) -> str:
        return repr([db.execute(select(table)).all() for table in tables.metadata.sorted_tables])

    rows = await store.read(everything)
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())  # noqa: ASYNC240 (a test)
    for words in ("Harbour Bank", "teller", "night batch", secret, secret[3:], secret[-8:]):
        assert words not in rows
        assert words.encode() not in files
        assert words not in caplog.text


async def test_a_label_moved_to_another_key_is_refused(identity: Identity, store: Store, client: Principal) -> None:
    one, _ = await identity.create_key(client, Scopes(), label="mine")
    other, _ = await identity.create_key(client, Scopes(), label="theirs")
    api_keys = tables.api_keys

    def move(db: Connection) -> None:
        label = select(api_keys.c.label).where(api_keys.c.key_id == one.key_id).scalar_subquery()
        db.execute(update(api_keys).where(api_keys.c.key_id == other.key_id).values(label=label))

    await store.transact(move)
    with pytest.raises(TamperedValue, match=other.key_id):
        await identity.keys()


# Authority that was written into the database from outside


PROMOTED = {"role": "admin", "permissions": '["transcript:read"]'}


@pytest.mark.parametrize("values", [{name: value} for name, value in PROMOTED.items()])
async def test_a_principal_cannot_be_promoted_in_the_database(
    identity: Identity, store: Store, client: Principal, values: dict[str, str]
) -> None:
    _, secret = await identity.create_key(client, Scopes())
    await store.transact(lambda db: db.execute(update(tables.principals).values(**values)))
    with pytest.raises(TamperedValue, match=client.principal_id):
        await reopened(store).authenticate(secret)


async def test_a_user_of_the_machine_cannot_be_made_an_administrator_in_the_database(
    identity: Identity, store: Store
) -> None:
    root = await identity.create_principal(None, "administrator", Role.ADMIN, uid=1000)
    await store.transact(lambda db: db.execute(update(tables.principals).values(uid=1001)))
    with pytest.raises(TamperedValue, match=root.principal_id):
        await identity.caller_of_uid(1001)


async def test_a_key_cannot_be_unrevoked_in_the_database(identity: Identity, store: Store, client: Principal) -> None:
    key, secret = await identity.create_key(client, Scopes())
    await identity.revoke_key(key.key_id)
    await store.transact(lambda db: db.execute(update(tables.api_keys).values(revoked_at=None)))
    with pytest.raises(TamperedValue, match=key.key_id):
        await reopened(store).authenticate(secret)


@pytest.mark.parametrize("column", ["expires_at", "scopes"])
async def test_a_key_cannot_be_widened_in_the_database(
    identity: Identity, store: Store, client: Principal, column: str
) -> None:
    narrow, secret = await identity.create_key(client, Scopes(requests_per_minute=1), expires_at=2_000.0)
    wide, _ = await identity.create_key(client, Scopes())
    api_keys = tables.api_keys

    def widen(db: Connection) -> None:
        value = db.execute(select(api_keys.c[column]).where(api_keys.c.key_id == wide.key_id)).scalar_one()
        db.execute(update(api_keys).where(api_keys.c.key_id == narrow.key_id).values({column: value}))

    await store.transact(widen)
    with pytest.raises(TamperedValue, match=narrow.key_id):
        await reopened(store).authenticate(secret)


async def test_a_key_cannot_take_anothers_place_in_the_database(
    identity: Identity, store: Store, client: Principal
) -> None:
    mine, secret = await identity.create_key(client, Scopes())
    root = await identity.create_principal(None, "administrator", Role.ADMIN)
    other = await identity.create_principal(await identity.create_tenant("Other"), "other", Role.OPERATOR)
    roots, _ = await identity.create_key(root, Scopes())
    others, _ = await identity.create_key(other, Scopes())
    api_keys = tables.api_keys

    def lookup(db: Connection, key_id: str) -> bytes:
        query = select(api_keys.c.secret_lookup).where(api_keys.c.key_id == key_id)
        return bytes(db.execute(query).scalar_one())

    def put(db: Connection, key_id: str, **values: object) -> None:
        db.execute(update(api_keys).where(api_keys.c.key_id == key_id).values(**values))

    def impersonate(db: Connection) -> None:
        known = lookup(db, mine.key_id)
        put(db, mine.key_id, secret_lookup=b"nobody's")
        put(db, roots.key_id, secret_lookup=known)

    await store.transact(lambda db: put(db, others.key_id, principal_id=root.principal_id))
    with pytest.raises(TamperedValue, match=others.key_id):
        await reopened(store).keys()
    await store.transact(impersonate)
    with pytest.raises(TamperedValue, match=roots.key_id):
        await reopened(store).authenticate(secret)


async def remove_outside(store: Store, url: str, table: Table, row_id: str) -> None:
    """Delete a row as somebody does who heeds no foreign key."""
    (key,) = table.primary_key.columns
    removal = delete(table).where(key == row_id)
    if store.exclusive:
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as file:
            file.execute(str(removal.compile(compile_kwargs={"literal_binds": True})))
        return

    def remove(db: Connection) -> None:
        db.execute(text("SET LOCAL session_replication_role = replica"))
        db.execute(removal)

    await store.transact(remove)


@pytest.mark.parametrize("role", [Role.ADMIN, Role.CLIENT])
async def test_a_key_whose_tenant_or_principal_was_removed_in_the_database_holds_no_more(
    identity: Identity, store: Store, database_url: str, tenant: Tenant, role: Role
) -> None:
    gone, kept = [await identity.create_principal(tenant, name, role) for name in ("gone", "kept")]
    _, of_gone = await identity.create_key(gone, Scopes())
    _, of_kept = await identity.create_key(kept, Scopes())
    await remove_outside(store, database_url, tables.principals, gone.principal_id)
    with pytest.raises(InvalidApiKey, match="not there any more"):
        await reopened(store).authenticate(of_gone)
    assert (await reopened(store).authenticate(of_kept)).tenant == tenant
    await remove_outside(store, database_url, tables.tenants, tenant.tenant_id)
    with pytest.raises(InvalidApiKey, match="not there any more"):
        await reopened(store).authenticate(of_kept)


async def test_a_caller_is_of_one_tenant_or_of_the_appliance(
    identity: Identity, tenant: Tenant, client: Principal
) -> None:
    other = await identity.create_tenant("Other")
    root = await identity.create_principal(None, "administrator", Role.ADMIN)
    of_root, _ = await identity.create_key(root, Scopes())
    of_client, _ = await identity.create_key(client, Scopes())
    Caller(client, tenant, of_client)
    Caller(root, None, of_root)
    for principal, whose, key in (
        (client, None, None),
        (client, None, of_client),
        (client, other, of_client),
        (client, tenant, of_root),
        (root, tenant, None),
        (root, None, of_client),
    ):
        with pytest.raises(ValueError, match=principal.principal_id):
            Caller(principal, whose, key)


async def test_a_users_number_makes_nobody_of_a_tenant_an_administrator(identity: Identity, tenant: Tenant) -> None:
    await identity.create_principal(tenant, "teller", Role.ADMIN, uid=1000)
    with pytest.raises(NotAnAdministrator):
        await identity.caller_of_uid(1000)


@pytest.mark.parametrize("values", [{"isolation": "tenant"}, {"idle_timeout_s": 86_400.0}, {"cache_epoch": 7}])
async def test_a_tenants_rules_cannot_be_changed_in_the_database(
    identity: Identity, store: Store, tenant: Tenant, client: Principal, values: dict[str, object]
) -> None:
    _, secret = await identity.create_key(client, Scopes())
    await store.transact(lambda db: db.execute(update(tables.tenants).values(**values)))
    for asked in (reopened(store).authenticate(secret), reopened(store).tenant(tenant.tenant_id)):
        with pytest.raises(TamperedValue, match=tenant.tenant_id):
            await asked


async def test_a_tenant_chooses_digests_and_its_next_request_has_them(
    identity: Identity, store: Store, tenant: Tenant, client: Principal
) -> None:
    _, secret = await identity.create_key(client, Scopes())
    for on in (True, True, False, True):
        changed = await identity.choose_digests(tenant, on=on)
        assert changed == replace(tenant, audit_digests=on)
        for known in (identity, reopened(store)):
            assert (await known.authenticate(secret)).tenant == changed
    versions = select(tables.tenants.c.row_version).where(tables.tenants.c.tenant_id == tenant.tenant_id)
    assert await store.read(lambda db: db.execute(versions).scalar_one()) == 4
    with pytest.raises(UnknownIdentity):
        await identity.choose_digests(replace(tenant, tenant_id="ten_none"), on=True)


async def test_what_a_tenants_sessions_share_changes_with_the_next_request_and_the_old_is_out_of_reach(
    identity: Identity, store: Store, tenant: Tenant, client: Principal
) -> None:
    _, secret = await identity.create_key(client, Scopes())
    epochs = []
    for mode in (Isolation.TENANT, Isolation.TENANT, Isolation.TENANT_PREFIX, Isolation.SESSION, Isolation.TENANT):
        changed = await identity.choose_isolation(tenant, mode)
        epochs.append(changed.cache_epoch)
        for known in (identity, reopened(store)):
            assert (await known.authenticate(secret)).tenant == replace(
                tenant, isolation=mode, cache_epoch=changed.cache_epoch
            )
    assert epochs == [1, 1, 2, 3, 4]
    assert (await identity.raise_cache_epoch(tenant)).cache_epoch == 5
    assert (await reopened(store).authenticate(secret)).tenant == replace(
        tenant, isolation=Isolation.TENANT, cache_epoch=5
    )


async def test_a_choice_of_digests_leaves_the_isolation_as_it_is(identity: Identity, tenant: Tenant) -> None:
    await identity.choose_isolation(tenant, Isolation.TENANT_PREFIX)
    changed = await identity.choose_digests(tenant, on=True)
    assert (changed.isolation, changed.audit_digests, changed.cache_epoch) == (Isolation.TENANT_PREFIX, True, 1)


async def test_two_who_choose_at_once_end_with_one_of_the_two(identity: Identity, tenant: Tenant) -> None:
    await asyncio.gather(*(identity.choose_digests(tenant, on=number % 2 == 0) for number in range(6)))
    assert (await identity.tenant(tenant.tenant_id)).name == tenant.name


@pytest.mark.parametrize("chosen", [None, True, False])
@pytest.mark.parametrize("forged", [None, "on", "off"])
async def test_what_a_tenant_chose_cannot_be_changed_in_the_database(
    identity: Identity, store: Store, tenant: Tenant, client: Principal, chosen: bool | None, forged: str | None
) -> None:
    _, secret = await identity.create_key(client, Scopes())
    if chosen is not None:
        await identity.choose_digests(tenant, on=True)
        await identity.choose_digests(tenant, on=chosen)
    before = {None: None, True: "on", False: "off"}[chosen]
    await store.transact(lambda db: db.execute(update(tables.tenants).values(audit_digests=forged)))
    if forged == before:
        assert (await reopened(store).tenant(tenant.tenant_id)).audit_digests == (forged == "on")
        return
    for asked in (
        reopened(store).authenticate(secret),
        reopened(store).tenants(),
        reopened(store).choose_digests(tenant, on=True),
    ):
        with pytest.raises(TamperedValue, match=tenant.tenant_id):
            await asked


async def test_a_revoked_key_opens_under_the_next_version_of_its_row(
    identity: Identity, store: Store, client: Principal
) -> None:
    key, secret = await identity.create_key(client, Scopes(), label="night batch", expires_at=2_000.0)
    revoked = await identity.revoke_key(key.key_id)
    assert [revoked] == await reopened(store).keys()
    assert (revoked.label, revoked.expires_at) == ("night batch", 2_000.0)
    versions = select(tables.api_keys.c.row_version)
    assert await store.read(lambda db: db.execute(versions).scalar_one()) == 2
    with pytest.raises(InvalidApiKey, match="revoked"):
        await reopened(store).authenticate(secret)


async def test_a_key_that_two_revoke_at_once_is_revoked_once(
    identity: Identity, client: Principal, clock: Clock
) -> None:
    key, _ = await identity.create_key(client, Scopes())
    one, other = await asyncio.gather(identity.revoke_key(key.key_id), identity.revoke_key(key.key_id))
    assert one == other


async def test_the_first_key_after_a_restart_waits_for_no_write_in_the_event_loop(
    store: Store, client: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    write_blocking = store.write_blocking

    def watched(changes: Sequence[Change]) -> None:
        threads.append(threading.current_thread())
        write_blocking(changes)

    monkeypatch.setattr(store, "write_blocking", watched)
    await reopened(store).create_key(client, Scopes())
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


# Rotation


async def test_after_rotations_keys_still_work(
    identity: Identity, store: Store, tenant: Tenant, client: Principal
) -> None:
    _, secret = await identity.create_key(client, Scopes(), label="mine")
    for _ in range(2):
        assert await identity.rotate_keys(tenant) == RotatedKeys(4, erased=True)
        assert await identity.rotate_keys(None) == RotatedKeys(3, erased=True)
    caller = await reopened(store).authenticate(secret)
    assert caller.principal == client
    assert caller.tenant == tenant


async def test_what_a_rotation_could_not_erase_is_due(
    identity: Identity, store: Store, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def held(**_: bool) -> None:
        raise StoreUnavailable("held", cause="a backup", remedy="wait")

    with monkeypatch.context() as patch:
        patch.setattr(store, "erase", held)
        assert await identity.rotate_keys(tenant) == RotatedKeys(4, erased=False)
    erased = []
    erase = store.erase

    async def watched(**how: bool) -> None:
        await erase(**how)
        erased.append(True)

    monkeypatch.setattr(store, "erase", watched)
    assert await Erasures(store).erase()  # as the next start does
    assert await Erasures(store).erase()
    assert erased == [True]


async def test_a_rotation_that_was_not_stored_leaves_nothing_under_a_key_that_is_nowhere(
    identity: Identity, store: Store, vault: Vault, tenant: Tenant, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(changes: object) -> None:
        raise StoreFull("full", cause="full", remedy="make room")

    with monkeypatch.context() as patch:
        patch.setattr(store, "write", full)
        with pytest.raises(StoreFull):
            await identity.rotate_keys(tenant)
    record = vault.new_session_key(tenant.tenant_id, "ses_1")
    stored = DatabaseKeys(store).active(tenant.tenant_id, KeyPurpose.WRAPPING)
    assert stored is not None
    assert record.parent_id == stored.key_id
    assert vault.encrypt(tenant.tenant_id, KeyPurpose.RECORDS, b"x", Binding("t", "c", "r", tenant.tenant_id, 1))
