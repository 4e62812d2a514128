"""Requests to a receiver over HTTPS, for the transports that make them (`splunk`, `elastic`).

Rules:

- TLS as `syslog` speaks it: the receiver's certificate is from the destination's own CA and for its own name; ours is
  shown where the destination names one.
- Every request has a deadline, from finding the receiver to the last byte of its answer. An answer is read up to
  `MAX_ANSWER_BYTES`. Nothing is unpacked, no cookie is kept, no redirect followed, no proxy of the environment used.
- A connection on which packets are dropped is ended with its client: nothing is left that waits for a peer's goodbye.
- A secret is read from a file that nobody but its owner may read, is sent to the receiver alone, and is in no error.
- What a receiver says is shown to people as printable ASCII, cut.
"""

import contextlib
import json
import os
import socket
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import yarl

from appliance.audit.files import open_regular
from appliance.audit.siem.files import MAX_FILE_BYTES, read_in_time
from appliance.audit.siem.syslog import Receiver, in_words, tls_context, unreachable
from appliance.audit.siem.transport import ExportUnusable

DEADLINE_S: Final = 20.0
MAX_ANSWER_BYTES: Final = 4 << 20  # an item of a bulk answer has a few hundred bytes
_MAX_SECRET_BYTES: Final = 4096
_MAX_TOLD: Final = 200  # characters
_IDLE_S: Final = 5.0  # shorter than receivers keep an idle connection open (Splunk: 12 s)
_PORT: Final = 443


class Answer(NamedTuple):
    """What a receiver answered."""

    status: int
    body: bytes

    def parsed(self) -> dict[str, Any]:
        """The JSON object in it; empty: there is none."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def told(self, text: str | None = None) -> str:
        """The status, and what it says or `text` says, for people."""
        said = self.body.decode("ascii", "replace") if text is None else text
        seen = "".join(character if " " <= character <= "~" else " " for character in said[: 2 * _MAX_TOLD]).strip()
        return f"it answered {self.status}: {seen[:_MAX_TOLD]}" if seen else f"it answered {self.status}"


class Client:
    """Makes requests to one receiver, one connection at a time. Close it.

    Args:
        headers: what every request carries.
    """

    def __init__(self, receiver: Receiver, context: ssl.SSLContext, headers: Mapping[str, str], deadline_s: float):
        self.receiver = receiver
        self._deadline_s = deadline_s
        self._sockets: list[socket.socket] = []
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                ssl=context, limit=2, keepalive_timeout=_IDLE_S, socket_factory=self._new_socket
            ),
            headers={"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "holdfast", **headers},
            timeout=aiohttp.ClientTimeout(total=deadline_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def ask(self, method: str, path: str, *, body: bytes | None = None, kind: str = "application/json") -> Answer:
        """One request, and what was answered.

        Args:
            path: with its query, as it is sent.
            kind: what the body is.

        Raises:
            ExportUnreachable: there was no answer, none in time, or none that can be one.
        """
        host, port = self.receiver.host, self.receiver.port
        url = yarl.URL.build(scheme="https", host=host, port=port).join(yarl.URL(path, encoded=True))
        try:
            async with self._session.request(
                method,
                url,
                data=body,
                headers={"Content-Type": kind} if body is not None else {},
                allow_redirects=False,
                server_hostname=self.receiver.server_name,
            ) as response:
                answer = Answer(response.status, await self._bounded(response))
        except TimeoutError:
            raise unreachable(self.receiver, f"it did not answer within {self._deadline_s:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise unreachable(self.receiver, _in_words(error)) from None
        if 300 <= answer.status < 400:
            raise unreachable(self.receiver, f"it answered {answer.status}: a redirect, which is not followed")
        return answer

    async def close(self) -> None:
        """End it."""
        await self._session.close()
        # TLS waits for the other side's goodbye, for half a minute: not behind who closes this.
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _new_socket(self, address: aiohttp.AddrInfoType) -> socket.socket:
        family, kind, protocol, *_ = address
        made = socket.socket(family, kind, protocol)
        self._sockets = [*(each for each in self._sockets if each.fileno() != -1), made]
        return made

    async def _bounded(self, response: aiohttp.ClientResponse) -> bytes:
        body = bytearray()
        async for chunk in response.content.iter_any():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                response.close()
                raise unreachable(self.receiver, f"its answer has more than {MAX_ANSWER_BYTES} bytes")
        return bytes(body)


async def open_client(receiver: Receiver, headers: Mapping[str, str], *, deadline_s: float) -> Client:
    """A client; nothing is connected yet.

    Raises:
        ExportUnusable: our certificates cannot be used.
    """
    return Client(receiver, await read_in_time(deadline_s, tls_context, receiver), headers, deadline_s)


def read_secret(path: Path, receiver: Receiver) -> str:
    """A token from a file: one line of printable ASCII. Blocks.

    Raises:
        ExportUnusable: it cannot be read, others can read it too, or it is no token.
    """
    try:
        descriptor = open_regular(path, most=MAX_FILE_BYTES)
        try:
            found = os.fstat(descriptor)
            content = os.read(descriptor, _MAX_SECRET_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise _unusable(path, receiver, in_words(error)) from None
    if found.st_mode & 0o077:
        raise _unusable(path, receiver, f"others may read it: its mode is {stat.S_IMODE(found.st_mode):04o}")
    secret = content.strip()
    if not secret or len(content) > _MAX_SECRET_BYTES or not all(0x21 <= byte <= 0x7E for byte in secret):
        raise _unusable(path, receiver, "it holds something else than one word of printable ASCII")
    return secret.decode("ascii")


def _unusable(path: Path, receiver: Receiver, cause: str) -> ExportUnusable:
    return ExportUnusable(
        f"the token for {receiver} cannot be used",
        cause=f"{path}: {cause}",
        remedy="Put the token there as one line, in a file of the appliance's user with the mode 0600",
    )


def _in_words(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorCertificateError) and isinstance(error.certificate_error, OSError):
        return in_words(error.certificate_error)
    if isinstance(error, aiohttp.ClientConnectorError):
        return in_words(error.os_error)
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError)):
        return "it closed the connection before it had answered"
    if isinstance(error, aiohttp.ClientResponseError):
        return "what it answered is no HTTP"
    return in_words(error) if isinstance(error, OSError) else type(error).__name__
