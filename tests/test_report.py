"""The report: its figures are the tables', it holds what it says, runs no foreign script, and names what is missing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from builders import small_llava
from click.testing import CliRunner

import profkit
from profkit import cli, report, sample_runs
from profkit.errors import InputError

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Collects scripts, tags with their attributes, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._script: dict[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        else:
            self.scripts[-1] = (self._script, self.scripts[-1][1] + data)

    def figure(self, name: str) -> dict:
        return next(json.loads(text) for about, text in self.scripts if about.get("data-figure") == name)


def numbers(value) -> list[float]:
    """Return an array of a figure: plotly writes large ones as base64."""
    if isinstance(value, dict):
        return np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"]).tolist()
    return value


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model, kwargs = small_llava()
    return profkit.trace(
        model, kwargs, repeat=3, out=tmp_path_factory.mktemp("runs") / "one", manifest={"model": "one"}
    )


def test_the_bars_are_the_table(run):
    page = Page(report.html_of([run]))
    bars = {one["name"].split()[1]: numbers(one["x"])[0] for one in page.figure("run-stages")["data"]}
    assert bars == pytest.approx(run.stages()["host_ms"].to_dict())
    tree = page.figure("run-tree")["data"][0]
    tops = [ms for ms, parent in zip(numbers(tree["values"]), tree["parents"], strict=True) if parent == "all"]
    assert sum(tops) == pytest.approx(run.stages()["host_ms"].sum())
    assert f"{run.stages().loc['vision', 'host_ms']:.2f}" in page.text
    for title in (
        "Worth optimising",
        "Stages",
        "Steps",
        "Layers and modules",
        "Kernels",
        "Operators",
        "Anatomy",
        "Environment",
    ):
        assert title in page.text


def test_the_page_needs_no_network_and_allows_no_other_script(run):
    text = report.html_of([run])
    page = Page(text)
    assert not [about for tag, about in page.tags if {"src", "href"} & set(about)]
    policy = next(about["content"] for tag, about in page.tags if about.get("http-equiv") == "Content-Security-Policy")
    running = [script for about, script in page.scripts if about.get("type") != "application/json"]
    assert len(running) == 2 and "default-src 'none'" in policy and "script-src 'sha256" in policy
    for script in running:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert len(text) < 6e6


def test_what_comes_from_outside_is_text(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "evil")
    manifest = json.loads((tmp_path / "evil" / "run.json").read_text())
    manifest |= {
        "model": EVIL,
        "notes": [EVIL],
        "command": ["profkit", EVIL],
        "device_name": EVIL,
        "config": {EVIL: EVIL},
    }
    for scope in manifest["scopes"]:
        scope["path"] = scope["path"].replace("mlp", EVIL)
    manifest["anatomy"]["parts"][0]["class_name"] = EVIL
    (tmp_path / "evil" / "run.json").write_text(json.dumps(manifest))
    evil = profkit.load(tmp_path / "evil")
    evil.operators["name"] = EVIL
    evil.timeline["name"] = EVIL
    page = Page(report.html_of([evil]))
    assert len([about for about, _ in page.scripts if about.get("type") != "application/json"]) == 2
    assert "img" not in {tag for tag, _ in page.tags} and EVIL in page.text
    # Plotly reads some HTML in names: no bracket of theirs reaches it unescaped.
    for name in ("run-tree", "run-timeline0"):
        assert "<img" not in json.dumps(page.figure(name)["data"])


def test_what_is_missing_is_named(run, tmp_path):
    model, kwargs = small_llava()
    plain = profkit.trace(model, kwargs, repeat=1, warmup=0, profile=False, granularity="stage")
    text = Page(report.html_of([plain])).text
    for said in ("No kernels: this run has no profiled pass", "Layers were not probed", "No device"):
        assert said in text
    assert "the profiled pass saw no device" in Page(report.html_of([run])).text
    shutil.copytree(run.path, tmp_path / "hurt")
    (tmp_path / "hurt" / "operators.parquet").write_bytes(b"PAR1 cut short")
    text = Page(report.html_of([profkit.load(tmp_path / "hurt")])).text
    assert "operators.parquet is damaged" in text and "No operators: the run directory holds none" in text


def test_several_runs_stand_side_by_side(run, tmp_path):
    model, kwargs = small_llava()
    other = profkit.trace(model, {**kwargs, "max_new_tokens": 3, "min_new_tokens": 3}, repeat=3, profile=False)
    page = Page(report.html_of([run, other]))
    assert "output length makes" in page.text and "a new token" in page.text and "The report of" in page.text
    bars = page.figure("side-by-side")["data"]
    decode = next(one for one in bars if one["name"].endswith("decode"))
    assert len(numbers(decode["x"])) == 2
    assert page.figure("run0-stages")["data"] and page.figure("run1-stages")["data"]


def test_runs_of_one_name_stay_apart(run):
    page = Page(report.html_of([run, run]))
    assert page.figure("side-by-side")["data"][0]["y"] == ["1: one (one)", "2: one (one)"]
    assert "2: one (one) over 1: one (one)" in page.text


def test_a_run_over_samples(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    sample_runs.write_manifest(folder, {"model": "m", "model_class": "M", "dtype": "float32", "device": "cpu"})
    row = {"error": "", "rank": 0, "cached": None, "total_ns": 30, "prompt_tokens": 3, "new_tokens": 2, "batch": 1}
    times = {"load": 1_000_000, "vision": 2_000_000, "decode": 3_000_000}
    rows = [{"id": f"s{number}", **row, "stages_ns": times} for number in range(4)]
    rows.append({"id": "bad", "error": EVIL, "rank": 0})
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    page = Page(report.html_of([sample_runs.load_any(folder)]))
    assert "4 samples measured, 1 in error" in page.text and EVIL in page.text
    assert {one["name"].split()[1]: numbers(one["x"])[0] for one in page.figure("run-stages")["data"]} == {
        "load": 1.0, "vision": 2.0, "decode": 3.0,
    }  # fmt: skip


def test_the_command_writes_a_page_and_refuses_in_a_sentence(run, tmp_path):
    out = tmp_path / "page.html"
    done = CliRunner().invoke(cli.cli, ["report", str(run.path), "--out", str(out)])
    assert done.exit_code == 0 and done.output == f"Wrote {out}\n" and out.stat().st_size > 1e6
    again = CliRunner().invoke(cli.cli, ["report", str(run.path), "--out", str(out)])
    assert again.exit_code == 2 and "already exists" in again.stderr
    assert CliRunner().invoke(cli.cli, ["report", str(run.path), "--out", str(out), "--force"]).exit_code == 0
    none = CliRunner().invoke(cli.cli, ["report", str(tmp_path)])
    assert none.exit_code == 2 and re.search("is not a run directory", none.stderr)
    with pytest.raises(InputError, match="Cannot write"):
        profkit.write_report(run, "/proc/nowhere/page.html")
