"""The vault: the key hierarchy in memory, and what is done with it.

Rules:

- Sealed until a root key opens it; sealed again, it knows no key.
- Keys come out of here as wrapped records only. A caller stores the records that it is given, in its own transaction.
- Every encryption takes a random 96-bit nonce and is counted; uses are reserved in the store before they are made, so
  that a crash never loses count (NIST SP 800-38D, 8.3: at most 2^32 a key).
- What is cached is bounded, and found again in the store.

Safe to call from several threads. A call blocks on the store when a key is not cached or its reserved uses are spent.

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
from collections.abc import Callable

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
_CACHED_KEYS = 16_384  # above the most turns that run at once: a key that is not stored yet must not be dropped
_ENCRYPTING = frozenset({KeyPurpose.RECORDS, KeyPurpose.SESSION})
_HASHING = frozenset({KeyPurpose.LOOKUP, KeyPurpose.SALT})


class _Key:
    """A key in memory."""

    __slots__ = ("aead", "macs", "record", "reserved", "secret", "used")

    def __init__(self, record: KeyRecord, secret: bytes, *, used: int) -> None:
        self.record = record
        self.secret = secret
        self.used = used
        self.reserved = record.uses_reserved
        self.aead = AESGCM(secret) if record.purpose in _ENCRYPTING else None
        self.macs: dict[str, hmac.HMAC] = {}


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
        """
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
            self._cache.clear()
            self._active.clear()

    # Making keys

    def new_system_keys(self) -> list[KeyRecord]:
        """The keys of the system: WRAPPING, RECORDS, LOOKUP."""
        return self._new_family(SYSTEM_SCOPE, (KeyPurpose.RECORDS, KeyPurpose.LOOKUP))

    def new_tenant_keys(self, tenant_id: str) -> list[KeyRecord]:
        """The keys of a new tenant: WRAPPING, RECORDS, LOOKUP, SALT."""
        return self._new_family(tenant_id, (KeyPurpose.RECORDS, KeyPurpose.LOOKUP, KeyPurpose.SALT))

    def new_session_key(self, tenant_id: str, session_id: str) -> KeyRecord:
        """The key of a new session, under its tenant's."""
        with self._lock:
            return self._new_key(session_id, KeyPurpose.SESSION, self._key_of(tenant_id, KeyPurpose.WRAPPING))

    def rotate(self, scope: str) -> Rotation:
        """Replace the WRAPPING key of a tenant or of the system. Nothing that was encrypted changes.

        Raises:
            KeyMissing: the scope has none.
        """
        with self._lock:
            old = self._key_of(scope, KeyPurpose.WRAPPING)
            new = self._new_key(scope, KeyPurpose.WRAPPING, None, version=old.record.version + 1)
            new_key = self._cache[new.key_id]
            earlier = self._keys.retired(scope)
            rewrapped = []
            for parent in (*(record.key_id for record in earlier), old.record.key_id):
                for child in self._keys.children(parent):
                    secret = self._load(child).secret
                    wrapped = aes_key_wrap_with_padding(new_key.secret, secret)
                    rewrapped.append(dataclasses.replace(child, parent_id=new.key_id, wrapped=wrapped))
            retired = dataclasses.replace(old.record, retired=True)
            return Rotation(new, retired, rewrapped, [record.key_id for record in earlier])

    def forget(self, scope: str) -> None:
        """Drop the keys of a scope that was shredded in the store."""
        with self._lock:
            for key_id in [key_id for key_id, key in self._cache.items() if key.record.scope == scope]:
                del self._cache[key_id]
            for held in [held for held in self._active if held[0] == scope]:
                del self._active[held]

    # Using keys

    def encrypt(self, scope: str, purpose: KeyPurpose, plaintext: bytes, binding: Binding) -> bytes:
        """Encrypt for one place: format, key id, nonce, then AES-256-GCM ciphertext and tag; 45 bytes longer.

        Raises:
            VaultSealed, KeyMissing: the key is not to be had.
            KeyExhausted: the key was used 2^32 times.
        """
        with self._lock:
            key = self._key_of(scope, purpose)
            self._count_use(key)
        if key.aead is None:
            raise TypeError(f"a key for {purpose} does not encrypt")
        nonce = self._random_bytes(_NONCE_BYTES)
        sealed = key.aead.encrypt(nonce, plaintext, binding.associated_data())
        return b"".join((_FORMAT, bytes.fromhex(key.record.key_id[4:]), nonce, sealed))

    def decrypt(self, envelope: bytes, binding: Binding) -> bytes:
        """What was encrypted for this place.

        Raises:
            TamperedValue: it was not encrypted for this place, or was changed; the row is named.
            VaultSealed, KeyMissing: the key is not to be had.
        """
        if len(envelope) < _HEADER_BYTES or envelope[:1] != _FORMAT:
            raise TamperedValue(binding)
        key_id = f"key_{envelope[1 : 1 + _KEY_ID_BYTES].hex()}"
        with self._lock:
            key = self._by_id(key_id)
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
            key = self._key_of(scope, purpose)
            keyed = key.macs.get(label)
            if keyed is None:
                if purpose not in _HASHING:
                    raise TypeError(f"a key for {purpose} does not hash")
                info = b"holdfast-mac-1" + label.encode()
                subkey = HKDFExpand(SHA256(), _KEY_BYTES, info).derive(key.secret)
                keyed = key.macs[label] = hmac.new(subkey, digestmod=hashlib.sha256)
            digest = keyed.copy()
        digest.update(b"".join(map(length_prefixed, parts)))
        return digest.digest()

    # Private

    def _open_root(self) -> RootKey:
        if self._root is None:
            raise VaultSealed
        return self._root

    def _new_family(self, scope: str, purposes: tuple[KeyPurpose, ...]) -> list[KeyRecord]:
        with self._lock:
            wrapping = self._new_key(scope, KeyPurpose.WRAPPING, None)
            parent = self._cache[wrapping.key_id]
            return [wrapping, *(self._new_key(scope, purpose, parent) for purpose in purposes)]

    def _new_key(self, scope: str, purpose: KeyPurpose, parent: _Key | None, *, version: int = 1) -> KeyRecord:
        root = self._open_root()
        secret = self._random_bytes(_KEY_BYTES)
        record = KeyRecord(
            key_id=f"key_{self._random_bytes(_KEY_ID_BYTES).hex()}",
            scope=scope,
            purpose=purpose,
            parent_id=None if parent is None else parent.record.key_id,
            version=version,
            wrapped=root.wrap(secret) if parent is None else aes_key_wrap_with_padding(parent.secret, secret),
            uses_reserved=_RESERVED_USES if purpose in _ENCRYPTING else 0,
            root_id=root.root_id,
            created_at=self._now(),
        )
        self._remember(_Key(record, secret, used=0))
        self._active[scope, purpose] = record.key_id
        return record

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
        self._active[scope, purpose] = record.key_id
        return self._load(record)

    def _by_id(self, key_id: str) -> _Key:
        self._open_root()
        key = self._cache.get(key_id)
        if key is not None:
            return key
        record = self._keys.load(key_id)
        if record is None:
            raise KeyMissing(key_id)
        return self._load(record)

    def _load(self, record: KeyRecord) -> _Key:
        known = self._cache.get(record.key_id)
        if known is not None:
            return known
        try:
            if record.parent_id is None:
                secret = self._open_root().unwrap(record.wrapped)
            else:
                secret = aes_key_unwrap_with_padding(self._by_id(record.parent_id).secret, record.wrapped)
        except InvalidUnwrap:
            place = Binding("keys", "wrapped", record.key_id, record.scope, record.version)
            raise TamperedValue(place) from None
        # How many of the reserved uses were made before is not known: they count as made.
        key = _Key(record, secret, used=record.uses_reserved)
        self._remember(key)
        return key

    def _remember(self, key: _Key) -> None:
        self._cache[key.record.key_id] = key
        if len(self._cache) > _CACHED_KEYS:
            _, dropped = self._cache.popitem(last=False)
            self._active.pop((dropped.record.scope, dropped.record.purpose), None)

    def _count_use(self, key: _Key) -> None:
        if key.used >= key.reserved:
            total = key.reserved + _RESERVED_USES
            if total > _MAX_USES:
                raise KeyExhausted(key.record.key_id)
            self._keys.reserve_uses(key.record.key_id, total)
            key.reserved = total
        key.used += 1
