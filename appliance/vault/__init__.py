"""Keys: the sealed root, the hierarchy under it, and the envelopes that data is kept in."""

from appliance.vault.errors import (
    ForeignRootKey,
    KeyExhausted,
    KeyMissing,
    PlaintextSwap,
    SealUnusable,
    TamperedValue,
    VaultSealed,
    WrongPassphrase,
)
from appliance.vault.keys import SYSTEM_SCOPE, Binding, KeyPurpose, KeyRecord, KeyStore, Rotation
from appliance.vault.seals import (
    RootKey,
    create_key_file_seal,
    create_passphrase_seal,
    open_with_key_file,
    open_with_passphrase,
    seal_kind,
)
from appliance.vault.vault import Vault

__all__ = [
    "SYSTEM_SCOPE",
    "Binding",
    "ForeignRootKey",
    "KeyExhausted",
    "KeyMissing",
    "KeyPurpose",
    "KeyRecord",
    "KeyStore",
    "PlaintextSwap",
    "RootKey",
    "Rotation",
    "SealUnusable",
    "TamperedValue",
    "Vault",
    "VaultSealed",
    "WrongPassphrase",
    "create_key_file_seal",
    "create_passphrase_seal",
    "open_with_key_file",
    "open_with_passphrase",
    "seal_kind",
]
