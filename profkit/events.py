"""What a profiler recorded, as columns: operators, runtime calls, kernels, ranges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Events:
    """Complete events as numpy columns of equal length, in the order they were recorded.

    `name` and `category` index the lists `names` and `categories`; `start_ns` and `duration_ns` are
    integer nanoseconds on the profiler's clock; `process` and `thread` are the recorder's numbers.
    """

    names: list[str]
    categories: list[str]
    name: np.ndarray
    category: np.ndarray
    start_ns: np.ndarray
    duration_ns: np.ndarray
    process: np.ndarray
    thread: np.ndarray

    def __len__(self) -> int:
        return len(self.name)

    @property
    def end_ns(self) -> np.ndarray:
        """Where each event ends, in ns."""
        return self.start_ns + self.duration_ns

    def of_category(self, *wanted: str) -> np.ndarray:
        """Return which events have one of these categories."""
        return np.isin(self.category, [i for i, category in enumerate(self.categories) if category in wanted])

    def select(self, rows: np.ndarray) -> Events:
        """Return the events of a mask or a list of positions; the lists of names are shared."""
        return Events(
            self.names,
            self.categories,
            self.name[rows],
            self.category[rows],
            self.start_ns[rows],
            self.duration_ns[rows],
            self.process[rows],
            self.thread[rows],
        )
