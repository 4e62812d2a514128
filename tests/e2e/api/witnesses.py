"""A witness of the network, as a process of its own. `witnesses.py WORDS…` is `holdfast WORDS…` that may end early:

with `HOLDFAST_TEST_WITNESS=killed` the process is killed by SIGKILL when a checkpoint is on its disk and before it has
answered, each time.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.running import REPOSITORY
from tests.rsyslog import Pki, free_port


@dataclass
class RunningWitness:
    """A witness that answers at `address`, and its public key."""

    process: "subprocess.Popen[str]"
    address: str
    vkey: str
    stderr: Path

    def kill(self) -> None:
        """As a machine that loses its power does."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class WitnessHost:
    """The other node: a state directory, and a port that stays."""

    folder: Path
    pki: Pki
    port: int

    @classmethod
    def new(cls, folder: Path) -> "WitnessHost":
        """One with nothing on it."""
        folder.mkdir()
        return cls(folder, Pki(folder / "pki"), free_port())

    @property
    def state(self) -> Path:
        """What it keeps."""
        return self.folder / "state"

    @contextlib.contextmanager
    def running(self, logs: Sequence[str], *, killed: bool = False) -> Iterator[RunningWitness]:
        """It answers when this is entered, whoever shows a certificate of its CA."""
        pki, stderr = self.pki.folder, self.folder / "stderr"
        words = ["audit", "witness", "serve", "--json", "--state", str(self.state), "--name", "witness.example"]
        words += ["--listen", f"127.0.0.1:{self.port}", "--client-ca", str(pki / "ca.pem")]
        words += ["--certificate", str(pki / "server.pem"), "--private-key", str(pki / "server.key")]
        words += [word for log in logs for word in ("--key", log)]
        environment: Mapping[str, str] = {"HOLDFAST_TEST_WITNESS": "killed"} if killed else {}
        with stderr.open("ab") as into:
            process = subprocess.Popen(
                [sys.executable, "-P", __file__, *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=into,
                text=True,
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            )
        try:
            assert process.stdout is not None
            said = ""
            for line in process.stdout:
                said += line
                if line == "}\n":
                    break
            told = json.loads(said)
            yield RunningWitness(process, told["address"], told["witness"], stderr)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            finally:
                process.kill()
                process.communicate()


def main() -> None:
    """Be the command."""
    from appliance.audit import witness
    from appliance.cli import main as holdfast

    if os.environ.get("HOLDFAST_TEST_WITNESS") == "killed":
        real = witness.Witness._remember

        def remember(self: witness.Witness, origin: str, note: str) -> None:
            real(self, origin, note)
            os.kill(os.getpid(), signal.SIGKILL)

        witness.Witness._remember = remember  # type: ignore[method-assign]
    holdfast()


if __name__ == "__main__":
    main()
