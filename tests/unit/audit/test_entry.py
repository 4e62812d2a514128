"""What an entry says without a key, what it takes to read its record, and what it refuses to be."""

import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from appliance.audit.entry import (
    ENTRY_BYTES,
    Entry,
    EntryInvalid,
    canonical,
    check_commitment,
    number,
    open_record,
    seal,
    search_tag,
)
from appliance.audit.events import CATALOGUE, MAX_TEXT, TRANSCRIPT_READ, Actor, Event
from tests.unit.audit.making import BOOT, Keys, draft, event


def _numbered() -> Entry:
    return Entry.unpack(number(draft(), sequence=7, wall_ns=-5, monotonic_ns=9, boot_id=BOOT))


def test_an_entry_has_one_size_and_says_what_it_was_given() -> None:
    entry = _numbered()
    assert len(entry.pack()) == ENTRY_BYTES
    assert (entry.sequence, entry.wall_ns, entry.monotonic_ns, entry.boot_id) == (7, -5, 9, BOOT)
    assert CATALOGUE[entry.event_class].action == "turn.admitted"


def test_a_record_is_read_with_its_key_and_checked_with_its_salt_alone() -> None:
    entry = _numbered()
    opened = open_record(entry, draft().sealed, Keys())
    assert opened.record["request_id"] == "req_1"
    check_commitment(entry, opened.salt, canonical(opened.record))
    with pytest.raises(EntryInvalid, match="commits to"):
        check_commitment(entry, opened.salt, canonical({**opened.record, "request_id": "req_2"}))


def test_nothing_of_a_record_is_in_what_lies_on_the_disk() -> None:
    written = _numbered().pack() + draft().sealed
    for word in (b"req_1", b"ten_1", b"pri_1", b"ses_1", b"127.0.0.1", b"turn.admitted"):
        assert word not in written


def test_the_key_of_an_entry_and_what_commits_to_it_are_what_rfc_5869_derives() -> None:
    """As docs/decisions/0010 has it, and with somebody else's HKDF."""
    entry = _numbered()
    secret = Keys().audit_secret(entry.key_id, "entry", entry.nonce, entry.commitment)
    expanded = HKDFExpand(SHA256(), 64, b"holdfast-audit-entry").derive(secret)
    assert entry.key_commitment == expanded[32:]
    bound = entry.pack()[:4] + entry.key_id + entry.nonce
    salted = AESGCM(expanded[:32]).decrypt(bytes(12), draft().sealed, bound)
    check_commitment(entry, salted[:16], salted[16:])


@pytest.mark.parametrize("field", ["key_id", "nonce", "event_class", "key_commitment", "commitment", "sealed_hash"])
def test_a_record_does_not_open_for_another_entry(field: str) -> None:
    entry = _numbered()
    value = getattr(entry, field)
    other = value + 1 if isinstance(value, int) else hashlib.sha256(value).digest()[: len(value)]
    with pytest.raises(EntryInvalid):
        open_record(Entry._make([*({**entry._asdict(), field: other}).values()]), draft().sealed, Keys())


def test_a_ciphertext_that_opens_under_two_keys_is_refused_under_the_second() -> None:
    """AES-GCM does not commit to its key: the entry does."""
    entry = _numbered()

    class Others(Keys):
        def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
            return hashlib.sha256(super().audit_secret(key_id, label, *parts)).digest()

    with pytest.raises(EntryInvalid, match="another key"):
        open_record(entry, draft().sealed, Others())


def test_a_shredded_tenant_leaves_the_entry_and_takes_the_record() -> None:
    keys = Keys()
    entry = _numbered()
    keys.shredded.add(entry.key_id)
    with pytest.raises(LookupError):
        open_record(entry, draft().sealed, keys)
    assert entry.sequence == 7


def test_without_keys_a_record_is_plaintext_and_says_so() -> None:
    plain = seal(1, {"action": "x"}, keys=None, scope="system", actor="", session="", random=bytes(32))
    entry = Entry.unpack(number(plain, sequence=0, wall_ns=0, monotonic_ns=0, boot_id=BOOT))
    assert entry.flags == 1
    assert open_record(entry, plain.sealed, Keys()).record == {"action": "x"}


def test_an_entry_is_found_by_actor_and_session_with_the_key_only() -> None:
    sealed = draft()
    assert sealed.actor_tag == search_tag(Keys(), sealed.key_id, "actor", "pri_1")
    assert sealed.session_tag == search_tag(Keys(), sealed.key_id, "session", "ses_1")
    assert search_tag(Keys(), sealed.key_id, "actor", "") == bytes(8)


def test_an_entry_of_another_size_or_format_is_none() -> None:
    packed = _numbered().pack()
    for wrong in (b"", packed[:-1], packed + b"\0", b"\x02" + packed[1:]):
        with pytest.raises(EntryInvalid):
            Entry.unpack(wrong)


def test_what_is_too_long_is_cut_and_says_so() -> None:
    long = "ü" * 10_000
    record = dataclasses.replace(event(), request_id=long, target=("session", long), details={"x": long}).record({})
    assert record["request_id"] == "ü" * MAX_TEXT
    assert record["cut"] == ["request_id", "target.id", "details.x"]
    assert len(canonical(record)) < 4096


@pytest.mark.parametrize("nasty", ["a\nb", "a\0b", "\x1b[2J", "a\x9bb", "\ud800", "a\x7fb"])
def test_control_characters_and_half_characters_do_not_reach_the_log(nasty: str) -> None:
    happened = Event(TRANSCRIPT_READ, Actor("principal", nasty), source=nasty, target=("session", nasty), reason=nasty)
    text = canonical(happened.record({})).decode()
    assert all(each.isprintable() for each in text)


def test_every_class_has_a_number_and_an_action_of_its_own() -> None:
    assert len({known.action for known in CATALOGUE.values()}) == len(CATALOGUE)
    assert all(number == known.number < 1 << 16 for number, known in CATALOGUE.items())


def test_administrative_events_are_never_under_a_tenants_key() -> None:
    read = Event(TRANSCRIPT_READ, Actor("principal", "pri_1"), tenant_id="ten_1")
    assert read.scope("system") == "system"
    assert event().scope("system") == "ten_1"
