"""Where turns wait for the engine. What decides who is next is `appliance.engine.admission`.

Rules:

- A turn that finds room goes on at once: nothing is awaited, no task is made.
- The engine is asked only while somebody waits, at most once a second, and only for what it holds of those who do: it
  keeps and recalls their KV. An engine that cannot say is no reason to stop: then the line goes by what the gateway
  knows itself.
- Whoever is cancelled while waiting gives its place back.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Final

from appliance.engine.admission import AdmissionLine, Place, Wish
from appliance.engine.client import EngineClient
from appliance.engine.protocol import MAX_AWAITED
from appliance.engine.residence import Key, Residence
from appliance.errors import HoldfastError
from appliance.identity import Tenant
from appliance.settings import AdmissionSettings

_REPORT_EVERY_S: Final = 1.0
_REPORT_DEADLINE_S: Final = 5.0


class WaitingRoom:
    """The turns that are with one engine, and those that wait for it.

    Args:
        sequences: how many the engine runs at once.
        waited: told how many seconds each turn waited that did.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        engine: EngineClient,
        settings: AdmissionSettings,
        *,
        sequences: int,
        waited: Callable[[float], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._sequences = sequences
        self._waited = waited
        self._clock = clock
        self._line = AdmissionLine(
            sequences=sequences,
            longest_wait_s=settings.longest_wait_s,
            most_waiting=settings.most_waiting,
            clock=clock,
            let_in=self._let_in,
        )
        self._residence = Residence(clock)
        self._doors: dict[Place, tuple[Key, asyncio.Future[None]]] = {}  # who waits longest first
        self._asking: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many turns wait."""
        return self._line.waiting

    def refuse_full(self, tenant: Tenant | None) -> None:
        """Refuse a turn that could not even wait.

        Raises:
            LineFull: as many wait as may.
        """
        self._line.refuse_full(_share(tenant))

    def most_priority(self, tenant: Tenant | None) -> int:
        """The highest priority that a tenant's agents may ask for."""
        allowed: Mapping[str, int] = self._settings.most_priority_by_tenant
        default = self._settings.most_priority
        return default if tenant is None else allowed.get(tenant.name, default)

    async def enter(
        self,
        tenant: Tenant | None,
        key: Key,
        *,
        prompt_bytes: int,
        sequences: int,
        most_output_tokens: int | None,
        hinted_output_tokens: int | None,
        most_context_tokens: int | None,
        tier: int,
        priority: int,
    ) -> Place:
        """Return when there is room at the engine. To be given back with `leave`.

        Args:
            key: of the session.
            sequences: how many answers are asked for.
            most_output_tokens, hinted_output_tokens: of each answer.
            most_context_tokens: that the model takes. No turn needs more, whatever it says or however long its body is:
                one that seemed to need the whole device would keep all others waiting.

        Raises:
            LineFull: as many wait as may.
        """
        residence = self._residence
        prompt = residence.prompt_tokens(key, prompt_bytes)
        output = residence.output_tokens(at_most=most_output_tokens, hinted=hinted_output_tokens)
        if most_context_tokens is not None:
            prompt = min(prompt, most_context_tokens)
            output = max(1, min(output, most_context_tokens - prompt))
        place = self._line.ask(
            Wish(
                _share(tenant),
                prompt,
                output * sequences,
                lambda: residence.resident_tokens(key),
                min(sequences, self._sequences),
                1.0 if tenant is None else self._settings.weight_by_tenant.get(tenant.name, 1.0),
                tier,
                priority,
            )
        )
        if place.admitted_at is not None:
            return place
        door = asyncio.get_running_loop().create_future()
        self._doors[place] = key, door
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_engine(), name="holdfast-residence")
        try:
            await door
        except BaseException:
            self._line.leave(place)
            raise
        finally:
            del self._doors[place]
        self._waited(self._clock() - place.asked_at)
        return place

    def leave(
        self,
        place: Place,
        key: Key,
        *,
        prompt_bytes: int,
        prompt_tokens: int,
        cached_tokens: int | None,
        output_tokens: int,
        idle_timeout_s: float,
    ) -> None:
        """The engine has done with a turn. `prompt_tokens` 0: it did not say what it cost."""
        if prompt_tokens:
            self._residence.ended(
                key,
                prompt_bytes=prompt_bytes,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                idle_timeout_s=idle_timeout_s,
            )
        computed = prompt_tokens - (cached_tokens or 0) + output_tokens
        self._line.leave(place, computed if prompt_tokens else None)

    def close(self) -> None:
        """Stop asking the engine."""
        if self._asking is not None:
            self._asking.cancel()

    def _let_in(self, place: Place) -> None:
        _, door = self._doors[place]
        if not door.done():  # else its turn is being cancelled, and gives the place back
            door.set_result(None)

    async def _ask_engine(self) -> None:
        try:
            while self._line.waiting:
                asked_at, awaited = self._clock(), self._awaited()
                with contextlib.suppress(HoldfastError):
                    report = await self._engine.leases(awaited=awaited, deadline_s=_REPORT_DEADLINE_S)
                    self._residence.told(report, awaited, asked_at)
                    if report.total_blocks:
                        self._line.told(report.total_blocks * report.block_size)
                await asyncio.sleep(_REPORT_EVERY_S)
        finally:
            self._asking = None

    def _awaited(self) -> list[Key]:
        """The sessions whose turns wait, each once."""
        keys = dict.fromkeys(key for key, door in self._doors.values() if not door.done())
        return list(keys)[:MAX_AWAITED]


def _share(tenant: Tenant | None) -> str:
    return "" if tenant is None else tenant.tenant_id
