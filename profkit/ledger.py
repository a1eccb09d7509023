"""The ledger: an append-only list of marks, written by probes while generate() runs.

A mark says that a scope was entered or left, when, and on which thread. Marks are flat integers in
preallocated arrays, because they are written in the program's hot path.
"""

from __future__ import annotations

import itertools
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np

from profkit.errors import LedgerError

NO_TIME = np.iinfo(np.int64).min
"""Stands for "no device time was read" in integer columns."""


@dataclass(frozen=True)
class Scope:
    """A place in the program: a module, a method, or a stage of the sample. One per place, not per call.

    `stage` is where the scope's own time goes; None leaves that to `kind` or to the enclosing scope.
    `kind` is one of sample, input, generate, prepare, features, forward, decoder, stack, layer, module.
    """

    path: str
    kind: str
    stage: str | None = None


OUTSIDE = Scope("", "outside")


class Scopes:
    """Numbers scopes from 1 up, in the order they are first seen; passes of one run share it."""

    def __init__(self, scopes: Iterable[Scope] = ()) -> None:
        self.list: list[Scope] = [OUTSIDE]
        self._numbers: dict[Scope, int] = {}
        for scope in scopes:
            self.number(scope)

    def number(self, scope: Scope) -> int:
        """Return the number of `scope`, giving it one on first sight."""
        found = self._numbers.get(scope)
        if found is None:
            found = self._numbers[scope] = len(self.list)
            self.list.append(scope)
        return found


@dataclass(frozen=True)
class Marks:
    """A finished ledger as columns of equal length, in the order they were written, thread by thread.

    `code` is +n on entering and -n on leaving scope number n; `thread` counts threads from 0;
    `host_ns` is perf_counter_ns; `device_ns` is NO_TIME where no device event was recorded;
    `note` is the number of tokens a decoder pass or a generate() was given, the number of a tower's call, -1 elsewhere.
    """

    code: np.ndarray
    thread: np.ndarray
    host_ns: np.ndarray
    device_ns: np.ndarray
    note: np.ndarray

    def __len__(self) -> int:
        return len(self.code)


class Ledger:
    """Records marks. `marker()` gives the function that probes call; `marks()` the result."""

    def __init__(
        self, scopes: Scopes | None = None, capacity: int = 1 << 15, now: Callable[[], int] = perf_counter_ns
    ) -> None:
        self.scopes = scopes or Scopes()
        self.faults: list[str] = []
        self._now = now
        # Slots are handed out by an atomic counter, so that threads never write to the same one.
        # A slot nobody wrote keeps code 0, which is no scope.
        self._next = itertools.count().__next__
        self._code = array("i", bytes(4 * capacity))
        self._thread = array("Q", bytes(8 * capacity))
        self._host = array("q", bytes(8 * capacity))
        self._event = array("i", [-1]) * capacity
        self._columns = (self._event, self._host, self._thread, self._code)
        self._notes: dict[int, int] = {}
        self._growing = threading.Lock()

    def fault(self, error: BaseException, where: str) -> None:
        """Keep an error of the instrument itself; the program it measures goes on."""
        if len(self.faults) < 100:
            self.faults.append(f"{where}: {type(error).__name__}: {error}")

    def note(self, index: int, number: int) -> None:
        """Remember a number of the scope that mark `index` entered: see Marks.note."""
        self._notes[index] = number

    def marker(self, record_event: Callable[[], int] | None = None) -> Callable[[int], int]:
        """Return a function that appends a mark for a code and gives its index (-1 if it could not).

        `record_event` records a device event on the current stream and returns its slot.
        """
        codes, threads, hosts, events = self._code, self._thread, self._host, self._event
        next_index, now, thread_id = self._next, self._now, threading.get_ident

        def mark(code: int) -> int:
            try:
                index = next_index()
                if record_event is not None:
                    event = record_event()
                    self._room_for(index)
                    events[index] = event
                hosts[index] = now()
                threads[index] = thread_id()
                codes[index] = code
                return index
            except IndexError:
                return overflow(index, code)
            except Exception as error:
                self.fault(error, "mark")
                return -1

        def overflow(index: int, code: int) -> int:
            when = now()
            try:
                self._room_for(index)
                hosts[index], threads[index], codes[index] = when, thread_id(), code
                return index
            except Exception as error:
                self.fault(error, "ledger growth")
                return -1

        return mark

    @contextmanager
    def scope(self, scope: Scope) -> Iterator[None]:
        """Mark the body of a with statement as a call of `scope`. Not for hot paths."""
        mark, code = self.marker(), self.scopes.number(scope)
        mark(code)
        try:
            yield
        finally:
            mark(-code)

    def _room_for(self, index: int) -> None:
        """Double the columns until `index` fits; `_code` grows last, since its length is the capacity."""
        if index < len(self._code):
            return
        with self._growing:
            while index >= len(self._code):
                capacity = len(self._code)
                for column in self._columns:
                    filler = -1 if column is self._event else 0
                    column.extend(array(column.typecode, [filler]) * capacity)

    def marks(self, event_times_ns: Callable[[], np.ndarray] | None = None) -> Marks:
        """Return what was recorded so far. `event_times_ns` resolves device events to nanoseconds."""
        code = np.array(self._code, dtype=np.int32)
        written = np.flatnonzero(code)
        thread_ids = np.array(self._thread, dtype=np.uint64)[written]
        host = np.array(self._host, dtype=np.int64)[written]
        event = np.array(self._event, dtype=np.int32)[written]
        note = np.full(len(code), -1, dtype=np.int32)
        note[list(self._notes.keys())] = list(self._notes.values())
        device = np.full(len(written), NO_TIME, dtype=np.int64)
        if event_times_ns is not None and (event >= 0).any():
            device[event >= 0] = event_times_ns()[event[event >= 0]]
        threads, thread = np.unique(thread_ids, return_inverse=True)
        order = np.argsort(thread, kind="stable") if len(threads) > 1 else slice(None)
        return Marks(
            code[written][order], thread.astype(np.int32)[order], host[order], device[order], note[written][order]
        )


@dataclass(frozen=True)
class Repair:
    """What had to be mended in a ledger: scopes left open (Ctrl-C, errors) and exits without entry."""

    unclosed: int = 0
    unopened: int = 0

    def __bool__(self) -> bool:
        return bool(self.unclosed or self.unopened)


def repaired(marks: Marks) -> tuple[Marks, Repair]:
    """Return marks in which every entry has its exit, thread by thread, and what was mended.

    A scope left open is closed where the scope around it is left, or at the thread's last mark; an
    exit whose scope is not open is dropped.
    """
    if _well_formed(marks):
        return marks, Repair()
    source: list[int] = []
    codes: list[int] = []
    unclosed = unopened = 0
    stack: list[int] = []
    threads = marks.thread.tolist()
    all_codes = marks.code.tolist()
    for index, code in enumerate(all_codes):
        if code > 0:
            stack.append(code)
            source.append(index)
            codes.append(code)
        elif -code not in stack:
            unopened += 1
        else:
            while True:
                top = stack.pop()
                source.append(index)
                codes.append(-top)
                if top == -code:
                    break
                unclosed += 1
        if index + 1 == len(all_codes) or threads[index + 1] != threads[index]:
            unclosed += len(stack)
            while stack:
                source.append(index)
                codes.append(-stack.pop())
    picked = np.asarray(source, dtype=np.int64)
    new_code = np.asarray(codes, dtype=np.int32)
    note = np.where(new_code > 0, marks.note[picked], -1).astype(np.int32)
    mended = Marks(new_code, marks.thread[picked], marks.host_ns[picked], marks.device_ns[picked], note)
    if not _well_formed(mended):
        raise LedgerError("The ledger could not be mended; please report this run.")
    return mended, Repair(unclosed, unopened)


def pairs(code: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (entry positions, exit positions, depths) of well-formed codes, in order of entry."""
    depth_after = np.cumsum(np.sign(code))
    depth = np.where(code > 0, depth_after - 1, depth_after)
    # At one depth entries and exits alternate, so sorting by depth puts each exit behind its entry.
    order = np.argsort(depth, kind="stable")
    begin, end = order[0::2], order[1::2]
    by_entry = np.argsort(begin, kind="stable")
    return begin[by_entry], end[by_entry], depth[begin[by_entry]]


def _well_formed(marks: Marks) -> bool:
    code = marks.code
    if len(code) == 0:
        return True
    depth = np.cumsum(np.sign(code))
    last_of_thread = np.append(np.flatnonzero(np.diff(marks.thread)), len(code) - 1)
    if (depth < 0).any() or depth[last_of_thread].any():
        return False
    begin, end, _ = pairs(code)
    return bool((code[begin] == -code[end]).all())
