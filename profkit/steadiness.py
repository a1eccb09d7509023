"""Was the machine steady while repeats were made, so that their medians may be quoted?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from profkit import stats
from profkit.verdicts import Verdict, bounded, known

QUOTABLE, DRIFT, WARM, OUTLIERS, CLOCK, BACKGROUND = 0.02, 0.05, 0.10, 0.20, 0.10, 0.10
"""Half the median's interval; the trend over all repeats; the first repeat over the others; the share of outliers; the
change of the processor's frequency; what others took of the processor: each as a share, at most."""
FAR = 5.0
"""An outlier is this many standard deviations (from the median absolute deviation) beyond the median, and 5 % of it."""
FEWEST = 5
"""Repeats below which drift and outliers cannot be told."""


def steadiness(totals_ms: Sequence[float], machine: Mapping[str, Any]) -> Iterator[Verdict]:
    """Yield what can be said of some repeats of one thing, in the order they were made.

    `machine` holds cores and what environment.machine_now() read before and after; no entry where the system does not
    tell.
    """
    values = np.asarray(totals_ms, dtype=float)
    yield _quotable(values)
    if len(values) >= FEWEST:
        yield _drift(values)
        yield _warm(values)
        yield _outliers(values)
    else:
        said = f"{len(values)} repeats are too few to tell drift, warm-up and outliers: at least {FEWEST}"
        yield known("steadiness: repeats", len(values), "repeats", said)
    yield from _machine(machine)


def _quotable(values: np.ndarray) -> Verdict:
    low, high = stats.median_interval(values)
    middle = stats.median(values)
    half = (high - low) / 2 / middle if middle else math.nan
    if math.isnan(half):
        return known("steadiness: median", half, "", "fewer than three repeats leave the median's interval unknown")
    needed = math.ceil(len(values) * (half / QUOTABLE) ** 2)
    more = f"about {needed} repeats would give ±{QUOTABLE:.0%}" if half > QUOTABLE else "it may be quoted"
    said = f"the median of {len(values)} repeats is known to ±{half:.1%}: {more}"
    return bounded("steadiness: median", half, QUOTABLE, "", said)


def _drift(values: np.ndarray) -> Verdict:
    from scipy.stats import theilslopes

    slope, _, low, high = theilslopes(values, np.arange(len(values)))
    change = slope * (len(values) - 1) / stats.median(values)
    sure = bool(low > 0 or high < 0)
    said = f"{change:+.1%} from the first repeat to the last{'' if sure else ', within the noise'} (Theil-Sen)"
    return bounded("steadiness: drift", abs(change) if sure else 0.0, DRIFT, "", said)


def _warm(values: np.ndarray) -> Verdict:
    later = stats.median(values[1:])
    over = values[0] / later - 1
    far = _is_far(values)[0] and over > 0
    more = ": more --warmup" if far and over > WARM else ""
    said = f"the first repeat took {over:+.1%} of the median of the others{more}"
    return bounded("steadiness: warm-up", over if far else min(over, WARM), WARM, "", said)


def _outliers(values: np.ndarray) -> Verdict:
    far = _is_far(values)
    said = f"{int(far.sum())} of {len(values)} repeats lie far from the median"
    return bounded("steadiness: outliers", float(far.mean()), OUTLIERS, "", said)


def _is_far(values: np.ndarray) -> np.ndarray:
    from scipy.stats import median_abs_deviation

    middle = np.median(values)
    spread = max(float(median_abs_deviation(values, scale="normal")), 0.01 * middle)
    return np.abs(values - middle) > FAR * spread


def _machine(machine: Mapping[str, Any]) -> Iterator[Verdict]:
    before, after = machine.get("before") or {}, machine.get("after") or {}
    if "busy_s" in before and "busy_s" in after:
        spent = {name: after[name] - before[name] for name in ("wall_s", "busy_s", "own_s", "stolen_s")}
        available = max(spent["wall_s"] * machine["cores"], 1e-9)
        others = max(spent["busy_s"] - spent["own_s"], 0.0) / available
        said = f"other processes took {others:.1%} of the {machine['cores']} cores during the repeats"
        yield bounded("steadiness: background load", others, BACKGROUND, "", said)
        stolen = spent["stolen_s"] / available
        said = f"the host of this virtual machine kept {stolen:.1%} of the cores for others"
        yield bounded("steadiness: stolen time", stolen, BACKGROUND, "", said)
    else:
        yield known("steadiness: background load", math.nan, "", "what other processes did cannot be read here")
    yield _frequency("frequency", "the processor's", before.get("frequency_mhz"), after.get("frequency_mhz"))
    if "device_mhz" in before:
        yield _frequency("device's frequency", "the device's", before["device_mhz"], after.get("device_mhz"))
    yield from _heat(before, after)


def _frequency(name: str, whose: str, before_mhz: float | None, after_mhz: float | None) -> Verdict:
    if not before_mhz or not after_mhz:
        return known(f"steadiness: {name}", math.nan, "", f"{whose} frequency cannot be read here")
    said = f"{whose} frequency went from {before_mhz:.0f} to {after_mhz:.0f} MHz"
    return bounded(f"steadiness: {name}", abs(after_mhz / before_mhz - 1), CLOCK, "", said)


def _heat(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Verdict]:
    if "throttled" in before and "throttled" in after:
        count = after["throttled"] - before["throttled"]
        yield bounded("steadiness: throttling", count, 0, "times", "heat slowed a core down during the repeats")
    for name, whose in (("temperature_c", "the hottest sensor"), ("device_c", "the device")):
        if name in before and name in after:
            said = f"{whose} went from {before[name]:.0f} to {after[name]:.0f} °C"
            yield known(f"steadiness: temperature of {whose}", after[name], "°C", said)
    if not {"throttled", "temperature_c", "device_c"} & set(before):
        yield known("steadiness: heat", math.nan, "", "neither temperatures nor throttling can be read here")
