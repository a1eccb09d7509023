"""Run directories: all or nothing, and one sentence for what cannot be read or written."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from builders import small_llava

import profkit
from profkit import comparison, directories, sample_runs, sample_text
from profkit import run as runs
from profkit.errors import InputError


@pytest.fixture
def saved(tmp_path):
    model, kwargs = small_llava()
    path = tmp_path / "run"
    profkit.trace(model, kwargs, out=path, warmup=0, repeat=1, profile=False)
    return path


def test_what_is_not_a_run_is_refused(tmp_path, saved):
    with pytest.raises(InputError, match=r"is not a run directory: it has no readable run\.json"):
        profkit.load(tmp_path)
    manifest = saved / "run.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(InputError, match=r"has schema 99, this profkit reads 1: use the profkit that wrote it"):
        profkit.load(saved)
    manifest.write_text("{")
    with pytest.raises(InputError, match=r"run\.json is damaged"):
        profkit.load(saved)


def test_without_its_marks_a_run_tells_what_was_saved_beside_them(saved):
    whole = profkit.load(saved)
    (saved / "marks.parquet").write_bytes(b"PAR1 cut short")
    hurt = profkit.load(saved)
    assert hurt.unreadable[0].startswith("marks.parquet cannot be read") and not hurt.clean
    pd.testing.assert_frame_equal(hurt.stages(), whole.stages())
    pd.testing.assert_frame_equal(hurt.steps(), whole.steps())
    pd.testing.assert_frame_equal(hurt.modules(), whole.modules())
    assert str(hurt.latency()) == str(whole.latency())
    with pytest.raises(InputError, match=r"no times to show: marks\.parquet cannot be read"):
        _ = hurt.representative
    with pytest.raises(InputError, match="no times to show"):
        hurt.save(saved.parent / "again")
    with pytest.raises(InputError, match="nothing to compare"):
        comparison.measured(hurt)
    (saved / "stages.parquet").unlink()
    with pytest.raises(InputError, match="no times to show"):
        profkit.load(saved).stages()


def test_a_run_without_some_of_its_manifest_is_read_as_far_as_it_goes(saved):
    content = json.loads((saved / "run.json").read_text())
    before = profkit.load(saved).stages()
    for key in ("device", "latency", "anatomy", "model_class"):
        content.pop(key)
    (saved / "run.json").write_text(json.dumps(content))
    run = profkit.load(saved)
    assert run.unreadable == ["run.json lacks anatomy"]
    pd.testing.assert_frame_equal(run.stages(), before)
    content.pop("scopes")
    (saved / "run.json").write_text(json.dumps(content))
    run = profkit.load(saved)
    assert run.unreadable[0] == "run.json lacks anatomy, scopes" and "marks.parquet cannot be read" in run.unreadable[1]
    pd.testing.assert_frame_equal(run.stages(), before)


def test_a_table_without_some_of_its_columns_is_kept_and_says_so(saved):
    modules = pd.read_parquet(saved / "modules.parquet")
    (saved / "marks.parquet").unlink()
    modules.drop(columns=["self_ms", "stage"]).to_parquet(saved / "modules.parquet")
    run = profkit.load(saved)
    assert run.unreadable[1] == "modules.parquet lacks self_ms, stage: what needs it is missing"
    assert run.modules()["path"].tolist() == modules["path"].tolist() and run.modules()["self_ms"].isna().all()
    modules.drop(columns="path").to_parquet(saved / "modules.parquet")
    assert "modules.parquet lacks path, so its table is missing" in profkit.load(saved).unreadable


def test_a_loaded_run_saves_whole(tmp_path):
    model, kwargs = small_llava()
    profkit.trace(model, kwargs, out=tmp_path / "a", warmup=0, repeat=1)
    profkit.load(tmp_path / "a").save(tmp_path / "b")
    names = [sorted(str(file.relative_to(tmp_path / run)) for file in (tmp_path / run).rglob("*")) for run in "ab"]
    assert names[0] == names[1]
    assert (tmp_path / "a" / "trace.json.gz").read_bytes() == (tmp_path / "b" / "trace.json.gz").read_bytes()


def test_a_run_is_replaced_only_by_force(saved):
    model, kwargs = small_llava()
    before = (saved / "run.json").read_text()
    with pytest.raises(InputError, match="already exists"):
        profkit.trace(model, kwargs, out=saved)
    assert (saved / "run.json").read_text() == before
    profkit.trace(model, kwargs, out=saved, force=True, warmup=0, repeat=2, profile=False)
    assert len(profkit.load(saved).clean) == 2
    assert [one.name for one in saved.parent.iterdir()] == ["run"]


def test_force_does_not_replace_what_is_no_run(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").touch()
    with pytest.raises(InputError, match="--force will not replace it"):
        directories.check_target(tmp_path / "thesis", force=True)


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def fill(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        directories.write_directory(tmp_path / "run", fill)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_the_old_run(saved):
    def fill(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    before = (saved / "run.json").read_text()
    with pytest.raises(InputError, match=r"Cannot write .*: No space left on device"):
        directories.write_directory(saved, fill, force=True)
    assert (saved / "run.json").read_text() == before
    assert [one.name for one in saved.parent.iterdir()] == ["run"]


def test_targets_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"Cannot write .*: Not a directory"):
        directories.check_target(tmp_path / "file" / "run", force=False)
    with pytest.raises(InputError, match="Cannot write /proc/run"):
        directories.check_target(Path("/proc/run"), force=False)


def test_a_run_without_a_clean_pass_says_so():
    empty = runs.Run({}, profkit.inspect(small_llava()[0]), [], [])
    with pytest.raises(InputError, match="no finished clean pass"):
        empty.stages()
    assert len(empty.dilation()) == 0


def test_plain_values_are_json():
    frame = pd.DataFrame({"a": [1.5, float("nan")]})
    assert directories.plain(frame.to_dict(orient="list")) == {"a": [1.5, None]}
    assert directories.plain({1: (Path("x"), frozenset([2]), float("inf"))}) == {"1": ["x", [2], None]}


ROW = {"error": "", "rank": 0, "stages_ns": {"decode": 2_000_000}}


def test_damaged_lines_of_a_run_over_samples_are_counted_and_named(tmp_path):
    sample_runs.write_manifest(tmp_path, {"model": "m"})
    rows = [json.dumps({"id": f"s{number}", **ROW}) + "\n" for number in range(4)]
    (tmp_path / "samples.jsonl").write_text(rows[0] + rows[1][:20] + "\n" + "7\n" + rows[2] + rows[3][:15])
    run = profkit.load(tmp_path)
    assert run.rows["id"].tolist() == ["s0", "s2"]
    # Half a line at the very end is what a crash leaves, no damage; rows without a total cannot be checked for it.
    assert run.unreadable == [
        "samples.jsonl: 2 damaged lines (2, 3): what they measured is missing",
        f"the rows of {tmp_path.name} lack total_ns: whether stages sum to it cannot be checked",
    ]
    said = "\n".join(str(part) for part in sample_text.report(run))
    assert "2 damaged lines (2, 3)" in said
