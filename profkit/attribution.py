"""Which span owns each event of a profile, and the operators' own time."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from profkit.errors import MeasurementError
from profkit.events import Events
from profkit.spans import NOBODY, Spans

RANGE_PREFIX = "profkit:"
"""Ranges that the profiled pass opens are named by the mark they belong to: `profkit:<mark>`."""


def is_range(events: Events) -> np.ndarray:
    """Return which events are ranges that profkit opened itself."""
    return np.array([name.startswith(RANGE_PREFIX) for name in events.names], dtype=bool)[events.name]


def aligned(spans: Spans, events: Events) -> Spans:
    """Return the spans on the profiler's clock.

    Each range gives the profiler's time of the two marks of its span; marks outside the recorded
    windows are placed by interpolating the difference of the two clocks.
    """
    ranges = events.select(is_range(events))
    if not len(ranges):
        raise MeasurementError("The profile holds none of profkit's ranges; its events cannot be attributed.")
    entry = np.array([int(re.sub(r"\D", "", events.names[name])) for name in ranges.name], dtype=np.int64)
    row = np.searchsorted(spans.begin, entry)
    found = (row < len(spans)) & (spans.begin[np.minimum(row, len(spans) - 1)] == entry)
    row, ranges = row[found], ranges.select(found)
    mark = np.concatenate([spans.begin[row], spans.end[row]])
    there = np.concatenate([ranges.start_ns, ranges.end_ns])
    order = np.argsort(mark)
    mark, there = mark[order], there[order]
    host = spans.marks.host_ns
    offset = there - host[mark]
    base = int(offset[0])
    shift = np.interp(np.arange(len(host)), mark, (offset - base).astype(float))
    moved = host + base + np.rint(shift).astype(np.int64)
    # Clocks are read in slightly different order; time must not run backwards within a thread.
    for thread in np.unique(spans.marks.thread):
        rows = spans.marks.thread == thread
        moved[rows] = np.maximum.accumulate(moved[rows])
    return Spans(replace(spans.marks, host_ns=moved), spans.scopes)


def owning_segment(spans: Spans, events: Events) -> np.ndarray:
    """Return for each event the segment in which it starts, -1 outside all scopes.

    Spans and events must be on one clock. Rule: by the time an operator is called (or a kernel is
    launched), the innermost scope open then.
    """
    first, count = _main_thread(spans)
    times = spans.marks.host_ns[first : first + count]
    segment = np.searchsorted(times, events.start_ns, side="right") - 1
    inside = (segment >= 0) & (segment < count - 1)
    owner = np.append(spans.owner, NOBODY)[np.where(inside, segment + first, NOBODY)]
    return np.where(owner >= 0, segment + first, NOBODY)


def _main_thread(spans: Spans) -> tuple[int, int]:
    """Return (first mark, number of marks) of the thread that runs generate(), the first if several do."""
    runs = np.flatnonzero(spans.root >= 0)
    if not len(runs):
        return 0, 0
    main = np.flatnonzero(spans.marks.thread == spans.marks.thread[spans.begin[runs[0]]])
    return int(main[0]), len(main)


def self_time_ns(events: Events) -> np.ndarray:
    """Return each event's duration less that of the events nested directly inside it, on its thread."""
    order = np.lexsort((-events.duration_ns, events.start_ns, events.thread, events.process))
    ordered = events.select(order)
    parent = enclosing(ordered)
    own = ordered.duration_ns.copy()
    nested = np.flatnonzero(parent >= 0)
    overlap = np.minimum(ordered.end_ns[nested], ordered.end_ns[parent[nested]]) - ordered.start_ns[nested]
    np.subtract.at(own, parent[nested], overlap)
    result = np.empty_like(own)
    result[order] = own
    return result


def enclosing(events: Events) -> np.ndarray:
    """Return for each event the row of the event directly around it on its thread (-1 for none).

    Events must be sorted by process, thread, start, the longer first. The first candidate is the row
    before; while a candidate ended before the event began, the candidate's own candidate takes its place.
    All rows move at once and skip what others skipped already: about log2(n) rounds.
    """
    count = len(events)
    end = events.end_ns
    new_lane = (np.diff(events.process) != 0) | (np.diff(events.thread) != 0)
    lane = np.cumsum(np.append(0, new_lane))[:count]
    parent = np.arange(-1, count - 1)
    pending = np.arange(count)
    while len(pending):
        candidate = parent[pending]
        elsewhere = (candidate >= 0) & (lane[candidate] != lane[pending])
        parent[pending[elsewhere]] = NOBODY
        ended = (candidate >= 0) & ~elsewhere & (end[candidate] <= events.start_ns[pending])
        pending = pending[ended]
        parent[pending] = parent[parent[pending]]
    return parent
