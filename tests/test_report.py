"""The report: its figures are the tables', it holds what it says, runs no foreign script, and names what is missing."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
import shlex
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from builders import small_llava
from click.testing import CliRunner

import profkit
from profkit import cli, environment, report, sample_runs, stats
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
    for said in (
        *("No kernels: this run has no profiled pass", "Layers were not probed", "No device"),
        "No cache growth: the cache is watched in the profiled pass",
    ):
        assert said in text
    assert "the profiled pass saw no device" in Page(report.html_of([run])).text
    shutil.copytree(run.path, tmp_path / "hurt")
    (tmp_path / "hurt" / "operators.parquet").write_bytes(b"PAR1 cut short")
    text = Page(report.html_of([profkit.load(tmp_path / "hurt")])).text
    assert "operators.parquet is damaged" in text and "No operators: the run directory holds none" in text


def hurt(run, folder, file, change):
    """Return a copy of a run of which one file was changed."""
    shutil.copytree(run.path, folder)
    change(folder / file)
    return profkit.load(folder)


def without(*columns):
    return lambda path: pd.read_parquet(path).drop(columns=list(columns)).to_parquet(path)


def without_keys(*keys):
    def change(path):
        content = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in content.items() if key not in keys}))

    return change


def test_a_whole_run_has_no_section_that_stopped(run):
    assert "cannot be shown" not in Page(report.html_of([run])).text


def test_without_its_marks_a_run_shows_its_other_tables(run, tmp_path):
    damaged = hurt(run, tmp_path / "hurt", "marks.parquet", lambda path: path.write_bytes(path.read_bytes()[:1000]))
    page = Page(report.html_of([damaged]))
    assert "marks.parquet cannot be read" in page.text and "cannot be shown" not in page.text
    bars = {one["name"].split()[1]: numbers(one["x"])[0] for one in page.figure("run-stages")["data"]}
    assert bars == pytest.approx(run.stages()["host_ms"].to_dict())
    steps = page.figure("run-steps")["data"][2]
    assert numbers(steps["y"]) == pytest.approx(run.steps().query("phase == 'decode'")["iteration_ms"].tolist())
    assert page.figure("run-timeline0")["data"] and page.figure("run-tree")["data"]
    layer = run.modules().query("path.str.endswith('layers.0')").iloc[0]
    assert layer["path"] in page.text and f"{layer['total_ms']:.3f}" in page.text
    assert "No layers over steps" in page.text and "no outliers" in page.text
    assert run.operators["name"].iloc[0] in page.text


def test_without_any_table_of_times_the_rest_of_a_run_is_shown(run, tmp_path):
    shutil.copytree(run.path, tmp_path / "hurt")
    for name in ("marks", "stages", "steps", "modules"):
        (tmp_path / "hurt" / f"{name}.parquet").unlink()
    page = Page(report.html_of([profkit.load(tmp_path / "hurt")]))
    assert "Stages cannot be shown: This run holds no finished clean pass" in page.text
    assert page.figure("run-timeline0")["data"] and "To reproduce" in page.text


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("operators.parquet", without("self_ms", "stage"), "operators.parquet lacks self_ms, stage"),
        ("operators.parquet", without("name"), "operators.parquet lacks name, so its table is missing"),
        ("timeline.parquet", without("start_ms"), "timeline.parquet lacks start_ms, so its table is missing"),
        ("run.json", without_keys("device", "latency", "parameters"), "run.json does not tell: device"),
        ("run.json", without_keys("anatomy", "scopes", "passes"), "run.json lacks anatomy, scopes, passes"),
        (
            "run.json",
            without_keys("checks", "calls", "versions", "plan", "config", "command"),
            "does not tell: versions",
        ),
    ],
)
def test_what_a_run_lacks_is_named_and_the_rest_shown(run, tmp_path, file, change, said):
    page = Page(report.html_of([hurt(run, tmp_path / "hurt", file, change)]))
    assert said in page.text and "KeyError" not in page.text
    assert page.figure("run-stages")["data"]
    assert f"{run.stages().loc['vision', 'host_ms']:.2f}" in page.text


def test_a_large_tree_is_cut_and_says_so(run, monkeypatch):
    monkeypatch.setattr("profkit.run_sections.MOST_NODES", 100)
    page = Page(report.html_of([run]))
    nodes = len(run.trees)
    assert "The 50 largest nodes are shown (of " in page.text and f"of {nodes:,} in profiled steps" in page.text
    tree = page.figure("run-tree")["data"][1]
    assert any(name.endswith(" smaller") for name in tree["labels"]) and len(tree["labels"]) < nodes
    tops = [ms for ms, parent in zip(numbers(tree["values"]), tree["parents"], strict=True) if parent == "all"]
    assert sum(tops) == pytest.approx(run.trees[run.trees["parent"] < 0]["total_ms"].sum())


def test_a_section_that_stops_says_so_and_the_page_goes_on(run, tmp_path):
    odd = hurt(run, tmp_path / "odd", "run.json", lambda path: None)
    odd.manifest["checks"]["encoded"] = {"repeats": [{}]}
    page = Page(report.html_of([odd]))
    assert "Worth optimising cannot be shown in full" in page.text and page.figure("run-tree")["data"]


def test_the_command_to_reproduce_can_be_given_to_a_shell(run, monkeypatch):
    words = ["profkit", "trace", "tiny-llava", "--prompt", "What's <this> & that?"]
    said = report.shell_line(words)
    assert shlex.split(said) == words and "'" in said
    assert report.shell_line(["__main__.py", "trace"]) == "python -m profkit trace"
    monkeypatch.setattr("sys.argv", ["/usr/bin/profkit", "trace", "a b"])
    monkeypatch.setattr("__main__.__spec__", None)
    assert environment.command_as_run() == ["profkit", "trace", "a b"]
    monkeypatch.setattr("sys.argv", ["tools/mine.py", "x"])
    assert environment.command_as_run() == ["python", "tools/mine.py", "x"]
    monkeypatch.setattr("__main__.__spec__", importlib.util.find_spec("profkit.__main__"))
    assert environment.command_as_run() == ["python", "-m", "profkit", "x"]


def test_several_runs_stand_side_by_side(run, tmp_path):
    model, kwargs = small_llava()
    other = profkit.trace(model, {**kwargs, "max_new_tokens": 3, "min_new_tokens": 3}, repeat=3, profile=False)
    page = Page(report.html_of([run, other]))
    assert "output length makes" in page.text and "a new token" in page.text and "The report of" in page.text
    bars = page.figure("side-by-side")["data"]
    decode = next(one for one in bars if one["name"].endswith("decode"))
    assert len(numbers(decode["x"])) == 2
    assert page.figure("run0-stages")["data"] and page.figure("run1-stages")["data"]
    # Three repeats each: the smallest p is 2 / 20, so no difference could be told from chance.
    assert "too few repeats" in page.text and "not beyond chance" not in page.text
    ends = [sum(numbers(one["x"])[0] for one in bars), float(run.spread().loc["total", "median_ms"])]
    assert f"{ends[0]:.1f} ms here, {ends[1]:.1f} ms there" in page.text
    assert page.figure("side-by-side")["layout"]["xaxis"]["title"]["text"] == "ms, medians"


def test_a_run_in_which_every_sample_failed_is_named_beside_others(run, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    sample_runs.write_manifest(bad, {"model": "m", "model_class": "M"})
    (bad / "samples.jsonl").write_text(json.dumps({"id": "a", "error": "broken", "rank": 0}) + "\n")
    for paths in ([run.path, bad], [bad, run.path, run.path], [bad, bad]):
        out = tmp_path / "page.html"
        done = CliRunner().invoke(cli.cli, ["report", *map(str, paths), "--out", str(out), "--force"])
        assert done.exit_code == 0, done.output
        page = Page(out.read_text())
        assert f"not compared: {bad} holds no sample that was measured" in page.text
        assert "0 samples measured, 1 in error" in page.text and "broken" in page.text
    assert stats.can_differ(10, 10, paired=True, tests=9) and not stats.can_differ(5, 3, paired=False, tests=2)


def test_runs_of_one_name_stay_apart(run):
    page = Page(report.html_of([run, run]))
    assert page.figure("side-by-side")["data"][0]["y"] == ["1: one (one)", "2: one (one)"]
    assert "2: one (one) over 1: one (one)" in page.text


def test_a_run_over_samples(tmp_path):
    folder = tmp_path / "many"
    folder.mkdir()
    sample_runs.write_manifest(folder, {"model": "m", "model_class": "M", "dtype": "float32", "device": "cpu"})
    row = {"error": "", "rank": 0, "cached": None, "prompt_tokens": 3, "new_tokens": 2, "batch": 1}
    times = {"load": 1_000_000, "vision": 2_000_000, "decode": 3_000_000}
    rows = [{"id": f"s{number}", **row, "total_ns": 6_000_000, "stages_ns": times} for number in range(4)]
    rows[0] |= {"encoded_again_ms": 1.5}
    rows.append({"id": "bad", "error": EVIL, "rank": 0})
    lines = [json.dumps(one) + "\n" for one in rows]
    (folder / "samples.jsonl").write_text("".join([*lines[:2], '{"id": "lost', "\n", *lines[2:]]))
    page = Page(report.html_of([sample_runs.load_any(folder)]))
    assert "4 samples measured, 1 in error" in page.text and EVIL in page.text
    assert {one["name"].split()[1]: numbers(one["x"])[0] for one in page.figure("run-stages")["data"]} == {
        "load": 1.0, "vision": 2.0, "decode": 3.0,
    }  # fmt: skip
    for said in (
        "A sample, from its files to its tokens, takes 6.0 ms in the mean (medians: 3 prompt tokens, 2 new tokens)",
        "50.0% in stage 4",
        "failed: samples: 1 in error",
        "failed: encoded twice",
        "The largest stage is decode",
        "Encoded twice: in 1 samples, at a median of 1.50 ms",
        "samples.jsonl: 1 damaged line (3)",
        "What a run over samples does not hold",
        "kernels and operators: no sample is profiled",
    ):
        assert said in page.text, said
    assert "cannot be shown" not in page.text


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
