"""Whether two samples of times come from one distribution. Pure.

Sources: H. B. Mann, D. R. Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger than the
Other", Annals of Mathematical Statistics 18 (1947); the normal approximation with the correction for ties, and the
shift, as M. Hollander, D. A. Wolfe, E. Chicken, "Nonparametric Statistical Methods", 3rd ed. (2014), 4.1 and 4.2, have
them.
"""

import math
import statistics
from collections.abc import Sequence
from itertools import groupby

MIN_SAMPLE = 8
"""The smaller sample's least size for which the normal approximation is used."""


def mann_whitney_p(first: Sequence[float], second: Sequence[float]) -> float:
    """The two-sided p-value of "neither tends to be larger": small where one does.

    Raises:
        ValueError: a sample is smaller than `MIN_SAMPLE`.
    """
    m, n = len(first), len(second)
    if min(m, n) < MIN_SAMPLE:
        raise ValueError(f"each sample needs {MIN_SAMPLE} values")
    tagged = sorted([(value, 0) for value in first] + [(value, 1) for value in second])
    rank_sum, seen, ties = 0.0, 0, 0.0
    for _, group in groupby(tagged, key=lambda pair: pair[0]):
        equal = list(group)
        mean_rank = seen + (len(equal) + 1) / 2
        rank_sum += mean_rank * sum(1 for _, of in equal if of == 0)
        ties += len(equal) ** 3 - len(equal)
        seen += len(equal)
    total = m + n
    u = rank_sum - m * (m + 1) / 2
    variance = m * n / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance <= 0:
        return 1.0
    z = max(abs(u - m * n / 2) - 0.5, 0.0) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def shift(first: Sequence[float], second: Sequence[float]) -> float:
    """By how much `second` is larger: the median of all differences (Hodges and Lehmann's estimator)."""
    return statistics.median(later - earlier for earlier in first for later in second)
