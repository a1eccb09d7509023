"""Traces of real devices, against the plain definitions, Perfetto, and answers known beforehand."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import perfetto
import pytest
from handmade import SHARED_TRACES
from oracle import DEVICE as DEVICE_CATEGORIES
from oracle import Plain

from profkit import analysis, device_tables
from profkit.attribution import Why
from profkit.events import DEVICE
from profkit.foreign import MODULE_PREFIX

TRACES = sorted(SHARED_TRACES.glob("*.json.gz"))
pytestmark = pytest.mark.skipif(not TRACES, reason="the real traces are not beside this checkout")
by_name = pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name.removesuffix(".json.gz"))


@by_name
def test_counts_totals_busy_time_owners_and_self_times_equal_the_plain_definitions(path: Path):
    plain, found = Plain.read(path), analysis.attributed(path)
    events, owners, forest = found.trace.events, found.owners, found.forest
    assert not found.trace.damage
    kernels = device_tables.kernel_table(events, owners, forest)
    sums = kernels.groupby("name").agg(count=("count", "sum"), total_ms=("total_ms", "sum"))
    measured = {name: (row["count"], round(row["total_ms"] * 1e6)) for name, row in sums.iterrows()}
    assert measured == plain.kernels_by_name()
    occupied = analysis.occupancy(events, owners.launch, owners.begun_ns())
    busy = {
        device: int(occupied.busy_ns[occupied.device == number].sum()) for number, device in enumerate(events.devices)
    }
    used = {events.devices[one] for one in np.unique(occupied.device).tolist()}
    assert {device: busy[device] for device in used} == plain.busy()
    assert _owners(found) == plain.owners()
    operators = device_tables.operator_table(events, owners, forest)
    own = operators.groupby("name")["self_ms"].sum()
    assert {name: round(ms * 1e6) for name, ms in own.items()} == dict(plain.self_times())


def _owners(found: analysis.Attributed) -> list[tuple[str, int, str, str]]:
    """What Plain.owners() gives, from the columns."""
    events, owners, forest = found.trace.events, found.owners, found.forest
    rows = np.flatnonzero(events.is_kind(*DEVICE))
    operator, names = device_tables._operator_of(events, owners, forest, rows)
    result = []
    for row, op in zip(rows.tolist(), operator.tolist(), strict=True):
        own_thread = owners.why[row] not in (Why.OTHER_THREAD, Why.NO_LAUNCH) and owners.scope[row] >= 0
        path = owners.scopes.paths[owners.scope[row]] if own_thread else ""
        modules = ".".join(part for part in path.replace("/", ".").split(".") if part in _modules(found))
        start = int(events.start_ns[row])
        result.append((events.names[events.name[row]], start, modules, names[op] if op >= 0 else ""))
    return sorted(result)


def _modules(found: analysis.Attributed) -> set[str]:
    names = found.trace.events.names
    return {name.removeprefix(MODULE_PREFIX) for name in names if name.startswith(MODULE_PREFIX)}


@pytest.mark.parametrize(
    ("name", "root", "device_us"),
    [
        ("nv_h100_vit", "ViTModel_0", 1225.3),
        ("nv_h100_qwen1.5-0.5b_prefill", "Qwen2Model_0", 31905.5),
        ("nv_b200_vllm_gptoss_eager", "GptOssForCausalLM_0", 11575.2),
    ],
)
def test_device_time_under_the_root_module_is_what_three_others_found(name: str, root: str, device_us: float):
    kernels = analysis.analyze(SHARED_TRACES / f"{name}.json.gz").tables["kernels"]
    inside = kernels["path"].str.split("[./]", regex=True).map(lambda parts: root in parts)
    assert kernels[inside]["total_ms"].sum() * 1e3 == pytest.approx(device_us, abs=0.05)


@by_name
def test_perfetto_counts_the_same_kernels_and_time(path: Path, tmp_path: Path):
    """Overlapping events get a thread of their own first: Perfetto would drop them in silence."""
    tables = analysis.analyze(path).tables
    copy = tmp_path / "trace.json"
    _in_lanes(path, copy)
    categories = ", ".join(f"'{one}'" for one in sorted(DEVICE_CATEGORIES))
    counted, dropped = perfetto.query(
        copy,
        f"select count(*) as n, coalesce(sum(dur), 0) as ns from slice where category in ({categories});"
        "select coalesce(sum(value), 0) as n from stats where name = 'slice_drop_overlapping_complete_event'",
    )
    assert dropped == [{"n": "0"}]
    assert int(counted[0]["n"]) == tables["devices"]["kernels"].sum()
    # Perfetto reads times as doubles of µs since 1970 in older files: a quarter of a µs at most for each event.
    loose = 0.0003 * int(counted[0]["n"]) if "ns_resolution" in path.name else 1e-9
    assert int(counted[0]["ns"]) / 1e6 == pytest.approx(tables["devices"]["sum_ms"].sum(), abs=loose)


def _in_lanes(path: Path, copy: Path) -> None:
    """Write the device events of a trace with overlapping ones on threads of their own."""
    events = [one for one in Plain.read(path).events if one.get("cat") in DEVICE_CATEGORIES]
    free: dict[tuple, dict[int, int]] = {}
    for one in sorted(events, key=lambda one: (one["start"], -one["length"])):
        lanes = free.setdefault((one["pid"], str(one["tid"])), {})
        number = next((lane for lane, end in lanes.items() if end <= one["start"]), len(lanes))
        lanes[number] = one["end"]
        one["tid"] = 1000 * (1 + list(free).index((one["pid"], str(one["tid"])))) + number
    keep = ("ph", "cat", "name", "pid", "tid", "ts", "dur")
    rows = [{key: float(one[key]) if key in ("ts", "dur") else one[key] for key in keep} for one in events]
    copy.write_text(json.dumps({"traceEvents": rows}))


def test_a_graphs_kernels_get_the_operators_and_modules_of_its_capture():
    capture = analysis.attributed(SHARED_TRACES / "amd_mi300_sglang_qwen3_graph_capture.json.gz")
    path = SHARED_TRACES / "amd_mi300_sglang_qwen3_decode_graph.json.gz"
    plain, proven = analysis.analyze(path), analysis.analyze(path, [capture])
    assert plain.tables["coverage"].loc["module", "share"] < 0.01
    assert proven.tables["coverage"].loc["module", "share"] > 0.99
    why = dict(zip(proven.tables["reasons"]["why"], proven.tables["reasons"]["count"], strict=True))
    assert why == {"inside": 14, "captured": 544}
    attention = proven.tables["kernels"].query("name.str.contains('paged_attention_ll4mi_QKV_mfma16')")
    assert attention["path"].str.fullmatch(r".*Qwen3DecoderLayer_\d+\.Qwen3Attention_\d+\.RadixAttention_\d+").all()
    assert attention["count"].sum() == 36
    assert proven.graphs == ["a graph of 544 kernels: names and order equal those of its capture"]
    # Attribution moves time between owners and loses none.
    assert proven.tables["kernels"]["total_ms"].sum() == pytest.approx(plain.tables["kernels"]["total_ms"].sum())


def test_a_capture_of_another_graph_proves_nothing():
    capture = analysis.attributed(SHARED_TRACES / "amd_mi300_sglang_qwen3_graph_capture.json.gz")
    found = analysis.analyze(SHARED_TRACES / "amd_vllm_gptoss_decode_fullgraph.json.gz", [capture])
    assert found.graphs == [
        "a graph of 421 kernels: not split, no capture proves it (1 seen; those with names have 544 launches)"
    ]
    assert "captured" not in set(found.tables["reasons"]["why"])


def test_doubts_are_the_ones_known():
    def doubts(name: str) -> dict[str, int]:
        found = analysis.analyze(SHARED_TRACES / f"{name}.json.gz")
        return {one.name: one.count for one in found.checks if one.ok is False}

    assert doubts("nv_h100_vit") == {"nesting on the host": 2}
    assert doubts("nv_b200_vllm_gptoss_eager")["streams in order"] == 74
    assert doubts("nv_h100_qwen1.5-0.5b_prefill")["launches of kernels"] == 509
    assert doubts("nv_a100_no_kernels")["kernels of launches"] == 77
    assert "kernels of launches" not in doubts("amd_mi300_sglang_qwen3_graph_capture")


def test_phases_of_serving_traces_come_from_their_annotations():
    def phases(name: str) -> dict[str, int]:
        steps = analysis.analyze(SHARED_TRACES / f"{name}.json.gz").tables["steps"]
        return dict(Counter(steps["phase"]))

    assert phases("nv_b200_vllm_gptoss_eager") == {"prefill": 1}
    assert phases("amd_mi300_sglang_qwen3_decode_graph") == {"decode": 1}
    assert phases("nv_v100_large") == {"": 5}
    assert phases("nv_a100_triton") == {"": 1}


def test_a_damaged_copy_of_a_real_trace_keeps_the_rest(tmp_path: Path):
    text = gzip.decompress((SHARED_TRACES / "nv_h100_vit.json.gz").read_bytes())
    path = tmp_path / "cut.json.gz"
    path.write_bytes(gzip.compress(text[: len(text) // 2]))
    found = analysis.analyze(path)
    assert found.events > 1000
    assert {"end of the file"} <= {one.name for one in found.checks if one.ok is False}
