"""An analysed trace as text for the terminal, and as plain values for --json."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from profkit.analysis import Analysis
from profkit.device_tables import ALL, IDLE, OUTSIDE
from profkit.directories import plain

MOST_STEPS = 12


def report(found: Analysis, top: int) -> Iterator[Table | str]:
    """Yield the parts of the report on one trace; tables of names show the `top` rows."""
    yield headline(found)
    if found.window:
        yield f"[yellow]recorded: steps {_listed(found.window)} alone; sums are of these, not of the whole[/yellow]"
    on_device = len(found.tables["devices"]) > 0
    if on_device:
        yield _devices(found.tables["devices"])
        stages = _telling(found.tables["stages"])
        yield from _stages(stages)
        yield from _verdicts(stages)
        yield _coverage(found)
    elif len(found.tables["host"]):
        yield _host(found.tables["host"])
    if len(found.tables["steps"]):
        yield _steps(found.tables["steps"], MOST_STEPS, on_device)
    yield f"[dim]{escape(found.evidence)}; scopes: {escape(found.scopes)}[/dim]"
    for note in found.graphs:
        yield f"[dim]{escape(note)}[/dim]"
    if len(found.tables["kernels"]):
        yield _kernels(found.tables["kernels"], top)
    if len(found.tables["operators"]):
        yield _operators(found.tables["operators"], top, on_device)
    yield from _checks(found)


def headline(found: Analysis) -> str:
    """Return what the trace is of, in a line."""
    where = ", ".join(dict.fromkeys(found.device_names.get(one, "") for one in found.tables["devices"]["device"]))
    rank = (
        "" if found.rank is None else f", rank {found.rank}" + (f" of {found.world_size}" if found.world_size else "")
    )
    device = f", {where}" if where else "" if len(found.tables["devices"]) else ", no device"
    return f"[bold]{escape(_visible(str(found.path)))}[/bold]: {found.events} events{escape(device)}{rank}"


def _table(*columns: str, left: int = 1) -> Table:
    """Return an empty table whose first `left` columns are text."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        if number < left:
            table.add_column(name, overflow="fold")
        else:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def _devices(devices: pd.DataFrame) -> Table:
    table = _table("device", "kernels", "streams", "span ms", "busy ms", "sum ms", "idle ms", "collectives ms")
    for row in devices.to_dict(orient="records"):
        times = (row[f"{name}_ms"] for name in ("span", "busy", "sum", "idle", "collective"))
        table.add_row(escape(row["device"]), str(row["kernels"]), str(row["streams"]), *map(_ms, times))
    return table


def _stages(stages: pd.DataFrame) -> Iterator[Table]:
    """Yield what the device did in each stage, and why it was idle; the device's name where there are several."""
    several = stages["device"].nunique() > 1
    labels = ("stage", "device") if several else ("stage",)
    work = _table(*labels, "steps", "kernels", "launches", "a step", "busy ms", "idle ms", left=len(labels))
    known = [name for name in IDLE if stages[f"idle_{name}_ms"].any()]
    named = {"before": "before the step", "host": "host not ready", "launch": "launch", "wait": "wait"}
    why = (f"{named.get(name, name)}" for name in known)
    idle = _table(*labels, *why, "delay p50 us", "p99 us", left=len(labels))
    for row in stages.to_dict(orient="records"):
        who = [escape(row[name]) for name in labels]
        a_step = "–" if pd.isna(row["launches_per_step"]) else f"{row['launches_per_step']:.0f}"
        counts = (str(row["steps"]), str(row["kernels"]), str(row["launches"]), a_step)
        style = "bold" if row["stage"] == ALL else None
        work.add_row(*who, *counts, _ms(row["busy_ms"]), _ms(row["idle_ms"]), style=style)
        delays = ("–" if pd.isna(row[name]) else f"{row[name]:.1f}" for name in ("delay_p50_us", "delay_p99_us"))
        idle.add_row(*who, *(_ms(row[f"idle_{name}_ms"]) for name in known), *delays, style=style)
    yield work
    idle.title, idle.title_justify, idle.title_style = "idle ms, by what the device waited for", "left", "dim"
    yield idle


def _telling(stages: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that say something: where no stage is known, that of all is enough."""
    return stages if set(stages["stage"]) - {ALL, OUTSIDE} else stages[stages["stage"] == ALL]


def _verdicts(stages: pd.DataFrame) -> Iterator[str]:
    for row in stages.to_dict(orient="records"):
        device = "" if stages["device"].nunique() == 1 else f" on device {row['device']}"
        yield f"{escape(row['stage'])}{escape(device)}: [bold]{row['verdict']}[/bold]: {row['evidence']}"


def _coverage(found: Analysis) -> str:
    shares = found.tables["coverage"]["share"]
    named = {
        "module": "a module",
        "range": "a stage or range only",
        "operator": "an operator only",
        "nothing": "nothing",
    }
    parts = [f"{shares[level]:.1%} to {said}" for level, said in named.items() if shares[level] or level == "nothing"]
    why = {row["why"]: row["count"] for row in found.tables["reasons"].to_dict(orient="records")}
    reasons = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in why.items())
    return f"device time attributed: {', '.join(parts)} [dim]({reasons})[/dim]"


def _host(host: pd.DataFrame) -> Table:
    table = _table("stage", "steps", "operators", "own ms")
    for row in host.to_dict(orient="records"):
        table.add_row(escape(row["stage"]), str(row["steps"]), str(row["operators"]), _ms(row["host_ms"]))
    return table


def _steps(steps: pd.DataFrame, top: int, on_device: bool) -> Table:
    columns = ("kernels", "launches", "busy ms", "sum ms", "host not ready ms") if on_device else ()
    table = _table("step", "phase", "host ms", *columns, left=2)
    for row in steps.head(top).to_dict(orient="records"):
        counts = (str(row[name]) for name in ("kernels", "launches"))
        times = map(_ms, (row["busy_ms"], row["sum_ms"], row["idle_host_ms"]))
        more = (*counts, *times) if on_device else ()
        table.add_row(escape(_shortened(row["label"], 60)), row["phase"], _ms(row["host_ms"]), *more)
    if len(steps) > top:
        table.add_row(f"… and {len(steps) - top} more steps")
    return table


def _kernels(kernels: pd.DataFrame, top: int) -> Table:
    by_name = kernels.groupby("name", sort=False).agg(
        count=("count", "sum"), total_ms=("total_ms", "sum"), share=("share", "sum"), scopes=("path", "nunique")
    )
    # Within a name the longest row comes first: the scope that most of the time belongs to.
    where = kernels.drop_duplicates("name").set_index("name")
    table = _table("kernel", "mostly in", "count", "total ms", "mean us", "share", left=2)
    ordered = by_name.sort_values("total_ms", ascending=False, kind="stable")
    for name, row in ordered.head(top).iterrows():
        owner = where.loc[name, "path"] or where.loc[name, "operator"] or "nobody"
        more = f" +{int(row['scopes']) - 1}" if row["scopes"] > 1 else ""
        mean = f"{row['total_ms'] / row['count'] * 1e3:.1f}"
        share = f"{row['share'] * 100:.1f} %"
        cells = (str(int(row["count"])), _ms(row["total_ms"]), mean, share)
        table.add_row(escape(_shortened(str(name), 64)), escape(_tail(str(owner), 44)) + more, *cells)
    return _with_rest(table, len(by_name), top, "kernels")


def _operators(operators: pd.DataFrame, top: int, on_device: bool) -> Table:
    columns = ["calls", "total_ms", "self_ms", *(["kernels", "device_ms"] if on_device else [])]
    by_name = operators.groupby(["name", "kind"], sort=False)[columns].sum()
    table = _table("operator", "kind", *(name.replace("_", " ") for name in columns), left=2)
    for (name, kind), row in by_name.sort_values("self_ms", ascending=False, kind="stable").head(top).iterrows():
        cells = (_ms(row[one]) if one.endswith("_ms") else str(int(row[one])) for one in columns)
        table.add_row(escape(_shortened(str(name), 64)), str(kind), *cells)
    return _with_rest(table, len(by_name), top, "operators")


def _with_rest(table: Table, rows: int, top: int, what: str) -> Table:
    if rows > top:
        table.add_row(f"… and {rows - top} more {what} (--top)")
    return table


def _checks(found: Analysis) -> Iterator[str]:
    passed = [one.name for one in found.checks if one.ok]
    for one in found.checks:
        if one.ok is False:
            yield f"[yellow]doubt: {escape(one.name)}: {one.count} of {one.total}: {escape(one.sentence)}[/yellow]"
        elif one.ok is None and one.count:
            yield f"[dim]{escape(one.name)}: {one.count} of {one.total}: {escape(one.sentence)}[/dim]"
    if passed:
        yield f"checked, nothing found: {escape(', '.join(passed))}"
    doubted = found.validated != "passed" and not found.validated.startswith("not ")
    style = "yellow" if doubted else "dim"
    yield f"[{style}]torch's trace validator: {escape(_shortened(found.validated, 300))}[/{style}]"


def ranks(table: pd.DataFrame) -> Iterator[Table | str]:
    """Yield, for each directory, a row a rank and the spread between them."""
    for folder, rows in table.groupby("folder", sort=False):
        shown = _table("rank", "file", *(name.replace("_", " ") for name in table.columns[3:]), left=2)
        for row in rows.to_dict(orient="records"):
            if row["rank"] == "spread":
                cells = ("–" if pd.isna(row[name]) else f"{row[name]:.1%}" for name in table.columns[3:])
                shown.add_row("spread", "", *cells, style="bold")
            else:
                counts = [str(int(row[name])) for name in ("kernels", "launches")]
                times = (_ms(row[name]) for name in table.columns[5:])
                shown.add_row(row["rank"], escape(_visible(row["file"])), *counts, *times)
        if folder:
            yield f"[bold]{escape(_visible(str(folder)))}[/bold]"
        yield shown
    yield "[dim]spread: (max − min) / median over ranks[/dim]"


def as_dict(found: Analysis) -> dict[str, Any]:
    """Return an analysis as plain values; unknown numbers are null."""
    tables = {name: _records(table) for name, table in found.tables.items()}
    about = {
        "file": str(found.path),
        "rank": found.rank,
        "world_size": found.world_size,
        "device_names": found.device_names,
        "events": found.events,
        "scopes": found.scopes,
        "steps_evidence": found.evidence,
        "graphs": found.graphs,
        "torch_validator": found.validated,
    }
    return plain({**about, **tables})


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    named = table.reset_index() if table.index.name else table
    return [{str(key): value for key, value in row.items()} for row in named.to_dict(orient="records")]


def all_as_dict(analyses: Sequence[Analysis], between: pd.DataFrame, errors: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that one command found out."""
    return {
        "traces": [as_dict(one) for one in analyses],
        "ranks": plain(_records(between)),
        "errors": dict(errors),
    }


def _ms(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.2f}"


def _shortened(text: str, width: int) -> str:
    text = _visible(text)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _tail(text: str, width: int) -> str:
    text = _visible(text)
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _visible(text: str) -> str:
    """Return a text of others' without the control characters that would move or colour a terminal."""
    return "".join(one if one.isprintable() else "�" for one in text)


def _listed(steps: Sequence[int]) -> str:
    """Return numbers with runs shortened: 0-1, 7."""
    runs = "".join(f"{',' if one - 1 not in steps else '-'}{one}" for one in sorted(steps))
    return ", ".join(re.sub(r"-.*-", "-", run) for run in runs.lstrip(",").split(","))
