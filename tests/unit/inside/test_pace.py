"""Work that can wait: it takes its share of the time, is never left lying, and saves nothing up."""

import pytest

from appliance.engine.inside.pace import Pace

LEAST_BYTES = 100


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def pieces(pace: Pace, clock: Clock, *, size_bytes: int, takes_s: float) -> int:
    """How many pieces of work are done in a step."""
    done = 0
    while pace.goes_on(size_bytes):
        clock.now += takes_s
        done += 1
        assert done < 10_000
    return done


def test_a_step_gives_its_share_of_the_time_that_the_one_before_took(clock: Clock) -> None:
    pace = Pace(clock, share=0.02, least_bytes=1)
    clock.now += 0.05
    pace.step()
    assert pieces(pace, clock, size_bytes=1, takes_s=0.0001) == pytest.approx(10, abs=1)


def test_something_is_done_in_a_step_however_short_it_is(clock: Clock) -> None:
    pace = Pace(clock, share=0.02, least_bytes=LEAST_BYTES)
    for _ in range(3):
        pace.step()
        assert pieces(pace, clock, size_bytes=LEAST_BYTES // 4, takes_s=0.01) == 4
        pace.step()
        assert pieces(pace, clock, size_bytes=10 * LEAST_BYTES, takes_s=0.01) == 1
    assert not pace.goes_on(1)


def test_more_is_done_where_nobody_waits_for_the_step(clock: Clock) -> None:
    pace = Pace(clock, share=0.02, least_bytes=LEAST_BYTES)
    pace.step(times=64)
    assert pieces(pace, clock, size_bytes=LEAST_BYTES, takes_s=0.01) == 64


def test_an_hour_without_work_and_a_step_that_left_some_save_nothing_up(clock: Clock) -> None:
    pace = Pace(clock, share=0.02, least_bytes=1)
    clock.now += 3600.0
    pace.step()
    assert pieces(pace, clock, size_bytes=1, takes_s=0.001) <= 22
    for _ in range(10):
        clock.now += 0.05
        pace.step()
    assert pieces(pace, clock, size_bytes=1, takes_s=0.001) <= 2
