"""Measures a machine's ceilings: large matrix products and copies, small operators, and uploads."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from profkit import ceilings
from profkit.ceilings import Ceiling, Ceilings
from profkit.environment import device_name, driver, synchronize
from profkit.errors import MeasurementError

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROUNDS = 15
ROUND_S = 0.05
"""A round lasts at least so long, so that clocks and launches do not count."""
LARGEST = {"cpu": 4096}
COPY_BYTES = {"cpu": 1 << 28}
LAUNCHES = 1000


class Bench:
    """Times work on one device: rounds of at least ROUND_S, in seconds for one execution."""

    def __init__(
        self, device: torch.device, now: Callable[[], float] = time.perf_counter, rounds: int = ROUNDS
    ) -> None:
        self.device, self.rounds = device, rounds
        self._now = now

    def seconds(self, work: Callable[[], object], least: int = 1) -> list[float]:
        """Return what one execution took in each round, after rounds that find how many make one."""
        times = least
        while (took := self.once(work, times)) < ROUND_S and times < 1 << 20:
            times = max(times * 2, min(int(times * ROUND_S / max(took, 1e-9) * 1.2), times * 16))
        return [self.once(work, times) / times for _ in range(self.rounds)]

    def once(self, work: Callable[[], object], times: int = 1) -> float:
        """Return what so many executions in a row took, in seconds."""
        synchronize(self.device)
        begin = self._now()
        for _ in range(times):
            work()
        synchronize(self.device)
        return self._now() - begin


def measured(device: torch.device, progress: Callable[[str], object] = lambda what: None) -> Ceilings:
    """Measure the ceilings of a device, which takes well under a minute. Raises MeasurementError if it cannot."""
    bench, notes, products = Bench(device), [], {}
    with torch.inference_mode():
        for dtype in DTYPES:
            name = str(dtype).removeprefix("torch.")
            progress(f"matrix products in {name}")
            try:
                products[name] = _product(bench, dtype)
            except RuntimeError as error:
                notes.append(f"{name} was not measured: {' '.join(str(error).split())[:150]}")
        progress("copies")
        try:
            copies, reads = _memory(bench)
            upload = None if device.type == "cpu" else _upload(bench)
            progress("launches")
            launch = _launch(bench)
        except RuntimeError as error:
            raise MeasurementError(f"Cannot measure {device}: {' '.join(str(error).split())[:200]}") from error
    about = (str(device.type), device_name(device), driver(device), str(torch.__version__), torch.get_num_threads())
    return Ceilings(*about, products, copies, reads, launch, upload, time.time(), tuple(notes))


def file_of(device: torch.device) -> Path:
    """Return the file that keeps this device's ceilings."""
    return ceilings.file_of(device_name(device), driver(device), str(torch.__version__), torch.get_num_threads())


def _product(bench: Bench, dtype: torch.dtype) -> Ceiling:
    """Return the FLOP/s of a square product, 2·n³ each, of the size up to LARGEST that a round has time for."""
    size, largest = 256, LARGEST.get(bench.device.type, 8192)
    while True:
        product = _square_product(bench.device, dtype, size)
        product()
        if size >= largest or bench.once(product) > ROUND_S / 2:
            return Ceiling.of([2 * size**3 / took for took in bench.seconds(product)])
        size *= 2


def _square_product(device: torch.device, dtype: torch.dtype, size: int) -> Callable[[], object]:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _memory(bench: Bench) -> tuple[Ceiling, Ceiling]:
    """Return bytes/s of a copy, read and written, and of a sum, read, larger than any cache."""
    count = COPY_BYTES.get(bench.device.type, 1 << 30) // 4
    source = torch.ones(count, device=bench.device)
    target = torch.empty_like(source)
    copies = bench.seconds(lambda: target.copy_(source))
    reads = bench.seconds(lambda: source.sum())
    size = 4 * count
    return Ceiling.of([2 * size / took for took in copies]), Ceiling.of([size / took for took in reads])


def _upload(bench: Bench) -> Ceiling:
    """Return bytes/s from pinned memory of the host."""
    source = torch.ones(1 << 26)
    with suppress(RuntimeError):
        source = source.pin_memory()
    target = torch.empty_like(source, device=bench.device)
    took = bench.seconds(lambda: target.copy_(source, non_blocking=True))
    return Ceiling.of([source.nbytes / one for one in took])


def _launch(bench: Bench) -> Ceiling:
    """Return the seconds of one small operator among LAUNCHES in a row."""
    one = torch.zeros(1, device=bench.device)

    def launches() -> None:
        for _ in range(LAUNCHES):
            one.add_(1)

    return Ceiling.of([took / LAUNCHES for took in bench.seconds(launches)])
