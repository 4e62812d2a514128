"""Errors as OpenAI's clients expect them.

Rules:

- The status follows from whose fault it was, unless HTTP has a more exact one (`status` on the error's class).
- The shape is `{"error": {message, type, param, code}}`; `message` says what failed, why, and what to do. Cause, remedy
  and the request's id are there on their own too.
- The same object is the answer of a refused request and the last event of a broken stream.
"""

from typing import Any, ClassVar

from pydantic_core import to_json

from appliance.errors import Fault, HoldfastError

_STATUS = {
    Fault.CALLER: 400,
    Fault.UNAUTHENTICATED: 401,
    Fault.DENIED: 403,
    Fault.MISSING: 404,
    Fault.CONFLICT: 409,
    Fault.LIMIT: 429,
    Fault.UNAVAILABLE: 503,
    Fault.ENVIRONMENT: 503,
    Fault.INTERNAL: 500,
}
_TYPE = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable_error",
}


class RequestError(HoldfastError):
    """A request that the wire itself is wrong with.

    Attributes:
        param: the field that is wrong, as OpenAI names it.
        status: the HTTP status, where it is more exact than what follows from `fault`.
    """

    code: ClassVar[str] = "invalid_request"
    fault: ClassVar[Fault] = Fault.CALLER
    status: ClassVar[int | None] = None

    def __init__(self, message: str, *, cause: str, remedy: str, param: str | None = None) -> None:
        super().__init__(message, cause=cause, remedy=remedy)
        self.param = param


class MalformedBody(RequestError):
    """The body is not the JSON object that it has to be."""

    code: ClassVar[str] = "malformed_json"


class BodyTooLarge(RequestError):
    """The body is longer than `gateway.max_body_bytes`."""

    code: ClassVar[str] = "body_too_large"
    status: ClassVar[int | None] = 413


class TooManyValues(RequestError):
    """The body has more values than `gateway.max_json_values`."""

    code: ClassVar[str] = "too_many_values"


class BodyTooSlow(RequestError):
    """The body did not arrive in time."""

    code: ClassVar[str] = "body_too_slow"
    status: ClassVar[int | None] = 408


class NotHttp(RequestError):
    """What came over the connection is no HTTP request."""

    code: ClassVar[str] = "not_http"


class HeadersTooLarge(RequestError):
    """The headers are longer than `gateway.max_header_bytes`."""

    code: ClassVar[str] = "headers_too_large"
    status: ClassVar[int | None] = 431


class HeadersLate(RequestError):
    """The headers did not come in time. Nobody is answered this: the connection is closed."""

    code: ClassVar[str] = "headers_late"
    status: ClassVar[int | None] = 408


class HandshakeFailed(RequestError):
    """A TLS handshake failed. Nobody is answered this: there is no connection to answer on."""

    code: ClassVar[str] = "tls_handshake_failed"


class HostRefused(RequestError):
    """The Host header names another server."""

    code: ClassVar[str] = "host_refused"


class NotATenantsKey(RequestError):
    """The key is a principal's of the appliance: it administers, and asks for no turns."""

    code: ClassVar[str] = "not_a_tenants_key"
    fault: ClassVar[Fault] = Fault.DENIED


class RouteMissing(RequestError):
    """There is nothing at this path."""

    code: ClassVar[str] = "route_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class MethodRefused(RequestError):
    """The path is right and the method is not."""

    code: ClassVar[str] = "method_not_allowed"
    status: ClassVar[int | None] = 405


class ModelMissing(RequestError):
    """No model of that name is served."""

    code: ClassVar[str] = "model_not_found"
    fault: ClassVar[Fault] = Fault.MISSING


class ContextTooLong(RequestError):
    """The conversation is longer than the model can take."""

    code: ClassVar[str] = "context_length_exceeded"


class EngineRefused(RequestError):
    """The engine found something wrong with the request."""

    code: ClassVar[str] = "engine_refused"


class EngineStarting(HoldfastError):
    """The engine is not ready to answer."""

    code: ClassVar[str] = "engine_starting"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE
    retry_after_s: ClassVar[float | None] = 2.0


class EngineGone(EngineStarting):
    """The engine is not ready to answer, and will not be by itself."""

    retry_after_s: ClassVar[float | None] = None


def engine_not_ready(why: str, *, for_good: bool) -> EngineStarting:
    """The error of a request that needs the engine.

    Args:
        for_good: waiting does not help.
    """
    if for_good:
        return EngineGone(
            "the engine is not ready", cause=why, remedy="An administrator has to mend it: `holdfast status` says what"
        )
    return EngineStarting(
        "the engine is not ready",
        cause=why,
        remedy="Send the request again in a moment; GET /readyz tells when",
    )


class AnswerBroken(HoldfastError):
    """The engine answered with a failure of its own, or with something that is no answer."""

    code: ClassVar[str] = "engine_answer_broken"
    fault: ClassVar[Fault] = Fault.INTERNAL


class Draining(HoldfastError):
    """The gateway is stopping."""

    code: ClassVar[str] = "draining"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE
    retry_after_s: ClassVar[float] = 2.0


class TooManyTurns(HoldfastError):
    """As many turns run as the gateway allows."""

    code: ClassVar[str] = "too_many_turns"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE
    retry_after_s: ClassVar[float] = 1.0


class TurnTooLong(HoldfastError):
    """A turn took longer than `gateway.request_timeout_s`."""

    code: ClassVar[str] = "turn_timed_out"
    fault: ClassVar[Fault] = Fault.UNAVAILABLE


def status_of(error: HoldfastError) -> int:
    """The HTTP status of `error`."""
    exact: int | None = getattr(error, "status", None)
    return exact if exact is not None else _STATUS[error.fault]


def retry_after_s(error: HoldfastError) -> int | None:
    """Whole seconds after which a caller may try again, for `Retry-After`; None where trying again does not help."""
    seconds: float | None = getattr(error, "retry_after_s", None)
    return None if seconds is None else max(1, -int(-seconds // 1))


def error_object(error: HoldfastError, request_id: str) -> bytes:
    """`{"error": {…}}` as JSON."""
    described: dict[str, Any] = {
        "message": str(error),
        "type": _TYPE.get(status_of(error), "server_error"),
        "param": getattr(error, "param", None),
        "code": error.code,
        "cause": error.cause,
        "remedy": error.remedy,
        "request_id": request_id,
    }
    return to_json({"error": described})
