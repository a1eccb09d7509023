"""The sections of the page that hold several runs side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from profkit import comparison, figures, page, roofline_page, stats
from profkit.comparison import Measured
from profkit.errors import InputError
from profkit.page import Column
from profkit.sample_runs import Saved

COLUMNS = (
    *(
        Column("what", ""),
        Column("base_ms", "first ms", 3),
        Column("base_low", "from", 3),
        Column("base_high", "to", 3),
    ),
    *(Column("other_ms", "second ms", 3), Column("other_low", "from", 3), Column("other_high", "to", 3)),
    *(Column("ratio", "ratio", 3), Column("ratio_low", "from", 3), Column("ratio_high", "to", 3)),
    Column("said", "differs"),
)


def sections(saved: Sequence[Saved]) -> Iterator[str]:
    """Yield the bars of all runs, then each one against the first; what cannot be compared is named."""
    measured, left_out = _measured(saved)
    if left_out:
        yield page.items([f"not compared: {said}" for said in left_out], "failure")
    if not measured:
        return
    medians = {one.name: {str(name): float(one.times[name].median()) for name in one.times} for one in measured}
    yield page.figure(figures.stage_bars(medians, "ms, medians"), "side-by-side")
    yield page.paragraph(_of_medians(measured, medians), "note")
    base, *others = measured
    for other in others:
        yield page.section(f"{other.name} over {base.name}", _pair(base, other))


def _measured(saved: Sequence[Saved]) -> tuple[list[Measured], list[str]]:
    """Return what the runs measured, under names of their own, and a sentence for each that measured nothing."""
    found = [_read(one) for one in saved]
    measured = [one for one in found if isinstance(one, Measured)]
    # The same directory name in two places, or one run given twice.
    return comparison.told_apart(measured), [one for one in found if isinstance(one, str)]


def _read(one: Saved) -> Measured | str:
    try:
        return comparison.measured(one)
    except InputError as error:
        return str(error)


def _of_medians(measured: Sequence[Measured], medians: dict[str, dict[str, float]]) -> str:
    """Return why a bar is not as long as the table's total says: medians do not add up."""
    ends = [sum(medians[one.name].values()) for one in measured]
    totals = [stats.median(one.times.sum(axis=1).to_numpy()) for one in measured]
    said = [
        f"{one.name}: {end:.1f} ms here, {total:.1f} ms there"
        for one, end, total in zip(measured, ends, totals, strict=True)
    ]
    return (
        "Each part of a bar is the median of its stage, over repeats or samples. Medians do not add up: a bar's end is "
        f"not the median of the totals, which the tables show ({'; '.join(said)})."
    )


def _pair(base: Measured, other: Measured) -> Iterator[str]:
    rows = comparison.compare(base, other).reset_index()
    if not len(rows):
        yield page.paragraph("There is nothing that both measured.", "failure")
        return
    rows["said"] = _said(rows)
    yield page.paragraph(comparison.gap(base, other).sentence(base.name, other.name), "answer")
    yield page.table(rows, COLUMNS)
    yield page.paragraph(
        f"Medians of host time with 95 % intervals, of {len(base.times)} and {len(other.times)} "
        f"{'repeats' if base.ids is None else 'samples or repeats'}; – where they are too few to tell.",
        "note",
    )
    yield from roofline_page.side_by_side(base, other)
    yield page.items([f"not alike: {said}" for said in comparison.unlike(base, other)], "warning")
    failed = [f"{one.name} failed checks: {', '.join(one.failed)}" for one in (base, other) if one.failed]
    yield page.items(failed, "failure")


def _said(rows: pd.DataFrame) -> list[str]:
    return [
        "beyond chance" if differs else "not beyond chance" if enough else "too few repeats"
        for differs, enough in zip(rows["differs"], rows["enough"], strict=True)
    ]
