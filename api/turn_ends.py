"""Telling the engine how turns ended, and hearing where their prompts were served from.

Rules:

- Nobody waits for it who does not want the account: such an end is told a moment later, together with those that came
  meanwhile, and takes nothing from the commit beside it. One whose account is waited for is told at once.
- One message is under way at a time; what ends meanwhile travels together in the next.
- What cannot be told is forgotten: an engine that is lost holds nothing that it could be told about. No failure here is
  a turn's.
- An engine that does not know the path is asked again after a while only.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from appliance.engine.client import EngineClient, EngineRejected
from appliance.engine.protocol import MAX_TURN_ENDS, TurnAccount, TurnEnd
from appliance.errors import HoldfastError

_MOST_WAITING: Final = 4 * MAX_TURN_ENDS
_LEFT_ALONE_S: Final = 60.0
_GATHER_S: Final = 0.01
_STOPS: Final = {"tool_calls": "tool_use", "function_call": "tool_use", "stop": "end_turn"}


def stop_of(finish_reason: str | None) -> str:
    """Why a turn ended, in the words of `protocol.STOPS`, from what an OpenAI answer says of it."""
    return _STOPS.get(finish_reason or "", "other")


class TurnEnds:
    """The ends of turns on their way to one engine.

    Args:
        engine: the engine.
        clock: seconds; monotonic.
    """

    def __init__(self, engine: EngineClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._clock = clock
        self._waiting: deque[tuple[TurnEnd, asyncio.Future[TurnAccount | None]]] = deque()
        self._telling: asyncio.Task[None] | None = None
        self._gathering: asyncio.TimerHandle | None = None
        self._silent_until = -1.0

    def tell(self, end: TurnEnd, *, at_once: bool) -> "asyncio.Future[TurnAccount | None]":
        """Have the engine told. The future's result is the turn's account; None: there is none to be had.

        Args:
            at_once: somebody waits for the account.
        """
        account: asyncio.Future[TurnAccount | None] = asyncio.get_running_loop().create_future()
        if len(self._waiting) >= _MOST_WAITING or self._clock() < self._silent_until:
            account.set_result(None)
            return account
        self._waiting.append((end, account))
        if at_once:
            self._begin()
        elif self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(_GATHER_S, self._begin)
        return account

    async def close(self) -> None:
        """Tell nothing any more."""
        if self._gathering is not None:
            self._gathering.cancel()
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait([self._telling])
        self._settle(len(self._waiting))

    def _begin(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
        if self._telling is None or self._telling.done():
            self._telling = asyncio.get_running_loop().create_task(self._tell_all(), name="holdfast-turn-ends")

    async def _tell_all(self) -> None:
        while self._waiting:
            together = min(len(self._waiting), MAX_TURN_ENDS)
            try:
                accounts = await self._engine.turns_ended([self._waiting[place][0] for place in range(together)])
            except HoldfastError as error:
                if isinstance(error, EngineRejected):
                    self._silent_until = self._clock() + _LEFT_ALONE_S
                self._settle(together)
            else:
                self._settle(together, accounts)

    def _settle(self, together: int, accounts: tuple[TurnAccount | None, ...] = ()) -> None:
        for place in range(together):
            _, account = self._waiting.popleft()
            if not account.done():
                account.set_result(accounts[place] if accounts else None)
