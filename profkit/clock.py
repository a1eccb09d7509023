"""The clock of a model's devices: pooled events, recorded in probes and read after generate(), or when many are out."""

from __future__ import annotations

import itertools
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

KEPT = 1 << 14
"""Events that may be out on a device before those it has passed are read and used again: 4,096 tokens at layer
granularity would take a million."""
STRIDE = 1024
"""After so many events their times count from a later one: they are read as float32 ms, which tell a us for 16 s."""


class Event(Protocol):
    """What a clock needs of an event; torch.Event on every accelerator has it."""

    def query(self) -> bool:
        """Tell whether the device has got there, without waiting."""

    def elapsed_time(self, end_event: Any) -> float:
        """Return the milliseconds from this event to another."""


class Source(Protocol):
    """A device as a clock sees it."""

    device: torch.device

    def new(self) -> Event:
        """Make an event."""

    def record(self, event: Event) -> None:
        """Let the device note the time on its current stream, when it gets there. Never waits."""

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""


class TorchSource:
    """A device of torch's.

    An event alone would be recorded on the stream of the current device, which is another one than a model's where
    that lies on cuda:1, say: the stream is named.
    """

    def __init__(self, device: torch.device) -> None:
        index = torch.accelerator.current_device_index() if device.index is None else device.index
        self.device = torch.device(device.type, index)

    def new(self) -> Event:
        """Make an event with a time."""
        return torch.Event(self.device, enable_timing=True)

    def record(self, event: Any) -> None:
        """Record it on the device's current stream."""
        event.record(torch.accelerator.current_stream(self.device))

    def synchronize(self) -> None:
        """Wait for the device."""
        torch.accelerator.synchronize(self.device)


class _Timeline:
    """The events of one device, in the order they were recorded; read times go to `times`, by slot."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._idle: list[Event] = []
        self._out: deque[tuple[int, Event]] = deque()
        self._base, self._base_ns, self._read = source.new(), 0, 0

    def restart(self) -> None:
        """Take every event back, and begin to count."""
        self._idle += [event for _, event in self._out]
        self._out.clear()
        self.source.record(self._base)
        self._base_ns = self._read = 0

    def _recorded(self) -> Event:
        event = self._idle.pop() if self._idle else self.source.new()
        self.source.record(event)
        return event

    def record(self, slot: int, times: array[int]) -> None:
        """Record an event for a slot. With many out, read the oldest, if the device has passed it."""
        if len(self._out) >= KEPT and self._out[0][1].query():
            self.read_oldest(times)
        self._out.append((slot, self._recorded()))

    def read_oldest(self, times: array[int]) -> None:
        """Read the time of the oldest event that is out, and use it again."""
        slot, event = self._out.popleft()
        time_ns = self._base_ns + round(self._base.elapsed_time(event) * 1e6)
        times[slot] = time_ns
        self._read += 1
        if self._read % STRIDE == 0:
            event, self._base, self._base_ns = self._base, event, time_ns
        self._idle.append(event)

    def read_all(self, times: array[int]) -> None:
        """Read every event that is out; the device must have passed them."""
        while self._out:
            self.read_oldest(times)


class DeviceClock:
    """Times on a model's devices. Recorders mark a device's current stream; `resolve()` waits once and reads all.

    Times are nanoseconds since `restart()`. A mark's time is when all that was enqueued until then was done, on
    whichever device or stream that took longest: times never run backwards, and gaps between marks sum to their span.
    The zeros of several devices are taken while all are idle; they differ by what it takes to launch, some us.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self._timelines = [_Timeline(source) for source in sources]
        self._on = {source.device: timeline for source, timeline in zip(sources, self._timelines, strict=True)}
        self.restart()

    @classmethod
    def of(cls, devices: Sequence[torch.device]) -> DeviceClock | None:
        """Return a clock for devices, the main one first, or None where none has timed events (the CPU)."""
        timed = [device for device in devices if device.type not in ("cpu", "meta")]
        if not timed or not torch.accelerator.is_available():
            return None
        return cls([TorchSource(device) for device in timed])

    @property
    def is_spread(self) -> bool:
        """Whether there are several devices."""
        return len(self._timelines) > 1

    def recorder(self, device: torch.device | None = None) -> Callable[[], int]:
        """Return a function that records an event on a device, else on the main one, and returns its slot.

        It never waits.
        """
        timeline = self._timelines[0] if device is None else self._on.get(device, self._timelines[0])

        def record() -> int:
            slot = self._next_slot()
            while slot >= len(self._times):
                self._times.extend(bytes(len(self._times)))
            timeline.record(slot, self._times)
            return slot

        return record

    def restart(self) -> None:
        """Begin a new run: slots and times start from 0 and the pools' events are used again."""
        self._next_slot = itertools.count().__next__
        self._times = array("q", bytes(8 * KEPT))
        if len(self._timelines) > 1:
            for timeline in self._timelines:
                timeline.source.synchronize()
        for timeline in self._timelines:
            timeline.restart()

    def resolve(self) -> np.ndarray:
        """Wait for the devices once and return the time of every slot, in ns."""
        for timeline in self._timelines:
            timeline.source.synchronize()
        for timeline in self._timelines:
            timeline.read_all(self._times)
        return np.maximum.accumulate(np.array(self._times[: self._next_slot()], dtype=np.int64))
