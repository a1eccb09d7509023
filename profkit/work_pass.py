"""The part of a trace that comes after everything timed: work counted, media tokens told apart, ceilings looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from profkit import ceilings, energy_pass, prompts, workload
from profkit.run import Run


def add_work(result: Run, model: nn.Module, prepared: Callable[[], Mapping[str, Any]], plan: Mapping[str, Any]) -> None:
    """Count what a run's generate() does, and add it to the run; what goes wrong is noted there, and the run stays.

    `prepared` gives generate()'s arguments, anew each time; `plan` is that of the run.
    """
    made, notes = result.representative.steps, result.manifest["notes"]
    steps, tokens = len(made), int((~made.prefill).sum()) + 1
    try:
        result.work = workload.count(
            model, prepared(), result.anatomy, granularity=plan["granularity"], new_tokens=tokens
        )
    except Exception as error:
        notes.append(f"the work was not counted: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return
    if result.work.about["steps"] != steps:
        notes.append(f"the work is that of {result.work.about['steps']} steps, the clean pass made {steps}")
    try:
        result.manifest["media_tokens"] = prompts.media_tokens(model, prepared(), result.anatomy)
    except Exception as error:
        notes.append(f"how many tokens are media is not known: {type(error).__name__}")
    about = result.manifest
    result.ceilings = ceilings.kept_for(
        about["device_name"], about["versions"]["torch"], about["threads"], about["driver"]
    )


def add_energy(result: Run, model: nn.Module, prepared: Callable[[], Mapping[str, Any]]) -> None:
    """Measure joules by stage and add them to the run's manifest as `energy`; what is not measured is noted."""
    notes, tokens = result.manifest["notes"], result.latency().new_tokens
    try:
        found = energy_pass.measure(model, prepared, result.anatomy, tokens)
    except Exception as error:
        notes.append(f"energy was not measured: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        return
    notes += found.pop("notes")
    result.manifest["energy"] = found
