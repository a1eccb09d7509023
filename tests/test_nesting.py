"""How events nest, against plain definitions."""

from __future__ import annotations

import numpy as np
from builders import events_of
from hypothesis import given
from hypothesis import strategies as st

from profkit.nesting import innermost, lanes, nest

Row = tuple[str, int, int, int]


@st.composite
def nested_events(draw: st.DrawFn) -> list[Row]:
    """Properly nested events on a few threads; no two begin and end together."""
    rows: list[Row] = []

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


def around(rows: list[Row], row: int) -> list[int]:
    """The plain definition: the events that contain another one of their thread, the innermost first."""
    _, start, duration, thread = rows[row]
    found = [
        other
        for other, (_, begin, length, lane) in enumerate(rows)
        if other != row and lane == thread and begin <= start and start + duration <= begin + length
    ]
    return sorted(found, key=lambda other: rows[other][2])


def in_rows(forest, positions) -> list[int]:
    """Positions as rows, in the order of rows."""
    result = np.full(len(forest), -2)
    result[forest.rows] = np.append(forest.rows, -1)[positions]
    return result.tolist()


@given(nested_events(), st.randoms())
def test_parents_self_times_and_ancestors_equal_the_plain_definitions_in_any_order(rows, random):
    random.shuffle(rows)
    forest = nest(events_of(rows))
    chains = [around(rows, row) for row in range(len(rows))]
    assert in_rows(forest, forest.parent) == [chain[0] if chain else -1 for chain in chains]
    inside = [
        sum(rows[other][2] for other in range(len(rows)) if chains[other][:1] == [row]) for row in range(len(rows))
    ]
    own = np.empty(len(rows), dtype=np.int64)
    own[forest.rows] = forest.self_ns()
    assert own.tolist() == [duration - inner for (_, _, duration, _), inner in zip(rows, inside, strict=True)]
    wanted = np.array([rows[row][0] == "a" for row in forest.rows.tolist()], dtype=bool)
    named_a = [[one for one in (row, *chain) if rows[one][0] == "a"] for row, chain in enumerate(chains)]
    assert in_rows(forest, forest.nearest(wanted)) == [found[0] if found else -1 for found in named_a]
    assert in_rows(forest, forest.outermost(wanted)) == [found[-1] if found else -1 for found in named_a]
    assert forest.overhanging() == 0


@given(nested_events(), st.lists(st.integers(-5, 1005), max_size=20))
def test_the_innermost_interval_around_a_time_equals_the_plain_definition(rows, times):
    rows = [row for row in rows if row[3] == 0]
    start = np.array([row[1] for row in rows], dtype=np.int64)
    end = start + np.array([row[2] for row in rows], dtype=np.int64)
    found = innermost(start, end, np.array(times, dtype=np.int64)).tolist()
    expected = [
        min((i for i in range(len(rows)) if start[i] <= time < end[i]), key=lambda i: end[i] - start[i], default=-1)
        for time in times
    ]
    assert found == expected


def test_a_negative_duration_takes_nothing():
    forest = nest(events_of([("around", 0, 100, 1), ("broken", 50, -30, 1)]))
    assert forest.self_ns().tolist() == [100, 0]


def test_a_child_rounded_past_its_parent_takes_only_what_lies_inside():
    # parent 0..10, child 4..11 (a clock rounded to µs): 10 - (10 - 4) = 4
    forest = nest(events_of([("parent", 0, 10, 0), ("child", 4, 7, 0)]))
    assert forest.self_ns().tolist() == [4, 7]
    assert forest.overhanging() == 1


def test_events_of_one_length_nest_in_the_order_they_were_recorded():
    forest = nest(events_of([("outer", 3, 5, 0), ("inner", 3, 5, 0)]))
    assert forest.parent.tolist() == [-1, 0]
    assert forest.self_ns().tolist() == [0, 5]


def test_times_too_far_apart_for_one_number_sort_all_the_same():
    rows = [("b", 2**61, 4, 0), ("a", 2**61, 9, 0), ("c", -(2**61), 5, 1), ("d", 3 - 2**61, 1, 1)]
    assert in_rows(nest(events_of(rows)), nest(events_of(rows)).parent) == [1, -1, -1, 2]


def test_threads_of_different_processes_are_different():
    events = events_of([("a", 0, 10, 1), ("b", 2, 3, 1)])
    two = events_of([("a", 0, 10, 1), ("b", 2, 3, 1)])
    two.process[1] = 1
    assert len(set(lanes(events))) == 1
    assert len(set(lanes(two))) == 2


def test_nothing_nests_in_nothing():
    forest = nest(events_of([]))
    assert len(forest) == len(forest.self_ns()) == len(forest.nearest(np.empty(0, dtype=bool))) == 0
    assert innermost(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.array([5])).tolist() == [-1]
