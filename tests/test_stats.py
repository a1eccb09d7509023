"""Do 95 % intervals hold what they promise, and are they unknown where they cannot? Simulated, with fixed seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from profkit import stats
from profkit.verdicts import within

DRAWS = 400
LEAST = 0.93
"""A proportion of 95 % over so many draws falls below this once in 30 times; these seeds do not."""


def drawn(count: int, seed: int) -> np.ndarray:
    """Values of a skewed distribution whose median is 1, as times are."""
    return np.random.default_rng(seed).lognormal(0, 0.2, count)


@pytest.mark.parametrize("count", [6, 9, 15, 40])
def test_intervals_of_a_median_hold_it(count):
    found = [stats.median_interval(drawn(count, seed)) for seed in range(DRAWS)]
    assert np.mean([low <= 1 <= high for low, high in found]) >= LEAST


@pytest.mark.parametrize("count", [5, 8, 15])
def test_intervals_of_a_ratio_of_two_medians_hold_it(count):
    found = [stats.ratio_interval(drawn(count, seed), drawn(count, seed + 1000), paired=False) for seed in range(100)]
    assert np.mean([low <= 1 <= high for low, high in found]) >= LEAST


def test_what_95_percent_cannot_be_had_of_is_unknown():
    # From the least of n values to the largest, an interval misses the median with all on one side of it: 2 / 2 ** n.
    assert 1 - 2 / 2 ** (stats.FEWEST - 1) < 0.95 < 1 - 2 / 2**stats.FEWEST
    assert np.isnan(stats.median_interval(drawn(5, 0))).all()
    assert stats.median_interval(np.arange(6.0)) == (0, 5)
    assert np.isnan(stats.ratio_interval(drawn(5, 0), drawn(5, 1), paired=True)).all()
    assert np.isnan(stats.ratio_interval(drawn(4, 0), drawn(9, 1), paired=False)).all()
    assert np.isnan(stats.trend(drawn(5, 0))[1]).all() and np.isnan(stats.excess(1.0, drawn(4, 0))[1]).all()


def test_the_ends_are_order_statistics():
    # Of 15 values, those ranked 4 and 12: P(3 < Binomial(15, 1/2) < 12) = 96.5 %.
    assert binom.cdf(11, 15, 0.5) - binom.cdf(3, 15, 0.5) == pytest.approx(0.965, abs=0.001)
    assert stats.median_interval(np.arange(1.0, 16.0)) == (4, 12)


@pytest.mark.parametrize("count", [6, 10, 20])
def test_a_trend_of_nothing_and_an_excess_of_nothing_lie_in_their_intervals(count):
    noisy = [np.random.default_rng(seed).normal(100, 5, count) for seed in range(DRAWS)]
    for found in ([stats.trend(one) for one in noisy], [stats.excess(one[0], one[1:]) for one in noisy]):
        # The normal approximation of Theil-Sen, and deviations from a few values, come a little short.
        assert np.mean([low <= 0 <= high for _, (low, high) in found]) >= 0.85


def test_a_trend_and_an_excess_are_measured():
    change, (low, high) = stats.trend(np.linspace(90, 110, 11))
    assert change == pytest.approx(0.2) and low <= 0.2 <= high + 1e-9
    over, (low, high) = stats.excess(150.0, np.full(9, 100.0))
    assert over == 0.5 and 0.47 < low < over < high < 0.53


def test_far_values():
    values = np.array([100, 101, 99, 100, 120, 100, 101])
    assert np.flatnonzero(stats.far(values, 5, 0.05)).tolist() == [4]
    assert not stats.far(values, 5, 0.3).any()


@pytest.mark.parametrize(("noise", "ok"), [(0.015, True), (0.2, None)])
def test_fifteen_pairs_of_a_quiet_machine_keep_a_bound_and_those_of_a_noisy_one_leave_it_open(noise, ok):
    ratios = [1 + noise * np.random.default_rng(seed).standard_normal(15) for seed in range(100)]
    found = [
        within("", stats.median(one) - 1, tuple(edge - 1 for edge in stats.median_interval(one)), 0.03, "", "").ok
        for one in ratios
    ]
    assert found.count(ok) >= 95 and found.count(False) <= 2
