"""Receivers for the tests that speak a documented protocol and refuse whatever it does not allow.

`Hec`: Splunk's HTTP Event Collector (Format events for HTTP Event Collector; possible error codes; indexer
acknowledgement). `Elastic`: Elasticsearch's bulk API (elasticsearch-specification, `_global/bulk`). Both over TLS.
`Turning`: syslog, from a receiver that takes all there is, until it is told what to do wrong.
`rude`: whatever no server should do.
"""

import asyncio
import contextlib
import json
import socket
import ssl
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from appliance.audit.siem.syslog import Receiver
from tests.rsyslog import Pki, free_port

TOKEN = "B5A79AAD-D822-46CC-80D1-819F80D7BFB0"
API_KEY = "VnVhQ2ZHY0JDZGJrUW0tZTVhT3g6dWkybHAyYXhUTm1zeWFrdzl0dk5udw=="


class Hec:
    """Splunk's collector. `indexed`: what it keeps, in its order; `taken`: what it has in memory only.

    Attributes:
        acknowledges: whether an `ackId` may be indexed now.
        answers: statuses to answer events with before anything else is done, the first first.
        ends_after: so many requests with events are taken and not answered: the connection is closed.
    """

    path = "/services/collector"

    def __init__(self) -> None:
        self.indexed: list[dict[str, Any]] = []
        self.taken: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self.channels: dict[str, int] = {}
        self.acknowledges: Callable[[int], bool] = lambda _: True
        self.uses_acknowledgement = True
        self.answers: list[int] = []
        self.ends_after: list[str] = []
        self.healthy = True
        self.polls = 0

    @property
    def lines(self) -> list[str]:
        """`_raw` of what is indexed."""
        return [event["event"] for event in self.indexed]

    def application(self) -> web.Application:
        made = web.Application(client_max_size=1 << 26)
        made.router.add_get(f"{self.path}/health", self._health)
        made.router.add_post(f"{self.path}/event", self._event)
        made.router.add_post(f"{self.path}/ack", self._ack)
        return made

    async def _health(self, request: web.Request) -> web.Response:
        return _json(200, "HEC is healthy", 17) if self.healthy else _json(503, "HEC is unhealthy, queues are full", 18)

    async def _event(self, request: web.Request) -> web.Response:
        if (refused := self._refused(request)) is not None:
            return refused
        if self.answers:
            status = self.answers.pop(0)
            return _json(status, "Server is busy" if status == 503 else "no", 9)
        channel = request.headers["X-Splunk-Request-Channel"]
        events, text = [], (await request.read()).decode()
        if not text:
            return _json(400, "No data", 5)
        while text:
            event, end = json.JSONDecoder().raw_decode(text)
            text = text[end:].lstrip()
            allowed = {"time", "host", "source", "sourcetype", "index", "event", "fields"}
            if not set(event) <= allowed or any(not isinstance(each, str) for each in event["fields"].values()):
                return _json(400, "Invalid data format", 6)
            if not event.get("event"):
                return _json(400, "Event field is required", 12)
            events.append(event)
        ack_id = self.channels.get(channel, 0)
        self.channels[channel] = ack_id + 1
        self.taken[channel, ack_id] = events
        if self.ends_after:
            self.ends_after.pop()
            assert request.transport is not None
            request.transport.abort()
        if not self.uses_acknowledgement:
            self.indexed += self.taken.pop((channel, ack_id))
            return _json(200, "Success", 0)
        return web.json_response({"text": "Success", "code": 0, "ackId": ack_id})

    async def _ack(self, request: web.Request) -> web.Response:
        if (refused := self._refused(request)) is not None:
            return refused
        self.polls += 1
        channel = request.headers["X-Splunk-Request-Channel"]
        asked = (await request.json())["acks"]
        assert all(isinstance(ack_id, int) for ack_id in asked)
        # It says once that an id is indexed, and has forgotten it then.
        acks = {}
        for ack_id in asked:
            acks[str(ack_id)] = (channel, ack_id) in self.taken and self.acknowledges(ack_id)
            if acks[str(ack_id)]:
                self.indexed += self.taken.pop((channel, ack_id))
        return web.json_response({"acks": acks})

    def _refused(self, request: web.Request) -> web.Response | None:
        word, _, token = request.headers.get("Authorization", "").partition(" ")
        if not word:
            return _json(401, "Token is required", 2)
        if word != "Splunk":
            return _json(401, "Invalid authorization", 3)
        if token != TOKEN:
            return _json(403, "Invalid token", 4)
        try:
            uuid.UUID(request.headers["X-Splunk-Request-Channel"])
        except KeyError:
            return _json(400, "Data channel is missing", 10)
        except ValueError:
            return _json(400, "Invalid data channel", 11)
        return None


class Elastic:
    """Elasticsearch's bulk API. `documents`: what is in the index, by `_id`.

    Attributes:
        answers: statuses to answer requests with before anything else is done, the first first.
        items: statuses to answer items with, by `_id`, once each.
        ends_after: so many requests are carried out and not answered: the connection is closed.
    """

    def __init__(self, index: str = "logs-holdfast.audit-default") -> None:
        self.index = index
        self.documents: dict[str, str] = {}
        self.repeated = 0
        self.answers: list[int] = []
        self.items: dict[str, int] = {}
        self.ends_after: list[str] = []

    @property
    def lines(self) -> list[str]:
        """`_source` of each document."""
        return list(self.documents.values())

    def application(self) -> web.Application:
        made = web.Application(client_max_size=1 << 26)
        made.router.add_get("/_security/_authenticate", self._authenticate)
        made.router.add_post("/{index}/_bulk", self._bulk)
        return made

    async def _authenticate(self, request: web.Request) -> web.Response:
        return self._refused(request) or web.json_response({"username": "holdfast", "authentication_type": "api_key"})

    async def _bulk(self, request: web.Request) -> web.Response:
        if (refused := self._refused(request)) is not None:
            return refused
        if self.answers:
            status = self.answers.pop(0)
            return _failed(status, "es_rejected_execution_exception", "rejected execution of coordinating operation")
        if request.match_info["index"] != self.index:
            return _failed(404, "index_not_found_exception", f"no such index [{request.match_info['index']}]")
        assert request.content_type == "application/x-ndjson"
        body = (await request.read()).decode()
        assert body.endswith("\n")
        lines = body[:-1].split("\n")
        items = [self._create(json.loads(action), source) for action, source in zip(*[iter(lines)] * 2, strict=True)]
        if self.ends_after:
            self.ends_after.pop()
            assert request.transport is not None
            request.transport.abort()
        errors = any(item["create"]["status"] >= 400 for item in items)
        return web.json_response({"took": 1, "errors": errors, "items": items})

    def _create(self, action: dict[str, Any], source: str) -> dict[str, Any]:
        assert set(action) == {"create"}
        known_by = action["create"]["_id"]
        assert len(known_by.encode()) <= 512
        said = {"_index": self.index, "_id": known_by}
        if status := self.items.pop(known_by, 0):
            error = {"type": "document_parsing_exception", "reason": "[1:2] failed\x1b[31m to parse field [event]"}
            return {"create": said | {"status": status, "error": error}}
        if known_by in self.documents:
            self.repeated += 1
            reason = f"[{known_by}]: version conflict, document already exists (current version [1])"
            error = {"type": "version_conflict_engine_exception", "reason": reason}
            return {"create": said | {"status": 409, "error": error}}
        assert isinstance(json.loads(source), dict)
        self.documents[known_by] = source
        return {"create": said | {"status": 201, "result": "created", "_version": 1}}

    def _refused(self, request: web.Request) -> web.Response | None:
        if request.headers.get("Authorization") == f"ApiKey {API_KEY}":
            return None
        return _failed(401, "security_exception", "unable to authenticate with provided credentials")


class Turning:
    """A receiver of syslog over mutual TLS that takes all there is, until it is told what to do wrong.

    It works in threads of its own, and never by the clock. Its buffer is small: what it does not read lies with us.
    """

    def __init__(self, pki: Pki) -> None:
        self._pki = pki
        self._context = server_context(pki, asks=True)
        self._listening = socket.socket()
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(0)
        self.port: int = self._listening.getsockname()[1]
        self._portion = 0  # bytes that it reads for each leave that it is given; 0: it needs none
        self._leaves = threading.Semaphore(0)
        self._queued: list[socket.socket] = []
        self._connections: list[ssl.SSLSocket] = []
        self._ended = self._deaf = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def read_only(self, portion: int) -> None:
        """From now on read so many bytes for each `leave_to_read`."""
        self._portion = portion

    def leave_to_read(self) -> None:
        """Have one portion read."""
        self._leaves.release()

    def show(self, certificate: str) -> None:
        """End what there is, and show another certificate to who comes then."""
        self._context.load_cert_chain(self._pki.folder / f"{certificate}.pem", self._pki.folder / f"{certificate}.key")
        self._end_connections()

    def drop_packets(self) -> None:
        """End what there is, and have the kernel drop the packets of who comes then: its queue is full."""
        self._deaf = True
        self._end_connections()
        with contextlib.suppress(OSError):  # it may hear this one, and ends with it
            socket.create_connection(("127.0.0.1", self.port), 0.3).close()
        self._accepting.join()
        with contextlib.suppress(TimeoutError):
            while len(self._queued) < 8:
                self._queued.append(socket.create_connection(("127.0.0.1", self.port), 0.3))

    def close(self) -> None:
        """End it."""
        self._ended = self._deaf = True
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for each in self._queued:
            each.close()
        self._end_connections()
        self._accepting.join()

    def _end_connections(self) -> None:
        while self._connections:
            with contextlib.suppress(OSError):
                self._connections.pop().shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            if self._deaf:
                connection.close()
                return
            threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    def _take(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._context.wrap_socket(connection, server_side=True) as taken:
            self._connections.append(taken)
            while not self._portion or self._leaves.acquire():
                if not taken.recv(self._portion or 65536):
                    return


def _json(status: int, text: str, code: int) -> web.Response:
    return web.json_response({"text": text, "code": code}, status=status)


def _failed(status: int, type_: str, reason: str) -> web.Response:
    return web.json_response({"error": {"type": type_, "reason": reason}, "status": status}, status=status)


@contextlib.asynccontextmanager
async def serving(server: Hec | Elastic, pki: Pki, *, port: int = 0) -> AsyncIterator[int]:
    """A receiver over TLS, which asks for no certificate; its port."""
    transports: set[asyncio.Transport | None] = set()

    @web.middleware
    async def noting(request: web.Request, handler: Callable[[web.Request], Any]) -> web.StreamResponse:
        transports.add(request.transport)
        answer: web.StreamResponse = await handler(request)
        return answer

    application = server.application()
    application.middlewares.append(noting)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        port = port or free_port()
        await web.TCPSite(runner, "127.0.0.1", port, ssl_context=server_context(pki)).start()
        yield port
    finally:
        await runner.cleanup()
        for transport in transports:  # of a client that cannot be reached, TLS would wait for a goodbye
            if transport is not None:
                with contextlib.suppress(AttributeError):  # Debian 12's Python knows none that was closed twice
                    transport.abort()


@contextlib.asynccontextmanager
async def rude(answer: bytes | None, pki: Pki) -> AsyncIterator[int]:
    """A server over TLS that answers whatever comes with the same bytes, or never; its port."""
    tasks: set[asyncio.Task[None] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while await reader.read(65536):
                if answer is not None:
                    writer.write(answer)
                    await writer.drain()
                    break
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort() if answer is None else writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(pki))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)


def server_context(pki: Pki, *, asks: bool = False) -> ssl.SSLContext:
    """The server's side of TLS; `asks`: for our certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.folder / "server.pem", pki.folder / "server.key")
    if asks:
        context.load_verify_locations(pki.folder / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def receiver_at(port: int, pki: Pki, *, client: str | None = None, server_name: str = "127.0.0.1") -> Receiver:
    """Where to; `client`: whose certificate is shown."""
    ours = (pki.folder / f"{client}.pem", pki.folder / f"{client}.key") if client else (None, None)
    return Receiver("127.0.0.1", port, server_name, pki.folder / "ca.pem", *ours)


def secret_file(folder: Path, secret: str, *, mode: int = 0o600) -> Path:
    """A file with a secret in it."""
    path = folder / "token"
    path.write_text(f"{secret}\n")
    path.chmod(mode)
    return path
