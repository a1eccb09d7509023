"""The copy for TensorBoard's plugin: read by the plugin itself, with the device times that profkit finds."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest
from builders import small_llava

import profkit
from profkit import analysis, annotate, chrome, tensorboard

SHARED = Path(__file__).parent.parent.parent / "shared" / "traces"
GPU = SHARED / "nv_h100_bert.json.gz"
PLUGIN = """
import json, sys
from torch_tb_profiler.profiler.data import RunProfileData
from torch_tb_profiler.profiler.run_generator import RunGenerator
data = RunProfileData.parse("worker", "1", sys.argv[1], sys.argv[2])
data.process()
run = RunGenerator("worker", "1", data).generate_run_profile()
modules, stack = [], list(run.module_stats or [])
while stack:
    one = stack.pop()
    modules.append(one)
    stack += one.children
print(json.dumps({
    "views": [view.display_name for view in run.views],
    "steps": [step["name"] if isinstance(step, dict) else str(step) for step in data.steps_names],
    "operators": {one.name: one.self_device_duration for one in data.op_list_groupby_name},
    "calls": {one.name: one.calls for one in data.op_list_groupby_name},
    "modules": [[one.name, one.occurences] for one in modules],
}))
"""


def asked(path, tmp_path):
    """Return what the plugin makes of a trace; skip where it is not installed."""
    python = os.environ.get("PROFKIT_TB_PYTHON")
    if not python:
        pytest.skip("PROFKIT_TB_PYTHON names no Python with torch-tb-profiler")
    done = subprocess.run([python, "-c", PLUGIN, str(path), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def renamed(source: Path, tmp_path: Path, copy) -> Path:
    target = tmp_path / "worker.1.pt.trace.json.gz"
    annotate.write(target, copy(gzip.decompress(source.read_bytes())))
    return target


@pytest.mark.skipif(not GPU.exists(), reason="the shared GPU traces are not here")
def test_device_time_by_operator_is_profkits(tmp_path):
    found = asked(renamed(GPU, tmp_path, tensorboard.plugin_copy), tmp_path)
    table = analysis.analyze(GPU).tables["operators"]
    expected = table[table["kind"] == "operator"].groupby("name")["device_ms"].sum() * 1000
    expected = expected[expected > 0]
    assert {name: found["operators"][name] for name in expected.index} == pytest.approx(expected.to_dict(), rel=0.01)
    plain = asked(renamed(GPU, tmp_path, bytes), tmp_path)
    assert sum(plain["operators"].values()) == 0


def test_steps_and_modules_are_those_of_the_run(tmp_path):
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1, out=tmp_path / "run")
    (board,) = (tmp_path / "run" / "tensorboard").iterdir()
    found = asked(board, tmp_path)
    assert {"Overview", "Operator", "Trace", "Module"} <= set(found["views"])
    profiled = next(one.spans for one in run.of_kind("profiled"))
    assert len(found["steps"]) == len(profiled.steps)
    calls = run.operators[run.operators["kind"] == "operator"].groupby("name")["calls"].sum()
    assert found["calls"]["aten::mm"] == calls["aten::mm"]
    modules = dict(found["modules"])
    assert modules["model.language_model.layers.1.mlp"] == 5


def test_the_copy_holds_the_plugins_names_and_nothing_of_profkits_own():
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1)
    events = json.loads(tensorboard.plugin_copy(run.trace_json))["traceEvents"]
    assert {one["cat"] for one in events if "cat" in one} >= {"cpu_op", "python_function", "user_annotation"}
    assert not [one for one in events if one.get("pid") == annotate.OWN_PROCESS]
    steps = [one["name"] for one in events if one["name"].startswith("ProfilerStep#")]
    assert steps == [f"ProfilerStep#{number}" for number in range(5)]
    by_id = {one["args"]["Python id"]: one for one in events if one.get("cat") == "python_function"}
    attention = next(
        one for one in by_id.values() if one["name"].endswith("layers.0.self_attn") and "language" in one["name"]
    )
    assert by_id[attention["args"]["Python parent id"]]["name"] == "nn.Module: model.language_model.layers.0"
    assert len(chrome.parse(tensorboard.plugin_copy(run.trace_json)).events) > 0


def test_runtime_calls_get_the_plugins_name():
    call = {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": "cudaLaunchKernel",
        "pid": 1,
        "tid": 1,
        "ts": 0,
        "dur": 1,
        "args": {},
    }
    copied = json.loads(
        tensorboard.plugin_copy(json.dumps({"traceEvents": [call, {**call, "cat": "kernel"}]}).encode())
    )
    assert [one["cat"] for one in copied["traceEvents"]] == ["Runtime", "kernel"]
