"""All experiments on a model whose run is at hand, and their verdicts beside the run's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from profkit import annotate
from profkit.checks import kept_verdicts
from profkit.decoupled import decoupled
from profkit.delays import delays
from profkit.environment import preserved_random_state
from profkit.invariance import invariance
from profkit.overhead import overhead_by_stage
from profkit.run import Run, plain
from profkit.verdicts import Verdict


def verify(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    run: Run,
    repeats: int = 15,
    progress: Callable[[str], object] = str,
) -> list[Verdict]:
    """Make the experiments, add their verdicts to the run's, and return all of them.

    `kwargs` are those of generate(); experiments decode greedily, as they compare tokens, unless they say otherwise.
    """
    greedy = {**kwargs, "do_sample": False}
    found = kept_verdicts(run)
    with preserved_random_state():
        progress("the same tokens, with and without probes")
        found += invariance(model, greedy, run.anatomy)
        progress("what marks add to each stage")
        found += overhead_by_stage(model, kwargs, run.anatomy, run.manifest["plan"]["granularity"], repeats)
        progress("media encoded alone")
        found += decoupled(model, greedy, run.anatomy, repeats)
        progress("known delays")
        found += delays(model, greedy, run.anatomy, repeats=repeats)
    run.manifest["checks"]["verdicts"] = kept = [asdict(one) for one in found]
    if run.trace_json is not None:
        run.trace_json = annotate.with_checks(run.trace_json, plain(kept))
    return found
