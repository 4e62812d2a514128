"""What can go wrong with keys and with what they protect. No message holds a key, a passphrase or plaintext."""

from typing import ClassVar

from appliance.errors import Fault, HoldfastError
from appliance.vault.keys import Binding


class VaultSealed(HoldfastError):
    """The root key is not in memory: nothing can be read or written until an administrator unseals."""

    code: ClassVar[str] = "vault_sealed"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE

    def __init__(self, *, remedy: str = "An administrator runs `holdfast unseal`") -> None:
        super().__init__(
            "the vault is sealed",
            cause="the root key is not in memory: nobody has unsealed the vault since it started or was sealed",
            remedy=remedy,
        )


class WrongPassphrase(HoldfastError):
    """What was given does not open the seal."""

    code: ClassVar[str] = "wrong_passphrase"
    fault: ClassVar[Fault] = Fault.DENIED


class SealUnusable(HoldfastError):
    """A seal or a key file is missing, damaged, or open to others."""

    code: ClassVar[str] = "seal_unusable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class ForeignRootKey(HoldfastError):
    """The database belongs to another root key than the one at hand."""

    code: ClassVar[str] = "foreign_root_key"
    fault: ClassVar[Fault] = Fault.CONFLICT

    def __init__(self, database_root: str, root: str) -> None:
        super().__init__(
            "the root key does not belong to this database",
            cause=f"the database was made under {database_root}; the sealed root key at hand is {root}",
            remedy="Put back the root.sealed that the database was made with, or restore both from one backup",
        )


class KeyMissing(HoldfastError):
    """A key was shredded or lost; what it protected cannot be read again."""

    code: ClassVar[str] = "key_missing"
    fault: ClassVar[Fault] = Fault.MISSING

    def __init__(self, key: str, binding: Binding | None = None) -> None:
        place = "" if binding is None else f" that {binding.table}.{binding.column} in row {binding.row} names"
        super().__init__(
            f"the key {key}{place} is not there",
            cause="it was shredded, or its row is missing from the database",
            remedy="What it protected is gone unless a backup holds it; `holdfast doctor` checks the rest",
        )


class KeyExhausted(HoldfastError):
    """A key was used as often as random nonces allow (NIST SP 800-38D, 8.3)."""

    code: ClassVar[str] = "key_exhausted"
    fault: ClassVar[Fault] = Fault.LIMIT

    def __init__(self, key: str) -> None:
        super().__init__(
            f"the key {key} must not encrypt any more",
            cause="it was used 2^32 times, the most that random nonces allow",
            remedy="Begin a new session; for a tenant's own key, make a new tenant",
        )


class TamperedValue(HoldfastError):
    """A stored value is not what was written there."""

    code: ClassVar[str] = "value_tampered"
    fault: ClassVar[Fault] = Fault.INTERNAL

    def __init__(self, binding: Binding) -> None:
        super().__init__(
            f"the value of {binding.table}.{binding.column} in row {binding.row} is refused",
            cause="outside the appliance, it was changed, cut or moved, or a value of its row was that is bound to it",
            remedy="Find out who can write the database; restore the row from a backup",
        )
        self.binding = binding


class PlaintextSwap(HoldfastError):
    """Memory could reach a disk unencrypted, and the settings refuse that."""

    code: ClassVar[str] = "plaintext_swap"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT
