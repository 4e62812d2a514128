"""An appliance on a file system of its own that is filled: prints, as JSON, what its clients met.

Run as a process of its own: it takes namespaces that nobody else is in, and what it mounts goes with it. That needs
nothing but the namespaces that every engine's cage needs; where there are none it fails.
"""

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any, Final

from benchmarks.running import Running, make_appliance, running_gateway, running_stub
from tests.e2e.api.conftest import Answer, Served, until
from tests.e2e.cli.test_audit_commands import run_holdfast

_DISK_BYTES: Final = 64 << 20
_LEFT_BYTES: Final = 3 << 20  # at the start: less than the journal would like to take ahead, 4 MiB
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


def main(place: Path) -> None:
    """Fill the disk of an appliance in `place` while it serves, look at it, and make room again."""
    mount_small(place)
    state_dir, engine, ballast = place / "state", place / "engine.sock", place / "ballast"
    api_key = make_appliance(state_dir)
    _write(ballast, _free_bytes(place) - _LEFT_BYTES)
    with running_stub(engine), running_gateway(state_dir, engine) as gateway:
        served = Served(state_dir, engine, gateway, api_key)
        before = served.ask("before").status
        on_call = served.admin.create_appliance_key(principal="on call", role="admin").secret
        _fill(place)
        met = {"before": before, **_full(served, on_call), **_room_again(served, ballast, gateway)}
        print(json.dumps(met))  # noqa: T201


def _full(served: Served, administrators_key: str) -> dict[str, Any]:
    first = [_told(served.ask("nothing is left"))]
    while first[-1]["code"] == "store_full":  # what the journal has taken ahead is not used up yet
        first.append(_told(served.ask("nothing is left")))
    seen = served.engine_seen()["requests"]
    refused = [served.ask("nor now") for _ in range(20)]
    until(lambda: served.send("GET", "/readyz").status == 503)
    return {
        "first": first,
        "refused": [_told(answer) for answer in refused],
        "reached_engine": served.engine_seen()["requests"] - seen,
        "readyz": served.send("GET", "/readyz").json["parts"],
        "free_bytes": _free_bytes(served.state_dir),
        "status": _ran(served, "status"),
        "audit_status": _ran(served, "audit", "status"),
        "tail": _ran(served, "audit", "tail"),
        "with_a_key": _ran(served, "audit", "tail", "--api-key-fd", "0", secret=administrators_key),
        "tail_again": _ran(served, "audit", "tail"),
        "looked_again": [_ran(served, "audit", "tail")["returncode"] for _ in range(20)],
        "made": _ran(served, "tenant", "create", "made on a full disk"),
    }


def _room_again(served: Served, ballast: Path, gateway: Running) -> dict[str, Any]:
    ballast.unlink()
    until(lambda: served.ask("after").status == 200)
    until(lambda: served.send("GET", "/readyz").status == 200)
    return {
        "after": [served.ask("after").status for _ in range(20)],
        "same_gateway": gateway.process.poll() is None,
        "read_meanwhile": len(served.admin.audit_entries(action="audit.read", limit=1000).entries),
        "actions": sorted({entry.action for entry in served.admin.audit_entries(limit=1000).entries}),
        "verified": _ran(served, "audit", "verify"),
    }


def _told(answer: Answer) -> dict[str, Any]:
    error = answer.json.get("error", {})
    return {"status": answer.status, "code": error.get("code"), "told": json.dumps(error)}


def _ran(served: Served, *words: str, secret: str = "") -> dict[str, Any]:
    done = run_holdfast(served, *words, secret=secret)
    return {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}


def _free_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _write(path: Path, size: int) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _fill(place: Path) -> None:
    """Take what is left, to the last page."""
    with (place / "rest").open("wb") as file:
        try:
            while True:
                os.write(file.fileno(), bytes(4096))
        except OSError:
            return


def mount_small(place: Path) -> None:
    """Mount a small file system there that only this process and its children see.

    Raises:
        OSError: this user may have no namespaces (`diagnostics.namespaces` says why).
    """
    uid, gid = os.geteuid(), os.getegid()
    if uid or _LIBC.unshare(_CLONE_NEWNS):
        _check(_LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNS))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(text)
    _check(_LIBC.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    _check(_LIBC.mount(b"tmpfs", bytes(place), b"tmpfs", 0, f"size={_DISK_BYTES},mode=700".encode()))


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
