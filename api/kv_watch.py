"""What the engine keeps, as it was seen last: for the metrics, `kv status` and `kv top`.

Rules:

- However many ask, the engine is asked once at a time, and once in `_FRESH_S` at most, unless more sessions are wanted.
  What comes of it, were it a failure, is the answer to all who wait for it.
- Whoever asks waits for `_DEADLINE_S` at most; what cannot be had is None, and nothing old is given out for new.
- Rates are of what the engine counted between two looks, of one life of its own, which each picture names.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NamedTuple

from api.engine_watch import EngineWatch
from api.kv_counts import EngineCounts
from appliance.engine.client import EngineClient
from appliance.engine.picture import KvPicture
from appliance.errors import HoldfastError

_FRESH_S: Final = 1.0
_DEADLINE_S: Final = 3.0
_LOOK_EVERY_S: Final = 60.0  # where nobody asks
_RATE_OVER_S: Final = 60.0


class Seen(NamedTuple):
    """A picture, and when it was taken: seconds of the clock that never goes back."""

    at: float
    picture: KvPicture
    sessions_asked: int


def troubles(picture: KvPicture) -> dict[str, str]:
    """What is wrong with tiers, in words, by their names. Sessions go on in any case, and are computed again."""
    said = {}
    for tier in picture.tiers:
        if tier.state == "quarantined":
            said[tier.tier] = (
                "what came back was not what the model computes; nothing is read from it until it is emptied: "
                "docs/kv.md, Quarantine"
            )
        elif tier.state == "failed":
            error = picture.disk.last_error if picture.disk is not None else ""
            said[tier.tier] = f"it cannot be used now: {error or 'the log of the engine says why'}"
    return said


def quarantined(picture: KvPicture) -> list[str]:
    """The tiers from which nothing is restored any more, for what came back was wrong."""
    return [tier.tier for tier in picture.tiers if tier.state == "quarantined"]


class KvWatch:
    """The newest picture of one engine.

    Args:
        counts: to which what the engine counted is added, whenever it was looked at.
        clock: seconds; monotonic.

    Attributes:
        quarantines: the picture in which tiers were first seen to be in quarantine, each time that one began.
    """

    def __init__(
        self,
        engine: EngineClient,
        watch: EngineWatch,
        counts: EngineCounts,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._watch = watch
        self._clock = clock
        self._asking: asyncio.Task[Seen | None] | None = None
        self._looks: deque[tuple[float, int]] = deque()  # when, and how many blocks had been reclaimed
        self.counts = counts
        self.seen: Seen | None = None
        self.quarantines: asyncio.Queue[KvPicture] = asyncio.Queue()

    @property
    def has_more_tiers(self) -> bool:
        """Whether the engine was last seen to keep KV elsewhere than on the device too."""
        return self.seen is not None and len(self.seen.picture.tiers) > 1

    @property
    def recalls(self) -> bool:
        """Whether the engine was last seen to bring KV back from a disk before it is asked for."""
        return self.seen is not None and self.seen.picture.recall is not None

    def trouble(self) -> dict[str, str]:
        """What is wrong with the tiers that were seen last, by their names."""
        return {} if self.seen is None else troubles(self.seen.picture)

    async def look(self, sessions: int = 0) -> Seen | None:
        """The engine's picture, with so many sessions, `_FRESH_S` old at most; None: it cannot be had now."""
        seen = self.seen
        if seen is not None and self._clock() - seen.at < _FRESH_S and seen.sessions_asked >= sessions:
            return seen
        with suppress(TimeoutError):
            async with asyncio.timeout(_DEADLINE_S):
                while self._watch.ready:
                    if self._asking is None or self._asking.done():
                        self._asking = asyncio.create_task(self._ask(sessions), name="holdfast-kv-picture")
                    seen = await asyncio.shield(self._asking)
                    if seen is None or seen.sessions_asked >= sessions:
                        return seen
        return None

    def fresh(self) -> Seen | None:
        """The picture that was taken last, if that is not long ago."""
        seen = self.seen
        return seen if seen is not None and self.age_s(seen) < _FRESH_S + _DEADLINE_S else None

    def age_s(self, seen: Seen) -> float:
        """How long ago a picture was taken."""
        return self._clock() - seen.at

    def reclaimed_blocks_per_s(self) -> tuple[float, float] | None:
        """How many blocks were reclaimed a second, and over how many seconds; None: it was looked at once only."""
        if len(self._looks) < 2:
            return None
        (first_at, first), (last_at, last) = self._looks[0], self._looks[-1]
        return (last - first) / (last_at - first_at), last_at - first_at

    async def run(self) -> None:
        """Look now and then, until cancelled: so it is known what tiers there are, and what was reclaimed."""
        while True:
            await self._watch.wait_ready()
            seen = await self.look()
            await asyncio.sleep(_FRESH_S if seen is None else _LOOK_EVERY_S)

    async def _ask(self, sessions: int) -> Seen | None:
        try:
            picture = await self._engine.kv(sessions, deadline_s=_DEADLINE_S)
        except HoldfastError:
            return None
        was_quarantined = self.seen is not None and bool(quarantined(self.seen.picture))
        if quarantined(picture) and not was_quarantined:
            self.quarantines.put_nowait(picture)
        if self.seen is not None and self.seen.picture.engine_life != picture.engine_life:
            self._looks.clear()
        self.counts.add(picture)
        self.seen = Seen(self._clock(), picture, sessions)
        self._remember(self.seen)
        return self.seen

    def _remember(self, seen: Seen) -> None:
        looks = self._looks
        looks.append((seen.at, seen.picture.reclaimed_blocks_total))
        while len(looks) > 2 and looks[1][0] <= seen.at - _RATE_OVER_S:
            looks.popleft()
