"""What a run says, in sentences: where the time goes, and what is worth optimising."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from profkit import stages
from profkit.run import Run

OWN_WORK = ("setup", "select", "other")
NOTABLE = 0.1
"""Shares below this are not worth a sentence of their own."""


def answer(run: Run) -> str:
    """Return where the time goes, in a sentence or two."""
    table, latency = run.stages(), run.latency()
    total_ms = float(table["host_ms"].sum())
    whole = "generate()" if not {"load", "preprocess"} & set(table.index) else "A sample, from its files to its tokens,"
    groups = [
        (group, rows)
        for group in stages.GROUPS
        if len(rows := table[[stages.BY_NAME[str(name)].group is group for name in table.index]])
    ]
    groups.sort(key=lambda one: -float(one[1]["share"].sum()))
    said = "; ".join(f"{_share(rows)} in {_title(group)}{_largest(rows)}" for group, rows in groups)
    sizes = f"{latency.prompt_tokens} prompt tokens, {latency.new_tokens} new"
    return f"{whole} takes {total_ms:.1f} ms ({sizes}): {said}."


def _title(group: stages.Group) -> str:
    return f"stage {group.number}, {group.title if group is stages.LLM else group.title.lower()}"


def _share(rows: pd.DataFrame) -> str:
    return f"{float(rows['share'].sum()):.1%}"


def _largest(rows: pd.DataFrame) -> str:
    """Return the largest sub-stage, where there are several."""
    if len(rows) == 1:
        return ""
    name = rows["share"].idxmax()
    return f" (most of it {name}: {rows['share'].max():.1%})"


def worth_optimising(run: Run) -> Iterator[str]:
    """Yield what a reader would look at first, each with its figures."""
    table = run.stages()
    name = str(table["share"].idxmax())
    row, steps = table.loc[name], run.steps()
    many = int((steps["phase"] == name).sum())
    each = f", {many} steps of {row['host_ms'] / many:.2f} ms" if many > 1 else ""
    yield f"The largest stage is {name} ({stages.BY_NAME[name].meaning}): {row['share']:.1%} of the time{each}."
    yield from _pace(run, name)
    own = float(table[table.index.isin(OWN_WORK)]["share"].sum())
    if own >= NOTABLE:
        yield (
            f"generate()'s own work around the model (setup, selecting tokens, the rest) takes {own:.1%}: "
            "compiling or a simpler generation configuration would change it, a faster model would not."
        )
    yield from _operators(run, name)
    for one in (run.manifest.get("checks", {}).get("encoded") or {}).get("repeats", []):
        yield f"Encoded twice: {one['sentence']}"


def _pace(run: Run, name: str) -> Iterator[str]:
    """Yield who sets the pace of a stage on each device."""
    if run.device is None:
        device = run.manifest.get("device") or "a device that the run does not name"
        yield f"Ran on {device}: without the events of a device there is no host-bound or device-bound."
        return
    several = run.device["device"].nunique() > 1
    for row in run.device[run.device["stage"] == name].to_dict(orient="records"):
        where = f" on device {row['device']}" if several else ""
        launches = f"{row['launches_per_step']:.0f} launches a step"
        yield f"{name} is {row['verdict']}{where}: {row['evidence']}; {launches}."


def _operators(run: Run, name: str) -> Iterator[str]:
    """Yield the operator with most of a stage's own time, from the profiled pass."""
    if run.operators is None:
        return
    mine = run.operators[run.operators["stage"] == name]
    by_name = mine.groupby("name")["self_ms"].sum().sort_values(ascending=False)
    if len(by_name) and by_name.sum() > 0 and by_name.iloc[0] / by_name.sum() >= NOTABLE:
        share = by_name.iloc[0] / by_name.sum()
        yield f"Under the profiler, {by_name.index[0]} has {share:.0%} of the operators' own host time in {name}."
