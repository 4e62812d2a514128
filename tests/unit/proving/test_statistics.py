"""The test behind the proof of timing: its p-values, its errors of the first kind, and what it sees."""

import random

import pytest

from api.proving.statistics import MIN_SAMPLE, mann_whitney_p, shift


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [
        # By hand: U = 0 and 28 of 64, variance 64 * 17 / 12, z = 31.5 and 3.5 standard deviations of 9.522.
        (range(1, 9), range(9, 17), 0.0009391056),
        (range(0, 16, 2), range(1, 17, 2), 0.7130078),
    ],
)
def test_known_p_values(first: range, second: range, p: float) -> None:
    assert mann_whitney_p(list(first), list(second)) == pytest.approx(p, rel=1e-3)
    assert mann_whitney_p(list(second), list(first)) == pytest.approx(p, rel=1e-3)


def test_samples_that_are_all_equal_say_nothing() -> None:
    assert mann_whitney_p([1.0] * 10, [1.0] * 10) == 1.0


def test_too_small_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match=str(MIN_SAMPLE)):
        mann_whitney_p([1.0] * (MIN_SAMPLE - 1), [1.0] * 100)


def test_equal_distributions_are_told_apart_as_seldom_as_promised_and_a_shift_nearly_always() -> None:
    source = random.Random(1)  # noqa: S311 (a sample, no secret)

    def sample(plus: float = 0.0) -> list[float]:
        return [source.lognormvariate(0, 0.3) + plus for _ in range(20)]

    assert sum(mann_whitney_p(sample(), sample()) < 0.01 for _ in range(2000)) < 2000 * 0.015
    assert sum(mann_whitney_p(sample(), sample(0.8)) < 0.01 for _ in range(200)) > 195


def test_the_shift_is_by_how_much_the_second_is_larger() -> None:
    assert shift([1.0, 2.0, 3.0], [11.0, 12.0, 13.0]) == 10.0
