"""A real rsyslog for the tests, in the foreground, that takes syslog over mutual TLS and writes what it took to a file.

Rule: without rsyslog and its OpenSSL driver the tests fail, and say what to install.
"""

import contextlib
import datetime
import ipaddress
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
_CONFIG = """
global(workDirectory="{folder}" maxMessageSize="64k"
       defaultNetstreamDriver="ossl" defaultNetstreamDriverCAFile="{pki}/ca.pem"
       defaultNetstreamDriverCertFile="{pki}/server.pem" defaultNetstreamDriverKeyFile="{pki}/server.key")
module(load="imtcp" streamDriver.name="ossl" streamDriver.mode="1" streamDriver.authMode="x509/name"
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


class Rsyslog:
    """The receiver: `received` is what it wrote down. It can be stopped, killed and started again."""

    def __init__(self, folder: Path, pki: Pki) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / "rsyslog.conf").write_text(_CONFIG.format(folder=folder, pki=pki.folder, port=self.port))

    @property
    def received(self) -> list[str]:
        """The lines that it wrote; the last may be cut off where it was killed."""
        path = self.folder / "received"
        return [line.strip() for line in path.read_text().splitlines()] if path.exists() else []

    def start(self) -> None:
        """Start it; it listens when this returns."""
        program = shutil.which("rsyslogd", path="/usr/sbin:/sbin:/usr/bin")
        if program is None:
            raise RuntimeError("the tests need rsyslog: run `apt-get install rsyslog rsyslog-openssl`")
        with (self.folder / "log").open("ab") as log:
            command = [program, "-n", "-f", str(self.folder / "rsyslog.conf"), "-i", str(self.folder / "pid")]
            (self.folder / "pid").unlink(missing_ok=True)
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _READY_WITHIN_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"rsyslog does not listen: {(self.folder / 'log').read_text()[-2000:]}")
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


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running_rsyslog(folder: Path, pki: Pki) -> Iterator[Rsyslog]:
    """A receiver for as long as the context lasts."""
    receiver = Rsyslog(folder, pki)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()
