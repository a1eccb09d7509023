"""The ledger keeps every mark, and the partition is exact whatever the nesting."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from builders import DECODER, FORWARD, GENERATE, LAYER, TOWER, Script
from hypothesis import given
from hypothesis import strategies as st

from profkit.ledger import Ledger, Repair, Scope
from profkit.spans import Spans

NAMES = [Scope(name, "module") for name in "abcd"]


def slow_self_times(marks: list[tuple[int, int]]) -> dict[int, int]:
    """The plain definition: walk the marks with a stack; each gap belongs to the top."""
    own: dict[int, int] = {}
    stack: list[int] = []
    for (code, now), (_, after) in zip(marks, [*marks[1:], marks[-1]], strict=True):
        if code > 0:
            stack.append(code)
        else:
            stack.pop()
        if stack:
            own[stack[-1]] = own.get(stack[-1], 0) + after - now
    return own


@st.composite
def nestings(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Well-formed marks: random nesting, re-entrancy (a scope inside itself) and times, zero gaps included."""
    marks: list[tuple[int, int]] = []
    stack: list[int] = []
    now = 0
    for opens in draw(st.lists(st.booleans(), min_size=1, max_size=60)):
        now += draw(st.integers(0, 1000))
        if opens or not stack:
            stack.append(draw(st.integers(1, len(NAMES))))
            marks.append((stack[-1], now))
        else:
            marks.append((-stack.pop(), now))
    while stack:
        now += draw(st.integers(0, 1000))
        marks.append((-stack.pop(), now))
    return marks


def play(marks: list[tuple[int, int]]) -> Spans:
    script = Script()
    for scope in NAMES:
        script.ledger.scopes.number(scope)
    for code, now in marks:
        (script.enter if code > 0 else script.leave)(NAMES[abs(code) - 1], now)
    return script.spans()


@given(nestings())
def test_self_times_equal_the_plain_definition_and_sum_to_the_total(marks):
    spans = play(marks)
    assert not spans.repair
    by_scope = {
        number: int(spans.self_ns[spans.scope == number].sum())
        for number in range(1, len(NAMES) + 1)
        if (spans.scope == number).any()
    }
    expected = slow_self_times(marks)
    assert by_scope == {number: expected.get(number, 0) for number in by_scope}
    assert spans.self_ns.sum() == spans.total_ns[spans.depth == 0].sum()
    children = np.zeros(len(spans), dtype=np.int64)
    np.add.at(children, spans.parent[spans.parent >= 0], spans.total_ns[spans.parent >= 0])
    assert (spans.self_ns + children == spans.total_ns).all()


@given(nestings(), st.data())
def test_lost_exits_and_stray_exits_are_mended_and_the_sum_stays_exact(marks, data):
    """Ctrl-C skips exit hooks; an exit without entry comes from a hook added in the middle of a call."""
    lost = data.draw(st.sets(st.integers(0, len(marks) - 1), max_size=5))
    kept = [mark for number, mark in enumerate(marks) if number not in lost]
    if not kept:
        return
    spans = play(kept)
    assert spans.self_ns.sum() == spans.total_ns[spans.depth == 0].sum()
    assert (spans.self_ns >= 0).all()
    lost_marks = [marks[number] for number in lost]
    if len({abs(code) for code, _ in marks}) == len(marks) // 2:  # no scope twice: what is lost is what is mended
        assert spans.repair.unclosed == sum(code < 0 for code, _ in lost_marks if (-code) in [c for c, _ in kept])
        assert spans.repair.unopened == sum(code > 0 for code, _ in lost_marks if (-code) in [c for c, _ in kept])


def test_an_exception_leaves_scopes_that_close_with_the_one_around_them():
    script = Script()
    script.enter(GENERATE, 0)
    script.enter(FORWARD, 10)
    script.enter(DECODER, 20)
    script.enter(LAYER, 30)
    script.leave(GENERATE, 50)  # the exits of layer, decoder and forward never came
    spans = script.spans()
    assert spans.repair == Repair(unclosed=3, unopened=0)
    # 10 generate + 10 forward + 10 decoder + 20 layer = 50
    assert spans.self_ns.tolist() == [10, 10, 10, 20]


def test_growth_keeps_every_mark():
    script = Script()  # starts with room for 4
    for number in range(1000):
        script.call(TOWER, 2 * number, 2 * number + 1)
    spans = script.spans()
    assert len(spans) == 1000
    assert spans.total_ns.tolist() == [1] * 1000


def test_threads_are_partitioned_apart():
    ledger = Ledger(capacity=2)
    number = ledger.scopes.number(TOWER)
    mark = ledger.marker()
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        for _ in range(500):
            mark(number)
            mark(-number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spans = Spans(ledger.marks(), ledger.scopes.list)
    assert not ledger.faults
    assert not spans.repair
    assert len(spans) == 2000
    assert (spans.depth == 0).all()


def test_an_error_in_the_instrument_is_kept_and_not_raised():
    def broken_clock() -> int:
        raise RuntimeError("no clock")

    ledger = Ledger(now=broken_clock)
    assert ledger.marker()(1) == -1
    assert ledger.faults == ["mark: RuntimeError: no clock"]
    assert len(ledger.marks()) == 0


def test_an_error_while_growing_is_kept_and_not_raised(monkeypatch):
    ledger = Ledger(capacity=1)
    mark = ledger.marker()
    assert mark(1) == 0

    def no_memory(index: int) -> None:
        raise MemoryError("full")

    monkeypatch.setattr(ledger, "_room_for", no_memory)
    assert mark(-1) == -1
    assert "MemoryError" in ledger.faults[0]


@pytest.mark.parametrize("count", [0, 1])
def test_empty_and_single_mark_ledgers(count):
    script = Script()
    if count:
        script.enter(GENERATE, 5)
    spans = script.spans()
    spans.check()
    assert len(spans) == count
    assert len(spans.steps) == 0
    assert spans.self_ns.sum() == 0
