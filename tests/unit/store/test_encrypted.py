"""Encrypted columns: what was changed, cut or moved outside is refused, and named; what is bound to them too."""

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Column, Connection, Integer, MetaData, Table, Text, insert, select, update
from sqlalchemy.engine import RowMapping

from appliance.store import Change, Encrypted, Envelope, RowCipher, Store, tables
from appliance.vault import SYSTEM_SCOPE, KeyPurpose, TamperedValue, Vault

principals = tables.principals


def row(name: str, *, tenant: str | None = "ten_1", version: int = 1) -> dict[str, object]:
    return {
        "principal_id": f"prn_{name}",
        "tenant_id": tenant,
        "name_lookup": name.encode(),
        "name": name,
        "role": "client",
        "uid": None,
        "permissions": "[]",
        "created_at": 1.5,
        "row_version": version,
    }


@pytest.fixture
def rows(store: Store, vault: Vault) -> RowCipher:
    """Principals `ada` and `bob` of ten_1 and `eve` of ten_2, stored."""
    cipher = RowCipher(vault)
    for tenant in ("ten_1", "ten_2"):
        tenant_row = {
            "tenant_id": tenant,
            "name_lookup": tenant.encode(),
            "name": f"the name of {tenant}",
            "idle_timeout_s": 30,
            "isolation": "session",
            "created_at": 1.0,
            "row_version": 1,
            "audit_digests": None,
            "cache_epoch": None,
            "harness_lines": None,
        }
        sealed = cipher.seal(tables.tenants, tenant_row, scope=tenant, purpose=KeyPurpose.RECORDS)
        store.write_blocking([Change(insert(tables.tenants), sealed)])
    for name, tenant in (("ada", "ten_1"), ("bob", "ten_1"), ("eve", "ten_2")):
        sealed = cipher.seal(principals, row(name, tenant=tenant), scope=tenant, purpose=KeyPurpose.RECORDS)
        store.write_blocking([Change(insert(principals), sealed)])
    return cipher


def stored(store: Store, name: str) -> RowMapping:
    query = select(principals).where(principals.c.principal_id == f"prn_{name}")
    return store.read_blocking(lambda db: db.execute(query).mappings().one())


def test_what_was_sealed_opens_to_the_same_words(store: Store, rows: RowCipher) -> None:
    assert rows.open(principals, stored(store, "ada"))["name"] == b"ada"
    assert rows.open(principals, stored(store, "eve"))["name"] == b"eve"


def test_what_belongs_to_no_tenant_is_under_the_systems_key(store: Store, rows: RowCipher) -> None:
    sealed = rows.seal(principals, row("root", tenant=None), scope=SYSTEM_SCOPE, purpose=KeyPurpose.RECORDS)
    store.write_blocking([Change(insert(principals), sealed)])
    assert rows.open(principals, stored(store, "root"))["name"] == b"root"


def test_null_stays_null(rows: RowCipher) -> None:
    notes = Table(
        "notes",
        MetaData(),
        Column("note_id", Text, primary_key=True),
        Column("tenant_id", Text),
        Column("text", Encrypted),
        Column("row_version", Integer),
    )
    note = {"note_id": "n_1", "tenant_id": "ten_1", "row_version": 1, "text": None}
    sealed = rows.seal(notes, note, scope="ten_1", purpose=KeyPurpose.RECORDS)
    assert rows.open(notes, sealed)["text"] is None


async def test_text_that_nobody_encrypted_is_not_stored(store: Store, vault: Vault) -> None:
    for plaintext in ("Ada", b"Ada"):
        with pytest.raises(Exception, match="not plaintext"):
            await store.write([Change(insert(principals), row("ada") | {"name": plaintext, "tenant_id": None})])
    assert await store.read(lambda db: db.execute(select(principals)).all()) == []


def _envelope(db: Connection, name: str) -> bytes:
    return bytes(db.execute(select(principals.c.name).where(principals.c.principal_id == f"prn_{name}")).scalar_one())


def _put(db: Connection, principal: str, **values: Any) -> None:
    db.execute(update(principals).where(principals.c.principal_id == f"prn_{principal}").values(**values))


def swapped_with_another_row(db: Connection) -> None:
    ada, bob = _envelope(db, "ada"), _envelope(db, "bob")
    _put(db, "ada", name=Envelope(bob))
    _put(db, "bob", name=Envelope(ada))


def taken_from_another_tenant(db: Connection) -> None:
    _put(db, "ada", name=Envelope(_envelope(db, "eve")))


def taken_from_another_table(db: Connection) -> None:
    name = db.execute(select(tables.tenants.c.name).where(tables.tenants.c.tenant_id == "ten_1")).scalar_one()
    _put(db, "ada", name=Envelope(bytes(name)))


def truncated(db: Connection) -> None:
    _put(db, "ada", name=Envelope(_envelope(db, "ada")[:-1]))


def cut_to_nothing(db: Connection) -> None:
    _put(db, "ada", name=Envelope(b""))


def cut_within_the_header(db: Connection) -> None:
    _put(db, "ada", name=Envelope(_envelope(db, "ada")[:20]))


def flipped_in_one_bit(db: Connection) -> None:
    envelope = bytearray(_envelope(db, "ada"))
    envelope[-20] ^= 1
    _put(db, "ada", name=Envelope(bytes(envelope)))


def put_under_a_newer_version(db: Connection) -> None:
    _put(db, "ada", row_version=2)


def given_to_another_tenant(db: Connection) -> None:
    _put(db, "ada", tenant_id="ten_2")


@pytest.mark.parametrize(
    "tamper",
    [
        swapped_with_another_row,
        taken_from_another_tenant,
        taken_from_another_table,
        truncated,
        cut_to_nothing,
        cut_within_the_header,
        flipped_in_one_bit,
        put_under_a_newer_version,
        given_to_another_tenant,
    ],
)
async def test_a_ciphertext_that_is_not_in_its_place_is_refused_and_its_row_named(
    store: Store, rows: RowCipher, tamper: Callable[[Connection], None]
) -> None:
    await store.transact(tamper)
    with pytest.raises(TamperedValue, match=r"principals\.name in row prn_ada"):
        rows.open(principals, stored(store, "ada"))


def test_a_ciphertext_of_another_column_is_refused(vault: Vault) -> None:
    cipher = RowCipher(vault)
    turn: dict[str, object] = {"turn_id": "trn_1", "tenant_id": "ten_1", "row_version": 1}
    turn |= {"session_id": "ses_1", "number": 1, "request": b"question", "response": b"answer", "token_ids": None}
    sealed = cipher.seal(tables.turns, turn, scope="ten_1", purpose=KeyPurpose.RECORDS)
    sealed["request"], sealed["response"] = sealed["response"], sealed["request"]
    with pytest.raises(TamperedValue, match=r"turns\.request in row trn_1"):
        cipher.open(tables.turns, sealed)


def test_a_value_that_was_removed_is_refused(store: Store, rows: RowCipher) -> None:
    with pytest.raises(TamperedValue, match=r"principals\.name in row prn_ada"):
        rows.open(principals, {**stored(store, "ada"), "name": None})


@pytest.mark.parametrize(
    ("column", "value"),
    [("name", "in plain text"), ("name", 7), ("row_version", "seven"), ("row_version", -1), ("row_version", None)],
)
def test_a_value_of_another_type_which_sqlite_keeps_is_refused_and_its_row_named(
    store: Store, rows: RowCipher, column: str, value: object
) -> None:
    changed: dict[str, Any] = {**stored(store, "ada"), column: value}
    with pytest.raises(TamperedValue, match=r"principals\.(name|row_version) in row prn_ada"):
        rows.open(principals, changed)


@pytest.mark.parametrize(
    ("column", "value"),
    [("role", "admin"), ("uid", 0), ("permissions", '["transcript:read"]'), ("name_lookup", b"root"), ("role", 7)],
)
async def test_a_bound_value_that_was_changed_is_refused_and_its_row_named(
    store: Store, rows: RowCipher, column: str, value: object
) -> None:
    changed: dict[str, Any] = {**stored(store, "ada"), column: value}
    with pytest.raises(TamperedValue, match=r"principals\.name in row prn_ada"):
        rows.open(principals, changed)


def test_what_a_database_makes_of_a_bound_number_is_the_same_number(store: Store, rows: RowCipher) -> None:
    query = select(tables.tenants).where(tables.tenants.c.tenant_id == "ten_1")
    tenant = store.read_blocking(lambda db: db.execute(query).mappings().one())
    assert rows.open(tables.tenants, tenant)["idle_timeout_s"] == 30.0
    with pytest.raises(TamperedValue, match="ten_1"):
        rows.open(tables.tenants, {**tenant, "idle_timeout_s": None})


def test_a_column_that_came_later_binds_once_it_is_set_and_neither_side_of_that_can_be_forged(
    store: Store, rows: RowCipher
) -> None:
    query = select(tables.tenants).where(tables.tenants.c.tenant_id == "ten_1")
    older = store.read_blocking(lambda db: db.execute(query).mappings().one())
    assert older["audit_digests"] is None
    with pytest.raises(TamperedValue, match="ten_1"):
        rows.open(tables.tenants, {**older, "audit_digests": "on"})
    opened = {**rows.open(tables.tenants, older), "audit_digests": "on", "row_version": 2}
    newer = rows.seal(tables.tenants, opened, scope="ten_1", purpose=KeyPurpose.RECORDS)
    assert rows.open(tables.tenants, newer)["audit_digests"] == "on"
    for forged in (None, "off", ""):
        with pytest.raises(TamperedValue, match="ten_1"):
            rows.open(tables.tenants, {**newer, "audit_digests": forged})


def test_values_of_neighbouring_bound_columns_cannot_run_into_each_other(vault: Vault) -> None:
    cipher = RowCipher(vault)
    made = row("ada") | {"role": "admin", "permissions": "[]"}
    sealed = cipher.seal(principals, made, scope="ten_1", purpose=KeyPurpose.RECORDS)
    with pytest.raises(TamperedValue):
        cipher.open(principals, sealed | {"role": "admin[]", "permissions": ""})


def test_a_row_with_bound_values_can_always_be_opened() -> None:
    for table in tables.metadata.sorted_tables:
        if any(column.info.get("bound") for column in table.columns):
            sealed = [column for column in table.columns if isinstance(column.type, Encrypted)]
            assert any(not column.nullable for column in sealed), table.name


@pytest.mark.parametrize(
    ("table", "columns"),
    [
        (tables.principals, {"role", "permissions", "uid", "name_lookup"}),
        (tables.api_keys, {"principal_id", "secret_lookup", "scopes", "expires_at", "revoked_at"}),
        (
            tables.tenants,
            {"isolation", "idle_timeout_s", "name_lookup", "audit_digests", "cache_epoch", "harness_lines"},
        ),
        (tables.sessions, {"principal_id", "tree_id", "client_id_lookup"}),
        (tables.turns, {"session_id", "number"}),
    ],
)
def test_what_says_who_may_do_what_is_bound(table: Table, columns: set[str]) -> None:
    assert {column.name for column in table.columns if column.info.get("bound")} == columns


async def test_no_word_is_in_the_rows(store: Store, rows: RowCipher) -> None:
    everything = await store.read(lambda db: repr(db.execute(select(tables.tenants)).all()))
    assert "the name of" not in everything
