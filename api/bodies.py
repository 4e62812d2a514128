"""Reading a request's body within its bounds.

Rules:

- No more than the bound is ever held, whatever `Content-Length` says or does not say.
- The whole body has one deadline, so that a slow trickle ends too.
- What is held of all long bodies at once has a bound. A body of usual length does not count: whoever sends long ones
  slowly must not keep it out.
- How long a body can keep the event loop is bounded before it is parsed: by the number of its values.
"""

import asyncio
from dataclasses import dataclass

from api.answers import Receive, Request
from api.openai.errors import BodyTooLarge, BodyTooSlow, TooManyTurns, TooManyValues

_DEADLINE_S = 30.0
_HELD_BYTES = 128 << 20
USUAL_BYTES = 1 << 20  # of each body, what does not count


@dataclass(slots=True)
class HeldBodies:
    """What long bodies hold that are arriving or being read now; in bytes."""

    held_bytes: int = 0
    most_bytes: int = _HELD_BYTES
    usual_bytes: int = USUAL_BYTES

    def grow(self, before: int, size: int) -> None:
        """Hold a body of `size` that was of `before`. Raises TooManyTurns when that is too much."""
        more = self._counted(size) - self._counted(before)
        if more and self.held_bytes + more > self.most_bytes:
            raise TooManyTurns(
                "the gateway is busy",
                cause=f"the long bodies of requests that are arriving hold {self.held_bytes} bytes already",
                remedy="Send the request again in a moment",
            )
        self.held_bytes += more

    def give_back(self, size: int) -> None:
        """Hold a body of `size` no more."""
        self.held_bytes -= self._counted(size)

    def _counted(self, size: int) -> int:
        return max(0, size - self.usual_bytes)


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


async def read_body(request: Request, receive: Receive, max_bytes: int, held: HeldBodies) -> bytes | bytearray:
    """The whole body. Whoever has read it gives its length back to `held`.

    Raises:
        BodyTooLarge: it is longer than `max_bytes`.
        TooManyTurns: all long bodies together hold too much.
        BodyTooSlow: it did not arrive in time.
        ClientGone: it will not arrive.
    """
    try:
        async with asyncio.timeout(_DEADLINE_S):
            body = await _read(receive, max_bytes, held)
    except TimeoutError:
        raise BodyTooSlow(
            "the request's body did not arrive",
            cause=f"it was not there after {_DEADLINE_S:g} s",
            remedy="Send the request again over a better connection",
        ) from None
    request.body_read = True
    return body


def refuse_many_values(body: bytes | bytearray, most: int) -> None:
    """Raises TooManyValues when parsing `body` would take long: a value costs the same however short it is.

    Brackets, braces and commas are counted in texts too: each is about a token there, and no model takes so many.
    """
    if count_of(body, b",[{") > most:
        raise TooManyValues(
            "the request's body has too many values",
            cause=f"allowed are {most} brackets, braces and commas (gateway.max_json_values)",
            remedy="Send less, or have an administrator raise the bound",
        )


def count_of(body: bytes | bytearray, characters: bytes) -> int:
    """How many bytes of a body are one of `characters`: in one pass, where `count` takes a slower one for each."""
    return len(body) - len(body.translate(None, characters))


def too_large(max_bytes: int) -> BodyTooLarge:
    """The error of a body longer than `max_bytes`."""
    return BodyTooLarge(
        "the request's body is too large",
        cause=f"allowed are {max_bytes} bytes (gateway.max_body_bytes)",
        remedy="Send less, or have an administrator raise the bound",
    )


async def _read(receive: Receive, max_bytes: int, held: HeldBodies) -> bytes | bytearray:
    whole: bytes | bytearray = b""
    taken = 0
    try:
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part: bytes = message.get("body", b"")
            if taken + len(part) > max_bytes:
                raise too_large(max_bytes)
            held.grow(taken, taken + len(part))
            taken += len(part)
            if not message.get("more_body", False):
                return whole + part if whole else part
            if not whole:
                whole = bytearray()
            whole += part
    except BaseException:
        held.give_back(taken)
        raise
