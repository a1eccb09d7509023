"""The Chrome trace format, read and written.

Reading gives the file's events twice: typed, as columns, and raw, so that they can be written
again untouched. Writing adds profkit's own tracks above those of the profiler.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from profkit.errors import InputError
from profkit.events import Events

OWN_PROCESS = 2_000_000_000
"""Process number of profkit's tracks, out of reach of real processes and of device numbers."""


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: int | str = -1
    tid: int | str = -1


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
class Trace:
    """A trace file in memory: header fields, every event as raw JSON, and the complete ones as columns.

    `row` gives for each of `events` its position in `raw`. `pseudo` tells which raw events are about the
    profiler's session, in pseudo-processes with text for a number (`Spans`, `Traces`).
    """

    header: dict[str, Any]
    raw: list[msgspec.Raw]
    pseudo: np.ndarray
    row: np.ndarray
    events: Events


def read(path: Path) -> Trace:
    """Read a trace file, plain or gzip. Raises InputError if it is not one."""
    try:
        content = path.read_bytes()
        return parse(gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content)
    except OSError as error:
        raise InputError(f"Cannot read the trace {path}: {error.strerror or error}.") from error
    except (msgspec.DecodeError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a whole Chrome trace: {error}.") from error


def parse(content: bytes) -> Trace:
    """Parse the text of a trace file. Raises msgspec.DecodeError if it is not a Chrome trace."""
    raw = msgspec.json.decode(content, type=_File).traceEvents
    header = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    header.pop("traceEvents")
    typed = msgspec.json.Decoder(list[_Event]).decode(_join(raw))
    complete = [(row, event) for row, event in enumerate(typed) if event.ph == "X"]
    rows = np.array([row for row, _ in complete], dtype=np.int64)
    return Trace(
        {key: msgspec.json.decode(value) for key, value in header.items()},
        raw,
        np.array([isinstance(event.pid, str) for event in typed], dtype=bool),
        rows,
        _columns([event for _, event in complete]),
    )


def _columns(found: list[_Event]) -> Events:
    names, name = _ids([event.name for event in found])
    categories, category = _ids([event.cat for event in found])
    start = np.array([event.ts for event in found], dtype=np.float64)
    duration = np.array([event.dur for event in found], dtype=np.float64)
    return Events(
        names,
        categories,
        name,
        category,
        _ns(start),
        _ns(duration),
        _ids([event.pid for event in found])[1],
        _ids([event.tid for event in found])[1],
    )


def _ns(microseconds: np.ndarray) -> np.ndarray:
    return np.rint(microseconds * 1000.0).astype(np.int64)


def _ids(values: list[Any]) -> tuple[list[Any], np.ndarray]:
    """Return the distinct values, in order of first sight, and each value's number."""
    numbers = dict.fromkeys(values)
    for number, value in enumerate(numbers):
        numbers[value] = number
    return list(numbers), np.fromiter(map(numbers.__getitem__, values), dtype=np.int64, count=len(values))


def _join(raw: Iterable[bytes | msgspec.Raw]) -> bytes:
    return b"[" + b",\n".join(bytes(one) for one in raw) + b"]"


def encode(trace: Trace, dropped: np.ndarray, tracks: Sequence[Track], metadata: dict[str, Any]) -> bytes:
    """Return the text of a trace file: profkit's tracks, then the events of `trace`.

    `dropped` is a mask over trace.events of events to leave out. Pseudo-processes are left out too: viewers
    reject process numbers that are text, and one slice as long as the session dwarfs the program's.
    """
    keep = ~trace.pseudo
    keep[trace.row[dropped]] = False
    foreign = (one for one, kept in zip(trace.raw, keep, strict=True) if kept)
    own = (msgspec.json.encode(event) for event in _own_events(tracks))
    header = {key: value for key, value in trace.header.items() if key != "traceName"}
    head = msgspec.json.encode({**header, "profkit": metadata})
    return head[:-1] + b',"traceEvents":' + _join([*own, *foreign]) + b"}"


def _own_events(tracks: Sequence[Track]) -> Iterator[dict[str, Any]]:
    yield _label("process_name", 0, name="profkit")
    yield _label("process_sort_index", 0, sort_index=-1)
    for number, track in enumerate(tracks, start=1):
        yield _label("thread_name", number, name=track.name)
        yield _label("thread_sort_index", number, sort_index=number)
        for one in track.slices:
            yield {
                "ph": "X",
                "cat": "profkit",
                "name": one.name,
                "pid": OWN_PROCESS,
                "tid": number,
                "ts": one.start_ns / 1000,
                "dur": one.duration_ns / 1000,
                "args": one.args,
            }


def _label(what: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": OWN_PROCESS, "tid": thread, "ts": 0, "args": args}


def write(path: Path, content: bytes) -> None:
    """Write the text of a trace, compressed if the name ends in .gz; the same text gives the same file."""
    if path.suffix == ".gz":
        content = gzip.compress(content, compresslevel=6, mtime=0)
    path.write_bytes(content)
