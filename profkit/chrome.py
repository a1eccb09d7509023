"""The Chrome trace format, read into columns."""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import compress, count
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from profkit.errors import InputError
from profkit.events import COLUMNS, DEVICE, NOTHING, Events, Kind, device_name, kind_of
from profkit.pieces import BLOCK_BYTES, CONTROL, Args, Damage, Event, EventTexts, ExactEvent

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_US = 1 << 52
"""No time is beyond: in nanoseconds it would come near the end of 64 bits."""
EVENTS_KEY = re.compile(rb'"traceEvents"\s*:\s*\[')


@dataclass(frozen=True)
class Trace:
    """A trace file: its complete events as columns, what stands around them, and what was lost.

    `header` holds the file's fields other than the events; `processes` and `threads` the values behind the numbers in
    events.process and events.thread; `own` the arguments of profkit's slices, in the order of these events;
    `others` counts what is no complete event, by (phase, category): flows are ("s", "ac2g") and ("f", "ac2g").
    """

    events: Events
    header: dict[str, Any]
    processes: list[Any]
    threads: list[Any]
    own: list[dict[str, Any]]
    others: Counter[tuple[str, str]]
    damage: Damage


def read(path: Path) -> Trace:
    """Read a trace file, plain or gzip. Raises InputError if nothing of it is a Chrome trace."""
    damage = Damage()
    try:
        return _read(_ahead(_blocks(path, damage)), damage, str(path))
    except OSError as error:
        raise InputError(f"Cannot read the trace {path}: {error.strerror or error}.") from error


def may_be_trace(path: Path) -> bool:
    """Tell whether a file is a trace, or was one before it was damaged: no whole JSON of another kind."""
    try:
        start = next(_blocks(path, Damage()), b"").lstrip()
    except OSError:
        return True
    if start[:1] != b"{" or EVENTS_KEY.search(start) is not None:
        return True
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        msgspec.json.decode(start)
        return False
    # Longer than a block, and no list of events in it: the configuration of something.
    return len(start) < BLOCK_BYTES // 2


def parse(content: bytes) -> Trace:
    """Read a trace from the text of its file. Raises InputError if nothing of it is a Chrome trace."""
    return _read((content[i : i + BLOCK_BYTES] for i in range(0, len(content), BLOCK_BYTES)), Damage(), "The text")


def _blocks(path: Path, damage: Damage) -> Iterator[bytes]:
    """Yield the file's text in blocks, decompressed if need be, up to where its compression is damaged."""
    with path.open("rb") as file:
        # What is no file on a disk, such as a pipe, can be looked into, but not gone back in.
        if file.peek(2)[:2] != b"\x1f\x8b":
            while block := file.read(BLOCK_BYTES):
                yield block
            return
        try:
            yield from _unzipped(iter(lambda: file.read(BLOCK_BYTES // 8), b""))
        except zlib.error as error:
            damage.reason = f"gzip: {error}"


def _unzipped(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the text of all members of a gzip file; what precedes damage comes before zlib.error is raised."""
    unzip = zlib.decompressobj(wbits=31)
    for packed in blocks:
        while packed:
            before = unzip.copy()
            try:
                text = unzip.decompress(packed)
            except zlib.error:
                # A failing call gives nothing back: go over the block again in small steps.
                for start in range(0, len(packed), 64):
                    yield before.decompress(packed[start : start + 64])
                raise
            yield text
            packed = unzip.unused_data
            if unzip.eof:
                # Zeros behind the last member are padding, as gzip itself takes them.
                packed = packed if packed.strip(b"\0") else b""
                unzip = zlib.decompressobj(wbits=31)


def _ahead(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the blocks, the next one being read in a thread meanwhile: decompression holds no lock."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, blocks, None)
        while (block := coming.result()) is not None:
            coming = pool.submit(next, blocks, None)
            yield block


def _read(blocks: Iterable[bytes], damage: Damage, name: str) -> Trace:
    blocks = iter(blocks)
    head, text = _head(blocks, name)
    columns, events = _Columns(), EventTexts(damage)
    columns.extend(events.decoded(text))
    for block in blocks:
        columns.extend(events.decoded(block))
    columns.extend(events.last())
    damage.lost += columns.beyond
    if columns.beyond:
        damage.reason = damage.reason or "times that do not fit into 64 bits of nanoseconds"
    if not (columns.number or columns.others) and damage:
        raise InputError(f"{name} holds no event that can be read: {damage.reason or 'its list breaks off'}.")
    trace = columns.trace({**_fields(head), **_fields(b'{"":0' + events.tail)}, damage)
    if len(trace.others) == 1 and ("", "") in trace.others:
        raise InputError(f"{name} is JSON, but the objects in it are not trace events.")
    return trace


def _head(blocks: Iterator[bytes], name: str) -> tuple[bytes, bytes]:
    """Return what stands before the list of events, and the beginning of the list's content."""
    text = b""
    for block in blocks:
        text = (text + block).removeprefix(BYTE_ORDER_MARK)
        start = text.lstrip()[:1]
        if start and start not in b"{[":
            break
        if start == b"[":
            return b"{", text.lstrip()[1:]
        for found in EVENTS_KEY.finditer(text):
            # A field of that name inside another object is not the list.
            if _is_object_so_far(text[: found.start()]):
                return text[: found.start()], text[found.end() :]
    if not text:
        raise InputError(f"{name} is empty, or its compression is damaged from the start.")
    if text[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise InputError(f"{name} is text in UTF-16, and JSON is in UTF-8: write it again so.")
    try:
        msgspec.json.decode(text.decode("utf-8", "replace"))
    except msgspec.DecodeError as error:
        if text.lstrip()[:1] != b"{":
            raise InputError(f"{name} is not JSON.") from error
        raise InputError(f"{name} is not a whole JSON file, and its events were not reached: {error}.") from error
    raise InputError(f"{name} is JSON, but no Chrome trace: it has no list traceEvents.")


def _is_object_so_far(text: bytes) -> bool:
    """Tell whether a text, but for a closing brace, is an object."""
    try:
        msgspec.json.decode((text.rstrip(b", \r\n\t").translate(CONTROL) + b"}").decode("utf-8", "replace"))
    except msgspec.DecodeError:
        return False
    return True


def _fields(text: bytes) -> dict[str, Any]:
    """Return the fields of an object whose text breaks off before its end; none if it is damaged."""
    whole = text.rstrip().rstrip(b"}").rstrip().rstrip(b",") if text.startswith(b'{"":0') else text.rstrip(b", \r\n\t")
    for candidate in (text, whole + b"}", text.rstrip().rstrip(b",") + b"}"):
        try:
            readable = candidate.translate(CONTROL).decode("utf-8", "replace")
            found = msgspec.json.decode(readable, type=dict[str, Any])
        except msgspec.DecodeError:
            continue
        found.pop("", None)
        return found
    return {}


def _ids() -> defaultdict[Any, int]:
    return defaultdict(count().__next__)


def _first(one: Any, other: Any) -> Any:
    return other if one is None else one


def _number(value: Any) -> int:
    """Return a correlation that was written as text or as a float, NOTHING for what is no number of 64 bits."""
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return NOTHING
    return number if abs(number) < 1 << 63 else NOTHING


@dataclass
class _Columns:
    """Collects columns chunk by chunk."""

    names: defaultdict[Any, int] = field(default_factory=_ids)
    categories: defaultdict[Any, int] = field(default_factory=_ids)
    phases: defaultdict[Any, int] = field(default_factory=_ids)
    other_categories: defaultdict[Any, int] = field(default_factory=_ids)
    devices: defaultdict[Any, int] = field(default_factory=_ids)
    device_numbers: defaultdict[Any, int] = field(default_factory=_ids)
    processes: defaultdict[Any, int] = field(default_factory=_ids)
    threads: defaultdict[Any, int] = field(default_factory=_ids)
    chunks: list[list[np.ndarray]] = field(default_factory=list)
    own: list[dict[str, Any]] = field(default_factory=list)
    others: Counter[tuple[str, str]] = field(default_factory=Counter)
    number: int = 0
    beyond: int = 0
    """Events left out, as their times are no times."""

    def extend(self, decoded: list[Event]) -> None:
        """Add decoded events."""
        phase = self._ids(self.phases, map(attrgetter("ph"), decoded), len(decoded))
        complete = phase == self.phases["X"]
        self._count(list(compress(decoded, (~complete).tolist())), phase[~complete])
        found = list(compress(decoded, complete.tolist()))
        if not found:
            return
        exact = isinstance(found[0], ExactEvent)
        start, duration = (_us(map(attrgetter(name), found), len(found), exact) for name in ("ts", "dur"))
        if not all(one.min() > -MOST_US and one.max() < MOST_US for one in (start, duration)):
            sane = (np.abs(start) < MOST_US) & (np.abs(duration) < MOST_US)
            self.beyond += int((~sane).sum())
            found, start, duration = list(compress(found, sane.tolist())), start[sane], duration[sane]
        size = len(found)
        self.number += size
        category = self._ids(self.categories, map(attrgetter("cat"), found), size)
        kind = np.array([kind_of(name) for name in self.categories], dtype=np.int8)[category]
        self.chunks.append(
            [
                self._ids(self.names, map(attrgetter("name"), found), size),
                category,
                _ns(start),
                _ns(duration),
                self._ids(self.processes, map(attrgetter("pid"), found), size),
                self._ids(self.threads, map(attrgetter("tid"), found), size),
                *self._links(found, category, kind),
            ]
        )
        mine = compress(found, (kind == Kind.PROFKIT).tolist())
        self.own += [msgspec.to_builtins(event.args) if event.args else {} for event in mine]

    def _count(self, found: list[Event], phase: np.ndarray) -> None:
        """Count what is no complete event, by phase and category."""
        category = self._ids(self.other_categories, map(attrgetter("cat"), found), len(found))
        phases, categories = list(self.phases), list(self.other_categories)
        times = np.bincount(phase * len(categories) + category)
        for pair in np.flatnonzero(times).tolist():
            self.others[phases[pair // len(categories)], categories[pair % len(categories)]] += int(times[pair])

    @staticmethod
    def _ids(ids: defaultdict[Any, int], values: Iterable[Any], size: int) -> np.ndarray:
        return np.fromiter(map(ids.__getitem__, values), np.int32, size)

    def _links(self, found: list[Event], category: np.ndarray, kind: np.ndarray) -> list[np.ndarray]:
        """Return the columns of the events that are launches or run on a device; NOTHING elsewhere."""
        links = [np.full(len(found), NOTHING, dtype=dtype) for dtype in (np.int64, np.int32, np.int32, np.int32)]
        correlation, device, stream, launched = links
        on_device = np.isin(kind, [*DEVICE, Kind.SYNC, Kind.DEVICE_RANGE])
        linked = np.flatnonzero(on_device | (kind == Kind.RUNTIME))
        no_args = Args()
        args = [found[row].args or no_args for row in linked.tolist()]
        kernels = list(map(attrgetter("kernel"), args))
        if any(kernels):
            tells = np.fromiter((isinstance(one, str) for one in kernels), bool, len(args))
            launched[linked[tells]] = [self.names[one] for one in compress(kernels, tells.tolist())]
        try:
            correlation[linked] = np.fromiter(map(attrgetter("correlation"), args), np.int64, len(args))
        except (TypeError, ValueError, OverflowError):
            correlation[linked] = np.fromiter(map(_number, map(attrgetter("correlation"), args)), np.int64, len(args))
        running = list(compress(found, on_device.tolist()))
        args = list(compress(args, on_device[linked].tolist()))
        numbers = map(_first, map(attrgetter("device"), args), map(attrgetter("pid"), running))
        number = self._ids(self.device_numbers, numbers, len(running))
        categories, known = list(self.categories), list(self.device_numbers)
        pairs, which = np.unique(category[on_device] * len(known) + number, return_inverse=True)
        named = (device_name(categories[pair // len(known)], known[pair % len(known)]) for pair in pairs.tolist())
        device[on_device] = np.array([self.devices[one] for one in named], dtype=np.int32)[which]
        streams = map(_first, map(attrgetter("stream"), args), map(attrgetter("tid"), running))
        stream[on_device] = self._ids(self.threads, streams, len(running))
        return links

    def trace(self, header: dict[str, Any], damage: Damage) -> Trace:
        """Return everything collected."""
        joined = [np.concatenate(parts) for parts in zip(*self.chunks, strict=True)]
        columns = joined or [np.empty(0, dtype=np.int64) for _ in COLUMNS]
        events = Events(list(self.names), list(self.categories), list(self.devices), *columns)
        return Trace(events, header, list(self.processes), list(self.threads), self.own, self.others, damage)


def _us(microseconds: Iterable[Any], size: int, exact: bool) -> np.ndarray:
    """Return times in µs: floats, or decimals as objects."""
    return np.fromiter(microseconds, object if exact else np.float64, size)


def _ns(microseconds: np.ndarray) -> np.ndarray:
    if microseconds.dtype == object:
        return np.fromiter((int(value * 1000) for value in microseconds), np.int64, len(microseconds))
    # Whole µs since 1970 are exact; a thousand times that is not.
    whole = np.floor(microseconds)
    return whole.astype(np.int64) * 1000 + np.rint((microseconds - whole) * 1000.0).astype(np.int64)
