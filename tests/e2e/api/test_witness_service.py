"""A witness of the network, asked by hand over TLS: whom it answers, and what a kill leaves."""

import http.client
import json
import ssl
import subprocess
from pathlib import Path

import pytest

from appliance.audit.notes import VerifierKey, decode_note, open_checkpoint
from appliance.audit.witness import verify_reply, write_request
from appliance.audit.witnessing import make_request
from tests.e2e.api.conftest import DEADLINE_S
from tests.e2e.api.witnesses import RunningWitness, WitnessHost
from tests.e2e.cli.conftest import HOLDFAST
from tests.rsyslog import Pki
from tests.unit.audit.making import KEY, drafts, make_log, open_log, sign

LOGS = [str(KEY.verifier())]


@pytest.fixture
def host(tmp_path: Path) -> WitnessHost:
    return WitnessHost.new(tmp_path / "other-node")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    make_log(tmp_path / "audit", 300)
    return tmp_path / "audit"


def ask(witness: RunningWitness, pki: Pki, request: bytes, *, client: str | None = "client") -> tuple[int, bytes]:
    context = ssl.create_default_context(cafile=str(pki.folder / "ca.pem"))
    if client is not None:
        context.load_cert_chain(pki.folder / f"{client}.pem", pki.folder / f"{client}.key")
    host, _, port = witness.address.removeprefix("https://").partition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=DEADLINE_S, context=context)
    try:
        connection.request("POST", "/add-checkpoint", request)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def grow(directory: Path, first: int, end: int) -> None:
    log = open_log(directory)
    log.append(drafts(range(first, end)))
    log.publish(sign)
    log.close()


def test_who_shows_no_certificate_of_its_ca_is_not_answered(host: WitnessHost, log: Path) -> None:
    request = make_request(log, old_size=0)
    with host.running(LOGS) as witness:
        for client in (None, "stranger"):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.HTTPException)):
                ask(witness, host.pki, request, client=client)
        status, reply = ask(witness, host.pki, request)
        assert status == 200
        verify_reply(reply, request.partition(b"\n\n")[2].decode(), VerifierKey.parse(witness.vkey))
        assert witness.process.poll() is None
    assert witness.process.returncode == 0


def test_a_witness_that_is_killed_before_it_answers_loses_nothing_and_cosigns_no_fork(
    host: WitnessHost, log: Path
) -> None:
    request = make_request(log, old_size=0)
    with host.running(LOGS, killed=True) as witness, pytest.raises((ConnectionError, http.client.HTTPException)):
        ask(witness, host.pki, request)
    (kept,) = host.state.glob("*.note")
    assert open_checkpoint(decode_note(kept.read_bytes()), KEY.verifier()).size == 300
    other = log.parent / "other"
    make_log(other, 299)
    grow(other, 500, 501)
    with host.running(LOGS) as witness:
        for forked in (make_request(other, old_size=0), make_request(other, old_size=300)):
            assert ask(witness, host.pki, forked) == (409, b"300\n")
        grow(other, 501, 901)
        status, _ = ask(witness, host.pki, make_request(other, old_size=300))
        assert status == 422
        assert ask(witness, host.pki, request) == (409, b"300\n")
        status, reply = ask(witness, host.pki, make_request(log, old_size=300))
        assert status == 200
        verify_reply(reply, request.partition(b"\n\n")[2].decode(), VerifierKey.parse(witness.vkey))
    said = witness.stderr.read_text()
    assert said.count("REFUSED fork") == 3
    assert "witness_size=300 size=700 " in said


def test_what_was_asked_over_the_network_and_what_was_carried_is_one_state(
    host: WitnessHost, log: Path, tmp_path: Path
) -> None:
    first, reply = tmp_path / "request", tmp_path / "reply"
    first.write_bytes(make_request(log, old_size=0))
    words = ["audit", "witness", "cosign", str(first), str(reply), "--state", str(host.state), "--key", *LOGS, "--json"]
    done = subprocess.run([HOLDFAST, *words], capture_output=True, text=True, timeout=60, check=True)
    grow(log, 300, 400)
    with host.running(LOGS) as witness:
        assert witness.vkey == json.loads(done.stdout)["witness"]
        second = make_request(log, old_size=300)
        assert ask(witness, host.pki, second)[0] == 200
    grow(log, 400, 500)
    first.write_bytes(write_request(0, [], make_request(log, old_size=0).partition(b"\n\n")[2].decode()))
    done = subprocess.run([HOLDFAST, *words], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, json.loads(done.stdout)["code"]) == (6, "witness_old_size_differs")
    assert "saw 400" in json.loads(done.stdout)["cause"]


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (("--listen", "192.0.2.7:0"), 9, "without TLS"),
        (("--listen", "127.0.0.1"), 2, "a host and a port"),
        (("--listen", "127.0.0.1:0", "--certificate", "{ca}"), 2, "go together"),
        (("--listen", "127.0.0.1:0", "--certificate", "{ca}", "--private-key", "{ca}"), 9, "certificates"),
    ],
)
def test_what_cannot_be_listened_with_is_refused(
    host: WitnessHost, words: tuple[str, ...], status: int, told: str
) -> None:
    named = [word.format(ca=host.pki.folder / "ca.pem") for word in words]
    done = subprocess.run(
        [HOLDFAST, "audit", "witness", "serve", "--state", str(host.state), "--key", *LOGS, *named],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert told in done.stderr
