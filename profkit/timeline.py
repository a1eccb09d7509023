"""One prefill and one decode step as the profiler saw them: stages, scopes, operators, launches, and what ran where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from profkit import stages
from profkit.attribution import Owners, is_launch
from profkit.events import DEVICE, Events, Kind
from profkit.nesting import Forest, side_by_side
from profkit.spans import Spans

MS = 1e6
COLUMNS = ["step", "row", "lane", "name", "kind", "stage", "start_ms", "duration_ms"]


def timeline(
    spans: Spans,
    within: np.ndarray,
    events: Events | None = None,
    owners: Owners | None = None,
    forest: Forest | None = None,
) -> pd.DataFrame:
    """Return the slices of the first prefill step and the last decode step among the segments of a mask.

    Columns: step (its label), row (stages, scopes, operators, launches, or a device and its stream), lane (within the
    row, nested or side by side), name, kind (of a scope: see ledger.Scope; "" of others), stage (of a scope the one in
    which most of its own time lies, "" if it has none; of others the one they belong to), start_ms (from the step's
    beginning on the host), duration_ms. Operators are the outermost ones. Times are those under the profiler.
    `events` and `spans` must be on one clock.
    """
    recorded = np.unique(spans.step[within & (spans.step >= 0)])
    prefill = recorded[spans.steps.prefill[recorded]]
    decode = recorded[~spans.steps.prefill[recorded]]
    parts = []
    for step in (*prefill[:1].tolist(), *decode[-1:].tolist()):
        found = [*_host(spans, step)]
        if events is not None and owners is not None and forest is not None:
            found += _recorded(events, owners, forest, step)
        label = f"{'prefill' if spans.steps.prefill[step] else 'decode'} {step}"
        begin_ns = int(spans.marks.host_ns[spans.steps.start[step]])
        table = pd.concat(found, ignore_index=True)
        table.insert(0, "step", label)
        parts.append(table.assign(start_ms=(table["start_ms"] - begin_ns) / MS, duration_ms=table["duration_ms"] / MS))
    return pd.concat(parts, ignore_index=True)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)


def _frame(
    row: object, lane: object, name: object, stage: object, start_ns: object, length_ns: object, kind: object = ""
) -> pd.DataFrame:
    """Return slices; times still in ns."""
    times = {"start_ms": start_ns, "duration_ms": length_ns}
    columns = {"row": row, "lane": lane, "name": name, "kind": kind, "stage": stage, **times}
    size = len(np.atleast_1d(np.asarray(start_ns)))
    return pd.DataFrame(columns, index=range(size))


def _host(spans: Spans, step: int) -> list[pd.DataFrame]:
    """Return the stretches of stages, and the scopes with a lane for each depth."""
    host = spans.marks.host_ns
    rows = np.flatnonzero((spans.step == step) & (spans.stage >= 0) & (spans.host_ns > 0))
    stage = spans.stage[rows]
    first = np.flatnonzero(np.append(True, stage[1:] != stage[:-1])[: len(stage)])
    last = np.append(first[1:] - 1, len(rows) - 1)[: len(first)]
    begin, end = host[rows[first]], host[rows[last] + 1]
    names = _names(stages.NAMES, stage[first])
    inside = np.flatnonzero(
        (np.append(spans.step, -1)[spans.begin] == step) & ~spans.is_kind("generate") & ~spans.is_kind("sample")
    )
    depth = np.unique(spans.depth[inside], return_inverse=True)[1]
    paths = _names([scope.path for scope in spans.scopes], spans.scope[inside])
    kinds = _names([scope.kind for scope in spans.scopes], spans.scope[inside])
    own = _names([*stages.NAMES, ""], _main_stage(spans)[inside])
    start = host[spans.begin[inside]]
    return [
        _frame("stages", 0, names, names, begin, end - begin),
        _frame("scopes", depth, paths, own, start, spans.total_ns[inside], kinds),
    ]


def _main_stage(spans: Spans) -> np.ndarray:
    """Return for each span the stage in which most of its own time lies, -1 where it has none."""
    rows = np.flatnonzero((spans.owner >= 0) & (spans.stage >= 0))
    count = len(stages.NAMES)
    own_ns = np.zeros(len(spans) * count, dtype=np.int64)
    np.add.at(own_ns, spans.owner[rows] * count + spans.stage[rows], spans.host_ns[rows])
    by_stage = own_ns.reshape(len(spans), count)
    return np.where(by_stage.any(axis=1), by_stage.argmax(axis=1), -1)


def _recorded(events: Events, owners: Owners, forest: Forest, step: int) -> list[pd.DataFrame]:
    """Return the outermost operators, the launches, and what ran on each device's streams."""
    mine = owners.step == step
    operator = events.kind[forest.rows] == Kind.OPERATOR
    outermost = np.zeros(len(events), dtype=bool)
    outermost[forest.rows[operator & (forest.outermost(operator) == np.arange(len(forest)))]] = True
    found = [_of_events(events, owners, np.flatnonzero(mine & outermost), "operators")]
    found.append(_of_events(events, owners, np.flatnonzero(mine & is_launch(events)), "launches"))
    on_device = np.flatnonzero(mine & events.is_kind(*DEVICE))
    places = np.stack([events.device[on_device], events.stream[on_device]])
    for device, stream in np.unique(places, axis=1).T.tolist():
        rows = on_device[(places[0] == device) & (places[1] == stream)]
        found.append(_of_events(events, owners, rows, f"device {events.devices[device]}, stream {stream}"))
    return found


def _of_events(events: Events, owners: Owners, rows: np.ndarray, row: str) -> pd.DataFrame:
    start, length = events.start_ns[rows], events.length_ns[rows]
    lane = side_by_side(np.zeros(len(rows), dtype=np.int64), start, start + length)
    stage = _names([*owners.scopes.stages, ""], owners.stage[rows])
    return _frame(row, lane, _names(events.names, events.name[rows]), stage, start, length)


def _names(names: Sequence[str], numbers: np.ndarray) -> np.ndarray:
    """Return names by number; -1 is the last."""
    table = np.empty(len(names), dtype=object)
    table[:] = names
    return table[numbers]
