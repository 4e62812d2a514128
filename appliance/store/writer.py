"""One thread that writes, and commits whatever is waiting in one transaction.

Rules:

- A change set is written whole or not at all, and is durable before whoever waits for it is told.
- Within a change set the order of changes holds. Different change sets of one commit have no order: like changes of
  theirs are executed together.
- A change set that breaks a constraint fails alone: its companions are written without it. A disk that is full or a
  database that is gone fails everything that waited.
- What waits is bounded.
"""

import asyncio
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, Executable, PoolProxiedConnection, exc

from appliance.errors import HoldfastError
from appliance.store.errors import StoreFull, StoreUnavailable, busy, closed
from appliance.store.prepared import Prepared

_CLOSE_WAIT_S = 60.0
_PREPARED = 256  # forms of statements


@dataclass(frozen=True, slots=True)
class Change:
    """One statement with its values. Statements are built once and reused: like ones are recognised by identity."""

    statement: Executable
    values: Mapping[str, object]


class Waiting:
    """Changes, or work that runs alone, and who waits for it."""

    __slots__ = ("alone", "changes", "future", "loop")

    def __init__(
        self,
        future: "asyncio.Future[Any] | futures.Future[Any]",
        loop: asyncio.AbstractEventLoop | None,
        *,
        changes: Sequence[Change] = (),
        alone: Callable[[Engine], object] | None = None,
    ) -> None:
        self.future = future
        self.loop = loop
        self.changes = changes
        self.alone = alone

    def settle(self, result: object, error: BaseException | None) -> None:
        """Tell who waits; in the thread of `loop`, where there is one."""
        if self.future.done():
            return
        if error is None:
            self.future.set_result(result)
        else:
            self.future.set_exception(error)


_Outcome = tuple[Waiting, object, BaseException | None]


class Writer:
    """The thread.

    Args:
        engine: the one writing connection.
        place: what the database is called in messages.
        meaning: what a driver's error means to a person.
        committed: told how many change sets a commit had, outside of a transaction.
        capacity: how many change sets may wait.
        most_together: how many go into one transaction at most.

    Attributes:
        failure: why the last transaction was not written, where that was the database's or its disk's fault.
    """

    def __init__(
        self,
        engine: Engine,
        place: str,
        meaning: Callable[[BaseException], BaseException],
        committed: Callable[[int], None],
        *,
        capacity: int = 4096,
        most_together: int = 256,
    ) -> None:
        self._engine = engine
        self._place = place
        self._meaning = meaning
        self._committed = committed
        self._capacity = capacity
        self._most_together = most_together
        self._held: PoolProxiedConnection | None = None
        self._prepared: dict[tuple[int, tuple[str, ...]], tuple[Executable, Prepared | None]] = {}
        self._waiting: deque[Waiting] = deque()
        self._wake = threading.Condition()
        self._closed = False
        self.failure: HoldfastError | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
        self._thread.start()

    @property
    def depth(self) -> int:
        """How many change sets are waiting."""
        return len(self._waiting)

    def put(self, waiting: Waiting) -> None:
        """Queue it; its future is settled when it is durable or has failed.

        Raises:
            StoreUnavailable: the writer is closed.
            StoreBusy: too many are waiting.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("what runs in the writer's thread must not wait for the writer")
        with self._wake:
            if self._closed:
                raise closed(self._place)
            if len(self._waiting) >= self._capacity:
                raise busy(self._place, self._capacity)
            self._waiting.append(waiting)
            self._wake.notify()

    def close(self) -> None:
        """Write what is waiting, then stop."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(_CLOSE_WAIT_S)

    def _run(self) -> None:
        while together := self._next():
            try:
                outcomes = [self._alone(together[0])] if together[0].alone is not None else self._commit(together)
            except BaseException as error:  # a defect of ours: whoever waits must not wait for ever
                outcomes = [(waiting, None, error) for waiting in together]
            self._remember(outcomes)
            _deliver(outcomes)
            self._committed(len(together))
        self._let_go()

    def _remember(self, outcomes: Sequence[_Outcome]) -> None:
        errors = [error for _, _, error in outcomes]
        broken = [error for error in errors if isinstance(error, StoreFull | StoreUnavailable)]
        if broken:
            self.failure = broken[-1]
        elif None in errors:
            self.failure = None

    def _next(self) -> list[Waiting]:
        """What goes into the next transaction; empty: there is nothing left and the writer is closed."""
        with self._wake:
            while not self._waiting and not self._closed:
                self._wake.wait()
            together: list[Waiting] = []
            while self._waiting and len(together) < self._most_together:
                if self._waiting[0].alone is not None and together:
                    break
                together.append(self._waiting.popleft())
                if together[0].alone is not None:
                    break
            return together

    def _alone(self, waiting: Waiting) -> _Outcome:
        self._let_go()
        try:
            return waiting, waiting.alone(self._engine) if waiting.alone is not None else None, None
        except Exception as error:
            return waiting, None, self._meaning(error)

    def _commit(self, together: list[Waiting]) -> list[_Outcome]:
        try:
            self._execute(together)
        except Exception as error:
            meaning = self._meaning(error)
            if len(together) == 1:
                return [(together[0], None, meaning)]
            if isinstance(meaning, StoreFull | StoreUnavailable):
                return [(waiting, None, self._meaning(error)) for waiting in together]
            return [outcome for waiting in together for outcome in self._commit([waiting])]
        return [(waiting, None, None) for waiting in together]

    def _execute(self, together: list[Waiting]) -> None:
        groups = [(statement, rows, self._prepare(statement, rows)) for statement, rows in _grouped(together)]
        prepared = [(made, rows) for _, rows, made in groups if made is not None]
        if len(prepared) == len(groups):
            self._execute_prepared(prepared)
            return
        self._let_go()
        with self._engine.begin() as db:
            for statement, rows, _ in groups:
                db.execute(statement, rows)

    def _execute_prepared(self, groups: Sequence[tuple[Prepared, Sequence[Mapping[str, object]]]]) -> None:
        """One transaction on the driver's own connection: what SQLAlchemy would add costs more than the rows."""
        if self._held is None:
            self._held = self._engine.raw_connection()
        cursor = self._held.cursor()
        try:
            cursor.execute("BEGIN IMMEDIATE")
            for prepared, rows in groups:
                prepared.execute(cursor, rows)
            cursor.execute("COMMIT")
        except sqlite3.Error as error:
            self._let_go()
            raise exc.DBAPIError.instance(None, None, error, sqlite3.Error, hide_parameters=True) from error
        except BaseException:
            self._let_go()
            raise
        finally:
            cursor.close()

    def _prepare(self, statement: Executable, rows: Sequence[Mapping[str, object]]) -> Prepared | None:
        form = (id(statement), tuple(rows[0]))
        if form not in self._prepared:
            if len(self._prepared) >= _PREPARED:
                self._prepared.clear()
            # The statement is kept with it: another one cannot come to have its id.
            self._prepared[form] = statement, Prepared.of(statement, tuple(rows[0]), self._engine.dialect)
        return self._prepared[form][1]

    def _let_go(self) -> None:
        """Give the connection back, which rolls back what is open: others need it, and it may be no good any more."""
        held, self._held = self._held, None
        if held is not None:
            held.close()


def _grouped(together: list[Waiting]) -> list[tuple[Executable, list[Mapping[str, object]]]]:
    """Like changes brought together, without any change overtaking an earlier one of its own change set.

    Changes are alike that have the same statement and name the same values: a driver compiles a statement for the names
    of its first row.
    """
    groups: list[tuple[Executable, list[Mapping[str, object]]]] = []
    places: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for waiting in together:
        reached = 0
        for change in waiting.changes:
            known = places.setdefault((id(change.statement), tuple(change.values)), [])
            place = next((place for place in known if place >= reached), len(groups))
            if place == len(groups):
                known.append(place)
                groups.append((change.statement, []))
            groups[place][1].append(change.values)
            reached = place
    return groups


def _deliver(outcomes: list[_Outcome]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for waiting, result, error in outcomes:
        if waiting.loop is None:
            waiting.settle(result, error)
        else:
            by_loop.setdefault(waiting.loop, []).append((waiting, result, error))
    for loop, its_outcomes in by_loop.items():
        try:
            loop.call_soon_threadsafe(_settle_all, its_outcomes)
        except RuntimeError:
            pass  # the loop is closed: nobody waits


def _settle_all(outcomes: list[_Outcome]) -> None:
    for waiting, result, error in outcomes:
        waiting.settle(result, error)
