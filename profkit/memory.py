"""Memory of a model's devices by stage: allocated and reserved at the marks of a pass of its own, and its peaks.

Peaks are those of the profiler's list of allocations: nothing of torch's own statistics is reset.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
import pandas as pd
import torch

from profkit import stages
from profkit.kineto import Session
from profkit.ledger import Ledger
from profkit.spans import Spans

COLUMNS = ("allocated_before", "allocated_after", "reserved_after", "peak")


class Allocator(Protocol):
    """What is asked of a device's allocator, in bytes."""

    def allocated(self) -> int:
        """Return what tensors hold."""

    def reserved(self) -> int:
        """Return what was taken from the device."""


class TorchAllocator:
    """The allocator of a device of torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocated(self) -> int:
        """Return what tensors hold."""
        return int(torch.accelerator.memory_allocated(self._device))

    def reserved(self) -> int:
        """Return what was taken from the device."""
        return int(torch.accelerator.memory_reserved(self._device))


def allocators_of(devices: Sequence[torch.device]) -> list[Allocator]:
    """Return the allocators that keep statistics: those of accelerators, where torch has them; the CPU's keeps none."""
    if not torch.accelerator.is_available() or not hasattr(torch.accelerator, "memory_allocated"):
        return []
    found: list[Allocator] = []
    for device in devices:
        with suppress(Exception):
            if device.type not in ("cpu", "meta"):
                one = TorchAllocator(device)
                one.allocated()
                found.append(one)
    return found


class MemoryClock:
    """Stands for a device clock whose time is memory: every mark notes bytes, summed over the devices.

    Reading takes some us a mark: for a pass whose times are not quoted.
    """

    is_spread = False

    def __init__(self, allocators: Sequence[Allocator]) -> None:
        self._allocators = allocators
        self.restart()

    def restart(self) -> None:
        """Begin a new pass."""
        self._slots = itertools.count()
        self._noted: list[tuple[int, int]] = []

    def recorder(self, device: torch.device | None = None) -> Callable[[], int]:
        """Return a function that notes what is held now."""

        def record() -> int:
            every = self._allocators
            self._noted.append((sum(one.allocated() for one in every), sum(one.reserved() for one in every)))
            return next(self._slots)

        return record

    def by_mark(self, ledger: Ledger) -> tuple[np.ndarray, np.ndarray]:
        """Return allocated and reserved bytes by mark of a pass, as `ledger` recorded it."""
        noted = np.array(self._noted, dtype=np.int64).reshape(-1, 2)
        # The same marks with bytes for a time: what is mended in them is mended alike.
        allocated, reserved = (
            Spans(ledger.marks(functools.partial(noted.__getitem__, (slice(None), kind))), ledger.scopes.list)
            for kind in range(2)
        )
        return allocated.marks.device_ns, reserved.marks.device_ns


def measured(
    session: Session, spans: Spans, recorded: np.ndarray, by_mark: tuple[np.ndarray, np.ndarray]
) -> pd.DataFrame:
    """Return memory_table() of a pass inside a session that recorded allocations, over its `recorded` segments.

    `spans` are on the profiler's clock.
    """
    allocated, reserved = by_mark
    peak = peaks(spans.marks.host_ns, allocated, *session.allocations())
    return memory_table(np.where(recorded, spans.stage, -1), allocated, reserved, peak)


def peaks(mark_ns: np.ndarray, allocated: np.ndarray, when_ns: np.ndarray, change: np.ndarray) -> np.ndarray:
    """Return the most that was allocated between each mark and the next, in bytes.

    `allocated` is by mark; `change` has the bytes that were taken, or given back (negative), at `when_ns`.
    """
    order = np.argsort(when_ns, kind="stable")
    segment = np.searchsorted(mark_ns, when_ns[order], side="right") - 1
    inside = (segment >= 0) & (segment < len(mark_ns) - 1)
    segment, change = segment[inside], change[order][inside]
    total = np.cumsum(change)
    # What was added in earlier segments is in what the segment's own mark tells.
    before = (total - change)[np.searchsorted(segment, segment)] if len(segment) else total
    found = np.maximum(allocated[:-1], allocated[1:])
    np.maximum.at(found, segment, allocated[segment] + total - before)
    return found


def memory_table(stage: np.ndarray, allocated: np.ndarray, reserved: np.ndarray, peak: np.ndarray) -> pd.DataFrame:
    """Return a row a stage that occurs, and one of the total: bytes.

    Columns: allocated_before (as the stage first begins), allocated_after and reserved_after (as it last ends), peak
    (the most that was allocated in any of its segments). `stage` and `peak` are by segment, the others by mark.
    """
    rows = {}
    for number in np.unique(stage[stage >= 0]).tolist():
        rows[stages.NAMES[number]] = _row(np.flatnonzero(stage == number), allocated, reserved, peak)
    rows["total"] = _row(np.flatnonzero(stage >= 0), allocated, reserved, peak)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).rename_axis("stage")


def _row(segments: np.ndarray, allocated: np.ndarray, reserved: np.ndarray, peak: np.ndarray) -> list[int]:
    first, last = int(segments[0]), int(segments[-1]) + 1
    return [int(allocated[first]), int(allocated[last]), int(reserved[last]), int(peak[segments].max())]
