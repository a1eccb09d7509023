"""Memory of a model's devices at the marks of a pass of its own: allocated, reserved, and the peak between marks."""

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
from profkit.ledger import Ledger
from profkit.spans import Spans

COLUMNS = ("allocated_before", "allocated_after", "reserved_after", "peak")


class Allocator(Protocol):
    """What is asked of a device's allocator, in bytes."""

    def allocated(self) -> int:
        """Return what tensors hold."""

    def reserved(self) -> int:
        """Return what was taken from the device."""

    def peak(self) -> int:
        """Return the most that tensors held since the last reset."""

    def reset_peak(self) -> None:
        """Begin a new peak."""

    def raise_peak(self, size: int) -> None:
        """Bring the peak back to at least so many bytes."""


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

    def peak(self) -> int:
        """Return the most that tensors held since the last reset."""
        return int(torch.accelerator.max_memory_allocated(self._device))

    def reset_peak(self) -> None:
        """Begin a new peak."""
        torch.accelerator.reset_peak_memory_stats(self._device)

    def raise_peak(self, size: int) -> None:
        """Take and give back what is missing: torch has no way to set a statistic. It was there before."""
        missing = size - self.allocated()
        if missing > 0 and self.peak() < size:
            with suppress(RuntimeError):
                torch.empty(missing, dtype=torch.uint8, device=self._device)


def allocators_of(devices: Sequence[torch.device]) -> list[Allocator]:
    """Return the allocators that keep statistics: those of accelerators, where torch has them; the CPU's keeps none."""
    if not torch.accelerator.is_available() or not hasattr(torch.accelerator, "max_memory_allocated"):
        return []
    found: list[Allocator] = []
    for device in devices:
        with suppress(Exception):
            if device.type not in ("cpu", "meta"):
                one = TorchAllocator(device)
                one.peak()
                found.append(one)
    return found


class MemoryClock:
    """Stands for a device clock whose time is memory: every mark notes bytes, summed over the devices.

    The peaks that the user's own program has reached are there again after `restore()`. Reading takes some us a mark:
    for a pass whose times are not quoted.
    """

    is_spread = False

    def __init__(self, allocators: Sequence[Allocator]) -> None:
        self._allocators = allocators
        self._before = [one.peak() for one in allocators]
        self.restart()

    def restart(self) -> None:
        """Begin a new pass."""
        self._slots = itertools.count()
        self._noted: list[tuple[int, int, int]] = []
        for one in self._allocators:
            one.reset_peak()

    def recorder(self, device: torch.device | None = None) -> Callable[[], int]:
        """Return a function that notes what is held now, and the peak since the last note."""

        def record() -> int:
            every = self._allocators
            allocated, reserved = sum(one.allocated() for one in every), sum(one.reserved() for one in every)
            self._noted.append((allocated, reserved, sum(one.peak() for one in every)))
            for one in every:
                one.reset_peak()
            return next(self._slots)

        return record

    def restore(self) -> None:
        """Bring the peaks back that were there before."""
        for one, size in zip(self._allocators, self._before, strict=True):
            one.raise_peak(size)

    def table(self, ledger: Ledger) -> pd.DataFrame:
        """Return memory_table() of a pass, as `ledger` recorded it."""
        noted = np.array(self._noted, dtype=np.int64).reshape(-1, 3)
        # The same marks three times, each with other bytes for a time: so what is mended is mended alike.
        kinds = [
            Spans(ledger.marks(functools.partial(noted.__getitem__, (slice(None), kind))), ledger.scopes.list)
            for kind in range(3)
        ]
        return memory_table(kinds[0], *(one.marks.device_ns for one in kinds))


def memory_table(spans: Spans, allocated: np.ndarray, reserved: np.ndarray, peak: np.ndarray) -> pd.DataFrame:
    """Return a row a stage that occurs, and one of the total: bytes.

    Columns: allocated_before (as the stage first begins), allocated_after and reserved_after (as it last ends), peak
    (the most that was allocated in any of its segments). What is given is by mark.
    """
    rows = {}
    for number in np.unique(spans.stage[spans.stage >= 0]).tolist():
        rows[stages.NAMES[number]] = _row(np.flatnonzero(spans.stage == number), allocated, reserved, peak)
    rows["total"] = _row(np.flatnonzero(spans.stage >= 0), allocated, reserved, peak)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(COLUMNS)).rename_axis("stage")


def _row(segments: np.ndarray, allocated: np.ndarray, reserved: np.ndarray, peak: np.ndarray) -> list[int]:
    first, last = int(segments[0]), int(segments[-1]) + 1
    # What a mark notes as peak is that of the segment before it.
    return [int(allocated[first]), int(allocated[last]), int(reserved[last]), int(peak[segments + 1].max())]
