"""Starts what is measured or tested: a stub, a gateway over it, the bare proxy; each a process of its own.

Rule: what is started here has answered when it is handed out, and is gone when the block is left.
"""

import contextlib
import http.client
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from api.initialise import initialise
from appliance.settings import load_settings

REPOSITORY = Path(__file__).parent.parent
KEY_FILE = "api-key"
_DEADLINE_S = 30.0
_ACCEPTING = re.compile(r"accepting connections on https?://[^:]+:(\d+)/v1")


@dataclass(slots=True)
class Running:
    """A process, and where it listens.

    Attributes:
        accepting_after_s: from its spawning to a connection that it accepted; of a gateway, once it has.
    """

    process: "subprocess.Popen[bytes]"
    port: int = 0
    spawned_at: float = 0.0
    accepting_after_s: float = 0.0

    @property
    def rss_bytes(self) -> int:
        """Resident memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    @property
    def cpu_s(self) -> float:
        """Processor time used so far, all threads together."""
        user, system = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def end(self, number: int = signal.SIGTERM, timeout_s: float = _DEADLINE_S) -> int:
        """Send a signal and wait for the end; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()


def make_appliance(state_dir: Path, *, permissions: Sequence[str] = ()) -> str:
    """An appliance sealed by a key file; its API key. `permissions` are its administrator's."""
    settings = load_settings({"vault": {"seal": "key-file"}}, environment={}, state_dir=state_dir)
    initialise(settings, passphrase=None, tenant_name="tenant", permissions=permissions, demo_key_file=KEY_FILE)
    return (state_dir / KEY_FILE).read_text().strip()


@contextlib.contextmanager
def running_stub(path: Path, *, cores: Sequence[int] = ()) -> Iterator[Running]:
    """An engine's stub on the Unix socket `path`."""
    path.unlink(missing_ok=True)
    with _started([sys.executable, "-m", "benchmarks.stub", str(path)], cores=cores) as stub:
        _wait(stub, lambda: _answers_unix(path))
        yield stub


@contextlib.contextmanager
def running_gateway(
    state_dir: Path,
    engine: Path | None,
    *,
    environment: Mapping[str, str] | None = None,
    cores: Sequence[int] = (),
    certificate: Path | None = None,
    ready: bool = True,
    module: str = "api",
) -> Iterator[Running]:
    """A gateway on a port of its own choosing; ready to answer turns.

    Args:
        engine: the Unix socket of its engine; None: it starts one, as its settings say.
        certificate: it serves TLS with this one, as `environment` says.
        ready: False: it listens, and may not be ready.
        module: what is run.
    """
    log = state_dir / "log" / "gateway.log"
    log.parent.mkdir(mode=0o700, exist_ok=True)
    chosen = {
        "HOLDFAST_STATE_DIR": str(state_dir),
        "HOLDFAST_GATEWAY__PORT": "0",
        **({} if engine is None else {"HOLDFAST_ENGINE__SOCKET": str(engine)}),
        **(environment or {}),
    }
    with log.open("ab") as into:
        said_before = into.tell()
        with _started(
            [sys.executable, "-P", "-m", module], environment=chosen, stderr=into.fileno(), cores=cores
        ) as it:

            def listens() -> bool:
                found = _ACCEPTING.search(log.read_bytes()[said_before:].decode())
                it.port = int(found[1]) if found else 0
                return it.port != 0

            _wait(it, listens)
            socket.create_connection(("127.0.0.1", it.port), timeout=_DEADLINE_S).close()
            it.accepting_after_s = time.monotonic() - it.spawned_at
            if ready:
                _wait(it, lambda: get_status(it.port, "/readyz", certificate) == 200)
            yield it


@contextlib.contextmanager
def running_bare_proxy(engine: Path, *, cores: Sequence[int] = ()) -> Iterator[Running]:
    """The bare proxy over the engine on the Unix socket `engine`."""
    port = free_port()
    with _started([sys.executable, "-m", "benchmarks.bare_proxy", str(engine), str(port)], cores=cores) as proxy:
        proxy.port = port
        _wait(proxy, lambda: get_status(port, "/healthz") == 200)
        yield proxy


def get_status(port: int, path: str, certificate: Path | None = None) -> int:
    """The status that a GET answers with, over TLS where a `certificate` is trusted; 0 when nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    if certificate is not None:
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=5, context=context)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def free_port() -> int:
    """A TCP port of the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    stderr: int | None = None,
    cores: Sequence[int] = (),
) -> Iterator[Running]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
    # An installed appliance has its bytecode compiled; a process that must compile it first is not what is meant here.
    inherited.pop("PYTHONDONTWRITEBYTECODE", None)
    inherited["PYTHONPYCACHEPREFIX"] = str(REPOSITORY / "build" / "pycache")
    spawned_at = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=stderr,
        env={**inherited, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
    )
    running = Running(process, spawned_at=spawned_at)
    try:
        if cores:
            os.sched_setaffinity(process.pid, cores)
        yield running
    finally:
        running.end()


def _wait(running: Running, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():
        if running.process.poll() is not None:
            raise RuntimeError(f"it ended with {running.process.returncode}: {running.process.args!r}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"it does not answer: {running.process.args!r}")
        time.sleep(0.01)


def _answers_unix(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True
