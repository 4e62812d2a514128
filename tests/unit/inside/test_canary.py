"""When a restored prompt is computed again, and what comes of it."""

import math

import pytest

from appliance.engine.inside.canary import (
    BESIDE_AFTER_S,
    MOST_AGE_S,
    MOST_TOKENS_BESIDE,
    TOLERANCE,
    Canary,
    Place,
    Sample,
)

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
    assert canary.take(idle=True) is SAMPLE
    assert canary.take(idle=True) is None
    assert not canary.is_due()  # it is being computed
    canary.judge(lambda _place, _restored: 0.0)
    assert canary.is_due()
    canary.note(SAMPLE)
    canary.take(idle=True)
    canary.judge(lambda _place, _restored: 0.0)
    clock.now += 59
    assert not canary.is_due()


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_sample_goes_with_its_session(canary: Canary, is_computed: bool) -> None:
    canary.note(SAMPLE)
    if is_computed:
        canary.take(idle=True)
    assert not canary.released({"ben"})
    assert canary.next_expiry_in_s() == MOST_AGE_S
    assert canary.released({"ana", "ben"})
    assert canary.take(idle=True) is None
    assert canary.places() == ()
    assert canary.next_expiry_in_s() is None


@pytest.mark.parametrize("is_computed", [False, True])
def test_a_sample_that_nothing_came_of_goes_after_some_minutes(canary: Canary, clock: Clock, is_computed: bool) -> None:
    canary.note(SAMPLE)
    if is_computed:
        canary.take(idle=True)
    clock.now += MOST_AGE_S - 1
    assert not canary.expire()
    assert canary.next_expiry_in_s() == 1
    clock.now += 1
    assert canary.expire()
    assert canary.take(idle=True) is None
    assert canary.places() == ()
    assert not canary.expire()
    assert canary.is_due()


def test_rounding_is_no_mismatch(canary: Canary) -> None:
    canary.note(SAMPLE)
    canary.take(idle=True)
    assert canary.places() == PLACES
    assert canary.judge(lambda _place, _restored: TOLERANCE)
    assert (canary.compared_total, canary.worst, canary.quarantined) == (3, TOLERANCE, False)


@pytest.mark.parametrize("error", [TOLERANCE * 1.01, math.inf, math.nan])
def test_one_block_that_differs_ends_all_restoring(canary: Canary, clock: Clock, error: float) -> None:
    canary.note(SAMPLE)
    canary.take(idle=True)
    assert not canary.judge(lambda place, _restored: error if place == Place(1, 4) else 0.0)
    assert canary.quarantined
    clock.now += 1e6
    assert not canary.is_due()


def test_what_was_not_computed_is_not_judged(canary: Canary) -> None:
    canary.note(SAMPLE)
    canary.take(idle=True)
    assert canary.judge(lambda _place, _restored: None)
    assert canary.compared_total == 0
    assert canary.dropped_total == 1
    assert canary.compared_age_s() is None


def test_where_somebody_always_wants_something_a_short_sample_is_computed_beside_it(
    canary: Canary, clock: Clock
) -> None:
    ends = range(32, 513, 32)
    sample = Sample(("tenant", "ana"), tuple(range(512)), tuple((Place(0, end), b"") for end in ends))
    canary.note(sample)
    assert canary.take(idle=False) is None
    clock.now += MOST_AGE_S
    assert canary.expire()
    clock.now += BESIDE_AFTER_S - MOST_AGE_S
    canary.note(sample)
    taken = canary.take(idle=False)
    assert taken is not None
    assert taken.tokens == tuple(range(MOST_TOKENS_BESIDE))
    assert canary.places() == tuple(Place(0, end) for end in (32, 64, 96, 128))
    canary.judge(lambda _place, _restored: 0.0)
    clock.now += 60.0
    assert (canary.compared_age_s(), canary.dropped_total) == (60.0, 1)
    canary.note(sample)
    assert canary.take(idle=False) is None
    assert canary.take(idle=True) is sample


def test_of_a_sample_of_large_blocks_the_first_is_computed_beside_others(canary: Canary, clock: Clock) -> None:
    clock.now += BESIDE_AFTER_S
    canary.note(Sample(("tenant", "ana"), tuple(range(512)), ((Place(0, 256), b""), (Place(0, 512), b""))))
    taken = canary.take(idle=False)
    assert taken is not None
    assert len(taken.tokens) == 256
    assert canary.places() == (Place(0, 256),)
