"""A run as text for the terminal, and as plain values for --json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from profkit import doubts, stages
from profkit.anatomy import Anatomy
from profkit.checks import kept_verdicts
from profkit.directories import plain
from profkit.run import Run
from profkit.verdicts import Verdict


def report(run: Run, corrected: bool = False) -> Iterator[Table | str]:
    """Yield the parts of the terminal report: what ran, the table, latency, cost, checks.

    `corrected` adds a column of times without what the instrument's marks cost.
    """
    yield headline(run)
    yield breakdown_table(run, corrected)
    yield repeats_line(run)
    if corrected:
        yield "[dim]corrected ms: ms less what marks cost, as calibrated on modules that do nothing.[/dim]"
    yield latency_line(run)
    yield from limit_lines(run)
    yield from pace_lines(run)
    yield from memory_lines(run)
    yield from cost_lines(run)
    yield from check_lines(kept_verdicts(run))
    yield from confessions(run)


MIB = 1 << 20
ACCESSOR = re.compile(r"get_\w+\(\)")
PHASES = ("before", "prefill", "decode")


def anatomy_report(
    anatomy: Anatomy, parts: pd.DataFrame, abilities: Sequence[Mapping[str, Any]]
) -> Iterator[Table | str]:
    """Yield the parts as a tree, what a reader must know of them, and the capability table."""
    places = {(row["dtype"], row["device"]) for row in parts.to_dict(orient="records")}
    # What is the same for every part is said once.
    where = ["dtype", "device"] if len(places) > 1 else []
    said = "" if where else ": {} on {}".format(*next(iter(places)))
    yield f"[bold]{escape(anatomy.model_class)}[/bold]{said}"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("path", no_wrap=True)
    table.add_column("part", no_wrap=True)
    table.add_column("class", overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    for name in where:
        table.add_column(name, overflow="fold")
    table.add_column("calls", no_wrap=True)
    table.add_column("found by", overflow="fold")
    around: list[str] = []
    for row in parts.to_dict(orient="records"):
        around = [*around[: row["depth"]], row["path"]]
        inside = row["depth"] and around[-2]
        path = f"{'  ' * row['depth']}.{row['path'].removeprefix(inside).lstrip('.')}" if inside else row["path"]
        calls = " + ".join("–" if pd.isna(row[name]) else str(int(row[name])) for name in PHASES)
        cells = [path or anatomy.model_class, row["role"], row["class_name"], _count(row["parameters"])]
        table.add_row(
            *map(escape, [*cells, *(row[name] for name in where), calls, ACCESSOR.sub("accessor", row["found_by"])])
        )
    yield table
    yield "[dim]calls: before the first forward + in prefill + in decode steps, of a generate() of two tokens[/dim]"
    for path, count in anatomy.outside.items():
        yield f"media outside the parts: {count} operations in {escape(path or anatomy.model_class)}"
    for note in anatomy.notes:
        yield f"[yellow]note: {escape(note)}[/yellow]"
    if abilities:
        yield capability_table(abilities)


def capability_table(abilities: Sequence[Mapping[str, Any]]) -> Table:
    """Return the questions, answers and what was seen."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tried on this model", "answer", "seen"):
        table.add_column(name, overflow="fold")
    answers = {True: "yes", False: "no", None: "–"}
    for one in abilities:
        table.add_row(escape(one["question"]), answers[one["answer"]], escape(one["evidence"]))
    return table


def headline(run: Run) -> str:
    """Return what was measured, in a line."""
    about, latency = run.manifest, run.latency()
    weights = ", random weights" if about.get("weights") == "random" else ""
    name = run.anatomy.model_class
    return (
        f"[bold]{escape(str(about.get('model') or name))}[/bold]: {escape(name)}, "
        f"{_count(about.get('parameters') or 0)} parameters{weights}, {about.get('dtype')} on {about.get('device')}; "
        f"{latency.prompt_tokens} prompt tokens, {latency.new_tokens} new"
    )


def breakdown_table(run: Run, corrected: bool = False) -> Table:
    """Return stages 1 to 4 with their sub-stages; times of a device where there are any, corrected ones if wanted."""
    breakdown, spread = run.breakdown(), run.spread()
    if corrected:
        breakdown["corrected_ms"] = run.corrected()["corrected_ms"]
    clocks = [
        "host_ms",
        *["corrected_ms"] * corrected,
        *(
            name
            for name in ("device_ms", "busy_ms", "starved_ms")
            if name in breakdown and breakdown[name].notna().any()
        ),
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    titles = ("ms" if name == "host_ms" else name.replace("_", " ") for name in clocks)
    for name in ("calls", *titles, "share", "median", "p10 … p90"):
        table.add_column(name, justify="right")
    for group in stages.GROUPS:
        rows = breakdown[breakdown["classic_stage"] == group.number]
        if len(rows):
            _add_group(table, group, rows, clocks, _parts_of_inputs(run))
    total = spread.loc["total"]
    table.add_row("total", "", *_sums(breakdown, clocks), "100.0 %", *_spread_cells(total), style="bold")
    return table


def _parts_of_inputs(run: Run) -> pd.DataFrame:
    """Return what preprocessing consists of: rows of modules() whose paths begin with that of their stage."""
    modules = run.modules()
    return modules[modules["path"].str.startswith("preprocess().")]


def _add_group(table: Table, group: stages.Group, rows: pd.DataFrame, clocks: list[str], parts: pd.DataFrame) -> None:
    share = f"{rows['share'].sum() * 100:.1f} %"
    table.add_row(f"{group.number} {group.title}", "", *_sums(rows, clocks), share, "", "", style="bold")
    for name, row in rows.iterrows():
        calls = str(int(row["calls"])) if row["calls"] else ""
        share = f"{row['share'] * 100:.1f} %"
        table.add_row(f"    {name}", calls, *(_ms(row[clock]) for clock in clocks), share, *_spread_cells(row))
        for part in parts[parts["stage"] == name].to_dict(orient="records"):
            title = f"        {part['path'].partition('.')[2]}"
            table.add_row(title, str(part["calls"]), _ms(part["total_ms"]), style="dim")


def _sums(rows: pd.DataFrame, clocks: list[str]) -> list[str]:
    """Return each clock's sum over stages; a stage without an event of a clock adds nothing to it."""
    return [_ms(rows[clock].sum(min_count=1)) for clock in clocks]


def _spread_cells(row: pd.Series) -> list[str]:
    return [_ms(row["median_ms"]), f"{_ms(row['p10_ms'])} … {_ms(row['p90_ms'])}"]


def repeats_line(run: Run) -> str:
    """Return how the table's columns were made."""
    count = len(run.clean)
    warm: dict[bool | None, str] = {True: " load: from the page cache (warm).", False: " load: from the disk (cold)."}
    return (
        f"[dim]ms and share: the clean pass of median total, whose rows add up exactly; median and p10 … p90: "
        f"each row over {count} clean pass{'es' if count > 1 else ''}.{warm.get(run.manifest.get('files_cached'), '')}"
        "[/dim]"
    )


def latency_line(run: Run) -> str:
    """Return TTFT, TPOT, ITL and tokens/s."""
    found = run.latency()
    return (
        f"TTFT {_ms(found.ttft_ms)} ms · TPOT {_ms(found.tpot_ms)} ms · "
        f"ITL p50 {_ms(found.itl_p50_ms)} p90 {_ms(found.itl_p90_ms)} p99 {_ms(found.itl_p99_ms)} ms · "
        f"{_rate(found.tokens_per_s, 1)} tokens/s decode · {_rate(found.prefill_tokens_per_s, 0)} tokens/s prefill"
    )


def limit_lines(run: Run) -> Iterator[str]:
    """Yield what was counted, and how far TTFT and TPOT are from their floors where the ceilings are known."""
    if run.work is None:
        return
    flops, moved = (float(run.work.total()[name]) for name in ("flops", "bytes"))
    said = f"work: {flops / 1e9:.4g} GFLOP, at least {moved / 1e6:.4g} MB to move"
    found = None if run.ceilings is None else run.roofline()
    if found is not None:
        one = found.latencies
        said += f"; floor of TTFT {_ms(one.ttft_floor_ms)} ms, of TPOT {_ms(one.tpot_floor_ms)} ms"
    yield f"{said} [dim](profkit roofline RUN says how far each stage is from its limit)[/dim]"
    for doubt in () if found is None else doubts.of(found):
        yield f"[yellow]{escape(doubt)}[/yellow]"


def pace_lines(run: Run) -> Iterator[str]:
    """Yield who sets the pace of each stage, where there is a device."""
    if run.device is None:
        return
    several = run.device["device"].nunique() > 1
    for row in run.device.to_dict(orient="records"):
        where = f" on device {row['device']}" if several else ""
        waited = row.get("host_wait_ms", 0)
        wait = f"; the host waited {waited:.2f} ms for it" if waited and waited == waited else ""
        yield f"{escape(row['stage'] + where)}: [bold]{row['verdict']}[/bold] [dim]({row['evidence']}{wait})[/dim]"


def memory_lines(run: Run) -> Iterator[str]:
    """Yield what the model's devices held, where that can be read, and what a token takes in the cache."""
    if run.memory is not None:
        peaks = run.memory["peak"].drop("total")
        whole = run.memory.loc["total"]
        each = ", ".join(f"{name} {size / MIB:.0f}" for name, size in peaks.items())
        yield (
            f"memory, MiB: {whole['allocated_before'] / MIB:.0f} before, peak {whole['peak'] / MIB:.0f}, reserved "
            f"{whole['reserved_after'] / MIB:.0f} [dim](peaks: {each})[/dim]"
        )
    if (token := run.cache_bytes_per_token()) is not None:
        yield f"cache: {token / 1024:.1f} KiB a token"


def cost_lines(run: Run) -> Iterator[str]:
    """Yield what the instrument cost: overhead of the clean passes, dilation of the profiled one."""
    pairs = len(run.of_kind("control"))
    if pairs:
        over = f"median of {pairs} pairs" if pairs > 1 else "one pair"
        yield f"instrument's overhead: ×{run.overhead():.3f} (clean over uninstrumented, {over})"
    dilation = run.dilation()
    if len(dilation):
        ratios = {str(name): float(ratio) for name, ratio in dilation["ratio"].items()}
        total = ratios.pop("total")
        each = " ".join(f"{name} ×{ratio:.2f}" for name, ratio in ratios.items())
        steps = next(one.steps_recorded for one in run.of_kind("profiled"))
        yield (f"dilation under torch.profiler, steps {_ranges(steps)}: ×{total:.2f} [dim]({each})[/dim]")


def check_lines(found: Sequence[Verdict]) -> Iterator[str]:
    """Yield what checks found, what failed first."""
    for one in found:
        if one.ok is False:
            yield f"[red]FAILED[/red] {escape(one.check)}: {escape(figure(one))}: {escape(one.sentence)}"
    passed = [one.check for one in found if one.ok]
    if passed:
        yield f"[green]passed[/green] {len(passed)} checks: {escape(_grouped(passed))}"
    for one in found:
        if one.ok is None and one.allowed == one.allowed:
            yield f"[yellow]open: {escape(one.check)}: {escape(figure(one))}: {escape(one.sentence)}[/yellow]"


def confessions(run: Run) -> Iterator[str]:
    """Yield what the instrument has to confess."""
    encoded = run.manifest.get("checks", {}).get("encoded") or {}
    if encoded.get("not_compared"):
        yield f"{encoded['not_compared']} calls of a tower could not be compared: their inputs were changed or let go"
    for note in notes(run):
        yield f"[yellow]note: {escape(note)}[/yellow]"


def notes(run: Run) -> list[str]:
    """Return what a reader must know beside the verdicts."""
    return [*run.unreadable, *run.anatomy.notes, *run.manifest.get("notes", []), *run.manifest.get("faults", [])]


def figure(one: Verdict) -> str:
    """Return what was measured and the bound, with their unit."""
    measured, allowed = (
        f"{value:.2%}" if one.unit == "" else f"{value:g} {one.unit}" for value in (one.measured, one.allowed)
    )
    bound = f" (at most {allowed})" if one.allowed == one.allowed else ""
    return ("unknown" if one.measured != one.measured else measured) + bound


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Return every verdict: the check, what was measured, what is allowed, and what it means."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    table.add_column("check")
    table.add_column("measured (at most)", justify="right")
    table.add_column("", overflow="fold")
    marks = {True: "[green]pass[/green]", False: "[red]FAIL[/red]", None: "[yellow]open[/yellow]"}
    for one in verdicts:
        only_known = one.ok is None and one.allowed != one.allowed
        table.add_row(
            "[dim]–[/dim]" if only_known else marks[one.ok],
            escape(one.check),
            escape(figure(one)),
            escape(one.sentence),
        )
    return table


def verdicts_as_dict(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return verdicts as plain values; unknown figures are null."""
    counts = {name: sum(one.ok is ok for one in verdicts) for name, ok in (("passed", True), ("failed", False))}
    return plain(
        {**counts, "open": sum(one.ok is None for one in verdicts), "verdicts": [asdict(one) for one in verdicts]}
    )


def _grouped(checks: Sequence[str]) -> str:
    """Return names of checks, those of one group behind its name."""
    groups: dict[str, list[str]] = {}
    for name in checks:
        group, _, rest = name.partition(": ")
        groups.setdefault(group, []).append(rest)
    return "; ".join(f"{group} ({', '.join(rest)})" if rest[0] else group for group, rest in groups.items())


def as_dict(run: Run, corrected: bool = False) -> dict[str, Any]:
    """Return what the terminal report shows, as plain values; unknown numbers are null.

    `corrected` adds corrected_ms to stages: times without what the instrument's marks cost.
    """
    by_stage = run.breakdown()
    if corrected:
        by_stage["corrected_ms"] = run.corrected()["corrected_ms"]
    return plain(
        {
            "path": str(run.path) if run.path else None,
            "model": run.manifest.get("model") or run.anatomy.model_class,
            "device": run.manifest.get("device"),
            "dtype": run.manifest.get("dtype"),
            "stages": by_stage.reset_index().to_dict(orient="records"),
            "device_stages": [] if run.device is None else run.device.to_dict(orient="records"),
            "work": [] if run.work is None else run.work.stages().reset_index().to_dict(orient="records"),
            "total_ms": run.stages()["host_ms"].sum(),
            "memory": [] if run.memory is None else run.memory.reset_index().to_dict(orient="records"),
            "cache_bytes_per_token": run.cache_bytes_per_token(),
            "latency": asdict(run.latency()),
            "overhead": run.overhead(),
            "dilation": run.dilation().rename_axis("stage").reset_index().to_dict(orient="records"),
            "checks": run.manifest.get("checks", {}),
            "anatomy": run.anatomy.to_dict(),
            "notes": notes(run),
        }
    )


def anatomy_as_dict(anatomy: Anatomy, parts: pd.DataFrame, abilities: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what anatomy_report() shows, as plain values."""
    return plain(
        {
            "model_class": anatomy.model_class,
            "roles": anatomy.to_dict(),
            "parts": parts.drop(columns="depth").to_dict(orient="records"),
            "features": anatomy.features,
            "outside": anatomy.outside,
            "notes": anatomy.notes,
            "capabilities": abilities,
        }
    )


def _ms(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.2f}"


def _rate(value: float, digits: int) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def _count(number: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {letter}"
    return str(number)


def _ranges(numbers: tuple[int, ...]) -> str:
    """Return a list of numbers with runs shortened: 0-4,10."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
