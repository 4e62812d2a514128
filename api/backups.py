"""A whole appliance in one file: written while it serves, verified before anything of it is put back.

The file is an uncompressed tar archive: `manifest.json` first, then what it lists, each with its size and SHA-256.

Rules:

- What is in it is what is on disk: rows encrypted, the root key sealed. The key file of a demonstration, API keys and
  logs are never in it.
- A backup is read completely and every hash is compared before anything is written. Unknown members, links, and names
  with a folder in them are refused.
- A state directory changes hands in one rename: there is the old one or the new one, never a mixture. The old one is
  kept.
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
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import IO, ClassVar

from api.private_files import new_private_file, sync_folder
from api.roots import read_seal
from appliance.errors import Fault, HoldfastError
from appliance.settings import Settings
from appliance.store import Store
from appliance.vault import seal_kind

FORMAT = "holdfast-backup"
FORMAT_VERSION = 1
DATABASE = "holdfast.db"
BACKUP_PREFIX = "backup-"  # of folders in `run`, while a backup is written
_MANIFEST = "manifest.json"
_MEMBERS = (DATABASE, "root.sealed", "holdfast.toml")
_SETTINGS = "holdfast.toml"
_SETTINGS_TO_REVIEW = "holdfast.toml.from-backup"
_CARRIED_OVER = ("root.key", "demo-api-key", _SETTINGS)  # never taken from a backup: kept from what is replaced
_MOVED_OVER = ("models",)
_CHUNK = 1 << 20
_MAX_MANIFEST_BYTES = 64 << 10
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h


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
    """What was restored cannot be written; the state directory is as it was."""

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
    """What a backup holds, and of what."""

    created_at: float
    holdfast: str
    seal: str
    files: tuple[Member, ...]

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
    """

    manifest: Manifest
    state_dir: Path
    kept: Path | None
    key_file_missing: bool
    settings_to_review: Path | None


# Writing


async def stream_backup(
    store: Store, settings: Settings, *, now: Callable[[], float] = time.time
) -> AsyncGenerator[bytes, None]:
    """The pieces of a backup of the running appliance. Needs room for a second copy of the database meanwhile.

    Raises:
        BackupUnsupported: the database is a server's, which has tools of its own.
    """
    with tempfile.TemporaryDirectory(dir=settings.state_dir / "run", prefix=BACKUP_PREFIX) as folder:
        sources = {name: settings.state_dir / name for name in _MEMBERS}
        sources[DATABASE] = Path(folder) / DATABASE
        await store.backup(sources[DATABASE])
        present = {name: path for name, path in sources.items() if path.exists()}
        seal = seal_kind(read_seal(settings.state_dir))
        manifest = await asyncio.to_thread(_manifest_of, present, seal, now())
        text = json.dumps(asdict(manifest) | {"format": FORMAT, "version": FORMAT_VERSION}, indent=2).encode()
        yield _header(_MANIFEST, len(text), manifest.created_at) + text + _padding(len(text))
        for member in manifest.files:
            yield _header(member.name, member.size, manifest.created_at)
            with present[member.name].open("rb") as source:
                left = member.size
                while piece := await asyncio.to_thread(source.read, min(_CHUNK, left)):
                    left -= len(piece)
                    yield piece
            yield _padding(member.size)
        yield bytes(2 * tarfile.BLOCKSIZE)


def _manifest_of(present: dict[str, Path], seal: str, created_at: float) -> Manifest:
    files = []
    for name, path in present.items():
        with path.open("rb") as source:
            digest = hashlib.file_digest(source, "sha256").hexdigest()
            files.append(Member(name, source.tell(), digest))
    return Manifest(created_at, version("holdfast"), seal, tuple(files))


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
        RestoreFailed: a file cannot be written.
    """
    manifest = verify_backup(path)
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
                kept = _exchange(staged, state_dir, occupied, now)
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
    return Restored(manifest, state_dir, kept, missing, _settings_to_review(state_dir))


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
    """Within it no gateway opens the database in `state_dir`.

    The database itself is not opened: it may be what is damaged.

    Raises:
        ApplianceInUse: a process has it open.
    """
    try:
        lock = os.open(state_dir / f"{DATABASE}-lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise ApplianceInUse(
            f"the appliance in {state_dir} runs",
            cause="a process has its database open",
            remedy="Stop it with `holdfast down`, then restore",
        ) from None
    finally:
        os.close(lock)


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
        manifest = Manifest(float(tree["created_at"]), str(tree["holdfast"]), str(tree["seal"]), files)
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


def _exchange(staged: Path, state_dir: Path, occupied: bool, now: Callable[[], float]) -> Path | None:
    """Make `staged` the state directory; where the former one is kept, if there was one."""
    if not occupied:
        staged.rename(state_dir)  # onto nothing, or onto an empty folder
        sync_folder(state_dir.parent)
        return None
    for name in _CARRIED_OVER:
        if (state_dir / name).exists():
            with new_private_file(staged / name) as into:
                into.write((state_dir / name).read_bytes())
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now()))
    kept = state_dir.with_name(f"{state_dir.name}.before-restore-{stamp}")
    _rename_exchange(staged, state_dir)
    staged.rename(kept)
    for name in _MOVED_OVER:
        if (kept / name).exists():
            (kept / name).rename(state_dir / name)
    sync_folder(state_dir.parent)
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
