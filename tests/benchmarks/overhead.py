"""What the instrument costs on a dispatch-bound LLaVA: plain, empty hooks and profkit, side by side in one run.

    python tests/benchmarks/overhead.py [--rounds 40] [--tokens 64]

In every round each variant runs once, in random order; a row is the median over rounds of the ratio of two variants
in the same round, so that what a busy machine adds falls on all alike. "plain again" over plain is the noise: a
difference smaller than that says nothing. One thread by default: operators this small gain nothing from more,
and waiting for a second thread is what makes such runs noisy. Variants under the profiler run in a sixth of the rounds.
"""

from __future__ import annotations

import argparse
import gc
import random
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


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, kwargs = dispatch_bound_llava(), inputs(options.tokens)
    found = structure.find(model)

    def profkit(granularity: Granularity) -> Run:
        return lambda: probes.Instrument(model, found, Ledger(), granularity)

    def hooks(granularity: Granularity) -> Run:
        return lambda: empty_hooks(model, found, granularity)

    variants: dict[str, Run] = {"plain": nullcontext, "plain again": nullcontext}
    for granularity in ("stage", "layer", "module"):
        variants[f"empty hooks, {granularity}"] = hooks(granularity)
        variants[f"profkit, {granularity}"] = profkit(granularity)
    under_profiler: dict[str, Run] = {
        "plain": nullcontext,
        "profiler, no ranges": lambda: profiled(model, found, False),
        "profiler, ranges": lambda: profiled(model, found, True),
    }

    def seconds(variant: Run) -> float:
        gc.collect()
        with variant():
            begin = time.perf_counter()
            model.generate(**kwargs)  # type: ignore[operator]
            return time.perf_counter() - begin

    for variant in (*variants.values(), *variants.values()):
        seconds(variant)
    rounds = in_random_order(variants, options.rounds, seconds)
    slow_rounds = in_random_order(under_profiler, max(options.rounds // 6, 1), seconds)
    rows: list[tuple[str, str, float | None]] = [
        ("plain again", "plain", None),
        ("empty hooks, stage", "plain", None),
        ("profkit, stage", "plain", 1.02),
        ("empty hooks, layer", "plain", None),
        ("profkit, layer", "plain", 1.05),
        ("empty hooks, module", "plain", None),
        ("profkit, module", "plain", None),
        ("profkit, module", "empty hooks, module", 1.10),
        ("profiler, no ranges", "plain", None),
        ("profiler, ranges", "plain", None),
        ("profiler, ranges", "profiler, no ranges", 1.10),
    ]
    print(f"{options.tokens} tokens, {len(rounds)} rounds ({len(slow_rounds)} under the profiler),", end=" ")
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    print(f"{'measured':<21}{'over':<21}{'median':>8}{'p25':>8}{'p75':>8}{'fastest':>9}{'allowed':>9}")
    for name, over, allowed in rows:
        times = slow_rounds if name in under_profiler and name != "plain" else rounds
        ratios = [one[name] / one[over] for one in times]
        low, middle, high = (stats.percentile(ratios, q) for q in (25, 50, 75))
        fastest = min(one[name] for one in times) / min(one[over] for one in times)
        verdict = "" if allowed is None else f"{allowed:>9.2f} {'ok' if middle <= allowed else 'MISSED'}"
        print(f"{name:<21}{over:<21}{middle:>8.3f}{low:>8.3f}{high:>8.3f}{fastest:>9.3f}{verdict}", flush=True)


def in_random_order(variants: dict[str, Run], rounds: int, seconds: Callable[[Run], float]) -> list[dict[str, float]]:
    """Return the time of each variant in each round."""
    order, random_number = list(variants), random.Random(0)
    times: list[dict[str, float]] = []
    for _ in range(rounds):
        random_number.shuffle(order)
        times.append({name: seconds(variants[name]) for name in order})
    return times


if __name__ == "__main__":
    main()
