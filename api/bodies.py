"""Reading a request's body within its bounds.

Rules:

- No more than the bound is ever held, whatever `Content-Length` says or does not say.
- The whole body has one deadline, so that a slow trickle ends too.
"""

import asyncio

from api.answers import Receive, Request
from api.openai.errors import BodyTooLarge, BodyTooSlow

_DEADLINE_S = 30.0


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(request: Request, receive: Receive, max_bytes: int) -> bytes | bytearray:
    """The whole body.

    Raises:
        BodyTooLarge: it is longer than `max_bytes`.
        BodyTooSlow: it did not arrive in time.
        ClientGone: it will not arrive.
    """
    try:
        async with asyncio.timeout(_DEADLINE_S):
            body = await _read(receive, max_bytes)
    except TimeoutError:
        raise BodyTooSlow(
            "the request's body did not arrive",
            cause=f"it was not there after {_DEADLINE_S:g} s",
            remedy="Send the request again over a better connection",
        ) from None
    request.body_read = True
    return body


def too_large(max_bytes: int) -> BodyTooLarge:
    """The error of a body longer than `max_bytes`."""
    return BodyTooLarge(
        "the request's body is too large",
        cause=f"allowed are {max_bytes} bytes (gateway.max_body_bytes)",
        remedy="Send less, or have an administrator raise the bound",
    )


async def _read(receive: Receive, max_bytes: int) -> bytes | bytearray:
    whole: bytes | bytearray = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part: bytes = message.get("body", b"")
        if len(whole) + len(part) > max_bytes:
            raise too_large(max_bytes)
        if not message.get("more_body", False):
            return whole + part if whole else part
        if not whole:
            whole = bytearray()
        whole += part
