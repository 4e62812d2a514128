"""Columns that hold ciphertext only, and the cipher that fills and reads them.

Rules:

- An `Encrypted` column takes an `Envelope` and nothing else: text that nobody encrypted cannot be stored by mistake.
- A ciphertext is bound to its table, column, row, tenant and the row's version. One that was moved, cut or put under
  another version of its row does not open; the error names the row.
- Reading returns the plaintext or raises. No function says whether a row is authentic.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Dialect, LargeBinary, Table
from sqlalchemy.engine import RowMapping
from sqlalchemy.types import TypeDecorator

from appliance.vault import SYSTEM_SCOPE, Binding, KeyPurpose, TamperedValue, Vault


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


class RowCipher:
    """Encrypts and decrypts the `Encrypted` columns of rows. Never inside `Store.transact`: the vault may write."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault
        self._layouts: dict[str, _Layout] = {}

    def seal(self, table: Table, row: Mapping[str, object], *, scope: str, purpose: KeyPurpose) -> dict[str, object]:
        """A copy of `row` with its plaintext `bytes` and `str` encrypted; NULL stays NULL.

        Args:
            row: holds the primary key, `tenant_id` (NULL: the appliance's own) and `row_version`.
            scope: whose key: `SYSTEM_SCOPE`, a tenant or a session.

        Raises:
            VaultSealed, KeyMissing, KeyExhausted: the key cannot be used.
        """
        layout = self._layout(table)
        row_id, tenant, version = _bound(layout, row)
        sealed = dict(row)
        for column, _ in layout.encrypted:
            plaintext = row.get(column)
            if plaintext is None:
                continue
            if isinstance(plaintext, str):
                plaintext = plaintext.encode()
            elif not isinstance(plaintext, bytes):
                raise TypeError(f"{layout.table}.{column} takes bytes or str, not {type(plaintext).__name__}")
            binding = Binding(layout.table, column, row_id, tenant, version)
            sealed[column] = Envelope(self._vault.encrypt(scope, purpose, plaintext, binding))
        return sealed

    def open(self, table: Table, row: RowMapping | Mapping[str, Any]) -> dict[str, object]:
        """A copy of `row` with its `Encrypted` columns as plaintext `bytes`; NULL stays NULL.

        Raises:
            TamperedValue: a value was changed, cut, moved or removed outside; it names table, row and column.
            VaultSealed, KeyMissing: the key cannot be used.
        """
        layout = self._layout(table)
        row_id, tenant, version = _bound(layout, row)
        opened: dict[str, object] = dict(row)
        for column, nullable in layout.encrypted:
            if column not in opened:
                continue
            binding = Binding(layout.table, column, row_id, tenant, version)
            envelope = opened[column]
            if envelope is None:
                if not nullable:
                    raise TamperedValue(binding)
                continue
            opened[column] = self._vault.decrypt(bytes(envelope), binding)  # type: ignore[call-overload]
        return opened

    def _layout(self, table: Table) -> _Layout:
        layout = self._layouts.get(table.name)
        if layout is None:
            (row_id,) = table.primary_key.columns.keys()
            encrypted = tuple(
                (column.name, bool(column.nullable)) for column in table.columns if isinstance(column.type, Encrypted)
            )
            layout = self._layouts[table.name] = _Layout(table.name, row_id, encrypted)
        return layout


def _bound(layout: _Layout, row: RowMapping | Mapping[str, Any]) -> tuple[str, str, int]:
    """What a row's ciphertexts are bound to: its id, its tenant, its version."""
    return row[layout.row_id], row["tenant_id"] or SYSTEM_SCOPE, row["row_version"]
