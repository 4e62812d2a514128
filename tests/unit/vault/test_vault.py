"""The key hierarchy: what it protects, what it refuses, what it counts."""

import base64
import dataclasses
import gc
import logging
import os
import threading
import traceback
from collections.abc import Callable

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import HoldfastError
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
from appliance.vault import vault as vault_module
from tests.unit.vault.keystore import MemoryKeys

# How long an example takes is the machine's affair; the test has a deadline of its own.
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
    _furnish(vault, keys)
    return vault


def _furnish(vault: Vault, keys: MemoryKeys) -> None:
    keys.add(vault.new_system_keys())
    keys.add(vault.new_tenant_keys("ten_1"))
    keys.add([vault.new_session_key("ten_1", "ses_1")])


def _reopened(keys: MemoryKeys) -> Vault:
    """The vault after a crash: what was in memory is gone, what was stored is there."""
    vault = Vault(keys)
    vault.open(RootKey(b"r" * 32))
    return vault


def test_what_was_encrypted_is_read_after_a_restart(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    assert b"hello" not in envelope
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"


# Where an envelope opens

_NAMES = st.text(max_size=8)
_PLACES = st.builds(Binding, _NAMES, _NAMES, _NAMES, _NAMES, st.integers(0, 2**64 - 1), st.binary(max_size=8))


@given(_PLACES, st.sampled_from([field.name for field in dataclasses.fields(Binding)]), st.data())
def test_an_envelope_does_not_open_when_one_part_of_its_place_is_another(
    place: Binding, part: str, data: st.DataObject
) -> None:
    vault = Vault(MemoryKeys())
    vault.open(RootKey(b"r" * 32))
    vault.new_system_keys()
    envelope = vault.encrypt("system", KeyPurpose.RECORDS, b"hello", place)
    values = {"version": st.integers(0, 2**64 - 1), "beside": st.binary(max_size=8)}
    moved = {part: data.draw(values.get(part, _NAMES).filter(lambda value: value != getattr(place, part)))}
    other = dataclasses.replace(place, **moved)  # type: ignore[arg-type]
    assert vault.decrypt(envelope, place) == b"hello"
    with pytest.raises(TamperedValue) as caught:
        vault.decrypt(envelope, other)
    assert caught.value.binding == other
    assert f"{other.table}.{other.column} in row {other.row}" in caught.value.message


@given(_PLACES, _PLACES)
def test_no_two_places_read_the_same(one: Binding, other: Binding) -> None:
    assert (one.associated_data() == other.associated_data()) == (one == other)


def test_text_cannot_move_from_one_part_of_a_place_to_the_next() -> None:
    left, right = Binding("ab", "c", "r", "t", 1), Binding("a", "bc", "r", "t", 1)
    assert left.associated_data() != right.associated_data()


@given(plaintext=st.binary(max_size=64), data=st.data())
def test_a_changed_envelope_is_refused_and_the_row_named(plaintext: bytes, data: st.DataObject) -> None:
    vault = Vault(MemoryKeys())
    vault.open(RootKey(b"r" * 32))
    vault.new_system_keys()
    envelope = vault.encrypt("system", KeyPurpose.RECORDS, plaintext, PLACE)
    changed = bytearray(envelope)
    changed[data.draw(st.integers(0, len(envelope) - 1))] ^= data.draw(st.integers(1, 255))
    cut = envelope[: data.draw(st.integers(0, len(envelope) - 1))]
    longer = envelope + data.draw(st.binary(min_size=1, max_size=4))
    for other in (bytes(changed), cut, longer):
        # A key id that was changed names a key that is not there.
        with pytest.raises((TamperedValue, KeyMissing), match=r"turns\.request in row trn_1"):
            vault.decrypt(other, PLACE)


def test_every_flipped_byte_and_every_cut_is_refused_and_the_row_named(vault: Vault) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    for at in range(len(envelope)):
        flipped = bytearray(envelope)
        flipped[at] ^= 1
        for changed in (bytes(flipped), envelope[:at]):
            with pytest.raises((TamperedValue, KeyMissing), match=r"row trn_1"):
                vault.decrypt(changed, PLACE)


def test_an_envelope_under_another_sessions_key_does_not_open_for_it(vault: Vault, keys: MemoryKeys) -> None:
    keys.add([vault.new_session_key("ten_1", "ses_2")])
    mine = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    theirs = vault.encrypt("ses_2", KeyPurpose.SESSION, b"other", PLACE)
    with pytest.raises(TamperedValue):
        vault.decrypt(mine[:17] + theirs[17:], PLACE)


def test_an_envelope_that_names_a_key_of_another_purpose_is_refused(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    salt = bytes.fromhex(keys.stored("ten_1", KeyPurpose.SALT).key_id.removeprefix("key_"))
    with pytest.raises(TamperedValue):
        vault.decrypt(envelope[:1] + salt + envelope[17:], PLACE)


def test_no_two_envelopes_of_one_text_are_alike(vault: Vault) -> None:
    envelopes = {vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE) for _ in range(100)}
    assert len(envelopes) == 100


# Sealed and open


def test_sealed_it_does_nothing(vault: Vault) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    vault.seal()
    assert vault.sealed
    uses: list[Callable[[], object]] = [
        lambda: vault.decrypt(envelope, PLACE),
        lambda: vault.encrypt("ses_1", KeyPurpose.SESSION, b"x", PLACE),
        lambda: vault.mac("ten_1", KeyPurpose.SALT, "label"),
        lambda: vault.new_system_keys(),
        lambda: vault.new_tenant_keys("ten_9"),
        lambda: vault.new_session_key("ten_1", "ses_9"),
        lambda: vault.rotate("ten_1"),
        lambda: vault.root_id,
    ]
    for use in uses:
        with pytest.raises(VaultSealed):
            use()


def test_sealing_overwrites_what_can_be_and_keeps_no_key(vault: Vault, keys: MemoryKeys, root: RootKey) -> None:
    vault.mac("ten_1", KeyPurpose.SALT, "label")
    held = [key.secret for key in vault._cache.values()]
    assert any(any(secret) for secret in held)
    vault.seal()
    assert not any(root._secret)
    assert not any(any(secret) for secret in held)
    gc.collect()
    assert not [key for key in gc.get_objects() if isinstance(key, vault_module._Key) and key.record in keys._all()]


def test_a_wiped_root_key_neither_opens_a_vault_nor_wraps(vault: Vault, keys: MemoryKeys, root: RootKey) -> None:
    vault.seal()
    with pytest.raises(ValueError, match="wiped"):
        vault.open(root)
    wrapped = RootKey(b"s" * 32).wrap(bytes(32))
    uses: list[Callable[[], bytes]] = [
        lambda: root.wrap(bytes(32)),
        lambda: root.unwrap(wrapped),
        lambda: root.sealed_under(bytes(32)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="wiped"):
            use()
    vault.open(RootKey(b"r" * 32))
    assert vault.mac("ten_1", KeyPurpose.SALT, "label")


def test_a_database_of_another_root_key_is_refused(vault: Vault, keys: MemoryKeys) -> None:
    other = Vault(keys)
    with pytest.raises(ForeignRootKey) as caught:
        other.open(RootKey(b"s" * 32))
    assert vault.root_id in caught.value.cause
    assert other.sealed


# Rotation


def test_rotation_rewraps_keys_and_leaves_data_alone(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    salt = vault.mac("ten_1", KeyPurpose.SALT, "label", b"x")
    before = keys.stored("ten_1", KeyPurpose.WRAPPING)

    keys.apply(vault.rotate("ten_1"))

    assert not keys.children(before.key_id)
    assert keys.stored("ten_1", KeyPurpose.WRAPPING).version == 2
    for reader in (vault, _reopened(keys)):
        assert reader.decrypt(envelope, PLACE) == b"hello"
        assert reader.mac("ten_1", KeyPurpose.SALT, "label", b"x") == salt


def test_the_systems_key_is_rotated_like_a_tenants(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("system", KeyPurpose.RECORDS, b"hello", PLACE)
    rotation = vault.rotate("system")
    keys.apply(rotation)
    rewrapped = {record.purpose for record in rotation.rewrapped}
    assert rewrapped == {KeyPurpose.RECORDS, KeyPurpose.LOOKUP, KeyPurpose.AUDIT}
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"


def test_the_next_rotation_destroys_the_wrapping_key_of_the_one_before(vault: Vault, keys: MemoryKeys) -> None:
    first = keys.stored("ten_1", KeyPurpose.WRAPPING)
    keys.apply(vault.rotate("ten_1"))
    assert first.key_id in keys.records
    keys.apply(vault.rotate("ten_1"))
    assert first.key_id not in keys.records
    assert _reopened(keys).mac("ten_1", KeyPurpose.SALT, "label")


def test_a_session_that_begins_after_a_rotation_is_under_the_new_key(vault: Vault, keys: MemoryKeys) -> None:
    rotation = vault.rotate("ten_1")
    keys.apply(rotation)
    assert vault.new_session_key("ten_1", "ses_2").parent_id == rotation.created.key_id


def test_a_rotation_that_could_not_be_stored_loses_nothing(vault: Vault, keys: MemoryKeys) -> None:
    vault.rotate("ten_1")  # and the transaction fails
    keys.add([vault.new_session_key("ten_1", "ses_2")])
    envelope = vault.encrypt("ses_2", KeyPurpose.SESSION, b"hello", PLACE)
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"
    keys.apply(vault.rotate("ten_1"))
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"


def test_a_session_that_begins_while_a_rotation_is_stored_is_under_a_key_that_is_there(keys: MemoryKeys) -> None:
    _furnish(_reopened(keys), keys)
    vault = _reopened(keys)
    before = keys.stored("ten_1", KeyPurpose.WRAPPING)
    rotation = vault.rotate("ten_1")
    vault.encrypt("ten_1", KeyPurpose.RECORDS, b"", PLACE)  # finds keys of the tenant, which settles nothing
    assert vault.new_session_key("ten_1", "ses_2").parent_id == before.key_id
    keys.apply(rotation)
    assert vault.new_session_key("ten_1", "ses_3").parent_id == rotation.created.key_id


def test_a_session_key_that_is_stored_late_outlives_every_rotation(vault: Vault, keys: MemoryKeys) -> None:
    late = vault.new_session_key("ten_1", "ses_late")
    envelope = vault.encrypt("ses_late", KeyPurpose.SESSION, b"hello", PLACE)
    for _ in range(3):
        keys.apply(vault.rotate("ten_1"))
    keys.add([late])
    assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"
    for _ in range(2):
        keys.apply(vault.rotate("ten_1"))
        assert _reopened(keys).decrypt(envelope, PLACE) == b"hello"
    assert late.parent_id not in keys.records


def test_rotating_a_tenant_with_many_sessions_drops_no_key_that_is_not_stored_yet(
    vault: Vault, keys: MemoryKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add([vault.new_session_key("ten_1", f"ses_{number}") for number in range(20)])
    monkeypatch.setattr(vault_module, "_CACHED_KEYS", 8)
    vault = _reopened(keys)
    vault.new_session_key("ten_1", "ses_late")
    assert len(vault.rotate("ten_1").rewrapped) == 25
    assert vault.encrypt("ses_late", KeyPurpose.SESSION, b"hello", PLACE)


def test_a_rotation_stops_at_a_key_that_was_changed_outside(vault: Vault, keys: MemoryKeys) -> None:
    damaged = keys.stored("ses_1", KeyPurpose.SESSION)
    keys.add([dataclasses.replace(damaged, wrapped=bytes(72))])
    with pytest.raises(TamperedValue, match=damaged.key_id):
        vault.rotate("ten_1")
    with pytest.raises(KeyMissing):
        vault.rotate("ten_unknown")


# Uses


def test_uses_are_reserved_before_they_are_made(vault: Vault, keys: MemoryKeys) -> None:
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    for _ in range(record.uses_reserved):
        vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == []
    vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == [(record.key_id, 2 * record.uses_reserved)]


def test_uses_are_reserved_ahead_while_others_use_the_vault(vault: Vault, keys: MemoryKeys) -> None:
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    assert not vault.needs_uses("ses_1", KeyPurpose.SESSION)
    vault = _reopened(keys)
    assert vault.needs_uses("ses_1", KeyPurpose.SESSION)
    macs: list[bytes] = []

    def reserve(key_id: str, total: int) -> None:
        elsewhere = threading.Thread(target=lambda: macs.append(vault.mac("ten_1", KeyPurpose.LOOKUP, "", b"")))
        elsewhere.start()
        elsewhere.join(10)
        assert macs, "the store is waited for with the vault's lock held"
        MemoryKeys.reserve_uses(keys, key_id, total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "reserve_uses", reserve)
        vault.reserve_uses("ses_1", KeyPurpose.SESSION)
    assert not vault.needs_uses("ses_1", KeyPurpose.SESSION)
    vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == [(record.key_id, 2 * record.uses_reserved)]


def test_no_use_is_counted_twice_when_a_key_was_dropped_while_its_uses_were_reserved(
    vault: Vault, keys: MemoryKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    vault = _reopened(keys)
    vault.needs_uses("ses_1", KeyPurpose.SESSION)

    def reserve(key_id: str, total: int) -> None:
        vault.forget("ses_1")
        vault.needs_uses("ses_1", KeyPurpose.SESSION)  # loads it again, before the reservation is there
        MemoryKeys.reserve_uses(keys, key_id, total)

    with monkeypatch.context() as patch:
        patch.setattr(keys, "reserve_uses", reserve)
        vault.reserve_uses("ses_1", KeyPurpose.SESSION)
    for _ in range(record.uses_reserved + 1):
        vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.stored("ses_1", KeyPurpose.SESSION).uses_reserved == 3 * record.uses_reserved


def test_after_a_crash_every_reserved_use_counts_as_made(vault: Vault, keys: MemoryKeys) -> None:
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    _reopened(keys).encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations == [(record.key_id, 2 * record.uses_reserved)]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=12))
def test_whatever_crashes_between_the_store_accounts_for_every_use(runs: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vault_module, "_RESERVED_USES", 4)
        keys = MemoryKeys()
        vault = _reopened(keys)
        _furnish(vault, keys)
        made = 0
        for uses in runs:
            for _ in range(uses):
                vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
                made += 1
                assert made <= keys.stored("ses_1", KeyPurpose.SESSION).uses_reserved
            vault = _reopened(keys)


def test_a_use_that_cannot_be_reserved_is_not_made(vault: Vault, keys: MemoryKeys) -> None:
    keys.full = True
    vault = _reopened(keys)
    for _ in range(2):
        with pytest.raises(OSError, match="space"):
            vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    keys.full = False
    assert vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)


def test_a_key_that_was_used_up_encrypts_no_more_and_still_reads(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    keys.add([dataclasses.replace(record, uses_reserved=2**32 - 4096)])
    vault = _reopened(keys)
    for _ in range(4096):
        vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert keys.reservations[-1] == (record.key_id, 2**32)
    for reader in (vault, _reopened(keys)):
        with pytest.raises(KeyExhausted, match=record.key_id):
            reader.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
        assert reader.decrypt(envelope, PLACE) == b"hello"


# Shredding


def test_a_shredded_session_cannot_be_read_again(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    held = [key.secret for key in vault._cache.values()]
    keys.shred("ses_1")
    vault.forget("ses_1")
    with pytest.raises(KeyMissing, match=r"row trn_1"):
        vault.decrypt(envelope, PLACE)
    with pytest.raises(KeyMissing):
        vault.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    assert any(any(secret) for secret in held)
    assert vault.mac("ten_1", KeyPurpose.SALT, "label")


def test_a_shredded_tenant_takes_its_sessions_along_and_nobody_elses(vault: Vault, keys: MemoryKeys) -> None:
    keys.add(vault.new_tenant_keys("ten_2"))
    keys.add([vault.new_session_key("ten_2", "ses_2")])
    gone = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    kept = vault.encrypt("ses_2", KeyPurpose.SESSION, b"hello", PLACE)
    keys.apply(vault.rotate("ten_1"))
    keys.shred("ten_1", "ses_1")
    vault.forget("ten_1")
    with pytest.raises(KeyMissing):
        vault.decrypt(gone, PLACE)
    with pytest.raises(KeyMissing):
        vault.mac("ten_1", KeyPurpose.SALT, "label")
    assert vault.decrypt(kept, PLACE) == b"hello"


def test_a_session_key_without_its_tenants_opens_nothing(vault: Vault, keys: MemoryKeys) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    keys.shred("ten_1")
    with pytest.raises(KeyMissing):
        _reopened(keys).decrypt(envelope, PLACE)


# A key table that somebody else wrote to


@pytest.mark.parametrize(
    "change",
    [
        {"wrapped": bytes(72)},
        {"wrapped": b""},
        {"version": 2},
        {"purpose": KeyPurpose.WRAPPING},
        {"purpose": KeyPurpose.SALT},
        {"parent_id": None},
        {"scope": "ses_2"},
    ],
)
def test_a_key_record_that_was_changed_is_refused_and_named(
    vault: Vault, keys: MemoryKeys, change: dict[str, object]
) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    keys.add([dataclasses.replace(record, **change)])  # type: ignore[arg-type]
    with pytest.raises(TamperedValue, match=record.key_id):
        _reopened(keys).decrypt(envelope, PLACE)


def test_a_key_in_another_keys_place_is_refused(vault: Vault, keys: MemoryKeys) -> None:
    """Otherwise shredding the one session would leave the other's key, which reads both."""
    keys.add([vault.new_session_key("ten_1", "ses_2")])
    mine, theirs = keys.stored("ses_1", KeyPurpose.SESSION), keys.stored("ses_2", KeyPurpose.SESSION)
    keys.add([dataclasses.replace(mine, wrapped=theirs.wrapped)])
    with pytest.raises(TamperedValue, match=mine.key_id):
        _reopened(keys).encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)


def test_keys_that_are_said_to_wrap_each_other_are_refused(vault: Vault, keys: MemoryKeys) -> None:
    child = keys.stored("ses_1", KeyPurpose.SESSION)
    parent = keys.stored("ten_1", KeyPurpose.WRAPPING)
    keys.add([dataclasses.replace(parent, parent_id=child.key_id)])
    with pytest.raises(TamperedValue, match=parent.key_id):
        _reopened(keys).encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)
    keys.add([parent, dataclasses.replace(child, parent_id=keys.stored("ten_1", KeyPurpose.SALT).key_id)])
    with pytest.raises(TamperedValue, match=child.key_id):
        _reopened(keys).encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE)


# Keyed hashes


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


def test_a_hash_is_the_same_after_any_number_of_other_labels_and_a_restart(vault: Vault, keys: MemoryKeys) -> None:
    first = vault.mac("ten_1", KeyPurpose.LOOKUP, "label", b"x")
    for number in range(1000):
        vault.mac("ten_1", KeyPurpose.LOOKUP, f"label {number}", b"x")
    assert len(next(key.macs for key in vault._cache.values() if key.macs)) <= 64
    assert vault.mac("ten_1", KeyPurpose.LOOKUP, "label", b"x") == first
    assert _reopened(keys).mac("ten_1", KeyPurpose.LOOKUP, "label", b"x") == first


def test_a_key_is_used_for_its_purpose_only(vault: Vault, keys: MemoryKeys) -> None:
    for purpose in (KeyPurpose.SALT, KeyPurpose.LOOKUP, KeyPurpose.WRAPPING):
        with pytest.raises(TypeError):
            vault.encrypt("ten_1", purpose, b"", PLACE)
    for purpose in (KeyPurpose.RECORDS, KeyPurpose.WRAPPING):
        with pytest.raises(TypeError):
            vault.mac("ten_1", purpose, "label")
    assert keys.reservations == []


# What shows


def test_no_key_shows_in_any_text(keys: MemoryKeys, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secrets = [b"r" * 32]

    def random_bytes(size: int) -> bytes:
        drawn = os.urandom(size)
        if size == 32:
            secrets.append(drawn)
        return drawn

    root = RootKey(b"r" * 32)
    vault = Vault(keys, random_bytes=random_bytes)
    vault.open(root)
    _furnish(vault, keys)
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    record = keys.stored("ses_1", KeyPurpose.SESSION)
    shown = [f"{vault!r} {root!r} {root} {record!r} {PLACE!r} {vault.rotate('ten_1')!r} {list(vault._cache.values())}"]
    exhausted, swapped, foreign, sealed = _reopened(keys), _reopened(keys), Vault(keys), Vault(keys)
    failures: list[Callable[[], object]] = [
        lambda: vault.decrypt(envelope[:-1], PLACE),
        lambda: vault.decrypt(envelope[:1] + bytes(16) + envelope[17:], PLACE),
        lambda: vault.mac("ten_1", KeyPurpose.RECORDS, "label"),
        lambda: foreign.open(RootKey(b"s" * 32)),
        lambda: sealed.root_id,
        lambda: exhausted.encrypt("ses_1", KeyPurpose.SESSION, b"", PLACE),
        lambda: swapped.decrypt(envelope, PLACE),
    ]
    keys.add([dataclasses.replace(record, uses_reserved=2**32)])
    for fail in failures:
        if fail is failures[-1]:
            keys.add([dataclasses.replace(record, wrapped=bytes(72))])
        with pytest.raises((HoldfastError, TypeError)) as caught:
            fail()
        shown += [*traceback.format_exception(caught.value), repr(caught.value), repr(caught.value.args)]
        if isinstance(caught.value, HoldfastError):
            shown.append(repr(caught.value.record()))
    shown.append(caplog.text)
    text = "\n".join(shown)
    assert len(secrets) == 1 + 4 + 5 + 1 + 1
    for secret in secrets:
        for form in (secret.hex(), base64.b64encode(secret).decode(), repr(secret)[2:-1]):
            assert form not in text
    assert repr(record.wrapped)[2:-1] not in text


# Threads


def _together(works: list[Callable[[], None]]) -> None:
    failures: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            ready.wait(timeout=30)
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert failures == []
    assert not any(thread.is_alive() for thread in threads)


def test_threads_share_a_vault_and_every_use_is_counted(
    vault: Vault, keys: MemoryKeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vault_module, "_RESERVED_USES", 16)
    keys.add([vault.new_session_key("ten_1", "ses_2")])

    def work() -> None:
        place = dataclasses.replace(PLACE, row=f"trn_{threading.get_ident()}")
        for _ in range(100):
            assert vault.decrypt(vault.encrypt("ses_2", KeyPurpose.SESSION, b"x", place), place) == b"x"

    _together([work] * 8)
    assert [total for _, total in keys.reservations] == list(range(32, 801, 16))


def test_sessions_that_begin_while_keys_rotate_are_all_readable(vault: Vault, keys: MemoryKeys) -> None:
    envelopes: list[tuple[bytes, Binding]] = []

    def begin() -> None:
        for number in range(50):
            name = f"ses_{threading.get_ident()}_{number}"
            record = vault.new_session_key("ten_1", name)
            place = dataclasses.replace(PLACE, row=name)
            envelopes.append((vault.encrypt(name, KeyPurpose.SESSION, name.encode(), place), place))
            keys.add([record])

    def rotate() -> None:
        for _ in range(20):
            keys.apply(vault.rotate("ten_1"))

    _together([begin, begin, begin, rotate])
    vault = _reopened(keys)
    assert len(envelopes) == 150
    for envelope, place in envelopes:
        assert vault.decrypt(envelope, place) == place.row.encode()


def test_an_audit_key_is_used_by_its_id_and_serves_nothing_else(vault: Vault, keys: MemoryKeys) -> None:
    key_id = vault.audit_key_id("ten_1")
    assert len(key_id) == 16
    secret = vault.audit_secret(key_id, "entry", b"nonce")
    assert secret == _reopened(keys).audit_secret(key_id, "entry", b"nonce")
    assert secret != vault.audit_secret(key_id, "tag", b"nonce")
    assert secret != vault.audit_secret(vault.audit_key_id("system"), "entry", b"nonce")
    salt = bytes.fromhex(keys.stored("ten_1", KeyPurpose.SALT).key_id.removeprefix("key_"))
    for other in (salt, bytes(16)):
        with pytest.raises(KeyMissing):
            vault.audit_secret(other, "entry", b"nonce")
    vault.seal()
    with pytest.raises(VaultSealed):
        vault.audit_secret(key_id, "entry", b"nonce")


# What tiers are encrypted with


def test_a_sessions_tiers_have_a_key_of_their_own_that_survives_a_restart(vault: Vault, keys: MemoryKeys) -> None:
    keys.add([vault.new_session_key("ten_1", "ses_2")])
    assert vault.tier_key("ses_1") == _reopened(keys).tier_key("ses_1")
    assert vault.tier_key("ses_1") != vault.tier_key("ses_2")


def test_a_tiers_key_opens_nothing_of_the_transcript(vault: Vault) -> None:
    envelope = vault.encrypt("ses_1", KeyPurpose.SESSION, b"hello", PLACE)
    with pytest.raises(InvalidTag):
        AESGCM(vault.tier_key("ses_1")).decrypt(envelope[17:29], envelope[29:], PLACE.associated_data())


def test_there_is_no_tiers_key_of_a_session_that_was_forgotten_or_while_the_vault_is_sealed(
    vault: Vault, keys: MemoryKeys
) -> None:
    vault.seal()
    with pytest.raises(VaultSealed):
        vault.tier_key("ses_1")
    vault.open(RootKey(b"r" * 32))
    with pytest.raises(KeyMissing):
        vault.tier_key("ses_9")


def test_a_session_that_is_not_stored_yet_has_one_key_however_often_it_is_asked_for(vault: Vault) -> None:
    first = vault.pending_session_key("ten_1", "ses_7")
    key = vault.tier_key("ses_7")
    assert vault.pending_session_key("ten_1", "ses_7") == first
    assert vault.tier_key("ses_7") == key
