"""In which order what waits for a disk is done, and when."""

import pytest

from appliance.engine.inside.disk.files import ChunkName
from appliance.engine.inside.disk.health import STALE_S
from appliance.engine.inside.disk.index import Held
from appliance.engine.inside.disk.jobs import Job, Task
from appliance.engine.inside.disk.write_queue import Chore, WriteQueue
from tests.unit.inside.disk.tier import ANA, Clock

CHUNK_BYTES = 64 << 20


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WriteQueue:
    queue = WriteQueue(CHUNK_BYTES, clock)
    assert queue.take() is Chore.FOREIGN  # once, when there is nothing else
    return queue


def name(number: int) -> ChunkName:
    return ChunkName(ANA, bytes([number]), number, bytes(4))


def task(clock: Clock, number: int) -> Task:
    return Task(Job(number, clock(), 1, CHUNK_BYTES), Held(ANA, clock()), name(number), memoryview(b""))


def test_what_is_to_be_known_goes_first_and_what_makes_room_before_what_takes_it(
    queue: WriteQueue, clock: Clock
) -> None:
    waiting = task(clock, 1)
    queue.write(waiting)
    queue.remove([name(2), name(3)])
    queue.do(Chore.SHARES)
    queue.do(Chore.QUARANTINE)
    assert [queue.take() for _ in range(6)] == [Chore.QUARANTINE, Chore.SHARES, name(2), name(3), waiting, None]
    assert not queue.is_due()


def test_what_could_not_be_removed_is_the_next_and_holds_up_the_others(queue: WriteQueue, clock: Clock) -> None:
    queue.remove([name(2)])
    queue.remove_again(name(1), clock() + 5.0)
    assert (queue.take(), queue.is_due(), queue.due_in_s()) == (None, False, 5.0)
    clock.now += 5.0
    assert [queue.take(), queue.take()] == [name(1), name(2)]


def test_a_chore_that_failed_is_done_later(queue: WriteQueue, clock: Clock) -> None:
    queue.do(Chore.SHARES, 1.0)
    assert (queue.take(), queue.due_in_s()) == (None, 1.0)
    clock.now += 1.0
    assert queue.take() is Chore.SHARES


def test_what_waits_is_bounded_in_bytes_and_in_time(queue: WriteQueue, clock: Clock) -> None:
    assert queue.has_room(1000)  # one job, however large, where nothing waits
    old, new = task(clock, 1), Task(Job(2, clock() + 1.0, 1, CHUNK_BYTES), Held(ANA, clock()), name(2), memoryview(b""))
    queue.write(old)
    queue.write(new)
    assert queue.waiting_bytes() == 2 * CHUNK_BYTES
    assert (queue.has_room(2), queue.has_room(3)) == (True, False)
    clock.now += STALE_S
    assert list(queue.take_stale()) == [old]
    assert queue.take_all() == [new]
    assert not queue.waits()
