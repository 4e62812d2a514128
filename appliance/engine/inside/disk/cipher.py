"""AES-256-GCM over a chunk of KV, from one buffer into another. The one module in the engine that encrypts.

Rules:

- A nonce is 96 random bits, and a key encrypts the chunks of one session: at a chunk of 1 MiB, 2^32 of them, the most
  that random nonces allow a key (NIST SP 800-38D, 8.3), are 4 PiB. Nothing needs to be counted over restarts.
- The interpreter's lock is let go of while a chunk is encrypted: the engine's own thread goes on. (`AESGCM` holds it,
  which is why it is not used: docs/decisions/0016.)
- Decrypting verifies, and raises. What it wrote until then is not to be used.
"""

from typing import Final, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16


class Tampered(Exception):
    """What was read is not what was encrypted under this key, for this place."""


class ChunkCipher(Protocol):
    """What turns a chunk into what lies on the disk, and back."""

    def seal(self, nonce: bytes, bound: bytes, chunk: memoryview, sealed: memoryview) -> bytes:
        """Encrypt `chunk` into `sealed`, of the same size; the tag, which binds `bound` too."""

    def open(self, nonce: bytes, bound: bytes, tag: bytes, sealed: memoryview, chunk: memoryview) -> None:
        """Decrypt `sealed` into `chunk`, of the same size.

        Raises:
            Tampered: it does not open; `chunk` holds nothing that may be used.
        """


class AesGcm:
    """A session's cipher.

    Raises:
        ValueError: the key is not of `KEY_BYTES`.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a tier's key has {KEY_BYTES} bytes")
        self._key = algorithms.AES(key)

    def seal(self, nonce: bytes, bound: bytes, chunk: memoryview, sealed: memoryview) -> bytes:
        """See `ChunkCipher`."""
        encryptor = Cipher(self._key, modes.GCM(nonce)).encryptor()
        encryptor.authenticate_additional_data(bound)
        encryptor.update_into(chunk, sealed)
        encryptor.finalize()
        return encryptor.tag

    def open(self, nonce: bytes, bound: bytes, tag: bytes, sealed: memoryview, chunk: memoryview) -> None:
        """See `ChunkCipher`."""
        decryptor = Cipher(self._key, modes.GCM(nonce, tag)).decryptor()
        decryptor.authenticate_additional_data(bound)
        decryptor.update_into(sealed, chunk)
        try:
            decryptor.finalize()
        except InvalidTag:
            raise Tampered from None
