"""The checks of one machine that `holdfast doctor` runs (level 1: verdicts).

Rules:

- A check never raises and never changes anything that outlives it. What cannot be found out is UNKNOWN: absence of
  evidence is neither PASS nor a cause.
- FAIL: the appliance will not start or will not be safe. WARN: it works, and somebody should know.
- Every finding that is not PASS says why and what to do next.
- No check needs the gateway, the network, or a package beyond the standard library and the appliance's settings.
"""

import ctypes
import enum
import errno
import fcntl
import importlib.metadata
import os
import re
import shutil
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.errors import HoldfastError
from appliance.settings import Settings
from diagnostics import namespaces

_MIB = 1 << 20
_GIB = 1 << 30
_DISK_FAIL_BYTES = 256 * _MIB
_DISK_WARN_BYTES = 4 * _GIB
_SHM_WARN_BYTES = 256 * _MIB
_SUN_PATH_BYTES = 108  # sockaddr_un.sun_path, unix(7)
_NETWORK_FILE_SYSTEMS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"})
# Nobody's clock was earlier than this when the appliance was made.
_EARLIEST_CLOCK = 1_780_000_000.0
_TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class Verdict(enum.StrEnum):
    """What a check found."""

    PASS = "PASS"  # noqa: S105
    WARN = "WARN"
    FAIL = "FAIL"
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Finding:
    """A check's verdict. `cause` and `remedy` are empty with PASS."""

    check: str
    verdict: Verdict
    found: str
    cause: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is examined: this machine, for the appliance in `state_dir`.

    Attributes:
        settings: None when they cannot be read.
        settings_of_nobody: what the appliance that runs here says of settings that go by a tenant's name; None: none
            runs, or it cannot tell.
    """

    state_dir: Path
    settings: Settings | None
    settings_error: HoldfastError | None = None
    settings_of_nobody: Sequence[str] | None = None


def examine(subject: Subject) -> Iterator[Finding]:
    """Every check, one after the other, so that a slow one is seen to be slow."""
    for name, check in CHECKS:
        try:
            yield check(subject)
        except Exception as error:
            yield Finding(
                name,
                Verdict.UNKNOWN,
                "the check itself broke",
                f"{type(error).__name__}: {error}",
                "Report it as a defect; the other checks stand",
            )


def check_python(_: Subject) -> Finding:
    """Whether this interpreter is one that the appliance is tested on."""
    found = f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    return judge_python(sys.version_info[:2], found)


def judge_python(version: tuple[int, int], found: str) -> Finding:
    """PASS for 3.11 and 3.12."""
    if version in ((3, 11), (3, 12)):
        return Finding("python", Verdict.PASS, found)
    return Finding(
        "python",
        Verdict.FAIL,
        found,
        "the appliance runs on Python 3.11 and 3.12",
        "Install one of them and run `make run` again",
    )


def check_packages(_: Subject) -> Finding:
    """Whether what the gateway is made of is installed."""
    wanted = _gateway_requirements()
    missing = [name for name in wanted if not _is_installed(name)]
    if not wanted:
        return Finding(
            "packages",
            Verdict.UNKNOWN,
            "what the gateway needs is not known",
            "the distribution holdfast has no metadata here",
            "Run the `holdfast` of the appliance's own environment",
        )
    if missing:
        return Finding(
            "packages",
            Verdict.FAIL,
            f"{len(missing)} of {len(wanted)} are missing: {', '.join(missing)}",
            "this environment is not the one that requirements/gateway.txt makes",
            "`make run` in a clone installs what is missing",
        )
    return Finding("packages", Verdict.PASS, f"all {len(wanted)} that the gateway needs are installed")


def check_settings(subject: Subject) -> Finding:
    """Whether `holdfast.toml` and the environment can be understood."""
    if subject.settings_error is not None:
        error = subject.settings_error
        return Finding("settings", Verdict.FAIL, error.message, error.cause, error.remedy)
    return Finding("settings", Verdict.PASS, str(subject.state_dir / "holdfast.toml"))


def check_tenant_names(subject: Subject) -> Finding:
    """Whether tenants exist that settings go by the names of: whoever's name is mistyped is kept as everybody is."""
    named = {} if subject.settings is None else subject.settings.tenant_names
    if subject.settings_of_nobody:
        return Finding(
            "tenant names",
            Verdict.WARN,
            f"applies to nobody: {', '.join(subject.settings_of_nobody)}",
            "no tenant has that name, so what was meant for it is not in force",
            "`holdfast tenant list` names the tenants: correct holdfast.toml and start again, or make the tenant",
        )
    if subject.settings is None or (named and subject.settings_of_nobody is None):
        return Finding(
            "tenant names",
            Verdict.UNKNOWN,
            "whether settings name tenants that do not exist is not known",
            "tenants' names are encrypted, and no unsealed appliance runs here to read them"
            if named
            else "the settings cannot be read",
            "Run it again while the appliance is up and unsealed" if named else "See the check of the settings",
        )
    found = f"{len(named)} settings go by a tenant's name, and each is known" if named else "no setting goes by one"
    return Finding("tenant names", Verdict.PASS, found)


def check_state_dir(subject: Subject) -> Finding:
    """Whether the state directory and what is in it are this user's alone."""
    name, folder = "state directory", subject.state_dir
    if not folder.exists():
        return Finding(
            name,
            Verdict.WARN,
            f"{folder} does not exist",
            "no appliance was created there",
            "`holdfast init`, or `holdfast up --demo`; or name another with --state-dir",
        )
    try:
        loose = list(_loose_permissions(folder))
    except PermissionError as error:
        return Finding(
            name,
            Verdict.FAIL,
            f"{error.filename} cannot be read",
            "it belongs to another user",
            "Run as the user who ran `holdfast init`",
        )
    if loose:
        path, why = loose[0]
        more = f" (and {len(loose) - 1} more)" if len(loose) > 1 else ""
        return Finding(
            name,
            Verdict.FAIL,
            f"{path} {why}{more}",
            "others on this machine may read keys or transcripts",
            f"chmod -R u+rwX,go= {folder}",
        )
    if not (folder / "root.sealed").exists():
        return Finding(
            name,
            Verdict.WARN,
            f"{folder} holds no appliance",
            "it was never initialised, or root.sealed was moved away",
            "`holdfast init`, or `holdfast restore FILE`",
        )
    return Finding(name, Verdict.PASS, f"{folder}, this user's alone")


def check_key_file(subject: Subject) -> Finding:
    """Whether a key file lies about that unseals the appliance without anybody's passphrase."""
    path = subject.state_dir / "root.key"
    if not path.exists():
        if subject.settings is not None and subject.settings.vault.seal == "key-file":
            return Finding(
                "key file",
                Verdict.FAIL,
                f"{path} is missing",
                'the setting vault.seal is "key-file", and a backup never holds the key file',
                f"Put the key file that belongs to this appliance at {path}, mode 0600",
            )
        return Finding("key file", Verdict.PASS, "none: the root key is sealed by a passphrase")
    return Finding(
        "key file",
        Verdict.WARN,
        f"{path} unseals the appliance by itself",
        "whoever can read the disk can read everything on it",
        "Right for a demonstration. For real data make an appliance with `holdfast init`",
    )


def check_disk(subject: Subject) -> Finding:
    """Whether there is room for the database, its journal and its vacuum."""
    folder = _nearest(subject.state_dir)
    return judge_disk(folder, shutil.disk_usage(folder).free)


def judge_disk(folder: Path, free_bytes: int) -> Finding:
    """FAIL below 256 MiB, WARN below 4 GiB."""
    found = f"{free_bytes / _GIB:.1f} GiB free under {folder}"
    if free_bytes >= _DISK_WARN_BYTES:
        return Finding("disk space", Verdict.PASS, found)
    verdict = Verdict.FAIL if free_bytes < _DISK_FAIL_BYTES else Verdict.WARN
    return Finding(
        "disk space",
        verdict,
        found,
        "transcripts grow, and erasing one needs room for a second copy of the database for a moment",
        "Free some space, or move the state directory to a larger disk",
    )


def check_file_system(subject: Subject) -> Finding:
    """Whether the state directory is on a disk of this machine, as SQLite's write-ahead log needs."""
    folder = _nearest(subject.state_dir)
    kind = file_system_of(folder, Path("/proc/self/mountinfo").read_text())
    if kind is None:
        return Finding(
            "file system", Verdict.UNKNOWN, f"that of {folder} is not known", "no mount covers it", "Check `findmnt -T`"
        )
    if kind in _NETWORK_FILE_SYSTEMS:
        return Finding(
            "file system",
            Verdict.FAIL,
            f"{folder} is on {kind}",
            "SQLite's write-ahead log needs memory shared between processes, which a network file system has not",
            "Put the state directory on a local disk (--state-dir), or use PostgreSQL (store.url)",
        )
    if kind in ("tmpfs", "ramfs"):
        return Finding(
            "file system",
            Verdict.WARN,
            f"{folder} is in memory ({kind})",
            "it is gone after a restart of this machine",
            "Put the state directory on a disk (--state-dir)",
        )
    return Finding("file system", Verdict.PASS, f"{kind}, of this machine")


def file_system_of(folder: Path, mountinfo: str) -> str | None:
    """The type of the file system that `folder` is on, from the text of /proc/self/mountinfo (proc(5))."""
    best, kind = "", None
    target = str(folder.resolve())
    for line in mountinfo.splitlines():
        about, _, rest = line.partition(" - ")
        # Space, tab, newline and backslash stand as three octal digits.
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), about.split()[4])
        covers = target == point or target.startswith(point.rstrip("/") + "/")
        if covers and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    return kind


def check_sockets(subject: Subject) -> Finding:
    """Whether Unix sockets can be made and reached under the state directory, however long its path."""
    length = len(os.fsencode(subject.state_dir / "run" / "engine" / "engine.sock"))
    folder = subject.state_dir if os.access(subject.state_dir, os.W_OK) else None
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor-") as scratch:
            _bind_and_reach(scratch)
    except OSError as error:
        return Finding(
            "sockets",
            Verdict.FAIL,
            "a Unix socket cannot be made and reached",
            f"{error.strerror} under {folder or tempfile.gettempdir()}",
            "Put the state directory on a local disk; /proc must be mounted",
        )
    longer = f", longer than the {_SUN_PATH_BYTES} that a socket's name may have: reached through its folder"
    return Finding("sockets", Verdict.PASS, f"paths of {length} bytes{longer if length >= _SUN_PATH_BYTES else ''}")


def check_port(subject: Subject) -> Finding:
    """Whether the data listener's address can be had, or this appliance has it."""
    if subject.settings is None:
        return Finding(
            "port", Verdict.UNKNOWN, "the settings cannot be read", "see the check of them", "Mend them first"
        )
    host, port = subject.settings.gateway.host.strip("[]"), subject.settings.gateway.port
    found = f"{host}, port {port}"
    if _is_locked(subject.state_dir / "run" / "lock"):
        return Finding("port", Verdict.PASS, "this appliance runs; `holdfast status` tells where it listens")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return Finding(
            "port",
            Verdict.FAIL,
            f"{found} cannot be had",
            f"{error.strerror}" + ("; and this appliance does not run" if error.errno == errno.EADDRINUSE else ""),
            "Set gateway.port to one that is free (`ss -ltn` lists the others), or gateway.host to one of this machine",
        )
    return Finding("port", Verdict.PASS, f"{found} is free")


def check_namespaces(subject: Subject) -> Finding:
    """Whether the engine can be given namespaces of its own."""
    refused = namespaces.refused()
    if refused is None:
        return Finding("namespaces", Verdict.PASS, "the engine gets a network, mount, process and IPC namespace")
    required = subject.settings is not None and subject.settings.engine.isolation == "required"
    return Finding(
        "namespaces",
        Verdict.FAIL if required else Verdict.WARN,
        "the engine cannot be given namespaces of its own",
        f"{refused}; vLLM then opens TCP ports on this machine's loopback",
        f"{namespaces.remedy()}, or start the appliance as root",
    )


def check_swap(subject: Subject) -> Finding:
    """Whether memory may be written to a disk in plaintext."""
    from appliance.vault.process import lockable_bytes, plaintext_swap_devices

    settings = subject.settings
    return judge_swap(
        plaintext_swap_devices(),
        refused=settings is not None and settings.vault.plaintext_swap == "refuse",
        kv_bytes=0 if settings is None else settings.engine.kv_cache_bytes + settings.tiers.dram_bytes,
        lockable=lockable_bytes(),
    )


def judge_swap(devices: Sequence[str], *, refused: bool, kv_bytes: int, lockable: int | None) -> Finding:
    """WARN with plaintext swap, FAIL where the settings refuse it.

    Args:
        kv_bytes: of KV in memory, at most; an engine locks it in memory where it may.
        lockable: bytes that it may lock; None: as many as it likes.
    """
    if not devices:
        return Finding("swap", Verdict.PASS, "none that is in plaintext on a disk")
    kv_too = "is locked in memory"
    if lockable is not None and lockable < kv_bytes:
        kv_too = f"too: of {kv_bytes / _GIB:.1f} GiB the engine may lock {lockable / _GIB:.1f} in memory (`ulimit -l`)"
    return Finding(
        "swap",
        Verdict.FAIL if refused else Verdict.WARN,
        f"plaintext swap on {', '.join(devices)}",
        f"keys and transcripts in memory may be written to that disk, and stay there; KV {kv_too}",
        "`swapoff -a` and take it out of /etc/fstab, or put swap on dm-crypt or zram",
    )


def check_shared_memory(_: Subject) -> Finding:
    """Whether /dev/shm has the room that the engine's processes need to talk to each other."""
    folder = Path("/dev/shm")  # noqa: S108
    if not folder.is_dir():
        return Finding(
            "shared memory", Verdict.FAIL, "there is no /dev/shm", "it is not mounted", "mount -t tmpfs tmpfs /dev/shm"
        )
    free = shutil.disk_usage(folder).free
    found = f"{free / _GIB:.1f} GiB free in /dev/shm"
    if free >= _SHM_WARN_BYTES:
        return Finding("shared memory", Verdict.PASS, found)
    return Finding(
        "shared memory",
        Verdict.WARN,
        found,
        "the engine's processes talk to each other through it",
        "mount -o remount,size=1G /dev/shm; in a container --shm-size=1g",
    )


def check_memory(subject: Subject) -> Finding:
    """Whether memory has room for the KV cache that the settings ask for, on a machine without a GPU."""
    available = available_memory(Path("/proc/meminfo").read_text())
    if available is None:
        return Finding(
            "memory", Verdict.UNKNOWN, "not told by the kernel", "/proc/meminfo has no MemAvailable", "Check `free -m`"
        )
    found = f"{available / _GIB:.1f} GiB available"
    wanted = 2 * _GIB + _GIB
    if subject.settings is not None:
        wanted = 2 * _GIB + subject.settings.engine.kv_cache_bytes + subject.settings.tiers.dram_bytes
    if available >= wanted:
        return Finding("memory", Verdict.PASS, found)
    return Finding(
        "memory",
        Verdict.WARN,
        found,
        f"the KV cache, the DRAM tier and the engine take about {wanted / _GIB:.1f} GiB on a machine without a GPU",
        "Stop something else, or lower engine.kv_cache_bytes or tiers.dram_bytes",
    )


def available_memory(meminfo: str) -> int | None:
    """Bytes that could be had without swapping, from the text of /proc/meminfo (proc(5))."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    return None if match is None else int(match[1]) * 1024


def check_engine(subject: Subject) -> Finding:
    """Whether there is an engine's environment, and which vLLM is in it."""
    if subject.settings is not None and subject.settings.engine.socket is not None:
        path = subject.settings.engine.socket
        if path.is_socket():
            return Finding("engine", Verdict.PASS, f"somebody else's, on {path}")
        return Finding(
            "engine",
            Verdict.FAIL,
            f"nothing is at {path}",
            "the setting engine.socket names a socket that is not there",
            "Start that engine, or take the setting away to have one started here",
        )
    python = _engine_python(subject)
    if python is None:
        return Finding(
            "engine",
            Verdict.FAIL,
            "no engine's environment was found",
            "there is none beside this one, and the setting engine.python names none",
            "`make run` in a clone makes it, or set engine.python",
        )
    version = engine_version(python)
    if version is None:
        return Finding(
            "engine",
            Verdict.FAIL,
            f"there is no vLLM in the environment of {python}",
            "its packages are not those of requirements/engine-cpu.txt or engine-cuda.txt",
            "`make run` in a clone installs what is missing",
        )
    return Finding("engine", Verdict.PASS, f"vLLM {version}, {python}")


def engine_version(python: Path) -> str | None:
    """The version of vLLM in an interpreter's environment, by what is on disk: importing it takes seconds."""
    for about in sorted(python.parent.parent.glob("lib/python3*/site-packages/vllm*.dist-info")):
        match = re.fullmatch(r"(vllm(?:_cpu)?)-(.+)\.dist-info", about.name)
        if match is not None:
            return f"{match[2]} ({match[1].replace('_', '-')})"
    return None


def check_clock(_: Subject) -> Finding:
    """Whether the wall clock can be right, and whether anything keeps it right."""
    return judge_clock(time.time(), _kernel_clock_state())


def judge_clock(now: float, kernel_state: int) -> Finding:
    """FAIL before the appliance was made, WARN when the kernel knows of no synchronisation.

    Args:
        now: epoch seconds.
        kernel_state: what adjtimex(2) returns; negative when it may not be asked.
    """
    shown = time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(now))
    if now < _EARLIEST_CLOCK:
        return Finding(
            "clock",
            Verdict.FAIL,
            f"it says {shown}",
            "that was before this appliance was made; keys expire and quotas turn by this clock",
            "Set it (`date -u -s …`), and see to the machine's battery or its time source",
        )
    if kernel_state < 0:
        return Finding(
            "clock", Verdict.UNKNOWN, f"it says {shown}", "the kernel does not tell whether it is kept", "Compare it"
        )
    if kernel_state == _TIME_ERROR:
        return Finding(
            "clock",
            Verdict.WARN,
            f"it says {shown}",
            "the kernel knows of nothing that keeps it right",
            "Compare it with another clock; let chrony follow a time source that this network has",
        )
    return Finding("clock", Verdict.PASS, f"{shown}, kept by a time source")


CHECKS: Sequence[tuple[str, Callable[[Subject], Finding]]] = (
    ("python", check_python),
    ("packages", check_packages),
    ("settings", check_settings),
    ("tenant names", check_tenant_names),
    ("state directory", check_state_dir),
    ("key file", check_key_file),
    ("disk space", check_disk),
    ("file system", check_file_system),
    ("sockets", check_sockets),
    ("port", check_port),
    ("memory", check_memory),
    ("shared memory", check_shared_memory),
    ("swap", check_swap),
    ("namespaces", check_namespaces),
    ("engine", check_engine),
    ("clock", check_clock),
)


def _gateway_requirements() -> list[str]:
    try:
        declared = importlib.metadata.requires("holdfast") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    names = (re.match(r"[A-Za-z0-9._-]+", line) for line in declared if 'extra == "gateway"' in line)
    return [match[0] for match in names if match is not None]


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _loose_permissions(folder: Path) -> Iterator[tuple[Path, str]]:
    """What in the state directory is another user's, or open to others; symbolic links are not followed."""
    for path in (folder, *sorted(folder.glob("*")), *sorted((folder / "run").glob("*"))):
        about = path.lstat()
        if stat.S_ISLNK(about.st_mode) or path.name == "models":
            continue
        if about.st_uid != os.geteuid():
            yield path, f"belongs to the user {about.st_uid}"
        elif stat.S_IMODE(about.st_mode) & 0o077:
            yield path, f"has mode {stat.S_IMODE(about.st_mode):04o}"


def _nearest(folder: Path) -> Path:
    """`folder`, or the nearest folder above it that exists."""
    return next(each for each in (folder, *folder.parents) if each.exists())


def _is_locked(path: Path) -> bool:
    """Whether a process holds the lock at `path`."""
    try:
        with path.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _bind_and_reach(scratch: str) -> None:
    folder = os.open(scratch, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        path = f"/proc/self/fd/{folder}/probe.sock"
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as caller:
            listener.bind(path)
            listener.listen(1)
            caller.connect(path)
    finally:
        os.close(folder)


def _engine_python(subject: Subject) -> Path | None:
    if subject.settings is not None and subject.settings.engine.python is not None:
        python = subject.settings.engine.python
        return python if python.exists() else None
    from appliance.engine.command_line import engine_python

    beside = engine_python()
    return beside if beside.exists() else None


def _kernel_clock_state() -> int:
    """What adjtimex(2) says of the clock, asked without changing anything."""
    libc = ctypes.CDLL(None, use_errno=True)
    asked = ctypes.create_string_buffer(512)  # struct timex with every mode bit 0, and then some
    return int(libc.adjtimex(asked))
