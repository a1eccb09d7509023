"""A run's trace in speedscope, in a real browser: every row whole, nothing taken apart.

The page comes from the npm package speedscope: PROFKIT_SPEEDSCOPE names its folder dist/release.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from builders import small_llava

import profkit
from profkit import viewing


@pytest.fixture(scope="module")
def release() -> Path:
    named = os.environ.get("PROFKIT_SPEEDSCOPE")
    if not named or not (Path(named) / "index.html").is_file():
        pytest.skip("PROFKIT_SPEEDSCOPE names no folder with speedscope's page (npm pack speedscope)")
    return Path(named)


def test_a_run_opens_in_speedscope(opened, serving, release, tmp_path):
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1, out=tmp_path / "run")
    site = viewing.Site({"trace.json.gz": tmp_path / "run" / "trace.json.gz"}, {"speedscope/": release})
    with serving(viewing.Server(site, 0)) as server:
        found = opened(f"{server.address}speedscope/index.html#profileURL={server.address}trace.json.gz")
        page = found.page
        said: list[str] = []
        page.on("console", lambda one: said.append(one.text))
        page.reload(wait_until="load")
        page.wait_for_function("() => /\\(\\d+\\/\\d+\\)/.test(document.body.innerText)", timeout=120_000)
        # The list of rows: profkit's three beside the threads of the program, each with its length.
        page.keyboard.press("t")
        page.wait_for_function("() => document.body.innerText.includes('Total Weight')", timeout=60_000)
        rows = dict(re.findall(r"profkit .*?(stages|steps|layers) \(tid \d\)\s+([\d.]+)ms", page.inner_text("body")))
        page.screenshot(path=str(tmp_path / "speedscope.png"))
    profiled = next(one.spans for one in run.of_kind("profiled"))
    assert set(rows) == {"stages", "steps", "layers"}
    length_ms = int(profiled.total_ns[profiled.depth == 0].sum()) / 1e6
    assert float(rows["stages"]) == pytest.approx(length_ms, rel=0.01)
    # It complains of slices whose ends are out of order and closes them elsewhere.
    assert [one for one in said if "Tried to end" in one or "still open" in one] == []
    assert found.errors == [] and found.abroad == []
