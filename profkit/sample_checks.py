"""Verdicts on a run over many samples: what its rows alone can tell."""

from __future__ import annotations

from profkit.sample_runs import SampleRun
from profkit.verdicts import Verdict, bounded, known


def verdicts(run: SampleRun) -> list[Verdict]:
    """Return every verdict that the rows allow."""
    good = run.good
    stages = [name for name in good if str(name).startswith("stage:")]
    missed = (good[stages].fillna(0).sum(axis=1) - good["total_ns"]).abs().max() if len(good) else 0
    again = int((good["encoded_again_ms"] > 0).sum()) if "encoded_again_ms" in good else 0
    said = "the largest miss of a sample's stages from its total"
    found = [
        bounded("sums: stages", float(missed), 0, "ns", said),
        bounded("samples", len(run.bad), 0, "in error", f"of {len(run.rows)} samples"),
        bounded("encoded twice", again, 0, "samples", "in which a tower ran more often than its inputs call for"),
    ]
    if "faults" in good:
        broken = int((good["faults"] > 0).sum())
        found.append(bounded("capture: instrument", broken, 0, "samples", "with errors inside the instrument"))
    said = "one pass a sample, without a control: tokens, cost and steadiness are for a run of one sample, or verify"
    return [*found, known("overhead", float("nan"), "", said)]
