"""What a key is and where it comes from, without a secret in sight.

The hierarchy: root ▸ one WRAPPING key a tenant and one for the system ▸ every other key. Data is encrypted under the
leaves only, so that a WRAPPING key is rotated by wrapping its children again and no data is touched.
"""

import enum
import hashlib
import struct
from dataclasses import dataclass, field
from typing import Protocol

SYSTEM_SCOPE = "system"


class KeyPurpose(enum.StrEnum):
    """What a key may be used for; one key never serves two."""

    WRAPPING = "wrapping"  # wraps other keys
    RECORDS = "records"  # encrypts rows of a tenant or of the system
    LOOKUP = "lookup"  # keyed hashes to find rows by
    SALT = "salt"  # cache salts and labels for the engine
    SESSION = "session"  # encrypts one session
    AUDIT = "audit"  # derives a key for each record of the audit log


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as it is stored: wrapped.

    Attributes:
        key_id: `key_` and 32 hexadecimal digits.
        scope: `system`, a tenant's id or a session's.
        parent_id: the key that wraps it; None: the root key.
        wrapped: 72 bytes, AES-KWP (RFC 5649) of a 256-bit key and of `identity()`.
        uses_reserved: how many encryptions are accounted for, at least as many as were made.
        root_id: the root key that it descends from.
        created_at: epoch seconds.
        retired: it wraps nothing new.
    """

    key_id: str
    scope: str
    purpose: KeyPurpose
    parent_id: str | None
    version: int
    wrapped: bytes = field(repr=False)
    uses_reserved: int
    root_id: str
    created_at: float
    retired: bool = False

    def identity(self) -> bytes:
        """Which key this is, 32 bytes; wrapped with the key, so that no key can be put in another one's place."""
        parts = (self.key_id.encode(), self.scope.encode(), self.purpose.value.encode(), _UINT64.pack(self.version))
        return hashlib.sha256(b"".join((b"holdfast-key-1", *map(length_prefixed, parts)))).digest()


class KeyStore(Protocol):
    """Where key records are kept. Every call blocks until it is done."""

    def load(self, key_id: str) -> KeyRecord | None:
        """The record of one key."""

    def active(self, scope: str, purpose: KeyPurpose) -> KeyRecord | None:
        """The newest key of a scope and purpose that is not retired."""

    def children(self, parent_id: str) -> list[KeyRecord]:
        """The keys that one key wraps."""

    def retired(self, scope: str) -> list[KeyRecord]:
        """The retired keys of a scope, oldest first."""

    def reserve_uses(self, key_id: str, total: int) -> None:
        """Account for `total` encryptions; durable when it returns."""

    def root_id(self) -> str | None:
        """The root key that the database belongs to; None: it is empty."""


@dataclass(frozen=True, slots=True)
class Rotation:
    """What a rotation changes; the caller stores all of it in one transaction.

    Attributes:
        created: the new WRAPPING key.
        retired: the one it follows. It stays until the next rotation, for keys that were made but not stored yet.
        rewrapped: the keys that the new one wraps now. Only `parent_id` and `wrapped` are stored of them: uses may have
            been reserved meanwhile. Their secrets, and what they encrypted, are unchanged.
        destroyed: ids of WRAPPING keys retired before, which wrap nothing any more, stored or still to be stored.
    """

    created: KeyRecord
    retired: KeyRecord
    rewrapped: list[KeyRecord]
    destroyed: list[str]


@dataclass(frozen=True, slots=True)
class Binding:
    """The place that a ciphertext belongs to. It opens there and nowhere else.

    Attributes:
        beside: a digest of what stands beside it in plaintext and must stay as it is; empty where nothing must.
    """

    table: str
    column: str
    row: str
    tenant: str
    version: int
    beside: bytes = b""

    def associated_data(self) -> bytes:
        """The place as bytes: each part with its length before it, so that no two places read the same."""
        parts = (self.table.encode(), self.column.encode(), self.row.encode(), self.tenant.encode(), self.beside)
        return b"".join((b"holdfast-2", *map(length_prefixed, parts), _UINT64.pack(self.version)))


def length_prefixed(part: bytes) -> bytes:
    """A part of a message that cannot run into the next one."""
    return _UINT32.pack(len(part)) + part


_UINT32 = struct.Struct(">I")
_UINT64 = struct.Struct(">Q")
