"""Where the time of a pass went, as a tree: stage, steps, and the scopes inside each other; and layers over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from profkit import stages
from profkit.spans import NOBODY, Spans

MS = 1e6
AROUND = ("sample", "generate")
"""Kinds of scopes that hold everything: no levels of their own."""
COLUMNS = ["id", "parent", "label", "level", "calls", "total_ms", "self_ms"]


def scope_tree(spans: Spans) -> pd.DataFrame:
    """Return the host time of a pass as a tree, a row a node, parents first.

    Columns: id, parent (-1: a stage), label, level (stage, steps or scope), calls (of the scope, 0 above), total_ms,
    self_ms. Below a stage stand the prefill steps and the decode steps, each of these sums over its steps, then the
    scopes as they nested. Stages sum to the total of the pass, and each node's own time and children to its total.
    """
    rows = np.flatnonzero((spans.stage >= 0) & (spans.host_ns > 0))
    chain, chains = _chains(spans)
    owner = spans.owner[rows]
    prefill = np.append(spans.steps.prefill, False)[spans.step[rows]]
    phase = np.where(spans.step[rows] < 0, 0, np.where(prefill, 1, 2))
    leaves = pd.DataFrame({"stage": spans.stage[rows], "phase": phase, "chain": chain[owner], "span": owner})
    leaves = leaves.assign(self_ns=spans.host_ns[rows])
    keys = ["stage", "phase", "chain"]
    grouped = leaves.groupby(keys).agg(self_ns=("self_ns", "sum"), calls=("span", "nunique")).reset_index()
    tree = _Tree()
    for stage, phase_of, number, self_ns, calls in zip(
        *(grouped[name].tolist() for name in (*keys, "self_ns", "calls")), strict=True
    ):
        path: list[tuple[str, str]] = [(stages.NAMES[stage], "stage")]
        if phase_of:
            path.append((_steps_label(spans, phase_of == 1), "steps"))
        path += [(spans.scopes[scope].path, "scope") for scope in chains[number]]
        tree.add(path, self_ns, calls)
    return tree.table(dict(enumerate(stages.NAMES)))


def _chains(spans: Spans) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """Return for each span the number of its chain, and for each chain the scopes from the outermost to its own."""
    around = np.array([scope.kind in AROUND for scope in spans.scopes], dtype=bool)
    chain = np.zeros(len(spans), dtype=np.int64)
    chains: list[tuple[int, ...]] = [()]
    for depth in range(int(spans.depth.max(initial=-1)) + 1):
        rows = np.flatnonzero(spans.depth == depth)
        above = chain[spans.parent[rows]] if depth else np.zeros(len(rows), dtype=np.int64)
        scope = spans.scope[rows]
        pairs, which = np.unique(above * len(spans.scopes) + scope, return_inverse=True)
        numbers = []
        for pair in pairs.tolist():
            parent, own = divmod(pair, len(spans.scopes))
            if around[own]:
                numbers.append(parent)
            else:
                numbers.append(len(chains))
                chains.append((*chains[parent], own))
        chain[rows] = np.array(numbers, dtype=np.int64)[which]
    return chain, chains


def _steps_label(spans: Spans, prefill: bool) -> str:
    count = int((spans.steps.prefill == prefill).sum())
    name = "prefill" if prefill else "decode"
    return f"{name} step" if count == 1 else f"{count} {name} steps"


class _Tree:
    """Nodes by their path of (label, level)."""

    def __init__(self) -> None:
        self._own: dict[tuple[tuple[str, str], ...], list[int]] = {}

    def add(self, path: Sequence[tuple[str, str]], self_ns: int, calls: int) -> None:
        """Add to the own time and the calls of a node."""
        for length in range(1, len(path)):
            self._own.setdefault(tuple(path[:length]), [0, 0])
        node = self._own.setdefault(tuple(path), [0, 0])
        node[0] += self_ns
        node[1] += calls

    def table(self, order: Mapping[int, str]) -> pd.DataFrame:
        """Return the nodes, parents first, stages in their order."""
        place = {name: number for number, name in order.items()}
        nodes = sorted(self._own, key=lambda path: (len(path), place.get(path[0][0], len(place))))
        number = {path: one for one, path in enumerate(nodes)}
        total = {path: self._own[path][0] for path in nodes}
        for path in reversed(nodes):
            if len(path) > 1:
                total[path[:-1]] += total[path]
        rows = [
            (
                *(number[path], number.get(path[:-1], NOBODY), *path[-1]),
                *(self._own[path][1], total[path] / MS, self._own[path][0] / MS),
            )
            for path in nodes
        ]
        return pd.DataFrame(rows, columns=COLUMNS)


def event_tree(table: pd.DataFrame, paths: Sequence[str], time: str, count: str) -> pd.DataFrame:
    """Return a table of operators or kernels (see device_tables) as a tree: stage, modules by their paths, events.

    `paths` are the modules that may stand between, `time` and `count` the columns to sum. Columns as in scope_tree();
    level is stage, scope or event.
    """
    tree, known = _Tree(), set(paths)
    names = table[table[time] > 0]
    for stage, path, name, own_ms, calls in zip(
        *(names[column].tolist() for column in ("stage", "path", "name", time, count)), strict=True
    ):
        parts = path.split(".")
        above = (".".join(parts[:length]) for length in range(1, len(parts)))
        scopes = [(one, "scope") for one in (*(one for one in above if one in known), path) if one]
        tree.add([(stage, "stage"), *scopes, (name, "event")], round(own_ms * MS), calls)
    return tree.table(dict(enumerate(stages.NAMES)))


def layer_table(spans: Spans) -> pd.DataFrame:
    """Return the decoder's layers over steps: index path, a column a step, host time in ms (NaN: did not run)."""
    step = np.append(spans.step, NOBODY)[spans.begin] if len(spans) else np.empty(0, dtype=np.int64)
    inside = spans.nearest(spans.is_kind("decoder") | spans.is_kind("stack")) >= 0
    rows = np.flatnonzero(spans.is_kind("layer") & inside & (step >= 0))
    scope = spans.scope[rows]
    found = pd.DataFrame({"scope": scope, "step": step[rows], "ms": spans.total_ns[rows] / MS})
    wide = found.pivot_table(index="scope", columns="step", values="ms", aggfunc="sum")
    wide.index = pd.Index([spans.scopes[number].path for number in wide.index], name="path")
    return wide
