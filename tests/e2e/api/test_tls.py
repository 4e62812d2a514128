"""TLS: a listener that serves it, and one that does not start without it."""

import datetime
import http.client
import ipaddress
import json
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from api.admin.client import AdminClient
from benchmarks.running import make_appliance, running_gateway, running_stub
from benchmarks.stub import MODEL
from tests.e2e.api.conftest import DEADLINE_S, until

EVERYWHERE = "0.0.0.0"  # noqa: S104  (what is tested)


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for this machine, signed by itself; its key lies beside it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    (tmp_path / "key.pem").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    (tmp_path / "certificate.pem").write_bytes(made.public_bytes(Encoding.PEM))
    return tmp_path / "certificate.pem"


@pytest.mark.parametrize("host", ["127.0.0.1", EVERYWHERE])
def test_over_tls_a_turn_is_answered_and_without_it_nothing_is(tmp_path: Path, certificate: Path, host: str) -> None:
    state_dir, engine = tmp_path / "state", tmp_path / "engine.sock"
    api_key = make_appliance(state_dir)
    environment = {
        "HOLDFAST_GATEWAY__HOST": host,
        "HOLDFAST_GATEWAY__TLS_CERTIFICATE": str(certificate),
        "HOLDFAST_GATEWAY__TLS_PRIVATE_KEY": str(certificate.with_name("key.pem")),
    }
    body = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "stream": True})
    headers = {"Authorization": f"Bearer {api_key}"}
    with (
        running_stub(engine),
        running_gateway(state_dir, engine, environment=environment, certificate=certificate) as gateway,
    ):
        trusting = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection("localhost", gateway.port, timeout=DEADLINE_S, context=trusting)
        connection.request("POST", "/v1/chat/completions", body, headers)
        answer = connection.getresponse()
        assert (answer.status, answer.read()[-8:]) == (200, b"[DONE]\n\n")
        connection.close()
        plain = http.client.HTTPConnection("localhost", gateway.port, timeout=DEADLINE_S)
        plain.request("GET", "/healthz")
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            plain.getresponse()
        plain.close()
        distrustful = http.client.HTTPSConnection("localhost", gateway.port, timeout=DEADLINE_S)
        with pytest.raises(ssl.SSLCertVerificationError):
            distrustful.request("GET", "/healthz")
        admin = AdminClient(state_dir)
        until(lambda: bool(admin.audit_entries(action="request.malformed").entries))
        gateway.end()
    with running_stub(engine), running_gateway(state_dir, engine):
        told = [entry.record or {} for entry in admin.audit_entries(action="request.malformed").entries]
    # Told once a minute, and at the end: the two may have been told together.
    assert {(each["source"], each["reason"]) for each in told} == {("127.0.0.1", "tls_handshake_failed")}
    assert sum(each["counts"]["count"] for each in told) == 2


def test_beyond_loopback_it_does_not_start_without_tls(tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    make_appliance(state_dir)
    environment = {"HOLDFAST_GATEWAY__HOST": EVERYWHERE}
    with (
        pytest.raises(RuntimeError, match="it ended with"),
        running_gateway(state_dir, tmp_path / "engine.sock", environment=environment),
    ):
        pass
    log = (state_dir / "log" / "gateway.log").read_text()
    assert "tls_certificate" in log
    assert "accepting connections" not in log
