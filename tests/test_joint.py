"""The tree of a profiled pass: each instant in the innermost scope or operator, kernels under what launched them."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from builders import DECODER, GENERATE, LAYER, Script, small_llava
from test_kineto import PID, SHIFT, FakeEvent, FakeResults, explained, recorded_on_a_device

import profkit
from profkit import hierarchy, kineto, report, stages
from profkit.attribution import aligned
from profkit.ledger import Scope
from profkit.run import recorded


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(kineto, "KinetoEvent", FakeEvent)


def of_clock(table, clock):
    return table[table["clock"] == clock].reset_index(drop=True)


def by_path(tree, column):
    """Return a column by the labels from the top down."""
    paths: list[tuple[str, ...]] = []
    for parent, name in zip(tree["parent"], tree["label"], strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), name))
    return dict(zip(paths, tree[column], strict=True))


def assert_adds_up(tree):
    below = tree[tree["parent"] >= 0].groupby("parent")["total_ms"].sum().reindex(tree["id"], fill_value=0.0)
    missed = tree["total_ms"].to_numpy() - tree["self_ms"].to_numpy() - below.to_numpy()
    assert np.abs(missed).max() < 1e-9 and (tree["self_ms"] >= 0).all()


@pytest.mark.usefixtures("fake")
def test_a_recorded_device_by_hand():
    spans, rows = recorded_on_a_device()
    events = kineto.events_of(FakeResults(rows))
    found = explained(aligned(spans, events), events)
    host, device = of_clock(found.trees, "host"), of_clock(found.trees, "device")
    assert_adds_up(host)
    assert_adds_up(device)
    own_ns = {path: round(ms * 1e6) for path, ms in by_path(host, "self_ms").items() if ms}
    above = ("prefill", "prefill step", DECODER.path)
    # The layer's 100 less aten::mm's 60, of which 10 are the launch; the decoder's 300 - 100 less aten::add's 30.
    assert {path: ns for path, ns in own_ns.items() if path[0] == "prefill"} == {
        (*above, LAYER.path): 40,
        (*above, LAYER.path, "aten::mm"): 50,
        (*above, LAYER.path, "aten::mm", "cudaLaunchKernel"): 10,
        above: 170,
        (*above, "aten::add"): 20,
        (*above, "aten::add", "cudaLaunchKernel"): 10,
    }
    assert sum(own_ns.values()) == 500
    kernels_ns = {path: round(ms * 1e6) for path, ms in by_path(device, "self_ms").items() if ms}
    # The copy was launched by another thread inside the layer; of one kernel the launch was not recorded.
    assert kernels_ns == {
        (*above, LAYER.path, "aten::mm", "gemm"): 50,
        (*above, "aten::add", "gemm"): 20,
        (*above, LAYER.path, "copy"): 20,
        ("outside", "gemm"): 20,
    }
    assert device["total_ms"][device["parent"] < 0].sum() == pytest.approx(found.kernels["total_ms"].sum())


INNER = [Scope(f"layers.0.part{number}", "module") for number in range(3)]


def scripted(draw):
    """Return a script of scopes that nest at random, and operators that nest among themselves but cross scopes."""
    script = Script()
    script.enter(GENERATE, 0, tokens=1)
    script.enter(DECODER, 10, tokens=1)
    script.enter(LAYER, 20)
    now, stack = 20, []
    while now < 80:
        now += draw.randrange(1, 6)
        if stack and draw.random() < 0.5:
            script.leave(stack.pop(), now)
        elif len(stack) < 3:
            stack.append(INNER[len(stack)])
            script.enter(stack[-1], now)
    while stack:
        now += 1
        script.leave(stack.pop(), now)
    script.leave(LAYER, 95)
    script.leave(DECODER, 97)
    script.leave(GENERATE, 100)
    return script.spans()


def operators(draw):
    """Return (name, begin, end) of operators, each inside the one that it comes after or behind it."""
    found, stack, now = [], [], 0
    for _ in range(14):
        now += draw.randrange(0, 9)
        stack = [end for end in stack if end > now]
        limit = stack[-1] if stack else 98
        if now >= limit:
            continue
        end = draw.randrange(now + 1, limit + 1)
        found.append((f"op{draw.randrange(3)}", now, end))
        stack.append(end)
    return found


def plainly(spans, ops):
    """Return ns by path, instant by instant."""
    marks = spans.marks.host_ns
    found: Counter[tuple[str, ...]] = Counter()

    def segment_at(time):
        return int(np.flatnonzero(marks <= time)[-1])

    def chain_of(number):
        name, begin, end = ops[number]
        outer = [one for one in range(number) if ops[one][1] <= begin and end <= ops[one][2]]
        if outer and spans.owner[segment_at(ops[outer[-1]][1])] == spans.owner[segment_at(begin)]:
            return (*chain_of(outer[-1]), name)
        return (name,)

    for time in range(100):
        segment = segment_at(time)
        owner = int(spans.owner[segment])
        scopes, span = [], owner
        while span >= 0:
            if spans.scopes[spans.scope[span]].kind != "generate":
                scopes.append(spans.scopes[spans.scope[span]].path)
            span = int(spans.parent[span])
        open_ = [number for number, (_, begin, end) in enumerate(ops) if begin <= time < end]
        inside = bool(open_) and ops[open_[-1]][1] >= marks[spans.begin[owner]]
        steps = ("prefill step",) if spans.step[segment] >= 0 else ()
        path = (stages.NAMES[spans.stage[segment]], *steps, *reversed(scopes))
        found[path + (chain_of(open_[-1]) if inside else ())] += 1
    return dict(found)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("seed", range(40))
def test_every_instant_is_in_the_innermost_scope_or_operator(seed):
    draw = random.Random(seed)
    spans, ops = scripted(draw), operators(draw)
    marks = spans.marks.host_ns
    rows = [
        (f"profkit:{begin}", "cpu_op", SHIFT + int(marks[begin]), int(marks[end] - marks[begin]), PID, 77, 0)
        for begin, end in zip(spans.begin.tolist(), spans.end.tolist(), strict=True)
    ]
    rows += [(name, "cpu_op", SHIFT + begin, end - begin, PID, 77, 0) for name, begin, end in ops]
    events = kineto.events_of(FakeResults(rows))
    tree = of_clock(explained(aligned(spans, events), events).trees, "host")
    assert_adds_up(tree)
    found = {path: round(ms * 1e6) for path, ms in by_path(tree, "self_ms").items() if ms}
    assert found == plainly(spans, ops)


@pytest.fixture(scope="module")
def run():
    model, kwargs = small_llava()
    return profkit.trace(model, kwargs, warmup=1, repeat=1)


def test_the_tree_of_a_real_run_holds_what_the_table_of_operators_does(run):
    tree = of_clock(run.trees, "host")
    assert_adds_up(tree)
    found = tree[tree["level"] == "operator"].groupby("label")["self_ms"].sum()
    told = run.operators.groupby("name")["self_ms"].sum()
    # Of what the table holds, only instants of the recorded steps are in the tree.
    assert set(found.index) <= set(told.index) and found.sum() == pytest.approx(told.sum(), rel=0.02)
    assert (found <= told[found.index] + 1e-9).all()
    profiled = run.of_kind("profiled")[0]
    within = recorded(profiled.spans, profiled.steps_recorded)
    total_ms = profiled.spans.host_ns[within & (profiled.spans.stage >= 0)].sum() / 1e6
    assert tree[tree["parent"] < 0]["total_ms"].sum() == pytest.approx(total_ms, rel=0.02)
    assert "profiled steps: down to operators" in report.html_of([run])


def test_a_pruned_tree_keeps_its_sums_and_says_how_much_was_left_out(run):
    tree = of_clock(run.trees, "host")
    for most in (1, 5, 40, 300, len(tree) - 1, len(tree)):
        cut = hierarchy.pruned(tree, most)
        assert_adds_up(cut)
        assert cut["total_ms"][cut["parent"] < 0].sum() == pytest.approx(tree["total_ms"][tree["parent"] < 0].sum())
        rest = cut[cut["level"] == "rest"]
        assert len(cut) - len(rest) == most
        assert sum(int(name.split()[0]) for name in rest["label"]) == len(tree) - most
        assert (cut["parent"] < cut["id"]).all()
        kept = cut[cut["level"] != "rest"].sort_values("total_ms")["total_ms"]
        pd.testing.assert_series_equal(
            kept.reset_index(drop=True), tree["total_ms"].nlargest(most).sort_values().reset_index(drop=True)
        )
