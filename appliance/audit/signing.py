"""The key that signs this log's checkpoints, sealed beside the log.

Rules:

- The key is made with the log, and sealed under the system's RECORDS key: who has the folder alone signs nothing.
- It is written whole or not at all: a full disk leaves no part of a key in its place.
- A log that has a checkpoint and no key is not given another one: that would be another log under the same folder.
"""

import errno
import os
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit.files import write_whole
from appliance.audit.log import CHECKPOINT, PUBLIC_KEY, unwritable
from appliance.audit.notes import SigningKey, VerifierKey
from appliance.errors import Fault, HoldfastError
from appliance.vault import SYSTEM_SCOPE, Binding, KeyPurpose, Vault

SIGNING_KEY: Final = "signing-key"
_BINDING: Final = Binding("audit", "signing_key", "log", SYSTEM_SCOPE, 1)


class SigningKeyMissing(HoldfastError):
    """The log was signed, and the key that did it is gone."""

    code: ClassVar[str] = "audit_signing_key_missing"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


def signing_key(directory: Path, vault: Vault) -> SigningKey:
    """The key of the log in `directory`, made if there is no log yet. Blocks.

    Raises:
        VaultSealed: the vault is sealed.
        TamperedValue: the file was changed, or is another appliance's.
        SigningKeyMissing: there is a log, and its key is not with it.
        LogUnwritable: the key cannot be read, or kept.
    """
    path = directory / SIGNING_KEY
    try:
        return SigningKey.from_bytes(vault.decrypt(path.read_bytes(), _BINDING))
    except FileNotFoundError:
        if (directory / CHECKPOINT).exists():
            raise SigningKeyMissing(
                "the audit log cannot be signed",
                cause=f"it has a checkpoint, and {path} is not there",
                remedy=f"Put {SIGNING_KEY} back from a copy; or move the whole folder away, and a new log begins",
            ) from None
    except OSError as error:
        raise unwritable(path, error.errno or errno.EIO) from None
    key = SigningKey.generate(f"holdfast.{os.urandom(8).hex()}")
    sealed = vault.encrypt(SYSTEM_SCOPE, KeyPurpose.RECORDS, key.to_bytes(), _BINDING)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(directory / PUBLIC_KEY, f"{key.verifier()}\n".encode())
        write_whole(path, sealed)
    except OSError as error:
        raise unwritable(path, error.errno or errno.EIO) from None
    return key


def public_key(directory: Path) -> VerifierKey:
    """The log's public key, as it lies beside it.

    Raises:
        SigningKeyMissing: there is none yet.
    """
    path = directory / PUBLIC_KEY
    try:
        return VerifierKey.parse(path.read_text(encoding="ascii").strip())
    except OSError as error:
        raise SigningKeyMissing(
            "the audit log has no public key",
            cause=f"{path}: {error.strerror}",
            remedy="It is made when the vault is opened for the first time",
        ) from None
