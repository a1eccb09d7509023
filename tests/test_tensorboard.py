"""What TensorBoard shows of a run, asked of it over HTTP: the plugin's device times are profkit's."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from builders import small_llava

import profkit
from profkit import analysis, annotate, chrome, sample_runs, scalars, tables, tensorboard
from profkit.errors import InputError

SHARED = Path(__file__).parent.parent.parent / "shared" / "traces"
GPU = SHARED / "nv_h100_bert.json.gz"
API = "data/plugin/pytorch_profiler"


class Board:
    """A TensorBoard over a folder of runs, asked as its page asks it."""

    def __init__(self, folder: Path, runs: set[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
        with (folder / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", self.address.rpartition(":")[2]], stdout=log, stderr=log
            )
        self._wait(runs)

    def _wait(self, runs: set[str]) -> None:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            with suppress(OSError, ValueError):
                if set(self.get(f"{API}/runs")["runs"]) == runs:
                    return
            time.sleep(0.5)
        self.process.kill()
        raise AssertionError(f"TensorBoard did not find {runs}")

    def get(self, path: str, **query: str):
        """Return what it answers."""
        with urlopen(f"{self.address}/{path}?{urlencode(query)}", timeout=30) as answer:
            content = answer.read()
        return json.loads(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)

    def profile(self, path: str, run: str, **query: str):
        """Return what the profiler's plugin answers about a run."""
        worker, *_ = self.get(f"{API}/workers", run=run, view="Overview")
        span, *_ = self.get(f"{API}/spans", run=run, worker=worker)
        return self.get(f"{API}/{path}", run=run, worker=worker, span=span, **query)


def flat(modules, around: str = ""):
    """Every row of the plugin's tree of modules, with its path."""
    for one in modules:
        path = f"{around}.{one['name']}".lstrip(".")
        yield path, one
        yield from flat(one["children"], path)


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A run of a small model, saved with what TensorBoard shows."""
    model, kwargs = small_llava()
    folder = tmp_path_factory.mktemp("mine") / "run"
    run = profkit.trace(model, kwargs, warmup=0, repeat=2, out=folder)
    scalars.write_scalars(run, folder / "tensorboard")
    return run


@pytest.fixture(scope="module")
def board(tmp_path_factory, mine):
    """TensorBoard over that run and, where they are, a GPU's trace, as it was recorded and with the plugin's names."""
    folder = tmp_path_factory.mktemp("board")
    shutil.copytree(mine.path / "tensorboard", folder / "mine")
    runs = {"mine"}
    if GPU.exists():
        for name, copy in (("gpu", tensorboard.plugin_copy), ("as recorded", bytes)):
            (folder / name).mkdir()
            annotate.write(folder / name / "worker.1.pt.trace.json.gz", copy(gzip.decompress(GPU.read_bytes())))
            runs.add(name)
    found = Board(folder, runs)
    yield found
    found.process.terminate()
    found.process.wait()


needs_gpu_trace = pytest.mark.skipif(not GPU.exists(), reason="the shared GPU traces are not here")


@needs_gpu_trace
def test_views_of_a_gpus_trace(board):
    views = board.get(f"{API}/views", run="gpu")
    assert {"Overview", "Operator", "Kernel", "Trace", "Module"} <= set(views)
    steps = board.profile("overview", "gpu")["steps"]
    assert len(steps["rows"]) >= 1 and steps["columns"][1]["name"] == "Kernel"
    assert board.profile("trace", "gpu")["traceEvents"]


@needs_gpu_trace
def test_device_time_by_operator_is_profkits(board):
    def by_operator(run: str) -> dict[str, float]:
        rows = board.profile("operation/table", run, group_by="Operation")["data"]
        return {row["name"]: row.get("device_self_duration", 0) for row in rows}

    table = analysis.analyze(GPU).tables["operators"]
    expected = table[table["kind"] == "operator"].groupby("name")["device_ms"].sum() * 1000
    expected = expected[expected > 0]
    found = by_operator("gpu")
    # The page gets whole microseconds.
    assert {name: found[name] for name in expected.index} == pytest.approx(expected.to_dict(), abs=0.51)
    assert sum(by_operator("as recorded").values()) == 0


@needs_gpu_trace
def test_device_time_by_module_and_kernel_is_profkits(board):
    kernels = analysis.analyze(GPU).tables["kernels"]
    expected = kernels.groupby("path")["total_ms"].sum() * 1000
    expected.index = [path.partition("/")[2] for path in expected.index]
    found = {path: one["self_device_duration"] for path, one in flat(board.profile("module", "gpu")["data"])}
    assert {path: time_us for path, time_us in found.items() if time_us} == pytest.approx(expected.to_dict(), rel=0.001)
    table = board.profile("kernel/table", "gpu", group_by="Kernel")["data"]
    named = [column["name"] for column in table["columns"]]
    totals = {row[named.index("Name")]: row[named.index("Total Duration (us)")] for row in table["rows"]}
    of_kernels = kernels[kernels["kind"] == "kernel"].groupby("name")["total_ms"].sum() * 1000
    assert totals == pytest.approx(of_kernels.to_dict(), abs=1)


def test_steps_and_modules_are_those_of_the_run(board, mine):
    assert {"Overview", "Operator", "Trace", "Module"} <= set(board.get(f"{API}/views", run="mine"))
    profiled = next(one.spans for one in mine.of_kind("profiled"))
    assert len(board.profile("overview", "mine")["steps"]["rows"]) == len(profiled.steps)
    calls = mine.operators[mine.operators["kind"] == "operator"].groupby("name")["calls"].sum()
    rows = board.profile("operation/table", "mine", group_by="Operation")["data"]
    assert {row["name"]: row["calls"] for row in rows}["aten::mm"] == calls["aten::mm"]
    modules = {one["name"]: one["occurences"] for _, one in flat(board.profile("module", "mine")["data"])}
    assert modules["model.language_model.layers.1.mlp"] == 5


def test_scalars_histograms_and_texts_are_those_of_the_run(board, mine):
    def scalar(tag: str) -> list[float]:
        return [value for _, _, value in board.get("data/plugin/scalars/scalars", run="mine", tag=tag)]

    steps = mine.steps()
    assert scalar("step/host_ms") == pytest.approx(steps["host_ms"].tolist())
    assert scalar("step/cache_bytes") == mine.manifest["cache_bytes"]
    each = [tables.stage_table(spans)["host_ms"] for spans in mine.clean]
    assert scalar("stage/vision_ms") == pytest.approx([table["vision"] for table in each])
    assert scalar("stage/total_ms") == pytest.approx([table.sum() for table in each])
    # A histogram's bins hold as many values as there are layers.
    (first, *others) = board.get("data/plugin/histograms/histograms", run="mine", tag="layers_ms")
    assert len(others) == len(steps) - 1 and sum(count for *_, count in first[2]) == 2
    texts = board.get("data/plugin/text/text", run="mine", tag="breakdown/text_summary")
    assert "<td>vision</td>" in texts[0]["text"]
    assert "steadiness" in board.get("data/plugin/text/text", run="mine", tag="checks/text_summary")[0]["text"]


def test_what_was_written_before_is_replaced(mine, tmp_path):
    first = scalars.write_scalars(mine, tmp_path / "a" / "b")
    again = scalars.write_scalars(mine, tmp_path / "a" / "b")
    assert [again] == list((tmp_path / "a" / "b").iterdir()) and first.name.endswith(".profkit")
    with pytest.raises(InputError, match="Cannot write"):
        scalars.write_scalars(mine, again / "c")


def test_without_tensorboard_the_cure_is_named(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(scalars, "is_installed", lambda: False)
    with pytest.raises(InputError, match=r"pip install 'profkit\[tensorboard\]'"):
        scalars.write_scalars(mine, tmp_path)


def test_samples_one_by_one(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stages_ns = [{"vision": 2_000_000, "decode": 5_000_000 + number} for number in range(3)]
    rows = [{"id": f"s|{n}", "error": "", "stages_ns": one, "new_tokens": 4} for n, one in enumerate(stages_ns)]
    rows.insert(1, {"id": "bad", "error": "no <b>such</b> file"})
    (tmp_path / "run").mkdir()
    sample_runs.write_manifest(tmp_path / "run", {"model": "mine"})
    (tmp_path / "run" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = scalars.write_scalars(sample_runs.SampleRun.load(tmp_path / "run"), tmp_path / "board")
    found = EventAccumulator(str(path)).Reload()
    # The bad sample keeps its number.
    assert [(one.step, one.value) for one in found.Scalars("stage/vision_ms")] == [(0, 2), (2, 2), (3, 2)]
    assert [one.step for one in found.Scalars("sample/new_tokens")] == [0, 2, 3]
    assert found.Histograms("stage/decode_ms")[0].histogram_value.num == 3
    said = [one.tensor_proto.string_val[0].decode() for one in found.Tensors("sample/text_summary")]
    assert said[1] == "**bad** no <b>such</b> file" and len(said) == 4


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
