"""Whose KV is read from the disk into DRAM before a request asks for it, and what came of it.

Rules:

- Pure: no clock of its own, no disk. What lies where, and what is worth how much, the caller says.
- Who certainly returns goes first: a session whose request waits. Then a session whose client said that it returns
  soon; then those that the policy expects within `SOON_S`.
- Nothing is read for an expectation that would push out what is worth half as much, or more: two sessions of like worth
  would push each other out for ever.
- A session that could not be read is left alone for a while, and so is a disk that was slower than computing again,
  longer each time.
- What was read is counted until a request loads it or it leaves DRAM: used, or in vain.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from math import inf
from typing import Final, NamedTuple

from appliance.engine.inside.quotas import Owner

SOON_S: Final = 600.0
"""A session is expected whose worth is that of one certain return in so many seconds."""
MOST_BYTES: Final = 32 << 20
"""What is read at a time, or one chunk: a request that needs the disk is behind so much at most."""

_HINT_HOLDS_S: Final = 600.0
_MOST_HINTS: Final = 10_000
_LEFT_ALONE_S: Final = 60.0
_MOST_LEFT_ALONE: Final = 10_000
_SLOWEST_BYTES_S: Final = 64 << 20  # computing again is no slower
_GRACE_S: Final = 0.25  # of a job, whatever its size
_PAUSES_S: Final = (5.0, 60.0)  # the first, and the longest


class Recalled(NamedTuple):
    """Chunks since the engine began. What is neither used nor in vain is in DRAM and may be either."""

    read: int
    used: int
    in_vain: int


class Recall:
    """What is read ahead.

    Args:
        clock: seconds; monotonic.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._hinted: dict[Owner, float] = {}  # until when; the oldest first
        self._left_alone: dict[Owner, float] = {}  # until when; the oldest first
        self._unused: set[bytes] = set()
        self._pause_s, self._paused_until = _PAUSES_S[0], -inf
        self._read = self._used = self._in_vain = 0

    # Who is expected

    def hinted(self, session: Owner) -> None:
        """The session's client says that it returns soon."""
        _put(self._hinted, session, self._clock() + _HINT_HOLDS_S, _MOST_HINTS)

    def arrived(self, session: Owner) -> None:
        """The session has returned."""
        self._hinted.pop(session, None)
        self._left_alone.pop(session, None)

    def released(self, labels: Collection[str]) -> None:
        """The sessions so labelled are over."""
        for sessions in (self._hinted, self._left_alone):
            for session in [session for session in sessions if session[1] in labels]:
                del sessions[session]

    def failed(self, session: Owner) -> None:
        """Something of the session could not be read."""
        _put(self._left_alone, session, self._clock() + _LEFT_ALONE_S, _MOST_LEFT_ALONE)

    def demoted(self, session: Owner) -> None:
        """The session is to stay on the disk until it returns."""
        _put(self._left_alone, session, inf, _MOST_LEFT_ALONE)

    def in_order(
        self, waiting: Iterable[Owner], expected: Iterable[tuple[Owner, float]], worth: Callable[[Owner], float]
    ) -> Iterator[tuple[Owner, float]]:
        """For whom to read, the most certain first, and below which worth what is in DRAM may make room for it.

        Args:
            waiting: whose request the engine has and has not begun.
            expected: as `RetentionPolicy.expected` says it.
            worth: of a session's KV, in hits a second.
        """
        now = self._clock()
        expected = list(expected)
        certain = [session for session, value in expected if value == inf]
        hinted = [session for session, until in self._hinted.items() if now < until]
        seen: set[Owner] = set()
        for sessions, may_push in (((*waiting, *certain), True), (hinted, False)):
            for session in sessions:
                if session not in seen and not self._is_left_alone(session, now):
                    seen.add(session)
                    yield session, inf if may_push else worth(session) / 2
        for session, value in expected:
            if value * SOON_S < 1:
                return
            if session not in seen and not self._is_left_alone(session, now):
                yield session, value / 2

    # How reading goes

    @property
    def paused_for_s(self) -> float:
        """For how long nothing is read, because the disk was slow or failed; zero: it is not paused."""
        return max(0.0, self._paused_until - self._clock())

    def came(self, keys: Iterable[bytes], *, wanted_bytes: int, seconds: float, whole: bool) -> None:
        """A job is over: these chunks are in DRAM. Not `whole`: others could not be read."""
        keys = set(keys)
        self._read += len(keys)
        self._unused |= keys
        if whole and seconds <= _GRACE_S + wanted_bytes / _SLOWEST_BYTES_S:
            self._pause_s = _PAUSES_S[0]
        else:
            self._paused_until = self._clock() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _PAUSES_S[1])

    def loaded(self, keys: Iterable[bytes]) -> None:
        """A request loads these chunks to the device."""
        if self._unused:
            before = len(self._unused)
            self._unused.difference_update(keys)
            self._used += before - len(self._unused)

    def left(self, key: bytes) -> None:
        """A chunk left DRAM."""
        if key in self._unused:
            self._unused.discard(key)
            self._in_vain += 1

    def counts(self) -> Recalled:
        """What came of what was read."""
        return Recalled(self._read, self._used, self._in_vain)

    def _is_left_alone(self, session: Owner, now: float) -> bool:
        return now < self._left_alone.get(session, now)


def _put(times: dict[Owner, float], session: Owner, until: float, most: int) -> None:
    times.pop(session, None)
    times[session] = until
    if len(times) > most:
        del times[next(iter(times))]
