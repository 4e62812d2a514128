"""Syslog over TLS: messages of RFC 5424 in the frames of RFC 5425, to a receiver that is known and knows us.

Rules:

- Both sides show a certificate. The receiver's must be from the destination's own CA and for its own name.
- TLS 1.2 with the ephemeral AES-GCM suites that RFC 9662 asks for, or TLS 1.3. Nothing older, no session without
  forward secrecy.
- Every wait has a deadline: connecting, the handshake, and until the kernel has taken what is sent. The kernel gives up
  on a peer that acknowledges nothing for as long (`TCP_USER_TIMEOUT`), and looks after an idle one (keepalive).
- What waits in this process is one batch: nothing is sent while an earlier one is not with the kernel. Of what is not
  on its way yet the kernel has `_MOST_NOT_SENT` bytes.
- A receiver that reads slowly is waited for: it is given up when its kernel has taken no byte within the deadline.
- Syslog acknowledges nothing. `arrived` counts what the other kernel acknowledged: the receiver's, where nobody is on
  the line. TCP's acknowledgements are not authenticated, so somebody on the line can give them and forward nothing; TLS
  shows that only to the receiver, and only if something comes later. More is never known.
"""

import asyncio
import contextlib
import fcntl
import functools
import os
import socket
import ssl
import struct
import termios
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from appliance.audit.siem.files import check_regular, read_in_time
from appliance.audit.siem.transport import ExportUnreachable, ExportUnusable, Message

PORT: Final = 6514
MAX_MESSAGE_BYTES: Final = 8000  # rsyslog cuts off what is over 8 KiB unless told otherwise
DEADLINE_S: Final = 20.0
_FACILITY: Final = 13  # log audit
_PRIORITIES: Final = {1: 6, 2: 5, 3: 4}  # OCSF's severity to syslog's: informational, notice, warning
# RFC 9662, section 4, and what RFC 9325 recommends beside it.
_CIPHERS: Final = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:"
    "ECDHE-ECDSA-AES256-GCM-SHA384:ECDHE-RSA-AES256-GCM-SHA384"
)
MAX_HOST: Final = 255
MAX_MSGID: Final = 32
HEADER_BYTES: Final = 60  # beside host and MSGID
_KEEPALIVE_IDLE_S: Final = 10
_KEEPALIVE_EVERY_S: Final = 5
_MOST_NOT_SENT: Final = 128 << 10  # bytes
_MOST_SAID: Final = 64 << 10  # bytes
# What the loop's transport under TLS holds when it has no room for more, and what TLS adds to a batch: no less.
_HELD_BYTES: Final = 64 << 10
_TCP_INFO_BYTES: Final = 128
_BYTES_ACKED_AT: Final = 120  # tcpi_bytes_acked of linux/tcp.h


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where to, as whom, and whom to believe.

    Attributes:
        server_name: what its certificate must be for.
        ca: a file with the certificates that it may be from.
        certificate, private_key: ours, PEM; None: we show none, for transports where that is left to the receiver.
    """

    host: str
    port: int
    server_name: str
    ca: Path
    certificate: Path | None
    private_key: Path | None

    def __str__(self) -> str:
        return f"{self.host}, port {self.port}"


class SyslogTls:
    """The transport, as `transport.Transport` has it.

    Args:
        hostname: what we are called in messages.
        max_message_bytes: what the receiver takes, header and all.
    """

    messages_at_once: Final = 64

    def __init__(
        self,
        receiver: Receiver,
        *,
        hostname: str,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._receiver = receiver
        self._hostname = header_field(hostname, MAX_HOST)
        self._max_message_bytes = max_message_bytes
        self._deadline_s = deadline_s

    def __str__(self) -> str:
        return str(self._receiver)

    @property
    def max_payload_bytes(self) -> int:
        """What the longest header leaves."""
        return self._max_message_bytes - HEADER_BYTES - len(self._hostname) - MAX_MSGID

    async def connect(self) -> "Connection":
        """See `Transport.connect`."""
        return await connect(self._receiver, hostname=self._hostname, deadline_s=self._deadline_s)


def framed(sent: Message, hostname: str) -> bytes:
    """`line`, with its length before it (RFC 5425, section 4.3)."""
    made = line(sent, hostname)
    return b"%d %b" % (len(made), made)


def line(sent: Message, hostname: str) -> bytes:
    """One message (RFC 5424, section 6).

    The payload is the message itself (MSG-ANY; no byte order mark, which receivers of JSON stumble over).

    Args:
        hostname: HOSTNAME, as `header_field` leaves it.
    """
    seconds, ms = divmod(sent.wall_ms, 1000)
    priority = 8 * _FACILITY + _PRIORITIES[sent.severity_id]
    head = b"<%d>1 %b.%03dZ %b holdfast - %b - " % (
        priority, _moment(seconds), ms, hostname.encode("ascii"), _message_id(sent.kind)
    )  # fmt: skip
    return head + sent.payload


@functools.lru_cache(8)
def _moment(seconds: int) -> bytes:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode("ascii")


@functools.lru_cache(256)
def _message_id(kind: str) -> bytes:
    return header_field(kind, MAX_MSGID).encode("ascii")


class _Handed(NamedTuple):
    """Once the other kernel has acknowledged so many bytes, so many messages of the connection arrived."""

    bytes: int
    messages: int


class Connection:
    """A connection with a receiver. Made by `connect`."""

    def __init__(
        self,
        receiver: Receiver,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        hostname: str,
        deadline_s: float,
    ) -> None:
        self._receiver = receiver
        self._hostname = hostname
        self._reader = reader
        self._writer = writer
        self._deadline_s = deadline_s
        self._sent = self._arrived = 0  # messages
        self._on_the_way: deque[_Handed] = deque()
        self._was_all_at = -1  # so many messages were sent when nothing was on its way
        # What is read is dropped: a receiver has nothing to say but that it goes. One that talks would have us listen.
        self._ended = asyncio.create_task(self._read_to_the_end())

    @property
    def acknowledged(self) -> int | None:
        """Nothing ever is."""
        return None

    def arrived(self) -> int:
        """See `transport.Connection.arrived`: what the other kernel acknowledged."""
        if self._writer.transport.is_closing():  # its descriptor may be another's by now
            return self._arrived
        acknowledged, on_the_way = self._kernel()
        while self._on_the_way and self._on_the_way[0].bytes <= acknowledged:
            self._arrived = self._on_the_way.popleft().messages
        # Where nothing is sent any more, what lies in the loop's own transport is with the kernel a turn later.
        if not on_the_way and self._was_all_at == self._sent:
            self._on_the_way.clear()
            self._arrived = self._sent
        self._was_all_at = -1 if on_the_way else self._sent
        return self._arrived

    async def send(self, messages: Sequence[Message]) -> None:
        """Send messages; the kernel has them when this returns.

        Raises:
            ExportUnreachable: it is not known which of them arrived.
        """
        self.check()
        data = b"".join([framed(each, self._hostname) for each in messages])
        try:
            self._writer.write(data)
            await self._drain()
            acknowledged, on_the_way = self._kernel()
        except TimeoutError:
            raise self._unreachable(f"it took nothing for {self._deadline_s:g} s") from None
        except OSError as error:
            raise self._unreachable(in_words(error)) from None
        self.check()
        self._sent += len(messages)
        self._on_the_way.append(_Handed(acknowledged + on_the_way + 2 * len(data) + _HELD_BYTES, self._sent))

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

    async def _drain(self) -> None:
        """Until the kernel has what was written, as long as the other one takes something."""
        acknowledged, _ = self._kernel()
        while True:
            waits = asyncio.timeout(self._deadline_s)
            try:
                async with waits:
                    return await self._writer.drain()
            except TimeoutError:
                before = acknowledged
                # The kernel's own `TimeoutError` is none of ours: it has given the peer up.
                if not waits.expired() or (acknowledged := self._kernel()[0]) == before:
                    raise

    def _kernel(self) -> tuple[int, int]:
        """How many bytes the other kernel acknowledged since the connection began, and how many it has yet to."""
        connection = self._writer.get_extra_info("socket")
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        return struct.unpack_from("=Q", info, _BYTES_ACKED_AT)[0], struct.unpack("=i", queued)[0]

    async def _read_to_the_end(self) -> str:
        try:
            said = 0
            while said <= _MOST_SAID and (heard := await self._reader.read(4096)):
                said += len(heard)
            if said > _MOST_SAID:
                return "it says much, and a receiver of syslog has nothing to say"
        except OSError as error:
            return in_words(error)
        return "it closed the connection"

    def _unreachable(self, cause: str) -> ExportUnreachable:
        return unreachable(self._receiver, cause)


async def connect(receiver: Receiver, *, hostname: str, deadline_s: float = DEADLINE_S) -> Connection:
    """Connect with a receiver. Raises as `open_tls`."""
    reader, writer = await open_tls(receiver, deadline_s)
    return Connection(receiver, reader, writer, hostname=hostname, deadline_s=deadline_s)


async def open_tls(receiver: Receiver, deadline_s: float) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection over TLS, on which a peer that is silent is given up.

    Raises:
        ExportUnreachable: nobody answers, or not whom we know.
        ExportUnusable: our own certificate, key or CA cannot be used.
    """
    context = await read_in_time(deadline_s, tls_context, receiver)
    try:
        async with asyncio.timeout(deadline_s):
            reader, writer = await asyncio.open_connection(
                receiver.host, receiver.port, ssl=context, server_hostname=receiver.server_name
            )
    except TimeoutError:
        raise unreachable(receiver, f"nobody answered within {deadline_s:g} s") from None
    except OSError as error:
        raise unreachable(receiver, in_words(error)) from None
    # Not `high=0`: asyncio's TLS would stop the writer where nothing waits, and nothing would start it again.
    writer.transport.set_write_buffer_limits(high=1, low=0)
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_EVERY_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(deadline_s * 1000))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _MOST_NOT_SENT)
    return reader, writer


def tls_context(receiver: Receiver) -> ssl.SSLContext:
    """What is spoken with a receiver. Reads files: blocks.

    Raises:
        ExportUnusable: says which file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks the certificate and the name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    path = receiver.ca
    try:
        check_regular(path)
        context.load_verify_locations(path)
        if receiver.certificate is not None:
            for path in filter(None, (receiver.private_key, receiver.certificate)):
                check_regular(path)
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
    if isinstance(error, socket.gaierror):  # its number is none of the system's
        return f"its name has no address: {error.strerror}"
    if error.filename is not None and error.strerror:
        return error.strerror
    # What the loop says of a connection has addresses in it; the number says enough.
    return (os.strerror(error.errno) if error.errno else str(error)) or type(error).__name__


def _no_passphrase() -> str:
    raise ValueError("the private key has a passphrase")


def header_field(text: str, at_most: int) -> str:
    """A field of the header: printable ASCII without spaces, `-` for nothing."""
    return "".join(character for character in text if "!" <= character <= "~")[:at_most] or "-"
