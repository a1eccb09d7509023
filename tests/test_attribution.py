"""Which scope owns each event of a profile, and why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from builders import DECODER, GENERATE, LAYER, Script, events_of
from handmade import HandMade, programs
from hypothesis import given, settings

from profkit import chrome
from profkit.analysis import Attributed
from profkit.attribution import Why, aligned, is_range, launches, owning_segment
from profkit.device_tables import kernel_table
from profkit.errors import MeasurementError
from profkit.events import DEVICE, HOST, Kind
from profkit.explanation import explain
from profkit.foreign import owners_of
from profkit.nesting import nest


def script_on_two_clocks() -> tuple[Script, int]:
    script = Script()
    script.enter(GENERATE, 0, tokens=1)
    script.enter(DECODER, 100, tokens=1)
    script.call(LAYER, 200, 300)
    script.leave(DECODER, 400)
    script.leave(GENERATE, 500)
    return script, 1_000_000


def test_spans_move_to_the_profilers_clock_by_their_ranges():
    script, shift = script_on_two_clocks()
    # Marks: 0 generate, 1 decoder, 2 layer, 3 -layer, 4 -decoder, 5 -generate. The generate's range was cut off.
    events = events_of(
        [("profkit:1", shift + 105, 290, 0), ("profkit:2", shift + 210, 80, 0), ("aten::mm", shift + 220, 5, 0)]
    )
    moved = aligned(script.spans(), events)
    # offsets: mark 1 +5, 2 +10, 3 -10, 4 -5; outside the nearest holds: 0 +5, 5 -5
    assert (moved.marks.host_ns - shift).tolist() == [5, 105, 210, 290, 395, 495]
    segment = owning_segment(moved, events.select(~is_range(events)).start_ns)
    assert moved.scopes[moved.scope[moved.owner[segment[0]]]] == LAYER


def test_operators_land_in_the_scope_open_when_they_were_called():
    script, shift = script_on_two_clocks()
    ranges = [
        (f"profkit:{mark}", shift + at, length, 0) for mark, at, length in ((0, 0, 500), (1, 100, 300), (2, 200, 100))
    ]
    operators = [
        ("aten::linear", shift + 210, 60, 0),
        ("aten::mm", shift + 220, 40, 0),
        ("aten::add", shift + 350, 20, 0),
        ("aten::argmax", shift + 450, 30, 0),
        ("aten::rand", shift + 900, 10, 0),  # after generate(): nobody's
    ]
    events = events_of(ranges + operators)
    spans = aligned(script.spans(), events)
    table = explain(spans, events, np.ones(len(spans.stage), dtype=bool)).operators
    found = {row.name: (row.stage, row.path, round(row.self_ms * 1e6)) for row in table.itertuples(index=False)}
    assert found == {
        "aten::linear": ("prefill", LAYER.path, 20),
        "aten::mm": ("prefill", LAYER.path, 40),
        "aten::add": ("prefill", DECODER.path, 20),
        "aten::argmax": ("select", GENERATE.path, 30),
        "aten::rand": ("outside", "", 10),
    }


def test_a_profile_without_ranges_is_refused():
    script, _ = script_on_two_clocks()
    with pytest.raises(MeasurementError, match="none of profkit's ranges"):
        aligned(script.spans(), events_of([("aten::mm", 0, 1, 0)]))


def test_nothing_to_attribute():
    assert owning_segment(Script().spans(), np.array([5])).tolist() == [-1]
    assert np.array_equal(owning_segment(script_on_two_clocks()[0].spans(), np.array([], dtype=np.int64)), [])


def attributed(made: HandMade) -> Attributed:
    trace = chrome.parse(made.text())
    forest = nest(trace.events, trace.events.is_kind(*HOST))
    return Attributed(trace, forest, *owners_of(trace, forest))


@settings(max_examples=300, deadline=None)
@given(programs())
def test_random_programs_get_the_owners_they_were_made_with(made):
    found = attributed(made)
    events, owners = found.trace.events, found.owners
    rows = np.flatnonzero(events.is_kind(*DEVICE)).tolist()
    assert len(rows) == len(made.kernels)

    def answer(row: int) -> tuple:
        path = owners.scopes.paths[owners.scope[row]] if owners.scope[row] >= 0 else ""
        why = Why(int(owners.why[row])).name.lower()
        return events.names[events.name[row]], int(events.start_ns[row]), int(events.duration_ns[row]), path, why

    # Where neither module nor annotation is open, the outermost operator is the scope.
    expected = [
        (one.name, one.start * 1000, one.duration * 1000, one.path or _root_operator(made, one), one.why)
        for one in made.kernels
    ]
    assert sorted(map(answer, rows)) == sorted(expected)
    table = kernel_table(events, owners, found.forest)
    assert table["count"].sum() == len(made.kernels)
    assert round(table["total_ms"].sum() * 1000) == sum(one.duration for one in made.kernels)
    by_operator = table.groupby("operator")["count"].sum().to_dict()
    assert by_operator == {
        name: sum(one.operator == name for one in made.kernels) for name in {one.operator for one in made.kernels}
    }


def _root_operator(made: HandMade, kernel) -> str:
    """The outermost operator around a kernel's launch, by the plain definition."""
    if not kernel.operator:
        return ""
    device = next(
        one
        for one in made.events
        if one["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")
        and (one["name"], one["ts"], one["dur"], one["pid"], one["tid"])
        == (kernel.name, kernel.start, kernel.duration, kernel.device, kernel.stream)
        and _operator_at(made, one) == kernel.operator
    )
    return _operators_around(made, device)[-1]["name"]


def _operators_around(made: HandMade, device: dict) -> list[dict]:
    call = next(
        one
        for one in made.events
        if one["cat"] == "cuda_runtime" and one["args"]["correlation"] == device["args"]["correlation"]
    )
    around = [
        one
        for one in made.events
        if one["cat"] == "cpu_op" and one["tid"] == call["tid"] and one["ts"] <= call["ts"] < one["ts"] + one["dur"]
    ]
    return sorted(around, key=lambda one: one["dur"])


def _operator_at(made: HandMade, device: dict) -> str:
    calls = [one for one in made.events if one["cat"] == "cuda_runtime"]
    if device["args"]["correlation"] not in [one["args"]["correlation"] for one in calls]:
        return ""
    around = _operators_around(made, device)
    return around[0]["name"] if around else ""


def test_external_ids_are_no_correlations():
    """Operators number themselves in a space of their own; joining across the two misattaches."""
    made = HandMade()
    made.host("aten::add", 0, 10, **{"External id": 1})
    made.host("aten::mm", 20, 20, **{"External id": 2})
    number = made.launch(22)  # correlation 1, inside mm
    made.kernel(number, 30, 5, operator="aten::mm")
    made.events[-1]["args"]["External id"] = 2
    table = kernel_table(*_parts(attributed(made)))
    assert table["operator"].tolist() == ["aten::mm"]


def _parts(found: Attributed):
    return found.trace.events, found.owners, found.forest


def test_of_a_runtime_and_a_driver_call_with_one_number_the_outer_one_launches():
    made = HandMade()
    made.host("cuLaunchKernel", 12, 1, "cuda_driver", correlation=1)
    number = made.launch(10, 5)
    made.kernel(number, 30, 5)
    events = chrome.parse(made.text()).events
    launch = launches(events)
    assert [events.names[events.name[row]] for row in launch[launch >= 0]] == ["cudaLaunchKernel"]


def test_of_files_put_together_each_kernel_has_the_launch_before_it():
    """Correlations begin anew in every file: the same number stands for two launches."""
    made = HandMade()
    for begin, name in ((0, "aten::mm"), (1000, "aten::add")):
        made.host(name, begin, 50)
        made.correlation = 0
        made.kernel(made.launch(begin + 10), begin + 30, 5)
    table = kernel_table(*_parts(attributed(made)))
    assert sorted(table["operator"]) == ["aten::add", "aten::mm"]


def test_numbers_that_fit_nowhere_are_no_correlations():
    made = HandMade()
    made.host("cudaLaunchKernel", 10, 2, "cuda_runtime", correlation=1 << 70)
    made.kernel(1 << 70, 30, 5)
    made.events[0]["pid"] = 4000.5
    assert chrome.parse(made.text()).events.correlation.tolist() == [-1, -1]


def test_correlation_zero_ties_nothing():
    made = HandMade()
    made.host("cudaLaunchKernel", 10, 2, "cuda_runtime", correlation=0)
    made.kernel(0, 30, 5)
    assert (launches(chrome.parse(made.text()).events) == -1).all()


def test_devices_of_other_makers_stay_devices_of_their_own(tmp_path: Path):
    made = HandMade()
    made.host("mtiaLaunch", 0, 2, "mtia_runtime", correlation=5)
    made.kernel(5, 4, 3, name="ccp", device=0, category="mtia_ccp_events")
    made.kernel(made.launch(10), 14, 3, device=0)
    events = chrome.parse(made.text()).events
    assert events.devices == ["mtia 0", "0"]
    assert (events.kind == Kind.KERNEL).sum() == 2
    assert (launches(events) >= 0).sum() == 2
