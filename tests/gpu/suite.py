"""Everything that only a device can show, in one run: python -m tests.gpu.suite --out DIR.

Under eight minutes on an H100-class device. Writes DIR/results.json, after each part, DIR/summary.txt, and the small
runs as DIR/runs.tar.gz. A part that fails, or for which no time is left, is recorded as such, and the next one follows.
With --device cpu --tiny the same script runs from end to end without a device.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import profkit
from profkit import analysis, comparison, decoupled, delays, environment, models, passes, samples, stats, tracing
from profkit.directories import plain
from profkit.run import Run
from profkit.verdicts import Verdict
from tests.gpu.summary import summary

SYSTEMS = ("llava-1.5-7b", "video-llava-7b", "eventgpt-7b")
TINY = {"llava-1.5-7b": "tiny-llava", "video-llava-7b": "tiny-video-llava", "eventgpt-7b": "tiny-eventgpt"}
LENGTHS = (45, 102)
"""New tokens, as in the published case."""
SPINS_MS = (1.0, 10.0, 50.0)
TRACE_BYTES = 2_000_000


@dataclass
class Suite:
    """One run of the suite."""

    device: torch.device
    tiny: bool
    out: Path
    budget_s: float
    pairs: int
    lengths: tuple[int, ...] = LENGTHS
    begin: float = field(default_factory=time.monotonic)
    results: dict[str, Any] = field(default_factory=dict)

    def part(self, name: str, work: Callable[[], Any], expected_s: float = 0.0) -> None:
        """Do one part and keep what it gave, or why it gave nothing."""
        left = self.budget_s - (time.monotonic() - self.begin)
        start = time.monotonic()
        if left < expected_s:
            self.results[name] = {"not_run": f"{left:.0f} s are left of {self.budget_s:.0f}, it takes {expected_s:.0f}"}
        else:
            try:
                self.results[name] = work()
            except Exception as error:
                traceback.print_exc()
                self.results[name] = {"failed": f"{type(error).__name__}: {error}"}
        self.results.setdefault("seconds", {})[name] = round(time.monotonic() - start, 1)
        print(f"{time.monotonic() - self.begin:7.1f} s  {name}", flush=True)
        (self.out / "results.json").write_text(json.dumps(plain(self.results), indent=1) + "\n")

    def loaded(self, name: str) -> models.Loaded:
        """Load a system with random weights: full size in bfloat16, or its small sibling."""
        dtype = None if self.tiny else torch.bfloat16
        return models.load_model(TINY[name] if self.tiny else name, self.device, dtype, "random")

    def traced(self, loaded: models.Loaded, tokens: int, save: str = "", **options: Any) -> Run:
        """Trace a system at a fixed output length; keep the run under a name, if one is given."""
        sample = samples.sample_for(loaded.processor, loaded.model, [], None, tokens)
        given = {**_length(tokens), **options.pop("generate", {})}
        about = {"model": loaded.name, "weights": "random", "media_items": sample.media_items}
        plan = {
            "repeat": 3,
            "profile_steps": frozenset(range(3)),
            "trace_budget_bytes": TRACE_BYTES,
            "seed": 0,
        } | options
        target = self.out / "runs" / save if save else None
        return tracing.trace(loaded.model, sample=sample, options=given, manifest=about, out=target, **plan)


def _length(tokens: int) -> dict[str, Any]:
    return {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}


def about(suite: Suite) -> dict[str, Any]:
    """Return what was measured with."""
    return {
        "device": environment.device_name(suite.device),
        "device_type": suite.device.type,
        "size": "tiny" if suite.tiny else "7B, random bfloat16 weights",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": environment.describe(torch.nn.Module())["versions"]["transformers"],
        "profkit": profkit.__version__,
    }


def tests(suite: Suite) -> dict[str, Any]:
    """Run the tests for a device."""
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    return {"status": done.returncode, "said": done.stdout.strip().splitlines()[-8:]}


def _figures(run: Run) -> dict[str, Any]:
    """Return what a table of systems shows of a run."""
    kernels = run.kernels
    owned = None
    if kernels is not None and len(kernels):
        total = kernels["total_ms"].sum()
        owned = {
            "in_stages": float(kernels.loc[kernels["stage"] != "outside", "total_ms"].sum() / total),
            "in_modules": float(kernels.loc[kernels["path"] != "", "total_ms"].sum() / total),
        }
    trace = run.path / "trace.json.gz" if run.path else None
    return {
        "stages": run.breakdown().reset_index().to_dict(orient="records"),
        "device_stages": [] if run.device is None else run.device.to_dict(orient="records"),
        "latency": asdict(run.latency()),
        "overhead": run.overhead(),
        "kernels_owned": owned,
        "memory": [] if run.memory is None else run.memory.reset_index().to_dict(orient="records"),
        "cache_bytes_per_token": run.cache_bytes_per_token(),
        "trace_bytes": trace.stat().st_size if trace is not None and trace.exists() else None,
        "verdicts": run.manifest["checks"]["verdicts"],
        "notes": run.manifest["notes"],
        "same_tokens": run.manifest["checks"]["same_tokens"],
    }


def systems(suite: Suite, name: str) -> Iterator[tuple[str, Callable[[], Any], float]]:
    """Yield the parts about one system, which is loaded once."""
    kept: dict[str, Any] = {}

    def model() -> models.Loaded:
        if "loaded" not in kept:
            kept["loaded"] = suite.loaded(name)
        return kept["loaded"]

    for tokens in suite.lengths:

        def sdpa(tokens: int = tokens) -> dict[str, Any]:
            return _figures(suite.traced(model(), tokens, f"{name}-{tokens}"))

        def eager(tokens: int = tokens) -> dict[str, Any]:
            models.choose_attention(model().model, "eager")
            found = _figures(suite.traced(model(), tokens, repeat=2, profile=False, work=False))
            models.choose_attention(model().model, "sdpa")
            return found

        yield f"{name}, {tokens} tokens, sdpa", sdpa, 20
        yield f"{name}, {tokens} tokens, eager", eager, 20
    if name == SYSTEMS[0]:
        yield "overhead", lambda: overhead(suite, model()), 60
        yield "decoupled truth", lambda: _verdicts(decoupled.decoupled(*_case(model(), 8), 9)), 30
        yield "known delays", lambda: spins(suite, model()), 45
    for number, tokens in enumerate(suite.lengths):
        # The first compiles.
        yield f"{name}, {tokens} tokens, static cache", partial(static, suite, model, tokens), 20 if number else 90


def static(suite: Suite, model: Callable[[], models.Loaded], tokens: int) -> dict[str, Any]:
    """Trace with a static cache: on a device generate() compiles its decode step, into graphs."""
    generate = {"cache_implementation": "static"}
    found = _figures(
        suite.traced(model(), tokens, generate=generate, repeat=2, profile_steps=frozenset({0, 2}), work=False)
    )
    return {**found, "graphs_compiled": environment.graphs_compiled()}


def _case(loaded: models.Loaded, tokens: int) -> tuple[torch.nn.Module, dict[str, Any], Any]:
    """Return a model, the arguments of its generate(), and its anatomy."""
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, tokens)
    kwargs = {**passes.prepared(sample), **_length(tokens)}
    return loaded.model, kwargs, profkit.inspect(loaded.model, **kwargs)


def overhead(suite: Suite, loaded: models.Loaded) -> dict[str, Any]:
    """Compare instrumented with plain runs in alternating pairs: whole outputs, and the first token alone."""
    found = {}
    cases = [("stage", suite.lengths[0]), ("layer", suite.lengths[0]), ("module", suite.lengths[0]), ("stage", 1)]
    for granularity, tokens in cases:
        run = suite.traced(loaded, tokens, repeat=suite.pairs, granularity=granularity, profile=False)
        plain_ns, clean_ns = (
            np.array([one.generate_ns for one in run.of_kind(kind)], dtype=float) for kind in ("control", "clean")
        )
        low, high = stats.ratio_interval(plain_ns, clean_ns, paired=True)
        found[f"{granularity}, {tokens} token{'s' if tokens > 1 else ' (TTFT)'}"] = {
            "ratio": stats.median_ratio(plain_ns, clean_ns, paired=True),
            "low": low,
            "high": high,
            "pairs": len(plain_ns),
            "plain_ms": float(np.median(plain_ns) / 1e6),
        }
    return found


def _verdicts(found: Iterator[Verdict]) -> list[dict[str, Any]]:
    return [asdict(one) for one in found]


def spins(suite: Suite, loaded: models.Loaded) -> dict[str, Any]:
    """Put delays of known length into each part; on a device they are kernels that spin."""
    case = _case(loaded, 4)
    waits = SPINS_MS if suite.device.type == "cuda" else SPINS_MS[-1:]
    return {f"{wait:g} ms": _verdicts(delays.delays(*case, wait_ms=wait, repeats=3)) for wait in waits}


def side_by_side(suite: Suite) -> dict[str, Any]:
    """Compare the systems at each length, as profkit compare does."""
    found = {}
    for tokens in suite.lengths:
        base, *others = (comparison.read(suite.out / "runs" / f"{name}-{tokens}") for name in SYSTEMS)
        for other in others:
            rows = comparison.compare(base, other).reset_index().to_dict(orient="records")
            sentence = comparison.gap(base, other).sentence(base.name, other.name)
            found[f"{tokens} tokens: {other.name} over {base.name}"] = {"rows": rows, "sentence": sentence}
    return found


def attribution_speed(suite: Suite) -> dict[str, Any]:
    """Read the largest trace of this run and attribute it."""
    path = max((suite.out / "runs").glob("*/trace.json.gz"), key=lambda one: one.stat().st_size)
    begin = time.perf_counter()
    found = analysis.analyze(path)
    elapsed = time.perf_counter() - begin
    return {"events": found.events, "seconds": elapsed, "us_an_event": elapsed / found.events * 1e6}


def pack(out: Path) -> None:
    """Pack the runs, which are many small files, into one."""
    with tarfile.open(out / "runs.tar.gz", "w:gz") as tar:
        tar.add(out / "runs", arcname="runs")
    shutil.rmtree(out / "runs")


def main() -> None:
    """Run the suite."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="the systems' small siblings")
    parser.add_argument("--budget", type=float, default=460, help="seconds in all")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="new tokens")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = models.choose_device(options.device)
    suite = Suite(device, options.tiny, options.out, options.budget, options.pairs, tuple(options.lengths))
    suite.part("about", lambda: about(suite))
    if device.type != "cpu":
        suite.part("tests", lambda: tests(suite), 60)
    for name in SYSTEMS:
        for part, work, expected_s in systems(suite, name):
            suite.part(part, work, 0 if suite.tiny else expected_s)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    suite.part("side by side", lambda: side_by_side(suite))
    suite.part("attribution", lambda: attribution_speed(suite))
    pack(options.out)
    text = summary(json.loads((options.out / "results.json").read_text()))
    (options.out / "summary.txt").write_text(text + "\n")
    print(text)
    found = {name: one for name, one in suite.results.items() if isinstance(one, dict)}
    missing = [name for name, one in found.items() if "failed" in one or "not_run" in one]
    if missing:
        sys.exit(f"failed or not run: {', '.join(missing)}")


if __name__ == "__main__":
    main()
