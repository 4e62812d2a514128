"""The outermost layer of the data listener: nothing is reached but through here.

Rules:

- Routes are compared with the raw path, byte for byte. What is not exactly a route is none: an encoded slash, `//`,
  `..`, another case, a trailing dot or `;` leads nowhere. What follows `/v1/models/` is the name of a model, compared
  as it stands with those that are served; what follows `/v1/sessions/` is the id of a session of the caller's.
- Everything but `/healthz` and `/readyz` needs a key, what does not exist too: who has no key learns no route. It is a
  tenant's: a key of the appliance is for the admin API, and refused here.
- Host is one of `gateway.allowed_hosts`, once.
- Headers that decide something come once. A body announced too long is refused before it is read.
- Every answer carries `X-Request-ID`; the client's own is kept if it is harmless. Every answer of a turn whose session
  is known, be it from its headers only, carries `X-Session-ID`: refusals too.
- While the vault is sealed or the gateway drains, only health is answered.
- What is refused is recorded; what anybody can have refused is counted, and told once a minute. A valid key whose
  request never became whole is recorded: hanging up in time must not tell unseen whether a key holds.
- An error that nobody thought of is logged with the request's id, answers 500 without a word of it, and is recorded.
"""

import contextlib
import logging
import re
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any

from api import trail
from api.answers import REQUEST, App, Receive, Request, Scope, Send, drop_frames, refuse, request_id_of
from api.authentication import authenticate
from api.bodies import ClientGone, too_large
from api.health import HEALTH_ROUTES
from api.openai.errors import (
    Draining,
    HostRefused,
    MethodRefused,
    NotATenantsKey,
    RequestError,
    RouteMissing,
)
from api.openai.hints import HEADERS as SESSION_HEADERS
from api.openai.hints import named_session
from api.services import Services
from appliance.audit import AuditUnavailable, Event
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing, VaultSealed

_LOG = logging.getLogger("holdfast.gateway")
_NAME = rb"(?:[A-Za-z0-9._~:@/+-]|%[2-7][0-9A-Fa-f])+"
_MODEL_PATH = re.compile(rb"/v1/models/" + _NAME)
_SESSION_PATH = re.compile(rb"/v1/sessions/" + _NAME)
_ONCE = frozenset({b"host", b"authorization", b"content-length", b"x-request-id"}) | SESSION_HEADERS


class Guard:
    """Wraps the data listener's application.

    Args:
        app: what answers the requests that pass.
        open_app: what answers on the routes that need no key.
        turns: what answers a POST on these raw paths, without the way through `app`.
        end_of_session: what answers a DELETE of a session, in the same way.
        routes: the methods of each other raw path.
    """

    def __init__(
        self,
        app: App,
        open_app: App,
        services: Services,
        *,
        turns: Mapping[bytes, App],
        end_of_session: App,
        routes: Mapping[bytes, tuple[str, ...]],
    ) -> None:
        self._app = app
        self._open_app = open_app
        self._services = services
        self._turns = turns
        self._end_of_session = end_of_session
        self._routes = {**dict.fromkeys(turns, ("POST",)), **routes}
        self._hosts = frozenset(host.lower().encode() for host in services.settings.gateway.allowed_hosts)
        self._max_body_bytes = services.settings.gateway.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            raise RuntimeError(f"the data listener speaks HTTP only, not {scope['type']}")
        pairs = scope["headers"]
        headers = dict(pairs)
        request_id = request_id_of(headers.get(b"x-request-id", b""), self._services.new_id)
        client = scope.get("client")
        request = Request(request_id.decode(), headers, source=client[0] if client else "")
        request.answer_headers.append((b"x-request-id", request_id))
        answered = self._services.metrics.answered
        route = "other"

        async def send_named(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                request.began = True
                message["headers"] = [*message["headers"], *request.answer_headers]
                if request.session_id is not None:
                    message["headers"].append((b"x-session-id", request.session_id))
                answered(route, message["status"])
            await send(message)

        try:
            raw_path: bytes = scope["raw_path"]
            if raw_path in self._routes:
                route = raw_path.decode()
            app = await self._admit(scope, request, raw_path)
            scope[REQUEST] = request
            await app(scope, receive, send_named)
        except ClientGone:
            if request.caller is not None and not request.body_read:
                await self._record(trail.authenticated(request))
        except HoldfastError as error:
            drop_frames(error)
            await self._tell_refused(request, route, error)
            await refuse(send_named, request, error)
        except Exception as error:
            # Not its message: that may quote what a person said.
            trace = "".join(traceback.format_tb(error.__traceback__))
            _LOG.error("request %s failed: %s\n%s", request.request_id, type(error).__name__, trace)
            drop_frames(error)
            # An answer that has begun is cut off: a client must not take it for whole.
            defect = _defect(error)
            if not request.began:
                await refuse(send_named, request, defect)
            await self._tell_refused(request, route, defect)

    async def _tell_refused(self, request: Request, route: str, error: HoldfastError) -> None:
        event = trail.refused(request, route, error)
        if trail.is_counted(request, error):
            self._services.audit.count(event)
        else:
            await self._record(event)

    async def _record(self, event: Event) -> None:
        with contextlib.suppress(AuditUnavailable, VaultSealed):  # it has ended all the same
            try:
                await self._services.audit.record(event)
            except KeyMissing:  # the tenant was shredded meanwhile: how often that was is told, of nobody
                self._services.audit.count(event)

    async def _admit(self, scope: Scope, request: Request, raw_path: bytes) -> App:
        services = self._services
        self._check_headers(scope["headers"], request.headers)
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        health = HEALTH_ROUTES.get(raw_path)
        if health is not None:
            _check_method(method, health)
            return self._open_app
        if raw_path in self._turns:
            request.session_id = named_session(request.headers)
        if services.lifecycle.draining:
            raise Draining(
                "the gateway is stopping",
                cause="it lets what runs finish and takes nothing new",
                remedy="Send the request again in a moment",
            )
        if services.vault.sealed:
            raise VaultSealed
        request.caller = await authenticate(services.identity, request)
        if request.caller.principal.tenant_id is None:
            raise NotATenantsKey(
                "this key asks for nothing here",
                cause="it is a key of the appliance, which administers it; what is asked here belongs to a tenant",
                remedy="Use a key of a tenant: `holdfast key create --tenant TENANT`",
            )
        if _SESSION_PATH.fullmatch(raw_path) is not None:
            _check_method(method, ("DELETE",))
            return self._end_of_session
        methods = self._routes.get(raw_path)
        if methods is None:
            if _MODEL_PATH.fullmatch(raw_path) is None:
                raise RouteMissing(
                    "there is nothing at this path",
                    cause="paths are compared exactly, encoded characters included",
                    remedy="See GET /v1/models, POST /v1/chat/completions and POST /v1/completions",
                )
            methods = ("GET",)
        _check_method(method, methods)
        return self._turns.get(raw_path, self._app)

    def _check_headers(self, pairs: list[tuple[bytes, bytes]], headers: dict[bytes, bytes]) -> None:
        if len(headers) != len(pairs):
            names = [name for name, _ in pairs if name in _ONCE]
            if len(names) != len(set(names)):
                twice = next(name for name in names if names.count(name) > 1)
                raise RequestError(
                    f"the header {twice.decode()} came more than once",
                    cause="two of them could mean two things",
                    remedy="Send it once",
                )
        host = headers.get(b"host", b"").lower()
        name, colon, port = host.rpartition(b":")
        if not colon or host.endswith(b"]"):
            name, port = host, b""
        if name not in self._hosts or not (port.isdigit() or not port) or (colon and not port and name != host):
            raise HostRefused(
                "the Host header names another server",
                cause="it is missing, malformed, or not in gateway.allowed_hosts",
                remedy="Use a name that is allowed, or add yours to gateway.allowed_hosts",
            )
        announced = headers.get(b"content-length")
        if announced is not None and (not announced.isdigit() or int(announced[:15]) > self._max_body_bytes):
            raise too_large(self._max_body_bytes)


def _check_method(method: str, methods: tuple[str, ...]) -> None:
    if method not in methods:
        raise MethodRefused(
            f"{method} is not possible here", cause=f"this path takes {', '.join(methods)}", remedy="Change the method"
        )


def _defect(error: Exception) -> HoldfastError:
    return HoldfastError(
        "something went wrong that nobody thought of",
        cause=f"a defect of the gateway ({type(error).__name__})",
        remedy="`holdfast logs gateway` has it under the request's id",
    )
