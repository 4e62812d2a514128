"""What an entry says without a key, what it takes to read its record, and what it refuses to be."""

import dataclasses
import hashlib

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
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


class OneSecret(Keys):
    """Has one secret for every entry, so that its key is known before what the entry commits to is."""

    def __init__(self, secret: bytes) -> None:
        super().__init__()
        self.secret = secret

    def audit_secret(self, *_: object) -> bytes:
        return self.secret

    def expanded(self) -> tuple[bytes, bytes]:
        """An entry's key, and what commits to it."""
        both = HKDFExpand(SHA256(), 64, b"holdfast-audit-entry").derive(self.secret)
        return both[:32], both[32:]


def _times(x: int, y: int) -> int:
    """In GF(2^128), as GCM has it: the first bit is the one of x^0 (NIST SP 800-38D, algorithm 1)."""
    product = 0
    for bit in range(127, -1, -1):
        if x >> bit & 1:
            product ^= y
        y = y >> 1 ^ (0xE1 << 120 if y & 1 else 0)
    return product


def _power(x: int, exponent: int) -> int:
    result = 1 << 127
    for bit in f"{exponent:b}":
        result = _times(result, result)
        if bit == "1":
            result = _times(result, x)
    return result


def _block(key: bytes, block: bytes) -> int:
    return int.from_bytes(Cipher(AES(key), ECB()).encryptor().update(block))  # noqa: S305 (one block, as GCM does)


def _tag(key: bytes, nonce: bytes, blocks: list[int]) -> int:
    """E(nonce || 1) + GHASH(blocks), where GHASH = X_1 H^m + ... + X_m H (NIST SP 800-38D, algorithms 2 and 4)."""
    hashed, subkey = 0, _block(key, bytes(16))
    for block in blocks:
        hashed = _times(hashed ^ block, subkey)
    return hashed ^ _block(key, nonce + b"\0\0\0\1")


def _under_both(keys: tuple[bytes, bytes], nonce: bytes, content: bytes, bound: bytes) -> bytes:
    """What AES-GCM opens under two keys: under the first as a block that was chosen for that, and `content`.

    A tag is linear in each block. With X_j = 0 the tags are T and T' under the two keys, and a block X_j adds
    X_j H^e to one and X_j H'^e to the other, with e = m + 1 - j. They are equal for X_j = (T + T') / (H^e + H'^e).
    """
    ciphertext = AESGCM(keys[0]).encrypt(nonce, bytes(16) + content, bound)[16:-16]
    lengths = (8 * len(bound)).to_bytes(8) + (8 * (16 + len(ciphertext))).to_bytes(8)
    padded = [each + bytes(-len(each) % 16) for each in (bound, bytes(16), ciphertext, lengths)]
    joined = b"".join(padded)
    blocks = [int.from_bytes(joined[at : at + 16]) for at in range(0, len(joined), 16)]
    chosen = len(padded[0]) // 16
    one, other = (_power(_block(key, bytes(16)), len(blocks) - chosen) for key in keys)
    differs = _tag(keys[0], nonce, blocks) ^ _tag(keys[1], nonce, blocks)
    blocks[chosen] = _times(differs, _power(one ^ other, 2**128 - 2))  # x^(2^128 - 2) = 1 / x
    return blocks[chosen].to_bytes(16) + ciphertext + _tag(keys[0], nonce, blocks).to_bytes(16)


def test_a_ciphertext_that_opens_under_two_keys_is_refused_under_the_second() -> None:
    """AES-GCM does not commit to its key: the entry does."""
    first, second = OneSecret(b"1" * 32), OneSecret(b"2" * 32)
    (key, key_commitment), (other_key, other_commitment) = first.expanded(), second.expanded()
    entry, nonce = _numbered(), bytes(12)
    bound = entry.pack()[:4] + entry.key_id + entry.nonce
    sealed = _under_both((key, other_key), nonce, canonical({"action": "x"}), bound)
    salted = AESGCM(key).decrypt(nonce, sealed, bound)  # its salt is the block that was chosen
    assert AESGCM(other_key).decrypt(nonce, sealed, bound) != salted
    entry = entry._replace(
        key_commitment=key_commitment,
        commitment=hashlib.sha256(b"\x02" + salted).digest(),
        sealed_hash=hashlib.sha256(sealed).digest(),
    )
    assert open_record(entry, sealed, first).record == {"action": "x"}
    with pytest.raises(EntryInvalid, match="another key"):
        open_record(entry, sealed, second)
    with pytest.raises(EntryInvalid, match="another key"):
        open_record(entry._replace(key_commitment=other_commitment), sealed, first)


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
    record = dataclasses.replace(
        event(), request_id=long, target=("session", long), details={"prompt_digest": long}
    ).record({})
    assert record["request_id"] == "ü" * MAX_TEXT
    assert record["cut"] == ["details.prompt_digest", "request_id", "target.id"]
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
