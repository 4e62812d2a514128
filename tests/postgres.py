"""A real PostgreSQL for the tests: one server a test session, a database a test.

Rules:

- Nothing listens on a network: a Unix socket in a private directory.
- Where the tests run as root, the server runs as the user `postgres`, because it refuses root.
- The server dies with the tests, whatever ends them.
- Without PostgreSQL the tests fail, and say what to install.
"""

import ctypes
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from appliance.store import Store

_TEMPLATE = "holdfast_template"
_READY_WITHIN_S = 30.0
_LOOK_EVERY_S = 0.02
_PR_SET_PDEATHSIG = 1
_UNSAFE_BUT_QUICK = ("fsync=off", "full_page_writes=off", "shared_buffers=32MB", "max_connections=40", "autovacuum=off")


@dataclass
class PostgresServer:
    """A running server. `data`: its data directory; `folder`: where its socket is."""

    folder: Path
    data: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def url(self, database: str) -> str:
        """The URL of a database, as settings have it."""
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def administer(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as the server's administrator, outside of a transaction."""
        with psycopg.connect(self._conninfo(database), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def empty_database(self) -> str:
        """The URL of a new database without tables."""
        name = f"empty_{next(self._numbers)}"
        self.administer(f"CREATE DATABASE {name}")
        return self.url(name)

    @contextmanager
    def database(self) -> Iterator[str]:
        """The URL of a database of its own with today's tables, for as long as the context lasts."""
        name = f"test_{next(self._numbers)}"
        self.administer(f"CREATE DATABASE {name} TEMPLATE {_TEMPLATE}")
        try:
            yield self.url(name)
        finally:
            self.administer(f"DROP DATABASE {name} WITH (FORCE)")

    def _conninfo(self, database: str) -> str:
        return f"host={self.folder} user=postgres dbname={database} connect_timeout=5"


@contextmanager
def running_postgres() -> Iterator[PostgresServer]:
    """Start a server, and make the template that each test's database is cloned from."""
    binaries = find_binaries()
    user = _server_user()
    # Not under pytest's own directory: the server's user could not reach it.
    folder = Path(tempfile.mkdtemp(prefix="hf-pg-", dir="/tmp"))
    try:
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        _run(user, binaries / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-N", "-E", "UTF8", "--locale=C")
        with _serving(binaries, user, folder, data):
            server = PostgresServer(folder, data)
            server.administer(f"CREATE DATABASE {_TEMPLATE}")
            Store.open(server.url(_TEMPLATE)).close()
            yield server
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def find_binaries() -> Path:
    """Where PostgreSQL's server programs are: the newest under /usr/lib/postgresql, else where pg_config says.

    Raises:
        RuntimeError: nowhere; it says what to install.
    """
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: _number(path.parent.name))
    if (pg_config := shutil.which("pg_config")) is not None:
        said = subprocess.run([pg_config, "--bindir"], check=True, capture_output=True, text=True).stdout
        candidates.insert(0, Path(said.strip()))
    for candidate in reversed(candidates):
        if (candidate / "initdb").exists() and (candidate / "postgres").exists():
            return candidate
    raise RuntimeError("the tests need PostgreSQL's server programs: run `apt-get install postgresql`")


@contextmanager
def _serving(binaries: Path, user: str | None, folder: Path, data: Path) -> Iterator[None]:
    arguments = ["-D", str(data), "-k", str(folder), "-c", "listen_addresses="]
    for setting in _UNSAFE_BUT_QUICK:
        arguments += ["-c", setting]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [str(binaries / "postgres"), *arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            preexec_fn=_die_with_parent,
            user=user,
            group=_group_of(user),
            extra_groups=None if user is None else [],
        )
    try:
        _wait_until_ready(process, folder)
        yield
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nobody needs its data again
        process.wait(_READY_WITHIN_S)


def _wait_until_ready(process: "subprocess.Popen[bytes]", folder: Path) -> None:
    for _ in range(int(_READY_WITHIN_S / _LOOK_EVERY_S)):
        with suppress(psycopg.OperationalError):
            psycopg.connect(f"host={folder} user=postgres dbname=postgres").close()
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_EVERY_S)
            break
    raise RuntimeError(f"PostgreSQL did not start: {(folder / 'server.log').read_text(errors='replace')[-2000:]}")


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT)


def _server_user() -> str | None:
    """Whom the server runs as; None: the user who runs the tests."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise RuntimeError("the tests run as root and need the user postgres: `apt-get install postgresql`") from None


def _group_of(user: str | None) -> int | None:
    return None if user is None else pwd.getpwnam(user).pw_gid


def _run(user: str | None, program: Path, *arguments: str | Path) -> None:
    ended = subprocess.run(
        [program, *arguments],
        cwd=Path(arguments[1]).parent,
        capture_output=True,
        text=True,
        user=user,
        group=_group_of(user),
        extra_groups=None if user is None else [],
    )
    if ended.returncode:
        raise RuntimeError(f"{program} failed: {ended.stderr.strip()}")


def _number(version: str) -> float:
    try:
        return float(version)
    except ValueError:
        return 0.0
