"""Who is asking, on the data listener.

Rules:

- A key comes as `Authorization: Bearer hf_…`, once. Every way of not having a valid one answers 401.
- The key's text goes to `Identity` and nowhere else: it is in no error, log or metric.
"""

from typing import ClassVar

from api.answers import Request
from api.openai.errors import RequestError
from appliance.errors import Fault
from appliance.identity import Caller, Identity

_SCHEME = b"bearer "
_MAX_SECRET = 256


class KeyMissing(RequestError):
    """The request brings no API key."""

    code: ClassVar[str] = "missing_api_key"
    fault: ClassVar[Fault] = Fault.UNAUTHENTICATED


async def authenticate(identity: Identity, request: Request) -> Caller:
    """The principal whose key the request brings.

    Raises:
        KeyMissing: it brings none, or not in the way that it has to.
        HoldfastError: the key is unknown, expired or revoked.
    """
    given = request.headers.get(b"authorization", b"")
    secret = given[len(_SCHEME) :].strip()
    if given[: len(_SCHEME)].lower() != _SCHEME or not secret or len(secret) > _MAX_SECRET or not secret.isascii():
        raise KeyMissing(
            "the request brings no usable API key",
            cause="there is no header `Authorization: Bearer …` with a key",
            remedy="Send the key that `holdfast key create` showed",
        )
    return await identity.authenticate(secret.decode("ascii"))
