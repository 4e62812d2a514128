"""Keys: the sealed root, the hierarchy under it, and the envelopes that data is kept in.

A name is imported when it is first asked for: processes that only want `appliance.vault.process`, which needs nothing
but the standard library, do not pay for cryptography.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from appliance.vault.vault import Vault, key_id_of
else:

    def __getattr__(name: str) -> object:
        if name in __all__:
            import importlib

            for module in ("errors", "keys", "seals", "vault"):
                found = vars(importlib.import_module(f"{__name__}.{module}")).get(name)
                if found is not None:
                    globals()[name] = found
                    return found
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


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
    "key_id_of",
    "open_with_key_file",
    "open_with_passphrase",
    "seal_kind",
]
