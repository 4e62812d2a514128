"""What the tests of faults run in a process of its own.

child.py write FOLDER                         writes chunks for ever; says the number of each that is there
child.py full|read-only|full-by-limit FOLDER  has a disk refuse what is written; reports as JSON
"""

import ctypes
import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from tests.unit.inside.disk.tier import ANA, FILE_BYTES, Tier

_ROOM_BYTES = 32 * FILE_BYTES
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 16384, 1 << 18
_libc = ctypes.CDLL(None, use_errno=True)


def write(folder: Path) -> None:
    tier = Tier(folder, chunks=10_000)
    number = 0
    while True:
        waiting = {tier.begin(ANA, [number + ahead]): number + ahead for ahead in range(4)}
        number += 4
        while waiting:
            for done in tier.store.finished():
                chunk = waiting.pop(done.job)
                if done.whole:
                    os.write(1, f"{chunk}\n".encode())


def refuse(fault: str, folder: Path) -> None:
    clock = [0.0]
    break_it = _break(fault, folder)
    tier = Tier(folder / "tier", now=lambda: clock[0])
    before = len(tier.write(ANA, range(8)).keys)
    mend = break_it()
    refused = sum(not tier.write(ANA, [number]).whole for number in range(8, 60))
    status = tier.store.status()
    report = {
        "before": before,
        "refused": refused,
        "kept": len(tier.read(ANA, range(8))),
        "error": status.last_error.rpartition("(")[2].strip(")"),
        "parts": len(list(folder.rglob("*.part"))),
    }
    mend()
    clock[0] = 1000.0
    tier.write(ANA, range(60, 64))
    report["after"] = tier.store.status().chunks
    tier.store.close()
    print(json.dumps(report))  # noqa: T201


def _break(fault: str, folder: Path) -> Callable[[], Callable[[], None]]:
    """Make a small disk; what then breaks it, and gives what mends it."""
    if fault == "full-by-limit":
        return _limit
    try:
        _mount_small(folder)
    except OSError:  # no namespaces here: files that may not grow are the same to who writes
        return _limit

    def fill() -> Callable[[], None]:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(_ROOM_BYTES // 2))
        return ballast.unlink

    def forbid() -> Callable[[], None]:
        _mount(folder, _MS_REMOUNT | _MS_RDONLY)
        return lambda: _mount(folder, _MS_REMOUNT)

    return fill if fault == "full" else forbid


def _limit() -> Callable[[], None]:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES // 2, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _mount_small(folder: Path) -> None:
    uid, gid = os.getuid(), os.getgid()
    _check(_libc.unshare(_CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER))
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))  # what is mounted here is seen nowhere else
    _mount(folder, 0)


def _mount(folder: Path, flags: int) -> None:
    _check(_libc.mount(b"tmpfs", bytes(folder), b"tmpfs", flags, f"size={_ROOM_BYTES}".encode()))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    _folder = Path(sys.argv[2])
    write(_folder) if sys.argv[1] == "write" else refuse(sys.argv[1], _folder)
