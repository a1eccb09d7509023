"""The work of two runs side by side, and how far each is from its own limit."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from profkit.errors import InputError
from profkit.run import Run


def figures_of(run: Run) -> dict[str, float]:
    """Return a run's work and answers by name, nothing of a run whose work was not counted.

    FLOPs by stage, FLOPs and bytes of the middle decode step; with ceilings MFU of the prefill, MBU of decoding, and
    TTFT and TPOT over their floors.
    """
    if run.work is None:
        return {}
    by_stage, steps = run.work.stages(), run.work.steps()
    found = {f"FLOPs: {stage}": float(flops) for stage, flops in by_stage["flops"].items() if flops}
    decode = steps[steps["phase"] == "decode"]
    if len(decode):
        middle = decode.iloc[len(decode) // 2]
        found |= {"FLOPs: a decode step": float(middle["flops"]), "bytes: a decode step": float(middle["bytes"])}
    try:
        answers = run.roofline()
    except InputError:
        return found
    for stage, name in (("prefill", "mfu"), ("decode", "mbu")):
        if stage in answers.stages.index:
            found[f"{name.upper()}: {stage}"] = float(answers.stages[name][stage])
    one = answers.latencies
    found["TTFT over its floor"] = one.ttft_ms / one.ttft_floor_ms
    if one.tpot_floor_ms == one.tpot_floor_ms:
        found["TPOT over its floor"] = one.tpot_ms / one.tpot_floor_ms
    return {name: value for name, value in found.items() if value == value}


def side_by_side(base: Mapping[str, float], other: Mapping[str, float]) -> pd.DataFrame:
    """Return a row for each figure that both runs have: base, other and ratio; none unless both were counted."""
    rows = {name: (base[name], other[name], other[name] / base[name]) for name in base if name in other and base[name]}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["base", "other", "ratio"]).rename_axis("what")
