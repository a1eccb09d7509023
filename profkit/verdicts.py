"""A verdict: a figure that was measured, the bound it must keep, and what that means."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The answer of one check. `ok` is None where the figure cannot tell, or is only to be known.

    `measured` and `allowed` are in `unit`; `allowed` is NaN where there is no bound.
    """

    check: str
    ok: bool | None
    measured: float
    allowed: float
    unit: str
    sentence: str


def bounded(check: str, measured: float, allowed: float, unit: str, sentence: str) -> Verdict:
    """Return the verdict on a figure that must not exceed a bound; unknown if it is NaN."""
    ok = None if measured != measured else bool(measured <= allowed)
    return Verdict(check, ok, float(measured), float(allowed), unit, sentence)


def at_most(check: str, over: float, interval: tuple[float, float], allowed: float, sentence: str) -> Verdict:
    """Return the verdict on a share that must not exceed a bound, given its interval: open where that holds both."""
    low, high = interval
    if low != low:
        return Verdict(check, None, over, allowed, "", f"{sentence}; too few repeats to tell")
    said = f"{sentence}; 95 % interval {low:+.1%} to {high:+.1%}"
    if low > allowed:
        return Verdict(check, False, over, allowed, "", said)
    noisy = "" if high <= allowed else ": too noisy to tell"
    return Verdict(check, None if noisy else True, over, allowed, "", said + noisy)


def between(interval: tuple[float, float], form: str = "+.1%", unit: str = "") -> str:
    """Return a 95 % interval in words, or that there are too few values for one."""
    low, high = interval
    if low != low:
        return "too few for an interval"
    return f"95 % interval {low:{form}} to {high:{form}}{unit}"


def within(check: str, off: float, interval: tuple[float, float], allowed: float, unit: str, sentence: str) -> Verdict:
    """Return the verdict on a deviation that must stay within ± a bound, given its interval.

    It passes if the whole interval lies within the bound, and fails if all of it lies outside; else it is open.
    """
    low, high = interval
    ok: bool | None = None
    if -allowed <= low and high <= allowed:
        ok = True
    elif low > allowed or high < -allowed:
        ok = False
    unknown = "too few repeats to tell" if low != low else "too noisy to tell"
    return Verdict(check, ok, abs(float(off)), float(allowed), unit, sentence + f": {unknown}" * (ok is None))


def unsettled(check: str, measured: float, allowed: float, unit: str, sentence: str) -> Verdict:
    """Return the verdict on what has a bound, and cannot be told here: it is open, and shown as such."""
    return Verdict(check, None, float(measured), float(allowed), unit, sentence)


def known(check: str, measured: float, unit: str, sentence: str) -> Verdict:
    """Return a figure to be known that has no bound."""
    return Verdict(check, None, float(measured), float("nan"), unit, sentence)
