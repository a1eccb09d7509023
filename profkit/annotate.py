"""The profiler's trace written again, with profkit's own tracks in it and its ranges left out."""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

OWN_PROCESS = 2_000_000_000
"""Process number of profkit's tracks, out of reach of real processes and of device numbers."""
BASE_FIELD = "baseTimeNanoseconds"
"""Header field that says which moment a file's times count from."""


class _Event(msgspec.Struct, gc=False):
    name: str = ""
    pid: int | str | None = None


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


def annotated(content: bytes, left_out: str, tracks: Sequence[Track], metadata: dict[str, Any]) -> bytes:
    """Return the text of a trace file: profkit's tracks, then the events of `content`, untouched.

    Events whose names begin with `left_out` are dropped, and so are pseudo-processes: viewers reject process numbers
    that are text, and one slice as long as the session dwarfs the program's. Raises msgspec.DecodeError if `content`
    is no trace; the profiler has just written it.
    """
    raw = msgspec.json.decode(content, type=_File).traceEvents
    header = {
        key: msgspec.json.decode(value)
        for key, value in msgspec.json.decode(content, type=dict[str, msgspec.Raw]).items()
        if key not in ("traceEvents", "traceName")
    }
    known = msgspec.json.Decoder(list[_Event]).decode(_join(raw))
    foreign = (
        text
        for text, event in zip(raw, known, strict=True)
        if not (isinstance(event.pid, str) or event.name.startswith(left_out))
    )
    own = (msgspec.json.encode(event) for event in _own_events(tracks, int(header.get(BASE_FIELD, 0))))
    head = msgspec.json.encode({**header, "profkit": metadata})
    return head[:-1] + b',"traceEvents":' + _join([*own, *foreign]) + b"}"


def _join(raw: Iterable[bytes | msgspec.Raw]) -> bytes:
    return b"[" + b",\n".join(bytes(one) for one in raw) + b"]"


def _own_events(tracks: Sequence[Track], base_ns: int) -> Iterator[dict[str, Any]]:
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
                "ts": (one.start_ns - base_ns) / 1000,
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
