"""The device's clock: a pool of device events, recorded in probes and resolved after generate()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch


class DeviceEvent(Protocol):
    """What the pool needs of an event; torch.Event on every accelerator has it."""

    def record(self) -> Any:
        """Take the time on the current stream when the device gets there."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to another."""


class DeviceClock:
    """Times on one device. `record()` marks the current stream; `resolve()` waits once and reads all.

    Events are pooled: `restart()` makes those of the last run available again, so that a clock that is kept
    over several runs is bounded by the longest. Times are nanoseconds since the first event of the run.
    """

    def __init__(
        self,
        new_event: Callable[[], DeviceEvent],
        synchronize: Callable[[], None],
    ) -> None:
        self._new_event = new_event
        self._synchronize = synchronize
        self._pool: list[DeviceEvent] = []
        self._used = 0

    @classmethod
    def of(cls, device: torch.device) -> DeviceClock | None:
        """Return a clock for `device`, or None where it has no timed events (the CPU)."""
        if device.type in ("cpu", "meta") or not torch.accelerator.is_available():
            return None

        def new_event() -> DeviceEvent:
            return torch.Event(device, enable_timing=True)

        return cls(new_event, lambda: torch.accelerator.synchronize(device))

    def record(self) -> int:
        """Record an event on the device's current stream and return its slot. Never waits."""
        slot = self._used
        if slot == len(self._pool):
            self._pool.append(self._new_event())
        self._used = slot + 1
        self._pool[slot].record()
        return slot

    def restart(self) -> None:
        """Begin a new run: slots start from 0 and the pool's events are used again."""
        self._used = 0

    def resolve(self) -> np.ndarray:
        """Wait for the device once and return the time of every slot, in ns since slot 0."""
        self._synchronize()
        events = self._pool[: self._used]
        elapsed_ms = [events[0].elapsed_time(event) for event in events]
        return np.rint(np.array(elapsed_ms) * 1e6).astype(np.int64)
