"""Which chunks leave DRAM, in which order."""

from collections.abc import Hashable

import pytest

from appliance.engine.inside.chunks import ChunkOrder, Owner

A, B, CHILD = ("t", "a"), ("t", "b"), ("t", "child")


class Sessions:
    """Worths that the test says, and a clock that it moves."""

    def __init__(self) -> None:
        self.worths: dict[Hashable, float] = {}
        self.now = 0.0
        self.asked = 0

    def worth(self, *, session: Hashable, now: float, position: int, abandoned: bool) -> float:
        self.asked += 1
        return self.worths.get(session, 0.0)


@pytest.fixture
def sessions() -> Sessions:
    return Sessions()


@pytest.fixture
def order(sessions: Sessions) -> ChunkOrder:
    return ChunkOrder(sessions.worth, lambda: sessions.now)


def stored(order: ChunkOrder, owner: Owner, name: str, chunks: int) -> dict[bytes, int]:
    positions = {f"{name}{number}".encode(): 32 * (number + 1) for number in range(chunks)}
    for key, end_token in positions.items():
        if key not in order:
            order.add(key, end_token, owner)
            order.freed(key)
    order.used(owner, positions)
    return positions


def test_the_lowest_worth_leaves_first_and_its_tail_before_its_head(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 2.0, B: 1.0}
    stored(order, A, "a", 2)
    stored(order, B, "b", 3)
    assert order.pick(4, ()) == (b"b2", b"b1", b"b0", b"a1")
    assert len(order) == 1


def test_what_a_session_diverged_from_leaves_before_anything_else(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 9.0, B: 1.0}
    old = stored(order, A, "a", 4)
    stored(order, B, "b", 1)
    for key in (b"new2", b"new3"):
        order.add(key, 0, A)
    order.used(A, {b"a0": 32, b"a1": 64, b"new2": 96, b"new3": 128})
    picked = order.pick(2, ())
    assert picked is not None
    assert set(picked) == {b"a2", b"a3"}
    assert old.keys() - set(picked) == {b"a0", b"a1"}


def test_a_beginning_of_what_is_there_abandons_nothing(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 9.0, B: 1.0}
    stored(order, A, "a", 4)
    stored(order, B, "b", 1)
    order.used(A, {b"a0": 32, b"a1": 64})
    assert order.pick(1, ()) == (b"b0",)


def test_a_shared_chunk_stays_with_the_session_that_is_worth_more(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0, CHILD: 3.0}
    stored(order, A, "a", 3)
    stored(order, B, "b", 1)
    order.used(CHILD, {b"a0": 32})
    assert order.pick(3, ()) == (b"a2", b"a1", b"b0")


def test_a_chunk_that_is_copied_or_spared_stays(sessions: Sessions, order: ChunkOrder) -> None:
    sessions.worths = {A: 1.0, B: 2.0}
    stored(order, A, "a", 2)
    stored(order, B, "b", 2)
    order.held(b"a1")
    assert order.pick(3, {b"b1"}) is None
    assert len(order) == 4  # nothing left halfway
    assert order.pick(2, {b"b1"}) == (b"a0", b"b0")


def test_a_release_names_what_nobody_else_owns(order: ChunkOrder) -> None:
    stored(order, A, "a", 3)
    order.used(CHILD, {b"a0": 32})
    assert set(order.released([A])) == {b"a1", b"a2"}
    assert order.chunks_of(CHILD) == 1
    assert order.sessions() == (CHILD,)


def diverged(order: ChunkOrder) -> None:
    """A session that left two chunks of four behind."""
    stored(order, A, "a", 4)
    for key in (b"new2", b"new3"):
        order.add(key, 0, A)
        order.freed(key)
    order.used(A, {b"a0": 32, b"a1": 64, b"new2": 96, b"new3": 128})


def test_a_release_names_what_the_session_diverged_from(order: ChunkOrder) -> None:
    diverged(order)
    order.used(CHILD, {b"a0": 32, b"a1": 64, b"a2": 96})
    assert set(order.released([A])) == {b"a3", b"new2", b"new3"}
    assert order.sessions() == (CHILD,)
    assert order.released([A]) == ()


def test_a_session_that_has_nothing_but_what_it_diverged_from_can_be_released(order: ChunkOrder) -> None:
    stored(order, A, "a", 2)
    order.used(A, {b"never-came": 128})
    assert order.chunks_of(A) == 0
    assert order.sessions() == (A,)
    assert set(order.released([A])) == {b"a0", b"a1"}


def test_what_a_session_came_back_to_is_its_own_again(sessions: Sessions, order: ChunkOrder) -> None:
    diverged(order)
    order.used(A, {b"a0": 32, b"a1": 64, b"a2": 96, b"a3": 128})
    assert set(order.keys_of(A)) == {b"a0", b"a1", b"a2", b"a3"}
    assert set(order.released([A])) == {b"a0", b"a1", b"a2", b"a3", b"new2", b"new3"}


def test_what_left_is_not_released_again(order: ChunkOrder) -> None:
    diverged(order)
    assert set(order.pick(2, ()) or ()) == {b"a2", b"a3"}
    assert set(order.released([A])) == {b"a0", b"a1", b"new2", b"new3"}
    assert order.sessions() == ()


def test_what_a_request_waits_for_stays_until_it_waits_no_more(order: ChunkOrder) -> None:
    stored(order, A, "a", 3)
    for request in ("one", "two"):
        order.await_for(request, b"a0")
        order.await_for(request, b"a0")
    order.await_for("one", b"a1")
    assert order.pick(2, ()) is None
    assert order.pick(1, ()) == (b"a2",)
    order.waits_no_more("one")
    assert order.pick(2, ()) is None
    assert order.pick(1, ()) == (b"a1",)
    order.waits_no_more("two")
    order.waits_no_more("two")
    assert order.pick(1, ()) == (b"a0",)


def test_ten_thousand_sessions_are_ranked_once_for_many_picks(sessions: Sessions, order: ChunkOrder) -> None:
    for number in range(10_000):
        stored(order, ("t", str(number)), f"{number}-", 1)
    assert order.pick(1, ()) is not None
    asked = sessions.asked
    for _ in range(50):
        sessions.now += 0.02
        assert order.pick(1, ()) is not None
    assert sessions.asked == asked
    sessions.now += 10
    assert order.pick(1, ()) is not None
    assert sessions.asked > asked
