"""A session of torch.profiler over chosen steps of generate(), with profkit's ranges in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from profkit.attribution import RANGE_PREFIX
from profkit.errors import InputError, MeasurementError

Marker = Callable[[int], int]


class Session:
    """Profiles the steps in `wanted` of one generate(); a context to be entered before it.

    `wrap` goes around the ledger's marker and opens a range for every scope; `on_iteration` switches
    collection on and off as steps begin, so that the profile does not grow with the output.
    """

    def __init__(self, wanted: frozenset[int], device: torch.device, ranges: bool = True) -> None:
        self._wanted = wanted
        self._device = device
        self._ranges = ranges
        self._activities = [ProfilerActivity.CPU]
        if device.type != "cpu":
            self._activities.append(_activity_of(device))
        self._profile = profile(activities=self._activities, acc_events=True)
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

    def export(self) -> bytes:
        """Return the profile as the text of a Chrome trace."""
        with tempfile.TemporaryDirectory(prefix="profkit-") as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            return path.read_bytes()


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
