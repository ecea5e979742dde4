import math

import numpy as np
import pytest
from scipy.stats import binom

from load.confidence import chance_of_at_most, is_shown, least_queries, most_over, percentile, upper_estimate


def test_early_stopping_needs_as_many_queries_as_mlperf_says() -> None:
    assert [least_queries(over, 0.99) for over in range(4)] == [459, 662, 838, 1001]
    assert least_queries(0, 0.90) == 44


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("over", [0, 1, 7, 100])
def test_one_query_less_shows_nothing(over: int, share: float) -> None:
    least = least_queries(over, share)
    assert is_shown(over, least, share)
    assert not is_shown(over, least - 1, share)
    assert (most_over(least, share), most_over(least - 1, share)) == (over, over - 1)


@pytest.mark.parametrize(
    ("over", "queries", "share"), [(0, 1, 0.1), (9, 10, 0.1), (200, 1000, 0.1), (900, 100_000, 0.01), (20, 20, 0.3)]
)
def test_the_chance_is_that_of_the_binomial_distribution(over: int, queries: int, share: float) -> None:
    assert chance_of_at_most(over, queries, share) == pytest.approx(binom.cdf(over, queries, share), rel=1e-9)


def test_a_percentile_is_a_measured_value_and_not_rounded() -> None:
    values = [1849.37, *[1.25] * 98, 7.5]
    assert percentile(values, 0.99) == 7.5
    assert percentile(values, 1.0) == 1849.37
    assert percentile(np.arange(1, 101), 0.95) == 95
    assert math.isnan(percentile([], 0.5))


def test_the_estimate_is_rarely_below_the_true_percentile() -> None:
    random = np.random.default_rng(0)
    true = -math.log(0.1)  # of an exponential distribution
    estimates = [upper_estimate(random.exponential(size=500), 0.9) for _ in range(500)]
    assert np.mean(np.array(estimates) < true) <= 0.02
    assert np.median(estimates) < 1.5 * true
    assert math.isnan(upper_estimate(range(43), 0.9))
