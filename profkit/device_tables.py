"""Kernels, operators, stages and steps of a profile, as DataFrames: what the device did, and for whom."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from profkit.attribution import Level, Owners, is_launch
from profkit.events import DEVICE, NOTHING, Events, Kind
from profkit.nesting import Forest, nest
from profkit.occupancy import Occupancy, busy_ns
from profkit.stats import percentile

MS, US = 1e6, 1e3
OUTSIDE = "outside"
"""The stage of what no stage owns."""
ALL = "all"
EARLY = 0.1
"""With a larger share of launches whose events begin before them, clocks disagree too far to tell who waited."""
OPERATOR_KINDS = (Kind.OPERATOR, Kind.ANNOTATION, Kind.RUNTIME)
WAITING = 0.5
"""A stage is waiting if its device was idle, with work already launched, for more than this share of its time."""
WAITS = re.compile(r"Synchronize")
HOST_BOUND_IDLE, HOST_BOUND_STARVED = 0.1, 0.5
"""Else it is host-bound if its device waited for the host for more than the first share of its time, and more than the
second share of launches found it without work; device-bound with less waiting; mixed between the two."""


def kernel_table(events: Events, owners: Owners, forest: Forest) -> pd.DataFrame:
    """Return a row for each kernel, copy or set in each scope, the longest first.

    Columns: name, kind, stage, path, operator (innermost around the launch), count, total_ms, mean_us, share (of the
    sum).
    """
    rows = np.flatnonzero(events.is_kind(*DEVICE))
    operator, operators = _operator_of(events, owners, forest, rows)
    keys = [events.name[rows], events.kind[rows], owners.stage[rows], owners.scope[rows], operator]
    first, count, (total_ns,) = _grouped(keys, events.length_ns[rows])
    order = np.argsort(-total_ns, kind="stable")
    name, kind, stage, scope, op = (key[first][order] for key in keys)
    total_ns, count = total_ns[order], count[order]
    return pd.DataFrame(
        {
            "name": _text(events.names, name),
            "kind": _text([one.name.lower() for one in Kind], kind),
            "stage": _text([*owners.scopes.stages, OUTSIDE], stage),
            "path": _text([*owners.scopes.paths, ""], scope),
            "operator": _text([*operators, ""], op),
            "count": count,
            "total_ms": total_ns / MS,
            "mean_us": total_ns / np.maximum(count, 1) / US,
            "share": total_ns / max(int(total_ns.sum()), 1),
        }
    )


def _operator_of(events: Events, owners: Owners, forest: Forest, rows: np.ndarray) -> tuple[np.ndarray, Sequence[str]]:
    """Return the innermost operator around the launches of device rows, as numbers of names, and these names."""
    position = np.full(len(events) + 1, NOTHING)
    position[forest.rows] = np.arange(len(forest))
    nearest = np.append(forest.nearest(events.kind[forest.rows] == Kind.OPERATOR), NOTHING)
    at = nearest[position[owners.launch[rows]]]
    found = np.where(at >= 0, events.name[np.append(forest.rows, NOTHING)[at]], NOTHING)
    if not len(owners.replayed):
        return found, events.names
    told = np.full(len(events), NOTHING)
    told[owners.replayed] = len(events.names) + np.arange(len(owners.replayed))
    names = [*events.names, *owners.operators]
    number = {name: index for index, name in reversed(list(enumerate(names)))}
    same = np.array([number[name] for name in names])
    return np.where(told[rows] >= 0, same[told[rows]], found), names


def operator_table(events: Events, owners: Owners, forest: Forest, counted: np.ndarray | None = None) -> pd.DataFrame:
    """Return a row for each operator, annotation and runtime call in each scope, the longest self time first.

    Columns: name, kind, stage, path, calls, total_ms, self_ms (host time), kernels, device_ms (of what was launched
    directly inside).
    `counted` limits it to a mask of events (ranges that profkit opened are left out so).
    """
    wanted = events.is_kind(*OPERATOR_KINDS)
    wanted = wanted if counted is None else wanted & counted
    if len(forest) != wanted.sum():
        forest = nest(events, wanted)
    rows = forest.rows
    kernels, device_ns = _launched_inside(events, owners, forest)
    keys = [events.name[rows], events.kind[rows], owners.stage[rows], owners.scope[rows]]
    first, calls, sums = _grouped(keys, np.maximum(forest.duration_ns, 0), forest.self_ns(), kernels, device_ns)
    order = np.argsort(-sums[1], kind="stable")
    name, kind, stage, scope = (key[first][order] for key in keys)
    total_ns, self_ns, kernels, device_ns = (one[order] for one in sums)
    return pd.DataFrame(
        {
            "name": _text(events.names, name),
            "kind": _text([one.name.lower() for one in Kind], kind),
            "stage": _text([*owners.scopes.stages, OUTSIDE], stage),
            "path": _text([*owners.scopes.paths, ""], scope),
            "calls": calls[order],
            "total_ms": total_ns / MS,
            "self_ms": self_ns / MS,
            "kernels": kernels,
            "device_ms": device_ns / MS,
        }
    )


def _launched_inside(events: Events, owners: Owners, forest: Forest) -> tuple[np.ndarray, np.ndarray]:
    """Return for each position how many device events were launched directly inside, and their time in ns."""
    count, total_ns = np.zeros(len(forest), dtype=np.int64), np.zeros(len(forest), dtype=np.int64)
    rows = np.flatnonzero(events.is_kind(*DEVICE) & (owners.launch >= 0))
    position = np.full(len(events), NOTHING)
    position[forest.rows] = np.arange(len(forest))
    call = position[owners.launch[rows]]
    # A launch call is a row of its own; what it launched belongs to the operator that called it, if one did.
    nearest = np.append(forest.nearest(events.kind[forest.rows] == Kind.OPERATOR), NOTHING)[call]
    at = np.where(nearest >= 0, nearest, call)
    known = at >= 0
    np.add.at(count, at[known], 1)
    np.add.at(total_ns, at[known], events.length_ns[rows[known]])
    return count, total_ns


def stage_table(events: Events, owners: Owners, occupied: Occupancy) -> pd.DataFrame:
    """Return a row for each device and stage, and one of `all`, in the stages' order.

    Columns: device, stage, steps (in which it occurs), kernels, launches (calls on the host), launches_per_step (in
    decode: a token of each sequence), busy_ms (union of the stage's events on the device), sum_ms (over streams),
    idle_ms and its parts (before each of the stage's events: idle_before_ms, the step had not begun on the host;
    idle_host_ms, the launch had not been called; idle_launch_ms, it was on its way; idle_wait_ms, it waited for
    something else; idle_unknown_ms), host_wait_ms (how long calls on the host waited for the device; NaN where there
    are several, as calls do not tell which), delay_p50_us, delay_p90_us, delay_p99_us (start of a kernel less that of
    its launch call), verdict, evidence.
    """
    names, columns = [*owners.scopes.stages, OUTSIDE], list(STAGE_COLUMNS)
    stage = np.where(owners.stage >= 0, owners.stage, len(names) - 1)
    rows = []
    launching = is_launch(events)
    launching[owners.launch[occupied.row][owners.launch[occupied.row] >= 0]] = True
    aims_at = _devices_of_launches(events, owners, occupied)
    waited = _sum_by(stage, host_wait_ns(events, owners), len(names)) / MS
    for device, label in enumerate(events.devices):
        on_device = occupied.device == device
        mine = occupied.row[on_device]
        present = [one for one in range(len(names)) if (stage[mine] == one).any()]
        for one in [*present, None] if len(mine) else []:
            chosen = on_device if one is None else on_device & (stage[occupied.row] == one)
            called = launching & (aims_at == device)
            called = called if one is None else called & (stage == one)
            wait_ms = float(waited.sum() if one is None else waited[one])
            entry: dict[str, object] = {"device": label, "stage": ALL if one is None else names[one]}
            entry["host_wait_ms"] = wait_ms if len(events.devices) == 1 else float("nan")
            rows.append(entry | _stage_row(events, owners, occupied, chosen, called, one is None))
    return pd.DataFrame(rows, columns=columns)


def _devices_of_launches(events: Events, owners: Owners, occupied: Occupancy) -> np.ndarray:
    """Return for each launch the device that its event ran on; of those without one, the only device there is."""
    used = np.unique(occupied.device)
    found = np.full(len(events), used[0] if len(used) == 1 else NOTHING)
    known = owners.launch[occupied.row] >= 0
    found[owners.launch[occupied.row[known]]] = occupied.device[known]
    return found


def host_wait_ns(events: Events, owners: Owners) -> np.ndarray:
    """Return for each event on the host how long it waited for a device, in ns: calls that synchronize, and copies.

    A call that copies to or from ordinary memory returns when the copy is done.
    """
    matching = [WAITS.search(name) is not None for name in events.names]
    waiting = (events.kind == Kind.RUNTIME) & events.named(matching)
    waited = np.where(waiting, events.length_ns, 0)
    copies = np.flatnonzero((events.kind == Kind.MEMCPY) & (owners.launch >= 0))
    call = owners.launch[copies]
    done = events.end_ns[copies]
    inside = (done <= events.end_ns[call]) & (done > events.start_ns[call])
    waited[call[inside]] = (done - events.start_ns[call])[inside]
    return waited


IDLE = ("before", "host", "launch", "wait", "unknown")
STAGE_COLUMNS = (
    *("device", "stage", "steps", "kernels", "launches", "launches_per_step", "busy_ms", "sum_ms", "idle_ms"),
    *("idle_before_ms", "idle_host_ms", "idle_launch_ms", "idle_wait_ms", "idle_unknown_ms"),
    *("host_wait_ms", "delay_p50_us", "delay_p90_us", "delay_p99_us", "verdict", "evidence"),
)


def _stage_row(
    events: Events, owners: Owners, occupied: Occupancy, chosen: np.ndarray, called: np.ndarray, whole: bool
) -> dict[str, object]:
    mine = np.zeros(len(events), dtype=bool)
    mine[occupied.row[chosen]] = True
    steps = owners.step[occupied.row[chosen]]
    count = len(np.unique(steps[steps >= 0]))
    delay_us = occupied.delay_ns[chosen & occupied.leads] / US
    parts = {name: int(getattr(occupied, f"{name}_ns")[chosen].sum()) for name in IDLE}
    if whole:
        parts["host"], parts["before"] = parts["host"] + parts["before"], 0
    busy = int(busy_ns(events, mine))
    verdict, evidence = _verdict(occupied, chosen, busy, parts)
    return {
        "steps": count,
        "kernels": int(chosen.sum()),
        "launches": int(called.sum()),
        "launches_per_step": int(called.sum()) / count if count else float("nan"),
        "busy_ms": busy / MS,
        "sum_ms": int(events.length_ns[mine].sum()) / MS,
        "idle_ms": sum(parts.values()) / MS,
        **{f"idle_{name}_ms": value / MS for name, value in parts.items()},
        **{f"delay_p{q}_us": percentile(delay_us, q) for q in (50, 90, 99)},
        "verdict": verdict,
        "evidence": evidence,
    }


def _verdict(occupied: Occupancy, chosen: np.ndarray, busy: int, parts: dict[str, int]) -> tuple[str, str]:
    """Return what sets a stage's pace, and the figures that say so."""
    kernels, leads = int(chosen.sum()), int((chosen & occupied.leads).sum())
    if kernels < 2 or not busy:
        return "unknown", "one device event, or some of no length, tell nothing of a pace"
    if not leads:
        return "unknown", f"the launches of all {kernels} device events were not recorded"
    early = int((chosen & (occupied.delay_ns < 0)).sum())
    if early > EARLY * leads:
        return "unknown", f"{early} of {leads} events begin before their launch: the clocks of host and device disagree"
    if 2 * leads < kernels and parts["unknown"] > parts["host"] + parts["launch"]:
        return "unknown", f"the launches of {kernels - leads} of {kernels} kernels were not recorded"
    # What the device waited before the stage's step began is nothing that the stage could have used.
    span = max(busy + sum(parts.values()) - parts["before"], 1)
    idle, wait = (parts["host"] + parts["launch"]) / span, parts["wait"] / span
    starved = int((chosen & occupied.starved).sum()) / leads if leads else 0.0
    said = (
        f"device busy {busy / span:.0%}, waiting for the host {idle:.0%}, for something else {wait:.0%} of its time; "
    )
    said += f"{starved:.0%} of {leads} launches found it without work"
    if wait > WAITING:
        return "waiting", said
    if idle < HOST_BOUND_IDLE:
        return "device-bound", said
    return ("host-bound" if starved >= HOST_BOUND_STARVED else "mixed"), said


def step_table(events: Events, owners: Owners, occupied: Occupancy) -> pd.DataFrame:
    """Return a row for each step.

    Columns: step, label, phase, host_ms (of the step on the host), kernels, launches, busy_ms, sum_ms, and the parts
    of the idle time before its kernels as in stage_table().
    """
    scopes = owners.scopes
    size = len(scopes.step_labels)
    step = owners.step[occupied.row]
    of_step = step >= 0
    table: dict[str, object] = {
        "step": np.arange(size),
        "label": list(scopes.step_labels),
        "phase": _text([*scopes.stages, ""], scopes.step_phase),
        "host_ms": (scopes.step_end_ns - scopes.step_start_ns) / MS,
        "kernels": np.bincount(step[of_step], minlength=size),
        "launches": np.bincount(owners.step[is_launch(events) & (owners.step >= 0)], minlength=size),
        "busy_ms": np.asarray(busy_ns(events, np.ones(len(events), dtype=bool), owners.step, size)) / MS,
        "sum_ms": _sum_by(step[of_step], events.length_ns[occupied.row[of_step]], size) / MS,
    }
    for part in IDLE:
        table[f"idle_{part}_ms"] = _sum_by(step[of_step], getattr(occupied, f"{part}_ns")[of_step], size) / MS
    return pd.DataFrame(table)


def host_table(events: Events, owners: Owners, forest: Forest) -> pd.DataFrame:
    """Return a row a stage: stage, steps (in which it occurs), operators (calls), host_ms.

    host_ms is the own time of everything on the host: operators, annotations, runtime calls, Python functions.
    """
    names = [*owners.scopes.stages, OUTSIDE]
    stage = np.where(owners.stage >= 0, owners.stage, len(names) - 1)[forest.rows]
    operators = events.kind[forest.rows] == Kind.OPERATOR
    host_ns = _sum_by(stage, forest.self_ns(), len(names))
    calls = np.bincount(stage[operators], minlength=len(names))
    shown = np.flatnonzero((calls > 0) | (host_ns > 0))
    stages = [names[one] for one in shown.tolist()]
    step = owners.step[forest.rows]
    occurs = np.zeros((len(names), len(owners.scopes.step_labels) + 1), dtype=bool)
    occurs[stage, step] = True  # the last column is that of no step
    steps = occurs[:, :-1].sum(axis=1)[shown]
    return pd.DataFrame({"stage": stages, "steps": steps, "operators": calls[shown], "host_ms": host_ns[shown] / MS})


def coverage(events: Events, owners: Owners) -> pd.DataFrame:
    """Return how much device time could be attributed how far down: index module, range, operator, nothing.

    Columns: count, total_ms, share (of the sum of durations).
    """
    rows = np.flatnonzero(events.is_kind(*DEVICE))
    level, duration_ns = owners.level()[rows], events.length_ns[rows]
    total_ns = _sum_by(level, duration_ns, len(Level))
    return pd.DataFrame(
        {
            "count": np.bincount(level, minlength=len(Level)),
            "total_ms": total_ns / MS,
            "share": total_ns / max(int(total_ns.sum()), 1),
        },
        index=pd.Index([one.name.lower() for one in Level], name="attributed to"),
    )


def _grouped(keys: Sequence[np.ndarray], *values: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return, for each distinct combination of keys, its first row, its number of rows, and the sums of `values`."""
    key = np.zeros(len(keys[0]), dtype=np.int64)
    for one in keys:
        low = int(one.min(initial=0))
        key = key * (int(one.max(initial=0)) - low + 1) + (one - low)
    group, uniques = pd.factorize(key)
    first = np.full(len(uniques), len(key))
    np.minimum.at(first, group, np.arange(len(key)))
    count = np.bincount(group, minlength=len(uniques))
    return first, count, [_sum_by(group, value, len(uniques)) for value in values]


def _sum_by(group: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, group, values)
    return sums


def _text(names: Sequence[str], number: np.ndarray) -> np.ndarray:
    """Return names by number; the last name stands for NOTHING."""
    table = np.empty(len(names), dtype=object)
    table[:] = names
    return table[number]
