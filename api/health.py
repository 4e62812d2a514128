"""Whether the gateway lives, and which part of it is not ready and why.

Rules:

- `/healthz` answers while the process does: it asks no part.
- `/readyz` says of each part whether it is ready and, if not, why. It answers 503 while one is not.
- The store is asked within a deadline, and once a second at most: whoever may ask this may ask it often.
- Both are open to anybody who reaches the data listener. What may hold a path or a name is told on the admin listener
  only, to whom its rules name.
"""

import asyncio
import time
from collections.abc import Callable

from api.answers import Receive, Scope, Send, answer_json
from api.services import Services
from appliance.errors import HoldfastError
from appliance.store import StoreFull

_STORE_DEADLINE_S = 3.0
_STORE_FRESH_S = 1.0

HEALTH_ROUTES: dict[bytes, tuple[str, ...]] = {b"/healthz": ("GET",), b"/readyz": ("GET",)}


class Health:
    """The two routes, as an ASGI application.

    Args:
        in_full: tell what the engine's process and the store said, which may hold a path.
        monotonic: seconds.
    """

    def __init__(self, services: Services, *, in_full: bool, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._services = services
        self._in_full = in_full
        self._monotonic = monotonic
        self._store_asked_at = -_STORE_FRESH_S
        self._store_why_not = ""
        self._asking = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (ASGI's signature)
        """Answer one of `HEALTH_ROUTES`."""
        if scope["raw_path"] == b"/healthz":
            await answer_json(send, 200, {"status": "alive"})
            return
        await answer_json(send, *await self.readiness())

    async def readiness(self) -> tuple[int, dict[str, object]]:
        """The status and the body of `/readyz`."""
        parts = await self._parts()
        ready = all(part["ready"] for part in parts.values())
        return 200 if ready else 503, {"ready": ready, "parts": parts}

    async def _parts(self) -> dict[str, dict[str, object]]:
        services = self._services
        sealed, draining = services.vault.sealed, services.lifecycle.draining
        return {
            "gateway": _part(not draining, "it is stopping"),
            "vault": _part(not sealed, "it is sealed; an administrator opens it with `holdfast unseal`"),
            "audit": self._audit_part(),
            "store": _part(not (why_not := await self._store()), why_not),
            "engine": self._engine_part(),
        }

    def _audit_part(self) -> dict[str, object]:
        """A SIEM or a witness that is down is told and counts for nothing: it delays its own part only.

        So is what is not signed.
        """
        part = _part(self._services.audit.error is None, self._audit())
        if not self._in_full:
            if self._services.audit.checkpoint_trouble:
                part["degraded"] = "what is recorded is not signed"
            return part
        exports = self._services.exports
        views = exports.views()
        errors = {view.name: view.error for view in views if view.error is not None}
        if (unreadable := exports.unreadable) is not None:
            told = [f"nothing is exported: {unreadable['cause']}. {unreadable['remedy']}"]
        else:
            told = [f"{name}: {each['message']}: {each['cause']}. {each['remedy']}" for name, each in errors.items()]
        now_s = self._services.now()
        told += filter(None, (view.trouble(now_s) for view in self._services.witnesses.views()))
        if trouble := self._services.audit.checkpoint_trouble:
            told.insert(0, trouble)
        if told:
            part["degraded"] = "; ".join(told)
        if views:
            part["exports"] = {
                view.name: {
                    "lag_entries": view.lag_entries,
                    "lag_s": view.lag_s,
                    "error": None if view.error is None else view.error["code"],
                }
                for view in views
            }
        return part

    def _engine_part(self) -> dict[str, object]:
        """A tier that is out of use is told and counts for nothing: what it had is computed again."""
        watch = self._services.watch
        part = _part(watch.ready, watch.detail if self._in_full else watch.summary)
        trouble = self._services.kv.trouble()
        if watch.ready and trouble and self._in_full:
            part["degraded"] = "; ".join(f"KV in {tier}: {why}" for tier, why in trouble.items())
        return part

    def _audit(self) -> str:
        """Why nothing can be recorded, and therefore nothing is served."""
        error = self._services.audit.error
        if error is None:
            return ""
        return error["cause"] if self._in_full else "its log cannot be written or signed"

    async def _store(self) -> str:
        """Why the store is not ready; empty: it is."""
        async with self._asking:
            if self._monotonic() - self._store_asked_at >= _STORE_FRESH_S:
                try:
                    async with asyncio.timeout(_STORE_DEADLINE_S):
                        await self._services.store.check()
                    self._store_why_not = ""
                except HoldfastError as error:
                    self._store_why_not = str(error) if self._in_full else _in_words(error)
                except TimeoutError:
                    self._store_why_not = f"it does not answer within {_STORE_DEADLINE_S:g} s"
                self._store_asked_at = self._monotonic()
            return self._store_why_not


def _in_words(error: HoldfastError) -> str:
    return "there is no room left on its disk" if isinstance(error, StoreFull) else "it cannot be read or written"


def _part(ready: bool, why_not: str) -> dict[str, object]:
    return {"ready": True} if ready else {"ready": False, "why": why_not}
