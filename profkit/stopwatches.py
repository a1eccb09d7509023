"""Two stopwatches, the host's and a CUDA device's: each tells the time, and waits as long as it is told."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any, Protocol

import torch

from profkit.clock import Source, TorchSource

CYCLES = 10_000_000
"""What a spin kernel is calibrated with: some ms."""


class Stopwatch(Protocol):
    """Reads a clock, and makes it pass."""

    on_device: bool

    def now(self) -> Any:
        """Read the clock; on a device, where its stream has got to."""

    def wait(self, wait_ns: int) -> None:
        """Do nothing for so long, about: what it really was, readings before and after tell."""

    def elapsed_ns(self, begin: Any, end: Any) -> int:
        """Return the time between two readings."""


class HostStopwatch:
    """The processor's clock; waiting is busy."""

    on_device = False

    def now(self) -> int:
        """Read the clock, in ns."""
        return perf_counter_ns()

    def wait(self, wait_ns: int) -> None:
        """Spin."""
        end = perf_counter_ns() + wait_ns
        while perf_counter_ns() < end:
            pass

    def elapsed_ns(self, begin: int, end: int) -> int:
        """Return the difference."""
        return end - begin


class DeviceStopwatch:
    """A device's clock, by events on its current stream; waiting is a kernel that spins for a number of cycles.

    The host waits for that kernel too: were it to run ahead meanwhile, parts behind it would no longer starve, and be
    faster than they are without it.
    """

    on_device = True

    def __init__(self, source: Source, spin: Callable[[int], None]) -> None:
        self._source, self._spin = source, spin
        for _ in range(2):
            # The first launch loads the kernel.
            begin = self.now()
            spin(CYCLES)
            end = self.now()
            self._ns_per_cycle = self.elapsed_ns(begin, end) / CYCLES

    def now(self) -> Any:
        """Record an event."""
        event = self._source.new()
        self._source.record(event)
        return event

    def wait(self, wait_ns: int) -> None:
        """Spin on the device."""
        self._spin(round(wait_ns / self._ns_per_cycle))
        self._source.synchronize()

    def elapsed_ns(self, begin: Any, end: Any) -> int:
        """Wait for the device, and return the time between two events."""
        self._source.synchronize()
        return round(begin.elapsed_time(end) * 1e6)


def stopwatch_for(device: torch.device) -> Stopwatch | None:
    """Return the stopwatch of a model's device; None where torch has no kernel that spins."""
    if device.type == "cpu":
        return HostStopwatch()
    if device.type == "cuda":

        def spin(cycles: int) -> None:
            with torch.cuda.device(device):
                torch.cuda._sleep(cycles)

        return DeviceStopwatch(TorchSource(device), spin)
    return None
