"""All experiments on a model whose run is at hand, and their verdicts beside the run's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from profkit import annotate, arguments
from profkit.checks import kept_verdicts
from profkit.decoupled import decoupled
from profkit.delays import delays
from profkit.directories import plain
from profkit.environment import preserved_random_state
from profkit.invariance import invariance
from profkit.overhead import overhead_by_stage
from profkit.run import Run
from profkit.verdicts import Verdict, unsettled


def verify(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    run: Run,
    repeats: int = 15,
    progress: Callable[[str], object] = str,
) -> list[Verdict]:
    """Make the experiments, add their verdicts to the run's, and return all of them.

    `kwargs` are those of generate(); experiments decode greedily, as they compare tokens, unless they say otherwise.
    An experiment that fails is said to be open, and the others go on.
    """
    greedy, anatomy = arguments.greedy(model, kwargs), run.anatomy
    granularity = run.manifest["plan"]["granularity"]
    experiments = {
        "the same tokens, with and without probes": invariance(model, greedy, anatomy),
        "what marks add to each stage": overhead_by_stage(model, greedy, anatomy, granularity, repeats),
        "media encoded alone": decoupled(model, greedy, anatomy, repeats),
        "known delays": delays(model, greedy, anatomy, repeats=repeats),
    }
    found = kept_verdicts(run)
    with preserved_random_state():
        for name, verdicts in experiments.items():
            progress(name)
            try:
                found.extend(verdicts)
            except Exception as error:
                said = f"could not be made: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                found.append(unsettled(f"experiment: {name}", float("nan"), 0, "errors", said))
    run.manifest["checks"]["verdicts"] = kept = [asdict(one) for one in found]
    if run.trace_json is not None:
        run.trace_json = annotate.with_checks(run.trace_json, plain(kept))
    return found
