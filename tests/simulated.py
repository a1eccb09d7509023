"""A device that is not there: a stream which works through what the host enqueues, behind the host's back.

Work takes no part of the host's time; an event gets the time at which the stream has done what was enqueued before it.
So the host runs ahead of it as of a real device, and only events tell what a stage took there.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import torch
from torch import nn

from profkit.clock import DeviceClock
from profkit.wrapping import Wrappers


class Stream:
    """The queue of a device; `waits` counts how often the host waited for it."""

    def __init__(self, device: str = "cuda:0") -> None:
        self.device = torch.device(device)
        self.free_ns = 0
        self.waits = 0
        self.made = 0

    def enqueue(self, work_ns: int) -> None:
        """Give it work: it begins once the host has asked for it and all before it is done."""
        self.free_ns = max(self.free_ns, perf_counter_ns()) + work_ns

    def synchronize(self) -> None:
        """Let the host wait until all is done."""
        self.waits += 1
        while perf_counter_ns() < self.free_ns:
            time.sleep(0.00005)

    def new(self) -> Event:
        """Make an event."""
        self.made += 1
        return Event(self)

    def record(self, event: Event) -> None:
        """Give an event the time at which the stream gets here."""
        event.time_ns = max(self.free_ns, perf_counter_ns())

    def clock(self) -> DeviceClock:
        """Return profkit's clock over this stream."""
        return DeviceClock([self])

    @contextmanager
    def working_for(self, model: nn.Module, work_ns: dict[str, int]) -> Iterator[None]:
        """Let modules, by their paths, enqueue work whenever they are called."""
        wrappers = Wrappers()

        def busy(module: nn.Module, length_ns: int) -> None:
            inner = module.forward

            @functools.wraps(inner)
            def forward(*args, **kwargs):
                self.enqueue(length_ns)
                return inner(*args, **kwargs)

            wrappers.put(module, "forward", forward)

        for path, length_ns in work_ns.items():
            busy(model.get_submodule(path), length_ns)
        wrappers.active = True
        try:
            yield
        finally:
            wrappers.remove()


class Event:
    """An event of a stream, as torch.Event is one."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.time_ns = 0

    def query(self) -> bool:
        """Tell whether the stream got here."""
        return perf_counter_ns() >= self.time_ns

    def elapsed_time(self, end_event: Event) -> float:
        """Return the milliseconds to another."""
        return (end_event.time_ns - self.time_ns) / 1e6
