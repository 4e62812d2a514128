"""Published vectors, through our own code where it wraps the primitive."""

from collections.abc import Iterator

import cryptography_vectors
import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap

from appliance.vault import RootKey
from appliance.vault.seals import _stretch, _text


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
        kdf = {
            "name": "argon2id",
            "memory_kib": int(vector["memcost"]),
            "iterations": int(vector["iter"]),
            "lanes": int(vector["lanes"]),
            "salt": _text(bytes.fromhex(vector["salt"])),
        }
        assert _stretch(bytes.fromhex(vector["pass"]), kdf).hex() == vector["output"]
        done += 1
    assert done >= 2


def test_the_aead_is_the_one_that_nist_describes() -> None:
    checked = 0
    for vector in _vectors("ciphers/AES/GCM/gcmEncryptExtIV256.rsp"):
        if len(vector.get("iv", "")) != 24 or len(vector["tag"]) != 32:
            continue
        aead = AESGCM(bytes.fromhex(vector["key"]))
        sealed = bytes.fromhex(vector["ct"] + vector["tag"])
        nonce, data = bytes.fromhex(vector["iv"]), bytes.fromhex(vector["aad"])
        assert aead.encrypt(nonce, bytes.fromhex(vector["pt"]), data) == sealed
        with pytest.raises(InvalidTag):
            aead.decrypt(nonce, sealed[:-1] + bytes([sealed[-1] ^ 1]), data)
        checked += 1
    assert checked > 100


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
