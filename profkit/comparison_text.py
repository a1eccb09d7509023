"""Compared runs as text for the terminal, and as plain values for --json."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
from rich.markup import escape
from rich.table import Table

from profkit import stages, work_comparison
from profkit.comparison import Measured, compare, gap, unlike
from profkit.directories import plain


def report(base: Measured, others: Sequence[Measured]) -> Iterator[Table | str]:
    """Yield each comparison with the first run."""
    for other in others:
        yield f"[bold]{escape(other.name)}[/bold] over [bold]{escape(base.name)}[/bold]"
        yield _table(compare(base, other))
        yield from _counted(work_comparison.side_by_side(base.counted, other.counted))
        yield f"[bold]{escape(gap(base, other).sentence(base.name, other.name))}[/bold]"
        for one in (base, other):
            if one.failed:
                yield f"[red]{escape(one.name)} failed checks: {escape(', '.join(one.failed))}[/red]"
        for said in unlike(base, other):
            yield f"[yellow]not alike: {escape(said)}[/yellow]"
    yield "[dim]medians of host time with 95 % intervals; * marks what differs beyond chance[/dim]"
    if base.ids is None:
        said = "runs made one after the other: what the machine did meanwhile looks like a difference"
        yield f"[dim]{said}; profkit.trace_together() measures in turn[/dim]"


def _table(rows: pd.DataFrame) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("first ms", "interval", "second ms", "interval", "ratio", "interval"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, row in rows.iterrows():
        name, mark = str(label), " *" if row["differs"] else ""
        cells = (
            *(_number(row["base_ms"]), _interval(row["base_low"], row["base_high"])),
            *(_number(row["other_ms"]), _interval(row["other_low"], row["other_high"])),
            *(f"{_number(row['ratio'])}{mark}", _interval(row["ratio_low"], row["ratio_high"])),
        )
        table.add_row(escape(name), *cells, style=None if name in stages.NAMES else "bold")
    return table


def _counted(rows: pd.DataFrame) -> Iterator[Table]:
    """Yield the table of work and limits, if both runs have them."""
    if len(rows):
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("work, and how far from the limit")
        for name in ("first", "second", "ratio"):
            table.add_column(name, justify="right", no_wrap=True)
        for what, row in rows.iterrows():
            table.add_row(escape(str(what)), *(f"{row[one]:.4g}" for one in ("base", "other", "ratio")))
        yield table


def _number(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _interval(low: float, high: float) -> str:
    return "–" if pd.isna(low) else f"{_number(low)} … {_number(high)}"


def as_dict(base: Measured, others: Sequence[Measured]) -> dict[str, Any]:
    """Return what the report shows, as plain values."""
    return plain(
        {
            "base": base.name,
            "comparisons": [
                {
                    "other": other.name,
                    "rows": compare(base, other).reset_index().to_dict(orient="records"),
                    "work": work_comparison.side_by_side(base.counted, other.counted)
                    .reset_index()
                    .to_dict(orient="records"),
                    "gap": {"total_ms": split.total_ms, "output_length_ms": split.output_length_ms},
                    "sentence": split.sentence(base.name, other.name),
                    "not_alike": unlike(base, other),
                    "failed_checks": {base.name: base.failed, other.name: other.failed},
                }
                for other in others
                for split in [gap(base, other)]
            ],
        }
    )
