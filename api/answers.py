"""What every answer of the gateway has in common: its request's id, its shape when it is an error.

Rules:

- An error never waits for the rest of a body: it closes the connection where one was not read.
- Nothing here knows a route.
- What a request held goes when it ends, however it ends: see `drop_frames`.
"""

import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from api.openai.errors import error_object, retry_after_s, status_of
from appliance.errors import HoldfastError
from appliance.identity import Caller

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST = "holdfast.request"
"""The key of the `Request` in an ASGI scope."""

_JSON = (b"content-type", b"application/json")
_CLOSE = (b"connection", b"close")
_HARMLESS_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")


@dataclass(slots=True)
class Request:
    """What the guard found out about a request.

    Attributes:
        headers: by lower-case name; none of those that decide anything appears twice.
        source: the address that it came from.
        caller: who is asking; None on the routes that anybody may ask.
        answer_headers: what every answer to this request carries.
        session_id: what the client knows the request's session by; None where it is not known, or there is none.
        body_read: nothing of the body is left on the connection.
        came_s: when it came, by a clock that nobody sets.
    """

    request_id: str
    headers: dict[bytes, bytes]
    source: str = ""
    caller: Caller | None = None
    answer_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    session_id: bytes | None = None
    body_read: bool = False
    began: bool = False
    came_s: float = field(default_factory=time.monotonic)

    def took_ms(self) -> int:
        """How long ago it came, milliseconds."""
        return round(1000 * (time.monotonic() - self.came_s))

    def known_caller(self) -> Caller:
        """Who is asking, on a route that asked for a key."""
        if self.caller is None:
            raise RuntimeError("this route is not guarded by a key")
        return self.caller


def request_id_of(given: bytes, new_id: Callable[[], str]) -> bytes:
    """A request's id: the one that its client gave it if that is harmless, else a new one."""
    return given if _HARMLESS_ID.fullmatch(given) else new_id().encode()


def drop_frames(error: BaseException) -> None:
    """Let go of an error's traceback and of what it came of, where it is kept or told.

    Frames hold the request that they worked at, and may hold the error: such a circle stays until the cyclic collector
    comes, which is seldom (`api.server`).
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None


async def answer_json(send: Send, status: int, body: object, *, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    """Answer with `body` as JSON; bytes are JSON already."""
    data = body if isinstance(body, bytes) else to_json(body)
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [_JSON, (b"content-length", b"%d" % len(data)), *headers],
        }
    )
    await send({"type": "http.response.body", "body": data})


async def refuse(send: Send, request: Request, error: HoldfastError) -> None:
    """Answer with an error."""
    headers: list[tuple[bytes, bytes]] = []
    wait_s = retry_after_s(error)
    if wait_s is not None:
        headers.append((b"retry-after", b"%d" % wait_s))
    if status_of(error) == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if not request.body_read:
        headers.append(_CLOSE)
    await answer_json(send, status_of(error), error_object(error, request.request_id), headers=tuple(headers))
