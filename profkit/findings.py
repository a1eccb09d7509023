"""What a run says, in sentences: where the time goes, and what is worth optimising."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from profkit import stages
from profkit.run import Run
from profkit.sample_runs import SampleRun

OWN_WORK = ("setup", "select", "other")
NOTABLE = 0.1
"""Shares below this are not worth a sentence of their own."""
UNEVEN = 2.0
"""A stage whose p90 over samples is further above its median than this deserves one."""


def answer(run: Run) -> str:
    """Return where the time goes, in a sentence or two."""
    table, latency = run.stages(), run.latency()
    total_ms = float(table["host_ms"].sum())
    sizes = f"{latency.prompt_tokens} prompt tokens, {latency.new_tokens} new"
    return f"{_whole(table)} takes {total_ms:.1f} ms ({sizes}): {_by_group(table)}."


def answer_of_samples(run: SampleRun) -> str:
    """Return where the time of a run over samples goes, and how many there were."""
    counts = f"{len(run.good)} samples measured, {len(run.bad)} in error."
    if not len(run.good):
        return counts
    table = run.breakdown()
    known = {name: value for name, value in run.latency().items() if name in ("prompt_tokens", "new_tokens")}
    each = ", ".join(f"{value:g} {name.replace('_', ' ')}" for name, value in known.items())
    sizes = f" (medians: {each})" if each else ""
    return f"{_whole(table)} takes {table['mean_ms'].sum():.1f} ms in the mean{sizes}: {_by_group(table)}. {counts}"


def _whole(table: pd.DataFrame) -> str:
    inside = not {"load", "preprocess"} & set(table.index)
    return "generate()" if inside else "A sample, from its files to its tokens,"


def _by_group(table: pd.DataFrame) -> str:
    """Return the shares of the classic stages in words, the largest first."""
    groups = [
        (group, rows)
        for group in stages.GROUPS
        if len(rows := table[[stages.BY_NAME[str(name)].group is group for name in table.index]])
    ]
    groups.sort(key=lambda one: -float(one[1]["share"].sum()))
    return "; ".join(f"{_share(rows)} in {_title(group)}{_largest(rows)}" for group, rows in groups)


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
    yield from _own_work(table)
    yield from _operators(run, name)
    for one in (run.manifest.get("checks", {}).get("encoded") or {}).get("repeats", []):
        yield f"Encoded twice: {one['sentence']}"


def worth_optimising_of_samples(run: SampleRun) -> Iterator[str]:
    """Yield what the rows of many samples tell of it."""
    table = run.breakdown()
    name = str(table["share"].idxmax())
    row = table.loc[name]
    spread = f"median {row['median_ms']:.2f} ms, p10 {row['p10_ms']:.2f}, p90 {row['p90_ms']:.2f} over samples"
    yield f"The largest stage is {name} ({stages.BY_NAME[name].meaning}): {row['share']:.1%} of the time; {spread}."
    wide = table[(table["share"] >= NOTABLE) & (table["p90_ms"] > UNEVEN * table["median_ms"])]
    for stage, values in wide.iterrows():
        yield (
            f"{stage} is uneven: its p90 is {values['p90_ms'] / values['median_ms']:.1f} times its median. Its slowest "
            "samples are worth a run of their own."
        )
    yield from _own_work(table)
    again = run.good[run.good["encoded_again_ms"] > 0]["encoded_again_ms"]
    if len(again):
        yield f"Encoded twice: in {len(again)} samples, at a median of {again.median():.2f} ms."
    yield "Whether the host or the device sets the pace is not known here: samples are not profiled."


def _own_work(table: pd.DataFrame) -> Iterator[str]:
    own = float(table[table.index.isin(OWN_WORK)]["share"].sum())
    if own >= NOTABLE:
        yield (
            f"generate()'s own work around the model (setup, selecting tokens, the rest) takes {own:.1%}: "
            "compiling or a simpler generation configuration would change it, a faster model would not."
        )


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
