"""Busy and idle time, against the plain definition: a device is looked at nanosecond by nanosecond."""

from __future__ import annotations

import numpy as np
import pytest
from handmade import HandMade, programs
from hypothesis import given, settings
from hypothesis import strategies as st

from profkit import chrome
from profkit.attribution import BEGINNING_NS, launches
from profkit.device_tables import stage_table, step_table
from profkit.events import DEVICE
from profkit.foreign import owners_of
from profkit.nesting import nest
from profkit.occupancy import busy_ns, occupancy, overlapping, union_ns


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(-3, 20), st.integers(0, 2)), max_size=30))
def test_union_equals_the_ticks_that_are_covered(rows):
    start, duration, group = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    ticks = [{tick for s, d, g in rows if g == one for tick in range(s, s + d)} for one in range(3)]
    assert union_ns(start, duration, group, 3).tolist() == [len(one) for one in ticks]


@settings(max_examples=200, deadline=None)
@given(programs())
def test_busy_and_idle_time_partition_each_devices_span(made):
    events = chrome.parse(made.text()).events
    found = occupancy(events, launches(events), np.full(len(events), BEGINNING_NS))
    for device, label in enumerate(events.devices):
        mine = [one for one in made.kernels if str(one.device) == label]
        covered = {tick for one in mine for tick in range(one.start, one.start + one.duration)}
        of_device = found.device == device
        assert found.busy_ns[of_device].sum() == 1000 * len(covered)
        begins = min(one.start for one in mine)
        span = max(one.start + one.duration for one in mine) - begins
        assert (found.busy_ns + found.idle_ns)[of_device].sum() == 1000 * span
        assert (found.idle_ns[of_device] >= 0).all()
    assert busy_ns(events, np.ones(len(events), dtype=bool)) == found.busy_ns.sum()
    streams: dict[tuple[int, int], list] = {}
    for one in made.kernels:
        streams.setdefault((one.device, one.stream), []).append(one)
    expected = sum(
        any(other.start < one.start < other.start + other.duration for other in mine)
        for mine in streams.values()
        for one in mine
    )
    assert overlapping(events).sum() == expected


def test_a_kernel_of_no_length_overlaps_nothing():
    made = HandMade()
    made.kernel(made.launch(1), 5, 10)
    made.kernel(made.launch(0), 5, 0)
    assert overlapping(chrome.parse(made.text()).events).sum() == 0


def table_of(made: HandMade):
    trace = chrome.parse(made.text())
    forest = nest(trace.events, ~trace.events.is_kind(*DEVICE))
    owners, _ = owners_of(trace, forest)
    found = occupancy(trace.events, owners.launch, owners.begun_ns())
    return stage_table(trace.events, owners, found), step_table(trace.events, owners, found), found


def test_idle_time_has_its_causes():
    made = HandMade()
    made.host("execute_context_1(8)_generation_0(0)", 0, 200, "user_annotation")
    made.kernel(made.launch(0), 10, 10)  # 10..20
    made.kernel(made.launch(30), 40, 10)  # gap 20..40: 10 until its launch was called, 10 on its way
    made.kernel(made.launch(42), 60, 10)  # gap 50..60: launched at 42, on its way until 52 as usual (10), then waiting
    made.kernel(999, 80, 5)  # gap 70..80: no launch
    stages, steps, found = table_of(made)
    row = stages[stages["stage"] == "all"].iloc[0]
    assert row[["idle_host_ms", "idle_launch_ms", "idle_wait_ms", "idle_unknown_ms"]].tolist() == pytest.approx(
        [0.010, 0.012, 0.008, 0.010]
    )
    assert row[["busy_ms", "idle_ms", "sum_ms"]].tolist() == pytest.approx([0.035, 0.040, 0.035])
    assert found.delay_ns[found.leads].tolist() == [10_000, 10_000, 18_000]
    assert found.starved.tolist() == [False, True, False, False]
    prefill = stages[stages["stage"] == "prefill"].iloc[0]
    assert (prefill["kernels"], prefill["launches"]) == (3, 3)
    assert steps[["phase", "kernels", "launches"]].to_numpy().tolist() == [["prefill", 3, 3]]


def test_how_long_the_host_waited():
    made = HandMade()
    made.host("execute_context_1(8)_generation_0(0)", 0, 200, "user_annotation")
    made.kernel(made.launch(0), 10, 50)
    made.host("cudaStreamSynchronize", 20, 42, "cuda_runtime")  # 42
    made.kernel(made.launch(70, 20, "cudaMemcpyAsync"), 72, 13, "Memcpy DtoH", category="gpu_memcpy")  # 70..85: 15
    made.kernel(made.launch(95, 2, "cudaMemcpyAsync"), 100, 10, "Memcpy HtoD", category="gpu_memcpy")  # returns at once
    made.host("cudaDeviceSynchronize", 300, 7, "cuda_runtime")  # outside of the step
    stages, _, _ = table_of(made)
    waits = stages.set_index("stage")["host_wait_ms"]
    assert waits[["prefill", "all"]].tolist() == pytest.approx([0.057, 0.064])


def test_what_a_device_waited_before_a_step_is_not_the_steps():
    """A second in which the host reads a file, then a prefill in which the device never waits."""
    made = HandMade()
    made.kernel(made.launch(0), 10, 5)
    made.host("prefill", 1_000_200, 500, "user_annotation")
    begins = 1_000_300
    for number in range(20):
        made.kernel(made.launch(1_000_210 + 3 * number), begins, 1000)
        begins += 1000
    stages, steps, _ = table_of(made)
    prefill, whole = (stages[stages["stage"] == name].iloc[0] for name in ("prefill", "all"))
    assert prefill["verdict"] == "device-bound"
    assert prefill["idle_before_ms"] == pytest.approx((1_000_200 - 15) / 1e3)
    assert prefill["idle_host_ms"] == steps["idle_host_ms"][0] == pytest.approx(0.010)
    assert whole["idle_before_ms"] == 0 and whole["idle_host_ms"] == pytest.approx((1_000_210 - 15) / 1e3)
    assert whole["verdict"] != "device-bound"


def test_each_device_has_its_own_launches():
    made = HandMade()
    for number in range(10):
        made.kernel(made.launch(10 * number), 10 * number + 5, 4, device=0)
    for number in range(2):
        made.kernel(made.launch(10 * number + 3), 10 * number + 8, 4, device=1)
    stages, _, _ = table_of(made)
    assert stages.set_index("device")["launches"].to_dict() == {"0": 10, "1": 2}


def kernels_every(step: int, duration: int, ahead: int, count: int = 40) -> HandMade:
    """Launches every `step` µs; each kernel begins `ahead` µs later at the earliest."""
    made, free = HandMade(), 0
    for number in range(count):
        called = number * step
        begins = max(called + ahead, free)
        made.kernel(made.launch(called, 1), begins, duration)
        free = begins + duration
    return made


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (kernels_every(step=20, duration=3, ahead=5), "host-bound"),
        (kernels_every(step=3, duration=20, ahead=5), "device-bound"),
    ],
)
def test_the_verdict_names_who_sets_the_pace(made, verdict):
    stages, _, _ = table_of(made)
    row = stages[stages["stage"] == "all"].iloc[0]
    assert row["verdict"] == verdict
    assert "launches found it without work" in row["evidence"]


def test_a_device_that_waits_for_something_else_is_not_called_busy():
    made = HandMade()
    made.kernel(made.launch(0), 5, 2)
    made.kernel(made.launch(1, name="cudaMemcpyAsync"), 900, 2, category="gpu_memcpy")  # behind an event for 890 µs
    stages, _, _ = table_of(made)
    assert stages.iloc[-1]["verdict"] == "waiting"


def test_clocks_that_disagree_allow_no_verdict():
    made = HandMade()
    for number in range(20):
        made.kernel(made.launch(100 + 10 * number), 10 * number, 2)
    stages, _, _ = table_of(made)
    assert stages.iloc[-1]["verdict"] == "unknown" and "clocks" in stages.iloc[-1]["evidence"]


def test_one_kernel_is_no_pace():
    made = HandMade()
    made.kernel(made.launch(0), 5, 2)
    assert table_of(made)[0].iloc[-1]["verdict"] == "unknown"


def test_times_too_far_apart_for_one_axis():
    """A stray event of 1970 among those of today, on eight devices."""
    made = HandMade()
    now = 1_700_000_000_000_000
    for number in range(40):
        made.kernel(made.launch(now + 10 * number), now + 10 * number + 5, 4, device=number % 8)
    made.kernel(made.launch(1), 3, 4, device=0)
    _, _, found = table_of(made)
    assert found.busy_ns.sum() == 41 * 4000 and (found.idle_ns >= 0).all()


def test_without_launches_there_is_no_verdict():
    made = HandMade()
    for number in range(5):
        made.kernel(100 + number, number * 10, 2)
    stages, _, _ = table_of(made)
    assert stages.iloc[-1]["verdict"] == "unknown"
    assert "not recorded" in stages.iloc[-1]["evidence"]


def test_only_the_first_kernel_of_a_graph_has_a_launch_delay():
    made = HandMade()
    number = made.launch(0, name="cudaGraphLaunch")
    for start in (7, 20, 30):
        made.kernel(number, start, 5)
    _, _, found = table_of(made)
    assert found.leads.tolist() == [True, False, False]
    assert found.wait_ns.tolist() == [0, 8000, 5000]  # its place in the graph


def test_a_device_clock_ahead_of_the_host_gives_no_negative_idle_time():
    made = HandMade()
    made.kernel(made.launch(0), 5, 5)
    made.kernel(made.launch(40), 38, 5)  # begins 2 µs before it was launched
    _, _, found = table_of(made)
    assert found.host_ns.tolist() == [0, 28_000]
    assert found.delay_ns.tolist() == [5000, -2000]
