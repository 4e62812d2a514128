"""The process between the gateway and vLLM: it shuts vLLM in, and leaves nothing of it when either of them dies.

Rules:

- Standard library only. It runs with the engine's interpreter, before anything of the engine is imported.
- Where the system allows, vLLM gets namespaces of its own (namespaces(7)): a network with a loopback device and nothing
  else, private /tmp, /dev/shm and /proc, its own processes and System V objects. As root directly, otherwise through a
  user namespace. All of them or none: what could not be had is said in the report, and refused where it is required.
- Of the folders that it is told to cover vLLM sees what it is told to keep, and nothing else: no key, database or
  socket of the gateway's, whose user it shares.
- The gateway holds a pipe to this process. When the pipe closes, because the gateway let go or was killed, everything
  dies: at once with the namespaces where there are some, else process by process.
- As root, vLLM keeps the rights to read, to pin memory and to place threads, and none else; no right can be gained.
- No core dumps. The limit is one byte, not none: a limit of none still lets a dump go to a pipe, one byte does not
  (core(5), fs/coredump.c).
- vLLM may lock as much memory as its user may at most: KV is kept out of swap.
- Nothing stays behind: the socket, the private folder for temporary files, shared memory.

::

    gateway ─pipe─▶ supervisor ─▶ [unsharer ─▶] reaper (process 1 of its namespace) ─▶ vLLM and its children

Usage: `python -I -m appliance.engine.cage --isolation where-allowed --report-fd 3 --cover FOLDER … --keep FOLDER …
-- COMMAND …`, with the engine's private folder as the working directory and the pipe as standard input. A line in the
pipe asks vLLM to stop; its end does not ask. What happens is reported on the descriptor, one JSON object a line:
`{"event": "started", "isolated": …, "detail": …}`, `{"event": "refused", "detail": …}`, `{"event": "exited", "code": …,
"signal": …}`.
"""

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from appliance.engine.tier_keys import KEY_SOCKET

SOCKET_NAME = "engine.sock"
REFUSED = 78  # EX_CONFIG: isolation is required and cannot be had

_SCRATCH_RECORD = "scratch"  # names the private folder in /tmp: for a successor, should even this process be killed
_SCRATCH_PREFIX = "holdfast-engine-"
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 -- what is cleaned up
_SHARED_MEMORY_PREFIXES = ("psm_", "sem.mp-", "torch_", "vllm_", "VLLM", "nccl-")
_MARK = "HOLDFAST_ENGINE_DIR"  # in the environment of each process of the engine: whose it is
_KILL_DEADLINE_S = 5.0
_KEY_DESCRIPTOR = 3  # of vLLM, behind the standard ones: over it it asks for the keys of its tiers

_CLONE_NEWNS = 0x00020000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_NAMESPACES = _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
_CAP_DAC_READ_SEARCH, _CAP_IPC_LOCK, _CAP_SYS_NICE = 2, 14, 23  # to read a model, to pin memory, to place threads
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class _Order:
    command: list[str]
    cover: list[str]
    keep: list[str]
    isolation: str
    report_fd: int
    key_fd: int | None
    started_at: float

    def report(self, **event: object) -> None:
        with contextlib.suppress(OSError):  # the gateway may be gone
            os.write(self.report_fd, json.dumps(event).encode() + b"\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command in the cage until it ends, is told to stop, or the gateway is gone."""
    order = _order(sys.argv[1:] if arguments is None else arguments)
    core_limit = 0 if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0 else 1  # none at all cannot be raised again
    resource.setrlimit(resource.RLIMIT_CORE, (core_limit, core_limit))
    lockable = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (lockable, lockable))
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the gateway, and the gateway says what follows
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    here = Path.cwd()
    os.environ[_MARK] = str(here)
    sweep(here, order.started_at)
    try:
        status = _supervise(order)
    finally:
        sweep(here, order.started_at)
    if status is None:
        return REFUSED
    code, killed_by = _outcome(status)
    order.report(event="exited", code=code, signal=killed_by)
    return code if code is not None else 128 + (killed_by or 0)


def _order(arguments: Sequence[str]) -> _Order:
    parser = argparse.ArgumentParser(prog="python -m appliance.engine.cage", allow_abbrev=False)
    parser.add_argument("--isolation", choices=("required", "where-allowed"), required=True)
    parser.add_argument("--report-fd", type=int, required=True)
    parser.add_argument("--key-fd", type=int)
    parser.add_argument("--cover", action="append", default=[], metavar="FOLDER")
    parser.add_argument("--keep", action="append", default=[], metavar="FOLDER")
    parser.add_argument("command", nargs="+")
    parsed = parser.parse_args(arguments)
    here = [sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2])]
    keep = [os.path.realpath(folder) for folder in [*parsed.keep, *here, str(Path.cwd())]]
    cover = [os.path.realpath(folder) for folder in parsed.cover]
    return _Order(parsed.command, cover, keep, parsed.isolation, parsed.report_fd, parsed.key_fd, time.time())


# The supervisor: outside the namespaces, so that it can fall back and clean up.


def _supervise(order: _Order) -> int | None:
    """Start the reaper, isolated if that can be had, and see it end.

    Returns:
        vLLM's wait status; None when isolation is required and was refused.
    """
    child, control, status_read, detail = _start(order, isolated=True)
    isolated = not detail
    if not isolated:
        _reap(child)
        os.close(control)
        os.close(status_read)
        if order.isolation == "required":
            order.report(event="refused", detail=detail)
            return None
        child, control, status_read, _ = _start(order, isolated=False)
    order.report(event="started", isolated=isolated, detail=detail)
    _watch(control, status_read)
    os.close(control)  # the reaper ends everything when this closes
    status = _read_status(status_read)
    with contextlib.suppress(ProcessLookupError):
        if isolated:
            os.kill(child, signal.SIGKILL)  # and with it process 1, and with that all of the namespace
    _reap(child)
    _kill_descendants()
    return signal.SIGKILL if status is None else status


def _start(order: _Order, *, isolated: bool) -> tuple[int, int, int, str]:
    """Fork the reaper: its process, the pipe that holds it, the pipe that says its outcome, why it could not start."""
    control_read, control_write = os.pipe()
    status_read, status_write = os.pipe()
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(control_write)
        os.close(status_read)
        with _never_returns():
            _die_with(supervisor)
            if isolated:
                _unshare_and_reap(order, control_read, status_write)
            else:
                _reaper(order, control_read, status_write, _plain_environment())
    os.close(control_read)
    os.close(status_write)
    answer = _read_line(status_read)
    return child, control_write, status_read, "" if answer == "started" else answer or "the cage ended while it started"


def _watch(control: int, status_read: int) -> None:
    """Pass on the order to stop; return when vLLM has ended or the gateway is gone."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(status_read, select.POLLIN)

    def pass_on(*_: object) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(control, b"\n")

    signal.signal(signal.SIGTERM, pass_on)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == status_read or not os.read(0, 64):
                return
            pass_on()


# Between supervisor and reaper: who leaves a process namespace must fork to be in the new one.


def _unshare_and_reap(order: _Order, control: int, status: int) -> NoReturn:
    user, group = os.geteuid(), os.getegid()
    try:
        if user != 0 or not _unshared(_NAMESPACES):
            _unshare(_NAMESPACES | _CLONE_NEWUSER)
            _map_identity(user, group)
    except OSError as error:
        _refuse(status, f"this system lets no ordinary process have namespaces of its own ({_words(error)})")
    ready_read, ready_write = os.pipe()
    child = os.fork()
    if child == 0:
        with _never_returns():
            os.close(ready_write)
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.read(ready_read, 1) != b"!":  # the parent died before the signal was asked for
                os._exit(1)
            try:
                _furnish(order.cover, order.keep)
            except OSError as error:
                _refuse(status, f"the namespaces could not be furnished ({_words(error)})")
            _reaper(order, control, status, _isolated_environment())
    os.close(control)
    os.close(status)
    os.write(ready_write, b"!")
    _reap(child)
    os._exit(0)


def _unshared(flags: int) -> bool:
    try:
        _unshare(flags)
    except PermissionError:
        return False
    return True


def _map_identity(user: int, group: int) -> None:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")


def _furnish(cover: Sequence[str], keep: Sequence[str]) -> None:
    """Give the namespaces a loopback device, private /proc, /tmp and /dev/shm, and nothing in the folders of `cover`.

    Folders in `keep` stay visible.
    """
    here = Path.cwd()
    _loopback_up()
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE, "")
    for covered, options in (
        ("/tmp", "mode=1777,size=50%"),  # noqa: S108 -- a mount point
        ("/dev/shm", "mode=1777,size=50%"),  # noqa: S108
        *((folder, "mode=0700,size=1m") for folder in cover),
    ):
        if not Path(covered).is_dir():
            continue
        inside = sorted({folder for folder in keep if folder.startswith(f"{covered}/")})
        held = {folder: os.open(folder, os.O_PATH | os.O_DIRECTORY) for folder in inside if Path(folder).is_dir()}
        _mount("tmpfs", covered, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
        for folder, descriptor in held.items():
            if not Path(folder).exists():  # a folder within one that is mounted already is there
                Path(folder).mkdir(parents=True, mode=0o700)
                _mount(f"/proc/self/fd/{descriptor}", folder, "", _MS_BIND | _MS_REC, "")
            os.close(descriptor)
    # Until now it is the folder below what covers it: `..`, and /proc/1/cwd, would lead to what was covered.
    os.chdir(here)
    _mount("proc", "/proc", "proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "")


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as device:
        request = bytearray(struct.pack("16sH14x", b"lo", 0))
        fcntl.ioctl(device, _SIOCGIFFLAGS, request)
        flags = struct.unpack_from("16sH", request)[1]
        fcntl.ioctl(device, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | _IFF_UP))


# The reaper: vLLM's parent, and process 1 where there is a namespace.


def _reaper(order: _Order, control: int, status: int, environment: dict[str, str]) -> NoReturn:
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    reaper = os.getpid()
    engine = os.fork()
    if engine == 0:
        with _never_returns():
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
                signal.signal(number, signal.SIG_DFL)
            _die_with(reaper)
            nothing = os.open(os.devnull, os.O_RDONLY)
            os.dup2(nothing, 0)
            if order.key_fd is not None:
                os.dup2(order.key_fd, _KEY_DESCRIPTOR)
                environment = {**environment, KEY_SOCKET: str(_KEY_DESCRIPTOR)}
            os.closerange(_KEY_DESCRIPTOR + (order.key_fd is not None), 1 << 16)
            with contextlib.suppress(OSError):  # when memory runs out, the engine goes before the gateway and its store
                Path("/proc/self/oom_score_adj").write_text("500")
            _drop_rights()
            try:
                os.execve(order.command[0], order.command, environment)  # noqa: S606 -- no shell, on purpose
            except OSError as error:
                sys.stderr.write(f"{order.command[0]} cannot be run: {_words(error)}\n")
                sys.stderr.flush()
                os._exit(127)
    os.write(status, b"started\n")
    outcome = _wait_for(engine, control, wake_read)
    _kill_descendants()
    with contextlib.suppress(OSError):
        os.write(status, f"{outcome}\n".encode())
    os._exit(0)


def _drop_rights() -> None:
    """Limit what root may do after the next exec (capabilities(7)); for others there is nothing to drop."""
    if os.geteuid() == 0:
        for right in range(64):
            if right not in (_CAP_DAC_READ_SEARCH, _CAP_IPC_LOCK, _CAP_SYS_NICE):
                with contextlib.suppress(OSError):  # the kernel knows fewer, or root in a container lacks this one
                    _prctl(_PR_CAPBSET_DROP, right)


def _wait_for(engine: int, control: int, wake: int) -> int:
    """Reap until vLLM has ended; ask it to stop when told; kill it when the supervisor is gone."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            if descriptor == wake:
                os.read(wake, 4096)
            elif os.read(control, 64):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(engine, signal.SIGTERM)
            else:
                poll.unregister(control)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(engine, signal.SIGKILL)
        for process, outcome in _ended():
            if process == engine:
                return outcome


def _isolated_environment() -> dict[str, str]:
    return {**os.environ, "TMPDIR": "/tmp"}  # noqa: S108 -- a file system of its own


def _plain_environment() -> dict[str, str]:
    """Without namespaces temporary files go to a folder that can be removed whole; its path is short, for sockets."""
    scratch = tempfile.mkdtemp(prefix=_SCRATCH_PREFIX, dir="/tmp")  # 0700, of a name that nobody can guess
    Path(_SCRATCH_RECORD).write_text(scratch)
    return {**os.environ, "TMPDIR": scratch}


# Leaving nothing behind.


def sweep(folder: Path, since: float) -> None:
    """End and remove what is left of the engine that ran in `folder`; only when nothing of it is meant to run.

    Blocks for milliseconds. The gateway calls it when the cage itself was killed; `since` is when that was started, in
    epoch seconds.
    """
    _kill_marked(str(folder))
    (folder / SOCKET_NAME).unlink(missing_ok=True)
    record = folder / _SCRATCH_RECORD
    with contextlib.suppress(OSError):
        since = min(since, record.stat().st_mtime)
        scratch = Path(record.read_text())
        if scratch.parent == Path("/tmp") and scratch.name.startswith(_SCRATCH_PREFIX):  # noqa: S108
            shutil.rmtree(scratch, ignore_errors=True)
    record.unlink(missing_ok=True)
    in_use: set[str] | None = None
    for path in _shared_memory_since(since):
        in_use = _shared_memory_in_use() if in_use is None else in_use
        if str(path) not in in_use:
            path.unlink(missing_ok=True)


def belongs_to(process: int, cage: int | None, folder: Path) -> bool:
    """Whether a process is a cage or below it, or carries the mark of the engine that runs in `folder`.

    Also when that cannot be told, because the process has ended or is out of sight.
    """
    with contextlib.suppress(OSError):
        if f"{_MARK}={folder}".encode() in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
            return True
    at, hidden = process, 0
    while at > 1 and at != cage:
        above = _parent(at)
        if above is not None:
            at = above
        elif at in (process, hidden):
            return at == process  # above a process of ours it is another user's (proc(5), hidepid), and so no cage
        else:
            at, hidden = process, at  # hidden, or it has just ended: then what was below it has another parent now
    return at == cage or process < 1


def _parent(process: int) -> int | None:
    try:
        return int(Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _kill_marked(folder: str) -> None:
    """Kill what runs for `folder` without anybody above it: processes that left session and parent behind."""
    mark = f"{_MARK}={folder}".encode()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)


def _shared_memory_since(started_at: float) -> Iterator[Path]:
    """Files that look like vLLM's, are ours, and were made since: without a namespace no other sign tells whose."""
    with contextlib.suppress(OSError):
        for path in _SHARED_MEMORY.iterdir():
            with contextlib.suppress(OSError):
                facts = path.stat(follow_symlinks=False)
                ours = facts.st_uid == os.geteuid() and facts.st_ctime >= started_at - 1
                if ours and path.name.startswith(_SHARED_MEMORY_PREFIXES):
                    yield path


def _shared_memory_in_use() -> set[str]:
    """Files in /dev/shm that some process that we may look at has mapped."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            for line in maps.read_text(errors="replace").splitlines():
                _, separator, name = line.partition(f"{_SHARED_MEMORY}/")
                if separator:
                    used.add(f"{_SHARED_MEMORY}/{name}")
    return used


def _kill_descendants() -> None:
    """Kill every process below this one; orphans come here, because this process is a subreaper."""
    deadline = time.monotonic() + _KILL_DEADLINE_S
    while time.monotonic() < deadline:
        below = _descendants(os.getpid())
        if not below:
            return
        for process in below:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for _ in _ended():
            pass
        time.sleep(0.005)


def _descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            if fields[0] != "Z" or int(fields[1]) == root:
                children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, unseen = [], [root]
    while unseen:
        below = children.get(unseen.pop(), [])
        found += below
        unseen += below
    return found


# Small things.


@contextlib.contextmanager
def _never_returns() -> Iterator[None]:
    """A forked child must not go on as its parent, whatever happens in it."""
    try:
        yield
    except BaseException as error:  # nobody above it may handle this
        sys.stderr.write(f"the cage failed: {type(error).__name__}: {error}\n")
        sys.stderr.flush()
    finally:
        os._exit(1)


def _die_with(parent: int) -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the signal was asked for
        os._exit(1)


def _refuse(status: int, reason: str) -> NoReturn:
    os.write(status, reason.encode() + b"\n")
    os._exit(1)


def _read_line(descriptor: int) -> str:
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(descriptor, 1)
        if not byte:
            break
        line += byte
    return line.decode(errors="replace").strip()


def _read_status(descriptor: int) -> int | None:
    if not select.select([descriptor], [], [], 2 * _KILL_DEADLINE_S)[0]:
        return None
    line = _read_line(descriptor)
    return int(line) if line else None


def _outcome(status: int) -> tuple[int | None, int | None]:
    return (None, os.WTERMSIG(status)) if os.WIFSIGNALED(status) else (os.WEXITSTATUS(status), None)


def _ended() -> Iterator[tuple[int, int]]:
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if process == 0:
            return
        yield process, status


def _reap(process: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(process, 0)


def _words(error: OSError) -> str:
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")


def _unshare(flags: int) -> None:
    if _libc.unshare(flags) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    arguments = [source.encode(), target.encode(), kind.encode() or None]
    if _libc.mount(*arguments, ctypes.c_ulong(flags), options.encode() or None) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), target)


if __name__ == "__main__":
    sys.exit(main())
