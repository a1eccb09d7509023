"""What a profiled pass explains: whose kernels and operators there were, what set the pace, and what to doubt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from profkit.attribution import Owners, is_range, missing_ranges, owners_in
from profkit.device_tables import OPERATOR_KINDS, kernel_table, operator_table, stage_table, step_table
from profkit.events import DEVICE, Events
from profkit.joint import trees
from profkit.nesting import nest
from profkit.occupancy import occupancy
from profkit.spans import Spans
from profkit.timeline import timeline
from profkit.trust import Check, of_events


@dataclass(frozen=True)
class Explanation:
    """Tables of a profiled pass (see device_tables) and the doubts about it.

    Every row of a table tells in `steps` how many recorded steps its stage occurs in: the profile holds windows of a
    generation, so its sums are per window, never of the whole. `kernels` and `device` are None without a device.
    `timeline` holds a prefill and a decode step slice by slice (see timeline.timeline), `trees` the recorded steps from
    stages down to operators and kernels (see joint.trees), `owners` who owns each event;
    `busy_share` is, under the name of a counter, each step's busy time over its time on the host, the mean
    over devices; empty without one.
    """

    operators: pd.DataFrame
    kernels: pd.DataFrame | None
    device: pd.DataFrame | None
    timeline: pd.DataFrame
    owners: Owners
    busy_share: dict[str, dict[int, float]]
    checks: list[Check]
    trees: pd.DataFrame


def explain(spans: Spans, events: Events, within: np.ndarray) -> Explanation:
    """Return what a profile explains, its spans being on the profiler's clock.

    `within` tells which segments were recorded. Ranges that profkit opened are scopes, no operators.
    """
    owners = owners_in(spans, events)
    counted = ~is_range(events)
    forest = nest(events, events.is_kind(*OPERATOR_KINDS) & counted)
    occupied = occupancy(events, owners.launch, owners.begun_ns())
    recorded = _steps_by_stage(owners, counted)
    operators = _with_steps(operator_table(events, owners, forest, counted), recorded)
    missing, expected = missing_ranges(spans, events, within)
    said = "ranges of profkit's inside the recorded steps are not in the profile"
    checks = [
        Check("ranges", missing == 0 if expected else None, missing, expected, said),
        *of_events(events, owners, occupied, forest),
    ]
    slices = timeline(spans, within, events, owners, forest)
    joint_trees = trees(spans, within, events, owners, forest)
    if not events.is_kind(*DEVICE).any():
        return Explanation(operators, None, None, slices, owners, {}, checks, joint_trees)
    kernels = _with_steps(kernel_table(events, owners, forest), recorded)
    device = stage_table(events, owners, occupied)
    device["steps"] = device["stage"].map(recorded).fillna(device["steps"]).clip(lower=1).astype(int)
    device["launches_per_step"] = device["launches"] / device["steps"]
    each = step_table(events, owners, occupied)
    share = dict(
        zip(each["step"].tolist(), (each["busy_ms"] / each["host_ms"] / len(events.devices)).tolist(), strict=True)
    )
    busy_share = {"device busy (share)": share}
    return Explanation(operators, kernels, device, slices, owners, busy_share, checks, joint_trees)


def _with_steps(table: pd.DataFrame, recorded: dict[str, int]) -> pd.DataFrame:
    return table.assign(steps=table["stage"].map(recorded).fillna(1).astype(int))


def _steps_by_stage(owners: Owners, counted: np.ndarray) -> dict[str, int]:
    """Return for each stage in how many recorded steps something of it happened, at least one."""
    steps = len(owners.scopes.step_labels) + 1
    rows = counted & (owners.stage >= 0)
    happened = np.zeros((len(owners.scopes.stages), steps), dtype=bool)
    happened[owners.stage[rows], owners.step[rows]] = True  # the last column is that of no step
    number = happened[:, :-1].sum(axis=1)
    return {
        owners.scopes.stages[one]: max(int(number[one]), 1) for one in np.flatnonzero(happened.any(axis=1)).tolist()
    }
