"""`GET /v1/models` and `GET /v1/models/{id}`: what is served here, as far as the caller's key may use it."""

import contextlib
from typing import Any
from urllib.parse import quote

from api import trail
from api.answers import REQUEST, Receive, Request, Scope, Send, answer_json, refuse
from api.openai.errors import ModelMissing, engine_not_ready
from api.services import Services
from appliance.audit import AuditUnavailable
from appliance.engine.client import ModelCard
from appliance.errors import HoldfastError
from appliance.vault import KeyMissing, VaultSealed

LIST_PATH = b"/v1/models"
ITEM_PREFIX = b"/v1/models/"


class Models:
    """Both routes, as an ASGI application."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI's signature)
        """Answer one request."""
        request: Request = scope[REQUEST]
        try:
            visible = self._visible(request)
            await self._services.audit.record(trail.authenticated(request), trail.models_read(request))
            if scope["raw_path"] == LIST_PATH:
                await answer_json(send, 200, {"object": "list", "data": [self._described(model) for model in visible]})
                return
            asked = scope["raw_path"].removeprefix(ITEM_PREFIX).decode("latin-1")
            found = next((model for model in visible if asked in (model.id, quote(model.id, safe=""))), None)
            if found is None:
                raise ModelMissing(
                    "there is no such model here",
                    cause="it is not served, or your key may not use it",
                    remedy="GET /v1/models lists those that you may use",
                    param="model",
                )
            await answer_json(send, 200, self._described(found))
        except HoldfastError as error:
            route = LIST_PATH.decode() if scope["raw_path"] == LIST_PATH else "other"
            with contextlib.suppress(AuditUnavailable, VaultSealed, KeyMissing):  # it is refused all the same
                await self._services.audit.record(trail.refused(request, route, error))
            await refuse(send, request, error)

    def _visible(self, request: Request) -> list[ModelCard]:
        watch = self._services.watch
        if not watch.ready:
            raise engine_not_ready(watch.summary, for_good=watch.failed)
        key = request.known_caller().key
        allowed = key.scopes.models if key is not None else None
        return [model for model in watch.models if allowed is None or model.id in allowed]

    def _described(self, model: ModelCard) -> dict[str, Any]:
        return {
            "id": model.id,
            "object": "model",
            "created": int(self._services.lifecycle.started_at),
            "owned_by": "holdfast",
            "max_model_len": model.max_model_len,
        }
