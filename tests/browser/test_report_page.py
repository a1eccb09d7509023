"""The report in a real browser: drawn with the tables' numbers, searched, sorted, and nothing foreign runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import profkit

RUN = Path(__file__).parents[2] / "traces" / "tiny-llava-cpu"
EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>"
DRAWN = "() => [...document.querySelectorAll('.plot')].every(one => one.querySelector('.main-svg'))"
BODY = "getComputedStyle(document.body).backgroundColor"
STAGES = """() => [...[...document.querySelectorAll('section')]
  .find(one => one.querySelector('h2').textContent === 'Stages').querySelector('tbody').rows]
  .map(row => [row.cells[1].textContent, Number(row.cells[3].dataset.value)])"""
WIDTHS = """() => [...document.querySelectorAll('#run-stages .barlayer .trace')]
  .map(one => one.getBoundingClientRect().width)"""

RIGHT_EDGES = "all => all.map(one => one.getBoundingClientRect().right)"
INK_AND_BACK = """one => [getComputedStyle(one).color, getComputedStyle(one).backgroundColor]
  .map(colour => colour.match(/\\d+/g).slice(0, 3).map(Number))"""


@pytest.fixture
def page(opened, tmp_path):
    path = profkit.write_report(profkit.load(RUN), tmp_path / "report.html")
    found = opened(path.as_uri())
    found.page.wait_for_function(DRAWN, timeout=30_000)
    return found


def test_figures_are_drawn_with_the_numbers_of_the_tables(page):
    bars = page.page.evaluate("() => document.getElementById('run-stages').data.map(one => [one.name, one.x[0]])")
    table = profkit.load(RUN).stages()["host_ms"].to_dict()
    assert {name.split()[1]: ms for name, ms in bars} == pytest.approx(table)
    cells = page.page.evaluate(STAGES)
    assert dict(cells) == pytest.approx(table)
    # What a bar is as wide as, in pixels, is its share.
    widths = page.page.evaluate(WIDTHS)
    total = sum(table.values())
    assert [width / sum(widths) for width in widths] == pytest.approx([ms / total for ms in table.values()], abs=0.01)
    assert page.errors == [] and page.abroad == []


def test_the_tree_is_searched_and_its_nodes_tell_their_times(page):
    page.page.fill("input[data-for=run-tree]", "layers.3.mlp")
    said = page.page.inner_text("input[data-for=run-tree] + output")
    modules = profkit.load(RUN).modules().set_index("path")["self_ms"]
    own = sum(ms for path, ms in modules.items() if "layers.3.mlp" in path)
    assert said.endswith(f"own time {own:.3f} ms")
    page.page.fill("input[data-for=run-tree]", "no such name")
    assert page.page.inner_text("input[data-for=run-tree] + output").startswith("0 found")
    page.page.locator("#run-tree .slice").nth(1).hover()
    page.page.wait_for_selector("#run-tree .hoverlayer text", timeout=10_000)
    name, total = re.match(
        r"(\w+)total ([\d.]+) ms, own 0.000 ms", page.page.text_content("#run-tree .hoverlayer")
    ).groups()
    assert float(total) == pytest.approx(profkit.load(RUN).stages().loc[name, "host_ms"], abs=0.001)
    assert page.errors == []


def test_a_click_on_a_title_sorts_by_numbers(page):
    operators = page.page.locator("section", has=page.page.locator("h2", has_text="Operators"))
    operators.locator("th", has_text="calls").click()
    values = [
        float(one)
        for one in operators.locator("tbody td:nth-child(4)").evaluate_all("all => all.map(one => one.dataset.value)")
    ]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1


def test_colours_follow_the_reader(opened, tmp_path):
    path = profkit.write_report(profkit.load(RUN), tmp_path / "report.html")
    inks = []
    for scheme in ("light", "dark"):
        found = opened(path.as_uri(), color_scheme=scheme)
        found.page.wait_for_function(DRAWN, timeout=30_000)
        found.page.wait_for_function("() => document.getElementById('run-stages').layout.font?.color", timeout=30_000)
        layout = "document.getElementById('run-stages').layout.font.color"
        inks.append(found.page.evaluate(f"() => [{layout}, {BODY}]"))
    assert inks == [["#1b1f24", "rgb(255, 255, 255)"], ["#e4e8ec", "rgb(20, 23, 27)"]]


def test_what_is_injected_does_not_run(opened, tmp_path):
    shutil.copytree(RUN, tmp_path / "evil")
    manifest = json.loads((tmp_path / "evil" / "run.json").read_text())
    manifest |= {"model": EVIL, "notes": [EVIL], "command": [EVIL], "device_name": EVIL}
    for scope in manifest["scopes"]:
        scope["path"] = scope["path"].replace("mlp", EVIL)
    (tmp_path / "evil" / "run.json").write_text(json.dumps(manifest))
    run = profkit.load(tmp_path / "evil")
    run.operators["name"] = EVIL
    run.timeline["name"] = EVIL
    found = opened(profkit.write_report(run, tmp_path / "report.html").as_uri())
    found.page.wait_for_function(DRAWN, timeout=30_000)
    found.page.fill("input[data-for=run-tree]", "script")
    assert found.page.evaluate("() => window.evil") is None
    assert EVIL in found.page.inner_text("h1") and found.errors == []


def test_the_steps_begin_at_zero_and_both_axes_are_whole(page):
    layout = "document.getElementById('run-steps')._fullLayout"
    low, title, other = page.page.evaluate(
        f"() => [{layout}.yaxis.range[0], {layout}.yaxis.title.text, {layout}.yaxis2.title.text]"
    )
    assert (low, title, other) == (0, "ms a token", "cache, MiB")
    box = page.page.locator("#run-steps").bounding_box()
    for one in ("#run-steps .y2title", "#run-steps .y2tick text >> nth=-1"):
        part = page.page.locator(one).bounding_box()
        assert part["x"] + part["width"] <= box["x"] + box["width"]
    ticks = page.page.locator("#run-steps .y2tick text").evaluate_all(RIGHT_EDGES)
    assert max(ticks) <= page.page.locator("#run-steps .y2title").bounding_box()["x"]


@pytest.mark.parametrize("width", [1300, 800])
def test_a_legend_stands_below_the_title_of_the_axis(opened, tmp_path, width):
    found = opened(profkit.write_report(profkit.load(RUN), tmp_path / "report.html").as_uri())
    found.page.wait_for_function(DRAWN, timeout=30_000)
    found.page.set_viewport_size({"width": width, "height": 900})
    found.page.wait_for_function(
        "() => document.getElementById('run-stages')._fullLayout.width <= innerWidth", timeout=30_000
    )
    for name in ("run-stages", "run-steps", "run-timeline0"):
        title, legend = (found.page.locator(f"#{name} {one}").bounding_box() for one in (".xtitle", ".legend .bg"))
        box = found.page.locator(f"#{name}").bounding_box()
        assert title["y"] + title["height"] <= legend["y"] + 1
        assert legend["y"] + legend["height"] <= box["y"] + box["height"] + 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_button_shows_its_tree_and_can_be_read(opened, tmp_path, scheme):
    path = profkit.write_report(profkit.load(RUN), tmp_path / "report.html")
    found = opened(path.as_uri(), color_scheme=scheme)
    found.page.wait_for_function(DRAWN, timeout=30_000)
    buttons = found.page.locator("button[data-for=run-tree]")
    found.page.fill("input[data-for=run-tree]", "aten::")
    assert found.page.inner_text("input[data-for=run-tree] + output").startswith("0 found")
    buttons.nth(1).click()
    shown = found.page.evaluate("() => document.getElementById('run-tree').data.map(one => one.visible)")
    assert shown == [number == 1 for number in range(len(shown))]
    assert not found.page.inner_text("input[data-for=run-tree] + output").startswith("0 found")
    for number in range(len(shown)):
        ink, back = buttons.nth(number).evaluate(INK_AND_BACK)
        assert abs(sum(ink) - sum(back)) > 200
    assert found.errors == []
