"""Where the time of a pass went, as a tree: stage, steps, and the scopes inside each other; and layers over steps."""

from __future__ import annotations

from collections.abc import Sequence

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
    chain, chains = chains_of(spans)
    owner = spans.owner[rows]
    phase = np.append(phase_of_steps(spans), 0)[spans.step[rows]]
    leaves = pd.DataFrame({"stage": spans.stage[rows], "phase": phase, "chain": chain[owner], "span": owner})
    leaves = leaves.assign(self_ns=spans.host_ns[rows])
    keys = ["stage", "phase", "chain"]
    grouped = leaves.groupby(keys).agg(self_ns=("self_ns", "sum"), calls=("span", "nunique")).reset_index()
    tree = Tree()
    for stage, phase_of, number, self_ns, calls in zip(
        *(grouped[name].tolist() for name in (*keys, "self_ns", "calls")), strict=True
    ):
        path: list[tuple[str, str]] = [(stages.NAMES[stage], "stage")]
        if phase_of:
            path.append((steps_label(phase_of == 1, int((spans.steps.prefill == (phase_of == 1)).sum())), "steps"))
        path += [(spans.scopes[scope].path, "scope") for scope in chains[number]]
        tree.add(path, self_ns, calls)
    return tree.table()


def chains_of(spans: Spans) -> tuple[np.ndarray, list[tuple[int, ...]]]:
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


def phase_of_steps(spans: Spans) -> np.ndarray:
    """Return 1 for each prefill step, 2 for each decode step."""
    return np.where(spans.steps.prefill, 1, 2)


def steps_label(prefill: bool, count: int) -> str:
    """Return what so many steps of a kind are called."""
    name = "prefill" if prefill else "decode"
    return f"{name} step" if count == 1 else f"{count} {name} steps"


class Tree:
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

    def table(self) -> pd.DataFrame:
        """Return the nodes, parents first, stages in their order."""
        place = {name: number for number, name in enumerate(stages.NAMES)}
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
    tree, known = Tree(), set(paths)
    names = table[table[time] > 0]
    for stage, path, name, own_ms, calls in zip(
        *(names[column].tolist() for column in ("stage", "path", "name", time, count)), strict=True
    ):
        parts = path.split(".")
        above = (".".join(parts[:length]) for length in range(1, len(parts)))
        scopes = [(one, "scope") for one in (*(one for one in above if one in known), path) if one]
        tree.add([(stage, "stage"), *scopes, (name, "event")], round(own_ms * MS), calls)
    return tree.table()


def pruned(tree: pd.DataFrame, most: int) -> pd.DataFrame:
    """Return the largest `most` nodes of a tree; what is left out of a node is one child of it that says how many.

    The new nodes have the level rest, and their total is their own time: sums stay as they were.
    """
    if len(tree) <= most:
        return tree
    # Parents stand first and are no smaller than their children: the largest nodes are a tree of their own.
    kept = np.zeros(len(tree), dtype=bool)
    kept[np.argsort(-tree["total_ms"].to_numpy(), kind="stable")[:most]] = True
    parent = tree["parent"].to_numpy()
    for row in range(len(tree)):
        kept[row] &= parent[row] < 0 or kept[parent[row]]
    cut = tree[~kept & ((parent < 0) | np.append(kept, False)[parent])]
    below = np.ones(len(tree), dtype=np.int64)
    for row in range(len(tree) - 1, -1, -1):
        if parent[row] >= 0:
            below[parent[row]] += below[row]
    rest = (
        cut.assign(nodes=below[cut.index]).groupby("parent").agg(nodes=("nodes", "sum"), total_ms=("total_ms", "sum"))
    )
    made = pd.DataFrame(
        {
            "id": np.arange(len(rest)) + int(tree["id"].max()) + 1,
            "parent": rest.index,
            "label": [f"{number} smaller" for number in rest["nodes"]],
            "level": "rest",
            "calls": 0,
            "total_ms": rest["total_ms"].to_numpy(),
            "self_ms": rest["total_ms"].to_numpy(),
        }
    )
    whole = pd.concat([tree[kept], made], ignore_index=True)
    number = pd.Series(np.arange(len(whole)), index=whole["id"])
    return whole.assign(id=np.arange(len(whole)), parent=[number.get(one, NOBODY) for one in whole["parent"]])


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
