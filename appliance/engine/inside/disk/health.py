"""How a disk does: whether it reads in time, whether it takes what is written, and what went wrong last.

Rules:

- A disk that does not answer has nothing: while a read takes too long, or reads are together slower than computing
  again, nothing is to be waited for.
- A disk that gave an error is left alone for a while, longer each time, until something was written.
- It touches no disk. Whoever calls holds the store's lock.
"""

import errno
from collections.abc import Callable
from typing import Final

NO_ANSWER: Final = "the disk does not answer"
STALE_S: Final = 2.0  # a chunk that waited for so long to be written holds its room above for too long
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0  # in which nothing is written after an error
_ANSWER_S: Final = 2.0  # a disk that takes longer for one read does not answer
_SLOWEST_READ_BYTES_S: Final = 64 << 20  # computing again is no slower


class DiskHealth:
    """What is known of it.

    Args:
        writers: how many threads write and remove.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, writers: int, now: Callable[[], float]) -> None:
        self._writers = writers
        self._now = now
        self._reading: dict[int, float] = {}  # since when each thread does
        self._writing: dict[int, float] = {}  # the same, of those that write and remove
        self._reads_due_at = now()
        self._error, self._error_at = "", now()
        self._pause_s, self._paused_until = _FIRST_PAUSE_S, now()

    # What it did

    def reads_asked(self, asked_at: float, size_bytes: int) -> None:
        """So much is to be read."""
        self._reads_due_at = max(self._reads_due_at, asked_at) + size_bytes / _SLOWEST_READ_BYTES_S

    def read_began(self, thread: int) -> None:
        """A thread reads a file."""
        self._reading[thread] = self._now()

    def read_ended(self, thread: int) -> None:
        """It does not any more."""
        del self._reading[thread]

    def write_began(self, thread: int) -> None:
        """A thread writes or removes a file."""
        self._writing[thread] = self._now()

    def write_ended(self, thread: int) -> None:
        """It does not any more, if it did."""
        self._writing.pop(thread, None)

    def wrote(self) -> None:
        """A chunk was written: the next error is the first."""
        self._pause_s = _FIRST_PAUSE_S

    def failed(self, error: OSError) -> None:
        """It gave an error."""
        code = errno.errorcode.get(error.errno or 0, "unknown")
        self.went_wrong(f"{error.strerror or type(error).__name__} ({code})")

    def went_wrong(self, what: str) -> None:
        """Something else is wrong with it, in words."""
        self._error, self._error_at = what, self._now()

    def leave_alone(self, error: OSError) -> float:
        """It takes nothing: nothing is asked of it for a while; until when."""
        self.failed(error)
        self._paused_until = self._now() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return self._paused_until

    # How it stands

    def is_reading(self) -> bool:
        """Whether some thread does."""
        return bool(self._reading)

    def answers(self, *, reads_wait: bool) -> bool:
        """Whether what is read comes in time."""
        late = self._now() - _ANSWER_S
        if any(since < late for since in self._reading.values()):
            return False
        return not (reads_wait or self._reading) or self._reads_due_at >= late

    def is_held_up(self) -> bool:
        """Whether no thread that writes gets on."""
        late = self._now() - STALE_S
        return sum(since < late for since in self._writing.values()) == self._writers

    def is_paused(self) -> bool:
        """Whether it is left alone after an error."""
        return self._now() < self._paused_until

    def last_error(self, *, answers: bool) -> tuple[str, float | None]:
        """What went wrong last, and how long ago; empty: nothing did."""
        if not answers:
            return NO_ANSWER, 0.0
        return self._error, self._now() - self._error_at if self._error else None
