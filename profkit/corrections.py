"""Stages less what their marks cost: a correction, and always marked as one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from profkit import stages
from profkit.spans import Spans
from profkit.tables import MS, stage_ns


@dataclass(frozen=True)
class MarkCost:
    """What the two marks of a call cost, in ns: between them, and outside of them (before the one, after the other)."""

    inside_ns: float
    outside_ns: float


def cost_ns(spans: Spans, cost: MarkCost) -> np.ndarray:
    """Return for each segment what marks took of it.

    From an entry to its exit it is what a call costs inside; from an exit to the next entry, outside; between two
    entries or two exits one half of each, so that a call's two marks cost the whole wherever they stand.
    """
    entered = spans.marks.code > 0
    before, after = entered[:-1], entered[1:]
    either = (cost.inside_ns + cost.outside_ns) / 2
    return np.where(before & ~after, cost.inside_ns, np.where(~before & after, cost.outside_ns, either))


def corrected_table(spans: Spans, cost: MarkCost) -> pd.DataFrame:
    """Return a row a stage that occurs: host_ms, marks_ms (what marks cost there, as calibrated) and corrected_ms."""
    counted = spans.stage >= 0
    marks_ns = np.bincount(spans.stage[counted], cost_ns(spans, cost)[counted], minlength=len(stages.STAGES))
    host_ns = stage_ns(spans)
    table = pd.DataFrame(
        {"host_ms": host_ns / MS, "marks_ms": marks_ns / MS, "corrected_ms": np.maximum(host_ns - marks_ns, 0) / MS},
        index=pd.Index(stages.NAMES, name="stage"),
    )
    return table[host_ns > 0]
