"""Analysing files and directories: tables, graphs, ranks, and the command."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from handmade import HandMade

from profkit import analysis, cli
from profkit.errors import InputError


def decode_step(made: HandMade, begin: int, kernels: int = 3) -> None:
    made.host("decode", begin, 90, "user_annotation")
    made.host("nn.Module: Model_0", begin + 1, 80, "python_function")
    for number in range(kernels):
        made.host("aten::mm", begin + 2 + 20 * number, 8)
        made.kernel(made.launch(begin + 4 + 20 * number), begin + 10 + 20 * number, 4)


def two_steps() -> HandMade:
    made = HandMade()
    for begin in (0, 100):
        decode_step(made, begin)
    return made


def test_tables_of_a_small_trace(tmp_path):
    found = analysis.analyze(two_steps().write(tmp_path / "trace.json"))
    tables = found.tables
    assert tables["kernels"][["name", "stage", "path", "operator", "count"]].to_numpy().tolist() == [
        ["gemm", "decode", "decode/Model_0", "aten::mm", 6]
    ]
    assert tables["kernels"]["mean_us"].tolist() == [4.0]
    assert (
        tables["steps"][["label", "phase", "kernels", "launches", "busy_ms"]].to_numpy().tolist()
        == [["decode", "decode", 3, 3, 0.012]] * 2
    )
    coverage = tables["coverage"]["share"].to_dict()
    assert coverage == {"module": 1.0, "range": 0.0, "operator": 0.0, "nothing": 0.0}
    operators = tables["operators"].set_index("name")
    assert operators.loc["aten::mm", ["calls", "kernels"]].tolist() == [6, 6]
    assert operators.loc["aten::mm", "device_ms"] == pytest.approx(0.024)
    assert operators.loc["aten::mm", "self_ms"] == pytest.approx(6 * (8 - 2) / 1e3)
    assert tables["host"]["stage"].tolist() == ["decode"]
    assert tables["reasons"].to_numpy().tolist() == [["inside", 6, 1.0]]
    assert all(one.ok is not False for one in found.checks if one.name != "flows")


def graph_of(names: list[str], begin: int = 0) -> HandMade:
    """A capture: launches that say what they launch, inside modules and operators, and no kernels."""
    made = HandMade()
    made.host("cudaStreamBeginCapture", begin, 1, "cuda_runtime", correlation=90_001)
    for number, name in enumerate(names):
        at = begin + 10 + 20 * number
        made.host(f"nn.Module: Layer_{number}", at, 18, "python_function")
        made.host("aten::mm", at + 1, 15)
        told = {} if name.startswith("mem") else {"kernel": name}
        made.launch(at + 3, name="cudaMemsetAsync" if name == "memset" else "hipLaunchKernel", **told)
    made.host("cudaStreamEndCapture", begin + 10 + 20 * len(names), 1, "cuda_runtime", correlation=90_002)
    return made


def replay(names: list[str], times: int = 1) -> HandMade:
    made = HandMade()
    for turn in range(times):
        number = made.launch(turn * 1000, name="cudaGraphLaunch")
        for position, name in enumerate(names):
            category = "gpu_memset" if name == "memset" else "kernel"
            made.kernel(number, turn * 1000 + 20 + position * 10, 5, name, category=category)
    return made


@pytest.mark.parametrize(
    ("captured", "replayed", "proven"),
    [
        (["a", "memset", "b"], ["a", "memset", "b"], True),
        (["a", "b", "c"], ["a", "c", "b"], False),  # another order
        (["a", "b"], ["a", "b", "c"], False),
        (["a", "b"], ["a", "x"], False),
        (["a", ""], ["a", "b"], False),  # the capture does not tell one name
    ],
)
def test_only_names_in_order_prove_what_a_replayed_kernel_belongs_to(tmp_path, captured, replayed, proven):
    capture = analysis.attributed(graph_of(captured).write(tmp_path / "capture.json"))
    found = analysis.analyze(replay(replayed, times=2).write(tmp_path / "replay.json"), [capture])
    kernels = found.tables["kernels"]
    if proven:
        assert kernels.groupby("path")["count"].sum().to_dict() == {"Layer_0": 2, "Layer_1": 2, "Layer_2": 2}
        assert set(kernels["operator"]) == {"aten::mm"}
        assert found.graphs == ["a graph of 3 kernels, replayed 2 times: names and order equal those of its capture"]
    else:
        assert set(kernels["path"]) == {""}
        assert "not split" in found.graphs[0]
    assert kernels["count"].sum() == 2 * len(replayed)


def test_of_several_captures_the_right_one_is_taken(tmp_path):
    """As servers do: one capture for each batch size, in one trace."""
    captures = graph_of(["a", "b"])
    more = graph_of(["a", "b", "c"], begin=1000)
    for one in more.events:
        one["args"]["correlation"] = one["args"].get("correlation", 0) + 500
    captures.events += more.events
    capture = analysis.attributed(captures.write(tmp_path / "capture.json"))
    found = analysis.analyze(replay(["a", "b", "c"]).write(tmp_path / "replay.json"), [capture])
    assert found.tables["kernels"]["path"].tolist() == ["Layer_0", "Layer_1", "Layer_2"]


def test_captures_that_disagree_prove_nothing(tmp_path):
    """Two graphs of equal kernels, of a draft and of its target model."""
    captures, more = graph_of(["a", "b"]), graph_of(["a", "b"], begin=1000)
    for one in more.events:
        one["name"] = one["name"].replace("Layer", "Draft")
        one["args"]["correlation"] = one["args"].get("correlation", 0) + 500
    captures.events += more.events
    capture = analysis.attributed(captures.write(tmp_path / "capture.json"))
    found = analysis.analyze(replay(["a", "b"]).write(tmp_path / "replay.json"), [capture])
    assert found.graphs == ["a graph of 2 kernels: not split, 2 captures have these kernels, in different modules"]
    assert set(found.tables["kernels"]["path"]) == {""}
    again = analysis.attributed(graph_of(["a", "b"]).write(tmp_path / "again.json"))
    agreeing = analysis.attributed(graph_of(["a", "b"]).write(tmp_path / "other.json"))
    found = analysis.analyze(tmp_path / "replay.json", [again, agreeing])
    assert found.tables["kernels"]["path"].tolist() == ["Layer_0", "Layer_1"]


def test_launches_of_other_makers_and_categories_nobody_knows(tmp_path):
    made = HandMade()
    made.kernel(made.launch(0, name="urEnqueueKernelLaunch"), 5, 2)
    made.launch(10, name="urEnqueueKernelLaunch")
    made.kernel(0, 20, 2, category="npu_kernel")
    made.host("frame", 0, 5, "Trace")
    checks = {one.name: one for one in analysis.analyze(made.write(tmp_path / "a.json")).checks}
    assert (checks["kernels of launches"].count, checks["kernels of launches"].total) == (1, 2)
    assert checks["categories"].ok is False and checks["categories"].sentence.endswith("in no table: npu_kernel 1")
    made = HandMade()
    made.host("something", 0, 5, "my_category")
    checks = {one.name: one for one in analysis.analyze(made.write(tmp_path / "b.json")).checks}
    assert checks["categories"].ok is None and checks["categories"].count == 1


def test_captured_launches_are_not_missing_kernels(tmp_path):
    found = analysis.analyze(graph_of(["a", "b"]).write(tmp_path / "capture.json"))
    assert "kernels of launches" not in [one.name for one in found.checks if one.ok is False]


# -- ranks and directories ---------------------------------------------------------------------------


def rank(folder: Path, number: int, name: str | None = None, kernels: int = 3) -> Path:
    made = HandMade()
    decode_step(made, 0, kernels)
    return made.write(folder / (name or f"rank{number}.json"), distributedInfo={"rank": number, "world_size": 2})


def test_ranks_have_rows_and_a_spread(tmp_path):
    found = [analysis.analyze(rank(tmp_path, number, kernels=2 + number)) for number in (1, 0)]
    table = analysis.rank_table(found)
    assert table["rank"].tolist() == ["0", "1", "spread"]
    assert table["kernels"].tolist() == [2, 3, pytest.approx(1 / 2.5)]
    assert table["busy_ms"].tolist()[:2] == pytest.approx([0.008, 0.012])
    assert len(analysis.rank_table(found[:1])) == 0


def test_ranks_that_only_names_tell(tmp_path):
    made = HandMade()
    made.kernel(made.launch(0), 5, 2)
    found = [analysis.analyze(made.write(tmp_path / name)) for name in ("rank0.json", "trace_rank-1.json", "a.json")]
    assert [one.rank for one in found] == [0, 1, None]
    assert analysis.rank_table(found[:2])["rank"].tolist() == ["0", "1", "spread"]


def test_what_a_directory_stands_for(tmp_path):
    board = tmp_path / "board"
    board.mkdir()
    made = two_steps()
    for name in ("worker0.1.pt.trace.json", "worker1.2.pt.trace.json", "rank2.json"):
        made.write(board / name)
    (board / "other.json").write_text('{"a": 1}')
    # What was damaged must not go unnoticed.
    (board / "empty.json").write_text("")
    (board / "page.json").write_text("<html>")
    (board / "cut.json.gz").write_bytes(b"\x1f\x8b\x08\x00\x00")
    names = {"worker0.1.pt.trace.json", "worker1.2.pt.trace.json", "rank2.json"}
    assert {one.name for one in analysis.trace_files(board)} == {*names, "empty.json", "page.json", "cut.json.gz"}
    found, failed = analysis.analyze_all([board])
    assert {one.path.name for one in found} == names
    assert sorted(Path(name).name for name in failed) == ["cut.json.gz", "empty.json", "page.json"]
    plain = tmp_path / "plain"
    plain.mkdir()
    made.write(plain / "a.json")
    (plain / "b.json.gz").write_bytes(gzip.compress(made.text()))
    (plain / "c.json").write_text('{"a": 1}')
    assert [one.name for one in analysis.trace_files(plain)] == ["a.json", "b.json.gz"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    (run / "trace.json.gz").write_bytes(gzip.compress(made.text()))
    assert analysis.trace_files(run) == [run / "trace.json.gz"]
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no traces"):
        analysis.trace_files(tmp_path / "none")


# -- the command -------------------------------------------------------------------------------------


def analyze(*arguments: str | Path):
    return CliRunner().invoke(cli.cli, ["analyze", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_command_prints_tables_and_doubts(tmp_path):
    result = analyze(two_steps().write(tmp_path / "trace.json"), "--no-validate")
    assert result.exit_code == 0, result.output
    for words in ("host-bound", "device time attributed: 100.0% to a module", "gemm", "aten::mm", "doubt: flows"):
        assert words in result.output


def test_json_holds_every_table(tmp_path):
    result = analyze(two_steps().write(tmp_path / "trace.json"), "--json")
    found = json.loads(result.stdout)
    trace = found["traces"][0]
    assert {"devices", "stages", "steps", "kernels", "operators", "coverage", "checks", "host", "reasons"} <= set(trace)
    assert trace["stages"][0]["verdict"] == "host-bound"
    assert trace["torch_validator"] == "passed"
    assert (found["ranks"], found["errors"]) == ([], {})


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_written_for_all_files_together(tmp_path, suffix):
    files = [rank(tmp_path, number) for number in (0, 1)]
    target = tmp_path / "tables"
    result = analyze(*files, f"--{suffix}", target, "--no-validate")
    assert result.exit_code == 0, result.output
    read = pd.read_csv if suffix == "csv" else pd.read_parquet
    kernels = read(target / f"kernels.{suffix}")
    assert kernels["rank"].tolist() == [0, 1]
    assert kernels["count"].tolist() == [3, 3]
    assert (target / f"ranks.{suffix}").exists()
    assert "spread" in result.output
    again = analyze(*files, f"--{suffix}", target)
    assert again.exit_code == 2 and "already exists" in again.stderr


def test_bad_files_are_named_and_the_next_one_goes_on(tmp_path):
    good = two_steps().write(tmp_path / "good.json")
    bad = {"empty.json": b"", "text.json": b"hello", "model.json": b'{"a": 1}'}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    result = analyze(*(tmp_path / name for name in bad), tmp_path / "folder", tmp_path / "none.json", good)
    assert result.exit_code == 2
    assert "gemm" in result.stdout
    sentences = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert len(sentences) == 5
    for words in ("is empty", "is not JSON", "no Chrome trace", "holds no traces", "No such file"):
        assert sum(words in sentence for sentence in sentences) == 1, words


def test_two_files_of_one_rank(tmp_path):
    first, second, other = rank(tmp_path, 0, "a.json"), rank(tmp_path, 0, "b.json"), rank(tmp_path, 1, "c.json")
    result = analyze(first, second, other, "--no-validate")
    assert result.exit_code == 2
    assert f"{second} is of rank 0, and so is {first}" in result.stderr
    assert "spread" in result.stdout


def test_traces_of_different_times_need_no_different_ranks(tmp_path):
    made = HandMade()
    decode_step(made, 10_000)
    later = made.write(tmp_path / "later.json", distributedInfo={"rank": 0})
    assert analyze(rank(tmp_path, 0), later, "--no-validate").exit_code == 0


def test_a_cut_file_is_analysed_and_says_so(tmp_path):
    path = tmp_path / "cut.json"
    path.write_bytes(two_steps().text()[:-200])
    result = analyze(path, "--no-validate")
    assert result.exit_code == 0
    assert "the file ends before its list of events does" in result.output


@pytest.mark.parametrize(
    "content",
    [
        {"traceEvents": [{"ph": "X", "cat": "profkit", "name": "vision", "pid": 1, "tid": 1, "ts": 0, "dur": 5}]},
        {"traceEvents": [{"ph": "X", "cat": "profkit", "name": "z", "pid": 1, "tid": "x", "ts": 0, "dur": 5}]},
        {"distributedInfo": "rank", "deviceProperties": {"id": 1}, "baseTimeNanoseconds": "x", "traceEvents": [{}]},
        {"deviceProperties": [1, {"id": 0}], "distributedInfo": {"rank": "0"}, "traceEvents": [{"ph": "M"}]},
        {"profkit": 7, "traceEvents": [{"ph": "X", "name": "\x1b[31mred", "cat": "cpu_op", "dur": 1}]},
    ],
)
def test_odd_files_are_analysed(tmp_path, content):
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    if content["traceEvents"] == [{}]:
        assert "not trace events" in analyze(path, "--no-validate").stderr
        return
    shown = analyze(path, "--no-validate")
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout
    assert analyze(path, "--no-validate", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[]", "holds no events: its list is empty"),
        (b'{"traceEvents": []}', "holds no events: its list is empty"),
        (b'{"traceEvents": [', "holds no event that can be read: its list breaks off"),
        (b"null", "is JSON, but no Chrome trace"),
        (b'"text"', "is JSON, but no Chrome trace"),
        ('{"traceEvents": []}'.encode("utf-16"), "is text in UTF-16"),
        (b'{"traceEvents": [{"ph": "X", "name": "a", "ts": 1e300}]}', "do not fit into 64 bits"),
    ],
)
def test_files_without_events_say_why_and_the_next_goes_on(tmp_path, text, said):
    (tmp_path / "bad.json").write_bytes(text)
    good = two_steps().write(tmp_path / "good.json")
    result = analyze(tmp_path / "bad.json", good, "--no-validate")
    assert result.exit_code == 2 and said in result.stderr
    assert "good.json: " in result.stdout


def test_odd_bytes_around_and_in_names(tmp_path):
    text = b'{"note": "\xff", ' + two_steps().text()[1:-1] + b', "tail": "\xfe"}'
    (tmp_path / "a.json").write_bytes(text)
    named = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff.json"))
    two_steps().write(named)
    result = analyze(tmp_path / "a.json", named, "--no-validate", "--csv", tmp_path / "csv")
    assert result.exit_code == 0, result.stderr
    both = analyze(tmp_path / "a.json", "--csv", tmp_path / "x", "--parquet", tmp_path / "x")
    assert both.exit_code == 2 and "give each its own" in both.stderr


def test_ranks_of_two_directories_and_files_that_tell_none(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for number in (0, 1):
            rank(tmp_path / folder, number)
    two_steps().write(tmp_path / "b" / "other.json")
    result = analyze(tmp_path / "a", tmp_path / "b", "--no-validate")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("\nspread ") == 2
    assert "1 files tell no rank" in result.stdout
    for number in (0, 1):
        (tmp_path / "c" / f"rank{number}").mkdir(parents=True)
        two_steps().write(tmp_path / "c" / f"rank{number}" / "trace.json")
    assert "\nspread " in analyze(tmp_path / "c", "--no-validate").stdout


def test_what_a_window_holds_is_said(tmp_path):
    made = two_steps().text(profkit={"steps": [0, 1, 7, 20, 21, 22]})
    (tmp_path / "a.json").write_bytes(made)
    shown = " ".join(analyze(tmp_path / "a.json", "--no-validate").stdout.split())
    assert "recorded: steps 0-1, 7, 20-22 alone" in shown
    assert "steps" in analysis.analyze(tmp_path / "a.json").tables["host"]


def test_ranks_put_into_one_file_are_doubted(tmp_path):
    made = HandMade()
    for number in (0, 1):
        made.host(f"rank{number}_work", 3 * number, 50, "user_annotation")
        made.events[-1]["pid"] = 1000 + number
        made.host("cudaLaunchKernel", 3 * number + 1, 2, "cuda_runtime", correlation=1)
        made.events[-1]["pid"] = 1000 + number
        made.kernel(1, 3 * number + 10, 2, device=number)
    checks = {one.name: one for one in analysis.analyze(made.write(tmp_path / "a.json")).checks}
    assert checks["processes"].ok is False and checks["processes"].count == 2
    # Another process's annotation is nobody's scope but its own.
    made = HandMade()
    made.host("rank0_work", 0, 50, "user_annotation")
    made.host("aten::mm", 5, 10)
    made.events[-1]["pid"] = 1001
    made.kernel(made.launch(6), 10, 2)
    made.events[-2]["pid"] = 1001
    kernels = analysis.analyze(made.write(tmp_path / "b.json")).tables["kernels"]
    assert kernels["path"].tolist() == ["aten::mm"]


def test_kernels_of_one_name_on_several_streams_prove_no_order(tmp_path):
    capture = analysis.attributed(graph_of(["a", "a"]).write(tmp_path / "capture.json"))
    made = HandMade()
    number = made.launch(0, name="cudaGraphLaunch")
    for stream in (7, 8):
        made.kernel(number, 20 + stream, 5, "a", stream=stream)
    found = analysis.analyze(made.write(tmp_path / "replay.json"), [capture])
    assert "on several streams at once" in found.graphs[0]


def test_events_of_negative_length_take_no_time(tmp_path):
    made = HandMade()
    made.kernel(made.launch(0), 5, -3)
    made.kernel(made.launch(10), 15, 4)
    found = analysis.analyze(made.write(tmp_path / "t.json"))
    assert found.tables["coverage"]["total_ms"].sum() == pytest.approx(0.004)
    assert {one.name: one.count for one in found.checks}["durations"] == 1


def test_brackets_in_names_are_not_taken_for_markup(tmp_path):
    made = HandMade()
    made.host("[/bold]decode[red]", 0, 50, "user_annotation")
    made.kernel(made.launch(2), 5, 4, name="kernel<[bold]>")
    result = analyze(made.write(tmp_path / "[x].json"), "--no-validate")
    assert result.exit_code == 0, result.output
    assert "kernel<[bold]>" in result.output
