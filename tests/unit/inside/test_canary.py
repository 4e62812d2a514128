"""When a restored prompt is computed again, and what comes of it."""

import math

import pytest

from appliance.engine.inside.canary import MOST_AGE_S, TOLERANCE, Canary, Place, Sample

PLACES = (Place(0, 2), Place(0, 4), Place(1, 4))
SAMPLE = Sample(("tenant", "ana"), (1, 2, 3, 4), tuple(zip(PLACES, (b"ab", b"cd", b"ef"), strict=True)))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def canary(clock: Clock) -> Canary:
    return Canary(clock, interval_s=60.0)


def test_one_sample_is_taken_at_a_time_and_not_too_often(canary: Canary, clock: Clock) -> None:
    assert canary.is_due()
    canary.note(SAMPLE)
    clock.now += 100
    assert not canary.is_due()  # it still waits for an idle moment
    assert canary.take() is SAMPLE
    assert canary.take() is None
    assert not canary.is_due()  # it is being computed
    canary.judge(lambda _place, _restored: 0.0)
    assert canary.is_due()
    canary.note(SAMPLE)
    canary.take()
    canary.judge(lambda _place, _restored: 0.0)
    clock.now += 59
    assert not canary.is_due()


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_sample_goes_with_its_session(canary: Canary, is_computed: bool) -> None:
    canary.note(SAMPLE)
    if is_computed:
        canary.take()
    assert not canary.released({"ben"})
    assert canary.next_expiry_in_s() == MOST_AGE_S
    assert canary.released({"ana", "ben"})
    assert canary.take() is None
    assert canary.places() == ()
    assert canary.next_expiry_in_s() is None


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_sample_that_nothing_came_of_goes_after_some_minutes(canary: Canary, clock: Clock, is_computed: bool) -> None:
    canary.note(SAMPLE)
    if is_computed:
        canary.take()
    clock.now += MOST_AGE_S - 1
    assert not canary.expire()
    assert canary.next_expiry_in_s() == 1
    clock.now += 1
    assert canary.expire()
    assert canary.take() is None
    assert canary.places() == ()
    assert not canary.expire()
    assert canary.is_due()


def test_rounding_is_no_mismatch(canary: Canary) -> None:
    canary.note(SAMPLE)
    canary.take()
    assert canary.places() == PLACES
    assert canary.judge(lambda _place, _restored: TOLERANCE)
    assert (canary.compared_total, canary.worst, canary.quarantined) == (3, TOLERANCE, False)


@pytest.mark.parametrize("error", [TOLERANCE * 1.01, math.inf, math.nan])
def test_one_block_that_differs_ends_all_restoring(canary: Canary, clock: Clock, error: float) -> None:
    canary.note(SAMPLE)
    canary.take()
    assert not canary.judge(lambda place, _restored: error if place == Place(1, 4) else 0.0)
    assert canary.quarantined
    clock.now += 1e6
    assert not canary.is_due()


def test_what_was_not_computed_is_not_judged(canary: Canary) -> None:
    canary.note(SAMPLE)
    canary.take()
    assert canary.judge(lambda _place, _restored: None)
    assert canary.compared_total == 0
