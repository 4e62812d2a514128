"""What listens on a socket: uvicorn, without its signals, and with what the kernel is asked for.

Rules:

- The process's signals are its own business: no server here handles one.
- Over TLS, connections are accepted by `handshakes.TlsListener`: a handshake has a deadline; one that fails is told.
"""

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import ClassVar, cast

import uvicorn

from api.answers import App
from api.handshakes import TlsListener
from api.listener import BoundedProtocol, TellRefused
from appliance.errors import Fault, HoldfastError

_CLOSING_S = 2  # for connections to be closed
_IDLE_CONNECTION_S = 30


class CannotListen(HoldfastError, OSError):
    """A listener's address cannot be had."""

    code: ClassVar[str] = "cannot_listen"
    fault: ClassVar[Fault] = Fault.ENVIRONMENT


class Server(uvicorn.Server):
    """One listener.

    Args:
        certificate, private_key: it serves TLS with these, PEM; None: it does not.
        client_ca: only who shows a certificate of these is let in; None: whoever comes.
        most_connections: whoever comes over more than these is answered 503; None: nobody is.
        tell_refused: is told the source and the error of a handshake that failed.
    """

    def __init__(
        self,
        app: App,
        protocol: type[asyncio.Protocol],
        *,
        certificate: Path | None = None,
        private_key: Path | None = None,
        client_ca: Path | None = None,
        most_connections: int | None = None,
        tell_refused: TellRefused | None = None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=most_connections,
                timeout_keep_alive=_IDLE_CONNECTION_S,
                timeout_graceful_shutdown=_CLOSING_S,
                ssl_certfile=certificate,
                ssl_keyfile=private_key,
                ssl_ca_certs=None if client_ca is None else str(client_ca),
                ssl_cert_reqs=ssl.CERT_NONE if client_ca is None else ssl.CERT_REQUIRED,
            )
        )
        self._tell_refused = tell_refused
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and say so."""
        config, tell_refused = self.config, self._tell_refused
        if config.ssl is None or tell_refused is None or sockets is None:
            await super().startup(sockets)
        else:
            spoken = cast("type[BoundedProtocol]", config.http_protocol_class)
            create = partial(spoken, config, self.server_state, self.lifespan.state)
            listeners = [
                TlsListener(each, config.ssl, create, tell_refused, backlog=config.backlog) for each in sockets
            ]
            self.servers = cast("list[asyncio.base_events.Server]", listeners)
            self.started = True
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


def listen_tcp(host: str, port: int, named_by: str) -> socket.socket:
    """A socket that is bound, of the first address that `host` has; `named_by`: what to set otherwise.

    Raises:
        CannotListen: that address cannot be had.
    """
    host = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise CannotListen(
            f"nothing can listen on {host}, port {port}",
            cause=error.strerror or str(error),
            remedy=f"Choose a port that is free, or another address of this machine: {named_by}",
        ) from None
    return listener
