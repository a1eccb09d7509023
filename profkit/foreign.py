"""The scopes of a trace file: its modules and annotations, its operators where it has neither, or profkit's own
tracks."""

from __future__ import annotations

import numpy as np

from profkit import stages
from profkit.attribution import Level, Owners, Scopes, Why, follow_launches
from profkit.chrome import Trace
from profkit.events import HOST, NOTHING, Events, Kind
from profkit.nesting import Forest, innermost
from profkit.phases import find_phases

MODULE_PREFIX = "nn.Module: "
TRACKS = ("stages", "steps", "layers")
"""profkit's tracks, in the order of their thread numbers, from 1."""


def owners_of(trace: Trace, forest: Forest) -> tuple[Owners, str]:
    """Return the owners of all events of a trace file, and what its steps were recognised by.

    `forest` is the nesting of its host events.
    """
    events = trace.events
    if (events.kind == Kind.PROFKIT).any():
        return _from_tracks(trace, forest), "steps: profkit's own tracks"
    scope, by_time, paths, levels = _scopes_of_rows(events, forest)
    phases = find_phases(events, forest)
    scopes = Scopes(list(phases.names), paths, levels, phases.phase, phases.labels, phases.start_ns, phases.end_ns)
    host = events.is_kind(*HOST)
    step = np.where(host, innermost(phases.start_ns, phases.end_ns, events.start_ns), NOTHING)
    stage = np.where(step >= 0, np.append(phases.phase, NOTHING)[step], NOTHING)
    inside = np.where((scope >= 0) | (stage >= 0), Why.INSIDE, Why.NO_SCOPE)
    why = np.where(by_time, Why.OTHER_THREAD, inside)
    return follow_launches(events, scopes, stage, step, scope, why), phases.evidence


def _scopes_of_rows(events: Events, forest: Forest) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Return for each host event its scope, and whether another thread had it open; and the scopes' paths and levels.

    Scopes are calls of modules and annotations, whose names follow each other in the path; for an event inside
    neither, its outermost operator.
    """
    kind = events.kind[forest.rows]
    is_module = events.named([name.startswith(MODULE_PREFIX) for name in events.names])[forest.rows]
    is_scope = is_module | (kind == Kind.ANNOTATION)
    scope_of_position, paths, levels = _paths(events, forest, is_scope, is_module)
    owner = forest.nearest(is_scope)
    found = np.where(owner >= 0, scope_of_position[owner], NOTHING)
    # Other threads: what the main one had open then.
    main = _main_lane(forest, is_scope)
    opened = np.flatnonzero(is_scope & (forest.lane == main))
    process = events.process[forest.rows]
    home = process[opened[0]] if len(opened) else NOTHING
    elsewhere = np.flatnonzero((found < 0) & (forest.lane != main) & (process == home))
    ends = forest.start_ns + forest.duration_ns
    at = innermost(forest.start_ns[opened], ends[opened], forest.start_ns[elsewhere])
    found[elsewhere] = np.where(at >= 0, scope_of_position[np.append(opened, NOTHING)[at]], NOTHING)
    found, paths, levels = _operators_instead(events, forest, found, paths, levels)
    result, by_time = np.full(len(events), NOTHING), np.zeros(len(events), dtype=bool)
    result[forest.rows] = found
    by_time[forest.rows[elsewhere[at >= 0]]] = True
    return result, by_time, paths, levels


def _main_lane(forest: Forest, chosen: np.ndarray) -> int:
    """Return the lane on which the chosen events last longest."""
    if not chosen.any():
        return NOTHING
    return int(np.bincount(forest.lane[chosen], weights=forest.duration_ns[chosen].astype(np.float64)).argmax())


def _paths(
    events: Events, forest: Forest, is_scope: np.ndarray, is_module: np.ndarray
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return the scope of each position that opens one, and paths and levels of scopes: one for a chain of names."""
    result = np.full(len(forest), NOTHING)
    positions = np.flatnonzero(is_scope)
    if not len(positions):
        return result, [], np.empty(0, dtype=np.int64)
    above = np.append(forest.nearest(is_scope), NOTHING)[forest.parent[positions]]
    short = [_short(name) for name in events.names]
    number = {name: index for index, name in enumerate(dict.fromkeys(short))}
    name = np.array([number[one] for one in short])[events.name[forest.rows[positions]]]
    names = list(number)
    paths: list[str] = []
    levels: list[int] = []
    pending = np.arange(len(positions))
    while len(pending):
        ready = (above[pending] < 0) | (result[above[pending]] >= 0)
        now, pending = pending[ready], pending[~ready]
        outer = np.where(above[now] >= 0, result[above[now]], NOTHING)
        key = np.stack([outer, name[now], is_module[positions[now]]])
        chains, which = np.unique(key, axis=1, return_inverse=True)
        result[positions[now]] = len(paths) + which.ravel()
        for outer_scope, own, module in chains.T.tolist():
            inside = outer_scope >= 0 and levels[outer_scope] == Level.MODULE
            joint = "." if module and inside else "/"
            paths.append(f"{paths[outer_scope]}{joint}{names[own]}" if outer_scope >= 0 else names[own])
            levels.append(int(Level.MODULE if module or inside else Level.RANGE))
    return result, paths, np.array(levels)


def _short(name: str) -> str:
    """Return a scope's name without what the profiler puts around it; iterations of one range share a name."""
    return "ProfilerStep" if name.startswith("ProfilerStep#") else name.removeprefix(MODULE_PREFIX)


def _operators_instead(
    events: Events, forest: Forest, found: np.ndarray, paths: list[str], levels: np.ndarray
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Give events without a scope their outermost operator as one."""
    operator = events.kind[forest.rows] == Kind.OPERATOR
    root = forest.outermost(operator)
    rows = np.flatnonzero((found < 0) & (root >= 0))
    name, which = np.unique(events.name[forest.rows[root[rows]]], return_inverse=True)
    found[rows] = len(paths) + which
    more = [events.names[one] for one in name.tolist()]
    return found, paths + more, np.append(levels, np.full(len(more), Level.OPERATOR)).astype(np.int64)


def _from_tracks(trace: Trace, forest: Forest) -> Owners:
    """Return the owners by profkit's own tracks, which hold the scopes of the thread that ran generate()."""
    events = trace.events
    rows = np.flatnonzero(events.kind == Kind.PROFKIT)
    threads = [value if isinstance(value, int) else 0 for value in trace.threads]
    number = np.array(threads, dtype=np.int64)[events.thread[rows]]
    track = {name: rows[number == position] for position, name in enumerate(TRACKS, start=1)}
    args = dict(zip(rows.tolist(), trace.own, strict=True))
    host = events.is_kind(*HOST)

    def open_in(name: str) -> np.ndarray:
        """Return for each host event the position, in a track, of the slice open as it begins."""
        of = track[name]
        found = innermost(events.start_ns[of], events.end_ns[of], events.start_ns)
        return np.where(host, found, NOTHING)

    def names_of(name: str) -> list[str]:
        return [events.names[one] for one in events.name[track[name]].tolist()]

    stage_of = np.array([*(stages.INDEX.get(name, NOTHING) for name in names_of("stages")), NOTHING])
    modules = [str(args[row].get("module") or "") for row in track["layers"].tolist()]
    paths = list(dict.fromkeys(modules))
    path_of = np.array([*map({path: i for i, path in enumerate(paths)}.get, modules), NOTHING], dtype=np.int64)
    phases = [stages.INDEX.get(str(args[row].get("phase")), NOTHING) for row in track["steps"].tolist()]
    phase = np.array(phases, dtype=np.int64)
    start, end = events.start_ns[track["steps"]], events.end_ns[track["steps"]]
    levels = np.full(len(paths), Level.MODULE)
    scopes = Scopes(stages.NAMES, paths, levels, phase, names_of("steps"), start, end)
    stage, step, scope = stage_of[open_in("stages")], open_in("steps"), path_of[open_in("layers")]
    main = np.zeros(len(events), dtype=bool)
    main[forest.rows[forest.lane == _main_lane(forest, stage[forest.rows] >= 0)]] = True
    owned = np.where(main, Why.INSIDE, Why.OTHER_THREAD)
    why = np.where((stage >= 0) | (scope >= 0), owned, Why.NO_SCOPE)
    return follow_launches(events, scopes, stage, step, scope, why)
