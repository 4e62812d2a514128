"""What waits for the threads that write, and in which order they take it.

Rules:

- A quarantine is written down before all else, then the tenants' shares. What was dropped is removed before anything is
  written, so that the files never take more than they may. What other models left goes when there is nothing else.
- A file that could not be removed is the next to be tried, after a while, and nothing is removed before it.
- What waits to be written holds room in the tier above: it is bounded in bytes and in time.
- Whoever calls holds the store's lock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from math import inf
from typing import Final

from appliance.engine.inside.disk.files import ChunkName
from appliance.engine.inside.disk.health import STALE_S
from appliance.engine.inside.disk.jobs import Task

_MAX_WAITING_BYTES: Final = 256 << 20


class Chore(Enum):
    """What is done once, beside chunks."""

    QUARANTINE = "write down that nothing is to be restored"
    SHARES = "write down what each tenant is guaranteed"
    FOREIGN = "remove what other models left"


class WriteQueue:
    """What waits.

    Args:
        chunk_bytes: of every chunk.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, chunk_bytes: int, now: Callable[[], float]) -> None:
        self._chunk_bytes = chunk_bytes
        self._now = now
        self._writes: deque[Task] = deque()
        self._removals: deque[ChunkName] = deque()
        self._removals_due_at = -inf
        self._due_at = {Chore.QUARANTINE: inf, Chore.SHARES: inf, Chore.FOREIGN: -inf}

    # What comes in

    def write(self, task: Task) -> None:
        """A chunk is to be written."""
        self._writes.append(task)

    def remove(self, names: Iterable[ChunkName]) -> None:
        """Files are to be removed."""
        self._removals.extend(names)

    def remove_again(self, name: ChunkName, due_at: float) -> None:
        """A file could not be removed: it is tried again then."""
        self._removals.appendleft(name)
        self._removals_due_at = due_at

    def do(self, chore: Chore, after_s: float = -inf) -> None:
        """Something is to be done, at once or later."""
        self._due_at[chore] = self._now() + after_s

    # What is taken out

    def take(self) -> Chore | ChunkName | Task | None:
        """What is done next: a chore, a file's removal, or a chunk's writing; None: nothing now."""
        for chore in (Chore.QUARANTINE, Chore.SHARES):
            if self._is_due(chore):
                return self._done(chore)
        if self._may_remove():
            return self._removals.popleft()
        if self._writes:
            return self._writes.popleft()
        return self._done(Chore.FOREIGN) if self._is_due(Chore.FOREIGN) else None

    def take_stale(self) -> Iterator[Task]:
        """What waited for too long to be written."""
        while self._writes and self.is_stale(self._writes[0]):
            yield self._writes.popleft()

    def take_all(self) -> list[Task]:
        """All that waits to be written."""
        tasks = list(self._writes)
        self._writes.clear()
        return tasks

    # What there is

    def is_stale(self, task: Task) -> bool:
        """Whether a chunk waited for too long."""
        return self._now() - task.job.started >= STALE_S

    def is_due(self) -> bool:
        """Whether there is something to do now."""
        return bool(self._writes) or self._may_remove() or any(map(self._is_due, Chore))

    def due_in_s(self) -> float:
        """When that may change though nothing comes in."""
        removing_at = self._removals_due_at if self._removals else inf
        return max(0.0, min(self._due_at[Chore.QUARANTINE], self._due_at[Chore.SHARES], removing_at) - self._now())

    def waits(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._writes)

    def waiting_bytes(self) -> int:
        """How much waits to be written."""
        return len(self._writes) * self._chunk_bytes

    def has_room(self, chunks: int) -> bool:
        """Whether so many chunks more may wait."""
        return not self._writes or (len(self._writes) + chunks) * self._chunk_bytes <= _MAX_WAITING_BYTES

    def _is_due(self, chore: Chore) -> bool:
        return self._due_at[chore] <= self._now()

    def _done(self, chore: Chore) -> Chore:
        self._due_at[chore] = inf
        return chore

    def _may_remove(self) -> bool:
        return bool(self._removals) and self._removals_due_at <= self._now()
