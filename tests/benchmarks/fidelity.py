"""Are the numbers right? Sums, known delays and the split made for real, as `profkit verify` finds them; and the same
tokens on every architecture of the zoo, where it is at hand.

    python tests/benchmarks/fidelity.py [--models NAME ...] [--repeats 15] [--tokens 8] [--long]

Every figure stands beside its bound. The peer is the way that people split by hand: the vision tower timed alone ahead
of generate(), which encodes twice. One thread by default, so that another process does not stall an operator's threads.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from time import perf_counter_ns

import torch

import profkit
from profkit import checks, invariance, models, passes, samples, stats, tracing, verification
from profkit.text import figure

MARKS = {True: "pass", False: "FAIL", None: "open"}
ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
SHOWN = ("sums", "same", "decoupled", "delay", "overhead", "encoded")


def by_hand(loaded: models.Loaded, kwargs: dict, run: profkit.Run, repeats: int) -> str:
    """Return what the published way of splitting gives: the encoding alone, then generate(), added up."""
    anatomy = run.anatomy
    tower = loaded.model.get_submodule(anatomy.paths("vision_tower")[0])
    seen: list[tuple] = []
    hook = tower.register_forward_pre_hook(lambda module, args, given: seen.append((args, given)), with_kwargs=True)
    loaded.model.generate(**kwargs)  # type: ignore[operator]
    hook.remove()
    alone, whole = [], []
    for _ in range(repeats):
        begin = perf_counter_ns()
        with torch.no_grad():
            for args, given in seen:
                tower(*args, **given)
        middle = perf_counter_ns()
        loaded.model.generate(**kwargs)  # type: ignore[operator]
        alone.append((middle - begin) / 1e6)
        whole.append((perf_counter_ns() - middle) / 1e6)
    first, second = stats.median(alone), stats.median(whole)
    return (
        f"by hand: tower alone {first:.1f} ms, generate() {second:.1f} ms, together {first + second:.1f} ms: "
        f"{first / second:.0%} too much, as the tower runs twice"
    )


def of_zoo() -> str:
    """Return on how many architectures of the zoo tokens, random state and model are the same with every instrument."""
    if not (ZOO / "truth.json").exists():
        return "zoo: not here, so the same tokens were not asked of it"
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    wrong, checked, names = [], 0, sorted(json.loads((ZOO / "truth.json").read_text()))
    for name in names:
        model, kwargs = zoo.build(name)
        found = list(invariance.invariance(model, kwargs, profkit.inspect(model, **kwargs)))
        said = [one for one in found if one.check.startswith("same tokens")]
        checked += len(said)
        # A model that cannot be compared with itself is no pass.
        wrong += [f"{name}: {one.check}" for one in found if one.ok is False or (one in said and not one.ok)]
    figures = f"{len(names)} architectures, {checked} comparisons of tokens, {len(wrong)} wrong"
    return (
        f"{MARKS[not wrong]}  zoo: same tokens, random state, model    {figures}{': ' * bool(wrong)}{', '.join(wrong)}"
    )


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-llava", "tiny-video-llava", "tiny-eventgpt"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--long", action="store_true", help="what each figure means")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = models.choose_device(options.device)
    where = f"{device}, {options.threads} threads, torch {torch.__version__}"
    print(f"{options.repeats} repeats, {options.tokens} tokens, {where}")
    for name in options.models:
        loaded = models.load_model(name, device, weights="random" if name.endswith("7b") else "auto")
        sample = samples.sample_for(loaded.processor, loaded.model, [], None, options.tokens)
        given = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
        kwargs = {**passes.prepared(sample), **given}
        run = tracing.trace(loaded.model, sample=sample, options=given, repeat=options.repeats, profile=False, seed=0)
        print(f"\n{name}: {by_hand(loaded, kwargs, run, options.repeats)}")
        for one in verification.verify(loaded.model, kwargs, run, options.repeats):
            if one.check.startswith(SHOWN):
                sentence = one.sentence if options.long else ""
                print(f"{MARKS[one.ok]}  {one.check:38} {figure(one):34} {sentence}".rstrip())
        failed = [one.check for one in checks.failed(run) if one.check.startswith(SHOWN)]
        print(f"{name}: {'failed: ' + ', '.join(failed) if failed else 'nothing failed'}{_left_open(run)}")
    print(f"\n{of_zoo()}")


def _left_open(run: profkit.Run) -> str:
    """Return how many checks with a bound noise left open: they have not passed."""
    left = [one for one in checks.kept_verdicts(run) if one.check.startswith(SHOWN) and one.ok is None]
    count = sum(one.allowed == one.allowed for one in left)
    return f", {count} left open" if count else ""


if __name__ == "__main__":
    main()
