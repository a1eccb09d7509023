"""One tree of a profiled pass: stage, steps, scopes, and inside the scopes the operators and the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from profkit import stages
from profkit.attribution import Owners, is_range, owning_segment
from profkit.events import DEVICE, NOTHING, Events, Kind
from profkit.hierarchy import Tree, chains_of, phase_of_steps, steps_label
from profkit.nesting import Forest, innermost, lanes
from profkit.spans import Spans

HOST, ON_DEVICE = "host", "device"
OUTSIDE = "outside"


def trees(spans: Spans, within: np.ndarray, events: Events, owners: Owners, forest: Forest) -> pd.DataFrame:
    """Return the recorded steps as two trees of the same levels, as rows of one table.

    Columns: clock, and those of hierarchy.scope_tree(); level is stage, steps, scope, operator or kernel. On the host's
    clock every instant inside the segments of a mask belongs to the innermost scope or operator that was open on the
    thread of generate(), so that each node's own time and its children add up to its total. On the device's, kernels,
    copies and sets stand below the operator that launched them, and sum to their durations. Times are those under the
    profiler; `spans` and `events` must be on one clock, and `forest` is the nesting of what counts as an operator.
    """
    paths = _Paths(spans, within, events, forest)
    found = {HOST: _host(paths, within), ON_DEVICE: _on_device(paths, events, owners)}
    return pd.concat([tree.assign(clock=clock) for clock, tree in found.items() if len(tree)], ignore_index=True)


class _Paths:
    """Where in the tree a place of the program stands: its stage and steps, the chain of its scopes, its operators."""

    def __init__(self, spans: Spans, within: np.ndarray, events: Events, forest: Forest) -> None:
        self.spans, self.events, self.forest = spans, events, forest
        self.chain, self._chains = chains_of(spans)
        self._phase = np.append(phase_of_steps(spans), 0)
        recorded = np.unique(spans.step[within & (spans.step >= 0)])
        prefill = int(spans.steps.prefill[recorded].sum())
        self._labels = {1: steps_label(True, prefill), 2: steps_label(False, len(recorded) - prefill)}
        segment = owning_segment(spans, forest.start_ns)
        self.owner = np.where(segment >= 0, np.append(spans.owner, NOTHING)[segment], NOTHING)
        self.operators, self._operator_chains = self._chains_of_operators()

    def _chains_of_operators(self) -> tuple[np.ndarray, list[tuple[int, ...]]]:
        """Return for each position of the forest its chain: the names of the operators around it in its scope."""
        forest, name = self.forest, self.events.name[self.forest.rows]
        chain, chains = np.full(len(forest), NOTHING), list[tuple[int, ...]]()
        parent = np.where(self.owner == np.append(self.owner, -2)[forest.parent], forest.parent, NOTHING)
        pending = np.flatnonzero(parent < 0)
        above = np.full(len(pending), NOTHING)
        children = np.argsort(parent, kind="stable")
        sorted_parent = parent[children]
        while len(pending):
            pairs, which = np.unique(np.stack([above, name[pending]], axis=1), axis=0, return_inverse=True)
            numbers = np.arange(len(pairs)) + len(chains)
            chains += [(*(chains[up] if up >= 0 else ()), own) for up, own in pairs.tolist()]
            chain[pending] = numbers[which.ravel()]
            begin, end = (np.searchsorted(sorted_parent, pending, side=side) for side in ("left", "right"))
            count = end - begin
            offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            above = np.repeat(chain[pending], count)
            pending = children[np.repeat(begin, count) + offset]
        return chain, chains

    def phase(self, step: np.ndarray) -> np.ndarray:
        """Return 1 for prefill steps, 2 for decode steps, 0 for none."""
        found: np.ndarray = self._phase[step]
        return found

    def path(self, stage: int, phase: int, chain: int, operators: int) -> list[tuple[str, str]]:
        """Return the labels and levels of a place, from its stage down; -1 is none."""
        found = [(stages.NAMES[stage] if stage >= 0 else OUTSIDE, "stage")]
        if phase:
            found.append((self._labels[phase], "steps"))
        if chain >= 0:
            found += [(self.spans.scopes[scope].path, "scope") for scope in self._chains[chain]]
        if operators >= 0:
            found += [(self.events.names[name], "operator") for name in self._operator_chains[operators]]
        return found


def _host(paths: _Paths, within: np.ndarray) -> pd.DataFrame:
    spans, forest = paths.spans, paths.forest
    mine = np.flatnonzero(forest.lane == _main_lane(paths.events))
    start, end = forest.start_ns[mine], forest.start_ns[mine] + np.maximum(forest.duration_ns[mine], 0)
    times = np.unique(np.concatenate([spans.marks.host_ns, start, end]))
    begin, length_ns = times[:-1], np.diff(times)
    segment = owning_segment(spans, begin)
    counted = (segment >= 0) & np.append(within & (spans.stage >= 0), False)[segment]
    begin, length_ns, segment = begin[counted], length_ns[counted], segment[counted]
    owner = spans.owner[segment]
    at = innermost(start, end, begin)
    position = np.append(mine, NOTHING)[at]
    # A scope that opened inside an operator is the inner one of the two.
    is_inside = (at >= 0) & (np.append(start, 0)[at] >= spans.marks.host_ns[spans.begin[owner]])
    position = np.where(is_inside, position, NOTHING)
    leaves = pd.DataFrame(
        {
            "stage": spans.stage[segment],
            "phase": paths.phase(spans.step[segment]),
            "chain": paths.chain[owner],
            "operators": np.append(paths.operators, NOTHING)[position],
            # What is called: the operator, else the scope.
            "call": np.where(position >= 0, position, owner),
            "ns": length_ns,
        }
    )
    tree, keys = Tree(), ["stage", "phase", "chain", "operators"]
    grouped = leaves.groupby(keys).agg(ns=("ns", "sum"), calls=("call", "nunique")).reset_index()
    for *place, ns, calls in zip(*(grouped[name].tolist() for name in (*keys, "ns", "calls")), strict=True):
        tree.add(paths.path(*place), ns, calls)
    return tree.table()


def _main_lane(events: Events) -> int:
    """Return the number of the thread that profkit's ranges are on, that of generate()."""
    found = lanes(events)[is_range(events)][:1].tolist()
    return found[0] if found else NOTHING


def _on_device(paths: _Paths, events: Events, owners: Owners) -> pd.DataFrame:
    rows = np.flatnonzero(events.is_kind(*DEVICE))
    launch, forest = owners.launch[rows], paths.forest
    position = np.full(len(events) + 1, NOTHING)
    position[forest.rows] = np.arange(len(forest))
    nearest = np.append(forest.nearest(events.kind[forest.rows] == Kind.OPERATOR), NOTHING)
    operator = nearest[position[launch]]
    segment = np.where(launch >= 0, owning_segment(paths.spans, np.append(events.start_ns, 0)[launch]), NOTHING)
    span = np.where(segment >= 0, np.append(paths.spans.owner, NOTHING)[segment], NOTHING)
    leaves = pd.DataFrame(
        {
            "stage": owners.stage[rows],
            "phase": paths.phase(owners.step[rows]),
            "chain": np.append(paths.chain, NOTHING)[span],
            "operators": np.append(paths.operators, NOTHING)[operator],
            "name": events.name[rows],
            "ns": events.length_ns[rows],
        }
    )
    tree, keys = Tree(), ["stage", "phase", "chain", "operators", "name"]
    grouped = leaves.groupby(keys).agg(ns=("ns", "sum"), calls=("ns", "size")).reset_index()
    columns: Sequence[list[int]] = [grouped[name].tolist() for name in (*keys, "ns", "calls")]
    for *place, name, ns, calls in zip(*columns, strict=True):
        tree.add([*paths.path(*place), (events.names[name], "kernel")], ns, calls)
    return tree.table()
