"""The statistics that profkit quotes, in one place."""

from __future__ import annotations

from collections.abc import Sequence

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
