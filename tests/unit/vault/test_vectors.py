"""Published vectors, through our own code where it wraps the primitive."""

import hashlib
import hmac
from collections.abc import Iterator
from dataclasses import dataclass

import cryptography_vectors
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap

from appliance.vault import Binding, KeyPurpose, RootKey, TamperedValue, Vault
from appliance.vault.seals import _stretch, _Stretching
from tests.unit.vault.keystore import MemoryKeys


def _vectors(path: str) -> Iterator[dict[str, str]]:
    """The vectors of a file in NIST's form: lines `name = value`, a blank line after each vector."""
    vector: dict[str, str] = {}
    with cryptography_vectors.open_vector_file(path, "r") as file:
        for line in (*file, ""):
            text = line.strip()
            if text.startswith(("#", "[")):
                continue
            if not text and vector:
                yield vector
                vector = {}
            name, _, value = text.partition("=")
            if name:
                vector[name.strip().lower()] = value.strip()


def test_keys_are_wrapped_as_nist_wraps_them() -> None:
    vectors = list(_vectors("keywrap/kwtestvectors/KWP_AE_256.txt"))
    assert len(vectors) == 500
    for vector in vectors:
        root = RootKey(bytes.fromhex(vector["k"]))
        assert root.wrap(bytes.fromhex(vector["p"])).hex() == vector["c"]


def test_keys_are_unwrapped_as_nist_unwraps_them_and_refused_where_it_refuses() -> None:
    refused = 0
    for vector in _vectors("keywrap/kwtestvectors/KWP_AD_256.txt"):
        root = RootKey(bytes.fromhex(vector["k"]))
        if "fail" in vector:
            refused += 1
            with pytest.raises(InvalidUnwrap):
                root.unwrap(bytes.fromhex(vector["c"]))
        else:
            assert root.unwrap(bytes.fromhex(vector["c"])).hex() == vector["p"]
    assert refused == 100


def test_passphrases_are_stretched_as_rfc_9106_stretches_them() -> None:
    done = 0
    for vector in _vectors("KDF/argon2id.txt"):
        if "secret" in vector or "ad" in vector or vector["length"] != "32" or not vector["salt"]:
            continue
        stretching = _Stretching(
            int(vector["memcost"]), int(vector["iter"]), int(vector["lanes"]), bytes.fromhex(vector["salt"])
        )
        assert _stretch(bytes.fromhex(vector["pass"]), stretching).hex() == vector["output"]
        done += 1
    assert done >= 2


@dataclass(frozen=True)
class _VectorBinding(Binding):
    """A place whose associated data is a vector's."""

    aad: bytes = b""

    def associated_data(self) -> bytes:
        return self.aad


class _Drawn:
    """Gives one key and one nonce again and again, and key ids that count."""

    def __init__(self, key: bytes, nonce: bytes) -> None:
        self._fixed = {32: key, 12: nonce}
        self._ids = 0

    def __call__(self, size: int) -> bytes:
        if size in self._fixed:
            return self._fixed[size]
        self._ids += 1
        return bytes([self._ids]) * size


def test_envelopes_are_encrypted_as_nist_encrypts_them_and_refused_where_it_refuses() -> None:
    """Each vector's key is drawn as a key of the system's, its IV as the nonce."""
    checked = 0
    for vector in _vectors("ciphers/AES/GCM/gcmEncryptExtIV256.rsp"):
        if len(vector.get("iv", "")) != 24 or len(vector["tag"]) != 32:
            continue
        key, nonce = bytes.fromhex(vector["key"]), bytes.fromhex(vector["iv"])
        vault = Vault(MemoryKeys(), random_bytes=_Drawn(key, nonce))
        vault.open(RootKey(b"r" * 32))
        vault.new_system_keys()
        place = _VectorBinding("t", "c", "r", "system", 1, aad=bytes.fromhex(vector["aad"]))
        envelope = vault.encrypt("system", KeyPurpose.RECORDS, bytes.fromhex(vector["pt"]), place)
        assert envelope == b"\x01" + bytes([2]) * 16 + nonce + bytes.fromhex(vector["ct"] + vector["tag"])
        assert vault.decrypt(envelope, place).hex() == vector["pt"]
        with pytest.raises(TamperedValue):
            vault.decrypt(envelope[:-1] + bytes([envelope[-1] ^ 1]), place)
        checked += 1
    assert checked == 375


def test_a_keyed_hash_is_hmac_under_the_first_block_of_hkdf() -> None:
    """Computed beside the vault from RFC 5869, 2.3 (T(1) = HMAC(PRK, info | 0x01)) with the standard library."""
    vault = Vault(
        MemoryKeys(), random_bytes=lambda size: b"k" * size if size == 32 else hashlib.sha256().digest()[:size]
    )
    vault.open(RootKey(b"r" * 32))
    vault.new_system_keys()
    subkey = hmac.digest(b"k" * 32, b"holdfast-mac-1" + b"label" + b"\x01", "sha256")
    message = b"\x00\x00\x00\x02ab" + b"\x00\x00\x00\x00"
    expected = hmac.digest(subkey, message, "sha256")
    assert vault.mac("system", KeyPurpose.LOOKUP, "label", b"ab", b"") == expected
    second = vault.mac("system", KeyPurpose.LOOKUP, "label", expected, b"c")
    assert vault.mac_chain("system", KeyPurpose.LOOKUP, "label", b"ab", [b"", b"c"]) == [expected, second]


def test_subkeys_are_derived_as_rfc_5869_derives_them() -> None:
    vector: dict[str, str] = {}
    checked = 0
    for block in _vectors("KDF/rfc-5869-HKDF-SHA256.txt"):
        vector |= block
        if "okm" not in block:
            continue
        checked += 1
        derive = HKDF(SHA256(), int(vector["l"]), bytes.fromhex(vector["salt"]), bytes.fromhex(vector["info"]))
        assert derive.derive(bytes.fromhex(vector["ikm"])).hex() == vector["okm"]
    assert checked == 3
