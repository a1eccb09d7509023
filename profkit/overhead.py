"""What the instrument adds to each stage: a finer granularity's marks against those of stages alone, in turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from profkit import arguments, stages, stats, tables
from profkit.anatomy import Anatomy
from profkit.capture import profile
from profkit.checks import COST, NOTABLE
from profkit.plan import Granularity
from profkit.verdicts import Verdict, at_most, known

REPEATS = 15


def overhead_by_stage(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    anatomy: Anatomy,
    granularity: Granularity = "layer",
    repeats: int = REPEATS,
) -> Iterator[Verdict]:
    """Yield, for each stage of notable share, what the marks inside it add to it.

    Without any mark a stage has no time of its own; what the few at its ends add is in the whole's overhead.
    At stage granularity there are no others, and nothing is yielded. Outputs must be of one length: `kwargs` greedy.
    """
    if granularity == "stage":
        return
    coarse, fine = [], []
    steps: set[int] = set()
    for number in range(repeats):
        pair: dict[str, np.ndarray] = {}
        for which in ("stage", granularity) if number % 2 == 0 else (granularity, "stage"):
            with profile(model, granularity=which, anatomy=anatomy) as run:
                model.generate(**arguments.fresh(kwargs))  # type: ignore[operator]
            steps.add(len(run.representative.steps))
            pair[which] = tables.stage_ns(run.representative)
        coarse.append(pair["stage"])
        fine.append(pair[granularity])
    if len(steps) > 1:
        said = f"outputs took from {min(steps)} to {max(steps)} steps, so that times of stages cannot be held together"
        yield known("overhead: by stage", float("nan"), "", said)
        return
    bare, full = np.array(coarse, dtype=float), np.array(fine, dtype=float)
    share = stats.medians(bare / bare.sum(axis=1, keepdims=True))
    for stage in np.flatnonzero(share > NOTABLE):
        base, other = bare[:, stage], full[:, stage]
        over = stats.median_ratio(base, other, paired=True) - 1
        low, high = stats.ratio_interval(base, other, paired=True)
        said = f"{granularity} over stage granularity, in pairs of alternating order"
        yield at_most(f"overhead: {stages.NAMES[stage]}", over, (low - 1, high - 1), COST[granularity], said)
