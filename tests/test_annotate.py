"""What profkit adds to a trace: nothing crosses, counters and arrows are right, and the file keeps its budget."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import perfetto
import pytest
import torch
from builders import small_llava
from handmade import SHARED_TRACES
from test_kineto import FakeEvent, FakeResults, recorded_on_a_device

import profkit
from profkit import annotate, cache, chrome, kineto, trace_file, tracks
from profkit.attribution import aligned
from profkit.errors import InputError
from profkit.events import DEVICE
from profkit.explanation import explain
from profkit.options import parse_size
from profkit.run import recorded

CROSSING = Path(__file__).parent.parent.parent / "shared" / "traces" / "nv_b200_vllm_gptoss_eager.json.gz"


def written(*slices):
    events = [
        {"ph": "X", "cat": "kernel", "name": name, "pid": 0, "tid": 7, "ts": ts, "dur": dur} for name, ts, dur in slices
    ]
    events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": "stream 7"}})
    events += [{"ph": "f", "cat": "ac2g", "name": "ac2g", "id": 1, "pid": 0, "tid": 7, "ts": slices[1][1], "bp": "e"}]
    text = json.dumps({"traceEvents": events, "traceName": "x"}).encode()
    return json.loads(annotate.annotated(text, "profkit:", annotate.Own([])))["traceEvents"]


def test_a_slice_that_crosses_another_moves_with_its_arrow_to_a_named_row():
    events = written(("a", 0, 10), ("b", 5, 10), ("c", 20, 5))
    rows = {one["name"]: one["tid"] for one in events if one["ph"] == "X"}
    assert rows["a"] == rows["c"] == 7 and rows["b"] == annotate.FIRST_LANE
    assert [one["tid"] for one in events if one["ph"] == "f"] == [annotate.FIRST_LANE]
    names = {one["tid"]: one["args"]["name"] for one in events if one["name"] == "thread_name"}
    assert names == {7: "stream 7", annotate.FIRST_LANE: "stream 7 (overlapping)"}
    assert {one["tid"] for one in written(("a", 0, 10), ("b", 2, 3), ("c", 10, 5)) if one["ph"] == "X"} == {7}


@pytest.mark.skipif(not CROSSING.exists(), reason="the shared GPU traces are not here")
def test_perfetto_drops_nothing_of_a_trace_whose_kernels_overlap(tmp_path):
    path = tmp_path / "trace.json.gz"
    source = gzip.decompress(CROSSING.read_bytes())
    annotate.write(path, annotate.annotated(source, "profkit:", annotate.Own([])))
    sql = (
        "select value from stats where name = 'slice_drop_overlapping_complete_event';"
        "select count(*) n, sum(dur) ns from slice where category in ('kernel', 'gpu_memcpy', 'gpu_memset')"
    )
    (dropped,), (counted,) = perfetto.query(path, sql)
    before = chrome.read(CROSSING).events
    rows = before.is_kind(*DEVICE)
    assert int(dropped["value"]) == 0
    assert (int(counted["n"]), int(counted["ns"])) == (rows.sum(), before.duration_ns[rows].sum())
    # As it was recorded, Perfetto drops some.
    assert int(perfetto.query(CROSSING, sql)[0][0]["value"]) > 0


def test_the_cache_is_as_large_as_its_keys_and_values():
    model, kwargs = small_llava()
    run = profkit.trace(model, {**kwargs, "max_new_tokens": 4, "min_new_tokens": 4}, warmup=0, repeat=1)
    text = model.config.text_config
    width = text.num_key_value_heads * text.head_dim
    tokens = np.cumsum(run.steps()["tokens"])
    expected = [text.num_hidden_layers * 2 * width * 4 * int(count) for count in tokens]
    assert run.manifest["cache_bytes"] == expected
    events = json.loads(run.trace_json)["traceEvents"]
    counted = [one for one in events if one["ph"] == "C"]
    values = {
        name: [one["args"]["value"] for one in counted if one["name"] == name] for name in ("tokens", "cache (bytes)")
    }
    assert values == {"tokens": tokens.tolist(), "cache (bytes)": expected}
    assert "forward" not in vars(model.model.language_model)


def test_bytes_of_what_is_shared_count_once():
    one = torch.zeros(4, 8)
    assert cache.bytes_of({"a": [one, one], "b": (one[None],), "c": None}) == 4 * 8 * 4


def test_an_arrow_goes_from_each_scope_to_the_first_of_its_kernels(monkeypatch):
    monkeypatch.setattr(kineto, "KinetoEvent", FakeEvent)
    spans, rows = recorded_on_a_device()
    events = kineto.events_of(FakeResults(rows))
    spans = aligned(spans, events)
    found = explain(spans, events, recorded(spans, (0,)))
    arrows = {
        (one.from_ns - 1_000_000, one.to, one.to_ns - 1_000_000) for one in tracks.flows(spans, events, found.owners)
    }
    # The layer launched at 220 what began at 600 on device 0; the decoder itself at 355 what began at 650 on device 1.
    assert arrows == {(220, (0, 7), 600), (355, (1, 7), 650)}
    assert found.busy_share["device busy (share)"][0] == pytest.approx(90 / 500 / 2)
    content = json.dumps({"traceEvents": []}).encode()
    file = trace_file.written(content, spans, events, found, (0,), 10**6, {"model": "m"}, {})
    text = json.loads(file.text)
    flow = [one for one in text["traceEvents"] if one["ph"] in "sf" and one["name"] == annotate.FLOW]
    assert [one["ph"] for one in flow] == ["s", "f", "s", "f"] and text["profkit"] == {"model": "m", "steps": [0]}
    busy = [one["args"]["value"] for one in text["traceEvents"] if one["name"] == "device busy (share)"]
    assert busy == [pytest.approx(90 / 500 / 2)]


def test_a_trace_keeps_its_budget_and_says_what_is_left_out(tmp_path):
    model, kwargs = small_llava()
    whole = profkit.trace(model, kwargs, warmup=0, repeat=1)
    size = len(annotate.compressed(whole.trace_json))
    cut = profkit.trace(model, kwargs, warmup=0, repeat=1, trace_budget_bytes=size * 2 // 3, out=tmp_path / "cut")
    assert (tmp_path / "cut" / "trace.json.gz").stat().st_size < size * 3 // 4
    about = json.loads(cut.trace_json)["profkit"]
    kept = len(about["steps"])
    assert about["steps"] == list(range(kept)) and 0 < kept < 5
    assert f"the trace holds {kept} of 5 recorded steps" in " ".join(cut.manifest["notes"])
    events = chrome.parse(cut.trace_json).events
    last = max(events.start_ns[events.named([name == f"decode {kept - 1}" for name in events.names])], default=0)
    assert not [name for name in events.names if name == f"decode {kept}"] and last > 0
    assert cut.operators["calls"].sum() == pytest.approx(whole.operators["calls"].sum(), rel=0.01)


def test_a_budget_that_one_step_passes_is_said_or_refused(tmp_path):
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1, trace_budget_bytes=1000)
    size = len(annotate.compressed(run.trace_json))
    said = " ".join(run.manifest["notes"])
    assert "the trace holds 1 of 5 recorded steps: more pass 0.001 MB" in said
    taken = re.search(
        r"the trace takes about ([\d.]+) MB, more than the 0.001 MB of --trace-budget: one step is kept", said
    )
    # What the checks add to the trace comes later, and has room kept for it.
    assert 0.9 * size <= float(taken[1]) * 1e6 <= size + trace_file.ROOM_BYTES
    with pytest.raises(InputError, match="trace_budget_bytes is 0"):
        profkit.trace(model, kwargs, trace_budget_bytes=0)
    with pytest.raises(InputError, match="'0MB' is nothing: --no-profile"):
        parse_size("0MB")


def test_a_trace_tells_what_its_run_was_found_to_be():
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1)
    said = chrome.parse(run.trace_json).header["profkit_checks"]
    assert [one["check"] for one in said] == [one["check"] for one in run.manifest["checks"]["verdicts"]]
    again = annotate.with_checks(run.trace_json, [{"check": "another", "ok": False}])
    assert chrome.parse(again).header["profkit_checks"] == [{"check": "another", "ok": False}]
    assert len(chrome.parse(again).events) == len(chrome.parse(run.trace_json).events)


@pytest.mark.parametrize(
    ("size", "count"), [("50MB", 50_000_000), ("800 kB", 800_000), ("1.5G", 1_500_000_000), ("12", 12)]
)
def test_sizes(size, count):
    assert parse_size(size) == count


@pytest.mark.parametrize("size", ["", "MB", "-1MB", "50 mb", "1e6"])
def test_what_is_no_size(size):
    with pytest.raises(InputError, match="is no size such as 50MB"):
        parse_size(size)


def test_slices_that_touch_do_not_cross_in_floating_point(tmp_path):
    """Some viewers subtract a row's first ts and add dur, as floating point numbers: ends must keep their order."""
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1, profile_steps=range(8))
    text = json.loads(run.trace_json)
    slices = [one for one in text["traceEvents"] if one["ph"] == "X"]
    assert 0 <= min(one["ts"] for one in slices) < 1 and max(one["ts"] for one in slices) < 60e6
    for row in (1, 2, 3):
        mine = [one for one in slices if one["pid"] == annotate.OWN_PROCESS and one["tid"] == row]
        mine.sort(key=lambda one: (one["ts"], -one["dur"]))
        ends: list[float] = []
        for one in mine:
            begin, end = one["ts"] - mine[0]["ts"], one["ts"] - mine[0]["ts"] + one["dur"]
            while ends and ends[-1] <= begin:
                ends.pop()
            assert not ends or end < ends[-1]
            ends.append(end)


@pytest.mark.skipif(not (SHARED_TRACES / "nv_h100_bert.json.gz").exists(), reason="the shared traces are not here")
def test_a_later_zero_leaves_every_moment_where_it_was():
    content = gzip.decompress((SHARED_TRACES / "nv_h100_bert.json.gz").read_bytes())
    before = json.loads(content)
    after = json.loads(annotate.annotated(content, "profkit:", annotate.Own([])))

    def moments(trace) -> set[tuple[str, int]]:
        base_ns = int(trace.get("baseTimeNanoseconds", 0))
        real = (one for one in trace["traceEvents"] if one["ph"] in "Xsf" and not isinstance(one["pid"], str))
        return {(one["name"], base_ns + round(one["ts"] * 1000)) for one in real}

    assert after["baseTimeNanoseconds"] > before["baseTimeNanoseconds"]
    assert moments(after) == moments(before)
