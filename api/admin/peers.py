"""Who is at the other end of the admin socket, told by the kernel.

Rules:

- The uid comes from SO_PEERCRED: it is the peer's at the moment it connected, and cannot be forged.
- The pid comes with it. It is not who asks, but tells the engine, which runs as the same user, from people.
- A connection whose peer cannot be told has no uid, and is nobody.
- What comes before and around a request is bounded as on the data listener.
"""

import asyncio
import socket
import struct

from pydantic_core import to_json

from api.admin import types
from api.listener import BoundedProtocol
from appliance.errors import HoldfastError

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid
_PREFIX = "uid="


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """The pid and uid at the other end of a connected Unix socket (unix(7), SO_PEERCRED)."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid, uid


class PeerCredentialsProtocol(BoundedProtocol):
    """HTTP over a Unix socket whose scope says who called: `scope["client"] = ("uid=1000", pid)`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ask the kernel before the first byte is read."""
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        self.client = None
        if connection is not None and connection.family == socket.AF_UNIX:
            pid, uid = peer_of(connection)
            self.client = (f"{_PREFIX}{uid}", pid)

    @staticmethod
    def content_of(error: HoldfastError, request_id: str) -> bytes:  # noqa: ARG004  (the admin API's errors have none)
        """A refusal's body, in the admin API's shape."""
        return to_json({"error": types.ErrorBody.of(error).model_dump()})


def uid_of(client: tuple[str, int] | None) -> int | None:
    """The uid in a scope's `client`, None when the connection did not come over the admin socket."""
    if client is None or not client[0].startswith(_PREFIX):
        return None
    return int(client[0].removeprefix(_PREFIX))


def pid_of(client: tuple[str, int] | None) -> int | None:
    """The pid of whoever connected, None when the connection did not come over the admin socket."""
    return None if client is None or uid_of(client) is None else client[1]
