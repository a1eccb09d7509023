"""Does the comparison say what is so? Identical models, and one whose projector is slower by a known 10 %.

    python tests/benchmarks/comparison.py [--pairs 20] [--repeat 60] [--slower 10]

In every pair two models are measured in turn, once in each repeat, and compared. Of identical models no row may differ
in 95 % of the pairs; a slowed projector must be found, and nothing else with it. The slowed one waits, inside
its projector, for the given share of what the projector itself took. "apart" compares identical models that were
measured one after the other, which is what two separate runs are: what the machine did meanwhile is then a difference.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from profkit import models, samples, stats, tracing
from profkit.comparison import compare, of_run

MODEL, TOKENS = "tiny-llava", 2
OPTIONS = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}


def slow_down(module: nn.Module, share: float) -> None:
    """Make every call of a module take longer by a share of its time."""
    inner = module.forward

    def slowed(*args: Any) -> Any:
        begin = time.perf_counter()
        output = inner(*args)
        end = begin + (time.perf_counter() - begin) * (1 + share)
        while time.perf_counter() < end:
            pass
        return output

    module.forward = slowed


def case() -> tuple[nn.Module, dict[str, Any]]:
    """Return a model and its generate() arguments."""
    loaded = models.load_model(MODEL, torch.device("cpu"))
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, TOKENS)
    return loaded.model, {**sample.transfer(sample.preprocess(sample.load())), **OPTIONS}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=60)
    parser.add_argument("--slower", type=float, default=10, help="per cent")
    options = parser.parse_args()
    plan = {"repeat": options.repeat, "profile": False, "seed": 0, "granularity": "stage"}
    # One thread: what another process does to the threads of an operator is no part of the question.
    torch.set_num_threads(1)
    one, same, slowed = case(), case(), case()
    slow_down(slowed[0].get_submodule("model.multi_modal_projector"), options.slower / 100)

    seen: dict[str, list[Any]] = {"identical": [], "slowed": [], "apart": []}
    for number in range(options.pairs):
        pair = (one, same) if number % 2 == 0 else (same, one)
        seen["identical"].append(compare(*map(of_run, tracing.trace_together(pair, **plan))))
        if number % 4 == 0:
            apart = [tracing.trace(model, kwargs, **plan) for model, kwargs in pair]
            seen["apart"].append(compare(*map(of_run, apart)))
        if number % 2 == 0:
            seen["slowed"].append(compare(*map(of_run, tracing.trace_together((one, slowed), **plan))))

    print(
        f"{MODEL}, {TOKENS} tokens, {options.repeat} repeats, {options.pairs} pairs of runs, torch {torch.__version__}"
    )
    print(f"{'':34}{'pairs':>7}{'none differs':>14}{'projector':>11}{'other stage':>13}{'projector ratio, median':>25}")
    for name, tables in seen.items():
        stages = [table["differs"].drop(["total", "a new token"], errors="ignore") for table in tables]
        # Time an image counts the projector again.
        others = [row.drop(["projector", "encoding an image or frame"], errors="ignore").any() for row in stages]
        none, found = (np.mean([not table["differs"].any() for table in tables]), [row["projector"] for row in stages])
        ratio = stats.median([table.loc["projector", "ratio"] for table in tables])
        title = {"identical": "identical, in turn", "slowed": f"projector +{options.slower:g} %, in turn"}
        shown = title.get(name, "identical, one after the other")
        print(f"{shown:34}{len(tables):7}{none:14.0%}{np.mean(found):11.0%}{np.mean(others):13.0%}{ratio:25.3f}")


if __name__ == "__main__":
    main()
