"""What a saved run tells of itself now: its verdicts again, from its data and the file of its trace as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from profkit import analysis, validation
from profkit.checks import kept_verdicts, verdicts
from profkit.run import Run
from profkit.verdicts import Verdict, bounded, unsettled

TRACE = "trace.json.gz"
OF_DATA = ("sums", "tokens", "dilation", "steadiness", "capture", "profile", "encoded")
"""Checks that need no model: what a run kept of them may be an older profkit's word."""


def complete(run: Run) -> list[Verdict]:
    """Return what the run's data tell now, and of what was kept in it the experiments, which need the model.

    The trace of a saved run is read and validated again, which takes as long as `profkit analyze`.
    """
    if not run.clean:
        return [*kept_verdicts(run), *_of_tables(run)]
    again = {one.check: one for one in (*_of_tables(run), *_of_trace(run))}
    found = [again.pop(one.check, one) for one in verdicts(run)]
    found += again.values()
    known_again = {one.check for one in found}
    kept = (one for one in kept_verdicts(run) if not one.check.startswith(OF_DATA))
    return [*found, *(one for one in kept if one.check not in known_again)]


def _of_tables(run: Run) -> Iterator[Verdict]:
    if run.unreadable:
        yield bounded("capture: saved tables", len(run.unreadable), 0, "tables", run.unreadable[0])


def _of_trace(run: Run) -> Iterator[Verdict]:
    if run.path is None or run.trace_json is not None or not run.of_kind("profiled"):
        return
    check, file = "profile: trace file", run.path / TRACE
    if not file.exists():
        said = f"{TRACE} is gone: what was found in it stands here as it was kept"
        yield unsettled(check, float("nan"), 0, "files", said)
        return
    try:
        found = analysis.analyze(file)
    except Exception as error:
        yield bounded(check, 1, 0, "files", f"{TRACE} cannot be read: {error}")
        return
    yield bounded(check, 0, 0, "files", f"{TRACE} could be read again")
    for one in found.checks:
        if one.ok is not None:
            said = f"of {one.total}: {one.sentence}"
            yield Verdict(f"profile: {one.name}", one.ok, one.count, 0, "events", said)
    yield from _validated(run.manifest.get("checks", {}), validation.validate(file))


def _validated(kept: dict[str, Any], said: str) -> Iterator[Verdict]:
    """Yield what torch's validator says; that it cannot read what it could once is a failure too."""
    if not said.startswith("not "):
        yield bounded("profile: torch's validator", float(said != "passed"), 0, "traces", said)
    elif "cannot read" in said and kept.get("trace") == "passed":
        yield bounded("profile: torch's validator", 1, 0, "traces", said)
