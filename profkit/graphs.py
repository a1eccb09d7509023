"""Kernels of a replayed device graph, explained by the trace of the pass that captured it.

A replay is one launch with many kernels and no operators. The capture recorded the same launches, in the same order,
inside the
operators and modules that made them, but no kernels. Where names and order agree one by one, each kernel gets the owner
that its launch had then; where they do not, or the capture does not name what it launched, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from profkit.attribution import Owners, Why, is_graph_launch, is_launch
from profkit.events import DEVICE, NOTHING, Events, Kind
from profkit.nesting import Forest, lanes


@dataclass(frozen=True)
class Capture:
    """A trace in which graphs were captured."""

    events: Events
    owners: Owners
    forest: Forest

    @cached_property
    def operator_around(self) -> np.ndarray:
        """For each event on the host the row of the innermost operator around it, NOTHING for none."""
        rows, result = self.forest.rows, np.full(len(self.events), NOTHING)
        result[rows] = np.append(rows, NOTHING)[self.forest.nearest(self.events.kind[rows] == Kind.OPERATOR)]
        return result


@dataclass(frozen=True)
class Captured:
    """One graph as it was captured: its launches in order, and the name of what each launches ("" if not told)."""

    capture: Capture
    rows: np.ndarray
    names: tuple[str, ...]


def in_capture(events: Events) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of launches that were captured into a graph instead of run, and the number of each graph."""
    begins = _called(events, "StreamBeginCapture")
    ends = _called(events, "StreamEndCapture")
    calls = np.flatnonzero(is_launch(events) & ~is_graph_launch(events))
    if not begins.any() or not len(calls):
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    lane, start = lanes(events), events.start_ns
    calls = calls[np.lexsort((start[calls], lane[calls]))]
    opened, closed = _before(lane, start, begins, calls), _before(lane, start, ends, calls)
    inside = opened > closed
    # The number of beginnings before a launch, per thread, tells the graph.
    return calls[inside], np.unique(np.stack([lane[calls], opened])[:, inside], axis=1, return_inverse=True)[1].ravel()


def _called(events: Events, name: str) -> np.ndarray:
    return (events.kind == Kind.RUNTIME) & events.named([one.endswith(name) for one in events.names])


def _before(lane: np.ndarray, start: np.ndarray, chosen: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return for each row how many chosen events began before it on its thread."""
    result = np.zeros(len(rows), dtype=np.int64)
    for one in np.unique(lane[chosen]):
        mine = lane[rows] == one
        result[mine] = np.searchsorted(np.sort(start[chosen & (lane == one)]), start[rows[mine]])
    return result


def captured_graphs(capture: Capture) -> list[Captured]:
    """Return the graphs that a trace captured."""
    rows, graph = in_capture(capture.events)
    each = [rows[graph == number] for number in np.unique(graph)]
    return [Captured(capture, mine, _launched_names(capture.events, mine)) for mine in each]


def _launched_names(events: Events, rows: np.ndarray) -> tuple[str, ...]:
    """Return what each launch says it launches; copies and sets by their kind."""
    told = events.launched[rows]
    calls = [events.names[one].lower() for one in events.name[rows].tolist()]
    copies = ["memcpy" if "memcpy" in call else "memset" if "memset" in call else "" for call in calls]
    return tuple(events.names[one] if one != NOTHING else copy for one, copy in zip(told.tolist(), copies, strict=True))


def explained(events: Events, owners: Owners, captures: Sequence[Capture]) -> tuple[Owners, list[str]]:
    """Return owners in which replayed kernels have the scopes and operators that captures prove, and a note a graph."""
    replays = _replays(events, owners)
    if not replays:
        return owners, []
    graphs = [graph for capture in captures for graph in captured_graphs(capture)]
    sizes = sorted({len(graph.rows) for graph in graphs if all(graph.names)})
    known = f"those with names have {', '.join(map(str, sizes))} launches" if sizes else "none names its launches"
    notes = []
    for names, each in replays.items():
        matching = [graph for graph in graphs if graph.names == names]
        alike = len({_told(graph) for graph in matching}) == 1
        times = f", replayed {len(each)} times" if len(each) > 1 else ""
        if matching and not alike:
            said = f"not split, {len(matching)} captures have these kernels, in different modules"
            notes.append(f"a graph of {len(names)} kernels{times}: {said}")
        elif matching and _may_swap(events, each, matching[0]):
            said = "not split, kernels of one name ran on several streams at once, for different modules"
            notes.append(f"a graph of {len(names)} kernels{times}: {said}")
        elif matching:
            owners = _taken_over(owners, np.concatenate(each), len(each), matching[0])
            notes.append(f"a graph of {len(names)} kernels{times}: names and order equal those of its capture")
        else:
            said = f"not split, no capture proves it ({len(graphs)} seen; {known})"
            notes.append(f"a graph of {len(names)} kernels{times}: {said}")
    return owners, notes


def _may_swap(events: Events, replays: Sequence[np.ndarray], graph: Captured) -> bool:
    """Tell whether order proves nothing: several streams, and a name that stands for different owners."""
    if all(len(np.unique(events.stream[rows])) == 1 for rows in replays):
        return False
    owners_of_name: dict[str, set[tuple[str, str]]] = {}
    for name, told in zip(graph.names, _told(graph), strict=True):
        owners_of_name.setdefault(name, set()).add(told)
    return any(len(told) > 1 for told in owners_of_name.values())


def _told(graph: Captured) -> tuple[tuple[str, str], ...]:
    """Return the scope and the operator of each launch of a captured graph."""
    then = graph.capture.owners
    paths = [then.scopes.paths[one] if one >= 0 else "" for one in then.scope[graph.rows].tolist()]
    operators = graph.capture.operator_around[graph.rows]
    events = graph.capture.events
    names = [events.names[events.name[one]] if one >= 0 else "" for one in operators.tolist()]
    return tuple(zip(paths, names, strict=True))


def _replays(events: Events, owners: Owners) -> dict[tuple[str, ...], list[np.ndarray]]:
    """Return the rows of every replay, in order of start, by its kernels' names; copies and sets by their kind."""
    device = events.is_kind(*DEVICE)
    rows = np.flatnonzero(device & np.append(is_graph_launch(events), False)[owners.launch])
    if not len(rows):
        return {}
    rows = rows[np.lexsort((events.start_ns[rows], owners.launch[rows]))]
    kind, names = events.kind[rows], [*events.names, "memcpy", "memset"]
    name = np.where(
        kind == Kind.MEMCPY, len(names) - 2, np.where(kind == Kind.MEMSET, len(names) - 1, events.name[rows])
    )
    edges = np.flatnonzero(np.diff(owners.launch[rows])) + 1
    alike: dict[bytes, list[np.ndarray]] = {}
    for mine, named in zip(np.split(rows, edges), np.split(name, edges), strict=True):
        alike.setdefault(named.astype(np.int64).tobytes(), []).append(mine)
    # Names become text once for each graph, not for each replay.
    return {tuple(names[one] for one in np.frombuffer(key, np.int64).tolist()): each for key, each in alike.items()}


def _taken_over(owners: Owners, rows: np.ndarray, times: int, graph: Captured) -> Owners:
    """Return owners in which kernels, so many replays of a graph, have its launches' scopes and operators."""
    capture, then = graph.capture, graph.capture.owners
    base = len(owners.scopes.paths)
    used, which = np.unique(then.scope[np.tile(graph.rows, times)], return_inverse=True)
    paths = [then.scopes.paths[one] if one >= 0 else "" for one in used.tolist()]
    levels = np.append(then.scopes.levels, NOTHING)[used]
    scope, why = owners.scope.copy(), owners.why.copy()
    told = used[which] >= 0
    scope[rows[told]] = base + which[told]
    why[rows[told]] = Why.CAPTURED
    around = np.tile(capture.operator_around[graph.rows], times)
    has_operator = around >= 0
    names = capture.events.name[around[has_operator]].tolist()
    return replace(
        owners,
        scopes=replace(
            owners.scopes,
            paths=[*owners.scopes.paths, *paths],
            levels=np.append(owners.scopes.levels, levels).astype(np.int64),
        ),
        scope=scope,
        why=why,
        replayed=np.append(owners.replayed, rows[has_operator]),
        operators=[*owners.operators, *(capture.events.names[one] for one in names)],
    )
