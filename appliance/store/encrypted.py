"""Columns that hold ciphertext only, columns that are bound to them, and the cipher that fills and reads both.

Rules:

- An `Encrypted` column takes an `Envelope` and nothing else: text that nobody encrypted cannot be stored by mistake.
- A ciphertext is bound to its table, column, row, tenant and the row's version. One that was moved, cut or put under
  another version of its row does not open; the error names the row.
- A column with `info=BOUND` is in plaintext, for the database to search and for nobody to change: every ciphertext of
  its row is bound to its value too. Whoever updates one seals the row again, under the next version.
- One with `info=BOUND_ONCE_SET` came with a migration, which has no key: while it is NULL nothing is bound to it, so
  that older rows open; a value that was put there, or taken away, by hand does not.
- Reading returns the plaintext or raises. No function says whether a row is authentic.
"""

import asyncio
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Dialect, Double, Integer, LargeBinary, Table, Text
from sqlalchemy.engine import RowMapping
from sqlalchemy.types import TypeDecorator, TypeEngine

from appliance.vault import SYSTEM_SCOPE, Binding, KeyPurpose, TamperedValue, Vault
from appliance.vault.keys import length_prefixed

BOUND: dict[Any, Any] = {"bound": True}
"""The `info` of a column whose value every ciphertext of its row is bound to."""

BOUND_ONCE_SET: dict[Any, Any] = {"bound": True, "once_set": True}
"""The same, of a column that older rows do not have: it is bound as soon as it is not NULL."""

_DOUBLE = struct.Struct(">d")


class Envelope(bytes):
    """A ciphertext with its format version, key id and nonce, as `Vault.encrypt` makes it."""

    __slots__ = ()


class Encrypted(TypeDecorator[bytes]):
    """A column of envelopes. Reading gives the envelope as it is stored; `RowCipher.open` opens it."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: bytes | None, dialect: Dialect) -> bytes | None:  # noqa: ARG002 (SQLAlchemy's)
        if value is not None and type(value) is not Envelope:
            raise TypeError("an Encrypted column takes what RowCipher.seal made, not plaintext")
        return value


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where a table keeps what is bound into its ciphertexts."""

    table: str
    row_id: str
    encrypted: tuple[tuple[str, bool], ...]  # column, may be NULL
    bound: tuple[tuple[str, bytes, TypeEngine[Any], bool], ...]  # column, its name as bytes, type, once set; by name


class RowCipher:
    """Encrypts and decrypts the `Encrypted` columns of rows. Never inside `Store.transact`: the vault may write."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._layouts: dict[str, _Layout] = {}

    async def prepare(self, *, scope: str, purpose: KeyPurpose) -> None:
        """Have `seal` wait for no write: it would do so in the event loop's thread. Whose key as there.

        Raises:
            VaultSealed, KeyMissing, KeyExhausted: the key cannot be used.
            StoreFull, StoreBusy, StoreUnavailable: its next uses could not be accounted for.
        """
        if self._vault.needs_uses(scope, purpose):
            await asyncio.to_thread(self._vault.reserve_uses, scope, purpose)

    def seal(self, table: Table, row: Mapping[str, object], *, scope: str, purpose: KeyPurpose) -> dict[str, object]:
        """A copy of `row` with its plaintext `bytes` and `str` encrypted; NULL stays NULL.

        Args:
            row: holds the primary key, `tenant_id` (NULL: the appliance's own), `row_version` and every bound column.
            scope: whose key: `SYSTEM_SCOPE`, a tenant or a session.

        Raises:
            VaultSealed, KeyMissing, KeyExhausted: the key cannot be used.
            TypeError: a value is not of its column's type.
        """
        layout = self._layout(table)
        row_id, tenant, version = _place(layout, row)
        beside = _beside(layout, row)
        sealed = dict(row)
        for column, _ in layout.encrypted:
            plaintext = row.get(column)
            if plaintext is None:
                continue
            if isinstance(plaintext, str):
                plaintext = plaintext.encode()
            elif not isinstance(plaintext, bytes):
                raise TypeError(f"{layout.table}.{column} takes bytes or str, not {type(plaintext).__name__}")
            binding = Binding(layout.table, column, row_id, tenant, version, beside)
            sealed[column] = Envelope(self._vault.encrypt(scope, purpose, plaintext, binding))
        return sealed

    def open(self, table: Table, row: RowMapping | Mapping[str, Any]) -> dict[str, object]:
        """A copy of `row` with its `Encrypted` columns as plaintext `bytes`; NULL stays NULL.

        Args:
            row: a whole row; an encrypted column may be left out, a bound one may not.

        Raises:
            TamperedValue: a value was changed, cut, moved or removed outside; it names table, row and column.
            VaultSealed, KeyMissing: the key cannot be used.
        """
        layout = self._layout(table)
        row_id, tenant, version = _place(layout, row)
        # SQLite keeps what it is given, of whatever type.
        if not isinstance(version, int) or not 0 <= version < 1 << 63:
            raise TamperedValue(Binding(layout.table, "row_version", row_id, tenant, 0))
        try:
            beside = _beside(layout, row)
        except TypeError:
            raise TamperedValue(Binding(layout.table, layout.encrypted[0][0], row_id, tenant, version)) from None
        opened: dict[str, object] = dict(row)
        for column, nullable in layout.encrypted:
            if column not in opened:
                continue
            binding = Binding(layout.table, column, row_id, tenant, version, beside)
            envelope = opened[column]
            if envelope is None:
                if not nullable:
                    raise TamperedValue(binding)
                continue
            if not isinstance(envelope, bytes | memoryview):
                raise TamperedValue(binding)
            opened[column] = self._vault.decrypt(bytes(envelope), binding)
        return opened

    def _layout(self, table: Table) -> _Layout:
        layout = self._layouts.get(table.name)
        if layout is None:
            (row_id,) = table.primary_key.columns.keys()
            encrypted = tuple(
                (column.name, bool(column.nullable)) for column in table.columns if isinstance(column.type, Encrypted)
            )
            bound = tuple(
                (name, length_prefixed(name.encode()), column.type, bool(column.info.get("once_set")))
                for name, column in sorted(table.columns.items(), key=lambda each: each[0])
                if column.info.get("bound")
            )
            layout = self._layouts[table.name] = _Layout(table.name, row_id, encrypted, bound)
        return layout


def _place(layout: _Layout, row: RowMapping | Mapping[str, Any]) -> tuple[str, str, Any]:
    """Where a row's ciphertexts belong: its id, its tenant, its version."""
    return row[layout.row_id], row["tenant_id"] or SYSTEM_SCOPE, row["row_version"]


def _beside(layout: _Layout, row: RowMapping | Mapping[str, Any]) -> bytes:
    """The digest of a row's bound columns: SHA-256 of each name and value, with its length before it; empty for none.

    Raises:
        TypeError: a value is not of its column's type.
    """
    if not layout.bound:
        return b""
    said = [
        named + _canonical(kind, row[name])
        for name, named, kind, once_set in layout.bound
        if not once_set or row[name] is not None
    ]
    return hashlib.sha256(b"".join(said)).digest()


def _canonical(kind: TypeEngine[Any], value: object) -> bytes:
    """A value as bytes that any database gives back the same; NULL is not the empty value."""
    if value is None:
        return b"\0"
    if isinstance(kind, Text) and isinstance(value, str):
        said = value.encode()
    elif isinstance(kind, Integer) and isinstance(value, int) and not isinstance(value, bool):
        said = b"%d" % value
    elif isinstance(kind, Double) and isinstance(value, int | float) and not isinstance(value, bool):
        said = _DOUBLE.pack(value)
    elif isinstance(kind, LargeBinary) and isinstance(value, bytes | memoryview):
        said = bytes(value)
    else:
        raise TypeError(f"a column of {kind!r} holds no {type(value).__name__}")
    return b"\1" + length_prefixed(said)
