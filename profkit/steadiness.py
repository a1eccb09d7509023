"""Was the machine steady while repeats were made, so that their medians may be quoted?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from profkit import stats
from profkit.verdicts import Verdict, at_most, bounded, known, within

QUOTABLE, DRIFT, WARM, OUTLIERS, CLOCK, BACKGROUND = 0.02, 0.05, 0.10, 0.20, 0.10, 0.10
"""Half the median's interval; the trend over all repeats; the first repeat over the others; the share of outliers; the
change of the processor's frequency; what others took of the processor: each as a share, at most."""
FAR, FAR_AT_LEAST = 5.0, 0.05
"""An outlier is this many standard deviations (from the median absolute deviation) beyond the median, and this share of
it."""


def steadiness(totals_ms: Sequence[float], machine: Mapping[str, Any]) -> Iterator[Verdict]:
    """Yield what can be said of some repeats of one thing, in the order they were made.

    `machine` holds cores and what environment.machine_now() read before and after; no entry where the system does not
    tell.
    """
    values = np.asarray(totals_ms, dtype=float)
    yield _quotable(values)
    if len(values) >= stats.FEWEST:
        yield _drift(values)
        yield _warm(values)
        yield _outliers(values)
    else:
        said = f"{len(values)} repeats are too few to tell drift, warm-up and outliers: at least {stats.FEWEST}"
        yield known("steadiness: repeats", len(values), "repeats", said)
    yield from _machine(machine)


def _quotable(values: np.ndarray) -> Verdict:
    low, high = stats.median_interval(values)
    middle = stats.median(values)
    half = (high - low) / 2 / middle if middle else math.nan
    if math.isnan(half):
        return known(
            "steadiness: median", half, "", f"fewer than {stats.FEWEST} repeats leave the median's interval unknown"
        )
    needed = math.ceil(len(values) * (half / QUOTABLE) ** 2)
    more = f"about {needed} repeats would give ±{QUOTABLE:.0%}" if half > QUOTABLE else "it may be quoted"
    said = f"the median of {len(values)} repeats is known to ±{half:.1%}: {more}"
    return bounded("steadiness: median", half, QUOTABLE, "", said)


def _drift(values: np.ndarray) -> Verdict:
    change, interval = stats.trend(values)
    said = f"{change:+.1%} from the first repeat to the last (Theil-Sen{_between(interval)})"
    return within("steadiness: drift", change, interval, DRIFT, "", said)


def _warm(values: np.ndarray) -> Verdict:
    over, interval = stats.excess(values[0], values[1:])
    more = ": more --warmup" if interval[0] > WARM else ""
    said = f"the first repeat took {over:+.1%} of the median of the others{more}"
    return at_most("steadiness: warm-up", over, interval, WARM, said)


def _between(interval: tuple[float, float]) -> str:
    low, high = interval
    return f", 95 % interval {low:+.1%} to {high:+.1%}" if low == low else ""


def _outliers(values: np.ndarray) -> Verdict:
    far = stats.far(values, FAR * stats.NORMAL, FAR_AT_LEAST)
    said = f"{int(far.sum())} of {len(values)} repeats lie far from the median"
    return bounded("steadiness: outliers", float(far.mean()), OUTLIERS, "", said)


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
