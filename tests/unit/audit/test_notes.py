"""Signed notes against other implementations' vectors, and against forgers."""

import base64
import copy
import pickle
import subprocess
import sys

import pytest

from appliance.audit.notes import (
    MAX_NOTE_BYTES,
    Algorithm,
    Checkpoint,
    KeyInvalid,
    NoteInvalid,
    SigningKey,
    VerifierKey,
    cosign,
    cosignatures,
    decode_note,
    open_checkpoint,
    open_note,
    sign_checkpoint,
    verify_cosignature,
)
from appliance.audit.tree import EMPTY_ROOT

_ORIGIN = "holdfast.example/vault-3"
_LOG = SigningKey(_ORIGIN, b"l" * 32)
_OTHER_LOG = SigningKey(_ORIGIN, b"m" * 32)
_WITNESS = SigningKey("witness.example/w1", b"w" * 32, Algorithm.COSIGNATURE)
_ROOT = bytes(range(32))
_NOTE = sign_checkpoint(Checkpoint(_ORIGIN, 20852163, _ROOT), _LOG)
_NOW = 1_679_315_147

# golang.org/x/mod, sumdb/note: its documentation's key and note.
_PETER = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
_PETER_SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
_PETERS_TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
_PETERS_NOTE = (
    f"{_PETERS_TEXT}\n\u2014 PeterNeumann "
    "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
)


def test_another_implementation_s_note_is_opened() -> None:
    key = VerifierKey.parse(_PETER)
    assert open_note(_PETERS_NOTE, key) == _PETERS_TEXT
    assert SigningKey("PeterNeumann", _PETER_SEED).verifier() == key
    with pytest.raises(NoteInvalid, match="altered, or forged"):
        open_note(_PETERS_NOTE.replace("think", "thank"), key)


@pytest.mark.parametrize(
    ("vkey", "algorithm"),
    [
        (_PETER, Algorithm.ED25519),
        ("TEST+7997405c+AQcC+FTVKf0jlTdHDY3rbevmnKxxPjigCXlVtGe6RIr6", Algorithm.ED25519),  # a plus in its base64
        ("remora.n621.de+da77ade7+BOvN63jn/bLvkieywe8R6UYAtVtNbZpXh34x7onlmtw2", Algorithm.COSIGNATURE),
    ],
)
def test_other_implementations_keys_are_read_and_written(vkey: str, algorithm: Algorithm) -> None:
    assert VerifierKey.parse(vkey).algorithm is algorithm
    assert str(VerifierKey.parse(vkey)) == vkey


def test_no_part_of_a_key_and_no_changed_key_is_a_key() -> None:
    for start in range(len(_PETER)):
        for end in range(start + 1, len(_PETER) + 1):
            if (start, end) != (0, len(_PETER)):
                with pytest.raises(KeyInvalid):
                    VerifierKey.parse(_PETER[start:end])
    for at, character in enumerate(_PETER):
        with pytest.raises(KeyInvalid):
            VerifierKey.parse(_PETER[:at] + chr(ord(character) + 1) + _PETER[at + 1 :])


@pytest.mark.parametrize(
    "vkey",
    [
        "",
        _PETER + "\n",
        _PETER.replace("c74f20a3", "C74F20A3"),
        _PETER + "A" * 100_000,
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",  # an unknown type, with its right id
        "test+5893dc2c+BtMcFiao6ZOdU6LZ40tLKbsWpDOU8smRapXBIYI3lXyE",  # ML-DSA, cut
        "Peter Neumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
        "+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",
    ],
)
def test_what_is_no_key_is_refused(vkey: str) -> None:
    with pytest.raises(KeyInvalid):
        VerifierKey.parse(vkey)


def test_a_signed_checkpoint_is_opened() -> None:
    checkpoint = Checkpoint(_ORIGIN, 42, _ROOT, ("an extension", "\u2014 and one that looks like a signature"))
    assert open_checkpoint(sign_checkpoint(checkpoint, _LOG), _LOG.verifier()) == checkpoint


def test_a_checkpoint_is_written_as_tlog_checkpoint_says() -> None:
    assert Checkpoint(_ORIGIN, 20852163, _ROOT).body() == (
        f"holdfast.example/vault-3\n20852163\n{base64.b64encode(_ROOT).decode()}\n"
    )
    assert Checkpoint(_ORIGIN, 0, EMPTY_ROOT).body().split("\n")[1] == "0"


def test_every_changed_byte_of_a_note_is_found() -> None:
    data = _NOTE.encode()
    for at in range(len(data)):
        for change in (1, 0x20, 0x80):
            changed = bytearray(data)
            changed[at] ^= change
            with pytest.raises(NoteInvalid):
                open_checkpoint(decode_note(bytes(changed)), _LOG.verifier())


def test_every_cut_note_is_refused() -> None:
    for end in range(len(_NOTE)):
        with pytest.raises(NoteInvalid):
            open_checkpoint(_NOTE[:end], _LOG.verifier())


def test_a_checkpoint_of_another_key_of_the_same_name_is_refused() -> None:
    forged = sign_checkpoint(Checkpoint(_ORIGIN, 20852163, _ROOT), _OTHER_LOG)
    with pytest.raises(NoteInvalid, match="did not sign it"):
        open_checkpoint(forged, _LOG.verifier())


def test_a_signature_of_another_key_under_this_key_s_id_is_refused() -> None:
    checkpoint = Checkpoint(_ORIGIN, 1, _ROOT)
    signature = _LOG.verifier().key_id + _OTHER_LOG.sign(checkpoint.body().encode())
    note = f"{checkpoint.body()}\n\u2014 {_ORIGIN} {base64.b64encode(signature).decode()}\n"
    with pytest.raises(NoteInvalid, match="altered, or forged"):
        open_checkpoint(note, _LOG.verifier())


def test_a_wrong_signature_is_not_made_good_by_a_right_one() -> None:
    wrong = _LOG.verifier().key_id + bytes(64)
    note = f"{_NOTE}\u2014 {_ORIGIN} {base64.b64encode(wrong).decode()}\n"
    with pytest.raises(NoteInvalid, match="altered, or forged"):
        open_checkpoint(note, _LOG.verifier())


def test_another_log_s_origin_is_refused() -> None:
    stolen = Checkpoint("holdfast.example/vault-4", 5, _ROOT)
    with pytest.raises(KeyInvalid, match="the origin is"):
        sign_checkpoint(stolen, _LOG)
    signature = _LOG.verifier().key_id + _LOG.sign(stolen.body().encode())
    note = f"{stolen.body()}\n\u2014 {_ORIGIN} {base64.b64encode(signature).decode()}\n"
    with pytest.raises(NoteInvalid, match="4, and the key is that of"):
        open_checkpoint(note, _LOG.verifier())


def test_other_signatures_are_passed_over() -> None:
    note = _NOTE + sign_checkpoint(Checkpoint(_ORIGIN, 20852163, _ROOT), _OTHER_LOG).rpartition("\n\n")[2]
    note += cosign(_NOTE, _WITNESS, _NOW)
    note += "\u2014 unknown.example/post-quantum " + base64.b64encode(bytes(2432)).decode() + "\n"
    assert open_checkpoint(note, _LOG.verifier()).size == 20852163
    assert open_checkpoint(note, _OTHER_LOG.verifier()).size == 20852163
    assert verify_cosignature(note, _WITNESS.verifier()) == _NOW


def test_sixteen_post_quantum_signatures_fit() -> None:
    others = "".join(f"\u2014 w{at} {base64.b64encode(bytes(5000)).decode()}\n" for at in range(16))
    assert open_checkpoint(_NOTE + others, _LOG.verifier()).size == 20852163


@pytest.mark.parametrize(
    "body",
    [
        "",
        "\n",
        "log\n1\n",
        f"log\n01\n{'A' * 43}=\n",
        f"log\n+1\n{'A' * 43}=\n",
        f"log\n-1\n{'A' * 43}=\n",
        f"log\n 1\n{'A' * 43}=\n",
        f"log\n1_0\n{'A' * 43}=\n",
        f"log\n\u0661\n{'A' * 43}=\n",
        f"log\n\n{'A' * 43}=\n",
        f"log\n{1 << 63}\n{'A' * 43}=\n",
        f"log\n{'9' * 10_000}\n{'A' * 43}=\n",
        f"log\n0\n{'A' * 43}=\n",  # not the root of an empty tree
        f"log\n1\n{'A' * 43}\n",
        f"log\n1\n{'A' * 42}B=\n",  # stray bits
        f"log\n1\n{'A' * 44}\n",
        f"log\n1\n{'A' * 22}\u00e9{'A' * 20}=\n",
        f"log\n1\n{'-' * 43}=\n",
        f"\n1\n{'A' * 43}=\n",
        f"lo g\n1\n{'A' * 43}=\n",
        f"lo\u00a0g\n1\n{'A' * 43}=\n",
        f"lo+g\n1\n{'A' * 43}=\n",
        f"lo\u202eg\n1\n{'A' * 43}=\n",
        f"lo\u009bg\n1\n{'A' * 43}=\n",
        f"lo\udc80g\n1\n{'A' * 43}=\n",
        f"{'l' * 256}\n1\n{'A' * 43}=\n",
        f"log\n1\n{'A' * 43}=\n\n",
        f"log\n1\n{'A' * 43}=\n\x1b[2J\n",
        f"log\n1\n{'A' * 43}=\r\n",
        f"log\n1\n{'A' * 43}=",
    ],
)
def test_a_checkpoint_has_one_form(body: str) -> None:
    with pytest.raises(NoteInvalid):
        Checkpoint.parse(body)


def test_what_cannot_be_written_is_no_checkpoint() -> None:
    for size, root in ((-1, _ROOT), (1 << 63, _ROOT), (1, b"short"), (0, _ROOT)):
        with pytest.raises(NoteInvalid):
            Checkpoint(_ORIGIN, size, root)
    for extension in ("", "two\nlines", "\x1b[2J"):
        with pytest.raises(NoteInvalid):
            Checkpoint(_ORIGIN, 1, _ROOT, (extension,))
    with pytest.raises(NoteInvalid):
        Checkpoint(_ORIGIN, 1, _ROOT, ("x" * MAX_NOTE_BYTES,))


@pytest.mark.parametrize(
    "line",
    [
        "",
        "\n",
        "- log AAAAAAAA\n",
        "\u2014 log AAAAAAAA",
        "\u2014 log AAAAAA==\n",  # a key id and nothing after it
        "\u2014 log AAAAAAB=\n",  # stray bits
        "\u2014 log AAAA AAAA\n",
        "\u2014  AAAAAAAA\n",
        "\u2014 lo+g AAAAAAAA\n",
        "\u2014 lo\u00a0g AAAAAAAA\n",
        "\u2014 lo\x1bg AAAAAAAA\n",
        "\u2014 log\n",
        "\u2014 log AAAAAAAA\r\n",
        "\u2014 log AAAAAAAA\n" * 64,  # with the log's own, one too many
        "\u2014 log " + "A" * MAX_NOTE_BYTES + "\n",
    ],
)
def test_a_malformed_signature_line_spoils_the_note(line: str) -> None:
    note = _NOTE + line if line else _NOTE.rpartition("\n\n")[0] + "\n\n"
    with pytest.raises(NoteInvalid):
        open_checkpoint(note, _LOG.verifier())


def test_a_cosignature_says_when() -> None:
    line = cosign(_NOTE, _WITNESS, _NOW)
    assert line.startswith("\u2014 witness.example/w1 ")
    assert line.endswith("\n")
    assert verify_cosignature(_NOTE + line, _WITNESS.verifier()) == _NOW


def test_a_cosignature_signs_the_message_that_tlog_cosignature_gives() -> None:
    encoded = cosign(_NOTE, _WITNESS, _NOW).split(" ")[2]
    data = base64.b64decode(encoded)
    assert data[:4] == _WITNESS.verifier().key_id
    assert data[4:12] == _NOW.to_bytes(8, "big")
    body = Checkpoint(_ORIGIN, 20852163, _ROOT).body()
    assert data[12:] == _WITNESS.sign(f"cosignature/v1\ntime {_NOW}\n{body}".encode())


def test_every_changed_byte_of_a_cosignature_is_found() -> None:
    line = cosign(_NOTE, _WITNESS, _NOW)
    mark, name, encoded = line.rstrip("\n").split(" ")
    data = base64.b64decode(encoded)
    for at in range(len(data)):  # the time's bytes among them
        changed = bytearray(data)
        changed[at] ^= 1
        with pytest.raises(NoteInvalid):
            verify_cosignature(
                f"{_NOTE}{mark} {name} {base64.b64encode(bytes(changed)).decode()}\n", _WITNESS.verifier()
            )


def test_a_cosignature_is_for_one_checkpoint() -> None:
    line = cosign(_NOTE, _WITNESS, _NOW)
    other = sign_checkpoint(Checkpoint(_ORIGIN, 20852164, _ROOT), _LOG)
    with pytest.raises(NoteInvalid, match="altered, or forged"):
        verify_cosignature(other + line, _WITNESS.verifier())


def test_another_witness_s_cosignature_does_not_count() -> None:
    for other in (
        SigningKey("witness.example/w1", b"v" * 32, Algorithm.COSIGNATURE),
        SigningKey("witness.example/w2", b"w" * 32, Algorithm.COSIGNATURE),
    ):
        with pytest.raises(NoteInvalid, match="did not co-sign"):
            verify_cosignature(_NOTE + cosign(_NOTE, other, _NOW), _WITNESS.verifier())
    with pytest.raises(NoteInvalid, match="did not co-sign"):
        verify_cosignature(_NOTE, _WITNESS.verifier())


def test_the_latest_of_two_cosignatures_counts() -> None:
    note = _NOTE + cosign(_NOTE, _WITNESS, _NOW + 60) + cosign(_NOTE, _WITNESS, _NOW)
    assert verify_cosignature(note, _WITNESS.verifier()) == _NOW + 60
    assert [found.time_s for found in cosignatures(note, _WITNESS.verifier())] == [_NOW + 60, _NOW]


@pytest.mark.parametrize("time_s", [-1, 0, 1 << 63])
def test_a_time_that_cannot_be_is_not_signed(time_s: int) -> None:
    with pytest.raises(NoteInvalid, match="no time"):
        cosign(_NOTE, _WITNESS, time_s)


@pytest.mark.parametrize("stamp", [bytes(8), b"\x80" + bytes(7)])
def test_a_time_that_cannot_be_is_not_believed(stamp: bytes) -> None:
    time_s = int.from_bytes(stamp, "big")
    body = Checkpoint(_ORIGIN, 20852163, _ROOT).body()
    signature = _WITNESS.sign(f"cosignature/v1\ntime {time_s}\n{body}".encode())
    line = base64.b64encode(_WITNESS.verifier().key_id + stamp + signature).decode()
    with pytest.raises(NoteInvalid, match="no time"):
        verify_cosignature(f"{_NOTE}\u2014 {_WITNESS.name} {line}\n", _WITNESS.verifier())


def test_a_witness_signs_no_checkpoint_and_a_log_cosigns_none() -> None:
    as_log = SigningKey(_ORIGIN, b"w" * 32, Algorithm.COSIGNATURE)
    with pytest.raises(KeyInvalid, match="a witness's"):
        sign_checkpoint(Checkpoint(_ORIGIN, 1, _ROOT), as_log)
    with pytest.raises(KeyInvalid, match="a witness's"):
        open_checkpoint(_NOTE, as_log.verifier())
    with pytest.raises(KeyInvalid, match="a log's"):
        cosign(_NOTE, _LOG, _NOW)
    with pytest.raises(KeyInvalid, match="a log's"):
        verify_cosignature(_NOTE, _LOG.verifier())


def test_only_a_checkpoint_is_cosigned() -> None:
    with pytest.raises(NoteInvalid):
        cosign(_PETERS_NOTE, _WITNESS, _NOW)


def test_a_key_comes_back_from_its_bytes() -> None:
    for key in (_LOG, _WITNESS):
        again = SigningKey.from_bytes(key.to_bytes())
        assert (again.to_bytes(), again.verifier()) == (key.to_bytes(), key.verifier())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        _LOG.to_bytes()[:34],
        b"\x02" + _LOG.to_bytes()[1:],
        b"\x01\x02" + _LOG.to_bytes()[2:],
        _LOG.to_bytes() + b"\xff",
        _LOG.to_bytes() + b" ",
    ],
)
def test_a_damaged_key_is_refused(data: bytes) -> None:
    with pytest.raises(KeyInvalid):
        SigningKey.from_bytes(data)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\nb", "a\x1b", "a\u202eb", "n" * 256, "\u00e9" * 128])
def test_a_key_has_a_name_that_a_note_can_hold(name: str) -> None:
    with pytest.raises(KeyInvalid, match="its name"):
        SigningKey(name, b"l" * 32)


def test_a_new_key_is_made_of_the_randomness_that_it_is_given() -> None:
    assert (
        SigningKey.generate("log", random=lambda size: b"r" * size).to_bytes()
        == SigningKey("log", b"r" * 32).to_bytes()
    )
    assert SigningKey.generate("log").to_bytes() != SigningKey.generate("log").to_bytes()


def test_a_signing_key_has_no_text_form() -> None:
    assert repr(_LOG) == f"SigningKey({_ORIGIN}, ED25519)"
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            leak(_LOG)


def test_reading_notes_without_verifying_loads_no_cryptography() -> None:
    program = "import sys, appliance.audit.notes, appliance.audit.tree; assert 'cryptography' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
