"""Plotly figures of a run: where the time went, over steps, over layers, as a tree, and slice by slice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from profkit import pace, stages
from profkit.hierarchy import layer_table
from profkit.page import label
from profkit.run import Run
from profkit.spans import Spans

CLOCKS = {"host_ms": "host clock", "device_ms": "device clock", "busy_ms": "device busy"}
HEIGHT_OF_ROW = 22
OTHER_COLOUR = "#8a8f98"
SCOPE_COLOURS = {
    "layer": "#4f6f8f",
    "module": "#7f95ab",
    "stack": "#35506b",
    "decoder": "#35506b",
    "forward": "#5f5f7a",
    "features": "#6f8f86",
    "prepare": "#8f8672",
}
"""Of the kinds of scopes (see ledger.Scope): quieter than those of the stages, and none of them."""
TOP, BELOW_AXIS, LEGEND_ROW, LEGEND_ENTRIES = 30, 52, 19, 5
"""Margins of a figure: above, below for the axis' numbers and title, and for the legend, a row of so many entries on
a narrow page."""


def colour_of(stage: object) -> str:
    """Return the colour of a stage, grey for what is none."""
    found = stages.BY_NAME.get(str(stage))
    return found.colour if found else OTHER_COLOUR


def styled(fig: go.Figure, height: int, **layout: object) -> go.Figure:
    """Return a figure whose background is the page's; the page gives it its colours."""
    entries = sum(getattr(trace, "showlegend", None) is not False for trace in fig.data)
    legend_px = LEGEND_ROW * math.ceil(entries / LEGEND_ENTRIES)
    fig.update_layout(
        template="none",
        height=height,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 70, "r": 20, "t": TOP, "b": BELOW_AXIS + legend_px},
        # At the figure's end: whatever rows a narrow page makes of it push the axis up rather than cross its title.
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0, "traceorder": "normal"},
        xaxis_title_standoff=8,
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": OTHER_COLOUR},
        **layout,
    )
    return fig


def stage_bars(rows: Mapping[str, Mapping[str, float]], unit: str = "ms") -> go.Figure:
    """Return a bar for each row, split into stages: {title: {stage: ms}}; `unit` is the axis' title."""
    present = [name for name in stages.NAMES if any(name in row for row in rows.values())]
    titles = list(rows)
    fig = go.Figure(
        [
            go.Bar(
                name=f"{stages.BY_NAME[name].group.number} {name}",
                y=[label(title) for title in titles],
                x=[rows[title].get(name, 0.0) for title in titles],
                orientation="h",
                marker_color=colour_of(name),
                hovertemplate=f"{name}: %{{x:.3f}} ms<extra>{stages.BY_NAME[name].meaning}</extra>",
            )
            for name in present
        ]
    )
    fig.update_yaxes(autorange="reversed", automargin=True, ticksuffix=" ")
    fig.update_xaxes(title=unit)
    return styled(fig, 200 + 44 * len(titles), barmode="stack")


def of_clocks(run: Run) -> dict[str, dict[str, float]]:
    """Return the rows of stage_bars() for the clocks that a run has."""
    table = run.stages()
    known = [name for name in CLOCKS if table[name].notna().any()]
    return {CLOCKS[name]: {str(stage): float(ms) for stage, ms in table[name].dropna().items()} for name in known}


def step_lines(run: Run, cache_bytes: Sequence[int] | None) -> go.Figure:
    """Return the time per decode step: the median over passes, its spread, and what stands out."""
    table = _iterations(run)
    decode = table[table["phase"] == "decode"]
    fig = go.Figure()
    band = {"mode": "lines", "line_width": 0, "hoverinfo": "skip", "showlegend": False}
    fig.add_scatter(x=decode["step"], y=decode["p90_ms"], **band)
    fig.add_scatter(x=decode["step"], y=decode["p10_ms"], fill="tonexty", fillcolor="rgba(243,160,36,0.25)", **band)
    fig.add_scatter(
        x=decode["step"],
        y=decode["median_ms"],
        mode="lines",
        line_color=colour_of("decode"),
        name="median over passes" if run.clean else "the pass of median total",
        hovertemplate="step %{x}: %{y:.3f} ms<extra></extra>",
    )
    slow = pace.outliers(run.representative, run.clean) if run.clean else []
    fig.add_scatter(
        x=[one.step for one in slow],
        y=[one.iteration_ms for one in slow],
        mode="markers",
        name="stands out (shown pass)",
        marker={"color": colour_of("head"), "size": 9, "symbol": "diamond"},
        text=[label(one.sentence(), 400) for one in slow],
        hovertemplate="%{text}<extra></extra>",
    )
    if cache_bytes:
        fig.add_scatter(
            x=list(range(len(cache_bytes))),
            y=[size / 2**20 for size in cache_bytes],
            name="cache",
            yaxis="y2",
            line={"color": colour_of("vision"), "dash": "dot"},
            hovertemplate="after step %{x}: %{y:.2f} MiB<extra></extra>",
        )
        fig.update_layout(
            yaxis2={
                "overlaying": "y",
                "side": "right",
                "title": "cache, MiB",
                "rangemode": "tozero",
                "showgrid": False,
                "tickmode": "auto",
            }
        )
    fig = styled(fig, 340)
    # Not update_yaxes(): that would give the cache's axis the title of the times, too.
    fig.update_layout(
        xaxis={"title": "decode step", "tickformat": "d"}, yaxis={"title": "ms a token", "rangemode": "tozero"}
    )
    return fig.update_layout(margin_r=80) if cache_bytes else fig


def _iterations(run: Run) -> pd.DataFrame:
    """Return the time of each step over the passes (see pace); of the one that was saved, where the rest is lost."""
    if run.clean:
        return pace.iterations(run.clean)
    table = run.steps()
    return table.assign(step=np.arange(len(table)), median_ms=table["iteration_ms"], p10_ms=np.nan, p90_ms=np.nan)


def layer_map(spans: Spans) -> go.Figure | None:
    """Return the decoder's layers over steps; None if they were not probed. The scale is cut at the 99th percentile
    of the decode steps, as a prefill would leave the rest one colour."""
    table = layer_table(spans)
    if not table.size:
        return None
    values = table.to_numpy(dtype=np.float32)
    decode = values[:, ~spans.steps.prefill[table.columns.to_numpy()]]
    shown = decode if decode.size else values
    top = float(np.nanpercentile(shown, 99)) * 1.05
    fig = go.Figure(
        go.Heatmap(
            z=values,
            x=table.columns.to_numpy(),
            y=[label(str(path)) for path in table.index],
            colorscale="Viridis",
            zmin=0.0,
            zmax=top,
            colorbar={"title": "ms"},
            hovertemplate="%{y}, step %{x}: %{z:.3f} ms<extra></extra>",
        )
    )
    fig.update_yaxes(autorange="reversed", automargin=True, showgrid=False)
    fig.update_xaxes(title="step (0: prefill)", showgrid=False)
    return styled(fig, max(220, 80 + 16 * len(table))).update_layout(margin_b=55)


def icicle(trees: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Return trees (see hierarchy) of which the first is shown; the page's buttons show another."""
    fig = go.Figure()
    for number, tree in enumerate(trees.values()):
        names = [label(str(one)) for one in tree["label"]]
        tops = tree[tree["parent"] < 0]
        # What groups scopes is called by nobody.
        called = [f", calls {one}" if one else "" for one in tree["calls"].astype(int)]
        own = [*zip(tree["self_ms"].round(6).tolist(), called, strict=True)]
        fig.add_trace(
            go.Icicle(
                # Without a root of its own, plotly leaves a column for one empty.
                ids=["all", *(str(one) for one in tree["id"])],
                parents=["", *("all" if one < 0 else str(one) for one in tree["parent"])],
                labels=["all", *_short(tree, names)],
                hovertext=["all", *names],
                values=np.append(tops["total_ms"].sum(), tree["total_ms"]),
                # As lists: the page reads rows of two, which plotly would pack into bytes.
                customdata=[[0.0, ""], *map(list, own)],
                branchvalues="total",
                maxdepth=12,
                marker={"colors": [OTHER_COLOUR, *(colour_of(name) for name in _stage_of(tree))]},
                hovertemplate="%{hovertext}<br>total %{value:.3f} ms, own %{customdata[0]:.3f} ms"
                "%{customdata[1]}<br>%{percentRoot:.1%} of all<extra></extra>",
                visible=number == 0,
            )
        )
    return styled(fig, 620).update_layout(margin={"l": 5, "r": 5, "t": 10, "b": 10})


def _short(tree: pd.DataFrame, names: list[str]) -> list[str]:
    """Return names without what the name of the node above says already."""
    above = [names[parent] + "." if parent >= 0 else "" for parent in tree["parent"].tolist()]
    return [name.removeprefix(prefix) if prefix else name for name, prefix in zip(names, above, strict=True)]


def _stage_of(tree: pd.DataFrame) -> list[str]:
    """Return for each node the stage at its top; parents stand before their children."""
    found: list[str] = []
    for parent, name in zip(tree["parent"].tolist(), tree["label"].tolist(), strict=True):
        found.append(name if parent < 0 else found[parent])
    return found


def timeline(slices: pd.DataFrame, step: str) -> go.Figure:
    """Return one step of a run's timeline: a row for each kind of slice, or device and stream, and its lanes."""
    mine = slices[slices["step"] == step]
    places = mine[["row", "lane"]].drop_duplicates()
    order = {name: number for number, name in enumerate(dict.fromkeys(mine["row"]))}
    places = places.assign(rank=places["row"].map(order)).sort_values(["rank", "lane"])
    level = {(row, lane): number for number, (row, lane) in enumerate(zip(places["row"], places["lane"], strict=True))}
    mine = mine.assign(y=[level[place] for place in zip(mine["row"], mine["lane"], strict=True)])
    # Earlier runs kept of a scope the stage it begins in, which says nothing of the rest of it.
    unknown = (mine["row"] == "scopes") & (mine["kind"] == "")
    mine = mine.assign(kind=mine["kind"].mask(unknown, "scope"), stage=mine["stage"].mask(unknown, "?"))
    fig = go.Figure()
    # What a scope is says its colour, as it may run through many stages; what anything else belongs to, its stage's.
    for (kind, stage), rows in mine.groupby(["kind", mine["stage"].where(mine["kind"] == "", "")], sort=False):
        title = f"scope: {kind}".removesuffix(": scope") if kind else str(stage) or "outside"
        fig.add_trace(_bars(rows, title, SCOPE_COLOURS.get(str(kind), OTHER_COLOUR) if kind else colour_of(stage)))
    titles = [row if lane == 0 else "" for row, lane in level]
    fig.update_yaxes(
        tickvals=list(range(len(level))), ticktext=[label(one) for one in titles], autorange="reversed", automargin=True
    )
    fig.update_xaxes(title="ms since the step began, under the profiler")
    return styled(fig, 150 + HEIGHT_OF_ROW * len(level), hovermode="closest")


def _bars(rows: pd.DataFrame, title: str, colour: str) -> go.Scatter:
    """Return slices as one line with gaps, which a browser draws at once: begin, middle, end, gap."""
    start, length = rows["start_ms"].to_numpy(), rows["duration_ms"].to_numpy()
    x = np.stack([start, start + length / 2, start + length, np.full(len(rows), np.nan)], axis=1).ravel()
    columns = (rows[name] for name in ("name", "duration_ms", "kind", "stage"))
    text = [_slice_text(*one) for one in zip(*columns, strict=True)]
    return go.Scatter(
        x=x.astype(np.float32),
        y=np.repeat(rows["y"].to_numpy(), 4).astype(np.int16),
        text=[one for said in text for one in ("", said, "", "")],
        mode="lines",
        line={"width": HEIGHT_OF_ROW - 8, "color": colour},
        opacity=0.85,
        name=title,
        hovertemplate="%{text}<extra></extra>",
    )


def _slice_text(name: object, ms: float, kind: str, stage: str) -> str:
    said = f"{label(str(name), 70)}<br>{ms:.4f} ms, "
    if not kind:
        return said + (label(stage) or "of no stage")
    if stage == "?":
        return said + label(kind)
    return said + label(kind) + (f"; most of its own time in {label(stage)}" if stage else "; no time of its own")
