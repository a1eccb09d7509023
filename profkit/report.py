"""Saved runs as one self-contained HTML page that people read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from profkit import comparison, figures, findings, hierarchy, pace, page, roofline_page, stages
from profkit.checks import kept_verdicts
from profkit.errors import InputError
from profkit.page import Column
from profkit.run import Run
from profkit.sample_runs import SampleRun, Saved
from profkit.text import figure as figure_of
from profkit.text import notes

MOST_ROWS = 200
MILLISECONDS = (("host_ms", "host ms"), ("device_ms", "device ms"), ("busy_ms", "busy ms"))


def write_report(saved: Sequence[Saved] | Saved, path: str | os.PathLike[str], force: bool = False) -> Path:
    """Write the page of one run, or of several side by side, and return its path.

    Raises InputError if the file exists and `force` is not given, or if it cannot be written.
    """
    target = Path(path)
    if target.exists() and not force:
        raise InputError(f"{target} already exists: choose another --out, or --force to replace it.")
    text = html_of([saved] if isinstance(saved, Run | SampleRun) else saved)
    fresh = target.with_name(f".{target.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror or error}; choose another --out.") from error
    finally:
        fresh.unlink(missing_ok=True)
    return target


def html_of(saved: Sequence[Saved]) -> str:
    """Return the page of one run, or of several: side by side first, then each one's own."""
    names = [name_of(one) for one in saved]
    if len(saved) == 1:
        return page.document(f"profkit: {names[0]}", _whole(saved[0], "h1", "run"))
    parts = [f"<h1>{escape(' · '.join(names))}</h1>", *_side_by_side(saved)]
    for number, one in enumerate(saved):
        parts.append(page.fold(f"The report of {names[number]}", _whole(one, "h3", f"run{number}")))
    return page.document(f"profkit: {len(saved)} runs", parts)


def name_of(one: Saved) -> str:
    """Return how a run is called: its model, and its directory where it has one."""
    model = one.manifest.get("model") or one.manifest.get("model_class") or "a model"
    return f"{model} ({one.path.name})" if one.path else str(model)


def _whole(one: Saved, heading: str, key: str) -> Iterator[str]:
    yield f"<{heading}>{escape(name_of(one))}</{heading}>"
    yield page.paragraph(_about(one), "note")
    if isinstance(one, SampleRun):
        yield from _of_samples(one, key)
    elif one.clean:
        yield from _of_run(one, key)
    else:
        yield page.paragraph("This run holds no finished clean pass, so there are no times to show.", "failure")
    yield page.section("Environment", _environment(one))


def _about(one: Saved) -> str:
    about = one.manifest
    weights = ", random weights" if about.get("weights") == "random" else ""
    return (
        f"{about.get('model_class')}, {about.get('parameters', 0) / 1e6:,.1f} M parameters{weights}, "
        f"{about.get('dtype')} on {about.get('device_name') or about.get('device')}"
    )


def _of_run(run: Run, key: str) -> Iterator[str]:
    yield page.paragraph(findings.answer(run), "answer")
    yield page.figure(figures.stage_bars(figures.of_clocks(run)), f"{key}-stages")
    spread = run.spread().loc["total"]
    yield page.paragraph(
        f"Over {len(run.clean)} clean passes, host clock: median {spread['median_ms']:.2f} ms, "
        f"p10 {spread['p10_ms']:.2f}, p90 {spread['p90_ms']:.2f}; the bar is the pass of median total.",
        "note",
    )
    yield from _checks(run)
    yield page.section("Worth optimising", [page.items(findings.worth_optimising(run))])
    yield page.section("Stages", _stages(run))
    yield page.section("Steps", _steps(run, key))
    yield page.section("How far from the limit", roofline_page.section(run, key))
    yield page.section("Layers and modules", _layers(run, key))
    yield page.section("One prefill and one decode step", _timeline(run, key))
    yield page.section("Kernels", _kernels(run))
    yield page.section("Operators", _operators(run))
    yield page.section("Anatomy", _anatomy(run))


def _checks(run: Run) -> Iterator[str]:
    """Failures in the open, the rest behind a click."""
    found = kept_verdicts(run)
    failed = [f"failed: {one.check}: {figure_of(one)}: {one.sentence}" for one in found if one.ok is False]
    yield page.items(failed, "failure") if failed else ""
    said = {True: "pass", False: "fail", None: "open"}
    counts = ", ".join(f"{sum(one.ok is ok for one in found)} {name}" for ok, name in said.items())
    rows = pd.DataFrame(
        [(said[one.ok], one.check, figure_of(one), one.sentence) for one in found],
        columns=["result", "check", "figure", "sentence"],
    )
    columns = [
        Column("result", ""),
        Column("check", "check"),
        Column("figure", "measured (at most)"),
        Column("sentence", ""),
    ]
    yield page.fold(f"Checks of this run: {counts}", [page.table(rows, columns)])
    yield page.items(notes(run), "warning") if notes(run) else ""


def _stages(run: Run) -> Iterator[str]:
    table = run.breakdown().reset_index()
    table["meaning"] = [stages.BY_NAME[name].meaning for name in table["stage"]]
    clocks = [Column(name, title) for name, title in MILLISECONDS if table[name].notna().any()]
    columns = [
        *(Column("classic_stage", "of 1 to 4", 0), Column("stage", "stage"), Column("calls", "calls", 0), *clocks),
        *(Column("share", "share", percent=True), Column("median_ms", "median"), Column("p10_ms", "p10")),
        *(Column("p90_ms", "p90"), Column("meaning", "")),
    ]
    yield page.table(table, columns)
    passes = f"{len(run.clean)} clean pass{'es' if len(run.clean) > 1 else ''}"
    yield page.paragraph(
        f"Times are those of the clean pass of median total, whose rows add up exactly to {table['host_ms'].sum():.2f} "
        f"ms; median, p10 and p90 are each row's own over {passes}.",
        "note",
    )
    if table["device_ms"].isna().all():
        yield page.paragraph("No device: there are no times on a device's clock, and no busy times.", "note")
    dilation = run.dilation().rename_axis("stage").reset_index()
    if len(dilation):
        shown = [
            Column("stage", "stage"),
            Column("clean_ms", "clean ms"),
            Column("profiled_ms", "profiled ms"),
            Column("ratio", "ratio"),
        ]
        title = (
            "Dilation: what the profiler made of the recorded steps (profiled times are never quoted as the program's)"
        )
        yield page.fold(title, [page.table(dilation, shown)])


def _steps(run: Run, key: str) -> Iterator[str]:
    latency = run.latency()
    said = (
        *(("TTFT", latency.ttft_ms, "ms"), ("TPOT", latency.tpot_ms, "ms"), ("ITL p50", latency.itl_p50_ms, "ms")),
        *(("p90", latency.itl_p90_ms, "ms"), ("p99", latency.itl_p99_ms, "ms")),
        *(("decode", latency.tokens_per_s, "tokens/s"), ("prefill", latency.prefill_tokens_per_s, "tokens/s")),
    )
    yield page.paragraph(" · ".join(f"{name} {value:.2f} {unit}" for name, value, unit in said if value == value))
    table = run.steps()
    prefill = table[table["phase"] == "prefill"]
    if len(prefill):
        yield page.paragraph(
            f"Prefill: {prefill['tokens'].clip(lower=0).sum()} tokens in {prefill['host_ms'].sum():.2f} ms."
        )
    if (table["phase"] == "decode").any():
        yield page.figure(figures.step_lines(run, run.manifest.get("cache_bytes")), f"{key}-steps")
        slow = [one.sentence() for one in pace.outliers(run.representative, run.clean)]
        yield page.items(slow[:10]) if slow else page.paragraph("No step of the shown pass stands out.", "note")
        yield page.paragraph(f"… and {len(slow) - 10} more", "note") if len(slow) > 10 else ""
    else:
        yield page.paragraph("There are no decode steps.", "note")


def _layers(run: Run, key: str) -> Iterator[str]:
    heat = figures.layer_map(run.representative)
    if heat is None:
        yield page.paragraph("Layers were not probed: this run was made with --granularity stage.", "note")
    else:
        yield page.figure(heat, f"{key}-layers")
        yield page.paragraph(
            "Host time of each decoder layer in each step; colours end at the decode steps' 99th percentile.", "note"
        )
    trees = {"clean pass: stages, steps, scopes": hierarchy.scope_tree(run.representative)}
    paths = [scope.path for scope in run.scopes]
    if run.operators is not None:
        trees["profiled steps: operators"] = hierarchy.event_tree(run.operators, paths, "self_ms", "calls")
    if run.kernels is not None:
        trees["profiled steps: kernels"] = hierarchy.event_tree(run.kernels, paths, "total_ms", "count")
    yield page.figure(
        figures.icicle({name: tree for name, tree in trees.items() if len(tree)}), f"{key}-tree", search=True
    )
    yield page.paragraph(
        "Steps of a kind are summed. The first tree is of the clean pass; trees of operators and kernels are of the "
        "steps that the profiled pass recorded, in the profiler's time. A click goes down; the search finds names.",
        "note",
    )


def _timeline(run: Run, key: str) -> Iterator[str]:
    if run.timeline is None or not len(run.timeline):
        yield page.paragraph(_missing(run, "timeline"), "note")
        return
    for number, step in enumerate(dict.fromkeys(run.timeline["step"])):
        yield f"<h3>{escape(step)}</h3>"
        yield page.figure(figures.timeline(run.timeline, step), f"{key}-timeline{number}")
    yield page.paragraph("As the profiler saw them, slowed by it; operators are the outermost ones.", "note")


def _missing(run: Run, what: str) -> str:
    """Return why a table of the profiled pass is not there."""
    if not run.of_kind("profiled"):
        return f"No {what}: this run has no profiled pass."
    if what in ("kernels",) and run.operators is not None:
        return "No kernels: the profiled pass saw no device."
    return f"No {what}: the run directory holds none that can be read."


def _kernels(run: Run) -> Iterator[str]:
    if run.kernels is None:
        yield page.paragraph(_missing(run, "kernels"), "note")
        return
    names = (("name", "kernel"), ("kind", "kind"), ("stage", "stage"), ("path", "module"), ("operator", "operator"))
    columns = [
        *(Column(name, title) for name, title in names),
        *(Column("count", "count", 0), Column("total_ms", "total ms", 3), Column("mean_us", "mean µs", 1)),
        *(Column("share", "share", percent=True), Column("steps", "steps", 0)),
    ]
    yield page.table(run.kernels, columns, MOST_ROWS, "total_ms")
    if run.device is not None:
        paces = run.device[
            ["device", "stage", "busy_ms", "sum_ms", "idle_ms", "launches_per_step", "verdict", "evidence"]
        ]
        yield "<h3>Who sets the pace</h3>"
        yield page.table(paces, [Column(name, name.replace("_", " ")) for name in paces])


def _operators(run: Run) -> Iterator[str]:
    if run.operators is None:
        yield page.paragraph(_missing(run, "operators"), "note")
        return
    columns = [
        *(Column("name", "operator"), Column("stage", "stage"), Column("path", "module"), Column("calls", "calls", 0)),
        *(Column("total_ms", "total ms", 3), Column("self_ms", "own ms", 3), Column("kernels", "kernels", 0)),
        *(Column("device_ms", "device ms", 3), Column("steps", "steps", 0)),
    ]
    yield page.paragraph(
        "Sums over the recorded steps, whose number stands in each row, in the profiler's time.", "note"
    )
    yield page.table(run.operators, columns, MOST_ROWS, "self_ms")


def _anatomy(run: Run) -> Iterator[str]:
    rows = pd.DataFrame(
        [(one.role, one.path, one.class_name, one.found_by, one.fired) for one in run.anatomy.parts],
        columns=["role", "path", "class_name", "found_by", "fired"],
    )
    titles = (("role", "part"), ("path", "path"), ("class_name", "class"), ("found_by", "found by"))
    yield page.table(rows, [*(Column(name, title) for name, title in titles), Column("fired", "calls", 0)])


def _environment(one: Saved) -> Iterator[str]:
    about: dict[str, Any] = one.manifest
    yield page.pairs(
        [
            *(
                (name, about[name])
                for name in ("device", "device_name", "dtype", "attention", "threads", "platform")
                if name in about
            ),
            *(about.get("versions") or {}).items(),
            ("plan", about.get("plan")),
        ]
    )
    if command := about.get("command"):
        yield page.paragraph("To reproduce:")
        yield f"<pre>{escape(' '.join(map(str, command)))}</pre>"
    yield page.fold("Configuration of the model", [f"<pre>{escape(page.json_text(about.get('config')))}</pre>"])


def _of_samples(run: SampleRun, key: str) -> Iterator[str]:
    good, table = run.good, run.breakdown().reset_index()
    yield page.paragraph(f"{len(good)} samples measured, {len(run.bad)} in error.", "answer")
    if len(good):
        means = {str(row["stage"]): float(row["mean_ms"]) for row in table.to_dict(orient="records")}
        yield page.figure(figures.stage_bars({"mean of a sample, host clock": means}), f"{key}-stages")
        columns = [
            *(Column("classic_stage", "of 1 to 4", 0), Column("stage", "stage"), Column("mean_ms", "mean ms")),
            *(
                Column("share", "share", percent=True),
                Column("median_ms", "median"),
                Column("p10_ms", "p10"),
                Column("p90_ms", "p90"),
            ),
        ]
        yield page.table(table, columns)
        yield page.pairs((name.replace("_", " "), f"{value:.2f}") for name, value in run.latency().items())
    if len(run.bad):
        yield page.table(run.bad, [Column("id", "sample"), Column("error", "error")], MOST_ROWS)


def _side_by_side(saved: Sequence[Saved]) -> Iterator[str]:
    """The bars of all runs, then each one against the first."""
    measured = [comparison.measured(one) for one in saved]
    if len({one.name for one in measured}) < len(measured):
        # The same directory name in two places, or one run given twice.
        measured = [replace(one, name=f"{number}: {one.name}") for number, one in enumerate(measured, start=1)]
    medians = {one.name: {str(name): float(one.times[name].median()) for name in one.times} for one in measured}
    yield page.figure(figures.stage_bars(medians), "side-by-side")
    base, *others = measured
    columns = [
        *(
            Column("what", ""),
            Column("base_ms", "first ms", 3),
            Column("base_low", "from", 3),
            Column("base_high", "to", 3),
        ),
        *(Column("other_ms", "second ms", 3), Column("other_low", "from", 3), Column("other_high", "to", 3)),
        *(
            Column("ratio", "ratio", 3),
            Column("ratio_low", "from", 3),
            Column("ratio_high", "to", 3),
            Column("differs", "differs"),
        ),
    ]
    for other in others:
        rows = comparison.compare(base, other).reset_index()
        rows["differs"] = ["beyond chance" if one else "" for one in rows["differs"]]
        parts = [
            page.paragraph(comparison.gap(base, other).sentence(base.name, other.name), "answer"),
            page.table(rows, columns),
            page.paragraph("Medians of host time with 95 % bootstrap intervals.", "note"),
            *roofline_page.side_by_side(base, other),
            page.items([f"not alike: {said}" for said in comparison.unlike(base, other)], "warning"),
            page.items(
                [f"{one.name} failed checks: {', '.join(one.failed)}" for one in (base, other) if one.failed], "failure"
            ),
        ]
        yield page.section(f"{other.name} over {base.name}", parts)
