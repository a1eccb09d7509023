"""The roofline of a run as part of its page: a plot with a point for each stage, and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from profkit import doubts, figures, page, roofline_text, work_comparison
from profkit.comparison import Measured
from profkit.page import Column
from profkit.roofline import Roofline
from profkit.run import Run

MOST_STEPS = 100
"""Rows of the table of steps: those that follow lie on a line with them."""


def section(run: Run, key: str) -> Iterator[str]:
    """Yield what a run's page says of its limits; where something is missing, what."""
    if run.work is None:
        lost = run.damage_of("work.parquet")
        said = f"Work was counted, and {lost}." if lost else "Work was not counted: this run holds no FLOPs and bytes."
        yield page.paragraph(said, "note")
        return
    if run.ceilings is None:
        yield page.paragraph(
            "No ceilings of the device are known: profkit roofline RUN measures and keeps them.", "note"
        )
        yield page.table(_readable(run.work.stages()), WORK)
        return
    found = run.roofline()
    yield page.paragraph(summary(found), "answer")
    for doubt in doubts.of(found):
        yield page.paragraph(f"{doubt}.", "note")
    if found.clock:
        yield page.figure(plot(found), f"{key}-roofline")
    else:
        yield page.paragraph("There are floors alone: the marks of the passes, which tell the times, are lost.", "note")
    yield page.table(_readable(found.stages), [*WORK, *ANSWERS])
    yield page.paragraph(
        f"{roofline_text.floor_meaning(found)}; ratio to it: time over floor; {roofline_text.NO_FORMULA}.", "note"
    )
    yield page.paragraph(roofline_text.media_line(found))
    yield page.paragraph(line) if (line := roofline_text.energy_line(run.manifest.get("energy"))) else ""
    yield page.fold("Every step", [page.table(_readable(found.steps), STEPS, MOST_STEPS)])
    if len(found.what_if):
        yield page.fold(
            "Other batches, fewer bits: by arithmetic, nothing was run", [page.table(found.what_if, CHANGES)]
        )
    yield page.fold("Operators without a FLOP formula", [page.table(found.without_formula, SILENT)])
    yield page.fold("Ceilings of this device", [page.table(_ceilings(found), CEILINGS)])
    yield page.paragraph(roofline_text.how_counted(found), "note")


WORK = [
    *(Column("stage", "stage"), Column("gflop", "GFLOP", 3), Column("megabytes", "MB, floor", 2)),
    *(Column("operator_megabytes", "MB, operators", 1), Column("operators", "operators", 0)),
]
ANSWERS = [
    *(Column("time_ms", "ms"), Column("intensity", "FLOPs a byte"), Column("mfu", "MFU", percent=True)),
    *(Column("mbu", "MBU", percent=True), Column("floor_ms", "floor ms", 3), Column("ratio", "ratio to it", 1)),
    *(Column("binds", "binds"), Column("no_formula", "no formula", percent=True)),
]
STEPS = [
    *(Column("step", "step", 0), Column("phase", "phase"), Column("time_ms", "ms"), Column("gflop", "GFLOP", 3)),
    *(Column("weight_megabytes", "weights, MB", 2), Column("cache_read_megabytes", "cache read, MB", 3)),
    *(Column("cache_written_megabytes", "written, MB", 3), Column("mfu", "MFU", percent=True)),
    *(Column("mbu", "MBU", percent=True), Column("floor_ms", "floor ms", 3), Column("ratio", "ratio to it", 1)),
    *(Column("binds", "binds"), Column("counted", "counted")),
]
CHANGES = [
    *(Column("bits", "bits a weight", 0), Column("batch", "batch", 0), Column("floor_ms", "floor ms", 3)),
    *(Column("tokens_per_s", "tokens/s at most", 0), Column("times", "times", 1), Column("binds", "binds")),
]
SILENT = [Column("name", "operator"), Column("calls", "calls", 0), Column("share", "share of time", percent=True)]
CEILINGS = [
    *(Column("what", "ceiling"), Column("unit", "unit"), Column("median", "median"), Column("spread", "spread")),
    Column("datasheet", "datasheet"),
]


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with columns of GFLOP and MB beside those of FLOPs and bytes."""
    sizes = [name for name in table.columns if name.endswith("bytes")]
    megabytes = {name.replace("bytes", "megabytes"): table[name] / 1e6 for name in sizes}
    return table.assign(gflop=table["flops"] / 1e9, **megabytes).reset_index()


def side_by_side(base: Measured, other: Measured) -> Iterator[str]:
    """Yield the table of two runs' work and limits, if both have them."""
    rows = work_comparison.side_by_side(base.counted, other.counted).reset_index()
    if len(rows):
        names = (
            ("what", "work, and how far from the limit"),
            ("base", "first"),
            ("other", "second"),
            ("ratio", "ratio"),
        )
        yield page.table(rows, [Column(name, title, 3) for name, title in names])


def summary(found: Roofline) -> str:
    """Return the answer in a sentence: floors of TTFT and TPOT, and the stage that loses most against its own."""
    one = found.latencies
    pairs = (("TTFT", one.ttft_ms, one.ttft_floor_ms), ("TPOT", one.tpot_ms, one.tpot_floor_ms))
    said = [_against(*pair) for pair in pairs if pair[2] > 0]
    above = (found.stages["time_ms"] - found.stages["floor_ms"]).dropna()
    if len(above):
        said.append(f"{above.idxmax()} is {above.max():.1f} ms above its floor, more than any other stage")
    return f"{'; '.join(said)}."


def _against(name: str, took_ms: float, floor_ms: float) -> str:
    if math.isnan(took_ms):
        return f"the floor of {name} is {floor_ms:.2f} ms"
    return f"{name} is {took_ms:.2f} ms against a floor of {floor_ms:.2f} ms (×{took_ms / floor_ms:.1f})"


def _ceilings(found: Roofline) -> pd.DataFrame:
    rows = [
        (what, unit, roofline_text.amount(one.median), f"{one.spread:.1%}", roofline_text.amount(stated))
        for what, unit, one, stated in found.limits.ceilings.rows()
    ]
    return pd.DataFrame(rows, columns=["what", "unit", "median", "spread", "datasheet"])


def plot(found: Roofline) -> go.Figure:
    """Return FLOP/s over FLOPs a byte, on logarithms: the roof of each dtype in use, and a point for each stage."""
    table = found.stages[(found.stages["flops"] > 0) & (found.stages["time_ms"] > 0) & (found.stages["bytes"] > 0)]
    rates = table["flops"] / table["time_ms"] * 1e3
    peaks = {name: found.limits.ceilings.peak(name) for name in dict.fromkeys(_dtypes(found, table.index))}
    memory = found.limits.ceilings.bytes_per_s
    bandwidth = roofline_text.amount(memory, "B/s")
    fig = go.Figure()
    for dtype, peak in peaks.items():
        ridge = peak / memory
        low = min([ridge / 100, *(table["intensity"] / 3)])
        high = max([ridge * 100, *(table["intensity"] * 3)])
        x = np.array([low, ridge, high])
        fig.add_scatter(
            x=x.tolist(),
            y=np.minimum(x * memory, peak).tolist(),
            mode="lines",
            line={"color": figures.OTHER_COLOUR},
            name=f"roof, {dtype}",
            hovertemplate=f"{roofline_text.amount(peak, 'FLOP/s')}, {bandwidth}<extra></extra>",
        )
    xs, ys = np.log10(table["intensity"].to_numpy(float)), np.log10(rates.to_numpy(float))
    roofs_x, roofs_y = (np.log10([value for one in fig.data for value in one[axis]]) for axis in "xy")
    axes = ((roofs_x, xs), (roofs_y, ys))
    decades = tuple(float(np.ptp([*roofs, *points, points[0]])) if len(points) else 1.0 for roofs, points in axes)
    places = dict(zip(table.index, label_places([*map(str, table.index)], xs, ys, decades), strict=True))
    for stage, row in table.sort_values("intensity").iterrows():
        fig.add_scatter(
            x=[float(row["intensity"])],
            y=[float(rates[stage])],
            mode="markers+text",
            text=[str(stage)],
            textposition=places[stage],
            marker={"size": 11, "color": figures.colour_of(stage)},
            name=str(stage),
            hovertemplate=f"{stage}: %{{y:.3s}}FLOP/s, %{{x:.3g}} FLOPs a byte, {row['attained']:.0%} of what is "
            "attainable<extra></extra>",
        )
    fig.update_xaxes(title="FLOPs a byte that must move", type="log", dtick=1)
    fig.update_yaxes(title="FLOP/s", type="log", dtick=1, exponentformat="SI")
    return figures.styled(fig, 420)


PLOT = (700, 300)
"""About what a plot's axes take, in pixels."""
POINT, LETTER, LINE = 7, 8, 16
PLACES = {
    "middle right": (1, 0),
    "middle left": (-1, 0),
    "top center": (0, 1),
    "bottom center": (0, -1),
    "top right": (1, 1),
    "bottom left": (-1, -1),
    "top left": (-1, 1),
    "bottom right": (1, -1),
}
"""Where a name may stand beside its point: plotly's word, and the way there."""


def label_places(names: list[str], x: np.ndarray, y: np.ndarray, decades: tuple[float, ...]) -> list[str]:
    """Return where each point's name stands so that it covers no point and no other name, if there is such a place.

    `x` and `y` are logarithms, `decades` the width and the height of the plot in them.
    """
    at_x, at_y = (one * size / max(span, 1.0) for one, size, span in zip((x, y), PLOT, decades, strict=True))
    taken = [(px - POINT, px + POINT, py - POINT, py + POINT) for px, py in zip(at_x, at_y, strict=True)]
    found = []
    for number, name in enumerate(names):
        others = taken[:number] + taken[number + 1 :]
        boxes = {place: _box(at_x[number], at_y[number], name, *way) for place, way in PLACES.items()}
        best = min(boxes, key=lambda place: sum(_overlap(boxes[place], one) for one in others))
        found.append(best)
        taken.append(boxes[best])
    return found


def _box(x: float, y: float, name: str, right: int, up: int) -> tuple[float, float, float, float]:
    """Return left, right, bottom and top of a name that stands on one side of a point."""
    half_width, half_height = len(name) * LETTER / 2, LINE / 2
    middle_x = x + right * (POINT + half_width)
    middle_y = y + up * (POINT + half_height)
    return middle_x - half_width, middle_x + half_width, middle_y - half_height, middle_y + half_height


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    wide = min(one[1], other[1]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[2], other[2])
    return max(wide, 0.0) * max(high, 0.0)


def _dtypes(found: Roofline, names: pd.Index) -> list[str]:
    """Return the dtype of each stage, those without a ceiling left out."""
    limits = found.limits
    return [one for name in names if (one := limits.dtype_of(str(name))) in limits.ceilings.flops_per_s]
