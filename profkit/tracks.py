"""profkit's own part of a trace, on the profiler's clock: stages, steps and layers, counters, arrows to kernels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from profkit import stages
from profkit.annotate import Counter, Flow, Slice, Track
from profkit.attribution import Owners, owning_segment
from profkit.events import DEVICE, Events
from profkit.spans import Spans


def of(spans: Spans, recorded: np.ndarray) -> list[Track]:
    """Return the tracks for the segments in `recorded` (a mask): what the profiler saw."""
    return [
        Track("stages", _stage_slices(spans, recorded)),
        Track("steps", _step_slices(spans, recorded)),
        Track("layers", _layer_slices(spans, recorded)),
    ]


def _stage_slices(spans: Spans, recorded: np.ndarray) -> list[Slice]:
    """One slice for each stretch of segments in one stage."""
    stage = np.where(recorded & (spans.host_ns > 0), spans.stage, -1)
    rows = np.flatnonzero(stage >= 0)
    if not len(rows):
        return []
    # Segments without length lie in no stage; a stretch goes on across them.
    adjacent = spans.marks.host_ns[rows[1:]] == spans.marks.host_ns[rows[:-1] + 1]
    starts = np.append(True, (stage[rows[1:]] != stage[rows[:-1]]) | (spans.step[rows[1:]] != spans.step[rows[:-1]]))
    starts[1:] |= ~adjacent
    first = rows[np.flatnonzero(starts)]
    last = rows[np.append(np.flatnonzero(starts)[1:] - 1, len(rows) - 1)]
    begin, end = spans.marks.host_ns[first], spans.marks.host_ns[last + 1]
    return [
        Slice(name, start, stop - start, {**_step_args(spans, step), "meaning": meaning})
        for name, meaning, start, stop, step in zip(
            [stages.NAMES[number] for number in stage[first]],
            [stages.STAGES[number].meaning for number in stage[first]],
            begin.tolist(),
            end.tolist(),
            spans.step[first].tolist(),
            strict=True,
        )
    ]


def _step_args(spans: Spans, step: int) -> dict[str, object]:
    if step < 0:
        return {}
    prefill = bool(spans.steps.prefill[step])
    return {"step": step, "phase": "prefill" if prefill else "decode", "tokens": int(spans.steps.tokens[step])}


def _step_slices(spans: Spans, recorded: np.ndarray) -> list[Slice]:
    """One slice a recorded step, from its input preparation to the selection of its token."""
    steps, host = spans.steps, spans.marks.host_ns
    shown = np.unique(spans.step[recorded & (spans.step >= 0)])
    return [
        Slice(
            f"prefill {step}" if steps.prefill[step] else f"decode {step}",
            int(host[steps.start[step]]),
            int(host[steps.stop[step]] - host[steps.start[step]]),
            _step_args(spans, step),
        )
        for step in shown.tolist()
    ]


def _layer_slices(spans: Spans, recorded: np.ndarray) -> list[Slice]:
    """Towers, projectors, decoder, head, and the layers with their parts, nested."""
    placed = np.append(recorded, False)[spans.begin]
    modules = ~(spans.is_kind("sample") | spans.is_kind("generate") | spans.is_kind("input"))
    rows = np.flatnonzero(placed & modules & (spans.root >= 0) & (spans.total_ns > 0))
    begin = spans.marks.host_ns[spans.begin[rows]].tolist()
    total = spans.total_ns[rows].tolist()
    step = spans.step[spans.begin[rows]].tolist()
    paths = [spans.scopes[number].path for number in spans.scope[rows]]
    return [
        Slice(_short(path), start, length, {**_step_args(spans, number), "module": path})
        for path, start, length, number in zip(paths, begin, total, step, strict=True)
    ]


def _short(path: str) -> str:
    """Return the end of a path, with the number of a layer kept beside its list's name."""
    *above, last = path.split(".")
    return f"{above[-1]}.{last}" if last.isdigit() and above else last


def counters(spans: Spans, recorded: np.ndarray, **by_step: Mapping[int, float]) -> list[Counter]:
    """Return what changes from step to step: tokens in the context, and each series of values by step.

    A value stands from the beginning of its step's iteration; those that nothing is known of have no counter.
    """
    steps, host = spans.steps, spans.marks.host_ns
    shown = np.unique(spans.step[recorded & (spans.step >= 0)]).tolist()
    known = np.maximum(steps.tokens, 0)
    read = np.cumsum(known)
    first = np.searchsorted(steps.call, steps.call)
    context = read - (read - known)[first] if len(steps) else read
    series: dict[str, Mapping[int, float]] = {"tokens": dict(enumerate(context.tolist())), **by_step}
    return [
        Counter(name, [(int(host[steps.start[step]]), float(values[step])) for step in shown if step in values])
        for name, values in series.items()
        if any(step in values for step in shown)
    ]


def flows(spans: Spans, events: Events, owners: Owners) -> list[Flow]:
    """Return an arrow from each recorded scope to the first of what it launched itself."""
    rows = np.flatnonzero(events.is_kind(*DEVICE) & (owners.launch >= 0))
    launch_ns = events.start_ns[owners.launch[rows]]
    span = np.append(spans.owner, -1)[owning_segment(spans, launch_ns)]
    order = np.lexsort((launch_ns, span))
    order = order[span[order] >= 0]
    first = order[np.append(True, np.diff(span[order]) != 0)[: len(order)]]
    return [
        Flow("layers", when_ns, (process, thread), to_ns)
        for when_ns, process, thread, to_ns in zip(
            launch_ns[first].tolist(),
            *(column[rows[first]].tolist() for column in (events.process, events.thread, events.start_ns)),
            strict=True,
        )
    ]
