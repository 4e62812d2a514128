"""A whole appliance in one file: written while it serves, verified before anything of it is put back.

The file is an uncompressed tar archive: `manifest.json` first, then what it lists, each with its size and SHA-256.

Rules:

- What is in it is what is on disk: rows encrypted, the root key sealed. The key file of a demonstration, API keys and
  logs are never in it. The audit log is not either: it only grows, may be many times the database, and an old copy of
  it is what nobody should go on with.
- A backup is read completely and every hash is compared before anything is written. Unknown members, links, and names
  with a folder in them are refused.
- A state directory changes hands in one rename: there is the old one or the new one, never a mixture. The old one is
  kept, under a name that nothing had: it has it in that same rename, so nothing that fails can take it away.
- The audit log of the appliance that is replaced goes on: each of its files gets a second name in what is put back, so
  that the old one, which is kept, is whole too. Where the database in the backup has no key for the log, that is kept
  beside, under a name of its own, and another begins. The next start records the restore (`appliance.audit.restores`).
- Hashes tell damage, not forgery. A forged row or seal is refused by the vault when it is opened. Settings name
  programs, sockets and addresses and nothing vouches for them: a backup's are put beside, for a person to review, and
  those that are there already, or the defaults, are used.
- A session that was forgotten after a backup is in that backup still.
"""

import asyncio
import ctypes
import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, ClassVar, TypeVar

from sqlalchemy import Connection, create_engine, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from api.private_files import new_private_file, sync_folder
from api.replica import REPLICA_FILE
from api.roots import read_seal
from appliance.audit.marks import marks_of_store
from appliance.audit.restores import ANNOUNCED, CARRIED_OVER, NONE_THERE, SET_ASIDE, Restore, describe
from appliance.audit.signing import SIGNING_KEY
from appliance.errors import Fault, HoldfastError
from appliance.settings import Settings
from appliance.store import Store, tables
from appliance.vault import key_id_of, seal_kind

FORMAT = "holdfast-backup"
FORMAT_VERSION = 1
DATABASE = "holdfast.db"
BACKUP_PREFIX = "backup-"  # of folders in `run`, while a backup is written
_MANIFEST = "manifest.json"
_MEMBERS = (DATABASE, "root.sealed", "holdfast.toml")
_SETTINGS = "holdfast.toml"
_SETTINGS_TO_REVIEW = "holdfast.toml.from-backup"
_CARRIED_OVER = (
    "root.key",
    "demo-api-key",
    _SETTINGS,
    REPLICA_FILE,
)  # never taken from a backup: kept from what is replaced
_MOVED_OVER = ("models",)
_LOG = "audit"
_DESTINATIONS = "siem"  # where the log goes, and how far it is there: they go with it
_LOCKS = (f"{DATABASE}-lock", f"{_LOG}/lock")
_CHUNK = 1 << 20
_END = bytes(2 * tarfile.BLOCKSIZE)
_MAX_MANIFEST_BYTES = 64 << 10
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_T = TypeVar("_T")


class BackupDamaged(HoldfastError, ValueError):
    """A file is no backup, or not what its manifest says."""

    code: ClassVar[str] = "backup_damaged"
    fault: ClassVar[Fault] = Fault.CALLER


class BackupTooNew(HoldfastError, ValueError):
    """A backup of a format that this version does not know."""

    code: ClassVar[str] = "backup_too_new"
    fault: ClassVar[Fault] = Fault.CALLER


class BackupUnreadable(HoldfastError, OSError):
    """A backup cannot be read from disk."""

    code: ClassVar[str] = "backup_unreadable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class RestoreWouldReplace(HoldfastError, FileExistsError):
    """There is an appliance where one is to be restored."""

    code: ClassVar[str] = "restore_would_replace"
    fault: ClassVar[Fault] = Fault.CONFLICT


class RestoreFailed(HoldfastError, OSError):
    """What was restored cannot be written; the state directory is as it was, unless the remedy says otherwise."""

    code: ClassVar[str] = "restore_failed"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class ApplianceInUse(HoldfastError):
    """A process has the database open that would be replaced."""

    code: ClassVar[str] = "appliance_in_use"
    fault: ClassVar[Fault] = Fault.CONFLICT


@dataclass(frozen=True, slots=True)
class Member:
    """One file in a backup; sizes in bytes, the hash in hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a backup holds, and of what.

    Attributes:
        log_key, log_entries: the audit log that is not in it: its public key, and how many entries it had.
    """

    created_at: float
    holdfast: str
    seal: str
    files: tuple[Member, ...]
    log_key: str = ""
    log_entries: int = 0

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(member.size for member in self.files)


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore did.

    Attributes:
        kept: where the state that was replaced is now.
        settings_to_review: where the backup's settings are, which are not used; None: they are those that are used.
        restore: what the next start records of it, and what became of the audit log.
    """

    manifest: Manifest
    state_dir: Path
    kept: Path | None
    key_file_missing: bool
    settings_to_review: Path | None
    restore: Restore


# Writing


async def stream_backup(
    store: Store,
    settings: Settings,
    *,
    now: Callable[[], float] = time.time,
    admitted: Callable[[int], Awaitable[None]] | None = None,
) -> AsyncGenerator[bytes, None]:
    """The pieces of a backup of the running appliance. Needs room for a second copy of the database meanwhile.

    Args:
        admitted: awaited with the size of all pieces together, in bytes, before the first; nothing is given out where
            it raises.

    Raises:
        BackupUnsupported: the database is a server's, which has tools of its own.
    """
    with tempfile.TemporaryDirectory(dir=settings.state_dir / "run", prefix=BACKUP_PREFIX) as folder:
        sources = {name: settings.state_dir / name for name in _MEMBERS}
        sources[DATABASE] = Path(folder) / DATABASE
        await store.backup(sources[DATABASE])
        present = {name: path for name, path in sources.items() if path.exists()}
        seal = seal_kind(read_seal(settings.state_dir))
        manifest = await asyncio.to_thread(_manifest_of, present, seal, now(), settings.state_dir / _LOG)
        text = json.dumps(asdict(manifest) | {"format": FORMAT, "version": FORMAT_VERSION}, indent=2).encode()
        begin = _header(_MANIFEST, len(text), manifest.created_at) + text + _padding(len(text))
        headers = {member: _header(member.name, member.size, manifest.created_at) for member in manifest.files}
        if admitted is not None:
            members = sum(len(header) + each.size + len(_padding(each.size)) for each, header in headers.items())
            await admitted(len(begin) + members + len(_END))
        yield begin
        for member, header in headers.items():
            yield header
            with present[member.name].open("rb") as source:
                left = member.size
                while piece := await asyncio.to_thread(source.read, min(_CHUNK, left)):
                    left -= len(piece)
                    yield piece
            yield _padding(member.size)
        yield _END


def _manifest_of(present: dict[str, Path], seal: str, created_at: float, log: Path) -> Manifest:
    files = []
    for name, path in present.items():
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            files.append(Member(name, source.tell(), digest))
    return Manifest(created_at, version("holdfast"), seal, tuple(files), *describe(log))


def _header(name: str, size: int, created_at: float) -> bytes:
    about = tarfile.TarInfo(name)
    about.size, about.mode, about.mtime = size, 0o600, int(created_at)
    return about.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


# Reading


def verify_backup(path: Path) -> Manifest:
    """Read all of a backup and compare every hash.

    Raises:
        BackupDamaged: it is no backup, or something in it is not what its manifest says.
        BackupTooNew: another version's format.
        BackupUnreadable: it cannot be opened or read.
    """
    with _archive(path) as archive:
        manifest = _read_manifest(path, archive)
        for member, content in _members(path, archive, manifest):
            _copy(path, member, content, None)
    return manifest


def restore_backup(path: Path, state_dir: Path, *, replace: bool, now: Callable[[], float] = time.time) -> Restored:
    """Put the appliance in the backup at `path` into `state_dir`.

    Args:
        replace: whether an appliance that is there is set aside.

    Raises:
        RestoreWouldReplace: there is one, and `replace` was not said.
        BackupDamaged: as `verify_backup`; or its database is none.
        RestoreFailed: a file cannot be written.
    """
    manifest = verify_backup(path)
    at = now()
    occupied = state_dir.exists() and any(state_dir.iterdir())
    if occupied and not replace:
        raise RestoreWouldReplace(
            f"{state_dir} is in use",
            cause="it holds an appliance, or something else, already",
            remedy=f"Name it to set it aside: --replace {state_dir.name}; or restore elsewhere with --state-dir",
        )
    try:
        state_dir.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=state_dir.parent, prefix=f".{state_dir.name}.restore-"))
        try:
            _unpack(path, staged)
            with _unused(state_dir):
                aside = _unused_suffix(state_dir, at)
                restore = _announce(path, manifest, staged, state_dir, at, f"{_LOG}{aside}")
                kept = _exchange(staged, state_dir, occupied, aside)
        finally:
            shutil.rmtree(staged, ignore_errors=True)  # gone already, unless something failed
    except HoldfastError:
        raise
    except OSError as error:
        raise RestoreFailed(
            "the backup was not restored",
            cause=f"{error.filename or state_dir}: {error.strerror}",
            remedy="Mend that and run the command again; nothing was changed",
        ) from error
    missing = manifest.seal == "key-file" and not (state_dir / "root.key").exists()
    return Restored(manifest, state_dir, kept, missing, _settings_to_review(state_dir), restore)


def _settings_to_review(state_dir: Path) -> Path | None:
    review, used = state_dir / _SETTINGS_TO_REVIEW, state_dir / _SETTINGS
    if not review.exists():
        return None
    if used.exists() and used.read_bytes() == review.read_bytes():
        review.unlink()
        return None
    return review


@contextmanager
def _unused(state_dir: Path) -> Iterator[None]:
    """Within it no gateway opens the database in `state_dir`, and no appender the log.

    The database itself is not opened: it may be what is damaged.

    Raises:
        ApplianceInUse: a process has one of them open.
    """
    with ExitStack() as held:
        for name in _LOCKS:
            try:
                lock = os.open(state_dir / name, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            held.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ApplianceInUse(
                    f"the appliance in {state_dir} runs",
                    cause="a process has its database or its audit log open",
                    remedy="Stop it with `holdfast down`, then restore",
                ) from None
        yield


def _archive(path: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(path, "r:")
    except tarfile.TarError as error:
        raise _damaged(path, f"it is no tar archive: {error}") from None
    except OSError as error:
        raise BackupUnreadable(
            f"{path} cannot be read", cause=str(error.strerror), remedy="Check the path and its permissions"
        ) from None


def _read_manifest(path: Path, archive: tarfile.TarFile) -> Manifest:
    try:
        first = archive.next()
        content = archive.extractfile(first) if first is not None and first.name == _MANIFEST else None
        if content is None:
            raise _damaged(path, f"it does not begin with {_MANIFEST}")
        tree = json.loads(content.read(_MAX_MANIFEST_BYTES))
        if tree["format"] != FORMAT:
            raise _damaged(path, f"its format is {tree['format']!r}")
        if tree["version"] != FORMAT_VERSION:
            raise BackupTooNew(
                f"{path} cannot be restored by this version",
                cause=f"its format is version {tree['version']}; this one knows {FORMAT_VERSION}",
                remedy=f"Use the version of holdfast that wrote it ({tree.get('holdfast')}) or a newer one",
            )
        files = tuple(Member(str(each["name"]), int(each["size"]), str(each["sha256"])) for each in tree["files"])
        manifest = Manifest(
            float(tree["created_at"]),
            str(tree["holdfast"]),
            str(tree["seal"]),
            files,
            str(tree.get("log_key", "")),
            int(tree.get("log_entries", 0)),
        )
    except (tarfile.TarError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, HoldfastError):
            raise
        raise _damaged(path, f"its manifest cannot be read: {type(error).__name__}") from None
    names = [member.name for member in files]
    if len(set(names)) != len(names) or not {DATABASE, "root.sealed"} <= set(names) <= set(_MEMBERS):
        raise _damaged(path, f"its manifest lists {', '.join(names) or 'nothing'}")
    return manifest


def _members(path: Path, archive: tarfile.TarFile, manifest: Manifest) -> Iterator[tuple[Member, IO[bytes]]]:
    """Each file that the manifest lists, in its order.

    Raises:
        BackupDamaged: one is missing, or there is something else.
    """
    for expected in manifest.files:
        about = _next(path, archive)
        if about is None or about.name != expected.name or not about.isreg() or about.size != expected.size:
            raise _damaged(path, f"{expected.name} is missing, or of another size than the manifest says")
        content = archive.extractfile(about)
        if content is None:
            raise _damaged(path, f"{expected.name} is no file")
        yield expected, content
    extra = _next(path, archive)
    if extra is not None:
        raise _damaged(path, f"it holds {extra.name!r}, which the manifest does not list")


def _next(path: Path, archive: tarfile.TarFile) -> tarfile.TarInfo | None:
    try:
        return archive.next()
    except tarfile.TarError as error:
        raise _damaged(path, str(error)) from None


def _copy(path: Path, member: Member, content: IO[bytes], into: IO[bytes] | None) -> None:
    digest = hashlib.sha256()
    try:
        while piece := content.read(_CHUNK):
            digest.update(piece)
            if into is not None:
                into.write(piece)
    except tarfile.TarError as error:
        raise _damaged(path, f"{member.name}: {error}") from None
    if digest.hexdigest() != member.sha256:
        raise _damaged(path, f"the hash of {member.name} is not the one in the manifest")


def _unpack(path: Path, folder: Path) -> None:
    with _archive(path) as archive:
        for member, content in _members(path, archive, _read_manifest(path, archive)):
            # The file may have changed since it was verified: hashes are compared again while it is written.
            name = _SETTINGS_TO_REVIEW if member.name == _SETTINGS else member.name
            with new_private_file(folder / name) as into:
                _copy(path, member, content, into)
    sync_folder(folder)


def _announce(path: Path, manifest: Manifest, staged: Path, state_dir: Path, at: float, aside: str) -> Restore:
    """Put the audit log of `state_dir` into `staged`, with all that earlier restores left of logs and announcements.

    Args:
        aside: what the log is called there if the database in the backup has no key for it.

    Raises:
        BackupDamaged: that database cannot be read.
    """
    former, outcome, folder = state_dir / _LOG, NONE_THERE, ""
    key, entries = manifest.log_key, manifest.log_entries
    if former.is_dir() and any(former.iterdir()):
        key, entries = describe(former)
        opens = _has_key_of(path, staged, former / SIGNING_KEY)
        outcome, folder = (CARRIED_OVER, _LOG) if opens else (SET_ASIDE, aside)
        _name_again(former, staged / folder)
        if opens and (state_dir / _DESTINATIONS).exists():
            _name_again(state_dir / _DESTINATIONS, staged / _DESTINATIONS)
    for earlier in state_dir.glob(f"{_LOG}.before-restore-*"):
        _name_again(earlier, staged / earlier.name)
    mark = _look(path, staged, marks_of_store).meant
    restore = Restore(at, manifest.created_at, manifest.holdfast, mark, outcome, key, entries, folder)
    unrecorded = state_dir / ANNOUNCED
    with new_private_file(staged / ANNOUNCED) as into:
        into.write((unrecorded.read_bytes() if unrecorded.exists() else b"") + restore.line())
    sync_folder(staged)
    return restore


def _has_key_of(path: Path, staged: Path, signing_key: Path) -> bool:
    """Whether the staged database has the key that a log's signing key is sealed under.

    Where there is no signing key yet, or one that is damaged, any database will do: the start makes it, or names it.
    """
    sealed = signing_key.read_bytes() if signing_key.exists() else b""
    key_id = key_id_of(sealed)
    if key_id is None:
        return True
    query = select(tables.keys.c.key_id).where(tables.keys.c.key_id == key_id)
    return _look(path, staged, lambda db: db.execute(query).scalar()) is not None


def _look(path: Path, staged: Path, query: Callable[[Connection], _T]) -> _T:
    """What `query` returns of the database that was unpacked from the backup at `path`. Writes nothing."""
    place = f"{(staged / DATABASE).as_uri()}?mode=ro&immutable=1"
    engine = create_engine("sqlite://", creator=lambda: sqlite3.connect(place, uri=True), poolclass=NullPool)
    try:
        with engine.connect() as db:
            return query(db)
    except DBAPIError as error:
        raise _damaged(path, f"its {DATABASE} cannot be read: {error.orig}") from None


def _name_again(source: Path, into: Path) -> None:
    """Give every file in `source` a second name in the new folder `into`: nothing is copied, and nothing moved."""
    if source.is_symlink() or not source.is_dir():
        os.link(source, into, follow_symlinks=False)
        return
    into.mkdir(mode=0o700)
    for each in source.iterdir():
        _name_again(each, into / each.name)


def _unused_suffix(state_dir: Path, at: float) -> str:
    """What the names of what is set aside end with: nothing beside or in `state_dir` has such a name."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))
    for number in itertools.count(1):
        suffix = f".before-restore-{stamp}" + (f"-{number}" if number > 1 else "")
        if not (_beside(state_dir, suffix).exists() or (state_dir / f"{_LOG}{suffix}").exists()):
            break
    return suffix


def _beside(state_dir: Path, suffix: str) -> Path:
    return state_dir.with_name(f"{state_dir.name}{suffix}")


def _exchange(staged: Path, state_dir: Path, occupied: bool, aside: str) -> Path | None:
    """Make `staged` the state directory; where the former one is kept, if there was one.

    Raises:
        RestoreFailed: the backup is in place, and something of the former state is not with it.
    """
    if not occupied:
        staged.rename(state_dir)  # onto nothing, or onto an empty folder
        try:
            sync_folder(state_dir.parent)
        except OSError as error:
            raise RestoreFailed(
                f"the backup is in {state_dir}, and may not be there after a power failure",
                cause=f"{error.filename or state_dir.parent}: {error.strerror}",
                remedy="Mend the disk; `sync` makes it durable, and nothing else is left to do",
            ) from error
        return None
    for name in _CARRIED_OVER:
        if (state_dir / name).exists():
            with new_private_file(staged / name) as into:
                into.write((state_dir / name).read_bytes())
    kept = _beside(state_dir, aside)
    staged.rename(kept)
    try:
        _rename_exchange(kept, state_dir)
    except OSError:
        kept.rename(staged)
        raise
    try:
        for name in _MOVED_OVER:
            if (kept / name).exists():
                (kept / name).rename(state_dir / name)
        sync_folder(state_dir.parent)
    except OSError as error:
        raise RestoreFailed(
            f"the backup is in {state_dir}, and not all that belongs there is",
            cause=f"{error.filename or state_dir.parent}: {error.strerror}",
            remedy=f"What was there is kept in {kept}: move {', '.join(_MOVED_OVER)} from there, if it is there still",
        ) from error
    return kept


def _rename_exchange(one: Path, other: Path) -> None:
    """Swap two folders in one step (renameat2(2), RENAME_EXCHANGE)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(
            number,
            os.strerror(number) if number != errno.EINVAL else "this file system cannot swap folders",
            str(other),
        )


def _damaged(path: Path, cause: str) -> BackupDamaged:
    return BackupDamaged(f"{path} is not a whole backup", cause=cause, remedy="Use another copy; nothing was written")
