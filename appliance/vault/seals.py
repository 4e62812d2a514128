"""The root key, and the seals that it is carried in.

Rules:

- A root key has no text form: not in a repr, not in a pickle, not in an error.
- A passphrase is stretched by Argon2id (RFC 9106) in a child process, whose memory goes with it. It gets the passphrase
  over a pipe, never as an argument or in the environment; one at a time.
- A key file is for demonstrations: whoever can read it can open the seal. It must be a plain file, ours, and closed to
  others.
- A seal says its format, and which root key it holds.
"""

import base64
import contextlib
import hashlib
import hmac
import json
import os
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap_with_padding,
    aes_key_wrap_with_padding,
)

from appliance.vault.errors import SealUnusable, WrongPassphrase

_FORMAT = "holdfast-root-seal-1"
_ROOT_BYTES = 32
_SALT_BYTES = 16
_MEMORY_KIB = 256 * 1024
_ITERATIONS = 3
_LANES = 4
_MAX_MEMORY_KIB = 4 * 1024 * 1024
_MAX_ITERATIONS = 100
_MAX_LANES = 64
_MIN_SALT_BYTES = 8  # RFC 9106, 3.1
_DERIVE_DEADLINE_S = 120
_one_derivation = threading.Semaphore(1)


class RootKey:
    """The key that every other one descends from. Wraps and unwraps; never shows itself."""

    __slots__ = ("_secret", "_wiped", "root_id")

    def __init__(self, secret: bytes | bytearray) -> None:
        if len(secret) != _ROOT_BYTES:
            raise ValueError(f"a root key has {_ROOT_BYTES} bytes")
        self._secret = bytearray(secret)
        self._wiped = False
        # Says which key it is, and nothing about it.
        self.root_id = f"root_{hmac.digest(secret, b'holdfast-root-id-1', hashlib.sha256).hex()[:32]}"

    @classmethod
    def generate(cls) -> "RootKey":
        """A new root key."""
        return cls(os.urandom(_ROOT_BYTES))

    def wrap(self, secret: bytes) -> bytes:
        """AES-KWP (RFC 5649) of another key."""
        return aes_key_wrap_with_padding(self._bytes(), secret)

    def unwrap(self, wrapped: bytes) -> bytes:
        """The other key again.

        Raises:
            InvalidUnwrap: it was not wrapped by this one.
        """
        return aes_key_unwrap_with_padding(self._bytes(), wrapped)

    @property
    def wiped(self) -> bool:
        """Whether it can be used no more."""
        return self._wiped

    def wipe(self) -> None:
        """Overwrite the key. Whatever is asked of it afterwards raises `ValueError`."""
        self._wiped = True
        self._secret[:] = bytes(len(self._secret))

    def sealed_under(self, key: bytes) -> bytes:
        """This key, wrapped under a seal's."""
        return aes_key_wrap_with_padding(key, self._bytes())

    def _bytes(self) -> bytes:
        # Zeros are a key too, and everybody knows it.
        if self._wiped:
            raise ValueError("this root key was wiped")
        return bytes(self._secret)

    def __repr__(self) -> str:
        return f"RootKey({self.root_id})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a root key is not pickled")


def create_passphrase_seal(
    root: RootKey, passphrase: bytes | bytearray, *, memory_kib: int = _MEMORY_KIB, iterations: int = _ITERATIONS
) -> bytes:
    """A seal that opens with a passphrase. Blocks for about a second.

    Raises:
        SealUnusable: the passphrase could not be stretched.
    """
    stretching = _Stretching(memory_kib, iterations, _LANES, os.urandom(_SALT_BYTES))
    return _seal(root, "passphrase", _stretch(passphrase, stretching), {"name": "argon2id", **stretching.to_json()})


def create_key_file_seal(root: RootKey, key_file: Path) -> bytes:
    """A seal that opens with a new key file, made here with mode 0600.

    Raises:
        SealUnusable: the file is there already, or cannot be made.
    """
    secret = os.urandom(_ROOT_BYTES)
    try:
        descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SealUnusable(
            f"the key file {key_file} cannot be made",
            cause=error.strerror or "unknown",
            remedy="Choose another place, or move the old file away if nothing is sealed with it",
        ) from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return _seal(root, "key-file", _from_key_file(secret), {"name": "hkdf-sha256"})


def open_with_passphrase(seal: bytes, passphrase: bytes | bytearray) -> RootKey:
    """The root key of a passphrase seal. Blocks for about a second.

    Raises:
        WrongPassphrase: the passphrase is another one.
        SealUnusable: this is not such a seal, or it is damaged.
    """
    parsed = _parse(seal, "passphrase")
    return _open(parsed, _stretch(passphrase, _stretching(parsed.kdf)), "The passphrase is another one")


def open_with_key_file(seal: bytes, key_file: Path) -> RootKey:
    """The root key of a key-file seal.

    Raises:
        WrongPassphrase: the key file belongs to another seal.
        SealUnusable: the key file is missing, damaged or open to others; or this is not such a seal.
    """
    parsed = _parse(seal, "key-file")
    return _open(parsed, _from_key_file(_read_key_file(key_file)), "The key file belongs to another seal")


def seal_kind(seal: bytes) -> str:
    """What a seal opens with: `passphrase` or `key-file`.

    Raises:
        SealUnusable: this is not a seal.
    """
    return _parse(seal, None).kind


@dataclass(frozen=True, slots=True)
class _Seal:
    """A seal as it was read."""

    kind: str
    root_id: str
    kdf: dict[str, Any]  # read by `_stretching`, for the kind that needs it
    wrapped: bytes


@dataclass(frozen=True, slots=True)
class _Stretching:
    """What Argon2id is told."""

    memory_kib: int
    iterations: int
    lanes: int
    salt: bytes

    def to_json(self) -> dict[str, object]:
        return {
            "memory_kib": self.memory_kib,
            "iterations": self.iterations,
            "lanes": self.lanes,
            "salt": _text(self.salt),
        }


def _seal(root: RootKey, kind: str, key: bytes, kdf: dict[str, object]) -> bytes:
    record = {
        "format": _FORMAT,
        "kind": kind,
        "root_id": root.root_id,
        "kdf": kdf,
        "wrapped": _text(root.sealed_under(key)),
    }
    return json.dumps(record, indent=2).encode() + b"\n"


def _parse(seal: bytes, kind: str | None) -> _Seal:
    try:
        record = json.loads(seal)
        if record["format"] != _FORMAT:
            raise _unusable(f"its format is {str(record['format'])[:40]!r}, and this version reads {_FORMAT}")
        if record["kind"] not in ("passphrase", "key-file"):
            raise _unusable("it is of a kind that this version does not know")
        parsed = _Seal(
            record["kind"],
            str(record["root_id"]),
            dict(record["kdf"]),
            base64.b64decode(record["wrapped"], validate=True),
        )
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _unusable("the file is damaged") from None
    if kind is not None and parsed.kind != kind:
        raise _unusable(f"it opens with a {parsed.kind}, not with a {kind}")
    return parsed


def _stretching(kdf: dict[str, Any]) -> _Stretching:
    """How a seal says that its passphrase is stretched; a damaged one cannot ask for a day, or all the memory."""
    try:
        numbers = (kdf["memory_kib"], kdf["iterations"], kdf["lanes"])
        stretching = _Stretching(*numbers, base64.b64decode(kdf["salt"], validate=True))
        known = kdf["name"] == "argon2id" and all(type(number) is int for number in numbers)
    except (ValueError, KeyError, TypeError):
        raise _unusable("the file is damaged") from None
    if (
        not known
        or not 1 <= stretching.lanes <= _MAX_LANES
        or not 8 * stretching.lanes <= stretching.memory_kib <= _MAX_MEMORY_KIB
        or not 1 <= stretching.iterations <= _MAX_ITERATIONS
        or len(stretching.salt) < _MIN_SALT_BYTES
    ):
        raise _unusable("its key derivation is not one that this version does")
    return stretching


def _open(seal: _Seal, key: bytes, cause: str) -> RootKey:
    try:
        root = RootKey(aes_key_unwrap_with_padding(key, seal.wrapped))
    except (InvalidUnwrap, ValueError):
        raise WrongPassphrase(
            "the root key stays sealed", cause=cause, remedy="Try again; nothing was changed"
        ) from None
    if root.root_id != seal.root_id:
        raise _unusable("it names another root key than it holds")
    return root


def _stretch(passphrase: bytes | bytearray, stretching: _Stretching) -> bytes:
    """Argon2id in a child process: 32 bytes."""
    request = json.dumps(stretching.to_json())
    with _one_derivation:
        child = subprocess.Popen(
            [sys.executable, "-I", "-m", "appliance.vault.kdf"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
        )
        try:
            key, _ = child.communicate(request.encode() + b"\n" + bytes(passphrase), timeout=_DERIVE_DEADLINE_S)
        except subprocess.TimeoutExpired:
            raise _derivation_failed(f"it took longer than {_DERIVE_DEADLINE_S} s") from None
        finally:
            with contextlib.suppress(OSError):
                child.kill()
            child.wait()
    if child.returncode != 0 or len(key) != _ROOT_BYTES:
        raise _derivation_failed(f"its process ended with status {child.returncode}")
    return key


def _from_key_file(secret: bytes) -> bytes:
    return HKDF(SHA256(), _ROOT_BYTES, salt=None, info=b"holdfast-key-file-1").derive(secret)


def _read_key_file(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _key_file(path, error.strerror or "unknown") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _key_file(path, "it is not a plain file")
        if status.st_uid != os.geteuid():
            raise _key_file(path, f"it belongs to uid {status.st_uid}, and this is uid {os.geteuid()}")
        mode = stat.S_IMODE(status.st_mode)
        if mode not in (0o600, 0o400):
            raise _key_file(path, f"its mode is {mode:04o}, and it must be closed to others: 0600", f"chmod 600 {path}")
        secret = file.read(_ROOT_BYTES + 1)
    if len(secret) != _ROOT_BYTES:
        raise _key_file(path, f"it must hold {_ROOT_BYTES} bytes")
    return secret


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unusable(cause: str) -> SealUnusable:
    return SealUnusable(
        "the sealed root key cannot be used", cause=cause, remedy="Put back root.sealed from a backup of this appliance"
    )


def _key_file(
    path: Path, cause: str, remedy: str = "Put back the key file that the root key was sealed with"
) -> SealUnusable:
    return SealUnusable(f"the key file {path} cannot be used", cause=cause, remedy=remedy)


def _derivation_failed(cause: str) -> SealUnusable:
    return SealUnusable(
        "the passphrase cannot be stretched",
        cause=cause,
        remedy="Free memory (Argon2id takes 256 MiB for a moment) and try again",
    )
