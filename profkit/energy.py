"""Energy counters that a machine lets be read, and windows long enough for how often they change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
UPDATES = 20
"""A window is at least so many updates of the counter long, so that its ends are off by 5 % at most."""
MOST_S = 30.0
"""A part that does not fill its window in so long is left out."""


class Meter(Protocol):
    """A counter of energy that only rises."""

    name: str
    update_s: float
    """How often it changes, at the least."""

    def joules(self) -> float:
        """Return the energy used so far. Raises OSError if it cannot be read."""


class Rapl:
    """The packages of a CPU (RAPL) as Linux's powercap tells them, in one sum; counters wrap around."""

    name, update_s = "RAPL, packages", 1e-3

    def __init__(self, root: Path = POWERCAP) -> None:
        self._zones = sorted(path for path in root.glob("*-rapl:*") if path.name.count(":") == 1)
        if not self._zones:
            raise OSError(f"{root} has no RAPL zones")
        self._range_uj = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
        self._last_uj, self._sum_uj = self._read(), 0

    def joules(self) -> float:
        """Return the joules since this meter was made."""
        now_uj = self._read()
        for now, last, wrap in zip(now_uj, self._last_uj, self._range_uj, strict=True):
            self._sum_uj += now - last if now >= last else now - last + wrap
        self._last_uj = now_uj
        return self._sum_uj / 1e6

    def _read(self) -> list[int]:
        return [int((zone / "energy_uj").read_text()) for zone in self._zones]


class Nvml:
    """One NVIDIA device's total energy (NVML, from Volta on), in steps of up to 100 ms."""

    name, update_s = "NVML, device", 0.1

    def __init__(self, index: int, library: Any = None, uuid: str = "") -> None:
        self._nvml = library or _pynvml()
        try:
            self._nvml.nvmlInit()
            # NVML counts every device of the machine, a program those that it may see: the number is another one.
            by_uuid, by_index = self._nvml.nvmlDeviceGetHandleByUUID, self._nvml.nvmlDeviceGetHandleByIndex
            self._device = by_uuid(f"GPU-{uuid}") if uuid else by_index(index)
            self.joules()
        except Exception as error:
            raise OSError(f"NVML does not tell the energy of device {index}: {error}") from error

    def joules(self) -> float:
        """Return the joules since the driver was loaded."""
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3


def _pynvml() -> Any:
    try:
        import pynvml
    except ImportError as error:
        raise OSError("pynvml is not installed (pip install nvidia-ml-py)") from error
    return pynvml


def meter_of(device: str, index: int = 0, root: Path | None = None, uuid: str = "") -> tuple[Meter | None, str]:
    """Return the counter of a kind of device (cpu, cuda), or None and, in a sentence, why there is none.

    `uuid` tells which device of NVIDIA's it is, if known: its number counts those alone that this program may see.
    """
    if device not in ("cpu", "cuda"):
        return None, f"Energy is not measured: profkit knows no counter of {device} devices."
    try:
        return (Rapl(root or POWERCAP) if device == "cpu" else Nvml(index, uuid=uuid)), ""
    except (OSError, ValueError) as error:
        return None, f"Energy is not measured: no counter can be read ({error})."


@dataclass(frozen=True)
class Window:
    """Energy of a stretch of work, repeated so often: all of it, and how far off its ends may be (0 to 1)."""

    joules: float
    seconds: float
    repeats: int
    uncertainty: float

    @property
    def each_joules(self) -> float:
        """Joules of one execution."""
        return self.joules / self.repeats

    @property
    def watts(self) -> float:
        """Mean power over the window."""
        return self.joules / self.seconds


def window(
    meter: Meter, work: Callable[[], object], now: Callable[[], float] = time.perf_counter, most_s: float = MOST_S
) -> Window | None:
    """Repeat `work` until the window is UPDATES updates of the counter long; None if that takes longer than `most_s`.

    `work` must wait for its device. Nothing is guessed: a window that is too short is no result.
    """
    wanted_s = UPDATES * meter.update_s
    begin_s, begin_j, repeats, took_s = now(), meter.joules(), 0, 0.0
    while took_s < wanted_s:
        if took_s > most_s:
            return None
        work()
        repeats, took_s = repeats + 1, now() - begin_s
    return Window(meter.joules() - begin_j, took_s, repeats, meter.update_s / took_s)
