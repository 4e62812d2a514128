"""A turn that is with the engine: what is known of it, how it is broken off, and to whom its stream goes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from api.answers import Send
from api.openai.chunks import Answer
from api.openai.errors import TurnTooLong
from api.openai.prefixes import Prefix
from api.openai.wire import Asked
from appliance.errors import HoldfastError
from appliance.identity import Admission
from appliance.sessions import Session

_SLOW_CLIENT_S = 2.0  # that a stream may wait for its client, all in all, before its place at the engine is another's


@dataclass(eq=False, slots=True)
class Running:
    """A turn that is with the engine, and how it is broken off."""

    asked: Asked
    session: Session
    admission: Admission
    answer: Answer
    response_id: str
    prompt_bytes: int
    started_at: float
    began_s: float  # the same moment, by a clock that nobody sets
    prefix: Prefix | None = None
    recorded: "asyncio.Future[int] | None" = None
    broken_off_by: HoldfastError | None = None
    client_gone: bool = False
    settled: bool = False
    reached_engine: bool = False
    first_token_s: float | None = None
    _limit: asyncio.Timeout | None = field(default=None)

    @property
    def tenant_id(self) -> str:
        """Whose turn it is."""
        return self.session.tenant_id

    def interrupt(self, why: HoldfastError | None) -> None:
        """Break the turn off; `why` None: the client is gone."""
        if self._limit is None or self.client_gone or self.broken_off_by is not None:
            return
        self.broken_off_by, self.client_gone = why, why is None
        self._limit.reschedule(asyncio.get_running_loop().time())

    @property
    def is_recorded(self) -> bool:
        """Whether its admission is on the disk."""
        recorded = self.recorded
        return recorded is not None and recorded.done() and not recorded.cancelled() and recorded.exception() is None

    async def until_recorded(self) -> None:
        """Return when its admission is on the disk.

        Raises:
            AuditUnavailable: it will not be.
        """
        if self.recorded is None:
            raise RuntimeError("a turn was begun that nobody recorded")
        if not self.recorded.done():
            await asyncio.wait((self.recorded,))  # which leaves it alone when this is cancelled
        self.recorded.result()

    @contextlib.asynccontextmanager
    async def until(self, timeout_s: float) -> AsyncIterator[None]:
        """Run the body until it ends or is interrupted, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s) as self._limit:
                try:
                    yield
                finally:
                    limit, self._limit = self._limit, None
        except TimeoutError:
            if not limit.expired():
                raise
            if not self.client_gone and self.broken_off_by is None:
                self.broken_off_by = TurnTooLong(
                    "the turn took too long",
                    cause=f"it was not over after {timeout_s:g} s (gateway.request_timeout_s)",
                    remedy="Ask for fewer tokens, or have an administrator raise the bound",
                )


class StreamReader:
    """Whom a stream goes to.

    A place at the engine is not held for a client that reads slowly: the engine does not wait for it and has done long
    before.
    """

    def __init__(self, send: Send, too_slow: Callable[[], None]) -> None:
        self._send = send
        self._too_slow = too_slow
        self._left_s = _SLOW_CLIENT_S

    async def send(self, events: bytes) -> None:
        loop = asyncio.get_running_loop()
        begun_at = loop.time()
        slow = loop.call_later(self._left_s, self._too_slow)
        try:
            await self._send({"type": "http.response.body", "body": events, "more_body": True})
        finally:
            slow.cancel()
            self._left_s = max(self._left_s - (loop.time() - begun_at), 0.0)
