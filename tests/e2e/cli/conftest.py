"""A whole appliance for each test: the real command, a real gateway, and an engine's stub that answers instantly."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PASSPHRASE = b"correct horse battery staple"
REPOSITORY = Path(__file__).parents[3]
HOLDFAST = Path(sys.executable).parent / "holdfast"
DEADLINE_S = 60


@dataclass
class Outcome:
    """What a command said."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its stdout, as a program reads it."""
        return json.loads(self.out)


@dataclass
class Appliance:
    """An appliance in a directory of its own, driven as a person drives it: by commands."""

    state_dir: Path
    port: int
    engine_socket: Path
    running: list["subprocess.Popen[str]"] = field(default_factory=list)

    def environment(self) -> dict[str, str]:
        """What the commands are started with."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HOLDFAST_")}
        return inherited | {
            "HOLDFAST_GATEWAY__PORT": str(self.port),
            "HOLDFAST_ENGINE__SOCKET": str(self.engine_socket),
            "HOLDFAST_GATEWAY__DRAIN_TIMEOUT_S": "5",
            "HOLDFAST_ENGINE__READY_TIMEOUT_S": "30",
        }

    def run(self, *words: str, secret: bytes = b"", state_dir: Path | None = None) -> Outcome:
        """Run one command to its end; `secret` comes on its stdin."""
        outcome = subprocess.run(
            self._command(words, state_dir),
            input=secret,
            capture_output=True,
            timeout=DEADLINE_S,
            check=False,
            env=self.environment(),
        )
        return Outcome(outcome.returncode, outcome.stdout.decode(), outcome.stderr.decode())

    def ok(self, *words: str, secret: bytes = b"") -> Outcome:
        """Run one command that must succeed."""
        outcome = self.run(*words, secret=secret)
        assert outcome.status == 0, outcome
        return outcome

    def json(self, *words: str, secret: bytes = b"") -> Any:
        """What a command that must succeed answers to a program."""
        return self.ok(*words, "--json", secret=secret).json

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Start a command that stays."""
        process = subprocess.Popen(
            self._command(words, None),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )
        self.running.append(process)
        return process

    def init(self, *words: str) -> None:
        """Make it, sealed by a key file: quick to open."""
        self.ok("init", "--seal", "key-file", *words)

    def init_sealed(self, *words: str) -> None:
        """Make it, sealed by `PASSPHRASE`."""
        self.ok("init", "--passphrase-fd", "0", *words, secret=PASSPHRASE)

    def up(self) -> Any:
        """Start it, and leave it running."""
        return self.json("up", "--detach")

    def files_that_hold(self, words: bytes) -> list[Path]:
        """The files of the state directory in which `words` stand."""
        files = [path for path in self.state_dir.rglob("*") if path.is_file()]
        return [path for path in files if words in path.read_bytes()]

    def end(self) -> None:
        """Leave nothing behind."""
        for process in self.running:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=20)
                process.kill()
            process.communicate()
        if self.state_dir.exists():
            self.run("down", "--now")

    def _command(self, words: Sequence[str], state_dir: Path | None) -> list[str]:
        return [str(HOLDFAST), *words, "--state-dir", str(state_dir or self.state_dir)]


def free_port() -> int:
    """A TCP port of the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of an engine's stub, which answers at once."""
    path = tmp_path_factory.mktemp("stub") / "engine.sock"
    with subprocess.Popen([sys.executable, "-m", "benchmarks.stub", str(path)], cwd=REPOSITORY) as process:
        deadline = time.monotonic() + DEADLINE_S
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield path
        process.terminate()


@pytest.fixture
def appliance(tmp_path: Path, stub: Path) -> Iterator[Appliance]:
    """An appliance that is not made yet; whatever a test starts is ended."""
    made = Appliance(tmp_path / "state", free_port(), stub)
    yield made
    made.end()


@pytest.fixture
def listening_port() -> Iterator[int]:
    """A TCP port that somebody else has."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]
