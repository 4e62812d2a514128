"""Opens the sealed root key of a state directory.

Rule: how it is opened is said by the seal itself, not by a setting: the two could differ.
"""

from pathlib import Path
from typing import ClassVar

from appliance.errors import Fault, HoldfastError
from appliance.vault import RootKey, SealUnusable, open_with_key_file, open_with_passphrase, seal_kind

SEALED_ROOT = "root.sealed"
KEY_FILE = "root.key"


class PassphraseNeeded(HoldfastError):
    """The seal opens with a passphrase, and none was given."""

    code: ClassVar[str] = "passphrase_needed"
    fault: ClassVar[Fault] = Fault.CALLER


def read_seal(state_dir: Path) -> bytes:
    """The sealed root key.

    Raises:
        SealUnusable: it is not there, or cannot be read.
    """
    path = state_dir / SEALED_ROOT
    try:
        return path.read_bytes()
    except OSError as error:
        raise SealUnusable(
            f"the sealed root key {path} cannot be read",
            cause=error.strerror or "unknown",
            remedy="Put back root.sealed from a backup of this appliance; without it nothing can be read",
        ) from None


def open_root(state_dir: Path, passphrase: bytes | bytearray) -> RootKey:
    """The root key of the appliance in `state_dir`. Blocks for about a second with a passphrase.

    Args:
        passphrase: not looked at when the seal opens with a key file.

    Raises:
        WrongPassphrase: the passphrase, or the key file, is another one.
        PassphraseNeeded: it is empty.
        SealUnusable: the seal or the key file is missing or damaged.
    """
    seal = read_seal(state_dir)
    if seal_kind(seal) == "key-file":
        return open_with_key_file(seal, state_dir / KEY_FILE)
    if not passphrase:
        raise PassphraseNeeded(
            "no passphrase was given",
            cause="the root key of this appliance is sealed by a passphrase",
            remedy="`holdfast unseal` asks for it; --passphrase-fd N takes it from a descriptor",
        )
    return open_with_passphrase(seal, passphrase)
