"""The key hierarchy: what it protects, what it refuses, what it counts."""

import dataclasses
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.vault import (
    Binding,
    ForeignRootKey,
    KeyExhausted,
    KeyMissing,
    KeyPurpose,
    RootKey,
    TamperedValue,
    Vault,
    VaultSealed,
)
from tests.unit.vault.keystore import MemoryKeys

PLACE = Binding("turns", "request", "trn_1", "ten_1", 1)


@pytest.fixture
def keys() -> MemoryKeys:
    return MemoryKeys()


@pytest.fixture
def root() -> RootKey:
    return RootKey(b"r" * 32)


@pytest.fixture
def vault(keys: MemoryKeys, root: RootKey) -> Vault:
    vault = Vault(keys)
    vault.open(root)
    keys.add(vault.new_system_keys())
    keys.add(vault.new_tenant_keys("ten_1"))
    keys.add([vault.new_session_key("ten_1", "ses_1")])
    return vault


def _reopened(keys: MemoryKeys) -> Vault:
    vault = Vault(keys)
    vault.open(RootKey(b"r" * 32))
    return vault


def test_what_was_encrypted_is_read_after_a_restart(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    assert b"hello" not in envelope
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"


@given(
    st.sampled_from(["table", "column", "row", "tenant"]),
    st.text(max_size=8),
    st.integers(0, 3),
    st.binary(max_size=40),
)
def test_an_envelope_opens_in_its_own_place_only(field: str, text: str, version: int, plaintext: bytes) -> None:
    keys = MemoryKeys()
    vault = Vault(keys)
    vault.open(RootKey(b"r" * 32))
    vault.new_system_keys()
    envelope = vault.encrypt("system", KeyPurpose.RECORDS, plaintext, PLACE)
    other = dataclasses.replace(PLACE, **{field: text}, version=version)
    if other == PLACE:
        assert vault.decrypt(envelope, other) == plaintext
    else:
        with pytest.raises(TamperedValue, match=r"row"):
            vault.decrypt(envelope, other)


def test_text_cannot_move_from_one_part_of_a_place_to_the_next() -> None:
    left, right = Binding("ab", "c", "r", "t", 1), Binding("a", "bc", "r", "t", 1)
    assert left.associated_data() != right.associated_data()


def test_every_flipped_byte_and_every_cut_is_refused_and_the_row_named(vault: Vault) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    for at in range(len(envelope)):
        flipped = bytearray(envelope)
        flipped[at] ^= 1
        # A flipped key id names a key that is not there.
        with pytest.raises((TamperedValue, KeyMissing)):
            vault.decrypt(bytes(flipped), PLACE)
        with pytest.raises((TamperedValue, KeyMissing), match=r"trn_1|key_"):
            vault.decrypt(envelope[:at], PLACE)


def test_an_envelope_under_another_sessions_key_does_not_open_for_it(vault: Vault, keys: MemoryKeys) -> None:
    keys.add([vault.new_session_key("ten_1", "ses_2")])
    mine = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    theirs = vault.encrypt("ses_2", KeyPurpose.SESSION, b"other", PLACE)
    with pytest.raises(TamperedValue):
        vault.decrypt(mine[:17] + theirs[17:], PLACE)


def test_sealed_it_does_nothing(vault: Vault) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    vault.seal()
    assert vault.sealed
    for use in (
        lambda: vault.decrypt(envelope, PLACE),
        lambda: vault.encrypt("ses_1", KeyPurpose.SESSION, b"x", PLACE),
        lambda: vault.mac("ten_1", KeyPurpose.SALT, "label"),
        lambda: vault.new_session_key("ten_1", "ses_9"),
        lambda: vault.rotate("ten_1"),
        lambda: vault.root_id,
    ):
        with pytest.raises(VaultSealed):
            use()


def test_sealing_overwrites_the_root_key(vault: Vault, root: RootKey) -> None:
    vault.seal()
    assert bytes(root._secret) == bytes(32)


def test_a_database_of_another_root_key_is_refused(vault: Vault, keys: MemoryKeys) -> None:
    with pytest.raises(ForeignRootKey) as caught:
        Vault(keys).open(RootKey(b"s" * 32))
    assert vault.root_id in caught.value.cause


def test_rotation_rewraps_keys_and_leaves_data_alone(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    salt = vault.mac("ten_1", KeyPurpose.SALT, "label", b"x")
    before = keys.active("ten_1", KeyPurpose.WRAPPING)
    assert before is not None

    keys.apply(vault.rotate("ten_1"))

    assert not keys.children(before.key_id)
    reopened = _reopened(keys)
    assert reopened.decrypt(envelope, PLACE) == b"hello"
    assert reopened.mac("ten_1", KeyPurpose.SALT, "label", b"x") == salt


def test_the_next_rotation_destroys_the_wrapping_key_of_the_one_before(vault: Vault, keys: MemoryKeys) -> None:
    first = keys.active("ten_1", KeyPurpose.WRAPPING)
    assert first is not None
    keys.apply(vault.rotate("ten_1"))
    assert first.key_id in keys.records
    keys.apply(vault.rotate("ten_1"))
    assert first.key_id not in keys.records
    assert _reopened(keys).mac("ten_1", KeyPurpose.SALT, "label")


def test_a_session_key_made_but_not_stored_when_its_tenants_key_rotates_is_not_lost(
    vault: Vault, keys: MemoryKeys
) -> None:
    late = vault.new_session_key("ten_1", "ses_late")
    envelope = vault.encrypt("ses_late", KeyPurpose.SESSION, b"hello", PLACE)
    keys.apply(vault.rotate("ten_1"))
    keys.add([late])
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"
    keys.apply(vault.rotate("ten_1"))
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"


def test_uses_are_reserved_before_they_are_made(vault: Vault, keys: MemoryKeys) -> None:
    record = keys.active("ses_1", KeyPurpose.SESSION)
    assert record is not None
    for _ in range(record.uses_reserved):
        vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == []
    vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == [(record.key_id, 2 * record.uses_reserved)]


def test_after_a_crash_every_reserved_use_counts_as_made(vault: Vault, keys: MemoryKeys) -> None:
    record = keys.active("ses_1", KeyPurpose.SESSION)
    assert record is not None
    vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    _reopened(keys).encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == [(record.key_id, 2 * record.uses_reserved)]


def test_a_key_that_was_used_up_encrypts_no_more(vault: Vault, keys: MemoryKeys) -> None:
    record = keys.active("ses_1", KeyPurpose.SESSION)
    assert record is not None
    keys.add([dataclasses.replace(record, uses_reserved=2**32)])
    with pytest.raises(KeyExhausted):
        _reopened(keys).encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)


def test_a_shredded_session_cannot_be_read_again(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    record = keys.active("ses_1", KeyPurpose.SESSION)
    assert record is not None
    del keys.records[record.key_id]
    vault.forget("ses_1")
    with pytest.raises(KeyMissing):
        vault.decrypt(envelope, PLACE)


def test_a_wrapped_key_that_was_changed_is_refused_and_named(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    record = keys.active("ses_1", KeyPurpose.SESSION)
    assert record is not None
    keys.add([dataclasses.replace(record, wrapped=bytes(40))])
    with pytest.raises(TamperedValue, match=record.key_id):
        _reopened(keys).decrypt(envelope, PLACE)


def test_a_hash_depends_on_tenant_purpose_label_and_every_part(vault: Vault, keys: MemoryKeys) -> None:
    keys.add(vault.new_tenant_keys("ten_2"))
    hashes = {
        vault.mac(scope, purpose, label, *parts)
        for scope in ("ten_1", "ten_2")
        for purpose in (KeyPurpose.SALT, KeyPurpose.LOOKUP)
        for label in ("a", "b")
        for parts in ((b"ab", b"c"), (b"a", b"bc"), (b"abc",), ())
    }
    assert len(hashes) == 2 * 2 * 2 * 4


def test_a_key_is_used_for_its_purpose_only(vault: Vault) -> None:
    with pytest.raises(TypeError):
        vault.encrypt("ten_1", KeyPurpose.SALT, b"", PLACE)
    with pytest.raises(TypeError):
        vault.mac("ten_1", KeyPurpose.RECORDS, "label")


def test_no_key_shows_in_any_text(vault: Vault, keys: MemoryKeys, root: RootKey) -> None:
    record = keys.active("ses_1", KeyPurpose.SESSION)
    assert record is not None
    shown = f"{vault!r} {root!r} {root} {record!r} {PLACE!r}"
    assert "rrrr" not in shown
    assert "72727272" not in shown
    assert repr(record.wrapped) not in shown


def test_threads_share_a_vault(vault: Vault) -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        place = dataclasses.replace(PLACE, row=f"trn_{number}")
        try:
            for _ in range(200):
                assert vault.decrypt(vault.encrypt("ses_1", KeyPurpose.SESSION, b"x", place), place) == b"x"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not failures
