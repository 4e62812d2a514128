"""What the engine waits for: chunks that are written or read, as jobs of several, and what came of them.

Rules:

- A job is over when each of its chunks is: its memory is not read or written any more from then on, and not before.
- Whoever calls holds the store's lock.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from appliance.engine.inside.disk.files import ChunkName
from appliance.engine.inside.disk.index import Held


class Piece(NamedTuple):
    """A chunk in memory: to be written, or where it is to be read to."""

    key: bytes
    position: int  # the token that it ends at
    data: memoryview


class Done(NamedTuple):
    """A job that is over. `keys` are those of the chunks that were written or read, or were there already."""

    job: int
    keys: tuple[bytes, ...]
    whole: bool
    moved_bytes: int
    seconds: float


@dataclass(slots=True)
class Job:
    """A job that is under way."""

    number: int
    started: float
    left: int
    moved_bytes: int
    keys: list[bytes] = field(default_factory=list)
    whole: bool = True


class Task(NamedTuple):
    """One chunk of a job."""

    job: Job
    held: Held
    name: ChunkName
    data: memoryview
    ahead: bool = False  # nobody asked for it: its session is not in use


class Jobs:
    """The jobs.

    Args:
        lock: the store's.
        chunk_bytes: of every chunk.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, lock: threading.Lock, chunk_bytes: int, now: Callable[[], float]) -> None:
        self._chunk_bytes = chunk_bytes
        self._now = now
        self._finished: deque[Done] = deque()
        self._open = self._pieces_over = 0
        self._idle = threading.Condition(lock)

    def begin(self, number: int, pieces: Sequence[Piece]) -> Job:
        """A job of so many chunks; without any it is over."""
        job = Job(number, self._now(), len(pieces), len(pieces) * self._chunk_bytes)
        self._open += 1
        if not pieces:
            self._over(job)
        return job

    def piece_over(self, job: Job, key: bytes, *, done: bool) -> None:
        """A chunk of a job is written or read, or will not be."""
        job.left -= 1
        self._pieces_over += 1
        if done:
            job.keys.append(key)
        else:
            job.whole = False
            job.moved_bytes -= self._chunk_bytes
        if not job.left:
            self._over(job)

    def finished(self) -> list[Done]:
        """The jobs that are over since this was asked last."""
        done = list(self._finished)
        self._finished.clear()
        return done

    def wait_for_all(self, patience_s: float) -> bool:
        """Return when every job is over, or no chunk was for so long; whether they are. The lock is free meanwhile."""
        while self._open:
            over = self._pieces_over
            if not self._idle.wait_for(lambda: not self._open, patience_s) and over == self._pieces_over:
                return False
        return True

    def _over(self, job: Job) -> None:
        self._finished.append(Done(job.number, tuple(job.keys), job.whole, job.moved_bytes, self._now() - job.started))
        self._open -= 1
        self._idle.notify_all()
