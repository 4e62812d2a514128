"""A disk of a few hundred KiB that is seen in this process only, to be filled and to be made read-only."""

import ctypes
import os
import resource
from collections.abc import Callable
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)

Mend = Callable[[], None]


class SmallDisk:
    """Mounted on a folder. To be made before this process has another thread.

    Where a process may have no namespaces the folder stays as it is, and whatever breaks it forbids files to grow: the
    same to who writes.
    """

    def __init__(self, folder: Path, room_bytes: int, *, file_bytes: int) -> None:
        self._folder = folder
        self._room_bytes = room_bytes
        self._file_bytes = file_bytes
        try:
            self._mount_in_a_namespace()
            self.is_mounted = True
        except OSError:
            self.is_mounted = False

    def fill(self) -> Mend:
        """Nothing more can be written."""
        if not self.is_mounted:
            return self.limit()
        ballast = self._folder / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        return ballast.unlink

    def forbid(self) -> Mend:
        """It is read-only."""
        if not self.is_mounted:
            return self.limit()
        self._mount(_MS_REMOUNT | _MS_RDONLY)
        return lambda: self._mount(_MS_REMOUNT)

    def limit(self) -> Mend:
        """No file of this process may be as large as one of the tier's."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._file_bytes // 2, hard))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    def _mount_in_a_namespace(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        _check(_libc.unshare(_CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER))
        if uid != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))  # what is mounted is seen nowhere else
        self._mount(0)

    def _mount(self, flags: int) -> None:
        _check(_libc.mount(b"tmpfs", bytes(self._folder), b"tmpfs", flags, f"size={self._room_bytes}".encode()))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
