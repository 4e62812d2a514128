"""Whether what comes back from a tier is what the model would compute.

Now and then a restored prompt's first blocks are noted, computed again under a salt that nobody knows, and compared.
The caller computes and moves; this module chooses, judges and keeps the verdict.

Rules:

- Two computations of the same tokens differ by rounding: batches of another shape sum in another order. So the bar is
  the error's root mean square against that of the values, far above rounding and far below what anything else gives.
  docs/decisions/0015 has the measurements.
- One at a time, of so many tokens at most, not more often than every `interval_s`, and only when nobody else wants
  anything computed.
- After one mismatch nothing is restored any more. Only a new start of the engine ends that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MOST_TOKENS: Final = 512
INTERVAL_S: Final = 300.0
TOLERANCE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Sample:
    """The beginning of a prompt that was restored.

    Attributes:
        tokens: the prompt up to the end of the last block of `restored`.
        restored: the token at which each block ends, and its bytes as they came back.
    """

    tokens: tuple[int, ...]
    restored: tuple[tuple[int, bytes], ...]


class Canary:
    """Chooses samples and keeps the verdict.

    Args:
        clock: seconds; monotonic.
        interval_s: the least time between two samples.

    Attributes:
        compared_total: how many blocks were compared.
        worst: the largest error that was found, as a share of the values' root mean square.
        quarantined: a block was not what the model computes; nothing more may be restored.
    """

    def __init__(self, clock: Callable[[], float], interval_s: float = INTERVAL_S) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._next_at = -math.inf
        self._waiting: Sample | None = None
        self._running: Sample | None = None
        self.compared_total = 0
        self.worst = 0.0
        self.quarantined = False

    def is_due(self) -> bool:
        """Whether the next restored prompt is to be noted."""
        return self._waiting is None and not self.quarantined and self._clock() >= self._next_at

    def note(self, sample: Sample) -> None:
        """Take a sample up, to be computed when there is nothing else to do."""
        self._waiting = sample
        self._next_at = self._clock() + self._interval_s

    def take(self) -> Sample | None:
        """The sample that is to be computed now. One that was taken before and never judged is given up."""
        self._running, self._waiting = self._waiting, None
        return self._running

    def ends(self) -> tuple[int, ...]:
        """The tokens at which the blocks end that are to be computed before there can be a verdict."""
        return () if self._running is None else tuple(end_token for end_token, _ in self._running.restored)

    def judge(self, error_of: Callable[[int, bytes], float | None]) -> bool:
        """Compare the sample that was taken.

        Args:
            error_of: of the block that ends at a token and its bytes as they came back: the root mean square of the
                difference to what was computed, as a share of that of the values; None: it was not computed.

        Returns:
            Whether nothing differed by more than rounding does, now or before.
        """
        sample, self._running = self._running, None
        for end_token, restored in sample.restored if sample is not None else ():
            error = error_of(end_token, restored)
            if error is None:
                continue
            self.compared_total += 1
            self.worst = max(self.worst, error)
            if not error <= TOLERANCE:  # not a number is no agreement
                self.quarantined = True
        return not self.quarantined
