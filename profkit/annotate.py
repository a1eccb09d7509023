"""The profiler's trace written again, with profkit's own tracks, counters and flows in it and its ranges left out."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from profkit.nesting import side_by_side

OWN_PROCESS = 2_000_000_000
"""Process number of profkit's tracks, out of reach of real processes and of device numbers."""
FIRST_LANE = 1_900_000_000
"""Thread number of the first row for slices that would cross others on their own."""
FLOW = "scope to kernel"
CHECKS = b',"profkit_checks":'
TIMESTAMP = re.compile(rb'("ts": ?)([0-9]+)')
HAIR_NS = 0.4
"""By how much profkit's slices are written too short, at most, those around others by less: some viewers add
ts and dur as floating point numbers, and take slices apart that end an instant after the next began. Less than
half a ns is nothing to those that read ns."""
BASE_FIELD = "baseTimeNanoseconds"
"""Header field that says which moment a file's times count from."""

Place = tuple[Any, Any]
"""Process and thread of a row, as the file has them."""


class _Event(msgspec.Struct, gc=False):
    name: str = ""
    ph: str = ""
    pid: int | float | str | None = None
    tid: int | float | str | None = None
    ts: float = 0.0
    dur: float = 0.0


class _File(msgspec.Struct, gc=False):
    traceEvents: list[msgspec.Raw]  # noqa: N815 - the format's spelling


@dataclass(frozen=True)
class Slice:
    """A slice on one of profkit's tracks; times in ns on the profiler's clock."""

    name: str
    start_ns: int
    duration_ns: int
    args: dict[str, Any]


@dataclass(frozen=True)
class Track:
    """A named row of slices, which nest or follow each other."""

    name: str
    slices: Sequence[Slice]


@dataclass(frozen=True)
class Counter:
    """A number over time: its name, which ends in its unit, and (time in ns, value) pairs."""

    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Flow:
    """An arrow from a slice of a track, open at `from_ns`, to what begins on a device's stream at `to_ns`."""

    track: str
    from_ns: int
    to: Place
    to_ns: int


@dataclass(frozen=True)
class Own:
    """What profkit adds to a trace."""

    tracks: Sequence[Track]
    counters: Sequence[Counter] = ()
    flows: Sequence[Flow] = ()
    metadata: dict[str, Any] = field(default_factory=dict)


def annotated(content: bytes, left_out: str, own: Own, until_ns: int | None = None) -> bytes:
    """Return the text of a trace file: profkit's tracks, then the events of `content`.

    Events whose names begin with `left_out` are dropped, and so are pseudo-processes: viewers reject process numbers
    that are text, and one slice as long as the session dwarfs the program's. Slices that cross others on their row,
    which Perfetto would drop, get a row beside it; all others stay as they are, but for the clock's zero, which moves
    to the first of them. `until_ns` leaves out what begins then or later. Raises msgspec.DecodeError if `content` is
    no trace; the profiler has just written it.
    """
    raw = msgspec.json.decode(content, type=_File).traceEvents
    header = {
        key: msgspec.json.decode(value)
        for key, value in msgspec.json.decode(content, type=dict[str, msgspec.Raw]).items()
        if key not in ("traceEvents", "traceName")
    }
    base_ns = int(header.get(BASE_FIELD, 0))
    last_us = float("inf") if until_ns is None else (until_ns - base_ns) / 1000
    known = msgspec.json.Decoder(list[_Event]).decode(_join(raw))
    kept = [
        (text, event)
        for text, event in zip(raw, known, strict=True)
        if not (isinstance(event.pid, str) or event.name.startswith(left_out) or event.ts >= last_us)
    ]
    moved = _moved([event for _, event in kept])
    foreign = [_on_lane(text, event, moved) if moved else text for text, event in kept]
    shift_us = int(min((event.ts for _, event in kept if event.ph == "X"), default=0))
    shift_us = min([shift_us, *((one.start_ns - base_ns) // 1000 for track in own.tracks for one in track.slices)])
    mine = (msgspec.json.encode(event) for event in _own_events(own, base_ns + 1000 * shift_us))
    lanes = (msgspec.json.encode(event) for event in _lane_names(moved, kept))
    head = msgspec.json.encode({**header, BASE_FIELD: base_ns + 1000 * shift_us, "profkit": own.metadata})
    events = [_join([*mine, *lanes])[:-1], _earlier(_join(foreign), shift_us)[1:]]
    return head[:-1] + b',"traceEvents":' + (b",\n" if foreign else b"").join(events) + b"}"


def _earlier(text: bytes, shift_us: int) -> bytes:
    """Return the text of events with a later zero of their clock: the whole us of each `ts` less so many.

    Viewers read times as floating point numbers, which months after the zero, as torch has it, tell no ns any more.
    """
    if shift_us <= 0:
        return text

    def less(found: re.Match[bytes]) -> bytes:
        whole_us = int(found[2]) - shift_us
        # What is before the new zero has no time of its own: names of rows.
        return found[0] if whole_us < 0 else found[1] + str(whole_us).encode()

    return TIMESTAMP.sub(less, text)


def _join(raw: Iterable[bytes | msgspec.Raw]) -> bytes:
    return b"[" + b",\n".join(bytes(one) for one in raw) + b"]"


def _moved(events: Sequence[_Event]) -> dict[tuple[Any, Any, float], int]:
    """Return the new thread number of each slice that crosses another, by its place and start."""
    slices = [event for event in events if event.ph == "X" and not isinstance(event.tid, str)]
    numbers: dict[Place, int] = {}
    track = np.array([numbers.setdefault((one.pid, one.tid), len(numbers)) for one in slices], dtype=np.int64)
    start = np.rint(np.array([one.ts for one in slices]) * 1000).astype(np.int64)
    end = start + np.rint(np.array([max(one.dur, 0.0) for one in slices]) * 1000).astype(np.int64)
    lane = side_by_side(track, start, end) if len(slices) else track
    rows = np.flatnonzero(lane)
    threads: dict[tuple[int, int], int] = {}
    return {
        (slices[row].pid, slices[row].tid, slices[row].ts): threads.setdefault(
            (int(track[row]), int(lane[row])), FIRST_LANE + len(threads)
        )
        for row in rows.tolist()
    }


def _on_lane(text: msgspec.Raw, event: _Event, moved: Mapping[tuple[Any, Any, float], int]) -> bytes | msgspec.Raw:
    """Return an event, on its new row if it was moved; the arrows that end there go with it."""
    thread = moved.get((event.pid, event.tid, event.ts))
    if thread is None or event.ph not in ("X", "s", "t", "f"):
        return text
    return msgspec.json.encode({**msgspec.json.decode(text), "tid": thread})


def _lane_names(
    moved: Mapping[tuple[Any, Any, float], int], kept: Sequence[tuple[msgspec.Raw, _Event]]
) -> Iterator[dict[str, Any]]:
    """Yield names for the rows of moved slices: that of the row they come from, and that they overlap."""
    origins = {thread: (process, row) for (process, row, _), thread in moved.items()}
    labels = {(event.pid, event.tid): text for text, event in kept if event.ph == "M" and event.name == "thread_name"}
    for thread, place in origins.items():
        text = labels.get(place)
        name = msgspec.json.decode(text)["args"]["name"] if text is not None else str(place[1])
        yield {
            "ph": "M",
            "name": "thread_name",
            "pid": place[0],
            "tid": thread,
            "ts": 0,
            "args": {"name": f"{name} (overlapping)"},
        }


def _own_events(own: Own, base_ns: int) -> Iterator[dict[str, Any]]:
    yield _label("process_name", 0, name="profkit")
    yield _label("process_sort_index", 0, sort_index=-1)
    numbers = {track.name: number for number, track in enumerate(own.tracks, start=1)}
    for track in own.tracks:
        number = numbers[track.name]
        yield _label("thread_name", number, name=track.name)
        yield _label("thread_sort_index", number, sort_index=number)
        depths = _depths(track.slices)
        deepest = max(depths, default=0)
        for one, depth in zip(track.slices, depths, strict=True):
            yield {
                "ph": "X",
                "cat": "profkit",
                "name": one.name,
                "pid": OWN_PROCESS,
                "tid": number,
                "ts": (one.start_ns - base_ns) / 1000,
                "dur": max(one.duration_ns - HAIR_NS * (1 + depth) / (1 + deepest), 0) / 1000,
                "args": one.args,
            }
    for counter in own.counters:
        for when_ns, value in counter.points:
            at = {"pid": OWN_PROCESS, "tid": 0, "ts": (when_ns - base_ns) / 1000}
            yield {"ph": "C", "cat": "profkit", "name": counter.name, **at, "args": {"value": value}}
    for number, flow in enumerate(own.flows, start=1):
        same = {"cat": "profkit", "name": FLOW, "id": number}
        begin = {"pid": OWN_PROCESS, "tid": numbers[flow.track], "ts": (flow.from_ns - base_ns) / 1000}
        end = {"pid": flow.to[0], "tid": flow.to[1], "ts": (flow.to_ns - base_ns) / 1000}
        yield {"ph": "s", **same, **begin}
        yield {"ph": "f", "bp": "e", **same, **end}


def _depths(slices: Sequence[Slice]) -> list[int]:
    """Return how many slices of a track lie around each."""
    order = sorted(range(len(slices)), key=lambda row: (slices[row].start_ns, -slices[row].duration_ns))
    depths, ends = [0] * len(slices), [0]
    for row in order:
        while len(ends) > 1 and ends[-1] <= slices[row].start_ns:
            ends.pop()
        depths[row] = len(ends) - 1
        ends.append(slices[row].start_ns + slices[row].duration_ns)
    return depths


def _label(what: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": OWN_PROCESS, "tid": thread, "ts": 0, "args": args}


def with_checks(content: bytes, checks: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the text of a trace that annotated() made, with what the run's checks found at its end.

    They stand under `profkit_checks`, in place of those that stood there before.
    """
    events, _, _ = content.rpartition(CHECKS)
    return (events or content[:-1]) + CHECKS + msgspec.json.encode(checks) + b"}"


def compressed(content: bytes) -> bytes:
    """Return a text as a gzip file; the same text gives the same file."""
    return gzip.compress(content, compresslevel=6, mtime=0)


def write(path: Path, content: bytes) -> None:
    """Write the text of a trace, compressed if the name ends in .gz."""
    path.write_bytes(compressed(content) if path.suffix == ".gz" else content)
