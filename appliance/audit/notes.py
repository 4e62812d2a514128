"""Signed notes: the log's checkpoints, and the co-signatures of its witnesses.

Rules:

- A note is believed only after `open_checkpoint`, `open_note` or `verify_cosignature`; each raises or returns.
- One form for each value: a number with a leading zero, base64 with stray bits, a key id in capitals are refused.
- Names and origins have no space, no plus, nothing that moves a cursor; a log's key has the name of its origin.
- A log's key signs checkpoints and a witness's key co-signs them, never the other way round: the algorithm says which.
- A signing key has no text form: not in a repr, not in a pickle, not in an error.

Formats: C2SP signed-note, tlog-checkpoint, tlog-cosignature (Ed25519, `cosignature/v1`).
"""

import base64
import enum
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Final, NamedTuple, NoReturn

from appliance.audit.tree import EMPTY_ROOT, HASH_BYTES, MAX_SIZE
from appliance.errors import Fault, HoldfastError

MAX_NOTE_BYTES: Final = 256 * 1024  # 16 signatures must fit, and post-quantum ones have nearly 5 kB each (signed-note)
MAX_SIGNATURES: Final = 64
MAX_NAME_BYTES: Final = 255  # what tlog-cosignature's cosigned_message can hold
MAX_TIME_S: Final = (1 << 63) - 1

_KEY_FORMAT: Final = 1
_SEED_BYTES: Final = 32
_PUBLIC_BYTES: Final = 32
_SIGNATURE_BYTES: Final = 64
_KEY_ID_BYTES: Final = 4
_TIME_BYTES: Final = 8
_SIGNATURE_MARK: Final = "\u2014 "
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,18}")
_CONTROL: Final = re.compile(r"[\x00-\x09\x0b-\x1f]")


class NoteInvalid(HoldfastError, ValueError):
    """A note, a checkpoint or a signature on one is not what it has to be."""

    code: ClassVar[str] = "audit_note_invalid"
    fault: ClassVar[Fault] = Fault.CONFLICT


class KeyInvalid(HoldfastError, ValueError):
    """A key of a log or of a witness cannot be used, or not for this."""

    code: ClassVar[str] = "audit_key_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


class Algorithm(enum.IntEnum):
    """What a key signs, by its signature type byte in signed-note."""

    ED25519 = 0x01  # a note's text: checkpoints of a log
    COSIGNATURE = 0x04  # a time and a checkpoint's text: what a witness saw


class Signer(NamedTuple):
    """Whose a signature line says that it is."""

    name: str
    key_id: bytes

    def __str__(self) -> str:
        return f"{self.name} (key {self.key_id.hex()})"


class Cosignature(NamedTuple):
    """A witness's signature on a checkpoint."""

    line: str  # as it stands in a note, with its newline
    time_s: int  # since the epoch, by the witness's clock


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key. Its text form is the vkey of signed-note: `name+hexid+base64(type ‖ key)`."""

    name: str
    algorithm: Algorithm
    public_key: bytes

    def __post_init__(self) -> None:
        if (fault := _name_fault(self.name)) is not None:
            raise _bad_key(f"its name {fault}")
        if len(self.public_key) != _PUBLIC_BYTES:
            raise _bad_key(f"a public key has {_PUBLIC_BYTES} bytes")

    @classmethod
    def parse(cls, vkey: str) -> "VerifierKey":
        """Read `name+hexid+base64`, without a newline.

        Raises:
            KeyInvalid: it is not one, or of a type that this version does not know.
        """
        parts = vkey[: 2 * MAX_NAME_BYTES].split("+", 2)
        if len(parts) != 3:
            raise _bad_key("it does not have three parts with plus signs between them")
        material = _strict_base64(parts[2])
        if material is None or len(material) != 1 + _PUBLIC_BYTES:
            raise _bad_key(f"its third part is not base64 of {1 + _PUBLIC_BYTES} bytes")
        if material[0] not in tuple(Algorithm):
            raise _bad_key(f"its type is 0x{material[0]:02x}, and this version knows 0x01 and 0x04 (co-signature)")
        key = cls(parts[0], Algorithm(material[0]), material[1:])
        if str(key) != vkey:
            raise _bad_key(f"its id must be {key.key_id.hex()}")
        return key

    @property
    def key_id(self) -> bytes:
        """The 4 bytes that point to it from a signature."""
        material = b"%b\n%c%b" % (self.name.encode(), self.algorithm, self.public_key)
        return hashlib.sha256(material).digest()[:_KEY_ID_BYTES]

    @property
    def signer(self) -> Signer:
        """What its signature lines say of whose they are."""
        return Signer(self.name, self.key_id)

    def __str__(self) -> str:
        return f"{self.name}+{self.key_id.hex()}+{_base64(bytes([self.algorithm]) + self.public_key)}"


class SigningKey:
    """An Ed25519 key with its name. Signs; never shows itself."""

    __slots__ = ("_seed", "algorithm", "name")

    def __init__(self, name: str, seed: bytes, algorithm: Algorithm = Algorithm.ED25519) -> None:
        if (fault := _name_fault(name)) is not None:
            raise _bad_key(f"its name {fault}")
        if len(seed) != _SEED_BYTES:
            raise _bad_key(f"a signing key has {_SEED_BYTES} bytes")
        self.name = name
        self.algorithm = algorithm
        self._seed = bytes(seed)

    @classmethod
    def generate(
        cls, name: str, algorithm: Algorithm = Algorithm.ED25519, *, random: Callable[[int], bytes] = os.urandom
    ) -> "SigningKey":
        """A new key; `random` gives as many random bytes as it is asked for."""
        return cls(name, random(_SEED_BYTES), algorithm)

    @classmethod
    def from_bytes(cls, opened: bytes) -> "SigningKey":
        """A key again from `to_bytes`.

        Raises:
            KeyInvalid: it is not one.
        """
        if len(opened) <= 2 + _SEED_BYTES or opened[0] != _KEY_FORMAT or opened[1] not in tuple(Algorithm):
            raise _bad_key("it is damaged, or of a format that this version does not read")
        try:
            name = opened[2 + _SEED_BYTES :].decode()
        except UnicodeDecodeError:
            raise _bad_key("its name is damaged") from None
        return cls(name, opened[2 : 2 + _SEED_BYTES], Algorithm(opened[1]))

    def to_bytes(self) -> bytes:
        """The secret, to be sealed: format (1), algorithm (1), seed (32), name."""
        return bytes([_KEY_FORMAT, self.algorithm]) + self._seed + self.name.encode()

    def verifier(self) -> VerifierKey:
        """Its public key."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        public = Ed25519PrivateKey.from_private_bytes(self._seed).public_key().public_bytes_raw()
        return VerifierKey(self.name, self.algorithm, public)

    def sign(self, message: bytes) -> bytes:
        """Ed25519 (RFC 8032) of a message that its caller has made unmistakable: 64 bytes."""
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        return Ed25519PrivateKey.from_private_bytes(self._seed).sign(message)

    def __repr__(self) -> str:
        return f"SigningKey({self.name}, {self.algorithm.name})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signing key is not pickled")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log says about itself: this many leaves, under this root.

    Raises:
        NoteInvalid: it cannot be written down (see the rules).
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (fault := _name_fault(self.origin)) is not None:
            raise _invalid(f"its origin {fault}")
        if not 0 <= self.size <= MAX_SIZE:
            raise _invalid("its size is not between 0 and 2^63-1")
        if len(self.root) != HASH_BYTES:
            raise _invalid(f"its root does not have {HASH_BYTES} bytes")
        if self.size == 0 and self.root != EMPTY_ROOT:
            raise _invalid("its root is not that of a tree without leaves")
        for line in self.extensions:
            if not line or "\n" in line or _CONTROL.search(line):
                raise _invalid("an extension line is empty, or holds a control character")
        if len(self.body()) > MAX_NOTE_BYTES:
            raise _invalid(f"its text is longer than {MAX_NOTE_BYTES} bytes")

    @classmethod
    def parse(cls, body: str) -> "Checkpoint":
        """Read the text of a checkpoint. Nothing is said about who signed it.

        Raises:
            NoteInvalid: it is not one.
        """
        if not body.endswith("\n"):
            raise _invalid("its text does not end in a newline")
        lines = body[:-1].split("\n")
        if len(lines) < 3:
            raise _invalid("its text has fewer than three lines")
        root = _strict_base64(lines[2])
        if root is None:
            raise _invalid("its root is not base64")
        return cls(lines[0], parse_number(lines[1], "its size"), root, tuple(lines[3:]))

    def body(self) -> str:
        """The text that is signed."""
        return "".join(f"{line}\n" for line in (self.origin, str(self.size), _base64(self.root), *self.extensions))


def sign_checkpoint(checkpoint: Checkpoint, key: SigningKey) -> str:
    """The note of a checkpoint, signed by its log.

    Raises:
        KeyInvalid: the key is a witness's, or has another name than the origin.
    """
    _must_sign(key.algorithm, Algorithm.ED25519)
    if key.name != checkpoint.origin:
        raise _bad_key(f"its name is {key.name}, and the origin is {checkpoint.origin}")
    body = checkpoint.body()
    return f"{body}\n{_signature_line(key, key.sign(body.encode()))}"


def open_checkpoint(note: str, key: VerifierKey) -> Checkpoint:
    """The checkpoint that a log signed.

    Raises:
        NoteInvalid: it is no checkpoint, another log's, or not signed by this key.
        KeyInvalid: the key is a witness's.
    """
    checkpoint = Checkpoint.parse(open_note(note, key))
    if checkpoint.origin != key.name:
        raise _invalid(f"its origin is {checkpoint.origin}, and the key is that of {key.name}")
    return checkpoint


def sign_note(text: str, key: SigningKey) -> str:
    """The note of a text that is no checkpoint, signed.

    Raises:
        NoteInvalid: the text is a checkpoint, or cannot be a note's.
        KeyInvalid: the key is a witness's.
    """
    _must_sign(key.algorithm, Algorithm.ED25519)
    try:
        Checkpoint.parse(text)
    except NoteInvalid:
        note = f"{text}\n{_signature_line(key, key.sign(text.encode()))}"
        if _parse_note(note).text != text:
            raise _invalid("its text does not end in a newline") from None
        return note
    raise _invalid("its text is a checkpoint, which its log alone signs")


def open_note(note: str, key: VerifierKey) -> str:
    """The text of a note that this Ed25519 key signed. What others signed is passed over, as signed-note says.

    Raises:
        NoteInvalid: it is no note, the key did not sign it, or a signature in the key's name is wrong.
        KeyInvalid: the key is a witness's.
    """
    _must_sign(key.algorithm, Algorithm.ED25519)
    parsed = _parse_note(note)
    signatures = list(parsed.by(key))
    if not signatures:
        raise _invalid(f"{key.name} did not sign it with the key {key.key_id.hex()}")
    for signature in signatures:
        _verify(key, signature.data, parsed.text.encode())
    return parsed.text


def cosign(note: str, witness_key: SigningKey, time_s: int) -> str:
    """A witness's signature line, with its newline, for the checkpoint in a note: `note + line` is co-signed.

    It states that the witness saw this tree, and no larger one, at `time_s`. That is for the caller to have checked:
    `witness.Witness` does.

    Raises:
        NoteInvalid: there is no checkpoint in the note, or the time cannot be written.
        KeyInvalid: the key is a log's.
    """
    _must_sign(witness_key.algorithm, Algorithm.COSIGNATURE)
    text = _parse_note(note).text
    Checkpoint.parse(text)
    if not 1 <= time_s <= MAX_TIME_S:
        raise _invalid(f"{time_s} is no time in seconds since 1970")
    stamp = time_s.to_bytes(_TIME_BYTES, "big")
    return _signature_line(witness_key, stamp + witness_key.sign(_cosigned(time_s, text)))


def verify_cosignature(note: str, witness: VerifierKey) -> int:
    """When a witness co-signed the checkpoint in a note, in seconds since the epoch; the latest time, if more than one.

    The log's own signature is `open_checkpoint`'s to check.

    Raises:
        NoteInvalid: it is no checkpoint, the witness did not co-sign it, or a co-signature in its name is wrong.
        KeyInvalid: the key is a log's.
    """
    return max(found.time_s for found in cosignatures(note, witness))


def cosignatures(note: str, witness: VerifierKey) -> list[Cosignature]:
    """A witness's co-signatures in a note: one or more, all of them checked. Raises as `verify_cosignature`."""
    _must_sign(witness.algorithm, Algorithm.COSIGNATURE)
    parsed = _parse_note(note)
    Checkpoint.parse(parsed.text)
    found = []
    for signature in parsed.by(witness):
        time_s = int.from_bytes(signature.data[:_TIME_BYTES], "big")
        if not 1 <= time_s <= MAX_TIME_S:
            raise _invalid(f"the co-signature of {witness.name} has no time that can be")
        _verify(witness, signature.data[_TIME_BYTES:], _cosigned(time_s, parsed.text))
        found.append(Cosignature(f"{signature.line}\n", time_s))
    if not found:
        raise _invalid(f"{witness.name} did not co-sign it with the key {witness.key_id.hex()}")
    return found


def signers(note: str) -> list[Signer]:
    """Whose each signature line of a note says that it is, in their order; nothing of it is verified.

    Raises:
        NoteInvalid: it is no note.
    """
    return [Signer(found.name, found.key_id) for found in _parse_note(note).signatures]


def decode_note(data: bytes) -> str:
    """A note as it was read from a file or a medium, as text.

    Raises:
        NoteInvalid: it is too long, or not UTF-8.
    """
    if len(data) > MAX_NOTE_BYTES:
        raise _invalid(f"it is longer than {MAX_NOTE_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _invalid("it is not UTF-8") from None


def size_of_note(note: str) -> int:
    """How many entries a checkpoint's note names; nothing of it is verified.

    Raises:
        NoteInvalid: it has no such line.
    """
    lines = note.split("\n", 2)
    if len(lines) < 2:
        raise _invalid("it has no line with a size")
    return parse_number(lines[1], "its size")


def parse_number(text: str, what: str) -> int:
    """A count as the formats write it: decimal, no leading zero, under 2^63.

    Raises:
        NoteInvalid: it is written otherwise.
    """
    if not _NUMBER.fullmatch(text) or int(text) > MAX_SIZE:
        raise _invalid(f"{what} is not a decimal number under 2^63 without leading zeros")
    return int(text)


class _Signature(NamedTuple):
    """A signature line of a note."""

    line: str
    name: str
    key_id: bytes
    data: bytes


class _Note(NamedTuple):
    """A note, taken apart. Nothing is verified."""

    text: str
    signatures: list[_Signature]

    def by(self, key: VerifierKey) -> Iterator[_Signature]:
        """The signatures in a key's name; both its name and its id count."""
        key_id = key.key_id
        return (found for found in self.signatures if found.name == key.name and found.key_id == key_id)


def _parse_note(note: str) -> _Note:
    try:
        length = len(note.encode())
    except UnicodeEncodeError:
        raise _invalid("it is not UTF-8") from None
    if length > MAX_NOTE_BYTES:
        raise _invalid(f"it is longer than {MAX_NOTE_BYTES} bytes")
    if _CONTROL.search(note):
        raise _invalid("it holds a control character")
    end = note.rfind("\n\n")
    signed = note[end + 2 :]
    if end < 0 or not signed:
        raise _invalid("it has no signature after an empty line")
    if not signed.endswith("\n"):
        raise _invalid("it does not end in a newline")
    lines = signed[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise _invalid(f"it has more than {MAX_SIGNATURES} signatures")
    return _Note(note[: end + 1], [_parse_signature(line) for line in lines])


def _parse_signature(line: str) -> _Signature:
    name, separator, encoded = line.removeprefix(_SIGNATURE_MARK).partition(" ")
    data = _strict_base64(encoded)
    if not line.startswith(_SIGNATURE_MARK) or not separator or data is None or len(data) <= _KEY_ID_BYTES:
        raise _invalid("a signature line is not of the form `\u2014 name base64`")
    if not name or "+" in name or any(character.isspace() for character in name):
        raise _invalid("a signature line has a name with a space or a plus sign, or none")
    return _Signature(line, name, data[:_KEY_ID_BYTES], data[_KEY_ID_BYTES:])


def _signature_line(key: SigningKey, signature: bytes) -> str:
    return f"{_SIGNATURE_MARK}{key.name} {_base64(key.verifier().key_id + signature)}\n"


def _cosigned(time_s: int, text: str) -> bytes:
    return f"cosignature/v1\ntime {time_s}\n{text}".encode()


def _verify(key: VerifierKey, signature: bytes, message: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    if len(signature) != _SIGNATURE_BYTES:
        raise _invalid(f"the signature of {key.name} does not have {_SIGNATURE_BYTES} bytes")
    try:
        Ed25519PublicKey.from_public_bytes(key.public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        raise _invalid(f"the signature of {key.name} does not belong to this text: it was altered, or forged") from None


def _must_sign(algorithm: Algorithm, needed: Algorithm) -> None:
    if algorithm is not needed:
        whose = {Algorithm.ED25519: "a log's", Algorithm.COSIGNATURE: "a witness's"}
        raise _bad_key(f"it is {whose[algorithm]} (type 0x{algorithm:02x}), and {whose[needed]} is needed here")


def _name_fault(name: str) -> str | None:
    """What is wrong with the name of a key, or an origin."""
    if not name:
        return "is empty"
    if "+" in name or any(character.isspace() for character in name):
        return "holds a space or a plus sign"
    if not name.isprintable():
        return "holds a character that does not print"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"is longer than {MAX_NAME_BYTES} bytes"
    return None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _strict_base64(text: str) -> bytes | None:
    """What `text` encodes, if it is the one way to (RFC 4648, section 4)."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return data if _base64(data) == text else None


def _invalid(cause: str) -> NoteInvalid:
    return NoteInvalid(
        "the note is refused",
        cause=cause,
        remedy="Get it again from where it was signed, and check that the public key is the right one; "
        "if it is refused again, treat it as forged",
    )


def _bad_key(cause: str) -> KeyInvalid:
    return KeyInvalid(
        "the key cannot be used",
        cause=cause,
        remedy="Give the key as it was issued: a log's is in log.vkey, and `holdfast audit status` shows it",
    )
