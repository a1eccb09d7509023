"""Two hundred samples of each tiny system: memory, and what everything but the samples' own stages takes.

    python tests/benchmarks/samples.py [--samples 200] [--tokens 32]

Images are crops of the photograph that ships with profkit, event streams windows of its stream; the video is one file
under many
ids. Bookkeeping is the wall time of a sample less that of its stages: putting probes on and off, tables, the row.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from profkit import event_streams, models, samples, sampling
from profkit.sample_lists import Item


def images(folder: Path, count: int) -> list[Item]:
    """Write crops."""
    with Image.open(samples.default_file("images")) as image:
        for number in range(count):
            left, top = number % 100, number % 60
            image.crop((left, top, left + 300, top + 230)).save(folder / f"{number:04}.jpg")
    return [Item(str(number), (folder / f"{number:04}.jpg",)) for number in range(count)]


def videos(folder: Path, count: int) -> list[Item]:
    """Name one video many times."""
    return [Item(str(number), (samples.default_file("videos"),)) for number in range(count)]


def events(folder: Path, count: int) -> list[Item]:
    """Write windows of 40 ms."""
    for number in range(count):
        begin = 150 * (number % 200)
        event_streams.cut(samples.default_file("events"), folder / f"{number:04}.npz", begin, begin + 40_000)
    return [Item(str(number), (folder / f"{number:04}.npz",)) for number in range(count)]


SYSTEMS: dict[str, Callable[[Path, int], list[Item]]] = {
    "tiny-llava": images,
    "tiny-video-llava": videos,
    "tiny-eventgpt": events,
}


def resident_mib() -> float:
    """Return the resident size of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    """Print a row a system."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    early = max(options.samples // 10, 1)
    print(f"{options.samples} samples a system, {options.tokens} new tokens, resident size after {early} and after all")
    print(f"{'system':<18}{'time':>8}{'a sample':>12}{'early':>10}{'all':>10}{'growth':>9}{'bookkeeping':>13}")
    for name, make in SYSTEMS.items():
        sizes: dict[int, float] = {}
        chosen = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}

        def note(done: int, total: int, failed: int, sizes: dict[int, float] = sizes) -> None:
            if done in (early, total):
                sizes[done] = resident_mib()

        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            items = make(folder, options.samples)
            loaded = models.load_model(name, torch.device("cpu"))
            plan = sampling.Plan(options.tokens, options=chosen, progress=note)
            manifest = sampling.describe(loaded.model, plan, {"model": name})
            begin = time.perf_counter()
            run = sampling.measure(loaded.model, loaded.processor, items, folder / "run", plan, manifest)
            seconds = time.perf_counter() - begin
        rows = run.good.iloc[1:]  # the first one also found the parts and warmed up
        bookkeeping = 1 - rows["total_ns"].sum() / 1e6 / rows["wall_ms"].sum()
        growth = sizes[options.samples] / sizes[early] - 1
        ok = growth <= 0.05 and bookkeeping <= 0.02 and len(run.bad) == 0
        each = f"{seconds:6.1f} s{seconds / options.samples * 1e3:9.1f} ms"
        memory = f"{sizes[early]:6.0f} MiB{sizes[options.samples]:6.0f} MiB{growth:9.1%}"
        print(f"{name:<18}{each}{memory}{bookkeeping:13.1%}   <= 5 %, <= 2 %  {'ok' if ok else 'MISSED'}")


if __name__ == "__main__":
    main()
