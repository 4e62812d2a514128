"""A real rsyslog for the tests, in the foreground, that takes syslog over mutual TLS and writes what it took to a file.

Rule: without rsyslog and its TLS drivers the tests fail, and say what to install.
"""

import contextlib
import datetime
import ipaddress
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_READY_WITHIN_S = 20.0
_NEWEST_BYTES = 64 << 10
_CONFIG = """
global(workDirectory="{folder}" maxMessageSize="64k"
       defaultNetstreamDriver="{driver}" defaultNetstreamDriverCAFile="{pki}/ca.pem"
       defaultNetstreamDriverCertFile="{pki}/server.pem" defaultNetstreamDriverKeyFile="{pki}/server.key")
module(load="imtcp" streamDriver.name="{driver}" streamDriver.mode="1" streamDriver.authMode="x509/name"
       permittedPeer=["client"])
template(name="line" type="string" string="%msg:::sp-if-no-1st-sp%%msg%\\n")
input(type="imtcp" address="127.0.0.1" port="{port}")
action(type="omfile" file="{folder}/received" template="line" asyncWriting="off" flushOnTXEnd="on")
"""


class Pki:
    """A CA, and certificates of it: `server` for 127.0.0.1, `client`, and a client of another CA, `stranger`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        for authority, names in (("ca", ("server", "client")), ("other-ca", ("stranger",))):
            key = ec.generate_private_key(ec.SECP256R1())
            issuer = self._write(authority, key, None)
            for name in names:
                self._write(name, ec.generate_private_key(ec.SECP256R1()), (issuer, key))

    def _write(
        self,
        name: str,
        key: ec.EllipticCurvePrivateKey,
        issuer: tuple[x509.Certificate, ec.EllipticCurvePrivateKey] | None,
    ) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        names: list[x509.GeneralName] = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if issuer is None else issuer[0].subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(key if issuer is None else issuer[1], hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        (self.folder / f"{name}.pem").write_bytes(made.public_bytes(pem))
        private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (self.folder / f"{name}.key").write_bytes(private)
        return made


class Receiver:
    """A receiver of syslog: `received` is what it wrote down. It can be stopped, killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> tuple[list[str], dict[str, str]]:
        """What starts it, and its environment."""
        raise NotImplementedError

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    @property
    def received(self) -> list[str]:
        """The lines that it wrote; the last may be cut off where it was killed."""
        path = self.folder / "received"
        return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def newest(self) -> str:
        """The end of what it wrote, some lines: cheaper than all of it."""
        path = self.folder / "received"
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _NEWEST_BYTES))
            return file.read().decode(errors="replace")

    def start(self) -> None:
        """Start it; it listens when this returns."""
        command, environment = self.command()
        with (self.folder / "log").open("ab") as log:
            (self.folder / "pid").unlink(missing_ok=True)
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env={**os.environ, **environment}
            )
        deadline = time.monotonic() + _READY_WITHIN_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not listen: {(self.folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop(self, *, kill: bool = False) -> None:
        """End it, in good order or at once."""
        if self._process is not None:
            self._process.kill() if kill else self._process.terminate()
            try:
                self._process.wait(10)
            finally:
                self._process.kill()
                self._process.wait()
            self._process = None


class Rsyslog(Receiver):
    """The receiver; see `Receiver`.

    Args:
        driver: what it speaks TLS with: `ossl` or `gtls`.
    """

    def __init__(self, folder: Path, pki: Pki, *, driver: str = "ossl") -> None:
        super().__init__(folder)
        config = _CONFIG.format(folder=folder, pki=pki.folder, port=self.port, driver=driver)
        (folder / "rsyslog.conf").write_text(config)

    def command(self) -> tuple[list[str], dict[str, str]]:
        """See `Receiver`."""
        program = shutil.which("rsyslogd", path="/usr/sbin:/sbin:/usr/bin")
        if program is None:
            packages = "rsyslog rsyslog-openssl rsyslog-gnutls rsyslog-relp"
            raise RuntimeError(f"the tests need rsyslog: run `apt-get install {packages}`")
        return [program, "-n", "-f", str(self.folder / "rsyslog.conf"), "-i", str(self.folder / "pid")], {}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_rsyslog(folder: Path, pki: Pki, *, driver: str = "ossl") -> Iterator[Rsyslog]:
    """A receiver for as long as the context lasts."""
    receiver = Rsyslog(folder, pki, driver=driver)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()
