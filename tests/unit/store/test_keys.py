"""The vault's keys in the database."""

import pytest
from sqlalchemy import select, update

from appliance.store import Change, DatabaseKeys, Store, key_changes, rotation_changes, tables
from appliance.vault import SYSTEM_SCOPE, Binding, ForeignRootKey, KeyPurpose, RootKey, TamperedValue, Vault

HERE = Binding("principals", "name", "prn_1", "ten_1", 1)


def reopened(store: Store, secret: bytes = b"r" * 32) -> Vault:
    """A vault as another process would open it over the same database."""
    vault = Vault(DatabaseKeys(store))
    vault.open(RootKey(secret))
    return vault


def test_what_one_process_encrypted_another_decrypts(store: Store, vault: Vault) -> None:
    envelope = vault.encrypt("ten_1", KeyPurpose.RECORDS, b"words", HERE)
    assert reopened(store).decrypt(envelope, HERE) == b"words"


def test_a_hash_is_the_same_in_another_process(store: Store, vault: Vault) -> None:
    hashed = vault.mac(SYSTEM_SCOPE, KeyPurpose.LOOKUP, "name", b"words")
    assert reopened(store).mac(SYSTEM_SCOPE, KeyPurpose.LOOKUP, "name", b"words") == hashed


def test_an_empty_database_belongs_to_no_root_key(store: Store) -> None:
    assert DatabaseKeys(store).root_id() is None


def test_a_database_of_another_root_key_is_refused(store: Store, vault: Vault) -> None:
    with pytest.raises(ForeignRootKey):
        reopened(store, b"s" * 32)


def test_a_wrapped_key_that_was_changed_is_refused_and_named(store: Store, vault: Vault) -> None:
    keys = tables.keys
    records = DatabaseKeys(store).active("ten_1", KeyPurpose.RECORDS)
    assert records is not None
    cut = update(keys).where(keys.c.key_id == records.key_id).values(wrapped=bytes(40))
    store.write_blocking([Change(cut, {})])
    with pytest.raises(TamperedValue, match=f"row {records.key_id}"):
        reopened(store).encrypt("ten_1", KeyPurpose.RECORDS, b"words", HERE)


def test_records_come_back_as_they_were_stored(store: Store, vault: Vault) -> None:
    made = vault.new_tenant_keys("ten_3")
    store.write_blocking(key_changes(made))
    keys = DatabaseKeys(store)
    assert [keys.load(record.key_id) for record in made] == made
    assert keys.active("ten_3", KeyPurpose.WRAPPING) == made[0]
    assert {record.key_id for record in keys.children(made[0].key_id)} == {record.key_id for record in made[1:]}
    assert keys.load("key_unknown") is None
    assert keys.active("ten_9", KeyPurpose.WRAPPING) is None


def test_reserved_uses_only_grow_and_are_durable(store: Store, vault: Vault) -> None:
    keys = DatabaseKeys(store)
    record = keys.active("ten_1", KeyPurpose.RECORDS)
    assert record is not None
    keys.reserve_uses(record.key_id, 10_000)
    keys.reserve_uses(record.key_id, 5_000)
    again = keys.load(record.key_id)
    assert again is not None
    assert again.uses_reserved == 10_000


def test_uses_spent_are_reserved_anew_in_the_database(store: Store, vault: Vault) -> None:
    for _ in range(4097):
        vault.encrypt("ten_1", KeyPurpose.RECORDS, b"", HERE)
    record = DatabaseKeys(store).active("ten_1", KeyPurpose.RECORDS)
    assert record is not None
    assert record.uses_reserved == 8192


def test_after_two_rotations_everything_opens_and_the_first_key_is_gone(store: Store, vault: Vault) -> None:
    envelope = vault.encrypt("ten_1", KeyPurpose.RECORDS, b"words", HERE)
    first = DatabaseKeys(store).active("ten_1", KeyPurpose.WRAPPING)
    assert first is not None
    for _ in range(2):
        store.write_blocking(rotation_changes(vault.rotate("ten_1")))
    assert DatabaseKeys(store).load(first.key_id) is None
    assert reopened(store).decrypt(envelope, HERE) == b"words"
    wrapping = store.read_blocking(
        lambda db: (
            db.execute(
                select(tables.keys.c.version).where(tables.keys.c.scope == "ten_1", tables.keys.c.purpose == "wrapping")
            )
            .scalars()
            .all()
        )
    )
    assert sorted(wrapping) == [2, 3]
