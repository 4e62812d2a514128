"""Rows: tables, migrations, encrypted columns, and one writer that commits in groups."""

from appliance.store import tables
from appliance.store.encrypted import Encrypted, Envelope, RowCipher
from appliance.store.erasures import Erasures
from appliance.store.errors import (
    BackupFailed,
    BackupUnsupported,
    SchemaTooNew,
    SchemaUnreleased,
    StoreBusy,
    StoreConflict,
    StoreDefect,
    StoreEmpty,
    StoreFull,
    StoreInUse,
    StoreUnavailable,
)
from appliance.store.keys import DatabaseKeys, key_changes, rotation_changes
from appliance.store.store import Store
from appliance.store.writer import Change

__all__ = [
    "BackupFailed",
    "BackupUnsupported",
    "Change",
    "DatabaseKeys",
    "Encrypted",
    "Envelope",
    "Erasures",
    "RowCipher",
    "SchemaTooNew",
    "SchemaUnreleased",
    "Store",
    "StoreBusy",
    "StoreConflict",
    "StoreDefect",
    "StoreEmpty",
    "StoreFull",
    "StoreInUse",
    "StoreUnavailable",
    "key_changes",
    "rotation_changes",
    "tables",
]
