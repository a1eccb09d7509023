"""Verdicts as a part of the page: failures in the open, the rest behind a click."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from profkit import page
from profkit.page import Column
from profkit.text import figure
from profkit.verdicts import Verdict

SAID = {True: "pass", False: "fail", None: "open"}
FIGURE = "figure"
COLUMNS = (
    *(Column("result", ""), Column("check", "check"), Column("figure", "measured (at most)"), Column("sentence", "")),
)


def said(one: Verdict) -> str:
    """Return what a verdict is: open where it has a bound and no answer, a mere figure without a bound."""
    return FIGURE if one.ok is None and one.allowed != one.allowed else SAID[one.ok]


def verdicts(found: Sequence[Verdict]) -> Iterator[str]:
    """Yield the verdicts that failed, and a table of all."""
    failed = [f"failed: {one.check}: {figure(one)}: {one.sentence}" for one in found if one.ok is False]
    if failed:
        yield page.items(failed, "failure")
    counts = ", ".join(f"{sum(said(one) == name for one in found)} {name}" for name in (*SAID.values(), FIGURE))
    counts += "s" * (not counts.endswith(f" 1 {FIGURE}"))
    rows = pd.DataFrame(
        [(said(one), one.check, figure(one), one.sentence) for one in found],
        columns=[one.name for one in COLUMNS],
    )
    yield page.fold(f"Checks of this run: {counts}", [page.table(rows, COLUMNS)])
