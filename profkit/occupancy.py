"""When devices were busy, when idle, and what the idle time was spent waiting for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from profkit import stats
from profkit.attribution import is_graph_launch
from profkit.events import DEVICE, NOTHING, Events


def union_ns(start_ns: np.ndarray, duration_ns: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """Return for each of `groups` the length of the union of its intervals, in ns.

    `group` gives each interval's group, from 0. Intervals of no or negative length add nothing.
    """
    result = np.zeros(groups, dtype=np.int64)
    if len(start_ns):
        order, covered_until = _covered(start_ns, duration_ns, group)
        end = start_ns[order] + np.maximum(duration_ns[order], 0)
        np.add.at(result, group[order], np.maximum(end - np.maximum(start_ns[order], covered_until), 0))
    return result


def _covered(start_ns: np.ndarray, duration_ns: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order by group and start, and up to where each interval's group was covered before it.

    The first of a group has its own start there.
    """
    # Of those that begin together the shorter go first: one of no length overlaps nothing.
    order = np.lexsort((duration_ns, start_ns, group))
    start, lane = start_ns[order] - start_ns.min(), group[order].astype(np.int64)
    end = start + np.maximum(duration_ns[order], 0)
    width = int(end.max()) + 1
    first = np.append(True, lane[1:] != lane[:-1])
    if width * (int(lane.max()) + 1) < 1 << 62:
        # Groups follow each other on one axis, so that one running maximum serves all.
        reach = np.maximum.accumulate(end + lane * width) - lane * width
    else:
        reach = pd.Series(end).groupby(lane).cummax().to_numpy()
    before = np.append(0, reach[:-1])
    return order, np.where(first, start, before) + start_ns.min()


@dataclass(frozen=True)
class Occupancy:
    """One row for each device event, in order of device and start.

    `row` is its position among the events; `busy_ns` what it adds to its device's busy time (nothing while
    another ran already); the idle time right before it, in five parts that sum to it: `before_ns`, its step had not
    begun on the host; `host_ns`, it had, but the launch had not been called; `launch_ns`, the launch was on its way;
    `wait_ns`, it had been launched but waited for something else (a stream, an event, its place in a graph);
    `unknown_ns`, its launch was not recorded. `delay_ns` is its start less that of its launch call, for the first event
    of each launch (`leads`), and 0 elsewhere; `starved` tells that its device had nothing left to do when its launch
    was called.
    """

    row: np.ndarray
    device: np.ndarray
    busy_ns: np.ndarray
    before_ns: np.ndarray
    host_ns: np.ndarray
    launch_ns: np.ndarray
    wait_ns: np.ndarray
    unknown_ns: np.ndarray
    leads: np.ndarray
    delay_ns: np.ndarray
    starved: np.ndarray

    @property
    def idle_ns(self) -> np.ndarray:
        """The idle time right before each event."""
        return self.before_ns + self.host_ns + self.launch_ns + self.wait_ns + self.unknown_ns


def occupancy(events: Events, launch: np.ndarray, begun_ns: np.ndarray) -> Occupancy:
    """Return when the devices of `events` were busy and why they were not; `launch` is that of Owners.

    `begun_ns` says for each event when its step began on the host (Owners.begun_ns()): what the device waited before,
    it did not wait for this step.

    The part of a gap that counts as launch is bounded by the usual way of a launch: the median delay of those whose
    device had nothing else to do. What a kernel waited beyond that, though launched, is wait.
    """
    rows = np.flatnonzero(events.is_kind(*DEVICE))
    if not len(rows):
        none, never = np.empty(0, dtype=np.int64), np.empty(0, dtype=bool)
        return Occupancy(none, none, none, none, none, none, none, none, never, none, never)
    order, free_from = _covered(events.start_ns[rows], events.duration_ns[rows], events.device[rows])
    row = rows[order]
    start, end = events.start_ns[row], events.start_ns[row] + np.maximum(events.duration_ns[row], 0)
    caller = launch[row]
    known = caller >= 0
    called = np.where(known, events.start_ns[caller], start)
    leads = known & _first_of_launch(events, row, caller)
    gap = np.maximum(start - free_from, 0)
    starved = leads & (called >= free_from)
    delay = np.where(leads, start - called, 0)
    late = delay[starved & (delay >= 0)]
    usual = int(stats.median(late)) if len(late) else 0
    host = np.clip(called - free_from, 0, gap)
    rest = gap - host
    before = np.clip(np.minimum(called, begun_ns[row]) - free_from, 0, host)
    on_its_way = np.clip(np.minimum(start, called + usual) - np.maximum(free_from, called), 0, rest)
    return Occupancy(
        row=row,
        device=events.device[row],
        busy_ns=np.maximum(end - np.maximum(start, free_from), 0),
        before_ns=np.where(known, before, 0),
        host_ns=np.where(known, host - before, 0),
        launch_ns=np.where(known, on_its_way, 0),
        wait_ns=np.where(known, rest - on_its_way, 0),
        unknown_ns=np.where(known, 0, gap),
        leads=leads,
        delay_ns=delay,
        starved=starved,
    )


def _first_of_launch(events: Events, row: np.ndarray, caller: np.ndarray) -> np.ndarray:
    """Return which events are the first of their launch: all but the later kernels of graphs."""
    first = np.ones(len(row), dtype=bool)
    replayed = np.flatnonzero((caller >= 0) & np.append(is_graph_launch(events), False)[caller])
    by_start = replayed[np.lexsort((events.start_ns[row[replayed]], caller[replayed]))]
    first[by_start[1:]] = caller[by_start[1:]] != caller[by_start[:-1]]
    return first


def overlapping(events: Events) -> np.ndarray:
    """Return which device events begin before an earlier one on their stream ends: impossible, but recorded."""
    rows = np.flatnonzero(events.is_kind(*DEVICE))
    result = np.zeros(len(events), dtype=bool)
    if len(rows):
        key = events.device[rows].astype(np.int64) << 32 | (events.stream[rows].astype(np.int64) & 0xFFFFFFFF)
        lane = np.unique(key, return_inverse=True)[1]
        order, free_from = _covered(events.start_ns[rows], events.duration_ns[rows], lane)
        result[rows[order]] = events.start_ns[rows[order]] < free_from
    return result


def busy_ns(events: Events, chosen: np.ndarray, group: np.ndarray | None = None, groups: int = 1) -> int | np.ndarray:
    """Return the busy time of some device events: the union of their intervals on each device, summed over devices.

    With `group` (a number for each event, NOTHING to leave it out), the busy time of each of `groups`.
    """
    rows = np.flatnonzero(chosen & events.is_kind(*DEVICE))
    number = np.zeros(len(rows), dtype=np.int64) if group is None else group[rows]
    rows, number = rows[number > NOTHING], number[number > NOTHING]
    devices = len(events.devices)
    key = number.astype(np.int64) * devices + events.device[rows]
    each = union_ns(events.start_ns[rows], events.duration_ns[rows], key, groups * max(devices, 1))
    sums = each.reshape(groups, max(devices, 1)).sum(axis=1)
    return int(sums[0]) if group is None else sums
