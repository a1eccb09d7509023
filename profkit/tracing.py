"""Whole traces of an unmodified generate() → Run: of one model, or of several in turn."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from profkit import directories, kineto
from profkit.anatomy import Anatomy, PartNames
from profkit.environment import preserved_random_state
from profkit.errors import InputError
from profkit.passes import Plan, Sample, Tracing
from profkit.run import Run
from profkit.wrapping import unwrapped


def trace(
    model: nn.Module,
    generate_kwargs: Mapping[str, Any] | None = None,
    *,
    sample: Sample | None = None,
    options: Mapping[str, Any] | None = None,
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
    anatomy: Anatomy | None = None,
    parts: PartNames | None = None,
    manifest: Mapping[str, Any] | None = None,
    **plan: Any,
) -> Run:
    """Measure generate() clean and explain it profiled; save the run to `out` if given.

    Either `generate_kwargs`, or a `sample` whose loading, preprocessing and transfer are measured too; `options`
    are added to what it gives to generate(). `plan` may give warmup (1), repeat (6 clean passes, the fewest that tell
    an interval of their median, each beside an uninstrumented control), granularity ("layer"), profile (True: one pass
    inside torch.profiler), profile_steps (the steps it records: 0 to 4), trace_budget_bytes (50 MB: what the
    compressed trace may take; later steps are left out of it), work (True: FLOPs and bytes are counted afterwards, see
    work.Work), energy (False: joules by stage, afterwards, where a counter can be read, see energy_pass.measure), seed
    (of every pass; None: the current random state), and progress (called with a sentence as each part begins). The
    random state is left as it was. `parts` names parts
    that are known better than inspect() finds them, `anatomy` all of them.

    Raises InputError for a target that cannot be written, AnatomyError for a model that cannot be measured,
    MeasurementError if generate() fails.
    """
    what, model = Plan(**plan), unwrapped(model)
    target = Path(out) if out is not None else None
    if target is not None:
        directories.check_target(target, force)
    if what.profile:
        kineto.refuse_other_profilers()
    if (sample is None) == (generate_kwargs is None):
        raise InputError("trace() takes either generate_kwargs or a sample, not both and not neither.")
    with preserved_random_state():
        tracing = Tracing(model, sample, {**(generate_kwargs or {}), **(options or {})}, anatomy, parts, what)
        tracing.prepare()
        for number in range(what.repeat):
            tracing.repeat(number)
        result = tracing.finished(dict(manifest or {}))
    if target is not None:
        result.save(target, force)
    return result


def trace_together(cases: Sequence[tuple[nn.Module, Mapping[str, Any] | Sample]], **plan: Any) -> list[Run]:
    """Measure several models repeat by repeat in turn, and return a run for each: what compare() can hold in pairs.

    What a machine does in the meantime (other work, clocks that rise and fall) falls on all of them alike, so that
    small differences show which runs made one after the other would drown. A case is a model with its generate()
    arguments or with a sample; a model may stand in several. `plan` as in trace(). Raises what trace() raises.
    """
    what = Plan(**plan)
    if what.profile:
        kineto.refuse_other_profilers()
    with preserved_random_state():
        tracings = []
        for model, given in cases:
            kwargs, sample = (dict(given), None) if isinstance(given, Mapping) else ({}, given)
            tracings.append(Tracing(unwrapped(model), sample, kwargs, None, None, what))
        for one in tracings:
            one.prepare()
        for number in range(what.repeat):
            for one in tracings if number % 2 == 0 else reversed(tracings):
                one.repeat(number)
        return [one.finished({"together": f"{tracings[0].started_unix_ns}-{os.getpid()}"}) for one in tracings]
