"""What a measurement stands on: device, versions, random state."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import StatisticsError, fmean
from typing import Any

import torch
from torch import nn

MOST_READINGS, ENOUGH_STEPS = 1_000_000, 50
SENSORS = (
    ("temperature_c", "class/thermal/thermal_zone*/temp", 1e-3),
    ("throttled", "devices/system/cpu/cpu*/thermal_throttle/core_throttle_count", 1),
)
"""What Linux tells of heat: name, files below /sys, unit."""


def device_of(model: nn.Module) -> torch.device:
    """Return the device that a model runs on, the first of those that it is spread over."""
    return devices_of(model)[0]


def devices_of(model: nn.Module) -> list[torch.device]:
    """Return the devices that a model's modules run on, in their order, accelerators first; the CPU if it has none."""
    found = [device for module in model.modules() if (device := runs_on(module)) is not None]
    return sorted(dict.fromkeys(found), key=lambda device: device.type in ("cpu", "meta")) or [torch.device("cpu")]


def runs_on(module: nn.Module) -> torch.device | None:
    """Return the device on which a module runs: that of its own first parameter; None if it has none of its own.

    Where accelerate brings weights from elsewhere (device_map), its hook tells.
    """
    planned = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if planned is not None:
        return torch.device(planned)
    first = next(module.parameters(recurse=False), None)
    return first.device if first is not None else None


def synchronize(device: torch.device) -> None:
    """Wait for a device; the CPU is always done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return what a run must say of model, device and versions, as plain values."""
    config: Any = getattr(model, "config", None)
    parameter = next(model.parameters(), None)
    return {
        "model_class": type(model).__name__,
        "device": str(device_of(model)),
        "device_name": device_name(device_of(model)),
        "driver": driver(device_of(model)),
        "dtype": str(parameter.dtype).removeprefix("torch.") if parameter is not None else None,
        "parameters": sum(one.numel() for one in model.parameters()),
        "attention": getattr(config, "_attn_implementation", None),
        "config": config.to_dict() if hasattr(config, "to_dict") else None,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("profkit", "torch", "transformers", "numpy", "pandas")},
        },
        "platform": f"{platform.system()} {platform.machine()}",
        "command": command_as_run(),
    }


def command_as_run() -> list[str]:
    """Return the words of the command that this process was started with, as it could be given again."""
    program, *arguments = sys.argv or [""]
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return ["python", "-m", spec.name.removesuffix(".__main__"), *arguments]
    if program.endswith(".py"):
        return ["python", program, *arguments]
    return [Path(program).name, *arguments]


def hashes(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the SHA-256 of each of `values`: of tensors the bytes, dtype and shape; else the text or the class."""

    def content(value: Any) -> bytes:
        if not isinstance(value, torch.Tensor):
            plain = isinstance(value, str | int | float | list | tuple | dict | None)
            # The repr() of other objects holds their address, which differs each time.
            return (repr(value) if plain else type(value).__qualname__).encode()
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} ".encode() + raw

    return {name: hashlib.sha256(content(value)).hexdigest() for name, value in values.items()}


def device_name(device: torch.device) -> str:
    """Return the device as its maker calls it, the processor's model or kind for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor() if device.type == "cpu" else str(device)


def _processor() -> str:
    """Return the processor's model where Linux tells it, else its kind."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(one for one in lines if one.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def driver(device: torch.device) -> str:
    """Return the versions of a device's driver and runtime, "" for a CPU."""
    if device.type != "cuda":
        return ""
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    with suppress(Exception):
        return f"{runtime}, driver {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
    return runtime


def machine_now(device: torch.device | None = None) -> dict[str, float]:
    """Return what the machine has done so far, each figure where the system tells it.

    wall_s, own_s (of this process); on Linux, of all cores, busy_s and stolen_s (by the host of a virtual machine),
    frequency_mhz, temperature_c (of the hottest sensor) and throttled (how often heat slowed cores down); of a CUDA
    device, through NVML, device_mhz and device_c.
    """
    found = {"wall_s": time.monotonic(), "own_s": time.process_time()}
    with suppress(OSError, ValueError, IndexError):
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, Path("/proc/stat").read_text().split()[1:11])
        ticks = os.sysconf("SC_CLK_TCK")
        found |= {"busy_s": (user + nice + system + irq + softirq) / ticks, "stolen_s": steal / ticks}
    with suppress(OSError, ValueError, StatisticsError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found["frequency_mhz"] = fmean(float(one.partition(":")[2]) for one in lines if one.startswith("cpu MHz"))
    for name, where, unit in SENSORS:
        with suppress(OSError, ValueError):
            read = [int(path.read_text()) for path in Path("/sys").glob(where)]
            if read:
                found[name] = (sum(read) if name == "throttled" else max(read)) * unit
    if device is not None and device.type == "cuda":
        # Needs pynvml, and a driver that answers.
        with suppress(Exception):
            found |= {"device_mhz": torch.cuda.clock_rate(device), "device_c": torch.cuda.temperature(device)}
    return found


def clock_step_ns(now: Callable[[], int] = time.perf_counter_ns) -> int:
    """Return the smallest step that a clock is seen to make, in ns: what it tells apart, whatever it claims."""
    steps, before = [], now()
    for _ in range(MOST_READINGS):
        after = now()
        if after != before:
            steps.append(after - before)
            before = after
        if len(steps) == ENOUGH_STEPS:
            break
    return min(steps, default=0)


def modules_of(model: nn.Module) -> dict[str, int]:
    """Return which object stands at each path of a model."""
    return {path: id(module) for path, module in model.named_modules()}


def graphs_compiled() -> int:
    """Return how many graphs torch.compile() has made in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return int(dynamo.counters["stats"]["unique_graphs"]) if dynamo is not None else 0


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def random_state() -> list[torch.Tensor]:
    """Return the state of torch's generators: the CPU's and each accelerator's."""
    states = [torch.get_rng_state()]
    if torch.accelerator.is_available() and (device := _device_module()) is not None:
        states += list(device.get_rng_state_all())
    return states


def restore_random_state(states: Sequence[torch.Tensor]) -> None:
    """Set the generators back to what random_state() returned."""
    torch.set_rng_state(states[0])
    if len(states) > 1 and (device := _device_module()) is not None:
        device.set_rng_state_all(list(states[1:]))


def _device_module() -> Any:
    module = torch.get_device_module()
    return module if hasattr(module, "get_rng_state_all") else None


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave torch's random state as it was found."""
    states = random_state()
    try:
        yield
    finally:
        restore_random_state(states)
