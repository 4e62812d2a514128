"""What the tests of faults run in a process of its own, to kill it, to starve it, or to be refused.

child.py write-pairs URL   writes pairs of rows for ever; says the name of each pair once it is acknowledged
child.py open URL          opens the store; says `opened`, or the code of the error and the process that it names
child.py fill-disk         fills a small file system of its own; reports as JSON
"""

import asyncio
import ctypes
import json
import os
import re
import resource
import sys
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sqlalchemy import insert, select

from appliance.errors import HoldfastError
from appliance.store import Change, Store, tables

INSERT = insert(tables.meta)
_ROOM_BYTES = 4 << 20
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000


async def write_pairs(url: str) -> None:
    store = Store.open(url)

    async def write() -> None:
        while True:
            name = uuid.uuid4().hex
            await store.write([_named(f"{name}-1"), _named(f"{name}-2")])
            os.write(1, f"{name}\n".encode())

    await asyncio.gather(*(write() for _ in range(8)))


def open_store(url: str) -> None:
    try:
        Store.open(url).close()
    except HoldfastError as error:
        print(error.code, *re.findall(r"process (\d+)", error.cause))  # noqa: T201
    else:
        print("opened")  # noqa: T201


async def fill_disk() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, make_room = _small_place(Path(folder))
        store = Store.open(f"sqlite:///{place / 'holdfast.db'}")
        acknowledged: list[str] = []
        failures: list[HoldfastError] = []

        async def write(value: str) -> None:
            name = uuid.uuid4().hex
            try:
                await store.write([_named(f"{name}-1", value), _named(f"{name}-2", value)])
            except HoldfastError as error:
                failures.append(error)
            else:
                acknowledged.append(name)

        for _ in range(400):
            await asyncio.gather(*(write("x" * 4000) for _ in range(8)))
            if failures:
                break
        failures.clear()
        await asyncio.gather(*(write("x" * 400_000) for _ in range(8)))
        failed_together = len(failures)
        readable = bool(await store.read(lambda db: db.execute(select(tables.meta.c.name).limit(1)).scalar()))
        make_room()
        before = len(acknowledged)
        await asyncio.gather(*(write("x" * 4000) for _ in range(8)))
        names = await store.read(lambda db: set(db.execute(select(tables.meta.c.name)).scalars()))
        store.close()
        report = {
            "failures": [error.code for error in failures],
            "failed_together": failed_together,
            "named_path": all(str(place) in error.message for error in failures),
            "lost": [name for name in acknowledged if f"{name}-1" not in names],
            "half_written": [name for name in names if f"{name[:-1]}{'2' if name[-1] == '1' else '1'}" not in names],
            "written_after": len(acknowledged) == before + 8,
            "readable_meanwhile": readable,
        }
        print(json.dumps(report))  # noqa: T201


def _small_place(folder: Path) -> tuple[Path, Callable[[], None]]:
    """A directory with little room, and what makes more: a file system of its own, else a limit on a file's size."""
    with suppress(OSError):
        _mount_small(folder)
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(_ROOM_BYTES // 2))
        return folder, lambda: ballast.unlink()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM_BYTES // 2, hard))
    return folder, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def _mount_small(folder: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    namespaces = _CLONE_NEWNS if uid == 0 else _CLONE_NEWNS | _CLONE_NEWUSER
    _check(libc.unshare(namespaces))
    if uid != 0:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    private = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE: what is mounted here is seen nowhere else
    _check(libc.mount(b"none", b"/", None, private, None))
    _check(libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={_ROOM_BYTES}".encode()))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _named(name: str, value: str = "") -> Change:
    return Change(INSERT, {"name": name, "value": value})


def main(what: str, *arguments: str) -> None:
    match what:
        case "write-pairs":
            asyncio.run(write_pairs(*arguments))
        case "open":
            open_store(*arguments)
        case "fill-disk":
            asyncio.run(fill_disk())


if __name__ == "__main__":
    main(*sys.argv[1:])
