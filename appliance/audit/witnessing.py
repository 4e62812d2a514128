"""The log's side of being witnessed: requests to carry out, and replies to keep.

Rules:

- A request goes on from what that witness co-signed last, as far as this folder knows.
- The checkpoint that a request carries is kept in `checkpoints/`, and the reply is put with it: `verify_log` holds the
  log to every one of them.
- A reply is checked before it is kept. One at a time is put with what is there: no co-signature takes another's place.
"""

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from appliance.audit.files import read_file, sync_directory, write_at
from appliance.audit.log import WITNESSED
from appliance.audit.notes import (
    Checkpoint,
    NoteInvalid,
    VerifierKey,
    cosignatures,
    decode_note,
    open_checkpoint,
    signers,
    size_of_note,
)
from appliance.audit.reading import LogReader, NoSuchEntry
from appliance.audit.tree import consistency_proof
from appliance.audit.witness import Request, read_request, verify_reply, write_request

_KEEPING: Final = threading.Lock()  # one process keeps them: the gateway, a request a thread


def make_request(directory: Path, *, old_size: int) -> bytes:
    """What a witness that saw `old_size` entries is asked; 0: it saw none.

    Raises:
        NoSuchEntry: there is no checkpoint yet, or `old_size` is larger than it.
        LogUnreadable, TileInvalid: the log's files do not do.
    """
    log = LogReader(directory)
    if not log.note or old_size > log.published:
        raise NoSuchEntry(
            "there is nothing to co-sign",
            cause=f"the newest checkpoint names {log.published} entries, and the witness saw {old_size}",
            remedy="Wait for a checkpoint: one is signed every minute, once the vault is open",
        )
    proof = consistency_proof(log.hashes(), old_size, log.published) if old_size else []
    with _KEEPING:
        if not _kept(directory, log.published):  # what is there may be co-signed, and of another history
            _keep(directory, log.published, log.note)
    return write_request(old_size, proof, log.note)


def take_reply(directory: Path, request: bytes, reply: bytes, log_key: VerifierKey, witness: VerifierKey) -> Checkpoint:
    """Keep a witness's reply with the checkpoint that it co-signs, which is returned.

    Raises:
        RequestInvalid, ReplyInvalid, NoteInvalid: they do not go together, or are not of this log.
    """
    asked: Request = read_request(request)
    checkpoint = open_checkpoint(asked.note, log_key)
    cosignature = verify_reply(reply, asked.note, witness)
    with _KEEPING:
        note = _kept(directory, checkpoint.size) or asked.note
        if open_checkpoint(note, log_key).root != checkpoint.root:
            note = asked.note  # two roots of one size: the co-signed one is the one to hold the log to
        if cosignature.line not in note:
            _keep(directory, checkpoint.size, note + cosignature.line)
    return checkpoint


def last_seen(directory: Path, witness: VerifierKey) -> int:
    """The largest size that a witness co-signed, as far as this folder knows; 0: none."""
    folder = directory / WITNESSED
    sizes = [0]
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            cosignatures(decode_note(read_file(path)), witness)
            sizes.append(int(path.name))
        except (NoteInvalid, ValueError, OSError):
            continue
    return max(sizes)


def largest_witnessed(directory: Path, log_key: VerifierKey, witnesses: Iterable[VerifierKey]) -> int:
    """The largest size that one of these witnesses co-signed, by the checkpoints in the folder that hold; 0: none."""
    folder, keys = directory / WITNESSED, list(witnesses)
    names = [path.name for path in folder.iterdir()] if keys and folder.is_dir() else []
    for size in sorted((int(name) for name in names if name.isdecimal()), reverse=True):
        with contextlib.suppress(NoteInvalid, OSError):
            note = decode_note(read_file(folder / str(size)))
            if open_checkpoint(note, log_key).size == size and any(_is_by(note, witness) for witness in keys):
                return size
    return 0


def cosigned_note(directory: Path, sequence: int, witness: VerifierKey) -> str:
    """Of the checkpoints that name an entry, the first that a witness co-signed: nothing shows it there earlier.

    Raises:
        NoSuchEntry: that witness co-signed none, as far as this folder knows.
        KeyInvalid: the key is a log's.
    """
    folder = directory / WITNESSED
    sizes = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()] if folder.is_dir() else []
    for size in sorted(sizes):
        with contextlib.suppress(NoteInvalid, OSError):
            note = decode_note(read_file(folder / str(size)))
            if size_of_note(note) > sequence and cosignatures(note, witness):
                return note
    raise NoSuchEntry(
        f"entry {sequence} cannot be proved by a checkpoint that {witness.name} co-signed",
        cause=f"none of those in {folder} names it",
        remedy="Have a checkpoint co-signed: `holdfast audit witness export`; without --witness the newest proves it",
    )


def _is_by(note: str, witness: VerifierKey) -> bool:
    return witness.signer in signers(note) and bool(cosignatures(note, witness))


def _kept(directory: Path, size: int) -> str:
    try:
        return decode_note(read_file(directory / WITNESSED / str(size)))
    except FileNotFoundError:
        return ""


def _keep(directory: Path, size: int, note: str) -> None:
    folder = directory / WITNESSED
    folder.mkdir(mode=0o700, exist_ok=True)
    if _kept(directory, size).startswith(note):
        return
    staged = folder / f".{size}.new"
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_at(descriptor, note.encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    staged.rename(folder / str(size))
    sync_directory(folder)
