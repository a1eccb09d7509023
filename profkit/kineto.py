"""A session of torch.profiler over chosen steps of generate(), with profkit's ranges in it."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._C._autograd import _KinetoEvent as KinetoEvent
from torch.profiler import ProfilerActivity, profile

from profkit.attribution import RANGE_PREFIX
from profkit.errors import InputError, MeasurementError
from profkit.events import DEVICE, NOTHING, Events, Kind, kind_of

Marker = Callable[[int], int]
MEMORY = "[memory]"
BLOCK = 1024
"""Events that are read at once."""


class Session:
    """Profiles the steps in `wanted` of one generate(); a context to be entered before it.

    `wrap` goes around the ledger's marker and opens a range for every scope; `on_iteration` switches
    collection on and off as steps begin, so that the profile does not grow with the output. `memory` records
    allocations too.
    """

    def __init__(self, wanted: frozenset[int], device: torch.device, ranges: bool = True, memory: bool = False) -> None:
        self._wanted = wanted
        self._device = device
        self._ranges = ranges
        self._activities = [ProfilerActivity.CPU]
        if device.type != "cpu":
            self._activities.append(_activity_of(device))
        self._profile = profile(activities=self._activities, profile_memory=memory)
        self._collecting = True
        self._open: list[tuple[int, Any]] = []

    def __enter__(self) -> Session:
        refuse_other_profilers()
        try:
            self._profile.start()
        except RuntimeError as error:
            raise MeasurementError(f"torch.profiler could not start: {error}.") from error
        self.on_iteration(0)
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)
        self._profile.stop()

    def wrap(self, mark: Marker) -> Marker:
        """Return a marker that also opens and closes a range named after the entry mark."""
        if not self._ranges:
            return mark
        new_range = torch._C._profiler._RecordFunctionFast
        opened = self._open

        def mark_and_range(code: int) -> int:
            index = mark(code)
            if code > 0:
                one = new_range(f"{RANGE_PREFIX}{index}")
                one.__enter__()
                opened.append((code, one))
            else:
                while opened:
                    scope, one = opened.pop()
                    one.__exit__(None, None, None)
                    if scope == -code:
                        break
            return index

        return mark_and_range

    def on_iteration(self, step: int) -> None:
        """Collect from here on if `step` is wanted, else pause."""
        collect = step in self._wanted
        if collect == self._collecting:
            return
        # Kernels still in flight would be cut off at the window's edge. This pass is never quoted as a time.
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        self._profile.toggle_collection_dynamic(collect, self._activities)
        self._collecting = collect

    def events(self) -> Events:
        """Return the profile as columns, from the profiler's raw results."""
        assert self._profile.profiler is not None
        return events_of(self._profile.profiler.kineto_results, on_device=len(self._activities) > 1)

    def allocations(self) -> tuple[np.ndarray, np.ndarray]:
        """Return when memory of the device was taken, or given back, on the profiler's clock in ns, and the bytes."""
        profiler: Any = self._profile.profiler
        kind = f"DeviceType.{self._device.type.upper()}"
        found = [
            (one.start_ns(), one.nbytes())
            for one in profiler.kineto_results.events()
            if one.name() == MEMORY and str(one.device_type()) == kind
        ]
        when_ns, change = np.array(found, dtype=np.int64).reshape(-1, 2).T
        return when_ns, change

    def export(self) -> bytes:
        """Return the profile as the text of a Chrome trace."""
        with tempfile.TemporaryDirectory(prefix="profkit-") as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return path.read_bytes()


def events_of(results: Any, on_device: bool = True) -> Events:
    """Return the raw results of a stopped profiler as columns.

    Every column is read block by block, so that the events of a block are still in the processor's caches for the next
    column: a third faster than column by column. `on_device` False skips what only devices have.
    """
    recorded = results.events()
    size = len(recorded)
    names: defaultdict[str, int] = defaultdict(count().__next__)
    numbers = {"start_ns": KinetoEvent.start_ns, "duration_ns": KinetoEvent.duration_ns}
    numbers |= {"thread": KinetoEvent.device_resource_id}
    if on_device:
        numbers |= {"process": KinetoEvent.device_index, "correlation": KinetoEvent.correlation_id}
    columns = {key: np.empty(size, dtype=np.int64) for key in ("name", *numbers)}
    for start in range(0, size, BLOCK):
        part = recorded[start : start + BLOCK]
        rows = slice(start, start + len(part))
        columns["name"][rows] = np.fromiter(map(names.__getitem__, map(KinetoEvent.name, part)), np.int64, len(part))
        for key, read in numbers.items():
            columns[key][rows] = np.fromiter(map(read, part), np.int64, len(part))
    columns.setdefault("process", np.full(size, os.getpid()))
    columns.setdefault("correlation", np.full(size, NOTHING))
    return _with_devices(recorded, list(names), columns)


def _with_devices(recorded: list[Any], names: list[str], columns: dict[str, np.ndarray]) -> Events:
    """Add what the kind of an event tells.

    On the host an event's name tells its kind, so one event a name is asked; on devices all are.
    """
    name, process = columns["name"], columns["process"]
    host = process == os.getpid()
    categories: defaultdict[str, int] = defaultdict(count().__next__)
    of_name = np.zeros(len(names), dtype=np.int64)
    own = np.array([one.startswith(RANGE_PREFIX) for one in names], dtype=bool)
    asked = np.unique(name[host & ~own[name]], return_index=True) if len(names) else (name, name)
    rows = np.flatnonzero(host & ~own[name])[asked[1]] if len(name) else asked[1]
    of_name[own] = categories["cpu_op"]
    of_name[asked[0]] = [categories[recorded[row].activity_type()] for row in rows.tolist()]
    category = of_name[name]
    there = np.flatnonzero(~host)
    category[there] = [categories[recorded[row].activity_type()] for row in there.tolist()]
    kind = np.array([kind_of(one) for one in categories], dtype=np.int8)[category]
    number = np.where(host, NOTHING, process)
    devices, device = np.unique(number[there], return_inverse=True)
    number[there] = device
    return Events(
        names=names,
        categories=list(categories),
        devices=[str(one) for one in devices.tolist()],
        name=name,
        category=category,
        start_ns=columns["start_ns"],
        duration_ns=columns["duration_ns"],
        process=process,
        thread=columns["thread"],
        # Operators number themselves in a space of their own, which has nothing to do with launches.
        correlation=np.where(np.isin(kind, [Kind.RUNTIME, *DEVICE, Kind.SYNC]), columns["correlation"], NOTHING),
        device=number,
        stream=np.where(host, NOTHING, columns["thread"]),
        launched=np.full(len(name), NOTHING),
    )


def refuse_other_profilers() -> None:
    """Raise InputError if another profiler is recording in this process."""
    if torch._C._autograd._profiler_enabled():
        raise InputError(
            "Another torch.profiler is recording in this process, and two cannot at once: "
            "stop it, or trace without a profiled pass (--no-profile, profile=False)."
        )
    tools = {"NSYS_PROFILING_SESSION_ID": "Nsight Systems", "NV_COMPUTE_PROFILER_PERFWORKS_DIR": "Nsight Compute"}
    for variable, tool in tools.items():
        if os.environ.get(variable):
            raise InputError(
                f"{tool} is recording this process, and CUPTI serves one profiler at a time: "
                "run without it, or trace without a profiled pass (--no-profile, profile=False)."
            )


def _activity_of(device: torch.device) -> ProfilerActivity:
    names = {"cuda": "CUDA", "xpu": "XPU", "mtia": "MTIA", "hpu": "HPU"}
    name = names.get(device.type, "PrivateUse1")
    if not hasattr(ProfilerActivity, name):
        raise MeasurementError(f"torch.profiler cannot record {device.type} devices; trace with profile=False.")
    return getattr(ProfilerActivity, name)
