"""The live profiler's results as columns, and what attribution makes of them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from builders import DECODER, GENERATE, LAYER, Script, tiny_llava

from profkit import chrome, inspection, kineto, samples, tracing
from profkit.attribution import Why, aligned, is_range, missing_ranges, owners_in
from profkit.events import HOST, NOTHING, Kind
from profkit.explanation import Explanation, explain
from profkit.ledger import Ledger
from profkit.nesting import nest
from profkit.probes import Instrument
from profkit.run import recorded
from profkit.spans import Spans

OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def live():
    """A profiled generate() of tiny-llava: spans on the profiler's clock, columns, and the exported text."""
    loaded = tiny_llava()
    sample = samples.ImageSample([samples.default_image()], "What is this?", loaded.processor, loaded.model, 6)
    kwargs = {**sample.transfer(sample.preprocess(sample.load())), **OPTIONS}
    anatomy = inspection.inspect(loaded.model, **kwargs)
    ledger, session = Ledger(), kineto.Session(frozenset(range(6)), torch.device("cpu"))
    instrument = Instrument(loaded.model, anatomy, ledger, "layer", None, session.wrap, session.on_iteration)
    with session, instrument:
        loaded.model.generate(**kwargs)
    events = session.events()
    return aligned(Spans(ledger.marks(), ledger.scopes.list), events), events, session.export()


def explained(spans: Spans, events) -> Explanation:
    return explain(spans, events, np.ones(len(spans.stage), dtype=bool))


def test_no_range_is_missing_and_a_lost_one_is_counted(live):
    spans, events, _ = live
    within = recorded(spans, range(6))
    missing, expected = missing_ranges(spans, events, within)
    assert (missing, expected) == (0, len(spans))
    ranges = np.flatnonzero(is_range(events))
    lost = np.ones(len(events), dtype=bool)
    lost[ranges[5:9]] = False
    assert missing_ranges(spans, events.select(lost), within) == (4, len(spans))
    doubts = [one.name for one in explain(spans, events.select(lost), within).checks if one.ok is False]
    assert doubts == ["ranges"]


def test_columns_equal_the_exported_trace(live):
    _, events, text = live
    trace = chrome.parse(text)
    base = int(trace.header["baseTimeNanoseconds"])
    exported = trace.events.select(trace.events.is_kind(*HOST))
    assert len(exported) == len(events)

    def rows(one, start_ns):
        names = [one.names[name] for name in one.name]
        kinds = one.kind.tolist()
        return sorted(zip(names, kinds, start_ns.tolist(), one.duration_ns.tolist(), strict=True))

    assert rows(events, events.start_ns) == rows(exported, exported.start_ns + base)


def test_nearly_all_operator_time_lands_in_a_stage_other_than_other(live):
    spans, events, _ = live
    operators = explained(spans, events).operators
    of_operators = operators[operators["kind"] == "operator"]
    by_stage = of_operators.groupby("stage")["self_ms"].sum()
    outside = by_stage.get("other", 0.0) + by_stage.get("outside", 0.0)
    assert outside <= 0.001 * by_stage.sum()
    assert {"vision", "projector", "embed", "prefill", "decode", "head", "select"} <= set(by_stage.index)


def test_self_times_over_all_scopes_equal_root_operators_plus_gaps(live):
    spans, events, _ = live
    owners, forest = owners_in(spans, events), nest(events)
    own = forest.self_ns()
    # profkit's ranges are scopes; their own time is what no operator explains: the gaps.
    ranges = is_range(events)[forest.rows]
    tops = forest.parent < 0
    assert int(own.sum()) == int(forest.duration_ns[tops].sum())
    roots = ~ranges & (np.append(forest.nearest(~ranges), NOTHING)[forest.parent] < 0)
    assert int(own.sum()) == int(forest.duration_ns[roots].sum()) + int(own[ranges].sum())
    by_scope = np.zeros(len(owners.scopes) + 1, dtype=np.int64)
    np.add.at(by_scope, owners.scope[forest.rows], own)
    assert int(by_scope.sum()) == int(own.sum())


def test_windows_are_labelled_so_that_sums_are_not_taken_for_the_whole():
    loaded = tiny_llava()
    sample = samples.ImageSample([samples.default_image()], "What is this?", loaded.processor, loaded.model, 12)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    run = tracing.trace(loaded.model, sample=sample, options=options, warmup=0, repeat=1, profile_steps={0, 3, 4, 7})
    assert run.operators is not None
    steps = run.operators.groupby("stage")["steps"].agg(["min", "max"])
    assert steps.loc["decode"].tolist() == [3, 3]
    assert steps.loc["prefill"].tolist() == steps.loc["vision"].tolist() == [1, 1]
    heads = run.operators[(run.operators["stage"] == "head") & (run.operators["name"] == "aten::linear")]
    assert heads["calls"].tolist() == heads["steps"].tolist() == [4]


# -- devices: what a profiler on a GPU returns, recorded by hand ----------------------------------------

PID = os.getpid()


@dataclass
class FakeEvent:
    """Has the methods of torch's _KinetoEvent that are read."""

    what: tuple

    def name(self):
        return self.what[0]

    def activity_type(self):
        return self.what[1]

    def start_ns(self):
        return self.what[2]

    def duration_ns(self):
        return self.what[3]

    def device_index(self):
        return self.what[4]

    def device_resource_id(self):
        return self.what[5]

    def correlation_id(self):
        return self.what[6]


class FakeResults:
    def __init__(self, rows: list[tuple]) -> None:
        self.rows = rows

    def events(self):
        return [FakeEvent(row) for row in self.rows]


SHIFT = 1_000_000


def recorded_on_a_device() -> tuple[Spans, list[tuple]]:
    """generate() 0..500, decoder 100..400, layer 200..300; kernels run long after their launches."""
    script = Script()
    script.enter(GENERATE, 0, tokens=1)
    script.enter(DECODER, 100, tokens=1)
    script.call(LAYER, 200, 300)
    script.leave(DECODER, 400)
    script.leave(GENERATE, 500)
    ranges = [(0, 0, 500), (1, 100, 300), (2, 200, 100)]
    rows = [(f"profkit:{mark}", "cpu_op", SHIFT + at, length, PID, 77, 0) for mark, at, length in ranges]
    rows += [
        ("aten::mm", "cpu_op", SHIFT + 210, 60, PID, 77, 5),
        ("cudaLaunchKernel", "cuda_runtime", SHIFT + 220, 10, PID, 77, 5),
        ("gemm", "kernel", SHIFT + 600, 50, 0, 7, 5),
        ("aten::add", "cpu_op", SHIFT + 350, 30, PID, 77, 6),
        ("cudaLaunchKernel", "cuda_runtime", SHIFT + 355, 10, PID, 77, 6),
        ("gemm", "kernel", SHIFT + 650, 20, 1, 7, 6),
        ("cudaLaunchKernel", "cuda_runtime", SHIFT + 250, 10, PID, 99, 8),
        ("copy", "gpu_memcpy", SHIFT + 700, 20, 0, 9, 8),
        ("gemm", "kernel", SHIFT + 710, 20, 0, 7, 999),
        ("forward", "gpu_user_annotation", SHIFT + 600, 400, 0, 7, 0),
    ]
    return script.spans(), rows


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kineto, "KinetoEvent", FakeEvent)
    spans, rows = recorded_on_a_device()
    events = kineto.events_of(FakeResults(rows))
    return aligned(spans, events), events


def test_a_kernel_belongs_where_it_was_launched_not_where_it_ran(fake):
    spans, events = fake
    assert events.devices == ["0", "1"]
    assert (events.correlation[events.kind == Kind.OPERATOR] == NOTHING).all()
    explanation = explained(spans, events)
    kernels, operators, device = explanation.kernels, explanation.operators, explanation.device
    found = {(row.name, row.path, row.operator, row.count) for row in kernels.itertuples(index=False)}
    assert found == {
        ("gemm", LAYER.path, "aten::mm", 1),
        ("gemm", DECODER.path, "aten::add", 1),
        ("copy", LAYER.path, "", 1),
        ("gemm", "", "", 1),
    }
    assert set(kernels["stage"]) == {"prefill", "outside"}
    why = owners_in(spans, events).why
    assert why[events.named([name == "copy" for name in events.names])].tolist() == [Why.OTHER_THREAD]
    assert operators.set_index("name").loc["aten::mm", ["kernels", "device_ms"]].tolist() == [1, 50 / 1e6]
    rows = device.set_index(["device", "stage"])
    assert rows.loc[("0", "prefill"), "busy_ms"] == 70 / 1e6
    # 600..650, 700..720, 710..730: the union is 80, the sum 90
    assert rows.loc[("0", "all"), ["busy_ms", "sum_ms"]].tolist() == [80 / 1e6, 90 / 1e6]
    assert rows.loc[("1", "all"), "busy_ms"] == 20 / 1e6


def test_busy_time_of_the_clean_run_is_that_of_a_step_times_its_steps(fake):
    from profkit.run import Pass, Run

    spans, events = fake
    explanation = explained(spans, events)
    device = explanation.device
    device.loc[device["stage"] == "prefill", "steps"] = 2  # as if two steps had been recorded
    run = Run({}, None, spans.scopes, [Pass("clean", 1, spans)], explanation.operators, explanation.kernels, device)
    # One step in the clean pass; recorded: 70 on device 0 and 20 on device 1, in two steps.
    assert run.stages().loc["prefill", "busy_ms"] == pytest.approx((70 + 20) / 2 / 1e6)
    assert run.stages()["busy_ms"].drop("prefill").isna().all()


def test_a_written_trace_analysed_again_gives_the_same_owners(live, tmp_path):
    """Round trip: spans and events → trace file → columns → owners."""
    from profkit import analysis, annotate, tracks
    from profkit.attribution import RANGE_PREFIX

    spans, events, text = live
    shown = tracks.of(spans, recorded(spans, range(6)))
    path = tmp_path / "trace.json.gz"
    annotate.write(path, annotate.annotated(text, RANGE_PREFIX, annotate.Own(shown)))
    direct = explained(spans, events).operators
    again = analysis.analyze(path)
    assert again.evidence == "steps: profkit's own tracks"
    assert again.tables["steps"]["phase"].tolist() == ["prefill"] + ["decode"] * 5

    def by_stage(table):
        return table[table["kind"] == "operator"].groupby("stage")["calls"].sum()

    one, other = by_stage(direct), by_stage(again.tables["operators"])
    assert one["vision"] == other["vision"] and one["decode"] == other["decode"]
    # A range is opened just after its mark: an operator in between may fall on either side.
    assert abs(one - other).sum() <= 0.002 * one.sum()
