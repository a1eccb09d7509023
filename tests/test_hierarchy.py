"""Trees that add up, layers over steps, steps that stand out, slices that do not cross."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pandas as pd
import pytest
from builders import generation, small_llava
from transformers import LogitsProcessor

import profkit
from profkit import figures, hierarchy, pace, stages
from profkit.nesting import side_by_side


@pytest.fixture(scope="module")
def run():
    model, kwargs = small_llava()
    return profkit.trace(model, kwargs, warmup=1, repeat=2)


def children_ms(tree, node):
    return tree[tree["parent"] == node]["total_ms"].sum()


def test_a_tree_of_scopes_adds_up_to_the_stages(run):
    tree = hierarchy.scope_tree(run.representative)
    tops = tree[tree["parent"] < 0].set_index("label")["total_ms"]
    pd.testing.assert_series_equal(tops, run.stages()["host_ms"], check_names=False, atol=1e-9, check_like=True)
    for node, total_ms, self_ms in zip(tree["id"], tree["total_ms"], tree["self_ms"], strict=True):
        assert total_ms == pytest.approx(self_ms + children_ms(tree, node), abs=1e-9)
    by_path = tree[tree["level"] == "scope"].groupby("label")["self_ms"].sum()
    modules = run.modules().set_index("path")["self_ms"]
    layer = "model.language_model.layers.0.mlp"
    assert by_path[layer] == pytest.approx(modules[layer])
    assert (tree["parent"] < tree["id"]).all()


def test_a_tree_of_a_scripted_pass():
    tree = hierarchy.scope_tree(generation().spans())
    labels = tree["label"].tolist()
    assert labels[0] in ("setup", "vision") and "prefill step" in labels
    assert tree[tree["parent"] < 0]["total_ms"].sum() == pytest.approx(generation().spans().run_ns() / 1e6)


def test_a_tree_of_events_sums_what_the_table_holds(run):
    paths = [scope.path for scope in run.scopes]
    tree = hierarchy.event_tree(run.operators, paths, "self_ms", "calls")
    assert tree[tree["parent"] < 0]["total_ms"].sum() == pytest.approx(run.operators["self_ms"].sum())
    assert tree[tree["level"] == "event"]["calls"].sum() == run.operators[run.operators["self_ms"] > 0]["calls"].sum()


def test_layers_over_steps_are_the_spans_of_the_layers(run):
    spans, table = run.representative, hierarchy.layer_table(run.representative)
    assert list(table.index) == [f"model.language_model.layers.{number}" for number in range(len(table))]
    assert table.shape[1] == len(spans.steps)
    paths = [spans.scopes[number].path for number in spans.scope]
    for column, path in itertools.product(table.columns, table.index):
        mine = [row for row in range(len(spans)) if paths[row] == path and spans.step[spans.begin[row]] == column]
        assert table.loc[path, column] == pytest.approx(spans.total_ns[mine].sum() / 1e6)


class SlowThird(LogitsProcessor):
    """Waits as the third token is selected."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, ids, scores):
        self.calls += 1
        if self.calls % 8 == 3:
            time.sleep(0.2)
        return scores


def test_a_slow_step_is_named_with_its_stage_and_how_often():
    model, kwargs = small_llava()
    kwargs = {**kwargs, "max_new_tokens": 8, "min_new_tokens": 8, "logits_processor": [SlowThird()]}
    run = profkit.trace(model, kwargs, warmup=0, repeat=2, profile=False)
    worst = pace.outliers(run.representative, run.clean)[0]
    assert (worst.step, worst.stage, worst.passes) == (2, "select", 2)
    assert worst.of_excess == pytest.approx(1, abs=0.2)
    assert "slow in every pass" in worst.sentence()
    assert pace.iterations(run.clean)["median_ms"].idxmax() == 2


def test_a_scope_of_the_timeline_says_what_it_is_and_where_its_own_time_lies(run):
    spans = run.of_kind("profiled")[0].spans
    shown = run.timeline[run.timeline["row"] == "scopes"]
    kinds = {scope.path: scope.kind for scope in spans.scopes}
    assert shown["kind"].tolist() == [kinds[name] for name in shown["name"]]
    assert (run.timeline[run.timeline["row"] != "scopes"]["kind"] == "").all()
    of_prefill = shown[shown["step"] == "prefill 0"]
    for row in of_prefill.to_dict(orient="records"):
        own = [0] * len(stages.NAMES)
        for segment in range(len(spans.owner)):
            owner = int(spans.owner[segment])
            if owner >= 0 and spans.scopes[spans.scope[owner]].path == row["name"] and spans.step[segment] == 0:
                own[spans.stage[segment]] += int(spans.host_ns[segment])
        if (of_prefill["name"] == row["name"]).sum() == 1:
            assert row["stage"] == (stages.NAMES[own.index(max(own))] if any(own) else "")
    # The whole model's forward runs through many stages, and begins in none that says what it is.
    figure = figures.timeline(run.timeline, "prefill 0")
    texts = {one.name: " ".join(one.text) for one in figure.data}
    assert "LlavaForConditionalGeneration<br>" in texts["scope: forward"]
    assert not any("LlavaForConditionalGeneration<br>" in text for name, text in texts.items() if "scope" not in name)


def crossing(slices):
    return [
        (a, b)
        for a, b in itertools.combinations(sorted(slices, key=lambda one: (one[0], -one[1])), 2)
        if a[0] < b[0] < a[1] < b[1]
    ]


@pytest.mark.parametrize("seed", range(30))
def test_slices_of_a_lane_never_cross(seed):
    draw = random.Random(seed)
    start = np.array([draw.randrange(60) for _ in range(40)])
    end = start + np.array([draw.randrange(0, 25) for _ in range(40)])
    track = np.array([draw.randrange(3) for _ in range(40)])
    lane = side_by_side(track, start, end)
    for place in set(zip(track.tolist(), lane.tolist(), strict=True)):
        rows = np.flatnonzero((track == place[0]) & (lane == place[1]))
        assert crossing(list(zip(start[rows].tolist(), end[rows].tolist(), strict=True))) == []


def test_slices_that_nest_stay_where_they_are():
    start, end = np.array([0, 10, 20, 30]), np.array([100, 20, 30, 30])
    assert side_by_side(np.zeros(4, dtype=np.int64), start, end).tolist() == [0, 0, 0, 0]
    # 5-15 crosses 10-20 and takes the second lane; 16-18 fits into the first again.
    start, end = np.array([10, 5, 16]), np.array([20, 15, 18])
    assert side_by_side(np.zeros(3, dtype=np.int64), start, end).tolist() == [1, 0, 0]
