"""Streams of an event camera: read safely, checked, cut into slices and drawn as frames."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from profkit.errors import InputError

FIELDS, SENSOR = ("x", "y", "t", "p"), ("height", "width")
PIXEL = np.dtype("V3")
BLUE_OR_RED = np.array([[0, 0, 255], [255, 0, 0]], dtype=np.uint8).view(PIXEL).ravel()
LARGEST_SENSOR = 4096
"""Pixels a side that no event camera reaches: an event beyond is a damaged one, and would take a canvas of its size."""
EVENTGPT_FRAMES = 5
EVENTGPT_LIMIT_US = 100_000
"""EventGPT refuses streams of this length and longer."""


@dataclass(frozen=True)
class EventStream:
    """Events as columns of one length, in order of time: pixel x and y, t in µs, polarity p (not 0: brighter)."""

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray

    def __len__(self) -> int:
        return len(self.t)

    @property
    def length_us(self) -> int:
        """Time from the first event to the last, in µs."""
        return int(self.t[-1] - self.t[0]) if len(self) else 0

    def between(self, begin_us: int, end_us: int) -> EventStream:
        """Return the events from `begin_us` to before `end_us`, counted from the first event."""
        first, last = np.searchsorted(self.t, [self.t[0] + begin_us, self.t[0] + end_us])
        return EventStream(self.x[first:last], self.y[first:last], self.t[first:last], self.p[first:last])


def read_stream(path: Path, sensor: tuple[int, int] | None = None) -> EventStream:
    """Return the events of a file: .npz with arrays x, y, t, p, or the .npy that EventGPT's data come in.

    The latter holds a pickled dict; nothing but numpy arrays is unpickled. `sensor` is (height, width), if known; a
    file may tell it by scalars of these names; without, events must lie within LARGEST_SENSOR.
    Raises InputError for a file that is missing or damaged, for no events, events out of order or off the sensor.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read the events {path}: {error.strerror or error}.") from error
    try:
        found = _from_npy(content) if content[:6] == b"\x93NUMPY" else _from_npz(content)
    except (ValueError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} is no event stream (.npz or .npy with x, y, t, p): {error}.") from error
    except (MemoryError, OverflowError) as error:
        raise InputError(f"{path} is damaged: its header asks for more memory than there is.") from error
    if sensor is None and "height" in found:
        sensor = int(found["height"]), int(found["width"])
    return _checked(path, found, sensor)


def _from_npz(content: bytes) -> Mapping[str, Any]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return _known(arrays)


def _from_npy(content: bytes) -> Mapping[str, Any]:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"it holds an array of shape {shape}, not a dict")
    found = _ArraysOnly(stream).load()
    value = found.item() if isinstance(found, np.ndarray) and found.shape == () else found
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not a dict")
    return _known(value)


def _known(found: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the columns of a file, and the sensor's size if it tells both scalars."""
    names = (*FIELDS, *(SENSOR if all(name in found and np.size(found[name]) == 1 for name in SENSOR) else ()))
    return {name: np.asarray(found[name]) for name in names}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numpy arrays in plain containers, and refuses to import anything else."""

    ALLOWED = frozenset(
        (f"{package}.{module}", name)
        for package in ("numpy", "numpy._core", "numpy.core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    ) | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the few callables that arrays are made of."""
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, and only numpy arrays are unpickled")
        return super().find_class(module, name)


def _checked(path: Path, found: Mapping[str, Any], sensor: tuple[int, int] | None) -> EventStream:
    columns = {name: np.asarray(found[name]) for name in FIELDS}
    sizes = {name: column.shape for name, column in columns.items()}
    if len(set(sizes.values())) != 1 or columns["t"].ndim != 1:
        raise InputError(f"The events {path} have columns of different sizes: {sizes}.")
    if any(not (np.issubdtype(column.dtype, np.integer) or column.dtype == bool) for column in columns.values()):
        kinds = ", ".join(f"{name} {column.dtype}" for name, column in columns.items())
        raise InputError(f"The events {path} must be whole numbers (t in µs), got {kinds}.")
    x, y, t = (columns[name].astype(np.int64) for name in ("x", "y", "t"))
    if not len(t):
        raise InputError(f"The event stream {path} is empty.")
    back = np.flatnonzero(np.diff(t) < 0)
    if len(back):
        raise InputError(f"The events {path} are out of order: event {back[0] + 1} is earlier than the one before it.")
    height, width = sensor or (LARGEST_SENSOR, LARGEST_SENSOR)
    outside = np.flatnonzero((x < 0) | (y < 0) | (x >= width) | (y >= height))
    if len(outside):
        one = int(outside[0])
        of = f"off the sensor of {width} by {height}" if sensor else f"off any sensor (over {LARGEST_SENSOR} pixels)"
        raise InputError(f"Event {one} of {path} is at x {x[one]}, y {y[one]}, {of}.")
    return EventStream(x, y, t, columns["p"] != 0)


def cut(source: Path, target: Path, begin_us: int, end_us: int) -> EventStream:
    """Write the events of a file from `begin_us` to before `end_us`, counted from its first, as .npz; return them."""
    found = read_stream(source).between(begin_us, end_us)
    if not len(found):
        raise InputError(f"There are no events between {begin_us} and {end_us} us in {source}.")
    np.savez_compressed(target, x=found.x, y=found.y, t=found.t, p=found.p)
    return found


def slices(stream: EventStream, count: int = EVENTGPT_FRAMES) -> list[EventStream]:
    """Cut a stream into slices of equal count, the last with the remainder. Raises InputError for too few events."""
    size = len(stream) // count
    if not size:
        raise InputError(f"{len(stream)} events are too few for {count} frames.")
    edges = [*range(0, size * count, size), len(stream)]
    return [EventStream(stream.x[a:b], stream.y[a:b], stream.t[a:b], stream.p[a:b]) for a, b in pairwise(edges)]


def frame(stream: EventStream) -> np.ndarray:
    """Draw events on white, red where they brighten and blue where they darken; uint8 [height, width, 3].

    Later events cover earlier ones. As in EventGPT, the canvas ends with the last row and column that has an event.
    """
    height, width = int(stream.y.max()) + 1, int(stream.x.max()) + 1
    # A pixel is one item of three bytes: an event is one write. Of several to one place, numpy leaves the last.
    canvas = np.full(height * width * 3, 255, dtype=np.uint8)
    canvas.view(PIXEL)[stream.y * width + stream.x] = BLUE_OR_RED[stream.p.view(np.uint8)]
    return canvas.reshape(height, width, 3)


def frames(stream: EventStream, count: int = EVENTGPT_FRAMES) -> list[np.ndarray]:
    """Draw the slices of a stream, one frame each."""
    return [frame(one) for one in slices(stream, count)]


def from_frames(grey: np.ndarray, interval_us: int, threshold: float = 0.2, seed: int = 0) -> EventStream:
    """Return the events that an ideal event camera would give of a film.

    `grey` is [frames, height, width] in 0 to 255, a frame every `interval_us`. A pixel's log intensity goes in a
    straight line from
    frame to frame; each time it has moved by `threshold` from where its last event was, there is an event, brighter or
    darker (the model of event cameras in Lichtsteiner et al. 2008, without noise). Events of one µs come in random
    order.
    """
    level = np.log(grey.astype(np.float64) / 255 + 0.05)
    reference = level[0].copy()
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for number, (before, after) in enumerate(pairwise(level)):
        moved = after - reference
        crossings = np.floor(np.abs(moved) / threshold).astype(np.int64)
        place = np.flatnonzero(crossings)
        times = crossings.ravel()[place]
        sign = np.sign(moved.ravel()[place])
        each = np.repeat(place, times)
        order = np.arange(len(each)) - np.repeat(np.cumsum(times) - times, times) + 1
        crossed = np.repeat(reference.ravel()[place], times) + np.repeat(sign, times) * threshold * order
        rise = after.ravel()[each] - before.ravel()[each]
        share = np.clip((crossed - before.ravel()[each]) / np.where(rise == 0, 1, rise), 0, 1)
        found.append((each, np.repeat(sign, times) > 0, np.rint((number + share) * interval_us).astype(np.int64)))
        reference.ravel()[place] += sign * times * threshold
    place, brighter, t = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.lexsort((np.random.default_rng(seed).random(len(t)), t))
    y, x = np.divmod(place[order], grey.shape[2])
    return EventStream(x, y, t[order], brighter[order])
