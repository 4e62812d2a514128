"""How chunks of KV lie on the disk.

    ROOT/lock                                   held while an engine uses the folder
    ROOT/shares                                 what each tenant is guaranteed, for the next start
    ROOT/quarantined                            that nothing is to be restored: until somebody empties the folder
    ROOT/LAYOUT/TENANT~SESSION/KEY-POSITION-COPY

LAYOUT names what the KV was made by (`fingerprint`); KEY is the chunk's key in hexadecimal, POSITION the token that it
ends at. A file is a header of one page, then the encrypted chunk. The header, all but its tag, is bound to the chunk as
associated data: format, layout, owner, key and position, in plaintext.

Rules:

- Only what has a name of our own form is removed, and no link is followed.
- 0600 in 0700. Nothing of a chunk is ever written in plaintext, not even to a file that is not complete.
- A file has its name when it is complete, and is never changed. What has another name is of a write that was broken
  off. Nothing is synced: after a power cut files may be missing or torn, and a torn one does not open.
- What is found by scanning is only believed to be there. Who and what it is, is authenticated when it is read.
- A session's folder has the time of its last use. Who removes a file of it sets that again: removing changes it.
- Reads and writes go past the page cache where the file system can do that: the memory is the tier above's.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from appliance.engine.inside.disk.cipher import NONCE_BYTES, TAG_BYTES, ChunkCipher, Tampered

HEADER_BYTES: Final = 4096  # a page, so that the chunk behind it is aligned
MAX_KEY_BYTES: Final = 64

_MAGIC: Final = b"holdfast-kv-1\n"
_NAME = re.compile(r"(?P<key>(?:[0-9a-f]{2}){1,64})-(?P<position>[0-9a-f]{8})-(?P<copy>[0-9a-f]{8})")
_OWNER = re.compile(r"(?P<tenant>[A-Za-z0-9_.-]{1,64})~(?P<session>[A-Za-z0-9_.-]{1,64})")
_PART_SUFFIX: Final = ".part"
_PART = re.compile(_NAME.pattern + re.escape(_PART_SUFFIX))
_LAYOUT = re.compile(r"[0-9a-f]{32}")
_NOT_DIRECT: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_NO_FILE: Final = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_QUARANTINED: Final = "quarantined"
_LABEL = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_SHARES_BYTES: Final = 1 << 20


class Owner(NamedTuple):
    """Whose a chunk is: the gateway's labels of the tenant and the session."""

    tenant: str
    session: str


class ChunkName(NamedTuple):
    """Which chunk a file holds. `copy` tells apart what was written, dropped and written again."""

    owner: Owner
    key: bytes
    position: int  # the token that it ends at
    copy: bytes


class Found(NamedTuple):
    """What a scan found of one session. `used_at` is epoch seconds."""

    owner: Owner
    used_at: float
    names: tuple[ChunkName, ...]


class FolderRefused(OSError):
    """The folder cannot be this tier's: another engine has it, or another user, or it is a link."""


class ChunkFiles:
    """The files of one layout.

    Args:
        root: the tier's folder; made if it is not there.
        fingerprint: 32 bytes that name what the KV is made by: another model's or layout's is another's.
        chunk_bytes: the size of every chunk.

    Raises:
        FolderRefused: another engine uses it, or it is another user's or a link.
        OSError: it cannot be made or written.
    """

    def __init__(self, root: Path, *, fingerprint: bytes, chunk_bytes: int) -> None:
        self.file_bytes = HEADER_BYTES + chunk_bytes
        self._chunk_bytes = chunk_bytes
        self._fingerprint = fingerprint
        self._root = root
        self._layout = root / fingerprint.hex()[:32]
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = root.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise _is_a_link(root)
        if found.st_uid != os.geteuid():
            raise FolderRefused(errno.EPERM, "the folder is another user's", str(root))
        if stat.S_IMODE(found.st_mode) != 0o700:
            root.chmod(0o700)
        self._lock = os.open(root / "lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._layout.mkdir(mode=0o700, exist_ok=True)
            if self._layout.is_symlink():
                raise _is_a_link(self._layout)
            self._direct = self._is_aligned() and self._takes_direct()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, BlockingIOError):
                raise FolderRefused(errno.EBUSY, "another engine uses the folder", str(root)) from None
            raise

    def close(self) -> None:
        """Let another engine have the folder."""
        os.close(self._lock)

    def buffer(self) -> memoryview:
        """A buffer for one file, aligned as reads and writes want it."""
        return memoryview(mmap.mmap(-1, self.file_bytes))

    # One chunk

    def write(self, name: ChunkName, buffer: memoryview) -> None:
        """Write a buffer that `seal` filled. Blocks.

        Raises:
            OSError: it cannot be written; nothing is left of it.
        """
        path = self._path(name)
        part = path.with_name(f"{path.name}{_PART_SUFFIX}")
        try:
            descriptor = self._create(part)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = self._create(part)
        try:
            try:
                if os.write(descriptor, buffer) != self.file_bytes:
                    raise OSError(errno.ENOSPC, "the disk is full", str(self._root))
            finally:
                os.close(descriptor)
            part.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise

    def read(self, name: ChunkName, buffer: memoryview) -> None:
        """Read a file into a buffer that `open` takes. Blocks.

        Raises:
            Tampered: it has another size.
            OSError: it cannot be read.
        """
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_DIRECT if self._direct else 0)
        descriptor = os.open(self._path(name), flags)
        try:
            if os.fstat(descriptor).st_size != self.file_bytes or os.readv(descriptor, [buffer]) != self.file_bytes:
                raise Tampered
        finally:
            os.close(descriptor)

    def seal(self, name: ChunkName, cipher: ChunkCipher, nonce: bytes, chunk: memoryview, buffer: memoryview) -> None:
        """Fill a buffer with what the file of a chunk holds."""
        header = self._header(name, nonce)
        tag = cipher.seal(nonce, header, chunk, buffer[HEADER_BYTES:])
        buffer[:HEADER_BYTES] = header[:-TAG_BYTES] + tag

    def open(self, name: ChunkName, cipher: ChunkCipher, buffer: memoryview, chunk: memoryview) -> None:
        """Take a chunk out of what its file holds.

        Raises:
            Tampered: it is another chunk's, owner's, model's or layout's, or was changed; `chunk` must not be used.
        """
        nonce_end = len(_MAGIC) + NONCE_BYTES
        nonce = bytes(buffer[len(_MAGIC) : nonce_end])
        header = self._header(name, nonce)
        if buffer[: HEADER_BYTES - TAG_BYTES] != header[:-TAG_BYTES]:
            raise Tampered
        tag = bytes(buffer[HEADER_BYTES - TAG_BYTES : HEADER_BYTES])
        cipher.open(nonce, header, tag, buffer[HEADER_BYTES:], chunk)

    def remove(self, name: ChunkName) -> None:
        """Remove a file; nothing is said where there is none. Blocks.

        Raises:
            OSError: it is still there.
        """
        try:
            self._path(name).unlink()
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise

    # One session

    def touch(self, owner: Owner, used_at: float) -> None:
        """Note when a session was used, in epoch seconds, for a scan to find. Blocks."""
        with contextlib.suppress(OSError):
            os.utime(self._folder(owner), (used_at, used_at))

    def remove_folder(self, owner: Owner) -> None:
        """Remove a session's folder if it is empty. Blocks."""
        with contextlib.suppress(OSError):
            self._folder(owner).rmdir()

    # All of it

    def scan(self) -> Iterator[Found]:
        """What sessions there are. Removes what writes that were broken off have left. Blocks."""
        for folder in _folders(self._layout):
            matched = _OWNER.fullmatch(folder.name)
            if matched is None:
                continue
            owner = Owner(matched["tenant"], matched["session"])
            names = []
            was_cleaned = False
            with contextlib.suppress(OSError):
                used_at = folder.stat().st_mtime
                folder.chmod(0o700)
                for file in os.scandir(folder):
                    read = _NAME.fullmatch(file.name)
                    if read is None:
                        if _PART.fullmatch(file.name):
                            Path(file.path).unlink(missing_ok=True)
                            was_cleaned = True
                        continue
                    key, position, copy = bytes.fromhex(read["key"]), int(read["position"], 16), read["copy"]
                    names.append(ChunkName(owner, key, position, bytes.fromhex(copy)))
                if was_cleaned:
                    self.touch(owner, used_at)
                yield Found(owner, used_at, tuple(names))

    def remove_foreign(self) -> None:
        """Remove what another model or layout has left: nobody can use it. Blocks."""
        for folder in _folders(self._root):
            if folder != self._layout and _LAYOUT.fullmatch(folder.name):
                shutil.rmtree(folder, ignore_errors=True)

    def write_shares(self, shares: Mapping[str, float]) -> None:
        """Keep what each tenant is guaranteed, in place of what was kept before. Blocks.

        Raises:
            OSError: it cannot be written.
        """
        part = self._root / f"shares{_PART_SUFFIX}"
        part.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  (a descriptor)
            json.dump(dict(shares), file)
        part.rename(self._root / "shares")

    def read_shares(self) -> dict[str, float]:
        """What was kept of that; what cannot be read guarantees nothing. Blocks."""
        try:
            descriptor = os.open(self._root / "shares", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(descriptor, "rb") as file:  # noqa: PTH123  (a descriptor)
                shares = json.loads(file.read(_MOST_SHARES_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(shares, dict):
            return {}
        return {
            tenant: share
            for tenant, share in shares.items()
            if _LABEL.fullmatch(tenant) and isinstance(share, float) and 0 <= share <= 1
        }

    def write_quarantine(self) -> None:
        """Have this and every later start know that nothing is to be restored; synced. Blocks.

        Raises:
            OSError: it cannot be written.
        """
        for path, flags in ((self._root / _QUARANTINED, os.O_WRONLY | os.O_CREAT), (self._root, os.O_DIRECTORY)):
            descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def is_quarantined(self) -> bool:
        """Whether anything has that name: what is in doubt is not restored. Blocks."""
        return os.path.lexists(self._root / _QUARANTINED)

    # Private

    def _folder(self, owner: Owner) -> Path:
        return self._layout / f"{owner.tenant}~{owner.session}"

    def _path(self, name: ChunkName) -> Path:
        return self._folder(name.owner) / f"{name.key.hex()}-{name.position:08x}-{name.copy.hex()}"

    def _header(self, name: ChunkName, nonce: bytes) -> bytes:
        """The header with a tag of zeros: what is bound to the chunk."""
        tenant, session = (part.encode() for part in name.owner)
        parts = (self._fingerprint, tenant, session, name.key, name.copy)
        told = b"".join(struct.pack(">I", len(part)) + part for part in parts)
        sizes = struct.pack(">QQ", name.position, self._chunk_bytes)
        return (_MAGIC + nonce + sizes + told).ljust(HEADER_BYTES, b"\0")

    def _create(self, path: Path) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | (os.O_DIRECT if self._direct else 0)
        return os.open(path, flags, 0o600)

    def _is_aligned(self) -> bool:
        return self._chunk_bytes % HEADER_BYTES == 0

    def _takes_direct(self) -> bool:
        """Whether the file system reads and writes past the page cache: overlayfs and tmpfs may not.

        A full one does not tell: what lies on it is used all the same, through the page cache.
        """
        path = self._layout / f"probe{_PART_SUFFIX}"
        path.unlink(missing_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT | os.O_CLOEXEC, 0o600)
            try:
                os.write(descriptor, mmap.mmap(-1, HEADER_BYTES))
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno in (*_NOT_DIRECT, *_FULL):
                return False
            raise
        finally:
            path.unlink(missing_ok=True)
        return True


def _is_a_link(path: Path) -> FolderRefused:
    return FolderRefused(errno.ELOOP, "the tier's folder is a link: name the folder that it leads to", str(path))


def _folders(parent: Path) -> list[Path]:
    return [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]
