"""The statistics that profkit quotes, in one place."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def percentile(values: Sequence[float] | np.ndarray, q: float) -> float:
    """Return the q-th percentile (0 to 100, linear interpolation), NaN of nothing."""
    return float(np.percentile(values, q)) if len(values) else float("nan")


def median(values: Sequence[float] | np.ndarray) -> float:
    """Return the median, NaN of nothing."""
    return percentile(values, 50)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios of runs that were made in pairs, NaN of nothing."""
    return median([a / b for a, b in zip(numerators, denominators, strict=True) if b])


def median_index(values: Sequence[float]) -> int:
    """Return the position of the (lower) median value: a real run that stands for all of them."""
    return int(np.argsort(np.asarray(values), kind="stable")[(len(values) - 1) // 2])


RESAMPLES, CONFIDENCE = 2000, 0.95
FEWEST, FEWEST_OF_TWO = 6, 5
"""Values below which 95 % cannot be had: of one median, whose interval from least to largest value then holds it more
rarely; of the ratio of two, by simulation (see the tests)."""
UNKNOWN = (float("nan"), float("nan"))


def medians(rows: np.ndarray) -> np.ndarray:
    """Return the median of each column."""
    return np.median(rows, axis=0)


def percentiles(rows: np.ndarray, q: float) -> np.ndarray:
    """Return the q-th percentile of each column."""
    return np.percentile(rows, q, axis=0)


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Return the median absolute deviation from the median, unscaled."""
    from scipy.stats import median_abs_deviation

    return float(median_abs_deviation(values))


NORMAL = 1.4826
"""Standard deviations to a median absolute deviation, of a normal distribution."""


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return an interval that holds the median in 95 % of cases or more, whatever the distribution.

    Its ends are two of the values (order statistics, by the binomial distribution); NaN of fewer than FEWEST.
    """
    from scipy.stats import quantile_test

    if len(values) < FEWEST or not np.isfinite(values).all():
        return UNKNOWN
    found = quantile_test(values, q=median(values), p=0.5).confidence_interval(CONFIDENCE)
    return float(found.low), float(found.high)


def trend(values: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return by which share of the median values change from the first to the last, and its 95 % interval (Theil-Sen).

    A trend cannot be told from fewer than FEWEST values: its interval is then unknown.
    """
    from scipy.stats import theilslopes

    if not median(values):
        return float("nan"), UNKNOWN
    slope, _, low, high = (one * (len(values) - 1) / median(values) for one in theilslopes(values))
    return slope, (low, high) if len(values) >= FEWEST else UNKNOWN


def excess(first: float, others: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Return by which share a value exceeds the median of others, and between what that lies with 95 % confidence.

    A prediction interval of Student's, with the deviation from the median absolute one, so that single others far off
    do not count; at least 1 %, as few values may agree by chance.
    """
    from scipy.stats import t

    middle, count = median(others), len(others)
    if not middle:
        return float("nan"), UNKNOWN
    over = first / middle - 1
    if count + 1 < FEWEST:
        return over, UNKNOWN
    spread = max(NORMAL * deviation(others) / middle, 0.01)
    # The median of n normal values has the variance of one, times pi / 2 n.
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * spread * float(np.sqrt(1 + np.pi / 2 / count))
    return over, (over - half, over + half)


def far(values: np.ndarray, deviations: float, least: float) -> np.ndarray:
    """Return which values lie further from the median than so many median absolute deviations and a share of it."""
    middle = median(values)
    return np.abs(values - middle) > max(deviations * deviation(values), least * middle)


def median_ratio(base: np.ndarray, other: np.ndarray, paired: bool) -> float:
    """Return other over base: the median of the pairs' ratios, or the ratio of the medians."""
    if not len(base) or not len(other):
        return float("nan")
    return median(other / base) if paired else median(other) / median(base)


def ratio_interval(base: np.ndarray, other: np.ndarray, paired: bool) -> tuple[float, float]:
    """Return the 95 % interval of median_ratio(): that of the pairs' median, or a bootstrap one of the two medians.

    NaN of fewer than FEWEST pairs, or FEWEST_OF_TWO values on either side.
    """
    if paired:
        return median_interval(other / base) if len(base) else UNKNOWN
    return _interval((base, other), lambda a, b, axis: np.median(b, axis=axis) / np.median(a, axis=axis))


def differ(base: np.ndarray, other: np.ndarray, paired: bool, tests: int = 1) -> bool:
    """Tell whether two samples differ, at 5 % for all of so many tests together (Bonferroni).

    Pairs: Wilcoxon's signed-rank test of the logarithms of their ratios; else the test of Mann and Whitney.
    """
    from scipy.stats import mannwhitneyu, wilcoxon

    if min(len(base), len(other)) < 3 or (paired and np.array_equal(base, other)):
        return False
    found = wilcoxon(np.log(other / base)) if paired else mannwhitneyu(base, other)
    return bool(found.pvalue < (1 - CONFIDENCE) / tests)


def can_differ(base: int, other: int, paired: bool, tests: int = 1) -> bool:
    """Tell whether samples of such sizes could differ() at all: whether the smallest p there is is small enough."""
    if min(base, other) < 3:
        return False
    smallest = 2 / (2 ** min(base, other) if paired else math.comb(base + other, base))
    return smallest < (1 - CONFIDENCE) / tests


def _interval(samples: tuple[np.ndarray, ...], statistic: Callable[..., Any]) -> tuple[float, float]:
    """Return a percentile bootstrap interval (scipy.stats.bootstrap), with a seed of its own so that it can be
    repeated."""
    if min(map(len, samples)) < FEWEST_OF_TWO:
        return UNKNOWN
    from scipy.stats import bootstrap

    found = bootstrap(
        samples,
        statistic,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        paired=False,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
