"""Many samples: lists, a row each, errors, interruption and resumption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from builders import tiny_llava
from click.testing import CliRunner
from PIL import Image

import profkit
from profkit import cli, samples
from profkit.errors import InputError, MeasurementError
from profkit.sample_lists import read_items
from profkit.sample_runs import SampleRun
from profkit.sampling import Plan, _cached, describe, measure

OPTIONS = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six crops of the photograph, and a file that is no image."""
    with Image.open(samples.default_image()) as image:
        for number in range(6):
            image.crop((number, 0, number + 200, 200)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "bad.jpg").write_text("no image")
    return tmp_path


def write_list(folder: Path, rows: list) -> Path:
    path = folder / "list.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


# -- lists -------------------------------------------------------------------------------------------


def test_json_lines_with_everything_that_can_be_wrong(folder):
    path = write_list(
        folder,
        [
            {"id": "a", "image": "0.jpg", "prompt": "Why?"},
            '{"id": "b", "image"',
            {"id": "a", "image": "1.jpg"},
            {"id": "c", "image": "none.jpg"},
            {"id": "d"},
            [1, 2],
            {"id": "e", "images": ["1.jpg", "2.jpg"]},
        ],
    )
    items = read_items(path)
    assert [item.id for item in items] == ["a", "line 2", "a (2)", "c", "d", "line 6", "e"]
    assert items[0] == type(items[0])("a", (folder / "0.jpg",), "Why?")
    assert items[6].files == (folder / "1.jpg", folder / "2.jpg")
    said = ("", "line 2 is not JSON", "was given before", "line 4: there is no file", "names no file", "no object", "")
    for item, words in zip(items, said, strict=True):
        assert words in item.error and bool(words) == bool(item.error)


def test_parquet_directories_and_conversations(folder):
    pd.DataFrame({"id": ["x", "y"], "image": ["0.jpg", "1.jpg"], "prompt": ["One?", None]}).to_parquet(
        folder / "l.parquet"
    )
    items = read_items(folder / "l.parquet")
    assert [(item.id, item.prompt, item.error) for item in items] == [("x", "One?", ""), ("y", None, "")]
    assert [item.id for item in read_items(folder)] == [*(f"{number}.jpg" for number in range(6)), "bad.jpg"]
    talk = [{"from": "human", "value": "<event>\nWhat moves?"}, {"from": "gpt", "value": "A cat."}]
    (folder / "events.npz").write_bytes(samples.default_file("events").read_bytes())
    (folder / "l.json").write_text(json.dumps([{"id": 7, "event": "events.npz", "conversations": talk}]))
    assert [(item.id, item.prompt, item.error) for item in read_items(folder / "l.json")] == [("7", "What moves?", "")]


def test_lists_that_are_none(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        read_items(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="lists no samples"):
        read_items(tmp_path)
    (tmp_path / "a.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="not a list of samples"):
        read_items(tmp_path / "a.json")
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(InputError, match="Cannot read the samples"):
        read_items(tmp_path / "a.parquet")


# -- measuring ---------------------------------------------------------------------------------------


def run(folder: Path, items, **plan) -> SampleRun:
    loaded = tiny_llava()
    made = Plan(3, options=OPTIONS, **plan)
    manifest = describe(loaded.model, made, {"model": "tiny-llava"})
    return measure(loaded.model, loaded.processor, items, folder / "run", made, manifest)


def test_a_row_a_sample_and_errors_in_rows(folder):
    seen = []
    found = run(folder, read_items(folder), progress=lambda *counts: seen.append(counts))
    assert seen == [(number, 7, int(number == 7)) for number in range(1, 8)]
    assert found.good["id"].tolist() == [f"{number}.jpg" for number in range(6)]
    assert found.bad["error"].tolist() == [f"{folder / 'bad.jpg'} is not an image that Pillow can read."]
    stages = [name for name in found.rows if name.startswith("stage:")]
    assert (found.good[stages].sum(axis=1) == found.good["total_ns"]).all()
    table = found.breakdown()
    assert set(table["classic_stage"]) == {1, 2, 3, 4}
    assert table["share"].sum() == pytest.approx(1)
    assert list(found.parts().index) == ["resize and normalise", "tokenise"]
    assert found.latency()["new_tokens"] == 3
    assert SampleRun.load(folder / "run").rows.equals(found.rows)
    with pytest.raises(InputError, match="is a run over many samples"):
        profkit.load(folder / "run")


def test_resuming_measures_what_has_no_good_row(folder):
    items = read_items(folder)
    first = run(folder, items[:3])
    before = first.good.set_index("id")["total_ns"]
    whole = run(folder, items, resume=True)
    assert len(whole.good) == 6 and len(whole.bad) == 1
    assert (whole.good.set_index("id")["total_ns"][before.index] == before).all()
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 7
    with pytest.raises(InputError, match="already exists: --resume"):
        run(folder, items)
    with pytest.raises(InputError, match="was measured with another plan"):
        run(folder, items, resume=True, seed=5)


def test_half_a_line_at_the_end_is_measured_again(folder):
    items = read_items(folder)[:3]
    run(folder, items)
    rows = folder / "run" / "samples.jsonl"
    rows.write_text(rows.read_text()[:-40])
    assert len(SampleRun.load(folder / "run").good) == 2
    assert sorted(run(folder, items, resume=True).good["id"]) == ["0.jpg", "1.jpg", "2.jpg"]


def test_fail_fast_keeps_what_was_measured(folder):
    items = read_items(folder)
    with pytest.raises(MeasurementError, match=r"Sample bad.jpg: .* as --fail-fast says"):
        run(folder, [*items[:2], items[-1], *items[2:4]], fail_fast=True)
    assert len(SampleRun.load(folder / "run").good) == 2


def test_a_killed_run_loses_at_most_the_sample_in_flight(folder):
    with Image.open(samples.default_image()) as image:
        for number in range(60):
            image.crop((number, 0, number + 200, 200)).save(folder / f"many{number:02}.jpg")
    out = folder / "run"
    command = [sys.executable, "-m", "profkit", "trace", "tiny-llava", "--samples", str(folder), "--out", str(out)]
    options = ["--max-new-tokens", "3", "--warmup", "0"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = out / "samples.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not rows.exists() or rows.read_bytes().count(b"\n") < 8):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    written = rows.read_bytes().count(b"\n")
    found = SampleRun.load(out)
    assert written >= 8 and len(found.rows) == written
    assert found.manifest["complete"] is False
    done = subprocess.run([*command, *options, "--resume"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert len(SampleRun.load(out).good) == 66


def test_the_page_cache_is_asked(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(100_000))
    assert _cached([path]) in (True, None)
    assert _cached([]) is None
    assert _cached([tmp_path / "none"]) is None


def test_the_command(folder):
    path = write_list(
        folder, [{"id": "a", "image": "0.jpg"}, {"id": "b", "image": "bad.jpg"}, {"id": "c", "image": "1.jpg"}]
    )
    arguments = ["trace", "tiny-llava", "--samples", str(path), "--max-new-tokens", "2"]
    result = CliRunner().invoke(
        cli.cli, [*arguments, "--limit", "2", "--out", str(folder / "run")], env={"COLUMNS": "160"}
    )
    assert result.exit_code == 0, result.output
    assert "1 samples measured, 1 in error" in result.output
    result = CliRunner().invoke(cli.cli, [*arguments, "--resume", "--out", str(folder / "run"), "--json"])
    found = json.loads(result.stdout)
    assert (found["measured"], found["in_error"]) == (2, 1)
    assert [row["id"] for row in found["samples"]] == ["a", "b", "c"]
    for wrong, said in ((["--resume"], "--resume needs --out"), (["x.jpg"], "leave INPUTS out")):
        result = CliRunner().invoke(cli.cli, [*arguments, *wrong])
        assert result.exit_code == 2 and said in result.stderr
