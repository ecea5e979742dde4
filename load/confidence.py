"""Percentiles, and how many queries show that one holds: the early stopping of MLPerf inference.

A claim such as "99% of the queries stay within the bound" is about the service, of which a run is a sample. It counts
as shown when a service for which it is false would do as well as this run in less than 1% of all runs. See Reddi et
al., MLPerf Inference Benchmark (2020), and the inference rules of MLCommons on early stopping. This is an
implementation of the idea: the official LoadGen is not used.
"""

import math
from collections.abc import Sequence

import numpy as np

CONFIDENCE = 0.99


def percentile(values: Sequence[float] | np.ndarray, share: float) -> float:
    """The least of the values that at least `share` of them do not exceed (nearest rank); nan if there are none.

    It is one of the values as measured: neither rounded nor interpolated.
    """
    count = len(values)
    if not count:
        return math.nan
    rank = max(1, math.ceil(share * count - 1e-9))
    return float(np.partition(np.asarray(values, np.float64), rank - 1)[rank - 1])


def chance_of_at_most(over: int, queries: int, share: float) -> float:
    """P(X <= over) for X binomial: of `queries`, each one exceeds the bound with probability `share`.

    Sums downwards from the greatest term, relative to which the others shrink, so that nothing underflows.
    """
    if over >= queries:
        return 1.0
    most = min(over, math.floor((queries + 1) * share))  # the greatest term
    log_term = (
        math.lgamma(queries + 1) - math.lgamma(most + 1) - math.lgamma(queries - most + 1)
        + most * math.log(share) + (queries - most) * math.log1p(-share)
    )  # fmt: skip
    odds = share / (1 - share)
    total = term = 1.0
    for k in range(most, 0, -1):
        term *= k / ((queries - k + 1) * odds)
        total += term
        if term < 1e-17 * total:
            break
    term = 1.0
    for k in range(most, over):
        term *= (queries - k) * odds / (k + 1)
        total += term
    return min(1.0, math.exp(log_term) * total)


def is_shown(over: int, queries: int, share: float, confidence: float = CONFIDENCE) -> bool:
    """Whether a run in which `over` of `queries` exceeded the bound shows that at least `share` of all stay within it.

    For 0.99 that takes 459 queries with none over the bound, 662 with one and 838 with two.
    """
    return queries > over and chance_of_at_most(over, queries, 1 - share) <= 1 - confidence


def least_queries(over: int, share: float, confidence: float = CONFIDENCE) -> int:
    """The least number of queries with which `over` of them above the bound are still few enough."""
    low, high = over, 64 + over  # too few, and perhaps enough
    while not is_shown(over, high, share, confidence):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if is_shown(over, middle, share, confidence):
            high = middle
        else:
            low = middle
    return high


def most_over(queries: int, share: float, confidence: float = CONFIDENCE) -> int:
    """How many of these queries may exceed the bound; -1 if they are too few to show anything."""
    low, high = -1, queries
    while high - low > 1:
        middle = (low + high) // 2
        if is_shown(middle, queries, share, confidence):
            low = middle
        else:
            high = middle
    return low


def upper_estimate(values: Sequence[float] | np.ndarray, share: float, confidence: float = CONFIDENCE) -> float:
    """A bound that the percentile of the service stays within, with this confidence; nan if there are too few values.

    It is the least value that so few others exceed that the claim is shown for it.
    """
    over = most_over(len(values), share, confidence)
    return math.nan if over < 0 else float(np.sort(np.asarray(values, np.float64))[len(values) - 1 - over])
