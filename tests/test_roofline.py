"""Floors, MFU, MBU and what would change, on numbers of the test's choosing; and the command that prints them."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import builders
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from rich.console import Console

import profkit
from profkit import doubts, roofline, roofline_text
from profkit.ceilings import Ceiling, Ceilings
from profkit.cli import cli
from profkit.errors import InputError
from profkit.work import QUANTITIES, Work


def exactly(value):
    return Ceiling(value, value, value, 5)


def ceilings(**changes):
    """1000 GFLOP/s in bfloat16, 100 in float32, 100 GB/s, 5 us a launch."""
    values = {
        "device": "cuda",
        "device_name": "Test Device",
        "driver": "1.2",
        "torch": "2.x",
        "threads": 4,
        "flops_per_s": {"bfloat16": exactly(1e12), "float32": exactly(1e11)},
        "copy_bytes_per_s": exactly(9e10),
        "read_bytes_per_s": exactly(1e11),
        "launch_s": exactly(5e-6),
    }
    return Ceilings(**{**values, **changes})


ROWS = [
    # step, phase, stage, FLOPs, weights, cache read, cache written, activations, moved, operators
    (0, "prefill", "vision", 2e9, 1e7, 0, 0, 1e7, 9e7, 20),
    (0, "prefill", "prefill", 4e10, 1e9, 0, 1e8, 0, 2e9, 100),
    (0, "prefill", "head", 1e8, 1e8, 0, 0, 0, 1e8, 1),
    (1, "decode", "decode", 4.4e8, 1e9, 1e8, 1e7, 0, 2e9, 100),
    (1, "decode", "head", 1e8, 1e8, 0, 0, 0, 1e8, 1),
    (2, "decode", "decode", 4.8e8, 1e9, 1.1e8, 1e7, 0, 2e9, 100),
    (2, "decode", "head", 1e8, 1e8, 0, 0, 0, 1e8, 1),
]


def work(dtype="bfloat16"):
    frame = pd.DataFrame(ROWS, columns=["step", "phase", "stage", *QUANTITIES])
    frame.insert(3, "path", frame["stage"])
    frame.insert(4, "counted", True)
    frame = frame.astype(dict.fromkeys(QUANTITIES, "int64"))
    operators = pd.DataFrame(
        [("aten::mm", 9, 10, 10, True), ("aten::mul", 5, 0, 300, False), ("mine::fast", 2, 0, 200, False)],
        columns=["name", "calls", "flops", "operator_bytes", "formula"],
    )
    parts = pd.DataFrame(
        [("decoder_layers", "layers", 500_000_000, 10**9, dtype), ("vision_tower", "tower", 5, 20, "float32")],
        columns=["role", "path", "parameters", "bytes", "dtype"],
    )
    about = {"weights": "fake", "why": "", "steps": 3, "steps_counted": 3, "line": "", "convention": "as it is"}
    return Work(frame, operators, parts, about)


def limits(dtype="bfloat16"):
    return roofline.Limits.of(ceilings(), work(), dtype)


def test_floors_by_hand():
    table = roofline.stage_table(work(), limits(), pd.Series({"vision": 40.0, "prefill": 50.0, "decode": 44.2}))
    # The tower is float32 of its own: 2e9 FLOPs at 1e11 a second. 2e7 bytes at 1e11 a second.
    assert table.loc["vision", ["compute_ms", "memory_ms", "floor_ms"]].tolist() == pytest.approx([20, 0.2, 20])
    assert table.loc["prefill", ["compute_ms", "memory_ms", "floor_ms"]].tolist() == pytest.approx([40, 11, 40])
    # Two steps of 11.1 and 11.2 ms of memory.
    assert table.loc["decode", ["compute_ms", "memory_ms", "floor_ms"]].tolist() == pytest.approx([0.92, 22.3, 22.3])
    assert table["binds"].to_dict() == {"vision": "compute", "prefill": "compute", "decode": "memory", "head": "memory"}
    assert table["mfu"][:3].tolist() == pytest.approx([0.5, 0.8, 9.2e8 / 0.0442 / 1e12])
    assert table.loc["decode", "mbu"] == pytest.approx(2.23e9 / 0.0442 / 1e11)
    assert table.loc["decode", ["attained", "ratio"]].tolist() == pytest.approx([22.3 / 44.2, 44.2 / 22.3])
    assert table.loc["decode", "intensity"] == pytest.approx(9.2e8 / 2.23e9)
    assert table.loc["decode", "launch_ms"] == pytest.approx(200 * 5e-3)
    assert math.isnan(table.loc["head", "mfu"])


def test_steps_and_latencies_by_hand():
    steps = roofline.step_table(work(), limits(), times_ms=pd.Series([100.0, 24.2, 24.4]).to_numpy())
    # 1.1e9 + 1.1e8 bytes of weights and cache in 24.2 ms: 50 % of 1e11 a second.
    assert steps["mbu"].tolist()[1:] == pytest.approx([0.5, 0.5])
    assert steps["floor_ms"].tolist() == pytest.approx([20 + 40 + 1, 11.1 + 1, 11.2 + 1])
    found = roofline.latencies(work(), limits(), 122.0, 24.3)
    assert (found.ttft_floor_ms, found.tpot_floor_ms) == pytest.approx((61.0, 12.15))


def test_other_batches_and_bits_by_hand():
    table = roofline.what_if(work(), limits()).set_index(["bits", "batch"])
    # A step: 5.6e8 FLOPs, 1.1e9 bytes of weights, 1.15e8 of the cache.
    assert table.loc[(16, 1), "floor_ms"] == pytest.approx(12.15)
    assert table.loc[(16, 8), "floor_ms"] == pytest.approx(11 + 8 * 1.15)
    assert table.loc[(16, 8), "tokens_per_s"] == pytest.approx(8 / 0.0202)
    assert table.loc[(8, 1), "floor_ms"] == pytest.approx(5.5 + 1.15)
    assert table.loc[(4, 1), "times"] == pytest.approx(12.15 / (2.75 + 1.15))
    assert (32, 1) not in table.index
    # In float32 compute is ten times slower and binds from a batch on: 5.6 ms against 1.15 ms a sequence.
    table = roofline.what_if(work(), limits("float32")).set_index(["bits", "batch"])
    assert table.loc[(32, 2), "binds"] == "memory" and table.loc[(32, 4), "binds"] == "compute"
    assert {8, 4} < set(roofline.what_if(work(), limits())["bits"])
    assert set(roofline.what_if(work("uint8"), limits())["bits"]) == {16}


def test_media_tokens_by_hand():
    # Decode steps of 100 tokens of prompt: 4.4e8 and 4.8e8 FLOPs for contexts of 101 and 102, so a slope of 4e7 …
    assert roofline.media_cost(work(), limits(), 90, 60) is None  # … of which 90 tokens would not make 4e10
    one = work()
    slope, constant, prompt = 1000, 4e8, 100
    for step, context in ((1, 101), (2, 102)):
        at = (one.table["step"] == step) & (one.table["stage"] == "decode")
        one.table.loc[at, "flops"] = int(constant + slope * context)
    at = one.table["stage"] == "prefill"
    one.table.loc[at, "flops"] = int(constant * prompt + slope * prompt**2)
    cost = roofline.media_cost(one, limits(), 100, 60)
    assert cost.text_tokens == 40
    assert cost.prefill_flops == pytest.approx(constant * 60 + slope * (100**2 - 40**2))
    assert cost.step_flops == 60 * slope
    # The cache grows by 1e7 bytes a token.
    assert cost.step_cache_bytes == 60 * 1e7 and cost.step_floor_ms == pytest.approx(6.0)
    assert roofline.media_cost(one, limits(), 100, None) is None
    found = roofline.answers(one, ceilings(), "bfloat16", media_tokens=60)
    assert "not known" in roofline_text.media_line(found)
    found = dataclasses.replace(found, prompt_tokens=100, media=cost)
    assert "40 text and 60 media tokens; the media make" in roofline_text.media_line(found)
    said = roofline_text.media_line(dataclasses.replace(found, media=None))
    assert "40 text and 60 media tokens; what these cost is not known" in said
    # Of two sequences each has half of the cache to read, and of its time.
    half = roofline.media_cost(one, limits(), 100, 60, batch=2)
    assert half.step_cache_bytes == 60 * 5e6 and half.step_floor_ms == pytest.approx(3.0)


def test_operators_without_a_formula_have_their_share():
    operators = pd.DataFrame(
        {
            "name": ["aten::mm", "aten::mul", "aten::linear", "range"],
            "kind": ["operator", "operator", "operator", "annotation"],
            "stage": ["decode", "decode", "head", "decode"],
            "self_ms": [6.0, 3.0, 1.0, 90.0],
            "device_ms": 0.0,
        }
    )
    table = roofline.without_formula(work(), operators).set_index("name")
    assert table["share"].to_dict() == pytest.approx({"aten::mul": 0.3, "mine::fast": 0.0})
    shares = roofline.silent_share(work(), operators, pd.Index(["decode", "head", "vision"]))
    assert shares[:2].tolist() == pytest.approx([1 / 3, 0]) and math.isnan(shares[2])
    # On a device its time counts.
    table = roofline.without_formula(work(), operators.assign(device_ms=[1.0, 1.0, 0.0, 5.0])).set_index("name")
    assert table.loc["aten::mul", "share"] == 0.5


def test_a_dtype_that_was_not_measured_has_no_answer():
    table = roofline.stage_table(work(), limits("float64"), pd.Series({"decode": 40.0}))
    assert math.isnan(table.loc["decode", "mfu"]) and table.loc["decode", "binds"] == ""
    assert table.loc["decode", "floor_ms"] == pytest.approx(22.3)
    # The tower is float32, which was measured: 2e9 FLOPs at 100 GFLOP/s.
    assert table.loc["vision", "binds"] == "compute" and table.loc["vision", "floor_ms"] == pytest.approx(20)
    found = roofline.answers(work(), ceilings(), "float64")
    assert not len(found.what_if)
    said = doubts.of(found)
    assert len(said) == 1 and "float64 were not measured: for prefill, decode, head" in said[0]
    assert set(found.steps["binds"]) == {""}
    # A part of a dtype without a ceiling is not held against the model's.
    other = work()
    other.parts.loc[other.parts["role"] == "vision_tower", "dtype"] = "float64"
    said = doubts.of(roofline.answers(other, ceilings(), "bfloat16"))
    assert len(said) == 1 and "float64 were not measured: for vision" in said[0]


def test_what_is_faster_than_its_floor_and_noise_are_said():
    assert doubts.of(roofline.answers(work(), ceilings(), "bfloat16")) == []
    found = roofline.answers(work(), ceilings(read_bytes_per_s=Ceiling(1e11, 8e10, 1.2e11, 5)), "bfloat16")
    table = found.stages.assign(attained=[1.2, 0.9, 1.1, float("nan")][: len(found.stages)])
    late = roofline.Latencies(61.0, 12.15, 60.0, 24.0)
    said = doubts.of(dataclasses.replace(found, stages=table, latencies=late))
    assert said[0].startswith(f"faster than the floor: {table.index[0]}, {table.index[2]}, TTFT;")
    assert said[1].startswith("noisy") and "read 40%" in said[1] and len(said) == 2


def test_doubts_stand_in_the_report_the_page_and_the_commands(run, elsewhere):
    from test_report import Page

    from profkit import report, text

    saved = profkit.load(run.path)
    saved.ceilings = ceilings(
        device="cpu",
        flops_per_s={"float32": exactly(1e6)},
        read_bytes_per_s=Ceiling(1e11, 8e10, 1.2e11, 5),
    )
    page = Page(report.html_of([saved])).text
    lines = "\n".join(one for one in text.report(saved) if isinstance(one, str))
    answers = "\n".join(one for one in roofline_text.report(saved.roofline()) if isinstance(one, str))
    for said in (page, lines, answers):
        assert "faster than the floor: " in said and "TTFT" in said
    assert "noisy: rounds of the ceilings lie further apart than 5% (read 40%)" in page and "noisy" in lines
    assert [one[:6] for one in roofline_text.as_dict(saved.roofline())["doubts"]] == ["faster", "noisy:"]


# -- of a run, and on the command line -----------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model, kwargs = builders.small_llava()
    return profkit.trace(model, kwargs, repeat=1, warmup=0, out=tmp_path_factory.mktemp("roofline") / "run")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_run_answers(run):
    with pytest.raises(InputError, match="profkit roofline"):
        profkit.load(run.path).roofline()
    found = run.roofline(ceilings())
    assert found.stages["time_ms"].sum() == pytest.approx(run.stages()["host_ms"][found.stages.index].sum())
    assert found.steps["time_ms"].tolist() == run.steps()["iteration_ms"].tolist()
    assert found.latencies.ttft_ms == run.latency().ttft_ms
    assert (found.media.text_tokens, found.media.media_tokens) == (4, 4)
    assert found.stages["no_formula"].notna().any() and found.without_formula["share"].sum() > 0
    assert found.clock == "host"
    said = roofline_text.as_dict(found)
    assert json.loads(json.dumps(said, allow_nan=False))["what_if"]["analytic"] is True


def test_the_report_of_a_trace_says_what_was_counted(run):
    from profkit import text

    saved = profkit.load(run.path)
    saved.ceilings = None
    # 286,208 of the tower, 16,384 of the projector, 261,120 and 133,120 of the decoder, 31,680 of the head.
    assert any(part.startswith("work: 0.0007285 GFLOP") for part in text.report(saved) if isinstance(part, str))
    saved.ceilings = ceilings()
    assert any("floor of TTFT" in part for part in text.report(saved) if isinstance(part, str))
    assert {row["stage"] for row in text.as_dict(saved)["work"]} >= {"vision", "decode"}
    saved.work = None
    assert not any("floor of TTFT" in part for part in text.report(saved) if isinstance(part, str))


def command(*arguments):
    return CliRunner().invoke(cli, ["roofline", *arguments], env={"COLUMNS": "160"})


def test_the_command_of_a_run_keeps_the_ceilings(run, elsewhere, monkeypatch):
    from profkit import stress

    asked = []

    def measured(device, progress):
        asked.append(device)
        return ceilings(device="cpu", device_name=run.manifest["device_name"])

    monkeypatch.setattr(stress, "measured", measured)
    done = command(str(run.path))
    assert done.exit_code == 0, done.output
    assert "floor of TTFT" in done.stdout and "host clock" in done.stdout and "4 media tokens" in done.stdout
    assert profkit.load(run.path).ceilings.bytes_per_s == 1e11
    said = json.loads(command(str(run.path), "--json").stdout)
    assert {row["stage"] for row in said["stages"]} >= {"vision", "prefill", "decode"} and len(asked) == 1
    command(str(run.path), "--again")
    assert len(asked) == 2


def test_eighty_columns_hold_every_figure(run, elsewhere):
    saved = profkit.load(run.path)
    saved.ceilings = ceilings(upload_bytes_per_s=Ceiling(1.234e10, 1.111e10, 1.333e10, 5), device_name="NVIDIA L40S")
    found = saved.roofline()
    found = dataclasses.replace(found, stages=found.stages.assign(time_ms=123456.78, mfu=1.234, mbu=0.0123))
    written = io.StringIO()
    console = Console(file=written, width=80)
    for part in (*roofline_text.ceilings_report(saved.ceilings), *roofline_text.report(found)):
        console.print(part)
    said = written.getvalue()
    assert "…" not in said.replace(" … ", "") and said.count("123456.78") == len(found.stages)


def test_the_command_of_a_run_from_another_device(run, elsewhere):
    manifest = json.loads((run.path / "run.json").read_text())
    other = run.path.parent / "other"
    saved = profkit.load(run.path)
    saved.ceilings, saved.manifest["device_name"] = None, "Elsewhere 9000"
    saved.save(other)
    done = command(str(other))
    assert done.exit_code == 2 and "made on Elsewhere 9000" in done.stderr and manifest["device_name"]


def test_damaged_ceilings_of_a_run_are_said(run, tmp_path):
    saved = profkit.load(run.path)
    saved.ceilings = ceilings()
    saved.save(tmp_path / "run")
    assert profkit.load(tmp_path / "run").ceilings == ceilings()
    (tmp_path / "run" / "ceilings.json").write_text("{")
    again = profkit.load(tmp_path / "run")
    assert again.ceilings is None and "damaged" in again.unreadable[0] and len(again.stages())


def test_the_command_says_that_a_runs_ceilings_were_damaged(run, elsewhere, tmp_path, monkeypatch):
    from profkit import stress

    saved = profkit.load(run.path)
    saved.ceilings = None
    saved.save(tmp_path / "run")
    (tmp_path / "run" / "ceilings.json").write_text(json.dumps({**ceilings().to_record(), "launch_s": {"median": -1}}))
    monkeypatch.setattr(stress, "measured", lambda device, progress: ceilings(device="cpu"))
    done = command(str(tmp_path / "run"))
    assert done.exit_code == 0 and "damaged" in done.stdout and "floor of TTFT" in done.stdout


def test_the_command_of_a_run_without_work(run, tmp_path):
    saved = profkit.load(run.path)
    saved.work = None
    saved.save(tmp_path / "run")
    done = command(str(tmp_path / "run"))
    assert done.exit_code == 2 and "was not counted" in done.stderr


def test_the_command_of_a_model_counts_without_running(elsewhere, monkeypatch):
    from profkit import stress

    monkeypatch.setattr(stress, "measured", lambda device, progress: ceilings(device="cpu"))
    done = command("tiny-llava", "--max-new-tokens", "3")
    assert done.exit_code == 0, done.output
    assert "nothing was run" in done.stdout and "counted on a copy without weights" in done.stdout


# -- in the report, and side by side ------------------------------------------------------------------------


def test_the_report_has_a_point_for_each_stage(run):
    from test_report import Page

    from profkit import report

    saved = profkit.load(run.path)
    saved.ceilings = None
    assert "No ceilings of the device are known" in Page(report.html_of([saved])).text
    saved.ceilings = ceilings()
    page = Page(report.html_of([saved]))
    assert "against a floor of" in page.text and "4 media tokens" in page.text
    traces = page.figure("run-roofline")["data"]
    points = {one["name"]: (one["x"][0], one["y"][0]) for one in traces if one["mode"] == "markers+text"}
    table = saved.roofline().stages
    assert set(points) == {"vision", "projector", "prefill", "decode", "head"}
    for stage, (x, y) in points.items():
        assert x == pytest.approx(table.loc[stage, "intensity"])
        assert y == pytest.approx(table.loc[stage, "flops"] / table.loc[stage, "time_ms"] * 1e3)
    saved.work = None
    assert "Work was not counted" in Page(report.html_of([saved])).text


def test_names_in_the_plot_cover_neither_points_nor_names():
    from profkit import roofline_page as page

    # Vision and prefill lie nearly in one place, the others around them.
    names = ["vision", "prefill", "projector", "decode", "head"]
    x, y = np.log10([142, 148, 69, 0.5, 0.496]), np.log10([50e9, 41e9, 67e9, 1.2e9, 2.3e9])
    places = page.label_places(names, x, y, (5.0, 3.0))
    at_x, at_y = x * page.PLOT[0] / 5, y * page.PLOT[1] / 3
    boxes = [page._box(a, b, n, *page.PLACES[p]) for a, b, n, p in zip(at_x, at_y, names, places, strict=True)]
    points = [(a - 5, a + 5, b - 5, b + 5) for a, b in zip(at_x, at_y, strict=True)]
    for number, box in enumerate(boxes):
        assert not any(page._overlap(box, one) for one in points)
        assert not any(page._overlap(box, one) for one in boxes[:number])
    assert page.label_places([], np.array([]), np.array([]), (1.0, 1.0)) == []


def test_the_page_explains_the_columns_that_it_has(run):
    from profkit import roofline_page

    saved = profkit.load(run.path)
    saved.ceilings = ceilings()
    said = "".join(roofline_page.section(saved, "run"))
    assert "ratio to it: time over floor" in said and "launch:" not in said and "of it: floor" not in said


@pytest.mark.parametrize(
    "wreck",
    [
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.unlink(),
        lambda path: pd.read_parquet(path).iloc[:0].to_parquet(path),
    ],
    ids=["cut", "gone", "empty"],
)
def test_work_that_is_lost_was_counted(run, wreck, tmp_path):
    from profkit import roofline_page, text

    profkit.load(run.path).save(tmp_path / "run")
    wreck(tmp_path / "run" / "work.parquet")
    saved = profkit.load(tmp_path / "run")
    saved.ceilings = ceilings()
    said = "".join(roofline_page.section(saved, "run"))
    assert "Work was counted, and work.parquet is" in said and "not counted" not in said
    assert list(text.report(saved))
    done = command(str(tmp_path / "run"))
    assert done.exit_code == 2 and "counted and is lost: work.parquet is" in done.stderr


def test_without_marks_there_are_floors(run, tmp_path):
    from test_report import Page

    from profkit import report, text

    whole = profkit.load(run.path)
    whole.ceilings = ceilings()
    whole.save(tmp_path / "run")
    (tmp_path / "run" / "marks.parquet").unlink()
    saved = profkit.load(tmp_path / "run")
    page = Page(report.html_of([saved])).text
    assert "How far from the limit cannot" not in page and "There are floors alone" in page and "nan" not in page
    answers, wanted = saved.roofline(), whole.roofline()
    assert answers.clock == "" and answers.stages["floor_ms"].to_dict() == wanted.stages["floor_ms"].to_dict()
    assert answers.latencies == wanted.latencies
    assert any("floor of TTFT" in one for one in text.limit_lines(saved))
    saved.kept = None
    assert roofline_text.as_dict(saved.roofline())["latency"]["ttft_ms"] is None


def test_runs_are_compared_by_their_work(run):
    from profkit import comparison, comparison_text, report

    one, two, without = profkit.load(run.path), profkit.load(run.path), profkit.load(run.path)
    one.ceilings = two.ceilings = ceilings()
    two.ceilings = ceilings(copy_bytes_per_s=exactly(2e11))
    without.work = None
    base, other, bare = (comparison.measured(each) for each in (one, two, without))
    rows = {row["what"]: row for row in comparison_text.as_dict(base, [other])["comparisons"][0]["work"]}
    assert rows["FLOPs: prefill"]["base"] == 261_120 and rows["FLOPs: prefill"]["ratio"] == 1
    assert rows["MBU: decode"]["ratio"] == pytest.approx(0.5)
    assert rows["TPOT over its floor"]["ratio"] == pytest.approx(2, rel=0.05)
    assert comparison_text.as_dict(base, [bare])["comparisons"][0]["work"] == []
    assert "work, and how far" in report.html_of([one, two])
    assert "work, and how far" not in report.html_of([one, without])
