"""Syslog over TLS: messages of RFC 5424 in the frames of RFC 5425, to a receiver that is known and knows us.

Rules:

- Both sides show a certificate. The receiver's must be from the destination's own CA and for its own name.
- TLS 1.2 with the ephemeral AES-GCM suites that RFC 9662 asks for, or TLS 1.3. Nothing older, no session without
  forward secrecy.
- Every wait has a deadline: connecting, the handshake, and until the kernel has taken what is sent. The kernel gives up
  on a peer that acknowledges nothing for as long (`TCP_USER_TIMEOUT`), and looks after an idle one (keepalive).
- What waits in this process is one batch: nothing is sent while an earlier one is not with the kernel.
- Syslog acknowledges nothing. What was sent is known to be with the receiver's kernel, once `deadline_s` has gone by
  and the connection is there still; more is never known.
"""

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final

from appliance.errors import Fault, HoldfastError

DEADLINE_S: Final = 20.0
_FACILITY: Final = 13  # log audit
_PRIORITIES: Final = {1: 6, 2: 5, 3: 4}  # OCSF's severity to syslog's: informational, notice, warning
# RFC 9662, section 4, and what RFC 9325 recommends beside it.
_CIPHERS: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384"
)
_MAX_HOST: Final = 255
_MAX_MSGID: Final = 32
_KEEPALIVE_IDLE_S: Final = 10
_KEEPALIVE_EVERY_S: Final = 5


class ExportUnreachable(HoldfastError, ConnectionError):
    """A destination takes nothing now."""

    code: ClassVar[str] = "audit_export_unreachable"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


class ExportUnusable(HoldfastError, ValueError):
    """A destination's certificates cannot be used."""

    code: ClassVar[str] = "audit_export_unusable"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where to, as whom, and whom to believe.

    Attributes:
        server_name: what its certificate must be for.
        ca: a file with the certificates that it may be from.
        certificate, private_key: ours, PEM.
    """

    host: str
    port: int
    server_name: str
    ca: Path
    certificate: Path
    private_key: Path

    def __str__(self) -> str:
        return f"{self.host}, port {self.port}"


def message(line: bytes, *, wall_ms: int, severity_id: int, host: str, kind: str) -> bytes:
    """One message (RFC 5424, section 6).

    Args:
        line: printable ASCII: the message itself (MSG-ANY; no byte order mark, which receivers of JSON stumble over).
        severity_id: OCSF's.
        host, kind: HOSTNAME and MSGID; what may not be in them is left out.
    """
    seconds, ms = divmod(wall_ms, 1000)
    moment = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    priority = 8 * _FACILITY + _PRIORITIES[severity_id]
    head = f"<{priority}>1 {moment}.{ms:03d}Z {_header(host, _MAX_HOST)} holdfast - {_header(kind, _MAX_MSGID)} - "
    return head.encode("ascii") + line


def frame(message_: bytes) -> bytes:
    """A message with its length before it (RFC 5425, section 4.3)."""
    return b"%d %b" % (len(message_), message_)


class Connection:
    """A connection with a receiver. Made by `connect`."""

    def __init__(
        self, receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline_s: float
    ) -> None:
        self._receiver = receiver
        self._reader = reader
        self._writer = writer
        self._deadline_s = deadline_s
        # What is read is dropped: a receiver has nothing to say but that it goes.
        self._ended = asyncio.create_task(self._read_to_the_end())

    async def send(self, frames: Sequence[bytes]) -> None:
        """Send frames; the kernel has them when this returns.

        Raises:
            ExportUnreachable: it is not known which of them arrived.
        """
        self.check()
        try:
            async with asyncio.timeout(self._deadline_s):
                self._writer.write(b"".join(frames))
                await self._writer.drain()
        except TimeoutError:
            raise self._unreachable(f"it took nothing for {self._deadline_s:g} s") from None
        except OSError as error:
            raise self._unreachable(in_words(error)) from None
        self.check()

    def check(self) -> None:
        """Raise `ExportUnreachable` if the connection has ended."""
        if self._ended.done():
            raise self._unreachable(self._ended.result())

    async def ended_within(self, seconds: float) -> bool:
        """Wait for the connection's end, at most so long; whether it came."""
        done, _ = await asyncio.wait([self._ended], timeout=seconds)
        return bool(done)

    async def close(self, *, in_good_order: bool = False) -> None:
        """Close it; `in_good_order`: tell the receiver, which then may take it that nothing is missing."""
        if in_good_order:
            self._writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._writer.wait_closed()
        self._writer.transport.abort()
        self._ended.cancel()
        await asyncio.gather(self._ended, return_exceptions=True)

    async def _read_to_the_end(self) -> str:
        try:
            while await self._reader.read(4096):
                pass
        except OSError as error:
            return in_words(error)
        return "it closed the connection"

    def _unreachable(self, cause: str) -> ExportUnreachable:
        return unreachable(self._receiver, cause)


async def connect(receiver: Receiver, *, deadline_s: float = DEADLINE_S) -> Connection:
    """Connect with a receiver.

    Raises:
        ExportUnreachable: nobody answers, or not whom we know.
        ExportUnusable: our own certificate, key or CA cannot be used.
    """
    context = tls_context(receiver)
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(
                receiver.host, receiver.port, ssl=context, server_hostname=receiver.server_name
            )
    except TimeoutError:
        raise unreachable(receiver, f"nobody answered within {deadline_s:g} s") from None
    except OSError as error:
        raise unreachable(receiver, in_words(error)) from None
    writer.transport.set_write_buffer_limits(high=0)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(deadline_s * 1000))
    return Connection(receiver, reader, writer, deadline_s)


def tls_context(receiver: Receiver) -> ssl.SSLContext:
    """What is spoken with a receiver. Reads files.

    Raises:
        ExportUnusable: says which file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and the name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    path = receiver.ca
    try:
        context.load_verify_locations(receiver.ca)
        path = receiver.certificate
        context.load_cert_chain(receiver.certificate, receiver.private_key, password=_no_passphrase)
    except (OSError, ValueError) as error:
        told = in_words(error) if isinstance(error, OSError) else str(error)
        raise ExportUnusable(
            f"the certificates for {receiver} cannot be used",
            cause=f"{path}: {told}",
            remedy="Put PEM files there that the appliance's user can read; the key without a passphrase",
        ) from None
    return context


def unreachable(receiver: Receiver, cause: str) -> ExportUnreachable:
    """What a destination that takes nothing means to a person."""
    return ExportUnreachable(
        f"{receiver} takes no events",
        cause=cause,
        remedy="Nothing is lost: events wait in the log. See that the receiver runs and both certificates hold",
    )


def in_words(error: OSError) -> str:
    """What went wrong, without the numbers of a library's lines."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate does not hold: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {(error.reason or 'it failed').replace('_', ' ').lower()}"
    return (os.strerror(error.errno) if error.errno else str(error)) or type(error).__name__


def _no_passphrase() -> str:
    raise ValueError("the private key has a passphrase")


def _header(text: str, at_most: int) -> str:
    """A field of the header: printable ASCII without spaces, `-` for nothing."""
    return "".join(character for character in text if "!" <= character <= "~")[:at_most] or "-"
