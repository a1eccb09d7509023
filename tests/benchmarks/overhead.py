"""What the instrument costs on a dispatch-bound LLaVA: plain, empty hooks and profkit, side by side in one run.

    python tests/benchmarks/overhead.py [--pairs 15] [--tokens 64]

Every row is a median of ratios over pairs; each side of a pair is the faster of two runs, made in the order ABBA,
since a busy machine only ever adds time. "fastest" is the ratio of the fastest run of each side. One thread by
default: operators this small gain nothing from more, and waiting for a second thread is what makes such runs noisy.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn

from profkit import kineto, probes, stats, structure
from profkit.anatomy import Anatomy
from profkit.ledger import Ledger
from profkit.plan import Granularity, forwards

Run = Callable[[], AbstractContextManager[Any]]


def dispatch_bound_llava() -> nn.Module:
    """Return a LLaVA of real depth (24-layer tower, 32-layer decoder) and hidden size 64."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=24,
        num_attention_heads=4,
        image_size=112,
        patch_size=14,
    )
    text = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4, vocab_size=512
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=500)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def inputs(tokens: int) -> dict[str, Any]:
    """Return generate() arguments: one 112-pixel image (64 tokens) and 20 tokens of text."""
    ids = torch.cat([torch.arange(10), torch.full((64,), 500), torch.arange(10)])[None]
    image = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image, **lengths}


@contextmanager
def empty_hooks(model: nn.Module, found: Anatomy, granularity: Granularity) -> Any:
    """The floor: hooks that do nothing, on the same modules."""
    handles: list[Any] = []
    for module, _, _ in forwards(model, found, granularity):
        handles.append(module.register_forward_pre_hook(lambda module, args: None))
        handles.append(module.register_forward_hook(lambda module, args, output: None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def profiled(model: nn.Module, found: Anatomy, ranges: bool) -> Any:
    """A pass inside torch.profiler with hooks, with or without profkit's ranges; every step is recorded."""
    session = kineto.Session(frozenset(range(10_000)), torch.device("cpu"), ranges=ranges)
    with ExitStack() as stack:
        stack.enter_context(session)
        stack.enter_context(
            probes.Instrument(model, found, Ledger(), "layer", None, session.wrap, session.on_iteration)
        )
        yield


def compare(run: Callable[[], None], measured: Run, reference: Run, pairs: int) -> tuple[float, float, float, float]:
    """Return median, p10 and p90 of the paired ratios of `measured` over `reference`, and that of the fastest."""
    ratios: list[float] = []
    fastest = {True: float("inf"), False: float("inf")}
    for number in range(pairs):
        times: dict[bool, list[float]] = {True: [], False: []}
        order = (True, False, False, True) if number % 2 else (False, True, True, False)
        for is_measured in order:
            gc.collect()
            with (measured if is_measured else reference)():
                begin = time.perf_counter()
                run()
                times[is_measured].append(time.perf_counter() - begin)
        ratios.append(min(times[True]) / min(times[False]))
        fastest = {side: min(fastest[side], *times[side]) for side in fastest}
    low, middle, high = (stats.percentile(ratios, q) for q in (10, 50, 90))
    return middle, low, high, fastest[True] / fastest[False]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, kwargs = dispatch_bound_llava(), inputs(options.tokens)
    found = structure.find(model)

    def run() -> None:
        model.generate(**kwargs)  # type: ignore[operator]

    def instrument(granularity: Granularity) -> Run:
        return lambda: probes.Instrument(model, found, Ledger(), granularity)

    def floor(granularity: Granularity) -> Run:
        return lambda: empty_hooks(model, found, granularity)

    for _ in range(3):
        run()

    def profiler(ranges: bool) -> Run:
        return lambda: profiled(model, found, ranges)

    rows: list[tuple[str, str, Run, Run, float | None]] = [
        ("plain (noise floor)", "plain", nullcontext, nullcontext, None),
        ("empty hooks, stage", "plain", floor("stage"), nullcontext, None),
        ("profkit, stage", "plain", instrument("stage"), nullcontext, 1.02),
        ("empty hooks, layer", "plain", floor("layer"), nullcontext, None),
        ("profkit, layer", "plain", instrument("layer"), nullcontext, 1.05),
        ("empty hooks, module", "plain", floor("module"), nullcontext, None),
        ("profkit, module", "plain", instrument("module"), nullcontext, None),
        ("profkit, module", "empty hooks", instrument("module"), floor("module"), 1.10),
        ("profiler, no ranges", "plain", profiler(False), nullcontext, None),
        ("profiler, ranges", "plain", profiler(True), nullcontext, None),
        ("profiler, ranges", "no ranges", profiler(True), profiler(False), 1.10),
    ]
    # A profiled run takes ten times as long as another, most of it after the part that is timed.
    slow = {"profiler, no ranges", "profiler, ranges"}
    few = "a third of them in rows without a bound or under the profiler"
    print(f"{options.tokens} tokens, {options.pairs} pairs ({few}),", end=" ")
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'measured':<22}{'over':<13}{'median':>8}{'p10':>8}{'p90':>8}{'fastest':>9}{'allowed':>9}")
    for name, over, measured, reference, allowed in rows:
        pairs = options.pairs if allowed is not None and name not in slow else max(options.pairs // 3, 1)
        middle, low, high, fastest = compare(run, measured, reference, pairs)
        verdict = "" if allowed is None else f"{allowed:>9.2f} {'ok' if middle <= allowed else 'MISSED'}"
        print(f"{name:<22}{over:<13}{middle:>8.3f}{low:>8.3f}{high:>8.3f}{fastest:>9.3f}{verdict}", flush=True)


if __name__ == "__main__":
    main()
