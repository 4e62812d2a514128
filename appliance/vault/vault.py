"""The vault: the key hierarchy in memory, and what is done with it.

Rules:

- Sealed until a root key opens it; sealed again, it knows no key.
- Keys come out of here as wrapped records only. A caller stores the records that it is given, in its own transaction.
- A WRAPPING key made by a rotation wraps nothing new before the store says that it is there: that transaction may fail.
- Every encryption takes a random 96-bit nonce and is counted; uses are reserved in the store before they are made, so
  that a crash never loses count (NIST SP 800-38D, 8.3: at most 2^32 a key).
- What is cached is bounded, and found again in the store.

Safe to call from several threads. A call blocks on the store when a key is not cached or its reserved uses are spent:
an event loop has uses reserved in a thread before it encrypts (`needs_uses`, `reserve_uses`).

Example:
    vault = Vault(keys)
    vault.open(root)
    envelope = vault.encrypt("system", KeyPurpose.RECORDS, b"text", binding)
    assert vault.decrypt(envelope, binding) == b"text"
"""

import dataclasses
import hashlib
import hmac
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import partial

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

from appliance.vault.errors import ForeignRootKey, KeyExhausted, KeyMissing, TamperedValue, VaultSealed
from appliance.vault.keys import (
    SYSTEM_SCOPE,
    Binding,
    KeyPurpose,
    KeyRecord,
    KeyStore,
    Rotation,
    length_prefixed,
)
from appliance.vault.seals import RootKey

_FORMAT = b"\x01"
_KEY_BYTES = 32
_KEY_ID_BYTES = 16
_NONCE_BYTES = 12
_HEADER_BYTES = len(_FORMAT) + _KEY_ID_BYTES + _NONCE_BYTES
_MAX_USES = 1 << 32
_RESERVED_USES = 4096
_FEW_USES = 64  # no row has so many encrypted columns
_CACHED_KEYS = 16_384  # a key that is not stored yet can be dropped too: who makes one uses it before waiting
_CACHED_LABELS = 64  # of one key
_BLOCK_BYTES = 64  # of SHA-256
_ENCRYPTING = frozenset({KeyPurpose.RECORDS, KeyPurpose.SESSION})
_HASHING = frozenset({KeyPurpose.LOOKUP, KeyPurpose.SALT, KeyPurpose.AUDIT})


class _Mac:
    """HMAC-SHA256 under one key of at most 64 bytes (RFC 2104): its two hashes are begun once, not for each message."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        padded = key.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded))

    def of(self, message: bytes) -> bytes:
        """Its 32 bytes."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(message)
        outer.update(inner.digest())
        return outer.digest()


class _Key:
    """A key in memory.

    Attributes:
        family: the tenant, or the system, that it descends from.
        unstored: it was made here, and the store was not seen to have it since.
    """

    __slots__ = ("aead", "family", "id_bytes", "macs", "record", "reserved", "secret", "unstored", "used")

    def __init__(self, record: KeyRecord, secret: bytes, *, family: str, used: int, unstored: bool) -> None:
        self.record = record
        self.id_bytes = bytes.fromhex(record.key_id[4:])
        self.family = family
        self.used = used
        self.reserved = record.uses_reserved
        self.unstored = unstored
        self.macs: dict[str, _Mac] = {}
        self.aead = AESGCM(secret) if record.purpose in _ENCRYPTING else None
        # What encrypts is needed a second time only where other keys come of it; the rest can be overwritten.
        self.secret = bytearray(b"" if record.purpose is KeyPurpose.RECORDS else secret)

    def wipe(self) -> None:
        self.secret[:] = bytes(len(self.secret))


class Vault:
    """The keys of one appliance.

    Args:
        keys: where wrapped keys are kept.
        random_bytes: source of keys and nonces.
        now: wall clock, epoch seconds.
    """

    def __init__(
        self,
        keys: KeyStore,
        *,
        random_bytes: Callable[[int], bytes] = os.urandom,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._random_bytes = random_bytes
        self._now = now
        self._lock = threading.RLock()
        self._root: RootKey | None = None
        self._cache: OrderedDict[str, _Key] = OrderedDict()
        self._active: dict[tuple[str, KeyPurpose], str] = {}
        self._rotating: dict[str, str] = {}  # scope -> the WRAPPING key that the store was not seen to have yet

    def __repr__(self) -> str:
        return f"Vault({'sealed' if self.sealed else self.root_id})"

    @property
    def sealed(self) -> bool:
        """Whether the root key is absent."""
        return self._root is None

    @property
    def root_id(self) -> str:
        """Which root key is open.

        Raises:
            VaultSealed: none is.
        """
        return self._open_root().root_id

    def open(self, root: RootKey) -> None:
        """Take the root key into memory.

        Raises:
            ForeignRootKey: the database belongs to another one.
            ValueError: it was wiped.
        """
        if root.wiped:
            raise ValueError("this root key was wiped")
        owner = self._keys.root_id()
        if owner is not None and owner != root.root_id:
            raise ForeignRootKey(owner, root.root_id)
        with self._lock:
            self._root = root

    def seal(self) -> None:
        """Drop every key. What Python copied may stay in memory until it is overwritten: only an exit is certain."""
        with self._lock:
            if self._root is not None:
                self._root.wipe()
            self._root = None
            for key in self._cache.values():
                key.wipe()
            self._cache.clear()
            self._active.clear()
            self._rotating.clear()

    # Making keys

    def new_system_keys(self) -> list[KeyRecord]:
        """The keys of the system: WRAPPING, RECORDS, LOOKUP, AUDIT."""
        return self._new_family(SYSTEM_SCOPE, (KeyPurpose.RECORDS, KeyPurpose.LOOKUP, KeyPurpose.AUDIT))

    def new_tenant_keys(self, tenant_id: str) -> list[KeyRecord]:
        """The keys of a new tenant: WRAPPING, RECORDS, LOOKUP, SALT, AUDIT."""
        purposes = (KeyPurpose.RECORDS, KeyPurpose.LOOKUP, KeyPurpose.SALT, KeyPurpose.AUDIT)
        return self._new_family(tenant_id, purposes)

    def new_session_key(self, tenant_id: str, session_id: str) -> KeyRecord:
        """The key of a new session, under its tenant's. Until it is stored it can be dropped, also by sealing."""
        with self._lock:
            key = self._make(session_id, KeyPurpose.SESSION, self._key_of(tenant_id, KeyPurpose.WRAPPING))
            self._activate(key)
            return key.record

    def pending_session_key(self, tenant_id: str, session_id: str) -> KeyRecord:
        """The key of a session that the caller has not stored yet: the same each time, unless it was dropped."""
        with self._lock:
            known = self._cache.get(self._active.get((session_id, KeyPurpose.SESSION), ""))
            return self.new_session_key(tenant_id, session_id) if known is None else known.record

    def rotate(self, scope: str) -> Rotation:
        """Replace the WRAPPING key of a tenant or of the system. Nothing that was encrypted changes.

        Until the caller has stored what this returns, new keys go on being wrapped by the old one: a rotation that
        could not be stored has changed nothing. One rotation of a scope at a time.

        Raises:
            VaultSealed: no root key is open.
            KeyMissing: the scope has no key.
            TamperedValue: a key that must be rewrapped was changed outside; nothing is rotated.
        """
        with self._lock:
            self._open_root()
            old = self._keys.active(scope, KeyPurpose.WRAPPING)
            if old is None:
                raise KeyMissing(f"for {KeyPurpose.WRAPPING} of {scope}")
            earlier = self._keys.retired(scope)
            # Copies: the work below is done without the lock, and sealing overwrites what is cached.
            parents = {parent.key_id: bytes(self._load(parent).secret) for parent in (*earlier, old)}
            new = self._make(scope, KeyPurpose.WRAPPING, None, version=old.version + 1)
            new_secret = bytes(new.secret)
            self._active.pop((scope, KeyPurpose.WRAPPING), None)
            self._rotating[scope] = new.record.key_id
            awaited = self._parents_of_unstored({parent.key_id for parent in earlier})
        rewrapped = []
        for parent_id, parent_secret in parents.items():
            for child in self._keys.children(parent_id):
                secret = _unwrapped(child, partial(aes_key_unwrap_with_padding, parent_secret))
                wrapped = aes_key_wrap_with_padding(new_secret, secret + child.identity())
                rewrapped.append(dataclasses.replace(child, parent_id=new.record.key_id, wrapped=wrapped))
        with self._lock:
            for child in rewrapped:
                cached = self._cache.get(child.key_id)
                if cached is not None:
                    cached.unstored = False
        destroyed = [parent.key_id for parent in earlier if parent.key_id not in awaited]
        return Rotation(new.record, dataclasses.replace(old, retired=True), rewrapped, destroyed)

    def forget(self, scope: str) -> None:
        """Drop the keys of a scope that was shredded in the store; of a tenant, its sessions' too."""
        with self._lock:
            for key_id, key in list(self._cache.items()):
                if scope in (key.record.scope, key.family):
                    key.wipe()
                    del self._cache[key_id]
                    self._deactivate(key)
            for held in [held for held in self._active if held[0] == scope]:
                del self._active[held]
            self._rotating.pop(scope, None)

    # Using keys

    def needs_uses(self, scope: str, purpose: KeyPurpose) -> bool:
        """Whether `reserve_uses` is called for: few encryptions are left before one waits for the store.

        Raises:
            VaultSealed, KeyMissing: the key is not to be had.
        """
        with self._lock:
            key = self._key_of(scope, purpose)
            return key.reserved - key.used < _FEW_USES

    def reserve_uses(self, scope: str, purpose: KeyPurpose) -> None:
        """Reserve more encryptions. Blocks until the store has it; other threads go on using the vault.

        Raises:
            VaultSealed, KeyMissing: the key is not to be had.
            KeyExhausted: the key was used 2^32 times.
        """
        with self._lock:
            key = self._key_of(scope, purpose)
            total = _next_total(key)
        self._keys.reserve_uses(key.record.key_id, total)
        with self._lock:
            # Where the key was dropped and loaded again meanwhile, this one is used no more.
            key.reserved = max(key.reserved, total)

    def encrypt(self, scope: str, purpose: KeyPurpose, plaintext: bytes, binding: Binding) -> bytes:
        """Encrypt for one place: format, key id, nonce, then AES-256-GCM ciphertext and tag; 45 bytes longer.

        Raises:
            VaultSealed, KeyMissing: the key is not to be had.
            KeyExhausted: the key was used 2^32 times.
        """
        with self._lock:
            key = self._key_of(scope, purpose)
            if key.aead is None:
                raise TypeError(f"a key for {purpose} does not encrypt")
            self._count_use(key)
        nonce = self._random_bytes(_NONCE_BYTES)
        sealed = key.aead.encrypt(nonce, plaintext, binding.associated_data())
        return b"".join((_FORMAT, bytes.fromhex(key.record.key_id[4:]), nonce, sealed))

    def decrypt(self, envelope: bytes, binding: Binding) -> bytes:
        """What was encrypted for this place.

        Raises:
            TamperedValue: it was not encrypted for this place, or was changed; the row is named.
            KeyMissing: the key that it names is not there; the row is named.
            VaultSealed: no root key is open.
        """
        key_id = key_id_of(envelope)
        if key_id is None:
            raise TamperedValue(binding)
        with self._lock:
            key = self._by_id(key_id)
        if key is None:
            raise KeyMissing(key_id, binding)
        if key.aead is None:
            raise TamperedValue(binding)
        nonce = envelope[1 + _KEY_ID_BYTES : _HEADER_BYTES]
        try:
            return key.aead.decrypt(nonce, envelope[_HEADER_BYTES:], binding.associated_data())
        except InvalidTag:
            raise TamperedValue(binding) from None

    def mac(self, scope: str, purpose: KeyPurpose, label: str, *parts: bytes) -> bytes:
        """A keyed hash of `parts`, 32 bytes: HMAC-SHA256 under a subkey of its own for each label (HKDF, RFC 5869).

        Raises:
            VaultSealed, KeyMissing: the key is not to be had.
        """
        with self._lock:
            keyed = _mac_of(self._key_of(scope, purpose), label)
        return keyed.of(b"".join(map(length_prefixed, parts)))

    def mac_chain(
        self, scope: str, purpose: KeyPurpose, label: str, first: bytes, parts: Iterable[bytes]
    ) -> list[bytes]:
        """`mac` of `first` and the first part, then of each hash and the part after it; one of 32 bytes a part.

        Raises:
            VaultSealed, KeyMissing: the key is not to be had.
        """
        with self._lock:
            keyed = _mac_of(self._key_of(scope, purpose), label)
        links = []
        for part in parts:
            first = keyed.of(length_prefixed(first) + length_prefixed(part))
            links.append(first)
        return links

    def tier_key(self, session_id: str) -> bytes:
        """The key of what tiers hold of a session, 32 bytes: it opens that and nothing else (HKDF, RFC 5869).

        Raises:
            VaultSealed, KeyMissing: the session's key is not to be had.
        """
        with self._lock:
            key = self._key_of(session_id, KeyPurpose.SESSION)
            return HKDFExpand(SHA256(), _KEY_BYTES, b"holdfast-tier-1").derive(bytes(key.secret))

    def audit_key_id(self, scope: str) -> bytes:
        """Which key seals the audit records of a scope now, 16 bytes.

        Raises:
            VaultSealed, KeyMissing: it is not to be had.
        """
        with self._lock:
            return self._key_of(scope, KeyPurpose.AUDIT).id_bytes

    def audit_secret(self, key_id: bytes, label: str, *parts: bytes) -> bytes:
        """As `mac`, under the AUDIT key of that id, whosever it is.

        Raises:
            KeyMissing: it was destroyed, or never was.
            VaultSealed: no root key is open.
        """
        named = "key_" + key_id.hex()
        with self._lock:
            key = self._by_id(named)
            if key is None or key.record.purpose is not KeyPurpose.AUDIT:
                raise KeyMissing(named)
            keyed = key.macs.get(label) or _mac_of(key, label)
        return keyed.of(b"".join([length_prefixed(part) for part in parts]))

    # Private

    def _open_root(self) -> RootKey:
        if self._root is None:
            raise VaultSealed
        return self._root

    def _new_family(self, scope: str, purposes: tuple[KeyPurpose, ...]) -> list[KeyRecord]:
        with self._lock:
            wrapping = self._make(scope, KeyPurpose.WRAPPING, None)
            family = [wrapping, *(self._make(scope, purpose, wrapping) for purpose in purposes)]
            for key in family:
                self._activate(key)
            return [key.record for key in family]

    def _make(self, scope: str, purpose: KeyPurpose, parent: _Key | None, *, version: int = 1) -> _Key:
        root = self._open_root()
        secret = self._random_bytes(_KEY_BYTES)
        record = KeyRecord(
            key_id=f"key_{self._random_bytes(_KEY_ID_BYTES).hex()}",
            scope=scope,
            purpose=purpose,
            parent_id=None if parent is None else parent.record.key_id,
            version=version,
            wrapped=b"",
            uses_reserved=_RESERVED_USES if purpose in _ENCRYPTING else 0,
            root_id=root.root_id,
            created_at=self._now(),
        )
        named = secret + record.identity()
        wrapped = root.wrap(named) if parent is None else aes_key_wrap_with_padding(bytes(parent.secret), named)
        record = dataclasses.replace(record, wrapped=wrapped)
        family = scope if parent is None else parent.family
        return self._remember(_Key(record, secret, family=family, used=0, unstored=True))

    def _key_of(self, scope: str, purpose: KeyPurpose) -> _Key:
        self._open_root()
        key_id = self._active.get((scope, purpose))
        key = self._cache.get(key_id) if key_id is not None else None
        if key is not None:
            self._cache.move_to_end(key.record.key_id)
            return key
        record = self._keys.active(scope, purpose)
        if record is None:
            raise KeyMissing(f"for {purpose} of {scope}")
        key = self._load(record)
        if purpose is KeyPurpose.WRAPPING:
            if self._rotating.get(scope, record.key_id) != record.key_id:
                return key  # asked for again next time: the rotation is not stored yet, or never will be
            self._rotating.pop(scope, None)
        self._activate(key)
        return key

    def _by_id(self, key_id: str) -> _Key | None:
        self._open_root()
        key = self._cache.get(key_id)
        if key is not None:
            self._cache.move_to_end(key_id)
            return key
        record = self._keys.load(key_id)
        return None if record is None else self._load(record)

    def _load(self, record: KeyRecord) -> _Key:
        known = self._cache.get(record.key_id)
        if known is not None:
            return known
        # Two floors and no more: what the table says of parents can be anything, a circle too.
        if (record.purpose is KeyPurpose.WRAPPING) != (record.parent_id is None):
            raise _tampered(record)
        if record.parent_id is None:
            secret, family = _unwrapped(record, self._open_root().unwrap), record.scope
        else:
            parent = self._by_id(record.parent_id)
            if parent is None:
                raise KeyMissing(record.parent_id, _place(record))
            if parent.record.purpose is not KeyPurpose.WRAPPING:
                raise _tampered(record)
            secret = _unwrapped(record, partial(aes_key_unwrap_with_padding, bytes(parent.secret)))
            family = parent.family
        # How many of the reserved uses were made before is not known: they count as made.
        return self._remember(_Key(record, secret, family=family, used=record.uses_reserved, unstored=False))

    def _remember(self, key: _Key) -> _Key:
        self._cache[key.record.key_id] = key
        if len(self._cache) > _CACHED_KEYS:
            _, dropped = self._cache.popitem(last=False)
            self._deactivate(dropped)
        return key

    def _activate(self, key: _Key) -> None:
        self._active[key.record.scope, key.record.purpose] = key.record.key_id

    def _deactivate(self, key: _Key) -> None:
        role = (key.record.scope, key.record.purpose)
        if self._active.get(role) == key.record.key_id:
            del self._active[role]

    def _parents_of_unstored(self, candidates: set[str]) -> set[str]:
        """Those of `candidates` that wrap a key which was made here and is not stored yet."""
        parents = set()
        for key in self._cache.values():
            if key.unstored and key.record.parent_id in candidates:
                key.unstored = self._keys.load(key.record.key_id) is None
                if key.unstored:
                    parents.add(key.record.parent_id)
        return parents

    def _count_use(self, key: _Key) -> None:
        if key.used >= key.reserved:
            total = _next_total(key)
            self._keys.reserve_uses(key.record.key_id, total)
            key.reserved = total
        key.used += 1


def key_id_of(envelope: bytes) -> str | None:
    """The id of the key that an envelope says it is under; None: it is no envelope. Nothing is verified."""
    if len(envelope) < _HEADER_BYTES or envelope[:1] != _FORMAT:
        return None
    return f"key_{envelope[1 : 1 + _KEY_ID_BYTES].hex()}"


def _next_total(key: _Key) -> int:
    """Of encryptions that are to be reserved.

    Raises:
        KeyExhausted: there are no more.
    """
    total = key.reserved + _RESERVED_USES
    if total > _MAX_USES:
        raise KeyExhausted(key.record.key_id)
    return total


def _mac_of(key: _Key, label: str) -> _Mac:
    """HMAC under the key's subkey for `label`."""
    known = key.macs.get(label)
    if known is None:
        if key.record.purpose not in _HASHING:
            raise TypeError(f"a key for {key.record.purpose} does not hash")
        info = b"holdfast-mac-1" + label.encode()
        subkey = HKDFExpand(SHA256(), _KEY_BYTES, info).derive(bytes(key.secret))
        if len(key.macs) >= _CACHED_LABELS:
            key.macs.clear()
        known = key.macs[label] = _Mac(subkey)
    return known


def _unwrapped(record: KeyRecord, unwrap: Callable[[bytes], bytes]) -> bytes:
    """The secret of a record.

    Raises:
        TamperedValue: what is wrapped is not this key.
    """
    try:
        named = unwrap(record.wrapped)
    except InvalidUnwrap:
        raise _tampered(record) from None
    secret, identity = named[:_KEY_BYTES], named[_KEY_BYTES:]
    if not hmac.compare_digest(identity, record.identity()):
        raise _tampered(record)
    return secret


def _place(record: KeyRecord) -> Binding:
    return Binding("keys", "wrapped", record.key_id, record.scope, record.version)


def _tampered(record: KeyRecord) -> TamperedValue:
    return TamperedValue(_place(record))
