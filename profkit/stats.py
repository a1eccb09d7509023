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


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median; NaN of fewer than three values."""
    return _interval((values,), lambda a, axis: np.median(a, axis=axis))


def median_ratio(base: np.ndarray, other: np.ndarray, paired: bool) -> float:
    """Return other over base: the median of the pairs' ratios, or the ratio of the medians."""
    if not len(base) or not len(other):
        return float("nan")
    return median(other / base) if paired else median(other) / median(base)


def ratio_interval(base: np.ndarray, other: np.ndarray, paired: bool) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of median_ratio(); NaN of fewer than three values on either side."""
    if paired:
        return median_interval(other / base) if len(base) else (float("nan"), float("nan"))
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
    if min(map(len, samples)) < 3:
        return float("nan"), float("nan")
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
