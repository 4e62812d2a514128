"""The log's side of being witnessed: requests to carry out, and replies to keep.

Rules:

- A request goes on from what that witness co-signed last, as far as this folder knows.
- The checkpoint that a request carries is kept in `checkpoints/`, and the reply is put with it: `verify_log` holds the
  log to every one of them.
- A reply is checked before it is kept. One at a time is put with what is there: no co-signature takes another's place.
- A witness that is asked every minute co-signs half a million checkpoints a year. Of these the first of every minute is
  kept for a day, the first of every hour for good, and the newest; of what was carried by hand, everything.
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from appliance.audit.files import read_file, sync_directory, write_at
from appliance.audit.log import WITNESSED
from appliance.audit.notes import (
    Checkpoint,
    Cosignature,
    NoteInvalid,
    VerifierKey,
    cosignatures,
    decode_note,
    open_checkpoint,
    signers,
    size_of_note,
)
from appliance.audit.reading import LogReader, NoSuchEntry, hashes_of
from appliance.audit.tree import consistency_proof
from appliance.audit.witness import Request, read_request, verify_reply, write_request

_MINUTE_S: Final = 60
_HOUR_S: Final = 3600
_DAY_S: Final = 24 * _HOUR_S
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
    request = request_for(directory, log.note, old_size)
    with _KEEPING:
        if not _kept(directory, log.published):  # what is there may be co-signed, and of another history
            _keep(directory, log.published, log.note)
    return request


def request_for(directory: Path, note: str, old_size: int) -> bytes:
    """What a witness that saw `old_size` entries is asked about a checkpoint of the log in `directory`. Keeps nothing.

    Raises:
        OutsideTree: `old_size` is larger than the checkpoint's.
        LogUnreadable, TileInvalid: the log's files do not do.
    """
    size = size_of_note(note)
    return write_request(old_size, consistency_proof(hashes_of(directory, size), old_size, size), note)


def take_reply(directory: Path, request: bytes, reply: bytes, log_key: VerifierKey, witness: VerifierKey) -> Checkpoint:
    """Keep a witness's reply with the checkpoint that it co-signs, which is returned.

    Raises:
        RequestInvalid, ReplyInvalid, NoteInvalid: they do not go together, or are not of this log.
    """
    asked, checkpoint, cosignature = _checked(request, reply, log_key, witness)
    with _KEEPING:
        note = _kept(directory, checkpoint.size) or asked.note
        if open_checkpoint(note, log_key).root != checkpoint.root:
            note = asked.note  # two roots of one size: the co-signed one is the one to hold the log to
        if cosignature.line not in note:
            _keep(directory, checkpoint.size, note + cosignature.line)
    return checkpoint


def check_reply(request: bytes, reply: bytes, log_key: VerifierKey, witness: VerifierKey) -> None:
    """Check a witness's reply, and keep nothing of it. Raises as `take_reply`."""
    _checked(request, reply, log_key, witness)


def _checked(
    request: bytes, reply: bytes, log_key: VerifierKey, witness: VerifierKey
) -> tuple[Request, Checkpoint, Cosignature]:
    asked = read_request(request)
    return asked, open_checkpoint(asked.note, log_key), verify_reply(reply, asked.note, witness)


def last_seen(directory: Path, witness: VerifierKey) -> int:
    """The largest size that a witness co-signed, as far as this folder knows; 0: none."""
    found = last_cosigned(directory, witness)
    return 0 if found is None else found[0]


def last_cosigned(directory: Path, witness: VerifierKey) -> tuple[int, int] | None:
    """The largest size that a witness co-signed, and when, in epoch seconds; as far as this folder knows."""
    for size, path in _newest_first(directory):
        with contextlib.suppress(NoteInvalid, OSError):
            return size, max(each.time_s for each in cosignatures(decode_note(read_file(path)), witness))
    return None


class Witnessed(NamedTuple):
    """A co-signature, as the folder has it.

    Attributes:
        size: how many entries were seen.
        time_s: when, by the witness's clock; seconds since the epoch.
        witness: who says so.
    """

    size: int
    time_s: int
    witness: str


def largest_witnessed(directory: Path, log_key: VerifierKey, witnesses: Iterable[VerifierKey]) -> Witnessed | None:
    """The largest size that one of these witnesses co-signed, by the checkpoints in the folder that hold, and who did
    last; None: nobody did.
    """
    keys = list(witnesses)
    for size, path in _newest_first(directory) if keys else ():
        with contextlib.suppress(NoteInvalid, OSError):
            note = decode_note(read_file(path))
            if open_checkpoint(note, log_key).size != size:
                continue
            by = [key for key in keys if key.signer in signers(note)]
            found = [Witnessed(size, each.time_s, key.name) for key in by for each in cosignatures(note, key)]
            if found:
                return max(found)
    return None


def thin_out(directory: Path, witnesses: Sequence[VerifierKey]) -> int:
    """Remove what these witnesses co-signed more often than the rules keep it; how many checkpoints. Blocks.

    What somebody else co-signed too, or nobody, stays. Times are those of the co-signatures.
    """
    newest: dict[VerifierKey, int] = {}
    seen: set[tuple[VerifierKey, int, int]] = set()
    stays = set()
    found = []
    for _, path in _newest_first(directory):
        with contextlib.suppress(NoteInvalid, OSError):
            note = decode_note(read_file(path))
            by = {key: signed for key in witnesses if (signed := _cosigned_by(key, note))}
            found.append((path, note, {key: min(each.time_s for each in signed) for key, signed in by.items()}))
            if not by or 1 + sum(map(len, by.values())) < _signatures(note):
                stays.add(path)
    for path, _, times in found:
        for key, time_s in times.items():
            if newest.setdefault(key, time_s) == time_s:
                stays.add(path)
    for path, _, times in reversed(found):  # the first of each minute, or hour
        for key, time_s in times.items():
            step_s = _MINUTE_S if time_s > newest[key] - _DAY_S else _HOUR_S
            slot = (key, step_s, time_s // step_s)
            if slot not in seen:
                seen.add(slot)
                stays.add(path)
    removed = 0
    for path, note, _ in found:
        if path not in stays:
            with _KEEPING, contextlib.suppress(NoteInvalid, OSError):
                if decode_note(read_file(path)) == note:  # somebody else may have co-signed it meanwhile
                    path.unlink()
                    removed += 1
    return removed


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


def _newest_first(directory: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoints that are kept, by their sizes."""
    folder = directory / WITNESSED
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    for size in sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True):
        yield size, folder / str(size)


def _signatures(note: str) -> int:
    """How many lines of signatures a note has, the log's own with them."""
    return note.partition("\n\n")[2].count("\n")


def _cosigned_by(witness: VerifierKey, note: str) -> list[Cosignature]:
    with contextlib.suppress(NoteInvalid):
        if witness.signer in signers(note):
            return cosignatures(note, witness)
    return []


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
