"""What of a run goes into its roofline: the counted work, ceilings, and the times that can be read."""

from __future__ import annotations

from typing import Any

from profkit import roofline
from profkit.ceilings import Ceilings
from profkit.errors import InputError
from profkit.work import Work

Counted = Any
"""A run.Run, which stands above this and asks it."""


def counted(run: Counted) -> Work:
    """Return the work of a run. Raises InputError if it was not counted, or cannot be read."""
    if run.work is not None:
        return run.work
    if damage := run.damage_of("work.parquet"):
        raise InputError(f"The work of this run was counted and is lost: {damage}.")
    raise InputError("The work of this run was not counted: trace it again, without --no-work.")


def roofline_of(run: Counted, known: Ceilings | None) -> roofline.Roofline:
    """Return a run's roofline, with `known` ceilings or its own; without the marks of its passes, no times of stages.

    Raises InputError for a run whose work was not counted, or without ceilings.
    """
    work, limits = counted(run), known or run.ceilings
    if limits is None:
        raise InputError("The ceilings of this run's device are not known: measure them there, by profkit roofline.")
    call, dtype = (run.manifest.get("calls") or [{}])[0], str(run.manifest.get("dtype"))
    counts: dict[str, Any] = {"batch": call.get("batch") or 1, "media_tokens": run.manifest.get("media_tokens")}
    passed: dict[str, Any] = {"operators": run.operators, "latency": run.kept.latency if run.kept else None}
    if run.clean:
        passed |= {"spans": run.representative, "latency": run.latency()}
    return roofline.answers(work, limits, dtype, **passed, **counts)
