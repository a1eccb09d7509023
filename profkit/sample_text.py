"""A run over many samples as text for the terminal, and as plain values for --json."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table

from profkit import stages
from profkit.directories import plain
from profkit.sample_checks import verdicts
from profkit.sample_runs import SampleRun
from profkit.text import check_lines, verdicts_as_dict


class Rate(ProgressColumn):
    """Samples a second."""

    def render(self, task: Task) -> str:
        """Return the rate so far."""
        return "" if task.speed is None else f"{task.speed:.2f} samples/s"


COLUMNS: tuple[ProgressColumn, ...] = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    Rate(),
    TimeRemainingColumn(),
    TextColumn("{task.fields[failed]} failed"),
)
MOST_ERRORS = 10


def report(run: SampleRun) -> Iterator[Table | str]:
    """Yield the parts of the report: what ran, the stages, latency, what failed."""
    about, good_rows = run.manifest, run.good
    good = len(good_rows)
    yield headline(run)
    if (left := about.get("listed", 0) - len(run.rows)) > 0:
        yield f"[yellow]{left} of the {about['listed']} samples have no row yet: --resume goes on with them[/yellow]"
    if good:
        yield _breakdown(run)
        figures = run.latency()
        each = (f"{name.removesuffix('_ms').replace('_', ' ')} {value:.2f}" for name, value in figures.items())
        yield f"medians over samples: {', '.join(each)}"
        cached = run.good["cached"].map({True: "warm", False: "cold"}).fillna("unknown").value_counts()
        yield from _notes(good_rows)
        yield f"files before they were loaded: {', '.join(f'{count} {name}' for name, count in cached.items())}"
    yield from (f"[yellow]{escape(one)}[/yellow]" for one in run.unreadable)
    yield from check_lines(verdicts(run))
    for row in run.bad.head(MOST_ERRORS).to_dict(orient="records"):
        said = row["error"] if row["error"].startswith(row["id"]) else f"{row['id']}: {row['error']}"
        yield f"[yellow]{escape(said)}[/yellow]"
    if len(run.bad) > MOST_ERRORS:
        yield f"[yellow]… and {len(run.bad) - MOST_ERRORS} more in error[/yellow]"


def headline(run: SampleRun) -> str:
    """Return what was measured, in a line."""
    about = run.manifest
    what = f"{about.get('model_class')}, {about.get('dtype')} on {about.get('device')}"
    many = f" on {about['ranks']} ranks" if about.get("ranks", 1) > 1 else ""
    counts = f"{len(run.good)} samples measured{many}, {len(run.bad)} in error"
    return f"[bold]{escape(str(about.get('model')))}[/bold]: {escape(what)}; {counts}"


def _notes(good: pd.DataFrame) -> Iterator[str]:
    """Yield what was encoded twice, and what else must be known of the samples."""
    again = good[good["encoded_again_ms"] > 0]
    if len(again):
        lost = f"{len(again)} samples were encoded twice, at a median of {again['encoded_again_ms'].median():.2f} ms"
        yield f"[yellow]{lost}[/yellow]"
    noted = good[good["notes"].str.len() > 0]
    if len(noted):
        yield f"[yellow]{len(noted)} samples have notes; the first: {escape(noted['notes'].iloc[0][0])}[/yellow]"


def _breakdown(run: SampleRun) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("stage")
    for name in ("mean ms", "share", "median", "p10 … p90"):
        table.add_column(name, justify="right")
    rows, parts = run.breakdown(), run.parts()
    for group in stages.GROUPS:
        mine = rows[rows["classic_stage"] == group.number]
        if not len(mine):
            continue
        share = f"{mine['share'].sum():.1%}"
        table.add_row(f"{group.number} {group.title}", f"{mine['mean_ms'].sum():.2f}", share, "", "", style="bold")
        for name, row in mine.iterrows():
            spread = f"{row['p10_ms']:.2f} … {row['p90_ms']:.2f}"
            cells = (f"{row['mean_ms']:.2f}", f"{row['share']:.1%}", f"{row['median_ms']:.2f}", spread)
            table.add_row(f"    {name}", *cells)
            for part, times in parts.iterrows() if name == "preprocess" else ():
                cells = (f"{times['mean_ms']:.2f}", "", f"{times['median_ms']:.2f}", "")
                table.add_row(f"        {escape(str(part))}", *cells, style="dim")
    table.add_row("total", f"{rows['mean_ms'].sum():.2f}", "100.0%", style="bold")
    return table


def as_dict(run: SampleRun) -> dict[str, Any]:
    """Return what the report shows, and every sample's row, as plain values."""
    return plain(
        {
            "path": str(run.path),
            "model": run.manifest.get("model"),
            "measured": len(run.good),
            "in_error": len(run.bad),
            "stages": run.breakdown().reset_index().to_dict(orient="records") if len(run.good) else [],
            "parts": run.parts().reset_index().to_dict(orient="records") if len(run.good) else [],
            "latency": run.latency() if len(run.good) else {},
            "checks": verdicts_as_dict(verdicts(run)),
            "samples": run.rows.to_dict(orient="records"),
        }
    )
