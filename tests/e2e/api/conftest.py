"""A gateway over an engine's stub, whole processes both, and ways of talking to it."""

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from api.admin import types
from api.admin.client import ADMIN_SOCKET, AdminClient
from benchmarks.running import Running, make_appliance, running_gateway, running_stub
from benchmarks.stub import MODEL

DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back over a connection."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The code of the error that the body holds."""
        code: str = self.json["error"]["code"]
        return code

    @property
    def events(self) -> list[Any]:
        """The payloads of a stream; `[DONE]` is the text."""
        payloads = [part.removeprefix(b"data: ") for part in self.body.split(b"\n\n") if part]
        return ["[DONE]" if payload == b"[DONE]" else json.loads(payload) for payload in payloads]


@dataclass(slots=True)
class Served:
    """A gateway that serves, and what is needed to be its client."""

    state_dir: Path
    engine: Path
    gateway: Running
    api_key: str

    @property
    def base_url(self) -> str:
        """What SDKs are given."""
        return f"http://127.0.0.1:{self.gateway.port}/v1"

    @property
    def admin(self) -> AdminClient:
        """The admin API."""
        return AdminClient(self.state_dir)

    def new_key(self, *, tenant: str = "tenant", principal: str = "somebody", **limits: Any) -> types.CreatedKey:
        """Another API key; the tenant is made if there is none."""
        if tenant not in {each.name for each in self.admin.tenants().tenants}:
            self.admin.create_tenant(tenant)
        return self.admin.create_key(tenant=tenant, principal=principal, limits=limits)

    @contextlib.contextmanager
    def sdk(self, api_key: str | None = None, **headers: str) -> Iterator[openai.OpenAI]:
        """The openai SDK as a client, which does not try again."""
        with openai.OpenAI(
            base_url=self.base_url, api_key=api_key or self.api_key, max_retries=0, default_headers=headers
        ) as client:
            yield client

    def connect(self) -> socket.socket:
        """A connection to the data listener."""
        return socket.create_connection(("127.0.0.1", self.gateway.port), timeout=DEADLINE_S)

    def connect_admin(self) -> socket.socket:
        """A connection to the admin listener."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(DEADLINE_S)
        connection.connect(str(self.state_dir / ADMIN_SOCKET))
        return connection

    def send(
        self,
        method: str,
        target: str,
        body: bytes = b"",
        *,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request, with nothing but what is said here."""
        lines = [f"{method} {target} HTTP/1.1"]
        given = {
            "Host": "127.0.0.1",
            "Connection": "close",
            "Authorization": f"Bearer {self.api_key if api_key is None else api_key}",
            **({"Content-Length": str(len(body))} if body else {}),
            **(headers or {}),
        }
        lines += [f"{name}: {value}" for name, value in given.items() if value]
        return self.send_raw("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)

    def send_raw(self, request: bytes) -> Answer:
        """Bytes, and what is answered until the connection is closed."""
        with self.connect() as connection:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer before it has read all
                connection.sendall(request)
            return read_answer(connection)

    def ask(self, text: str = "hello", *, api_key: str | None = None, session: str = "", **fields: Any) -> Answer:
        """A chat completion."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
        headers = {"X-Session-ID": session} if session else {}
        return self.send("POST", "/v1/chat/completions", json.dumps(body).encode(), api_key=api_key, headers=headers)

    def engine_seen(self) -> dict[str, Any]:
        """What the stub counts, and the last bodies that reached it."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(self.engine))
            connection.sendall(b"GET /stub HTTP/1.1\r\nhost: engine\r\n\r\n")
            seen: dict[str, Any] = read_answer(connection).json
            return seen

    def transcript(self, session_id: str) -> types.Transcript:
        """What is stored of a session, by our own id."""
        return self.admin.transcript(session_id)

    def newest_session(self) -> types.Session:
        """The session used last."""
        return self.admin.sessions(limit=1).sessions[0]


def read_answer(connection: socket.socket) -> Answer:
    """One answer: until its length, the end of its chunks, or the end of the connection."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(1 << 16)
        if not part:
            raise ConnectionError(f"closed after {received!r}")
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    status_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    chunked = headers.get("transfer-encoding") == "chunked"
    length = int(headers.get("content-length", "0"))
    while not (body.endswith(b"0\r\n\r\n") if chunked else len(body) >= length):
        part = connection.recv(1 << 16)
        if not part:
            break
        body += part
    return Answer(int(status_line.split()[1]), headers, _unchunked(body) if chunked else body)


def _unchunked(body: bytes) -> bytes:
    whole = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        count = int(size, 16)
        whole, body = whole + rest[:count], rest[count + 2 :]
    return whole


def until(condition: Callable[[], bool], within_s: float = DEADLINE_S) -> None:
    """Wait for what another process is about to do; fails at the deadline."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def serving(place: Path, *, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """A new appliance in `place`, running over a stub of its own."""
    state_dir, engine = place / "state", place / "engine.sock"
    api_key = make_appliance(state_dir, permissions=("transcript:read",))
    with running_stub(engine), running_gateway(state_dir, engine, environment=environment) as gateway:
        yield Served(state_dir, engine, gateway, api_key)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One for the tests of a module, which leave it as they found it."""
    with serving(tmp_path_factory.mktemp("served")) as it:
        yield it
