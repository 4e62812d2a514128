"""What a session's KV is worth while nobody uses it, and so which leaves a tier first.

The worth of a context that has been idle for `a` seconds is its hit density: the best, over every horizon `t`, of
P(return within t | idle a) / E(time it is held until then), in hits a second. That is the Gittins index of keeping it,
and what LHD ranks a cache's objects by (Beckmann, Chen, Cidon, NSDI 2018). A context whose return is likely and near is
worth most; one whose likely moment has passed loses its worth second by second.

How likely a return is, depends on why the turn stopped, on how long the session's own gaps were so far, and on how much
was generated. It is counted for each such class, in cells of idle time. A class of which little was seen is taken to be
like the wider class around it, and that one like `_PRIOR`.

Rules:

- Pure: no clock, no block pool, no I/O. Times are seconds of one clock that the caller passes in and that never goes
  back.
- What is closed and what a session diverged from is worth less than anything else; a context whose request waits, more,
  wherever it waits.
- A gap that ends teaches, and one that never ended within the horizon teaches too. Old lessons fade.
- Few gaps are longer than `_TAIL_S`. Until more are seen, the worth falls from there on as 1 / idle time, as the hazard
  of a heavy tail does: the order among the long idle is that of their last use, weighted by class. What is seen then
  outweighs that, cell by cell, as it does below.
- So many sessions are known at most; those idle longest are forgotten first, and worth nothing then.
"""

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, Final, NamedTuple

MAX_SESSIONS: Final = 100_000
"""How many sessions are known at a time, unless said otherwise."""

_NOTHING: Final = -1.0
_WANTED: Final = math.inf

_HORIZON_S: Final = 4 * 3600.0
_TAIL_S: Final = 300.0
_TAIL_REACHES_S: Final = 3000.0  # what a prior says of the gaps between the two is its whole tail's
_CELL_RATIO: Final = 1.25
_STRENGTH_OF_PRIOR: Final = 60.0  # gaps that it weighs as much as
_STRENGTH_OF_WIDER: Final = 30.0
_RELEARN_AFTER: Final = 8  # gaps, or a fiftieth of those that were seen
_FADE_AT: Final = 50_000.0  # gaps: then each counts half

_WEIGHT_OF_NEWEST: Final = 0.2  # in a session's mean of log gaps
_SHORTEST_GAP_S: Final = 0.1
_SHORT_GAPS, _LONG_GAPS = math.log(7.0), math.log(13.0)  # thirds of sessions: see docs/decisions/0012
_SHORT_OUTPUT, _LONG_OUTPUT = 150, 400  # tokens

_STOPS: Final = {"tool_use": 0, "end_turn": 1}
_OTHER_STOP: Final = 2
_END_TURN: Final = 1
_MIDDLE: Final = 1


class _Prior(NamedTuple):
    """What is known of gaps before any was seen.

    Attributes:
        within_s: the gaps, in seconds, that the shares `_SHARES` of those that end do not exceed.
        never: the share that does not end.
    """

    within_s: tuple[float, ...]
    never: float


# Rounded from agents' sessions: docs/decisions/0012.
_SHARES: Final = (0.0, 0.10, 0.25, 0.50, 0.75, 0.90, 0.97, 0.995)
_AFTER_TOOL_USE: Final = (  # by the third that the session's own gaps are in
    _Prior((0.5, 3.4, 4.2, 5.8, 9.0, 22.0, 120.0, 900.0), 0.005),
    _Prior((0.5, 4.0, 5.7, 8.5, 17.0, 45.0, 140.0, 1000.0), 0.008),
    _Prior((0.5, 4.5, 7.0, 13.0, 40.0, 145.0, 700.0, 2500.0), 0.018),
)
_AFTER_END_TURN: Final = _Prior((2.0, 30.0, 110.0, 300.0, 1000.0, 2600.0, 10_000.0, 30_000.0), 0.15)


def _edges() -> Iterator[float]:
    yield 0.0
    edge = 1.0
    while edge < _HORIZON_S:
        yield edge
        edge *= _CELL_RATIO
    yield _HORIZON_S


_EDGES: Final = tuple(_edges())  # of the cells of idle time
_CELLS: Final = len(_EDGES) - 1
_WIDTHS: Final = tuple(end - start for start, end in pairwise(_EDGES))
_TAIL_CELL: Final = bisect_right(_EDGES, _TAIL_S) - 1
_TAIL_CELLS: Final = bisect_right(_EDGES, _TAIL_REACHES_S) - 1 - _TAIL_CELL


class _Class(NamedTuple):
    """Turns that are followed by like gaps."""

    stop: int
    own_gaps: int  # short, middling, long
    output: int

    @property
    def wider(self) -> tuple[int, int]:
        """How the class is told from others where little was seen."""
        return (self.stop, _MIDDLE if self.stop == _END_TURN else self.own_gaps)


_CLASSES: Final = tuple(_Class(stop, gaps, output) for stop in range(3) for gaps in range(3) for output in range(3))


class _Gaps:
    """How many gaps ended in each cell of idle time, and how many lasted for longer than the horizon."""

    __slots__ = ("ended", "lasted")

    def __init__(self, ended: Sequence[float] = (0.0,) * _CELLS, lasted: float = 0.0) -> None:
        self.ended = list(ended)
        self.lasted = lasted


class _Session:
    """What is remembered of a session."""

    __slots__ = ("closed", "finished_at", "kind", "mean_log_gap", "waiting")

    def __init__(self) -> None:
        self.finished_at: float | None = None  # None: nothing of it was finished yet
        self.kind = _CLASSES[0]
        self.mean_log_gap: float | None = None
        self.waiting = 0  # requests
        self.closed = False  # while one still runs


class RetentionPolicy:
    """Says what KV is worth keeping. Learns from what it is told of the sessions' turns.

    Args:
        max_sessions: how many sessions are known at a time.
    """

    def __init__(self, *, max_sessions: int = MAX_SESSIONS) -> None:
        self._max_sessions = max_sessions
        # Both in the order of last use. Those of the second are idle for longer than the horizon.
        self._sessions: OrderedDict[Hashable, _Session] = OrderedDict()
        self._asleep: OrderedDict[Hashable, _Session] = OrderedDict()
        self._awaited: dict[Hashable, float] = {}  # until when
        self._gaps = {kind: _Gaps() for kind in _CLASSES}
        self._seen = 0.0
        self._unlearned = 0
        self._worth: dict[_Class, tuple[float, ...]] = {}

    # What it is told

    def arrived(self, *, session: Hashable, now: float) -> None:
        """A request of the session arrived: it waits or runs, until `finished` or `closed`."""
        self._awaited.pop(session, None)
        known = self._known(session)
        if known.finished_at is not None and not known.waiting:
            gap_s = now - known.finished_at
            if gap_s < _HORIZON_S:  # else it was learned when it grew so old
                self._learn(known.kind, gap_s)
            if known.kind.stop != _END_TURN:
                newest = math.log(max(gap_s, _SHORTEST_GAP_S))
                mean = newest if known.mean_log_gap is None else known.mean_log_gap
                known.mean_log_gap = mean + _WEIGHT_OF_NEWEST * (newest - mean)
        known.waiting += 1
        known.closed = False
        self._bound(now)

    def awaited(self, *, sessions: Iterable[Hashable], now: float, until: float) -> None:
        """A request of each session waits elsewhere, and comes; who is not heard of again by `until` does not."""
        self._awaited = {session: end for session, end in self._awaited.items() if now < end}
        for session in sessions:
            self._awaited[session] = until

    def finished(
        self,
        *,
        session: Hashable,
        now: float,
        stop: str | None,
        prompt_tokens: int,  # noqa: ARG002  (tells nothing about the gap that output_tokens does not)
        output_tokens: int,
    ) -> None:
        """A request of the session is over.

        Args:
            stop: "tool_use": the session called a tool; "end_turn": it answered; None: another reason, or not known.
        """
        known = self._known(session)
        known.waiting = max(0, known.waiting - 1)
        if known.closed and not known.waiting:
            del self._sessions[session]
            return
        known.finished_at = now
        known.kind = _Class(
            _OTHER_STOP if stop is None else _STOPS.get(stop, _OTHER_STOP),
            _third(known.mean_log_gap, _SHORT_GAPS, _LONG_GAPS),
            _third(output_tokens, _SHORT_OUTPUT, _LONG_OUTPUT),
        )
        self._bound(now)

    def corrected(self, *, session: Hashable, stop: str | None, output_tokens: int) -> None:
        """Why the session's last request stopped is known only now: as `finished` would have been told.

        Once the next request has come it is too late: the gap is learned.
        """
        known = self._sessions.get(session)
        if known is None or known.waiting or known.finished_at is None:
            return
        known.kind = _Class(
            _OTHER_STOP if stop is None else _STOPS.get(stop, _OTHER_STOP),
            known.kind.own_gaps,
            _third(output_tokens, _SHORT_OUTPUT, _LONG_OUTPUT),
        )

    def closed(self, *, session: Hashable, now: float) -> None:  # noqa: ARG002  (kvsim's interface)
        """The session is over: nobody will ask for its KV again. If somebody does, it is a new one."""
        self._asleep.pop(session, None)  # what its gap was worth is learned
        self._awaited.pop(session, None)
        known = self._sessions.get(session)
        if known is None:
            return
        if known.waiting:
            known.closed = True  # its KV is of use until the request that runs is over
            return
        del self._sessions[session]
        if known.finished_at is not None:
            self._learn(known.kind, math.inf)

    # What it says

    def value(self, *, session: Hashable, now: float, position: int, abandoned: bool) -> float:  # noqa: ARG002
        """The worth of keeping a session's KV, in hits a second; the lowest leaves first, from its tail on.

        Args:
            position: the token that the tail ends at. A context is worth as much at its head as at its tail: it leaves
                tail first in any case.
            abandoned: it is a tail that the session has diverged from.
        """
        known = self._sessions.get(session) or self._asleep.get(session)
        if abandoned:
            return _NOTHING
        if self._awaited and now < self._awaited.get(session, now):
            return _WANTED
        if known is None:
            return _NOTHING
        if known.waiting or known.finished_at is None:
            return _WANTED
        if not self._worth:
            self._worth = self._reckoned()
        worth = self._worth[known.kind]
        idle_s = now - known.finished_at
        if idle_s < _HORIZON_S:
            return worth[bisect_right(_EDGES, max(idle_s, 0.0)) - 1]
        return worth[-1] * _HORIZON_S / idle_s

    def expected(self, *, now: float, most: int) -> list[tuple[Hashable, float]]:
        """Whose return is expected, with what its KV is worth: those who are awaited first, in the order in which they
        were named; then those whose gap is open, the highest worth first, of the `most` that were used last."""
        awaited = {session: _WANTED for session, until in self._awaited.items() if now < until}
        last_used = (session for session, known in reversed(self._sessions.items()) if not known.waiting)
        open_gaps = [
            (session, self.value(session=session, now=now, position=0, abandoned=False))
            for session in islice(last_used, most)
            if session not in awaited
        ]
        open_gaps.sort(key=lambda each: -each[1])
        return [*awaited.items(), *open_gaps]

    # What survives a restart

    def lessons(self) -> dict[str, Any]:
        """What was learned, for `learn`: JSON's types only, some kilobytes."""
        return {
            "edges_s": list(_EDGES),
            "classes": [
                {
                    "class": list(kind),
                    "ended": [round(count, 3) for count in gaps.ended],
                    "lasted": round(gaps.lasted, 3),
                }
                for kind, gaps in self._gaps.items()
                if gaps.lasted or any(gaps.ended)
            ],
        }

    def learn(self, lessons: dict[str, Any]) -> None:
        """Take up the lessons of a run before.

        Raises:
            ValueError: they are another version's, or damaged; nothing was taken up.
        """
        try:
            if lessons["edges_s"] != list(_EDGES):
                raise ValueError("they are counted in other cells of idle time")
            taken = {_Class(*said["class"]): _read_gaps(said) for said in lessons["classes"]}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the lessons cannot be read: {error}") from None
        if not taken.keys() <= self._gaps.keys():
            raise ValueError("the lessons are of classes that are not known")
        self._gaps |= taken
        self._seen = sum(gaps.lasted + sum(gaps.ended) for gaps in self._gaps.values())
        self._worth.clear()

    # Private

    def _known(self, session: Hashable) -> _Session:
        """The session, as the one that was used last."""
        known = self._sessions.pop(session, None) or self._asleep.pop(session, None) or _Session()
        self._sessions[session] = known
        return known

    def _bound(self, now: float) -> None:
        """Let go of what is too much, and learn from gaps that outlast the horizon."""
        while self._sessions:
            session, oldest = next(iter(self._sessions.items()))
            if oldest.waiting or oldest.finished_at is None or now - oldest.finished_at < _HORIZON_S:
                break
            self._asleep[session] = self._sessions.pop(session)
            self._learn(oldest.kind, math.inf)
        while len(self._sessions) + len(self._asleep) > self._max_sessions:
            if self._asleep:
                self._asleep.popitem(last=False)
                continue
            idle = next((session for session, known in self._sessions.items() if not known.waiting), None)
            self._sessions.pop(next(iter(self._sessions)) if idle is None else idle)

    def _learn(self, kind: _Class, gap_s: float) -> None:
        gaps = self._gaps[kind]
        if gap_s < _HORIZON_S:
            gaps.ended[bisect_right(_EDGES, max(gap_s, 0.0)) - 1] += 1.0
        else:
            gaps.lasted += 1.0
        self._seen += 1.0
        self._unlearned += 1
        if self._unlearned >= max(_RELEARN_AFTER, self._seen / 50):
            self._relearn()

    def _relearn(self) -> None:
        """Have the worth of every class reckoned anew when it is next asked for."""
        self._unlearned = 0
        self._worth.clear()
        if self._seen >= _FADE_AT:
            self._fade()

    def _fade(self) -> None:
        for gaps in self._gaps.values():
            gaps.ended = [count / 2 for count in gaps.ended]
            gaps.lasted /= 2
        self._seen /= 2

    def _reckoned(self) -> dict[_Class, tuple[float, ...]]:
        """The worth of each class at the beginning of each cell."""
        return {kind: _hit_densities(self._hazards(kind)) for kind in _CLASSES}

    def _hazards(self, kind: _Class) -> list[float]:
        """The probability that a gap that reached a cell ends in it."""
        wider = [self._gaps[other] for other in _CLASSES if other.wider == kind.wider]
        together = _Gaps([math.fsum(cell) for cell in zip(*(gaps.ended for gaps in wider), strict=True)])
        together.lasted = math.fsum(gaps.lasted for gaps in wider)
        prior = _AFTER_END_TURN if kind.stop == _END_TURN else _AFTER_TOOL_USE[kind.own_gaps]
        return _shrunk(
            self._gaps[kind], _shrunk(together, _prior_hazards(prior), _STRENGTH_OF_PRIOR), _STRENGTH_OF_WIDER
        )


def _third(value: float | None, low: float, high: float) -> int:
    if value is None:
        return _MIDDLE
    return (value > low) + (value > high)


def _shrunk(gaps: _Gaps, expected: Sequence[float], strength: float) -> list[float]:
    """The hazard of each cell: as it was seen, with so many gaps more that behaved as expected."""
    # How many reached a cell: those that ended in it or later, and those that lasted.
    reached = list(accumulate(reversed(gaps.ended), initial=gaps.lasted))[:0:-1]
    return [
        (ended + strength * hazard) / (at_risk + strength)
        for ended, at_risk, hazard in zip(gaps.ended, reached, expected, strict=True)
    ]


def _prior_hazards(prior: _Prior) -> list[float]:
    left = [1.0 - (1.0 - prior.never) * _share_within(prior.within_s, edge) for edge in _EDGES[: _TAIL_CELL + 1]]
    head = [1.0 - after / before for before, after in pairwise(left)]
    # The same hazard in each cell of the tail: cells grow with idle time, so it falls as 1 / idle time.
    left_in_the_end = 1.0 - (1.0 - prior.never) * _share_within(prior.within_s, _TAIL_REACHES_S)
    in_tail = 1.0 - (left_in_the_end / left[-1]) ** (1 / _TAIL_CELLS)
    return [*head, *[in_tail] * (_CELLS - _TAIL_CELL)]


def _share_within(within_s: Sequence[float], gap_s: float) -> float:
    """The share of the gaps that end which are no longer than `gap_s`: linear in its logarithm between those known."""
    if gap_s <= within_s[0]:
        return 0.0
    if gap_s >= within_s[-1]:
        return 1.0 - (1.0 - _SHARES[-1]) * within_s[-1] / gap_s
    at = bisect_right(within_s, gap_s)
    low_s, high_s = within_s[at - 1], within_s[at]
    low, high = _SHARES[at - 1], _SHARES[at]
    return low + (high - low) * math.log(gap_s / low_s) / math.log(high_s / low_s)


def _hit_densities(hazards: Sequence[float]) -> tuple[float, ...]:
    """The hit density at the beginning of each cell."""
    densities = []
    for start in range(_CELLS):
        left, returned, held_s, best = 1.0, 0.0, 0.0, 0.0
        for hazard, width_s in zip(hazards[start:], _WIDTHS[start:], strict=True):
            held_s += width_s * left * (1.0 - hazard / 2)  # who returns within a cell does so in its middle
            returned += left * hazard
            left *= 1.0 - hazard
            best = max(best, returned / held_s)
        densities.append(best)
    return tuple(densities)


def _read_gaps(said: dict[str, Any]) -> _Gaps:
    ended, lasted = [float(count) for count in said["ended"]], float(said["lasted"])
    if len(ended) != _CELLS or not all(0 <= count < math.inf for count in (*ended, lasted)):
        raise ValueError("a count is missing, or is none")
    return _Gaps(ended, lasted)
