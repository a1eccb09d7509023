"""Which span owns an event, and operators' self times, against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest
from builders import DECODER, GENERATE, LAYER, Script, events_of
from hypothesis import given
from hypothesis import strategies as st

from profkit.attribution import aligned, is_range, owning_segment, self_time_ns
from profkit.errors import MeasurementError
from profkit.tables import operator_table


def slow_self_times(rows: list[tuple[str, int, int, int]]) -> list[int]:
    """The plain definition: an event's duration less that of the events directly inside it."""
    own = [duration for _, _, duration, _ in rows]
    for row, (_, start, duration, thread) in enumerate(rows):
        around = [
            other
            for other, (_, begin, length, lane) in enumerate(rows)
            if other != row
            and lane == thread
            and begin <= start
            and start + duration <= begin + length
            and (length > duration or begin < start)
        ]
        if around:
            own[min(around, key=lambda other: rows[other][2])] -= duration
    return own


@st.composite
def nested_events(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    """Properly nested events on a few threads; no two begin and end together."""
    rows: list[tuple[str, int, int, int]] = []

    def fill(start: int, stop: int, thread: int, depth: int) -> None:
        while stop - start >= 2 and len(rows) < 40 and draw(st.booleans()):
            begin = start + draw(st.integers(0, (stop - start) // 2))
            end = draw(st.integers(begin + 1, stop))
            rows.append((draw(st.sampled_from("abc")), begin, end - begin, thread))
            if depth < 5 and end - begin > 2:
                fill(begin + 1, end - 1, thread, depth + 1)
            start = end + 1

    for thread in range(draw(st.integers(1, 3))):
        fill(0, 1000, thread, 0)
    return rows


@given(nested_events(), st.randoms())
def test_self_times_equal_the_plain_definition_in_any_order(rows, random):
    random.shuffle(rows)
    assert self_time_ns(events_of(rows)).tolist() == slow_self_times(rows)


def test_a_child_rounded_past_its_parent_takes_only_what_lies_inside():
    # parent 0..10, child 4..11 (a clock rounded to µs): 10 - (10 - 4) = 4
    assert self_time_ns(events_of([("parent", 0, 10, 0), ("child", 4, 7, 0)])).tolist() == [4, 7]


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
    segment = owning_segment(moved, events.select(~is_range(events)))
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
    table = operator_table(aligned(script.spans(), events), events.select(~is_range(events)))
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
    assert len(self_time_ns(events_of([]))) == 0
    assert owning_segment(Script().spans(), events_of([("aten::mm", 5, 1, 0)])).tolist() == [-1]
    assert np.array_equal(owning_segment(script_on_two_clocks()[0].spans(), events_of([])), [])
