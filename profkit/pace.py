"""Time per token over the steps of a run: typical, its spread over passes, and the steps that stand out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from profkit import stages, stats, tables
from profkit.spans import Spans

FAR, FAR_AT_LEAST = 6.0, 0.1
"""A step stands out if it is further above the median than so many median deviations, and than this share of it."""
MOST = 0.5


def iterations(passes: Sequence[Spans]) -> pd.DataFrame:
    """Return a row a step: step, phase, tokens, median_ms, p10_ms, p90_ms of the iteration over passes."""
    each = [tables.step_table(spans) for spans in passes]
    steps = min((len(one) for one in each), default=0)
    if not steps:
        return pd.DataFrame(columns=["step", "phase", "tokens", "median_ms", "p10_ms", "p90_ms"])
    times = np.array([one["iteration_ms"].to_numpy()[:steps] for one in each])
    columns = {"median_ms": 50, "p10_ms": 10, "p90_ms": 90}
    table = pd.DataFrame({"step": np.arange(steps), "phase": each[0]["phase"][:steps], "tokens": each[0]["tokens"]})
    return table[:steps].assign(**{name: stats.percentiles(times, q) for name, q in columns.items()})


@dataclass(frozen=True)
class Outlier:
    """A decode step that took much longer than the others of its pass."""

    step: int
    iteration_ms: float
    typical_ms: float
    stage: str
    """The stage with most of the excess."""
    of_excess: float
    """Its share of the excess."""
    passes: int
    """In how many of the clean passes the same step stands out."""
    of_passes: int

    def sentence(self) -> str:
        """Return what is known of the cause."""
        where = f"{self.of_excess:.0%} of the excess in {self.stage}" if self.of_excess >= MOST else "in all stages"
        if self.of_passes == 1:
            often = "one pass cannot tell whether it recurs"
        elif self.passes == self.of_passes:
            often = "slow in every pass, so it belongs to the program"
        elif self.passes == 1:
            often = f"slow in this pass alone of {self.of_passes}: something else on the machine, or chance"
        else:
            often = f"slow in {self.passes} of {self.of_passes} passes"
        return f"step {self.step}: {self.iteration_ms:.2f} ms, typical {self.typical_ms:.2f}; {where}; {often}"


def outliers(spans: Spans, passes: Sequence[Spans]) -> list[Outlier]:
    """Return the decode steps of a pass that stand out, the slowest first; `passes` are all clean ones."""
    slow = [_far(one) for one in passes]
    steps = _far(spans)
    if not len(steps):
        return []
    table = tables.step_table(spans)
    decode = np.flatnonzero(table["phase"] == "decode")
    by_stage = _by_stage(spans)
    usual = stats.medians(by_stage[decode])
    typical = stats.median(table["iteration_ms"].to_numpy()[decode])
    found = []
    for step in steps.tolist():
        over = by_stage[step] - usual
        most = int(over.argmax())
        excess = float(table["iteration_ms"][step]) - typical
        found.append(
            Outlier(
                step,
                float(table["iteration_ms"][step]),
                typical,
                stages.NAMES[most],
                float(over[most]) / excess,
                sum(step in one for one in slow),
                len(passes),
            )
        )
    return sorted(found, key=lambda one: -one.iteration_ms)


def _far(spans: Spans) -> np.ndarray:
    """Return the decode steps far above the median of their pass."""
    table = tables.step_table(spans)
    rows = np.flatnonzero(table["phase"] == "decode")
    times = table["iteration_ms"].to_numpy()[rows]
    if len(times) < 3:
        return rows[:0]
    return rows[stats.far(times, FAR, FAR_AT_LEAST) & (times > stats.median(times))]


def _by_stage(spans: Spans) -> np.ndarray:
    """Return host time in ms by step and stage."""
    rows = (spans.step >= 0) & (spans.stage >= 0)
    sums = np.zeros((len(spans.steps), len(stages.NAMES)))
    np.add.at(sums, (spans.step[rows], spans.stage[rows]), spans.host_ns[rows] / tables.MS)
    return sums
