"""A proof that one entry was in the log, that stands by itself: the entry, where it is, and a signed checkpoint.

Rules:

- A proof is checked with the log's public key and nothing else; the record in it too, if it was disclosed.
- That the entry was there at a time is a witness's word, with the witness's key. The entry's own time is the log's.
- Verification raises.

Format: C2SP tlog-proof, version 1; `extra` is the entry, and behind it the salt and the record if they are disclosed.
"""

import base64
import binascii
import json
from typing import Any, ClassVar, Final, NamedTuple

from appliance.audit.entry import ENTRY_BYTES, Entry, canonical, check_commitment
from appliance.audit.notes import (
    Checkpoint,
    NoteInvalid,
    VerifierKey,
    cosignatures,
    open_checkpoint,
    parse_number,
    size_of_note,
)
from appliance.audit.reading import LogReader, NoSuchEntry
from appliance.audit.tree import inclusion_proof, leaf_hash, verify_inclusion
from appliance.errors import Fault, HoldfastError

MAX_PROOF_BYTES: Final = 512 << 10
_HEADER: Final = "c2sp.org/tlog-proof@v1"
_SALT_BYTES: Final = 16
_MOST_HASHES: Final = 63


class ProofUnreadable(HoldfastError, ValueError):
    """A file is no proof."""

    code: ClassVar[str] = "audit_proof_unreadable"
    fault: ClassVar[Fault] = Fault.CALLER


class Proved(NamedTuple):
    """What a proof shows.

    Attributes:
        record: None where it was not disclosed.
        seen_s: when the witness saw the entry in the log, by the witness's clock, in seconds since the epoch: it was
            there no later. None: no witness was asked for.
    """

    entry: Entry
    checkpoint: Checkpoint
    record: dict[str, Any] | None
    seen_s: int | None


def prove(
    log: LogReader, sequence: int, *, note: str = "", salt: bytes = b"", record: dict[str, Any] | None = None
) -> str:
    """A proof of one entry under a checkpoint of the log.

    Args:
        note: the checkpoint, such as a co-signed one; by default the newest.
        salt, record: disclose what the entry is about.

    Raises:
        NoSuchEntry: the checkpoint does not name it (yet).
        NoteInvalid: it is no checkpoint.
        ProofInvalid: the checkpoint is of another history than the log's.
        LogUnreadable, TileInvalid: the log's files do not do.
    """
    which, note = ("that", note) if note else ("the newest", log.note)
    size = size_of_note(note) if note else 0
    if sequence >= size:
        raise NoSuchEntry(
            f"entry {sequence} cannot be proved",
            cause=f"{which} checkpoint names the {size} entries before it",
            remedy="Ask again in a minute: a checkpoint is signed that often",
        )
    packed = extra = log.frame(sequence).entry
    if record is not None:
        extra += salt + canonical(record)
    hashes = inclusion_proof(log.hashes(size), sequence, size)
    root = Checkpoint.parse(note.partition("\n\n")[0] + "\n").root
    verify_inclusion(leaf_hash(packed), sequence, size, hashes, root)
    lines = [_HEADER, f"extra {_base64(extra)}", f"index {sequence}", *map(_base64, hashes), "", note]
    return "\n".join(lines)


def verify_proof(proof: str, key: VerifierKey, witness: VerifierKey | None = None) -> Proved:
    """Check a proof.

    Args:
        witness: who must have co-signed the checkpoint in it.

    Raises:
        ProofUnreadable: it is none.
        NoteInvalid: the checkpoint in it was not signed by the key, or not co-signed by the witness.
        ProofInvalid: the entry is not under that checkpoint.
        EntryInvalid: the entry or the record in it is not one of that log.
    """
    if len(proof) > MAX_PROOF_BYTES:
        raise _unreadable(f"it is longer than {MAX_PROOF_BYTES} bytes")
    head, separator, note = proof.partition("\n\n")
    lines = head.split("\n")
    if not separator or len(lines) < 3 or lines[0] != _HEADER:
        raise _unreadable(f"it does not begin with {_HEADER}, `extra` and `index`")
    if not lines[1].startswith("extra ") or not lines[2].startswith("index ") or len(lines) > 3 + _MOST_HASHES:
        raise _unreadable("its lines are not `extra`, `index` and at most 63 hashes")
    extra = _bytes(lines[1].removeprefix("extra "))
    index = parse_number(lines[2].removeprefix("index "), "its index")
    checkpoint = open_checkpoint(note, key)
    seen_s = None if witness is None else _first_seen_s(note, witness)
    packed, disclosed = extra[:ENTRY_BYTES], extra[ENTRY_BYTES:]
    verify_inclusion(leaf_hash(packed), index, checkpoint.size, [_bytes(line) for line in lines[3:]], checkpoint.root)
    entry = Entry.unpack(packed)
    if entry.sequence != index:
        raise _unreadable(f"its entry has the number {entry.sequence}, and it is of {index}")
    record = None
    if disclosed:
        content = disclosed[_SALT_BYTES:]
        check_commitment(entry, disclosed[:_SALT_BYTES], content)
        record = json.loads(content)
    return Proved(entry, checkpoint, record, seen_s)


def _first_seen_s(note: str, witness: VerifierKey) -> int:
    """The earliest time at which a witness co-signed: the entry was there then already."""
    try:
        return min(found.time_s for found in cosignatures(note, witness))
    except NoteInvalid as error:
        raise NoteInvalid(
            "the proof does not show when the entry was there",
            cause=error.cause,
            remedy="Have it made with `holdfast audit prove --witness`, and check that the witness's public key is the "
            "right one; if it is refused again, treat the time as claimed by the log alone",
        ) from None


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise _unreadable("a line of it is not base64") from None


def _unreadable(cause: str) -> ProofUnreadable:
    return ProofUnreadable("this is no proof", cause=cause, remedy="Make one with `holdfast audit prove`")
