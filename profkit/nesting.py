"""How events nest on their threads: who is around whom, and the time that is an event's own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from profkit.events import NOTHING, Events


@dataclass(frozen=True)
class Forest:
    """The nesting of some events; positions are those of `rows`, sorted by thread, start, the longer first.

    `rows` are the events' positions in the table they come from, `parent` the position of the event directly around
    each one on its thread (NOTHING at the top), `lane` the number of the thread.
    """

    rows: np.ndarray
    parent: np.ndarray
    lane: np.ndarray
    start_ns: np.ndarray
    duration_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def self_ns(self) -> np.ndarray:
        """Return each event's duration less that of the events directly inside it.

        A child that a coarse clock lets end after its parent takes from it only what lies inside; a negative duration
        counts as none.
        """
        own = np.maximum(self.duration_ns, 0)
        child = np.flatnonzero(self.parent >= 0)
        around = self.parent[child]
        end = np.minimum(self.start_ns[child] + np.maximum(self.duration_ns[child], 0), (self.start_ns + own)[around])
        np.subtract.at(own, around, np.maximum(end - self.start_ns[child], 0))
        return own

    def overhanging(self) -> int:
        """Return how many events end after the event around them."""
        child = np.flatnonzero(self.parent >= 0)
        around = self.parent[child]
        end = self.start_ns + self.duration_ns
        return int((end[child] > end[around]).sum())

    def nearest(self, wanted: np.ndarray) -> np.ndarray:
        """Return for each event the nearest one around it, itself included, where `wanted` holds (or NOTHING)."""
        size = len(self)
        nowhere = size
        step = np.append(np.where(wanted, np.arange(size), np.where(self.parent >= 0, self.parent, nowhere)), nowhere)
        while True:
            further = step[step]
            if np.array_equal(further, step):
                return np.where(step[:-1] == nowhere, NOTHING, step[:-1])
            step = further

    def outermost(self, wanted: np.ndarray) -> np.ndarray:
        """Return for each event the outermost one around it, itself included, where `wanted` holds (or NOTHING)."""
        nearest = self.nearest(wanted)
        # For each wanted one the next wanted one around it; itself where there is none.
        around = np.append(nearest, NOTHING)[self.parent]
        step = np.where(around >= 0, around, np.arange(len(self)))
        while not np.array_equal(further := step[step], step):
            step = further
        return np.append(step, NOTHING)[nearest]


def nest(events: Events, wanted: np.ndarray | None = None) -> Forest:
    """Return the nesting of all events, or of those in a mask, on their threads."""
    rows = np.arange(len(events)) if wanted is None else np.flatnonzero(wanted)
    start, duration = events.start_ns[rows], events.duration_ns[rows]
    lane = lanes(events)[rows]
    order = _sorted(lane, start, duration)
    rows, lane, start, duration = rows[order], lane[order], start[order], duration[order]
    return Forest(rows, _parents(lane, start, start + duration), lane, start, duration)


def innermost(start_ns: np.ndarray, end_ns: np.ndarray, times_ns: np.ndarray) -> np.ndarray:
    """Return for each time the position of the innermost of some nesting intervals around it, NOTHING for none."""
    order = _sorted(np.zeros(len(start_ns), dtype=np.int64), start_ns, end_ns - start_ns)
    start, end = start_ns[order], end_ns[order]
    parent = np.append(_parents(np.zeros(len(order), dtype=np.int64), start, end), NOTHING)
    found = np.searchsorted(start, times_ns, side="right") - 1
    while True:
        over = (found >= 0) & (np.append(end, 0)[found] <= times_ns)
        if not over.any():
            return np.where(found >= 0, np.append(order, NOTHING)[found], NOTHING)
        found = np.where(over, parent[found], found)


def lanes(events: Events) -> np.ndarray:
    """Return for each event the number of its thread, over all processes."""
    if not len(events):
        return np.empty(0, dtype=np.int64)
    key = events.process.astype(np.int64) << 32 | (events.thread.astype(np.int64) & 0xFFFFFFFF)
    return pd.factorize(key)[0]


def _sorted(lane: np.ndarray, start: np.ndarray, duration: np.ndarray) -> np.ndarray:
    """Return the order by lane, start, the longer first: like lexsort, in a third of its time."""
    if not len(lane):
        return np.empty(0, dtype=np.int64)
    since = start - start.min()
    width = int(since.max()).bit_length()
    if width + int(lane.max()).bit_length() > 62:
        return np.lexsort((-duration, start, lane))
    key = lane << width | since
    order = np.argsort(key, kind="stable")
    key = key[order]
    tied = np.append(False, key[1:] == key[:-1])
    tied[:-1] |= tied[1:]
    rows = np.flatnonzero(tied)
    order[rows] = order[rows][np.lexsort((-duration[order[rows]], key[rows]))]
    return order


def _parents(lane: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return for each event the position of the event directly around it.

    The first candidate is the event before; while a candidate ended before the event began, the candidate's own
    candidate takes its place. All move at once and skip what others skipped already: about log2(n) rounds.
    """
    count = len(lane)
    parent = np.arange(-1, count - 1)
    pending = np.arange(count)
    while len(pending):
        candidate = parent[pending]
        elsewhere = (candidate >= 0) & (lane[candidate] != lane[pending])
        parent[pending[elsewhere]] = NOTHING
        ended = (candidate >= 0) & ~elsewhere & (end[candidate] <= start[pending])
        pending = pending[ended]
        parent[pending] = parent[parent[pending]]
    return parent


def side_by_side(track: np.ndarray, start_ns: np.ndarray, end_ns: np.ndarray) -> np.ndarray:
    """Return for each slice its lane on its track: 0, unless there it would cross another, then the first that is free.

    Within a lane slices follow each other or nest, as viewers want it: they drop those that overlap otherwise.
    `track` are numbers of tracks, at least 0.
    """
    order = _sorted(track, start_ns, end_ns - start_ns)
    track, start, end = track[order], start_ns[order], end_ns[order]
    parent = _parents(track, start, end)
    crosses = (parent >= 0) & (end > end[parent])
    lane = np.zeros(len(order), dtype=np.int64)
    # Few tracks have any, and which lane is free depends on what was placed before.
    for number in np.unique(track[crosses]).tolist():
        rows = np.flatnonzero(track == number)
        lane[rows] = _stacked(start[rows].tolist(), end[rows].tolist())
    result = np.empty_like(lane)
    result[order] = lane
    return result


def _stacked(starts: list[int], ends: list[int]) -> list[int]:
    """Return lanes for sorted slices; a lane is a stack of the ends of those that are open."""
    lanes_open: list[list[int]] = []
    found = []
    for start, end in zip(starts, ends, strict=True):
        for stack in lanes_open:
            while stack and stack[-1] <= start:
                stack.pop()
        fits = (number for number, stack in enumerate(lanes_open) if not stack or end <= stack[-1])
        number = next(fits, len(lanes_open))
        if number == len(lanes_open):
            lanes_open.append([])
        lanes_open[number].append(end)
        found.append(number)
    return found
