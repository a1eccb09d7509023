"""Is it said whether a machine was steady, and is what noise hides left open?"""

from __future__ import annotations

import numpy as np
import pytest

from profkit import environment
from profkit.steadiness import steadiness
from profkit.verdicts import Verdict


def by_name(verdicts) -> dict[str, Verdict]:
    return {one.check: one for one in verdicts}


def noise(count: int, spread: float = 0.005) -> np.ndarray:
    return 100 * (1 + spread * np.random.default_rng(0).standard_normal(count))


def test_steady_repeats_may_be_quoted():
    quiet = {"busy_s": 0.0, "own_s": 0.0, "stolen_s": 0.0, "frequency_mhz": 3000.0, "throttled": 7}
    quiet |= {"device_mhz": 1980.0}
    after = {"wall_s": 10.0, "busy_s": 10.2, "own_s": 10.0, "stolen_s": 0.1, "frequency_mhz": 2990.0}
    after |= {"throttled": 7, "device_mhz": 1965.0}
    machine = {"cores": 2, "before": {"wall_s": 0.0, **quiet}, "after": after}
    found = by_name(steadiness(noise(20), machine))
    assert [one.check for one in found.values() if one.ok is not True] == []
    machine["after"] |= {"busy_s": 15.0, "stolen_s": 4.0, "frequency_mhz": 2000.0, "throttled": 9, "device_mhz": 1200.0}
    found = by_name(steadiness(noise(20), machine))
    for name in ("background load", "stolen time", "frequency", "device's frequency", "throttling"):
        assert found[f"steadiness: {name}"].ok is False


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (noise(20) * np.linspace(1, 1.2, 20), "drift"),
        (np.append(150, noise(19)), "warm-up"),
        (noise(20) * np.where(np.arange(20) % 3, 1, 2), "outliers"),
        (noise(6, 0.2), "median"),
    ],
)
def test_what_is_not_steady_is_said(values, name):
    found = by_name(steadiness(values, {}))
    assert found[f"steadiness: {name}"].ok is False
    if name == "median":
        assert "repeats would give ±2%" in found["steadiness: median"].sentence


@pytest.mark.parametrize("values", [[200, 100, 150, 90, 140, 80, 120], [200, 200, 200, 200, 100, 100, 100, 100]])
def test_what_noise_hides_is_open_and_its_figure_is_what_was_measured(values):
    found = by_name(steadiness(values, {}))
    drift, warm = found["steadiness: drift"], found["steadiness: warm-up"]
    assert drift.ok is None and "too noisy to tell" in drift.sentence and drift.measured > 0.3
    assert warm.ok is not True and warm.measured == pytest.approx(values[0] / np.median(values[1:]) - 1)


def test_temperatures_are_told_and_what_cannot_be_read_is_said():
    found = by_name(steadiness(noise(5), {"before": {"temperature_c": 50.0}, "after": {"temperature_c": 71.0}}))
    assert found["steadiness: temperature of the hottest sensor"].measured == 71
    for name in ("frequency", "heat", "background load"):
        one = by_name(steadiness(noise(5), {}))[f"steadiness: {name}"]
        assert one.ok is None and "be read here" in one.sentence


def test_few_repeats_leave_it_open():
    found = by_name(steadiness([1.0, 1.1], {}))
    assert {one.ok for one in found.values()} == {None}
    assert "cannot be read" in found["steadiness: background load"].sentence


def test_passes_that_take_no_time_are_no_crash():
    """A clock too coarse for what it times reads 0."""
    assert all(one.ok is not True for one in steadiness([0.0] * 8, {}) if one.check in ("steadiness: drift", "warm-up"))


def test_a_clocks_steps_are_seen_whatever_it_claims():
    readings = iter(range(10_000))
    assert environment.clock_step_ns(lambda: next(readings) // 7 * 1_000_000) == 1_000_000
    assert 0 < environment.clock_step_ns() < 1_000_000
