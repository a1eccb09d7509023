"""Drawing an event stream: event by event in Python, and profkit, side by side in one run.

    python tests/benchmarks/rasterise.py [--events 130000] [--rounds 7]

Random events on 640 by 480 pixels, in five frames. Loops assign a colour an event: as an array made each time, as the
original does it, and as a tuple, which is faster.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from profkit import event_streams
from profkit.event_streams import EventStream
from profkit.stats import median


def random_stream(events: int) -> EventStream:
    """Return so many events over 50 ms."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 640, events), random.integers(0, 480, events)
    return EventStream(x, y, np.sort(random.integers(0, 50_000, events)), random.random(events) < 0.5)


def _canvas(stream: EventStream) -> np.ndarray:
    return np.full((int(stream.y.max()) + 1, int(stream.x.max()) + 1, 3), 255, dtype=np.uint8)


def loop_of_arrays(stream: EventStream) -> np.ndarray:
    """Draw one event after the other, making its colour."""
    canvas = _canvas(stream)
    for x, y, p in zip(stream.x, stream.y, stream.p, strict=True):
        if p:
            canvas[y, x] = np.array([255, 0, 0])
        else:
            canvas[y, x] = np.array([0, 0, 255])
    return canvas


def loop_of_tuples(stream: EventStream) -> np.ndarray:
    """Draw one event after the other."""
    canvas = _canvas(stream)
    for x, y, p in zip(stream.x, stream.y, stream.p, strict=True):
        canvas[y, x] = (255, 0, 0) if p else (0, 0, 255)
    return canvas


WAYS: dict[str, Callable[[EventStream], np.ndarray]] = {
    "loop, an array a colour (the original's way)": loop_of_arrays,
    "loop, tuples": loop_of_tuples,
    "profkit": event_streams.frame,
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=130_000)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    slices = event_streams.slices(random_stream(options.events))
    expected = [loop_of_tuples(one) for one in slices]
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(options.rounds):
        for name, draw in WAYS.items():
            begin = time.perf_counter()
            drawn = [draw(one) for one in slices]
            times[name].append(time.perf_counter() - begin)
            assert all(np.array_equal(one, other) for one, other in zip(drawn, expected, strict=True)), name
    print(f"{options.events:,} events in five frames, median of {options.rounds} rounds; all draw the same pixels")
    mine = median(times["profkit"])
    for name, measured in times.items():
        print(f"{name:<46}{median(measured) * 1e3:8.2f} ms {median(measured) / mine:7.1f} x profkit's time")
    ratio = median(times["loop, an array a colour (the original's way)"]) / mine
    print(f"{'faster than the loop':<46}{ratio:8.1f} x    allowed >= 50  {'ok' if ratio >= 50 else 'MISSED'}")


if __name__ == "__main__":
    main()
