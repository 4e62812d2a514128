"""Whether the gateway lives, and which part of it is not ready and why.

Rules:

- `/healthz` answers while the process does: it asks no part.
- `/readyz` says of each part whether it is ready and, if not, why. It answers 503 while one is not.
- Both are open to anybody who reaches a listener. What may hold a path or a name is told on the admin listener only.
"""

from api.answers import Receive, Scope, Send, answer_json
from api.services import Services

HEALTH_ROUTES: dict[bytes, tuple[str, ...]] = {b"/healthz": ("GET",), b"/readyz": ("GET",)}


class Health:
    """The two routes, as an ASGI application.

    Args:
        in_full: tell what the engine's process said, which may hold a path.
    """

    def __init__(self, services: Services, *, in_full: bool) -> None:
        self._services = services
        self._in_full = in_full

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI's signature)
        """Answer one of `HEALTH_ROUTES`."""
        if scope["raw_path"] == b"/healthz":
            await answer_json(send, 200, {"status": "alive"})
            return
        parts = self._parts()
        ready = all(part["ready"] for part in parts.values())
        await answer_json(send, 200 if ready else 503, {"ready": ready, "parts": parts})

    def _parts(self) -> dict[str, dict[str, object]]:
        services = self._services
        sealed, draining = services.vault.sealed, services.lifecycle.draining
        watch = services.watch
        return {
            "gateway": _part(not draining, "it is stopping"),
            "vault": _part(not sealed, "it is sealed; an administrator opens it with `holdfast unseal`"),
            "engine": _part(watch.ready, watch.detail if self._in_full else watch.summary),
        }


def _part(ready: bool, why_not: str) -> dict[str, object]:
    return {"ready": True} if ready else {"ready": False, "why": why_not}
