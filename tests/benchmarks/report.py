"""How long a report takes, how much memory, and how large it is: a long run, a run of a million events, many samples.

Each report is written by the command in a process of its own. The floor is plotly's own page of one empty figure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

WRITE = "import sys; from profkit.cli import main; sys.argv = ['profkit', 'report', *sys.argv[1:]]; main()"
FLOOR = "import sys, plotly.graph_objects as go; go.Figure().write_html(sys.argv[-1], include_plotlyjs=True)"


def deep_model(layers: int) -> tuple[Any, dict[str, Any]]:
    """Return a narrow LLaVA of many layers, and the arguments of its generate()."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=100,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=99)
    ).eval()
    model.generation_config.pad_token_id = 0
    ids = torch.tensor([[1, *[99] * 4, 5, 6, 7]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 28, 28)}


def long_run(folder: Path, tokens: int, layers: int, profiled: int) -> int:
    """Trace a generation of many tokens, save it, and return how many events its trace holds."""
    import profkit
    from profkit import chrome

    model, kwargs = deep_model(layers)
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    run = profkit.trace(
        model, {**kwargs, **lengths}, out=folder, repeat=2, profile_steps=range(profiled), trace_budget_bytes=10**9
    )
    assert run.trace_json is not None
    return len(chrome.parse(run.trace_json).events)


def many_samples(folder: Path, samples: int, seed: int) -> None:
    """Write a run over samples, as `profkit trace --samples` leaves it."""
    from profkit import sample_runs

    folder.mkdir()
    about = {"model": folder.name, "model_class": "Made", "dtype": "float32", "device": "cpu", "listed": samples}
    sample_runs.write_manifest(folder, about)
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(samples):
        names = ("load", "preprocess", "vision", "projector", "merge", "prefill", "decode", "head", "select", "other")
        times = {name: int(draw.lognormal(14, 0.3)) for name in names}
        sizes = {"prompt_tokens": 600, "new_tokens": 45, "batch": 1, "media_items": 1, "cached": None, "rank": 0}
        rows.append({"id": f"{number}", "error": "", "total_ns": sum(times.values()), "stages_ns": times, **sizes})
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))


def measured(code: str, *arguments: str) -> tuple[float, float]:
    """Return the seconds and the peak MiB of a process."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} failed")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def row(what: str, seconds: float, mebibytes: float, page: Path, allowed: tuple[float, float, float]) -> None:
    """Print a line: what was measured, and whether it keeps its bounds (s, MiB, MB)."""
    found = (seconds, mebibytes, page.stat().st_size / 1e6)
    kept = "ok" if all(one <= most for one, most in zip(found, allowed, strict=True)) else "MISSED"
    print(f"{what:<50} {found[0]:6.2f} s {found[1]:7.0f} MiB {found[2]:6.2f} MB   {kept}")


def main() -> None:
    """Make the runs, write their reports, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--profiled", type=int, default=170, help="steps that the profiler records")
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    never = float("inf")
    with tempfile.TemporaryDirectory(prefix="profkit-") as name:
        folder = Path(name)
        # In a process of its own: children begin with the peak of the process that starts them.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            events = pool.submit(long_run, folder / "long", options.tokens, options.layers, options.profiled).result()
        systems = [folder / system for system in ("one", "two", "three")]
        for seed, system in enumerate(systems):
            many_samples(system, options.samples, seed)
        page = folder / "page.html"
        print(f"{'report of':<50} {'time':>8} {'peak':>11} {'page':>9}")
        row("floor: plotly's page of nothing", *measured(FLOOR, str(page)), page, (never,) * 3)
        page.unlink()
        what = f"{options.tokens} tokens, {options.layers} layers, {events:,} events"
        bounds = (10, 1024, 6)
        row(what, *measured(WRITE, str(folder / "long"), "--out", str(page)), page, bounds)
        page.unlink()
        seconds = measured(WRITE, *map(str, systems), "--out", str(page))
        row(f"{options.samples} samples x {len(systems)} systems", *seconds, page, bounds)


if __name__ == "__main__":
    main()
