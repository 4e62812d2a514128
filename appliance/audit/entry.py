"""An entry of the log: what its leaf hashes, and the sealed record beside it.

Rules:

- Who seals a record has keys and gives it no number; who numbers and stamps it has no key. The leaf binds both.
- Each record is under a key of its own, derived from its scope's AUDIT key, a nonce and the commitment. The entry
  commits to that key (AES-GCM does not) and, with a salt, to the record: one record can be shown and checked without
  any other.
- An entry has one size. What it says is checked by whoever reads it: nothing here trusts a byte.

The layout is in docs/decisions/0010-audit-log.md. HKDF-Expand: RFC 5869, section 2.3.
"""

import functools
import hashlib
import hmac
import json
import struct
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple, Protocol

from appliance.errors import Fault, HoldfastError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

FORMAT: Final = 1
PLAINTEXT: Final = 1  # a flag: nobody had a key yet
ENTRY_BYTES: Final = 188
MAX_SEALED_BYTES: Final = 65_535  # what 16 bits of length before it can say
NO_ID: Final = bytes(16)
NO_TAG: Final = bytes(8)
TAG_BYTES: Final = 8
CLASS_AT: Final = 2  # where the class stands in an entry's bytes: 16 bits, big-endian
WALL_NS_AT: Final = 12  # where the wall clock stands in an entry's bytes: a signed number of 64 bits, big-endian

_ENTRY: Final = struct.Struct(">BBHQqQ16s16s16s8s8s32s32s32s")
_SEALED_HEAD: Final = struct.Struct(">BBH")
_SALT_BYTES: Final = 16
_GCM_NONCE: Final = bytes(12)  # every entry has a key of its own, which is used once
_RECORD: Final = b"\x02"
_BLOCK_BYTES: Final = 64  # of SHA-256
_INNER: Final = bytes(byte ^ 0x36 for byte in range(256))
_OUTER: Final = bytes(byte ^ 0x5C for byte in range(256))


class EntryInvalid(HoldfastError, ValueError):
    """An entry or its record is not what it has to be."""

    code: ClassVar[str] = "audit_entry_invalid"
    fault: ClassVar[Fault] = Fault.CONFLICT


class EntryKeys(Protocol):
    """What opens records."""

    def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
        """A keyed hash under one of them, 32 bytes.

        Raises:
            HoldfastError: the key is not to be had: sealed, or destroyed with its tenant.
        """


class AuditKeys(EntryKeys, Protocol):
    """The AUDIT keys, one for each tenant and one for the system."""

    def audit_key_id(self, scope: str) -> bytes:
        """Which key seals for a scope now, 16 bytes."""


class Draft(NamedTuple):
    """An entry before it has a number and a time: what a producer hands to the appender."""

    event_class: int
    flags: int
    key_id: bytes
    nonce: bytes
    actor_tag: bytes
    session_tag: bytes
    key_commitment: bytes
    commitment: bytes
    sealed: bytes


class Entry(NamedTuple):
    """An entry's fields, in their order; times in nanoseconds."""

    format: int
    flags: int
    event_class: int
    sequence: int
    wall_ns: int
    monotonic_ns: int
    boot_id: bytes
    key_id: bytes
    nonce: bytes
    actor_tag: bytes
    session_tag: bytes
    key_commitment: bytes
    commitment: bytes
    sealed_hash: bytes

    @classmethod
    def unpack(cls, data: bytes) -> "Entry":
        """Read the bytes that a leaf hashes.

        Raises:
            EntryInvalid: the length or the format is another one.
        """
        if len(data) != ENTRY_BYTES or data[0] != FORMAT:
            raise EntryInvalid(
                "this is no entry of a Holdfast log",
                cause=f"{len(data)} bytes, format {data[0] if data else 'none'}",
                remedy="Read the log with the version that wrote it",
            )
        return cls._make(_ENTRY.unpack(data))

    def pack(self) -> bytes:
        """The bytes that the leaf hashes."""
        return _ENTRY.pack(*self)


def seal(
    event_class: int,
    record: Mapping[str, Any] | bytes,
    *,
    keys: AuditKeys | None,
    scope: str,
    actor: str,
    session: str,
    random: bytes,
    tag: Callable[[AuditKeys, bytes, str, str], bytes] | None = None,
) -> Draft:
    """Seal a record for the scope's key, or leave it in plaintext when there are no keys yet.

    Args:
        record: or its one spelling, where that is known: what `canonical` makes of it.
        scope: a tenant's id, or the system's.
        actor, session: what to find the entry by; empty for none.
        random: 32 bytes that were never used before: the nonce, and the salt.
        tag: `search_tag`, or what remembers its answers.
    """
    nonce, salt = random[:16], random[16:32]
    content = record if isinstance(record, bytes) else canonical(record)
    salted = salt + content
    commitment = hashlib.sha256(_RECORD + salted).digest()
    if len(salted) + 16 > MAX_SEALED_BYTES:
        raise ValueError(f"a record of {len(content)} bytes is too long: bound its fields first")
    if keys is None:
        return Draft(event_class, PLAINTEXT, NO_ID, nonce, NO_TAG, NO_TAG, bytes(32), commitment, salted)
    key_id = keys.audit_key_id(scope)
    key, key_commitment = _entry_key(keys, key_id, nonce, commitment)
    bound = _bound(event_class, 0, key_id, nonce)
    tag = tag or search_tag
    return Draft(
        event_class,
        0,
        key_id,
        nonce,
        tag(keys, key_id, "actor", actor),
        tag(keys, key_id, "session", session),
        key_commitment,
        commitment,
        _aes_gcm()(key).encrypt(_GCM_NONCE, salted, bound),
    )


def number(draft: Draft, *, sequence: int, wall_ns: int, monotonic_ns: int, boot_id: bytes) -> bytes:
    """The entry's bytes, once it has its place."""
    return _ENTRY.pack(
        FORMAT,
        draft.flags,
        draft.event_class,
        sequence,
        wall_ns,
        monotonic_ns,
        boot_id,
        draft.key_id,
        draft.nonce,
        draft.actor_tag,
        draft.session_tag,
        draft.key_commitment,
        draft.commitment,
        hashlib.sha256(draft.sealed).digest(),
    )


class Opened(NamedTuple):
    """A record, and the salt that opens its entry's commitment."""

    record: dict[str, Any]
    salt: bytes


def open_record(entry: Entry, sealed: bytes, keys: EntryKeys) -> Opened:
    """Decrypt a record and check it against its entry. Raises as `open_content`."""
    content, salt = open_content(entry, sealed, keys)
    return Opened(json.loads(content), salt)


def open_content(entry: Entry, sealed: bytes, keys: EntryKeys) -> tuple[bytes, bytes]:
    """A record in its canonical bytes, checked against its entry, and the salt that opens the entry's commitment.

    Raises:
        EntryInvalid: the sealed bytes, the key or the record are not those that the entry commits to.
        HoldfastError: the key is not to be had.
    """
    if hashlib.sha256(sealed).digest() != entry.sealed_hash:
        raise _invalid(entry, "its sealed record is not the one that it hashes")
    salted = sealed
    if not entry.flags & PLAINTEXT:
        from cryptography.exceptions import InvalidTag

        key, key_commitment = _entry_key(keys, entry.key_id, entry.nonce, entry.commitment)
        if not hmac.compare_digest(key_commitment, entry.key_commitment):
            raise _invalid(entry, "it commits to another key than the one that its nonce derives")
        try:
            bound = _bound(entry.event_class, entry.flags, entry.key_id, entry.nonce)
            salted = _aes_gcm()(key).decrypt(_GCM_NONCE, sealed, bound)
        except InvalidTag:
            raise _invalid(entry, "its record was not sealed for it") from None
    salt, content = salted[:_SALT_BYTES], salted[_SALT_BYTES:]
    check_commitment(entry, salt, content)
    return content, salt


def check_commitment(entry: Entry, salt: bytes, content: bytes) -> None:
    """Check a disclosed record, in its canonical bytes.

    Raises:
        EntryInvalid: it is not the record that the entry commits to.
    """
    if len(salt) != _SALT_BYTES or hashlib.sha256(_RECORD + salt + content).digest() != entry.commitment:
        raise _invalid(entry, "the record is not the one that it commits to")


def search_tag(keys: AuditKeys, key_id: bytes, label: str, value: str) -> bytes:
    """What an actor or a session is found by: a truncated keyed hash; zeros for none."""
    return (
        keys.audit_secret(key_id, f"tag-{label}", value.encode(errors="surrogatepass"))[:TAG_BYTES] if value else NO_TAG
    )


def canonical(record: Mapping[str, Any]) -> bytes:
    """A record's one spelling: JSON with sorted keys and no spaces, in UTF-8."""
    return _CANONICAL.encode(record).encode()


_CANONICAL: Final = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _entry_key(keys: EntryKeys, key_id: bytes, nonce: bytes, commitment: bytes) -> tuple[bytes, bytes]:
    """The entry's key, and what commits to it. A nonce that came twice, in a cloned machine say, repeats no key."""
    secret = keys.audit_secret(key_id, "entry", nonce, commitment)
    return _hkdf_expand(secret, b"holdfast-audit-entry")


def _hkdf_expand(secret: bytes, info: bytes) -> tuple[bytes, bytes]:
    """The first two outputs of HKDF-Expand with SHA-256 (RFC 5869, section 2.3).

    The HMACs (RFC 2104) are spelled out: the library's sets up for each one what costs several times these four hashes.
    """
    sha256 = hashlib.sha256
    padded = secret.ljust(_BLOCK_BYTES, b"\0")
    inner, outer = padded.translate(_INNER), padded.translate(_OUTER)
    first = sha256(outer + sha256(inner + info + b"\x01").digest()).digest()
    return first, sha256(outer + sha256(inner + first + info + b"\x02").digest()).digest()


@functools.cache
def _aes_gcm() -> "type[AESGCM]":
    """Loaded by who seals or opens: the appender, and an auditor without keys, never need it."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM


def _bound(event_class: int, flags: int, key_id: bytes, nonce: bytes) -> bytes:
    return _SEALED_HEAD.pack(FORMAT, flags, event_class) + key_id + nonce


def _invalid(entry: Entry, cause: str) -> EntryInvalid:
    return EntryInvalid(
        f"entry {entry.sequence} of the audit log is not what it says",
        cause=cause,
        remedy="Keep a copy of the log; `holdfast audit verify` names everything that is wrong with it",
    )
