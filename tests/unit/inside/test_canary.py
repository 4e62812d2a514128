"""When a restored prompt is computed again, and what comes of it."""

import math

import pytest

from appliance.engine.inside.canary import TOLERANCE, Canary, Sample

SAMPLE = Sample((1, 2, 3, 4), ((2, b"ab"), (4, b"cd")))


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
    clock.now += 1000
    assert not canary.is_due()  # it still waits for an idle moment
    assert canary.take() is SAMPLE
    assert canary.take() is None
    assert canary.is_due()
    canary.note(SAMPLE)
    canary.take()
    clock.now += 59
    assert not canary.is_due()


def test_rounding_is_no_mismatch(canary: Canary) -> None:
    canary.note(SAMPLE)
    canary.take()
    assert canary.ends() == (2, 4)
    assert canary.judge(lambda _end, _restored: TOLERANCE)
    assert (canary.compared_total, canary.worst, canary.quarantined) == (2, TOLERANCE, False)


@pytest.mark.parametrize("error", [TOLERANCE * 1.01, math.inf, math.nan])
def test_one_block_that_differs_ends_all_restoring(canary: Canary, clock: Clock, error: float) -> None:
    canary.note(SAMPLE)
    canary.take()
    assert not canary.judge(lambda end, _restored: error if end == 4 else 0.0)
    assert canary.quarantined
    clock.now += 1e6
    assert not canary.is_due()


def test_what_was_not_computed_is_not_judged(canary: Canary) -> None:
    canary.note(SAMPLE)
    canary.take()
    assert canary.judge(lambda _end, _restored: None)
    assert canary.compared_total == 0
