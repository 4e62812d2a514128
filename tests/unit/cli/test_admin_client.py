"""The admin API's client, against a socket that answers what a test says."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from api.admin.client import AdminClient, AdminSocketDenied, ApplianceDown, ApplianceSilent, Refused
from appliance.errors import Fault, HoldfastError

Serve = Callable[[Callable[[socket.socket], None]], AdminClient]


@pytest.fixture
def deep_dir(tmp_path: Path) -> Path:
    """A state directory so deep that its socket's path is longer than sockaddr_un allows."""
    folder = tmp_path.joinpath(*["deep" * 10] * 4)
    (folder / "run").mkdir(parents=True)
    assert len(os.fsencode(folder)) > 108
    return folder


@pytest.fixture
def serve(deep_dir: Path) -> Iterator[Serve]:
    """Answer one connection with what a test's function does."""
    folder = os.open(deep_dir / "run", os.O_PATH | os.O_DIRECTORY)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{folder}/admin.sock")
    listener.listen(4)
    listener.settimeout(10)
    threads: list[threading.Thread] = []
    done = threading.Event()

    def start(answer: Callable[[socket.socket], None]) -> AdminClient:
        def run() -> None:
            with listener.accept()[0] as connection:
                answer(connection)
                done.wait(10)

        threads.append(threading.Thread(target=run))
        threads[-1].start()
        return AdminClient(deep_dir, deadline_s=0.5)

    yield start
    done.set()
    for thread in threads:
        thread.join(10)
    listener.close()
    os.close(folder)


def http(status: str, body: object) -> bytes:
    text = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text


def test_a_socket_is_reached_however_long_its_path(serve: Serve) -> None:
    seen: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        seen.append(connection.recv(65_536))
        connection.sendall(http("200 OK", {"sealed": True, "changed": True}))

    assert serve(answer).seal().changed
    assert seen[0].startswith(b"POST /v1/vault/seal HTTP/1.1\r\n")
    assert seen[0].count(b"Host: localhost\r\n") == 1


def test_the_process_that_listens_is_told_by_the_kernel(serve: Serve) -> None:
    assert serve(lambda _: None).gateway_pid() == os.getpid()


def test_an_error_keeps_the_code_and_the_fault_that_it_had(serve: Serve) -> None:
    body = {"error": {"code": "vault_sealed", "message": "m", "cause": "c", "remedy": "r", "fault": "unavailable"}}
    client = serve(lambda connection: connection.sendall(http("503 Service Unavailable", body)))
    with pytest.raises(Refused) as raised:
        client.tenants()
    assert raised.value.record() == {"code": "vault_sealed", "message": "m", "cause": "c", "remedy": "r"}
    assert raised.value.fault is Fault.UNAVAILABLE


def test_an_error_that_cannot_be_read_is_still_one(serve: Serve) -> None:
    with pytest.raises(HoldfastError, match="cannot be read"):
        serve(lambda connection: connection.sendall(http("500 Oops", ["?"]))).tenants()


def test_an_appliance_that_says_nothing_is_silent_at_the_deadline(serve: Serve) -> None:
    with pytest.raises(ApplianceSilent, match="nothing came in time"):
        serve(lambda _: None).tenants()


def test_a_trickle_that_never_stalls_ends_at_the_deadline_too(serve: Serve) -> None:
    stop = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        try:
            while not stop.wait(0.05):
                connection.sendall(b" ")
        except OSError:
            return

    with pytest.raises(ApplianceSilent):
        serve(answer).tenants()
    stop.set()


def test_an_answer_that_breaks_off_is_no_answer(serve: Serve) -> None:
    def answer(connection: socket.socket) -> None:
        connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"tenants": [')
        connection.shutdown(socket.SHUT_RDWR)

    with pytest.raises(ApplianceSilent):
        serve(answer).tenants()


def test_no_socket_and_a_stale_one_both_mean_down(deep_dir: Path, serve: Serve) -> None:
    with pytest.raises(ApplianceDown):
        AdminClient(deep_dir / "elsewhere").status()
    (deep_dir / "stale" / "run").mkdir(parents=True)
    folder = os.open(deep_dir / "stale" / "run", os.O_PATH | os.O_DIRECTORY)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"/proc/self/fd/{folder}/admin.sock")
    os.close(folder)
    with pytest.raises(ApplianceDown, match="holdfast up"):
        AdminClient(deep_dir / "stale").status()


def test_another_users_socket_is_denied_and_says_so(deep_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(AdminSocketDenied, match="another user"):
        AdminClient(deep_dir).status()


def test_the_client_loads_no_web_framework() -> None:
    heavy = "{'fastapi', 'starlette', 'uvicorn', 'sqlalchemy'}"
    script = f"import sys, api.admin.client\nassert not {heavy} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
