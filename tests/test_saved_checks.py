"""Does a saved run say what has become of it? Its marks and its trace are damaged, and it must see that."""

from __future__ import annotations

import gzip
import re
import shutil

import pandas as pd
import pytest
from builders import small_llava

import profkit
from profkit import saved_checks
from profkit.verdicts import Verdict


def by_name(verdicts) -> dict[str, Verdict]:
    return {one.check: one for one in verdicts}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    model, kwargs = small_llava()
    profkit.trace(model, kwargs, repeat=1, out=folder)
    return folder


def failing_again(folder) -> list[str]:
    found = saved_checks.complete(profkit.load(folder))
    return [one.check for one in found if one.ok is False and one.check.startswith(("capture", "profile", "sums"))]


def test_a_saved_run_that_lost_a_mark(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    assert failing_again(folder) == []
    marks = pd.read_parquet(folder / "marks.parquet")
    marks.drop(index=len(marks) // 2).to_parquet(folder / "marks.parquet", index=False)
    assert "capture: marks" in failing_again(folder)


def test_a_saved_run_that_lost_both_marks_of_a_call(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    marks = pd.read_parquet(folder / "marks.parquet")
    code = marks["code"].to_numpy()
    entered = next(row for row in range(len(code) // 2, len(code)) if code[row] == -code[row + 1] > 0)
    marks.drop(index=[entered, entered + 1]).to_parquet(folder / "marks.parquet", index=False)
    assert failing_again(folder) == ["capture: saved tables"]


@pytest.mark.parametrize("how", ["no gzip", "half", "negative"])
def test_a_saved_trace_that_was_damaged(saved, tmp_path, how):
    folder = shutil.copytree(saved, tmp_path / "run")
    whole = (folder / "trace.json.gz").read_bytes()
    negative = re.sub(rb'"dur": ?', rb'"dur": -', gzip.decompress(whole))
    damaged = {"no gzip": b"xx", "half": whole[: len(whole) // 2], "negative": gzip.compress(negative)}[how]
    (folder / "trace.json.gz").write_bytes(damaged)
    found = failing_again(folder)
    assert {"no gzip": "profile: trace file", "half": "profile: end of the file", "negative": "profile: durations"}[
        how
    ] in found


def test_a_saved_trace_that_is_gone_is_said(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / "trace.json.gz").unlink()
    found = by_name(saved_checks.complete(profkit.load(folder)))["profile: trace file"]
    assert found.ok is None and "gone" in found.sentence


def test_an_older_profkits_word_on_the_data_is_not_kept(saved):
    run = profkit.load(saved)
    kept = {"ok": True, "measured": 0.0, "allowed": 0.05, "unit": "", "sentence": ""}
    old = [{"check": name, **kept} for name in ("steadiness: drift", "decoupled truth: encoding")]
    run.manifest["checks"]["verdicts"] += old
    found = by_name(saved_checks.complete(run))
    assert "steadiness: drift" not in found and found["decoupled truth: encoding"].ok is True
