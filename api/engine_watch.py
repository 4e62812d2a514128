"""Whether the engine answers now, and what it serves: asked in the background, known to every request at once.

Rules:

- No request waits for the answer: what is known is what was seen last.
- The engine is asked often until it answers, seldom afterwards, and at once when a request may have found it gone. That
  request alone takes nothing away: an engine that is well may fail one request, and others would be refused for it.
- Each question has a deadline.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from appliance.engine.client import EngineClient, ModelCard
from appliance.engine.launcher import EngineState
from appliance.errors import HoldfastError

_WHILE_ABSENT_S = 0.25
_WHILE_PRESENT_S = 5.0
_DEADLINE_S = 5.0
_IN_WORDS: Mapping[EngineState | None, str] = {
    EngineState.STOPPED: "it is not running",
    EngineState.STARTING: "it is starting",
    EngineState.READY: "it runs and does not answer",
    EngineState.RESTARTING: "it ended, and is started again in a moment",
    EngineState.FAILED: "it failed for good, and is not started again",
    None: "it does not answer; it is started elsewhere",
}


class EngineWatch:
    """What was last seen of the engine.

    Args:
        client: how the engine is asked.
        reason: why an engine that does not answer may not be answering, for people.
        state: where the engine's process stands; None: somebody else runs it.
        on_change: told what the engine serves when that has changed; nothing: it is lost.

    Attributes:
        models: what the engine serves; empty while it does not answer.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        reason: Callable[[], str] = lambda: "",
        state: Callable[[], EngineState | None] = lambda: None,
        on_change: Callable[[Sequence[ModelCard]], None] = lambda _: None,
    ) -> None:
        self._client = client
        self._reason = reason
        self._state = state
        self._ask_now = asyncio.Event()
        self._seen = asyncio.Event()
        self._failure = "it has not answered yet"
        self._on_change = on_change
        self.models: tuple[ModelCard, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether the engine answered when it was last asked."""
        return bool(self.models)

    @property
    def summary(self) -> str:
        """Why it is not ready, in words that anybody may read: they hold no path and nothing that the engine said."""
        return _IN_WORDS[self._state()]

    @property
    def failed(self) -> bool:
        """Whether the engine will not become ready by itself."""
        return not self.ready and self._state() is EngineState.FAILED

    @property
    def detail(self) -> str:
        """One line for people: what is served, or why nothing is."""
        if self.models:
            return "serves " + ", ".join(model.id for model in self.models)
        return self._reason() or self._failure

    def model(self, name: str) -> ModelCard | None:
        """The model of that name, if the engine serves it."""
        return next((model for model in self.models if model.id == name), None)

    def missed(self) -> None:
        """A request may have found the engine gone: ask it at once. Until it has answered, what was seen last holds."""
        self._ask_now.set()

    async def wait_ready(self) -> None:
        """Return when the engine has answered."""
        await self._seen.wait()

    async def run(self) -> None:
        """Ask until cancelled."""
        told: tuple[ModelCard, ...] = ()
        while True:
            self._ask_now.clear()
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    models = tuple(await self._client.models())
            except (HoldfastError, TimeoutError) as error:
                models = ()
                self._failure = str(error) or f"it did not answer within {_DEADLINE_S:g} s"
            if models:
                self.models = models
                self._seen.set()
            else:
                self._lose()
            if self.models != told:
                told = self.models
                self._on_change(told)
            with suppress(TimeoutError):
                async with asyncio.timeout(_WHILE_PRESENT_S if self.models else _WHILE_ABSENT_S):
                    await self._ask_now.wait()

    def _lose(self) -> None:
        self.models = ()
        self._seen.clear()
