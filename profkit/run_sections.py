"""The sections of the page of a run of one sample."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import pandas as pd

from profkit import figures, findings, hierarchy, pace, page, roofline_page, stages, verdict_sections
from profkit.checks import kept_verdicts
from profkit.page import MOST_ROWS, Column
from profkit.run import Run
from profkit.text import MIB, notes

MOST_NODES = 3600
"""Nodes of all trees together, which have equal shares of it: the page shall stay below 6 MB."""
MILLISECONDS = (("host_ms", "host ms"), ("device_ms", "device ms"), ("busy_ms", "busy ms"))


def sections(run: Run, key: str) -> Iterator[str]:
    """Yield what the page says of a run; `key` begins the names of its figures."""
    yield page.guarded("The answer", _answer(run, key))
    yield page.guarded("The list of checks", _checks(run))
    for title, parts in (
        ("Worth optimising", _worth(run)),
        ("Stages", _stages(run)),
        ("Steps", _steps(run, key)),
        ("How far from the limit", roofline_page.section(run, key)),
        ("Layers and modules", _layers(run, key)),
        ("One prefill and one decode step", _timeline(run, key)),
        ("Kernels", _kernels(run)),
        ("Operators", _operators(run)),
        ("Memory", _memory(run)),
        ("Anatomy", _anatomy(run)),
    ):
        yield page.section(title, parts)


def _answer(run: Run, key: str) -> Iterator[str]:
    yield page.paragraph(findings.answer(run), "answer")
    yield page.figure(figures.stage_bars(figures.of_clocks(run)), f"{key}-stages")
    if run.clean:
        spread = run.spread().loc["total"]
        many = f"{len(run.clean)} clean pass{'es' if len(run.clean) > 1 else ''}"
        yield page.paragraph(
            f"Over {many}, host clock: median {spread['median_ms']:.2f} ms, "
            f"p10 {spread['p10_ms']:.2f}, p90 {spread['p90_ms']:.2f}; the bar is the pass of median total.",
            "note",
        )


def _checks(run: Run) -> Iterator[str]:
    if notes(run):
        yield page.items(notes(run), "warning")
    yield from verdict_sections.verdicts(kept_verdicts(run))


def _worth(run: Run) -> Iterator[str]:
    yield page.items(findings.worth_optimising(run))


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
    passes = f"{len(run.clean)} clean pass{'es' if len(run.clean) > 1 else ''}" if run.clean else "the clean passes"
    yield page.paragraph(
        f"Times are those of the clean pass of median total, whose rows add up exactly to {table['host_ms'].sum():.2f} "
        f"ms; median, p10 and p90 are each row's own over {passes}.",
        "note",
    )
    if table["busy_ms"].notna().any():
        yield page.paragraph(
            "Busy times are of the profiled pass, which the profiler slowed: those of a recorded step, times the steps "
            "of the clean pass.",
            "note",
        )
    if table["device_ms"].isna().all():
        what = "times on a device's clock" + ", and no busy times" * bool(table["busy_ms"].isna().all())
        yield page.paragraph(f"No device: there are no {what}.", "note")
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
        cache_bytes = run.manifest.get("cache_bytes")
        yield page.figure(figures.step_lines(run, cache_bytes), f"{key}-steps")
        if not cache_bytes:
            yield page.paragraph(_without_cache(run), "note")
        if not run.clean:
            yield page.paragraph("No spread over passes and no outliers: these need the marks of the passes.", "note")
            return
        slow = [one.sentence() for one in pace.outliers(run.representative, run.clean)]
        yield page.items(slow[:10]) if slow else page.paragraph("No step of the shown pass stands out.", "note")
        yield page.paragraph(f"… and {len(slow) - 10} more", "note") if len(slow) > 10 else ""
    else:
        yield page.paragraph("There are no decode steps.", "note")


def _without_cache(run: Run) -> str:
    if not run.of_kind("profiled"):
        return "No cache growth: the cache is watched in the profiled pass, and this run has none."
    return "No cache growth: the profiled pass saw no cache whose size it could tell."


def _layers(run: Run, key: str) -> Iterator[str]:
    heat = figures.layer_map(run.representative) if run.clean else None
    if not run.clean:
        yield page.paragraph("No layers over steps and no tree of scopes: these need the marks of the passes.", "note")
        yield from _modules(run)
    elif heat is None:
        yield page.paragraph("Layers were not probed: this run was made with --granularity stage.", "note")
    else:
        yield page.figure(heat, f"{key}-layers")
        yield page.paragraph(
            "Host time of each decoder layer in each step; colours end 5 % above the decode steps' 99th percentile, so "
            "that a prefill does not leave the rest one colour.",
            "note",
        )
    yield from _trees(run, key)


def _trees(run: Run, key: str) -> Iterator[str]:
    found = {"clean pass: stages, steps, scopes": hierarchy.scope_tree(run.representative)} if run.clean else {}
    paths = [scope.path for scope in run.scopes]
    if run.trees is not None:
        for clock, title in (("host", "down to operators"), ("device", "down to kernels")):
            found[f"profiled steps: {title}"] = run.trees[run.trees["clock"] == clock].reset_index(drop=True)
    else:
        if run.operators is not None:
            found["profiled steps: operators"] = hierarchy.event_tree(run.operators, paths, "self_ms", "calls")
        if run.kernels is not None:
            found["profiled steps: kernels"] = hierarchy.event_tree(run.kernels, paths, "total_ms", "count")
    found = {title: tree for title, tree in found.items() if len(tree)}
    if not found:
        return
    most = MOST_NODES // len(found)
    shown = {title: hierarchy.pruned(tree, most) for title, tree in found.items()}
    yield page.figure(figures.icicle(shown), f"{key}-tree", search=True, choices=list(shown))
    yield page.paragraph("Steps of a kind are summed. A click goes down; the search finds names.", "note")
    if run.operators is None and run.trees is None:
        yield page.paragraph(_missing(run, "operators and kernels in the tree"), "note")
    else:
        yield page.paragraph(
            "Trees of profiled steps are of those that the profiled pass recorded, in the profiler's time: the host's "
            "down to operators, the device's, where there is one, down to kernels.",
            "note",
        )
    cut = [f"{len(found[title]):,} in {title}" for title in found if len(shown[title]) < len(found[title])]
    if cut:
        yield page.paragraph(
            f"The {most:,} largest nodes are shown (of {'; of '.join(cut)}): what is left out of a node is one "
            "child of it, with its sum, and the search does not see into it.",
            "note",
        )


def _modules(run: Run) -> Iterator[str]:
    columns = [
        *(Column("path", "module"), Column("stage", "stage"), Column("calls", "calls", 0)),
        *(Column("total_ms", "total ms", 3), Column("self_ms", "own ms", 3), Column("device_ms", "own device ms", 3)),
    ]
    yield page.table(run.modules().sort_values("self_ms", ascending=False), columns, MOST_ROWS, "self_ms")


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
        paces = paces.assign(device=[f"device {one}" for one in paces["device"]])
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


def _memory(run: Run) -> Iterator[str]:
    if run.memory is None:
        yield page.paragraph("No memory of a device: the CPU's allocator keeps no statistics.", "note")
    else:
        names = {"allocated_before": "before", "allocated_after": "after", "peak": "peak", "reserved_after": "reserved"}
        columns = [Column("stage", "stage"), *(Column(name, f"{said}, MiB") for name, said in names.items())]
        yield page.table((run.memory / MIB).reset_index(), columns)
    if (token := run.cache_bytes_per_token()) is not None:
        yield page.paragraph(f"The cache takes {token / 1024:.1f} KiB a token.")


def _anatomy(run: Run) -> Iterator[str]:
    rows = pd.DataFrame(
        [(one.role, one.path, one.class_name, one.found_by, one.fired) for one in run.anatomy.parts],
        columns=["role", "path", "class_name", "found_by", "fired"],
    )
    titles = (("role", "part"), ("path", "path"), ("class_name", "class"), ("found_by", "found by"))
    yield page.table(rows, [*(Column(name, title) for name, title in titles), Column("fired", "calls", 0)])
