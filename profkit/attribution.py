"""Which scope owns each event of a profile, and why.

A device event belongs where its launch was called: correlation → launch → thread and time → innermost scope. A host
event belongs to the innermost scope open on its thread when it begins. What has no owner keeps a reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np

from profkit import stages
from profkit.errors import MeasurementError
from profkit.events import DEVICE, NOTHING, Events, Kind
from profkit.nesting import lanes
from profkit.spans import Spans

RANGE_PREFIX = "profkit:"
"""Ranges that the profiled pass opens are named by the mark they belong to: `profkit:<mark>`."""

BEGINNING_NS = -(1 << 62)
"""Before every time there is, and far enough from the end of 64 bits to be subtracted from."""
LAUNCH_NAME = re.compile(r"(?i)launch.*kernel|kernel.*launch|launchcooperative|graphlaunch|memcpy|memset")
GRAPH_LAUNCH_NAME = re.compile(r"(?i)graphlaunch")


class Why(IntEnum):
    """How an event came to its owner, or why it has none."""

    INSIDE = 0
    """Called, or launched, while the scope was open on the same thread."""
    GRAPH = 1
    """One of the kernels of a graph that was launched inside the scope."""
    CAPTURED = 2
    """The same, and the graph's capture tells which scope launched it then."""
    OTHER_THREAD = 3
    """Called, or launched, by another thread while the scope was open."""
    NO_SCOPE = 4
    """Called, or launched, while no scope was open."""
    NO_LAUNCH = 5
    """Its launch was not recorded."""


class Level(IntEnum):
    """How far down an owner reaches."""

    MODULE = 0
    RANGE = 1
    """A stage, or a range that the program opened, but no module."""
    OPERATOR = 2
    """An operator, where nothing else was open."""
    NOTHING = 3


@dataclass(frozen=True)
class Scopes:
    """The vocabulary of owners: names of stages, paths of scopes and how far down each reaches, steps.

    A step has a phase (index into `stages`, NOTHING if unknown), a label, and a beginning and an end in host time.
    """

    stages: Sequence[str]
    paths: Sequence[str]
    levels: np.ndarray
    step_phase: np.ndarray
    step_labels: Sequence[str]
    step_start_ns: np.ndarray
    step_end_ns: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class Owners:
    """For each event its stage, step and scope (rows of `scopes`, NOTHING for none), and why (a Why).

    `launch` is the row of the runtime call that launched a device event; NOTHING for others and where it is missing.
    `replayed` are the rows of kernels whose operator only the capture of their graph tells, `operators` its name.
    """

    scopes: Scopes
    stage: np.ndarray
    step: np.ndarray
    scope: np.ndarray
    why: np.ndarray
    launch: np.ndarray
    replayed: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    operators: Sequence[str] = ()

    def begun_ns(self) -> np.ndarray:
        """Return for each event when its step began on the host; the beginning of time for those of no step."""
        return np.append(self.scopes.step_start_ns, BEGINNING_NS)[self.step]

    def level(self) -> np.ndarray:
        """Return for each event how far down its owner reaches: Levels."""
        levels = np.append(self.scopes.levels, Level.NOTHING)[self.scope]
        return np.where((levels == Level.NOTHING) & (self.stage >= 0), Level.RANGE, levels)


def launches(events: Events) -> np.ndarray:
    """Return for each device event the row of the runtime call that launched it, NOTHING for other events.

    By correlation alone. Where several calls have one number (files put together from several), it is the last one
    before the event; of a driver's call inside that of the runtime, the outer one.
    """
    calls = np.flatnonzero((events.kind == Kind.RUNTIME) & (events.correlation > 0))
    calls = calls[np.lexsort((events.start_ns[calls], events.correlation[calls]))]
    result = np.full(len(events), NOTHING)
    rows = np.flatnonzero(events.is_kind(*DEVICE, Kind.SYNC) & (events.correlation > 0))
    known = events.correlation[calls]
    first = np.searchsorted(known, events.correlation[rows])
    after = np.searchsorted(known, events.correlation[rows], side="right")
    found = after > first
    rows, at, after = rows[found], first[found], after[found]
    several = np.flatnonzero(after - at > 1)
    at[several] = _last_before(events, calls, rows[several], at[several], after[several])
    result[rows] = calls[at]
    return result


def ambiguous(events: Events) -> np.ndarray:
    """Return which device events have a correlation that calls of several processes have: files put together."""
    calls = np.flatnonzero((events.kind == Kind.RUNTIME) & (events.correlation > 0))
    if not (events.process[calls] != events.process[calls[:1]]).any():
        return np.zeros(len(events), dtype=bool)
    calls = calls[np.lexsort((events.process[calls], events.correlation[calls]))]
    number, process = events.correlation[calls], events.process[calls]
    several = np.unique(number[1:][(number[1:] == number[:-1]) & (process[1:] != process[:-1])])
    return events.is_kind(*DEVICE) & np.isin(events.correlation, several)


def _last_before(
    events: Events, calls: np.ndarray, rows: np.ndarray, first: np.ndarray, after: np.ndarray
) -> np.ndarray:
    """Return, of the calls first..after-1 of each row, the last to begin before it, or the one around that."""
    at = first.copy()
    start, end, thread = events.start_ns, events.end_ns, events.thread
    for number in range(1, int((after - first).max(initial=1))):
        # Few calls share a number, so this runs once or twice, over all rows at a time.
        there = np.minimum(first + number, after - 1)
        one, other = calls[at], calls[there]
        later = (start[other] <= start[rows]) & (there > at)
        inside = (thread[one] == thread[other]) & (start[other] < end[one])
        at = np.where(later & ~inside, there, at)
    return at


def is_graph_launch(events: Events) -> np.ndarray:
    """Return which events launch a whole graph of kernels."""
    matching = [GRAPH_LAUNCH_NAME.search(name) is not None for name in events.names]
    return (events.kind == Kind.RUNTIME) & events.named(matching)


def is_launch(events: Events) -> np.ndarray:
    """Return which events launch kernels, copies or sets: runtime calls, by their names."""
    matching = [LAUNCH_NAME.search(name) is not None for name in events.names]
    return (events.kind == Kind.RUNTIME) & events.named(matching)


def follow_launches(
    events: Events, scopes: Scopes, stage: np.ndarray, step: np.ndarray, scope: np.ndarray, why: np.ndarray
) -> Owners:
    """Return the owners of all events, given those of the host's: device events go where their launch is."""
    launch = launches(events)
    device = np.flatnonzero(events.is_kind(*DEVICE, Kind.SYNC))
    caller = launch[device]

    def followed(column: np.ndarray, missing: int) -> np.ndarray:
        result = column.copy()
        result[device] = np.append(column, missing)[caller]
        return result

    reason = followed(why, Why.NO_LAUNCH)
    replayed = device[np.append(is_graph_launch(events), False)[caller]]
    reason[replayed] = np.where(reason[replayed] == Why.NO_SCOPE, Why.NO_SCOPE, Why.GRAPH)
    stage, step, scope = (followed(column, NOTHING) for column in (stage, step, scope))
    return Owners(scopes, stage, step, scope, reason, launch)


# -- a profile of profkit's own: the scopes are the spans of the pass -----------------------------


def is_range(events: Events) -> np.ndarray:
    """Return which events are ranges that profkit opened itself."""
    return events.named([name.startswith(RANGE_PREFIX) for name in events.names])


def _entry_marks(events: Events) -> np.ndarray:
    """Return for each event the mark that its range belongs to, NOTHING if it is no range of profkit's."""
    number = [int(name[len(RANGE_PREFIX) :]) if name.startswith(RANGE_PREFIX) else NOTHING for name in events.names]
    return np.array(number, dtype=np.int64)[events.name]


def missing_ranges(spans: Spans, events: Events, within: np.ndarray) -> tuple[int, int]:
    """Return how many spans inside the recorded segments have no range in the profile, and how many there are.

    `within` is a mask over segments; spans that cross an edge of what was recorded are not asked, nor are those of
    inputs, which have no ranges.
    """
    inside = np.append(within, False)
    first, _ = _main_thread(spans)
    asked = inside[spans.begin] & inside[spans.end - 1] & inside[np.maximum(spans.begin - 1, first)]
    asked &= spans.marks.thread[spans.begin] == spans.marks.thread[first] if len(spans) else False
    asked &= ~(spans.is_kind("sample") | spans.is_kind("input"))
    marks = spans.begin[asked]
    return int((~np.isin(marks, _entry_marks(events))).sum()), len(marks)


def aligned(spans: Spans, events: Events) -> Spans:
    """Return the spans on the profiler's clock.

    Each range gives the profiler's time of the two marks of its span; marks outside the recorded
    windows are placed by interpolating the difference of the two clocks.
    """
    ranges = events.select(is_range(events))
    if not len(ranges):
        raise MeasurementError("The profile holds none of profkit's ranges; its events cannot be attributed.")
    entry = _entry_marks(ranges)
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


def owning_segment(spans: Spans, start_ns: np.ndarray) -> np.ndarray:
    """Return for each time the segment of the main thread that it lies in, NOTHING outside all scopes.

    Spans and times must be on one clock.
    """
    first, count = _main_thread(spans)
    times = spans.marks.host_ns[first : first + count]
    segment = np.searchsorted(times, start_ns, side="right") - 1
    inside = (segment >= 0) & (segment < count - 1)
    owner = np.append(spans.owner, NOTHING)[np.where(inside, segment + first, NOTHING)]
    return np.where(owner >= 0, segment + first, NOTHING)


def _main_thread(spans: Spans) -> tuple[int, int]:
    """Return (first mark, number of marks) of the thread that runs generate(), the first if several do."""
    runs = np.flatnonzero(spans.root >= 0)
    if not len(runs):
        return 0, 0
    main = np.flatnonzero(spans.marks.thread == spans.marks.thread[spans.begin[runs[0]]])
    return int(main[0]), len(main)


def owners_in(spans: Spans, events: Events) -> Owners:
    """Return the owners of the events of a profiled pass, given its spans on the profiler's clock.

    Every host event, profkit's ranges included, belongs to the innermost span open as it begins.
    """
    host = ~events.is_kind(*DEVICE, Kind.SYNC, Kind.DEVICE_RANGE)
    segment = np.where(host, owning_segment(spans, events.start_ns), NOTHING)
    owned = segment >= 0
    lane = lanes(events)
    main = lane[is_range(events)][:1]
    why = np.where(owned, np.where(lane == main, Why.INSIDE, Why.OTHER_THREAD), Why.NO_SCOPE)
    stage, step, scope = (
        np.append(spans.stage, NOTHING),
        np.append(spans.step, NOTHING),
        np.append(spans.owner, NOTHING),
    )
    scope = np.where(scope >= 0, np.append(spans.scope, NOTHING)[scope], NOTHING)
    return follow_launches(events, scopes_of(spans), stage[segment], step[segment], scope[segment], why)


def scopes_of(spans: Spans) -> Scopes:
    """Return the vocabulary of a pass."""
    steps, host = spans.steps, spans.marks.host_ns
    module = np.array([scope.kind not in ("outside", "sample", "generate", "input") for scope in spans.scopes])
    phase = np.where(steps.prefill, stages.INDEX["prefill"], stages.INDEX["decode"])
    labels = [f"{stages.NAMES[one]} {number}" for number, one in enumerate(phase.tolist())]
    levels = np.where(module, Level.MODULE, Level.RANGE)
    paths = [scope.path for scope in spans.scopes]
    return Scopes(stages.NAMES, paths, levels, phase, labels, host[steps.start], host[steps.stop])
