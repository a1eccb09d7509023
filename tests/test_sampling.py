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
from profkit.page_cache import are_cached
from profkit.run import load
from profkit.sample_lists import read_items
from profkit.sample_runs import SampleRun
from profkit.sampling import Plan, describe, measure

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
    assert items[0] == type(items[0])("a", (folder / "0.jpg",), "Why?", media="images")
    assert items[6].files == (folder / "1.jpg", folder / "2.jpg")
    said = ("", "line 2 is not JSON", "was given before", "line 4: there is no file", "names no file", "no object", "")
    for item, words in zip(items, said, strict=True):
        assert words in item.error and bool(words) == bool(item.error)


def test_odd_values_are_the_error_of_their_line_alone(folder):
    odd = [5, True, "a\u0000b", "x" * 5000, ["0.jpg", 3], {"bytes": "b", "path": "0.jpg"}]
    rows = [{"id": n, "image": value} for n, value in enumerate(odd)]
    path = write_list(
        folder, [*rows, {"id": "both", "image": "0.jpg", "video": "a.mp4"}, {"id": "ok", "image": "1.jpg"}]
    )
    path.write_text("\ufeff" + path.read_text())
    items = read_items(path)
    assert [bool(item.error) for item in items] == [True] * 7 + [False]
    said = (
        "given as paths, got int",
        "got bool",
        "there is no file",
        "there is no file",
        "got str",
        "got dict",
        "several",
    )
    for item, words in zip(items, said, strict=False):
        assert words in item.error


def test_names_and_lines_that_nobody_expects(folder):
    rows = ['{"id": "s", "image": "x\\ud800.jpg"}', '{"id": "c\\ud800", "image": "0.jpg"}', "[" * 100_000]
    rows += [{"id": "none", "image": []}, {"id": None, "image": "0.jpg"}, {"id": "p", "image": "0.jpg", "prompt": 5}]
    items = read_items(write_list(folder, rows))
    said = ("there is no file", "", "is not JSON", "its field of images is empty", "", "prompt must be text, got int")
    for item, words in zip(items, said, strict=True):
        assert words in item.error and bool(words) == bool(item.error)
    assert [item.id for item in items] == ["s", "c\\ud800", "line 3", "none", "line 5", "p"]
    found = run(folder, items)
    assert found.good["id"].tolist() == ["c\\ud800", "line 5"] and len(found.bad) == 4


def test_a_file_whose_name_is_no_text(folder):
    (folder / "0.jpg").rename(folder / os.fsdecode(b"caf\xe9.jpg"))
    found = run(folder, read_items(folder))
    assert "caf\\udce9.jpg" in found.good["id"].tolist() and len(found.good) == 6


def test_ids_made_up_for_duplicates_are_no_other_samples(folder):
    for ids in (["ok (2)", "ok", "ok"], ["ok", "ok", "ok (2)"]):
        items = read_items(write_list(folder, [{"id": one, "image": "0.jpg"} for one in ids]))
        assert len({item.id for item in items}) == 3
        assert {item.id for item in items if not item.error} == {"ok", "ok (2)"}


def test_a_list_may_lie_elsewhere_than_its_files(folder, tmp_path_factory):
    path = write_list(tmp_path_factory.mktemp("lists"), [{"id": "a", "image": "0.jpg"}])
    assert "there is no file" in read_items(path)[0].error
    assert read_items(path, folder)[0].error == ""
    with pytest.raises(InputError, match="is an image, no list of samples"):
        read_items(folder / "0.jpg")


def test_what_the_list_says_of_a_file_counts_not_its_name(folder):
    (folder / "blob").write_bytes((folder / "0.jpg").read_bytes())
    loaded = tiny_llava()
    item = read_items(write_list(folder, [{"image": "blob"}]))[0]
    assert samples.sample_for(loaded.processor, loaded.model, item.files, None, 3, given=item.media).load()
    with pytest.raises(InputError, match="blob is given as a video, not an image, which is what Llava"):
        samples.sample_for(loaded.processor, loaded.model, item.files, None, 3, given="videos")


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
    assert profkit.load(folder / "run").rows.equals(found.rows)
    with pytest.raises(InputError, match="is a run over many samples"):
        load(folder / "run")


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


def test_a_run_is_resumed_with_its_own_list(folder):
    items = read_items(folder)
    run(folder, items[:3])
    with pytest.raises(InputError, match=r"holds 1 samples that are not in this list \(the first: 0.jpg\)"):
        run(folder, items[1:], resume=True)
    assert len(SampleRun.load(folder / "run").rows) == 3


def test_a_run_is_not_resumed_with_other_files_of_the_same_ids(folder):
    run(folder, read_items(write_list(folder, [{"image": "0.jpg"}, {"image": "1.jpg"}])))
    for other in ({"image": "2.jpg"}, {"image": "0.jpg", "prompt": "Why?"}):
        with pytest.raises(InputError, match=r"1 samples that are not in this list \(the first: line 1\)"):
            run(folder, read_items(write_list(folder, [other, {"image": "1.jpg"}])), resume=True)


def test_whatever_a_file_makes_a_library_raise_is_its_row_alone(folder, monkeypatch):
    inner = samples.read_image

    def breaking(path):
        if path.name == "1.jpg":
            raise MemoryError("too large")
        return inner(path)

    monkeypatch.setattr(samples, "read_image", breaking)
    found = run(folder, read_items(folder)[:3])
    assert found.bad["error"].tolist() == ["Unexpected MemoryError: too large"]
    assert found.good["id"].tolist() == ["0.jpg", "2.jpg"]


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


def test_the_page_cache_is_asked_and_left_alone(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(2_000_000))
    assert are_cached([path]) in (True, None)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    first, again = are_cached([path]), are_cached([path])
    # A file system in memory keeps what it has.
    assert first == again
    assert are_cached([]) is None
    assert are_cached([tmp_path / "none"]) is None
    (tmp_path / "empty").touch()
    assert are_cached([tmp_path / "empty"]) in (True, None)


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
    wrong_ones = [(["--resume"], "--resume needs --out"), (["x.jpg"], "leave INPUTS out")]
    wrong_ones += [(["--repeat", "3"], "--repeat is for a single sample"), (["--part", "projector=no"], "no module")]
    wrong_ones += [(["--out", str(folder / "0.jpg" / "x")], "choose another --out")]
    wrong_ones += [(["--min-new-tokens", "9"], "is more than --max-new-tokens 2")]
    for wrong, said in wrong_ones:
        result = CliRunner().invoke(cli.cli, [*arguments, *wrong])
        assert result.exit_code == 2 and said in result.stderr


def test_a_run_that_fails_is_said_so(folder):
    path = write_list(folder, [{"id": "a", "image": "0.jpg"}, {"id": "b", "image": "bad.jpg"}])
    arguments = ["trace", "tiny-llava", "--samples", str(path), "--max-new-tokens", "2", "--out", str(folder / "run")]
    result = CliRunner().invoke(cli.cli, [*arguments, "--strict"], env={"COLUMNS": "160"})
    assert result.exit_code == 1 and "these checks failed: samples (1 in error (at most 0 in error))" in result.stderr
    assert "FAILED samples" in result.stdout and "passed 3 checks: sums (stages)" in result.stdout
    result = CliRunner().invoke(cli.cli, ["verify", str(folder / "run")], env={"COLUMNS": "160"})
    assert result.exit_code == 1 and "1 of 5 checks failed: samples" in result.stderr
    write_list(folder, [{"id": "b", "image": "bad.jpg"}])
    result = CliRunner().invoke(cli.cli, arguments)
    assert result.exit_code == 2 and "already exists" in result.stderr
    result = CliRunner().invoke(cli.cli, [*arguments, "--force"])
    assert result.exit_code == 1 and "None of the 1 samples could be measured" in result.stderr
