"""A witness that is asked over the network: C2SP tlog-witness, its one call for logs, on another node than theirs.

Rules:

- `POST /add-checkpoint` and nothing else. The body is `witness.read_request`'s: `old` and a size, the hashes of a
  consistency proof, an empty line, the checkpoint. Answered with the co-signature line (200), or as the document has
  it: 404 where no key is known for the checkpoint's origin, 403 where that key did not sign it, 400 where it is no
  request, or its old size is larger than its checkpoint's; 409 where the witness saw another size than the old one,
  which the body says (`text/x.tlog.size`), or another tree of that size; 422 where the proof does not hold.
- The state is `witness.Witness`'s: on the disk before a co-signature leaves, under the lock that `cosign` takes too.
  Requests are worked at one after the other. Where another process is at work, that is 503: ask again.
- A log that was rolled back or forked is refused, and said in one line with its name and both sizes; so is, once, one
  that has not grown for `SILENT_S`: whoever has root there can keep its appliance from saying so, and show again what
  it signed before. Only who has what a log's key signed can cause such a line, and of each log and kind there are
  `_MOST_SAID` a minute, and then how many more: whoever sends old checkpoints again and again fills no journal, and
  hides no fork.
- A request has a size, and a deadline until its last byte; connections have a number. It holds one key, the witness's.

Source: https://c2sp.org/tlog-witness, "add-checkpoint".
"""

import asyncio
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from api.answers import Receive, Scope, Send
from api.listener import bounded_by
from api.serving import CannotListen, Server, listen_tcp
from appliance.audit.notes import (
    Algorithm,
    Checkpoint,
    KeyInvalid,
    NoteInvalid,
    SigningKey,
    VerifierKey,
    open_checkpoint,
)
from appliance.audit.witness import (
    MAX_REQUEST_BYTES,
    CosignatureRefused,
    LogForked,
    LogShrunk,
    OldSizeDiffers,
    RequestInvalid,
    Witness,
    WitnessBusy,
    WitnessStateUnusable,
    read_request,
)
from appliance.errors import HoldfastError
from appliance.settings import is_loopback
from appliance.vault.process import forbid_core_dumps

PATH: Final = "/add-checkpoint"
SIZE_TYPE: Final = b"text/x.tlog.size"
_TEXT: Final = b"text/plain; charset=utf-8"
_BODY_DEADLINE_S: Final = 15.0
_MAX_HEADER_BYTES: Final = 16 << 10
_UNREAD_S: Final = 10.0
_MOST_CONNECTIONS: Final = 64
SILENT_S: Final = 600.0  # an appliance that runs has a checkpoint a minute
_LOOK_EVERY_S: Final = 30.0
_MOST_SAID: Final = 10  # refusals of one log, of one kind, in `_SAID_S`
_SAID_S: Final = 60.0
_LOG = logging.getLogger("holdfast.witness")


class Answer(NamedTuple):
    """What is answered."""

    status: int
    body: bytes
    kind: bytes = _TEXT
    headers: tuple[tuple[bytes, bytes], ...] = ()


class _Refused:
    """How often a log was refused for one reason, since when."""

    __slots__ = ("since_s", "times")

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.times = 0

    @property
    def unsaid(self) -> int:
        return max(0, self.times - _MOST_SAID)


class WitnessService:
    """The call, as an ASGI application.

    Args:
        logs: the keys of the logs that are witnessed.
        now: epoch seconds.
        monotonic: a clock that nobody sets, seconds.
        body_deadline_s: from a request's headers to its last byte.

    Raises:
        KeyInvalid: two keys are of one log, or one is a witness's.
    """

    def __init__(
        self,
        witness: Witness,
        logs: Sequence[VerifierKey],
        *,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        body_deadline_s: float = _BODY_DEADLINE_S,
    ) -> None:
        self._witness = witness
        self._logs = _by_origin(logs)
        self._now = now
        self._monotonic = monotonic
        self._heard_s = dict.fromkeys(self._logs, monotonic())
        self._silent: set[str] = set()
        self._seen: dict[str, int] = {}  # the largest size of each log since the start
        self._refused: dict[tuple[str, type[CosignatureRefused]], _Refused] = {}
        self._refusing = threading.Lock()
        self._body_deadline_s = body_deadline_s
        self._one_by_one = ThreadPoolExecutor(1, thread_name_prefix="witness")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        answer = await self._answer(scope, receive)
        if answer is None:
            return
        headers = [
            (b"content-type", answer.kind),
            (b"content-length", str(len(answer.body)).encode()),
            *answer.headers,
        ]
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body})

    async def _answer(self, scope: Scope, receive: Receive) -> Answer | None:
        if scope["path"] != PATH:
            return _told(404, f"a witness answers {PATH}")
        if scope["method"] != "POST":
            return _told(405, "it is asked by POST", (b"allow", b"POST"))
        try:
            async with asyncio.timeout(self._body_deadline_s):
                body = await _whole_body(receive)
        except TimeoutError:
            return _told(408, f"the request was not there within {self._body_deadline_s:g} s")
        except _TooLong:
            return _told(413, f"a request has {MAX_REQUEST_BYTES} bytes at most")
        if body is None:
            return None
        return await asyncio.get_running_loop().run_in_executor(self._one_by_one, self.answer, body)

    def answer(self, request: bytes) -> Answer:
        """What a request is answered. Blocks for the disk."""
        try:
            note = read_request(request).note
            origin = Checkpoint.parse(note.rpartition("\n\n")[0] + "\n").origin
        except (RequestInvalid, NoteInvalid) as error:
            return _told(400, _in_words(error))
        log = self._logs.get(origin)
        if log is None:
            return _told(404, f"no log {origin} is witnessed here")
        try:
            checkpoint = open_checkpoint(note, log)
        except NoteInvalid as error:
            return _told(403, error.cause)
        try:
            line = self._witness.cosign(request, log, int(self._now()))
        except RequestInvalid as error:
            return _told(400, _in_words(error))
        except CosignatureRefused as error:
            if not isinstance(error, OldSizeDiffers):
                self._say_refused(checkpoint, error)
            return _refusal(error)
        except WitnessBusy as error:
            return _told(503, _in_words(error), (b"retry-after", b"1"))
        except WitnessStateUnusable as error:
            _LOG.error("nothing is co-signed: %s", error)
            return _told(500, "the witness's state cannot be used")
        if checkpoint.size > self._seen.get(origin, -1):
            self._seen[origin] = checkpoint.size
            self._heard(origin)
        return Answer(200, line)

    def tell_silent(self) -> None:
        """Say which logs have not grown for long, of each once; one that lives has a mark every minute."""
        now_s = self._monotonic()
        for origin, heard_s in self._heard_s.items():
            if origin not in self._silent and now_s >= heard_s + SILENT_S:
                self._silent.add(origin)
                _LOG.warning("SILENT: log=%s for_s=%.0f", origin, now_s - heard_s)

    def tell_unsaid(self, *, at_once: bool = False) -> None:
        """Say how many refusals were not said, of each log and kind whose minute is over, or `at_once`."""
        with self._refusing:
            now_s = self._monotonic()
            for key, refused in list(self._refused.items()):
                if at_once or now_s >= refused.since_s + _SAID_S:
                    del self._refused[key]
                    if refused.unsaid:
                        _LOG.error("REFUSED %d times more: log=%s, of the kind said before", refused.unsaid, key[0])

    def _say_refused(self, checkpoint: Checkpoint, error: CosignatureRefused) -> None:
        self.tell_unsaid()
        origin = checkpoint.origin
        with self._refusing:
            refused = self._refused.setdefault((origin, type(error)), _Refused(self._monotonic()))
            refused.times += 1
            if refused.unsaid:
                return
        _LOG.error(
            "REFUSED %s: log=%s witness_size=%d size=%d root=%s",
            "rollback" if isinstance(error, LogShrunk) else "fork",
            origin,
            error.witness_size,
            checkpoint.size,
            checkpoint.root.hex(),
        )

    def _heard(self, origin: str) -> None:
        now_s = self._monotonic()
        if origin in self._silent:
            self._silent.discard(origin)
            _LOG.warning("came again: log=%s after_s=%.0f", origin, now_s - self._heard_s[origin])
        self._heard_s[origin] = now_s


def serve(
    state: Path,
    key: SigningKey,
    logs: Sequence[VerifierKey],
    *,
    host: str,
    port: int,
    certificate: Path | None = None,
    private_key: Path | None = None,
    client_ca: Path | None = None,
    listening: Callable[[str], None] = lambda _: None,
) -> None:
    """Be a witness until SIGTERM or SIGINT. Blocks.

    Args:
        certificate, private_key: TLS is served with these; None: none is, which is for the loopback only.
        client_ca: only who shows a certificate of these is answered; None: whoever comes.
        listening: told the address once connections are accepted.

    Raises:
        CannotListen: the address cannot be had, or the files cannot be used.
        KeyInvalid: a key cannot be a log's, or a witness's.
    """
    forbid_core_dumps()
    os.umask(0o077)
    if certificate is None and not is_loopback(host):
        raise CannotListen(
            "the witness does not listen without TLS",
            cause=f"{host} is not a loopback address",
            remedy="Give --certificate and --private-key",
        )
    service = WitnessService(Witness(state, key), logs)
    server = Server(
        service,
        bounded_by(_MAX_HEADER_BYTES, _UNREAD_S, _tell_nobody),
        certificate=certificate,
        private_key=private_key,
        client_ca=client_ca,
        most_connections=_MOST_CONNECTIONS,
        tell_refused=_tell_nobody,
    )
    try:
        server.config.load()
    except (OSError, ValueError) as error:
        named = ", ".join(str(path) for path in (certificate, private_key, client_ca) if path is not None)
        raise CannotListen(
            "the witness's certificates cannot be used",
            cause=f"{named}: {error}",
            remedy="Put PEM files there that the witness's user can read; the key without a passphrase",
        ) from None
    with listen_tcp(host, port, "--listen") as listener:
        scheme = "http" if certificate is None else "https"
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        asyncio.run(_serve(server, service, listener, lambda: listening(address)))


async def _serve(
    server: Server, service: WitnessService, listener: socket.socket, listening: Callable[[], None]
) -> None:
    def end() -> None:
        server.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, end)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    begun = asyncio.create_task(server.listening.wait())
    await asyncio.wait([serving, begun], return_when=asyncio.FIRST_COMPLETED)
    if begun.done():
        listening()
    begun.cancel()
    looking = asyncio.create_task(_keep_looking(service))
    await serving
    looking.cancel()
    service.tell_unsaid(at_once=True)


def _tell_nobody(source: str, error: HoldfastError) -> None:
    """What a stranger sends is no line of the journal's."""


async def _keep_looking(service: WitnessService) -> None:
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        service.tell_silent()
        service.tell_unsaid()


# Answers


def _refusal(error: CosignatureRefused) -> Answer:
    """What a log's own checkpoint is answered that does not go on from what the witness saw."""
    if isinstance(error, LogForked) and error.size != error.witness_size:
        return _told(422, "the consistency proof does not hold")
    return Answer(409, b"%d\n" % error.witness_size, SIZE_TYPE)


def _told(status: int, why: str, *headers: tuple[bytes, bytes]) -> Answer:
    return Answer(status, f"{why}\n".encode(), headers=headers)


def _in_words(error: HoldfastError) -> str:
    return f"{error.message}: {error.cause}"


# Requests


class _TooLong(Exception):
    """A body is longer than any request."""


async def _whole_body(receive: Receive) -> bytes | None:
    """A request's body; None: there is nobody any more who would be answered.

    Raises:
        _TooLong: it has more than `MAX_REQUEST_BYTES`.
    """
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_REQUEST_BYTES:
            raise _TooLong
        if not message.get("more_body", False):
            return bytes(body)


def _by_origin(logs: Sequence[VerifierKey]) -> Mapping[str, VerifierKey]:
    by_origin: dict[str, VerifierKey] = {}
    for key in logs:
        if key.algorithm is not Algorithm.ED25519 or by_origin.setdefault(key.name, key) != key:
            raise KeyInvalid(
                f"{key.name} cannot be witnessed",
                cause="two keys are given for it"
                if key.algorithm is Algorithm.ED25519
                else "the key is a witness's, and a log's is needed",
                remedy="Give one key for each log, as `holdfast audit status` shows it; another key is another log",
            )
    return by_origin
