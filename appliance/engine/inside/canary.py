"""Whether what comes back from a tier is what the model would compute.

Now and then a restored prompt's first blocks are noted, computed again under a salt that nobody knows, and compared.
The caller computes and moves; this module chooses, judges and keeps the verdict.

Rules:

- Two computations of the same tokens differ by rounding: batches of another shape sum in another order. So the bar is
  the error's root mean square against that of the values, far above rounding and far below what anything else gives.
  docs/decisions/0015 has the measurements.
- One at a time, of `MOST_TOKENS` at most, not more often than every `interval_s`, when nobody else wants anything
  computed. Where that was never so for `BESIDE_AFTER_S`, one is computed beside others, of `MOST_TOKENS_BESIDE`.
- A block is known by its group and its end: where layers keep their KV in several ways, several end at one token.
- A sample is its session's: it goes when the session is released, and when it is `MOST_AGE_S` old in any case. What
  goes without having been compared is counted.
- After one mismatch nothing is restored any more.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

MOST_TOKENS: Final = 512
MOST_TOKENS_BESIDE: Final = 128
INTERVAL_S: Final = 300.0
BESIDE_AFTER_S: Final = 900.0
MOST_AGE_S: Final = 300.0
TOLERANCE: Final = 0.05


class Place(NamedTuple):
    """Where a block is in a prompt: which of the model's groups of layers, and the token that it ends at."""

    group: int
    end_token: int


@dataclass(frozen=True, slots=True)
class Sample:
    """The beginning of a prompt that was restored.

    Attributes:
        owner: whose prompt it is: tenant, session.
        tokens: the prompt up to the end of the last block of `restored`.
        restored: where each block is, and its bytes as they came back.
    """

    owner: tuple[str, str]
    tokens: tuple[int, ...]
    restored: tuple[tuple[Place, bytes], ...]

    def head(self, most_tokens: int) -> "Sample":
        """Its blocks up to so many tokens, or its first."""
        most = max(most_tokens, min(place.end_token for place, _ in self.restored))
        restored = tuple(each for each in self.restored if each[0].end_token <= most)
        tokens = self.tokens[: max(place.end_token for place, _ in restored)]
        return replace(self, tokens=tokens, restored=restored)


class Canary:
    """Chooses samples and keeps the verdict.

    Args:
        clock: seconds; monotonic.
        interval_s: the least time between two samples.

    Attributes:
        compared_total: how many blocks were compared.
        dropped_total: how many samples went without having been compared.
        worst: the largest error that was found, as a share of the values' root mean square.
        quarantined: a block was not what the model computes; nothing more may be restored.
    """

    def __init__(self, clock: Callable[[], float], interval_s: float = INTERVAL_S) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._next_at = self._noted_at = -math.inf
        self._began_at = clock()
        self._compared_at: float | None = None
        self._waiting: Sample | None = None
        self._running: Sample | None = None
        self.compared_total = self.dropped_total = 0
        self.worst = 0.0
        self.quarantined = False

    def is_due(self) -> bool:
        """Whether the next restored prompt is to be noted."""
        idle = self._waiting is None and self._running is None
        return idle and not self.quarantined and self._clock() >= self._next_at

    def note(self, sample: Sample) -> None:
        """Take a sample up, to be computed when there is nothing else to do."""
        self._waiting = sample
        self._noted_at = self._clock()
        self._next_at = self._noted_at + self._interval_s

    def take(self, *, idle: bool) -> Sample | None:
        """The sample that is to be computed now.

        Args:
            idle: nobody else wants anything computed.
        """
        since = self._began_at if self._compared_at is None else self._compared_at
        if self._waiting is None or not (idle or self._clock() - since >= BESIDE_AFTER_S):
            return None
        self._running = self._waiting if idle else self._waiting.head(MOST_TOKENS_BESIDE)
        self._waiting = None
        return self._running

    def compared_age_s(self) -> float | None:
        """How long ago blocks were compared last; None: never."""
        return None if self._compared_at is None else self._clock() - self._compared_at

    def released(self, sessions: Collection[str]) -> bool:
        """Sessions with these labels are over; whether their sample went, and what is computed of it must go."""
        sample = self._waiting or self._running
        return sample is not None and sample.owner[1] in sessions and self._drop()

    def expire(self) -> bool:
        """Drop what is too old; whether it was, and what is computed of it must go."""
        due_in_s = self.next_expiry_in_s()
        return due_in_s is not None and due_in_s <= 0 and self._drop()

    def next_expiry_in_s(self) -> float | None:
        """Seconds until the sample is too old; None: there is none."""
        if self._waiting is None and self._running is None:
            return None
        return self._noted_at + MOST_AGE_S - self._clock()

    def _drop(self) -> bool:
        self._waiting = self._running = None
        self.dropped_total += 1
        return True

    def places(self) -> tuple[Place, ...]:
        """The blocks that are to be computed before there can be a verdict."""
        return () if self._running is None else tuple(place for place, _ in self._running.restored)

    def judge(self, error_of: Callable[[Place, bytes], float | None]) -> bool:
        """Compare the sample that was taken.

        Args:
            error_of: of the block at a place and its bytes as they came back: the root mean square of the difference to
                what was computed, as a share of that of the values; None: it was not computed.

        Returns:
            Whether nothing differed by more than rounding does, now or before.
        """
        sample, self._running = self._running, None
        before = self.compared_total
        for place, restored in sample.restored if sample is not None else ():
            error = error_of(place, restored)
            if error is None:
                continue
            self.compared_total += 1
            self.worst = max(self.worst, error)
            if not error <= TOLERANCE:  # not a number is no agreement
                self.quarantined = True
        if self.compared_total > before:
            self._compared_at = self._clock()
        elif sample is not None:
            self.dropped_total += 1
        return not self.quarantined
