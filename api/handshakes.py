"""A listener for TLS, which tells of handshakes that fail.

Rules:

- An event loop's own server ends a connection whose handshake fails without a word to anybody: nothing that it calls
  knows of it. So connections are accepted here, and `connect_accepted_socket`, which says what failed, does it.
- What failed is told to `tell_refused`, with the address: anybody can cause it, so whoever is told counts. Who goes
  again before saying a word, as what looks whether the port is open does, has begun no handshake.
- A handshake has a deadline, and there are `_MOST_SHAKING` at most: who comes then waits in the kernel's queue. Where
  there are no descriptors for another connection those that come wait for some.
"""

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable
from functools import partial
from typing import Final

from api.listener import TellRefused
from api.openai.errors import HandshakeFailed

_DEADLINE_S: Final = 15.0
_AGAIN_S: Final = 1.0
_MOST_SHAKING: Final = 256  # connections that have said nothing yet, or whose handshake is not over
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_LOG: Final = logging.getLogger("holdfast.gateway")


class TlsListener:
    """What `loop.create_server` returns, as far as uvicorn asks for it.

    Args:
        listener: is bound, and does not listen yet.
        context: the certificate and its key.
        create_protocol: makes what is spoken on a connection; its `connection_made` is called after the handshake.
        tell_refused: is told the source and the error of a handshake that failed.
    """

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        create_protocol: Callable[[], asyncio.Protocol],
        tell_refused: TellRefused,
        *,
        backlog: int,
    ) -> None:
        listener.setblocking(False)
        listener.listen(backlog)
        self._listener = listener
        self._context = context
        self._create_protocol = create_protocol
        self._tell_refused = tell_refused
        self._shaking: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.create_task(self._accept())

    def close(self) -> None:
        """Accept no more, and end the handshakes that are not over."""
        for task in (self._accepting, *self._shaking):
            task.cancel()

    async def wait_closed(self) -> None:
        """Over when all of that has ended."""
        await asyncio.gather(self._accepting, *self._shaking, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            if len(self._shaking) >= _MOST_SHAKING:
                await asyncio.wait(self._shaking, return_when=asyncio.FIRST_COMPLETED)
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    _LOG.warning("no connection can be accepted now: %s", error.strerror)
                    await asyncio.sleep(_AGAIN_S)
                continue
            task = loop.create_task(self._shake_hands(connection, str(address[0])))
            self._shaking.add(task)
            task.add_done_callback(partial(self._shaken, connection))
            await asyncio.sleep(0)  # however many wait to be accepted, whoever is connected goes on

    def _shaken(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)
        if task.cancelled():  # before its first step, too
            connection.close()

    async def _shake_hands(self, connection: socket.socket, source: str) -> None:
        try:
            if not await _speaks(connection):
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                self._create_protocol, connection, ssl=self._context, ssl_handshake_timeout=_DEADLINE_S
            )
        except OSError as error:  # what SSL raises is one, and so is what a deadline does
            self._tell_refused(
                source,
                HandshakeFailed(
                    "a TLS handshake failed",
                    cause=getattr(error, "reason", None) or str(error) or "the client ended it, or said nothing",
                    remedy="See that the client speaks TLS 1.2 or 1.3, and believes the certificate of this gateway",
                ),
            )


async def _speaks(connection: socket.socket) -> bool:
    """Wait for the first byte, and leave it there; False: the client is gone, and the connection closed.

    Raises:
        TimeoutError: none came in time; the connection is closed.
    """
    loop = asyncio.get_running_loop()
    readable, spoke = asyncio.Event(), False
    loop.add_reader(connection, readable.set)
    try:
        async with asyncio.timeout(_DEADLINE_S):
            await readable.wait()
        with contextlib.suppress(ConnectionResetError):
            spoke = bool(connection.recv(1, socket.MSG_PEEK))
        return spoke
    finally:
        loop.remove_reader(connection)
        if not spoke:
            connection.close()
