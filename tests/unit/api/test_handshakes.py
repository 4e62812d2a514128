"""A TLS handshake that fails is told with the address; one that holds is where HTTP begins."""

import asyncio
import contextlib
import datetime
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from api import handshakes
from api.handshakes import TlsListener
from appliance.errors import HoldfastError

pytestmark = pytest.mark.anyio


class Echo(asyncio.Protocol):
    """What is spoken here."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class Watched(TlsListener):
    """Says when it begins with a connection, and when it has done with it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.begun, self.done = asyncio.Semaphore(0), asyncio.Semaphore(0)
        super().__init__(*given, **named)

    async def _shake_hands(self, connection: socket.socket, source: str) -> None:
        self.begun.release()
        await super()._shake_hands(connection, source)

    def _shaken(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        super()._shaken(connection, task)
        self.done.release()


@dataclass
class Listening:
    """A listener, and what it told."""

    port: int
    certificate: Path
    tls: Watched
    told: "list[tuple[str, HoldfastError]]" = field(default_factory=list)

    def connected(self) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.settimeout(30)
        return connection

    async def visit(self, visit: Callable[[socket.socket], None]) -> None:
        """Have a client come; over when the listener has done with it."""

        def come() -> None:
            with self.connected() as connection:
                visit(connection)

        await asyncio.to_thread(come)
        await self.tls.done.acquire()


@pytest.fixture
async def listening(tmp_path: Path) -> AsyncIterator[Listening]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, SHA256())
    )
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    certificate = tmp_path / "both.pem"
    certificate.write_bytes(pem + made.public_bytes(Encoding.PEM))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        told: list[tuple[str, HoldfastError]] = []
        tls = Watched(bound, context, Echo, lambda *refused: told.append(refused), backlog=16)
        yield Listening(bound.getsockname()[1], certificate, tls, told)
        tls.close()
        await tls.wait_closed()


def _trusting(listening: Listening) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(listening.certificate))
    context.check_hostname = False
    return context


async def test_after_the_handshake_what_is_spoken_begins_and_nothing_is_told(listening: Listening) -> None:
    said: list[bytes] = []

    def speak(connection: socket.socket) -> None:
        with _trusting(listening).wrap_socket(connection) as tls:
            tls.sendall(b"at once")
            said.append(tls.recv(100))

    for _ in range(5):
        await listening.visit(speak)
    assert (said, listening.told) == ([b"at once"] * 5, [])


def _plain(connection: socket.socket) -> None:
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    connection.recv(1)


def _distrustful(connection: socket.socket) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    with contextlib.suppress(ssl.SSLError), context.wrap_socket(connection):
        pass


def _half(connection: socket.socket) -> None:
    connection.sendall(b"\x16\x03\x01\x02")


@pytest.mark.parametrize(
    ("visit", "cause"),
    [(_plain, "HTTP_REQUEST"), (_distrustful, "TLSV1_ALERT_UNKNOWN_CA"), (_half, "the client ended it")],
)
async def test_a_handshake_that_fails_is_told_with_its_address_and_its_cause(
    listening: Listening, visit: Callable[[socket.socket], None], cause: str
) -> None:
    await listening.visit(visit)
    ((source, error),) = listening.told
    assert (source, error.code) == ("127.0.0.1", "tls_handshake_failed")
    assert cause in error.cause


async def test_who_only_looks_whether_the_port_is_open_has_begun_no_handshake(listening: Listening) -> None:
    def reset(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    for visit in (lambda _: None, reset):
        await listening.visit(visit)
    assert listening.told == []


async def test_who_says_nothing_is_told_at_the_deadline_and_holds_no_connection(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "_DEADLINE_S", 0.001)
    ended: list[bytes] = []
    await listening.visit(lambda connection: ended.append(connection.recv(1)))
    assert [error.code for _, error in listening.told] == ["tls_handshake_failed"]
    assert ended == [b""]


async def test_a_listener_that_is_closed_ends_the_handshakes_that_are_not_over(listening: Listening) -> None:
    with listening.connected() as connection:
        await listening.tls.begun.acquire()
        listening.tls.close()
        await listening.tls.wait_closed()
        assert await asyncio.to_thread(connection.recv, 1) == b""
    assert listening.told == []


async def test_where_there_are_no_descriptors_the_next_connection_waits_for_some(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        else:
            await at_once(0)

    at_once = asyncio.sleep
    refused = iter([OSError(24, "Too many open files"), ConnectionAbortedError(103, "gone")])
    accept = asyncio.get_running_loop().sock_accept

    async def accepting(bound: socket.socket) -> object:
        for error in refused:
            raise error
        return await accept(bound)

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_accept", accepting)
    monkeypatch.setattr(asyncio, "sleep", pause)
    await listening.visit(_half)  # taken by the call that waits already
    await listening.visit(_half)
    assert len(listening.told) == 2
    assert pauses == [1.0]


async def test_who_comes_while_many_have_said_nothing_yet_waits_for_one_of_them_to_end(
    listening: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "_MOST_SHAKING", 2)
    silent = [listening.connected() for _ in range(3)]
    for _ in range(2):
        await listening.tls.begun.acquire()
    third = asyncio.create_task(listening.tls.begun.acquire())
    for _ in range(20):  # the loop goes round, and nobody is let in
        await asyncio.sleep(0)
    assert not third.done()
    silent[0].close()
    await third
    for connection in silent[1:]:
        connection.close()
