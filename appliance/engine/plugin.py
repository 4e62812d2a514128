"""What vLLM loads from this distribution by its entry points.

- `register` (group `vllm.general_plugins`) runs in each of vLLM's processes and adds to EngineCore what the front end
  asks it.
- `LeaseEndpoints` (group `vllm.endpoint_plugins`) runs in the front-end process: it serves `LEASES_PATH`,
  `TURNS_PATH`, `DEMOTE_PATH` and `KV_PATH`, and its timer ends leases on time while the engine sleeps. It needs no
  gateway for that.

Rules:

- vLLM's internals are left to `inside/connector/`.
- Without leases, and without requests, the timer waits for an event and uses no CPU.
- The endpoint stands on the engine's private socket: whoever can open that may release a lease, or have
  a session leave a tier.
"""

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from math import inf
from typing import Any

from appliance.engine import picture, protocol, wire
from appliance.engine.log import say_serving
from appliance.engine.tier_keys import hand_down

_logger = logging.getLogger(f"vllm.{__name__}")
_MAX_BODY_BYTES = 1 << 20
_TELLING_NOTHING = (protocol.LEASES_PATH, protocol.TURNS_PATH, protocol.DEMOTE_PATH)  # of a request's end
_Message = dict[str, Any]


def register() -> None:
    """The general plugin.

    Raises:
        UnsupportedEngine: when this is another version of vLLM; vLLM then does not start.
    """
    # vLLM's modules are imported when vLLM asks for the plugin, never by whoever reads the names in this module.
    from appliance.engine.inside import connector

    connector.install()
    hand_down(os.environ)


class ExpiryTimer:
    """Calls `tick` when a lease is due, and soon after a request has ended, to learn of the lease that it left.

    Args:
        tick: expires what is due; returns seconds to the next deadline, or `None` without leases.
        settle_s: how long after a request's end to ask, so that a burst of ends costs one call.
        recheck_s: when to ask once more after that, for the lease of a request whose end took longer in the engine.
        retry_s: how long to wait when a call failed.
    """

    def __init__(
        self,
        tick: Callable[[], Awaitable[float | None]],
        *,
        settle_s: float = 0.05,
        recheck_s: float = 1.0,
        retry_s: float = 1.0,
    ) -> None:
        self._tick = tick
        self._settle_s = settle_s
        self._recheck_s = recheck_s
        self._retry_s = retry_s
        self._ended = asyncio.Event()
        self._asks_at = inf  # by the loop's clock; while it asks, that is not known yet

    def request_ended(self) -> None:
        """Say that a request has ended, however it did."""
        self._ended.set()

    def lease_due(self, in_s: float | None) -> None:
        """Say when the next lease is due. Where that is sooner than was known, ask anew; `None`: there is none."""
        if in_s is not None and asyncio.get_running_loop().time() + in_s < self._asks_at:
            self._ended.set()

    async def run(self) -> None:
        """Run until cancelled."""
        wait_s: float | None = None
        while True:
            ended = await self._wait(wait_s)
            if ended:
                await asyncio.sleep(self._settle_s)
                self._ended.clear()
            due_in_s = await self._ask()
            wait_s = due_in_s if not ended else min(self._recheck_s, self._recheck_s if due_in_s is None else due_in_s)

    async def _wait(self, wait_s: float | None) -> bool:
        if wait_s is not None:
            self._asks_at = asyncio.get_running_loop().time() + wait_s
        try:
            await asyncio.wait_for(self._ended.wait(), None if wait_s is None else max(wait_s, 0.0))
        except TimeoutError:
            return False
        finally:
            self._asks_at = inf
        return True

    async def _ask(self) -> float | None:
        try:
            return await self._tick()
        except Exception as error:
            # vLLM watches its engine and ends the server when it died; until then there is nothing better to do.
            _logger.warning("The engine did not answer the lease timer: %s", type(error).__name__)
            return self._retry_s


class LeaseEndpoints:
    """The endpoint plugin."""

    name = protocol.PLUGIN_NAME
    required_tasks: tuple[str, ...] | None = ("generate",)

    def __init__(self) -> None:
        self._engine_client: Any = None
        self._timer: ExpiryTimer | None = None
        self._running: asyncio.Task[None] | None = None

    def attach_router(self, app: Any) -> None:
        """Serve our paths, and watch requests end."""
        app.add_route(protocol.LEASES_PATH, self._leases, methods=["POST"], include_in_schema=False)
        app.add_route(picture.KV_PATH, self._kv, methods=["GET"], include_in_schema=False)
        app.add_route(protocol.TURNS_PATH, self._turns, methods=["POST"], include_in_schema=False)
        app.add_route(protocol.DEMOTE_PATH, self._demote, methods=["POST"], include_in_schema=False)
        app.add_middleware(_EndOfRequests, ended=self._request_ended)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:  # noqa: ARG002
        """Start the timer. vLLM takes requests when this has returned: what it writes is limited from here on."""
        from appliance.engine.inside import connector

        self._engine_client = engine_client
        self._timer = ExpiryTimer(lambda: connector.lease_tick(engine_client))
        self._running = asyncio.create_task(self._timer.run(), name="holdfast-lease-expiry")
        say_serving(os.environ)

    def _request_ended(self) -> None:
        if self._timer is not None:
            self._timer.request_ended()

    async def _leases(self, request: Any) -> Any:
        from appliance.engine.inside import connector

        async def report(body: bytes) -> _Message:
            asked = protocol.read_leases_request(body)
            return await connector.lease_report(self._engine_client, asked)

        return await _answer(request, report)

    async def _turns(self, request: Any) -> Any:
        from appliance.engine.inside import connector

        async def account(body: bytes) -> _Message:
            ends = protocol.read_turn_ends_request(body)
            told = [end for end in ends if end is not None]
            accounts, due_in_s = await connector.turns_ended(self._engine_client, told)
            if self._timer is not None:
                self._timer.lease_due(due_in_s)  # an end may move a deadline forward
            known = iter(accounts)
            return protocol.turn_accounts_answer(None if end is None else next(known) for end in ends)

        return await _answer(request, account)

    async def _demote(self, request: Any) -> Any:
        from appliance.engine.inside import connector

        async def demote(body: bytes) -> _Message:
            asked = protocol.read_demote_request(body)
            return protocol.demote_answer(await connector.demote(self._engine_client, asked))

        return await _answer(request, demote)

    async def _kv(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        from appliance.engine.inside import connector

        try:
            asked = request.query_params
            most_sessions = picture.read_sessions_asked(asked.get("sessions"))
            of = picture.read_session_asked(asked.get("tenant"), asked.get("session"))
        except wire.MalformedMessage as error:
            return JSONResponse({"error": error.record()}, status_code=400)
        return JSONResponse(await connector.kv_picture(self._engine_client, most_sessions, of))


async def _answer(request: Any, say: Callable[[bytes], Awaitable[_Message]]) -> Any:
    from starlette.responses import JSONResponse

    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > _MAX_BODY_BYTES:
            return JSONResponse({"error": f"at most {_MAX_BODY_BYTES} bytes"}, status_code=413)
    try:
        return JSONResponse(await say(bytes(body)))
    except wire.MalformedMessage as error:
        return JSONResponse({"error": error.record()}, status_code=400)


class _EndOfRequests:
    """ASGI middleware that says when a request that may have left a lease has ended."""

    def __init__(self, app: Callable[..., Awaitable[None]], ended: Callable[[], None]) -> None:
        self._app = app
        self._ended = ended

    async def __call__(
        self,
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        try:
            await self._app(scope, receive, send)
        finally:
            if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] not in _TELLING_NOTHING:
                self._ended()
