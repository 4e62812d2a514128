"""The witness: what travels to it, on removable media or over a network (`api.witness_service`), and what it keeps.

Rules:

- A witness co-signs what goes on from the checkpoint that it saw before, and nothing else. Its own state decides, never
  what a request says about it.
- Its state is on the disk before a co-signature leaves it.
- One request at a time: the state is read, checked and replaced under a lock.
- A refusal is a state of its own: forked, shrunk, another old size. Each says what the witness has.
- It is one state in however many ways, and by however many processes, it is asked.
- What it keeps is the log's own signed note, so that a fork can be shown to anybody: two notes, one signature each.

The request has the form of C2SP tlog-witness, add-checkpoint; the reply is the signature line that it answers with.
"""

import base64
import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from appliance.audit.files import read_file, sync_directory, write_whole
from appliance.audit.notes import (
    MAX_NOTE_BYTES,
    Algorithm,
    Checkpoint,
    Cosignature,
    KeyInvalid,
    NoteInvalid,
    SigningKey,
    VerifierKey,
    cosign,
    cosignatures,
    decode_note,
    open_checkpoint,
    parse_number,
)
from appliance.audit.tree import EMPTY_ROOT, HASH_BYTES, ProofInvalid, verify_consistency
from appliance.errors import Fault, HoldfastError

MAX_PROOF_HASHES: Final = 63  # tlog-witness
MAX_REQUEST_BYTES: Final = MAX_NOTE_BYTES + 64 * (MAX_PROOF_HASHES + 1)
MAX_REPLY_BYTES: Final = 16 * 1024

_LOCK: Final = "lock"
_KEY: Final = "witness-key"


class RequestInvalid(HoldfastError, ValueError):
    """What was carried to the witness is no request."""

    code: ClassVar[str] = "witness_request_invalid"
    fault: ClassVar[Fault] = Fault.CALLER


class ReplyInvalid(HoldfastError, ValueError):
    """What was carried back does not co-sign the checkpoint that was sent."""

    code: ClassVar[str] = "witness_reply_invalid"
    fault: ClassVar[Fault] = Fault.CONFLICT


class CosignatureRefused(HoldfastError):
    """The request is one, and does not go on from what the witness saw.

    Attributes:
        witness_size: how many entries the witness saw.
        size: how many the request's checkpoint names.
    """

    code: ClassVar[str] = "witness_refused"
    fault: ClassVar[Fault] = Fault.CONFLICT

    def __init__(self, message: str, *, cause: str, remedy: str, witness_size: int, size: int) -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.witness_size = witness_size
        self.size = size


class OldSizeDiffers(CosignatureRefused):
    """The request goes on from another checkpoint than the one that the witness saw last."""

    code: ClassVar[str] = "witness_old_size_differs"


class LogShrunk(CosignatureRefused):
    """The log is shorter than the witness saw it."""

    code: ClassVar[str] = "audit_log_shrunk"


class LogForked(CosignatureRefused):
    """The log signed two histories."""

    code: ClassVar[str] = "audit_log_forked"


class ProofDoesNotHold(LogForked):
    """What the request proves does not lead from what the witness saw to its checkpoint: that, or it was damaged."""


class WitnessBusy(HoldfastError):
    """The witness is at work on another request."""

    code: ClassVar[str] = "witness_busy"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class WitnessStateUnusable(HoldfastError, OSError):
    """What the witness remembers cannot be read or written."""

    code: ClassVar[str] = "witness_state_unusable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Request:
    """A request, taken apart; nothing in it is verified."""

    old_size: int
    proof: tuple[bytes, ...]
    note: str


def write_request(old_size: int, proof: Sequence[bytes], note: str) -> bytes:
    """What the log sends to a witness: `note` and the consistency proof from `old_size`, 0 the first time.

    Raises:
        RequestInvalid: it is not one that a witness could read.
    """
    lines = [f"old {old_size}", *(base64.b64encode(node).decode() for node in proof)]
    request = "".join(f"{line}\n" for line in (*lines, "")).encode() + note.encode()
    read_request(request)
    return request


def read_request(request: bytes) -> Request:
    """A request, taken apart.

    Raises:
        RequestInvalid: it is none.
    """
    if len(request) > MAX_REQUEST_BYTES:
        raise _not_a_request(f"it is longer than {MAX_REQUEST_BYTES} bytes")
    head, separator, note = request.partition(b"\n\n")
    try:
        first, *hashes = head.decode("ascii").split("\n")
        text = decode_note(note)
        old_size = parse_number(first.removeprefix("old "), "its old size")
    except UnicodeDecodeError:
        raise _not_a_request("its head is not ASCII") from None
    except NoteInvalid as error:
        raise _not_a_request(error.cause) from None
    if not separator or not first.startswith("old "):
        raise _not_a_request("it does not begin with `old`, a size, and the hashes up to an empty line")
    if len(hashes) > MAX_PROOF_HASHES:
        raise _not_a_request(f"its proof has more than {MAX_PROOF_HASHES} hashes")
    return Request(old_size, tuple(_hash(line) for line in hashes), text)


class Witness:
    """Co-signs checkpoints, at most one history for each origin. `state_dir` is made when it is not there.

    Raises:
        KeyInvalid: the key is a log's.
    """

    def __init__(self, state_dir: Path, key: SigningKey) -> None:
        if key.algorithm is not Algorithm.COSIGNATURE:
            raise KeyInvalid(
                "the key cannot be used",
                cause="it is a log's, and a witness needs one of its own",
                remedy="Generate a witness's key",
            )
        self._directory = state_dir
        self._key = key

    def cosign(self, request: bytes, log_key: VerifierKey, now_s: int) -> bytes:
        """The reply to a request: the co-signature line. Blocks for a sync of the state.

        Raises:
            RequestInvalid: this is no request.
            NoteInvalid: its checkpoint is not signed by `log_key`, or is another log's.
            LogShrunk: the witness saw a longer log.
            OldSizeDiffers: it goes on from another size than the witness's, which `witness_size` says.
            LogForked: it contradicts what the witness saw.
            WitnessBusy: another request is being worked on.
            WitnessStateUnusable: the state cannot be read or written; nothing was co-signed.
        """
        asked = read_request(request)
        checkpoint = open_checkpoint(asked.note, log_key)
        if asked.old_size > checkpoint.size:
            raise _not_a_request(f"its old size is {asked.old_size}, and its checkpoint has {checkpoint.size} entries")
        with _locked(self._directory):
            _must_go_on(self._last(log_key), asked, checkpoint)
            line = cosign(asked.note, self._key, now_s)
            self._remember(checkpoint.origin, asked.note)
        return line.encode()

    def last(self, log_key: VerifierKey) -> Checkpoint | None:
        """The checkpoint of a log that the witness saw last.

        Raises:
            WitnessBusy: a request is being worked on.
            WitnessStateUnusable: the state cannot be read.
        """
        with _locked(self._directory):
            return self._last(log_key)

    def _last(self, log_key: VerifierKey) -> Checkpoint | None:
        path = self._path(log_key.name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                kept = file.read(MAX_NOTE_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error.strerror or "unknown") from None
        try:
            return open_checkpoint(decode_note(kept), log_key)
        except NoteInvalid as error:
            raise _unusable(
                path,
                f"it is not what this key of {log_key.name} signed: {error.cause}",
                "Put it back from a backup of the witness; "
                "if the log has a new key, it is a new log, and needs an origin of its own",
            ) from None

    def _remember(self, origin: str, note: str) -> None:
        path = self._path(origin)
        try:
            write_whole(path, note.encode())
        except OSError as error:
            raise _unusable(path, error.strerror or "unknown") from None

    def _path(self, origin: str) -> Path:
        return self._directory / f"{hashlib.sha256(origin.encode()).hexdigest()}.note"


def own_key(state_dir: Path, name: str) -> SigningKey:
    """The witness's own key, which lies with what it saw: lost together, they are missed together.

    It is made where there is none yet; then `name` is what the witness is called.

    Raises:
        KeyInvalid: it is damaged, or cannot have that name.
        WitnessBusy: another process makes it, or works on a request.
        WitnessStateUnusable: it cannot be read or written.
    """
    path = state_dir / _KEY
    with _locked(state_dir):
        try:
            if path.exists():
                return SigningKey.from_bytes(read_file(path))
            key = SigningKey.generate(name, Algorithm.COSIGNATURE)
            write_whole(path, key.to_bytes())
        except OSError as error:
            raise _unusable(path, error.strerror or "unknown") from None
    return key


def verify_reply(reply: bytes, note: str, witness_key: VerifierKey) -> Cosignature:
    """The witness's co-signature of the checkpoint in `note`, the newest if there are several: `note + line` holds it.

    Lines of other witnesses are passed over, as tlog-witness says.

    Raises:
        ReplyInvalid: it does not co-sign this checkpoint.
        KeyInvalid: the key is a log's.
    """
    if not reply or len(reply) > MAX_REPLY_BYTES:
        raise _not_a_reply(f"it has {len(reply)} bytes, and may have 1 to {MAX_REPLY_BYTES}")
    try:
        lines = decode_note(reply)
        text, _, _ = note.rpartition("\n\n")
        found = cosignatures(f"{text}\n\n{lines}", witness_key)
    except NoteInvalid as error:
        raise _not_a_reply(error.cause) from None
    return max(found, key=lambda cosignature: cosignature.time_s)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    try:
        if not directory.is_dir():
            directory.mkdir(mode=0o700)
            sync_directory(directory.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / _LOCK, flags, 0o600)
    except OSError as error:
        raise _unusable(directory, error.strerror or "unknown") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise WitnessBusy(
            "the witness takes one request at a time",
            cause=f"another process holds {directory / _LOCK}",
            remedy="Try again when it is done; nothing was co-signed",
        ) from None
    except OSError as error:
        os.close(descriptor)
        raise _unusable(directory, error.strerror or "unknown") from None
    try:
        yield
    finally:
        os.close(descriptor)


def _must_go_on(last: Checkpoint | None, asked: Request, checkpoint: Checkpoint) -> None:
    """Raise unless the request's checkpoint is the witness's last one, or goes on from it."""
    size, root = (last.size, last.root) if last is not None else (0, EMPTY_ROOT)
    if checkpoint.size < size:
        raise LogShrunk(
            f"the checkpoint of {checkpoint.origin} is older than the one that the witness saw",
            cause=f"it has {checkpoint.size} entries, and the witness saw {size}: the log was cut or restored from "
            "an old copy, or this is a request from before",
            remedy=f"Export a new request; if it too has fewer than {size} entries, the log lost what it had: "
            "keep it, and the witness's state, as evidence",
            witness_size=size,
            size=checkpoint.size,
        )
    if checkpoint.size == size and checkpoint.root != root:
        raise _forked(LogForked, checkpoint, size, f"it signed two trees of {size} entries")
    if asked.old_size != size:
        raise OldSizeDiffers(
            f"the request does not go on from what the witness saw of {checkpoint.origin}",
            cause=f"it goes on from {asked.old_size} entries, and this witness saw {size}",
            remedy=f"Export the request again from {size}; if this witness should have seen {asked.old_size}, "
            "restore its state from a backup",
            witness_size=size,
            size=checkpoint.size,
        )
    try:
        verify_consistency(size, root, checkpoint.size, checkpoint.root, asked.proof)
    except ProofInvalid as error:
        raise _forked(
            ProofDoesNotHold,
            checkpoint,
            size,
            f"the proof from {size} to {checkpoint.size} entries does not hold: {error.cause}",
        ) from None


def _hash(line: str) -> bytes:
    try:
        data = base64.b64decode(line, validate=True)
    except ValueError:
        data = b""
    if len(data) != HASH_BYTES or base64.b64encode(data).decode() != line:
        raise _not_a_request(f"a line of its proof is not base64 of {HASH_BYTES} bytes")
    return data


def _forked(kind: type[LogForked], checkpoint: Checkpoint, witness_size: int, cause: str) -> LogForked:
    return kind(
        f"the log {checkpoint.origin} does not go on from what the witness saw",
        cause=cause,
        remedy="Export the request again, in case the medium is damaged; if it is refused again, history was "
        "rewritten: keep the request and the witness's state as evidence, both are signed by the log",
        witness_size=witness_size,
        size=checkpoint.size,
    )


def _not_a_request(cause: str) -> RequestInvalid:
    return RequestInvalid(
        "this is no request to a witness",
        cause=cause,
        remedy="Carry over the file that `holdfast audit witness export` wrote",
    )


def _not_a_reply(cause: str) -> ReplyInvalid:
    return ReplyInvalid(
        "this reply does not co-sign the checkpoint",
        cause=cause,
        remedy="Carry back the file that `holdfast audit witness cosign` wrote for this request, "
        "and check that the witness's public key is the right one",
    )


def _unusable(
    path: Path, cause: str, remedy: str = "Make it readable and writable for who runs the witness, with room on it"
) -> WitnessStateUnusable:
    return WitnessStateUnusable(f"the witness's state {path} cannot be used", cause=cause, remedy=remedy)
