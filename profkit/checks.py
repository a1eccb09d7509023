"""What a run says of its own figures: sums, tokens, cost, dilation, steadiness, capture. Runs no model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

import numpy as np

from profkit import stages, stats, tables
from profkit.ledger import NO_TIME
from profkit.run import Run
from profkit.spans import Spans
from profkit.steadiness import steadiness
from profkit.verdicts import Verdict, at_most, bounded, known, unsettled

DEVICE_SUMS = 0.001
COST = {"stage": 0.01, "layer": 0.02, "module": 0.10}
"""What the instrument may add to generate(), as a share, by granularity."""
MUST_RUN = ("vision_tower", "audio_tower", "decoder_layers", "lm_head")
MAY_BE_USED = ("projector", "embed")
"""Parts whose weights a model may use without calling them: they run unseen, and their time stands elsewhere."""
NOTABLE = 0.05
"""Stages with less than this share of the time may change places under the profiler."""


def verdicts(run: Run) -> list[Verdict]:
    """Return every verdict that a run allows, saved ones included: none needs the model."""
    every = [*_sums(run), _tokens(run), _overhead(run), *_calibrated(run), *_dilation(run), *_steady(run)]
    return [*every, *_capture(run), *_encoded(run)]


def kept_verdicts(run: Run) -> list[Verdict]:
    """Return the verdicts of a run, as they were when it was made if it kept them."""
    try:
        return [_read(one) for one in run.manifest["checks"]["verdicts"]]
    except (KeyError, TypeError):
        # None were kept, or they are damaged.
        return verdicts(run)


def _read(kept: Mapping[str, Any]) -> Verdict:
    """Return a verdict as it was before it became JSON, which has no NaN."""
    known_figures = {name: float("nan") if kept[name] is None else kept[name] for name in ("measured", "allowed")}
    return Verdict(kept["check"], kept["ok"], unit=kept["unit"], sentence=kept["sentence"], **known_figures)


def failed(run: Run) -> list[Verdict]:
    """Return the verdicts that a run failed."""
    return [one for one in kept_verdicts(run) if one.ok is False]


def residuals_ns(spans: Spans) -> dict[str, int]:
    """Return by how many ns sums miss their total: over scopes, over stages, and over steps those of the decoder."""
    by_stage = tables.stage_ns(spans)
    decoder = int(by_stage[[stages.INDEX["prefill"], stages.INDEX["decode"]]].sum())
    steps = round(float(tables.step_table(spans)["host_ms"].sum()) * tables.MS)
    return {**spans.residuals_ns(), "steps": steps - decoder}


def _sums(run: Run) -> Iterator[Verdict]:
    worst: dict[str, int] = {}
    for spans in run.clean:
        for name, missed in residuals_ns(spans).items():
            worst[name] = max(worst.get(name, 0), abs(missed))
    said = {
        "scopes": "self times over all scopes against the total of the sample or generate()",
        "stages": "stages 1 to 4 against the same total",
        "steps": "steps against prefill + decode",
    }
    for name, missed in worst.items():
        yield bounded(f"sums: {name}", missed, 0, "ns", said[name])
    if (device := [_device_residual(spans) for spans in run.clean]) and not np.isnan(device).all():
        said_device = "stages on the device's clock against the span from its first event to its last"
        yield bounded("sums: device", float(np.nanmax(device)), DEVICE_SUMS, "", said_device)


def _device_residual(spans: Spans) -> float:
    """Return by which share the stages' device times miss the device's span; NaN without device events."""
    counted = (spans.stage >= 0) & (spans.device_ns != NO_TIME)
    rows = np.flatnonzero(counted)
    if not len(rows):
        return float("nan")
    times = spans.marks.device_ns
    span = int(times[rows[-1] + 1] - times[rows[0]])
    return abs(int(spans.device_ns[counted].sum()) - span) / max(span, 1)


def _tokens(run: Run) -> Verdict:
    checks = run.manifest.get("checks", {})
    same = checks.get("same_tokens")
    if same is None:
        return known("tokens", float("nan"), "passes", "there are no tokens to compare")
    if checks.get("same_by_itself") is False:
        said = (
            "the model is not deterministic: it gives other tokens without the instrument too, so nothing can be said"
        )
        return unsettled("tokens", float("nan"), 0, "passes", said)
    seed = (run.manifest.get("plan") or {}).get("seed")
    random = "" if seed is None else f", each from seed {seed}"
    said = f"tokens with and without the instrument{random}"
    if same and seed is None and checks.get("sampling"):
        said += ": equal from one random state, but sampling without a seed, so no other run can have them: give a seed"
        return unsettled("tokens", 0, 0, "passes", said)
    return bounded("tokens", float(not same), 0, "passes", said)


def _overhead(run: Run) -> Verdict:
    clean, control = ([one.generate_ns for one in run.of_kind(kind)] for kind in ("clean", "control"))
    granularity = str((run.manifest.get("plan") or {}).get("granularity", "layer"))
    allowed = COST.get(granularity, COST["layer"])
    if not control or len(clean) != len(control):
        return known("overhead", float("nan"), "", "there are no uninstrumented passes beside the clean ones")
    low, high = stats.ratio_interval(np.array(control), np.array(clean), paired=True)
    said = f"clean over uninstrumented passes, {granularity} granularity, in pairs of alternating order"
    return at_most("overhead", run.overhead() - 1, (low - 1, high - 1), allowed, said)


def _calibrated(run: Run) -> Iterator[Verdict]:
    """What marks alone cost, by the calibration that Run.corrected() subtracts."""
    cost = (run.manifest.get("machine") or {}).get("mark_cost")
    if cost is not None:
        table = run.corrected()
        share = float(table["marks_ms"].sum() / table["host_ms"].sum())
        each_us = (cost["inside_ns"] + cost["outside_ns"]) / 1e3
        said = f"of the time is what marks cost by calibration, {each_us:.2f} us a call: the least they take"
        yield known("overhead: calibrated", share, "", said)


def _dilation(run: Run) -> Iterator[Verdict]:
    table = run.dilation()
    if not len(table):
        return
    ratio = float(table["ratio"]["total"])
    yield known("dilation", ratio, "x", "recorded steps under the profiler over clean ones: never quote profiled times")
    for name, row in table.drop("total").iterrows():
        said = f"{row['profiled_ms']:.2f} ms under the profiler, {row['clean_ms']:.2f} ms clean"
        yield known(f"dilation: {name}", float(row["ratio"]), "x", said)
    shares = table.drop("total")[["clean_ms", "profiled_ms"]].fillna(0)
    shares = shares / shares.sum()
    shares = shares[(shares > NOTABLE).any(axis=1)]
    swapped = []
    for one, other in combinations(shares.index, 2):
        clean, slow = (shares.loc[one, name] - shares.loc[other, name] for name in ("clean_ms", "profiled_ms"))
        if clean * slow < 0 and min(abs(clean), abs(slow)) > NOTABLE:
            swapped.append(f"{one} and {other}")
    which = f": {', '.join(swapped)}" if swapped else ""
    said = f"pairs of stages that changed places under the profiler{which}"
    yield known("dilation: order", len(swapped), "pairs", said)


def _steady(run: Run) -> Iterator[Verdict]:
    totals = [float(tables.stage_ns(spans).sum()) / tables.MS for spans in run.clean]
    machine = run.manifest.get("machine") or {}
    if "clock_ns" in machine:
        coarse = machine["clock_ns"] / max(stats.median(totals) * tables.MS, 1.0)
        said = f"the clock's resolution, {machine['clock_ns']:g} ns, against a typical pass"
        yield bounded("steadiness: clock", coarse, DEVICE_SUMS, "", said)
    yield from steadiness(totals, run.manifest.get("machine") or {})


def _capture(run: Run) -> Iterator[Verdict]:
    checks: dict[str, Any] = run.manifest.get("checks", {})
    if mended := _mended(run):
        said = "scopes that were left open or never entered, and had to be mended"
        yield bounded("capture: marks", sum(mended.values()), 0, "marks", said)
    faults = run.manifest.get("faults", [])
    said = f"errors inside the instrument{': ' + faults[0] if faults else ''}"
    yield bounded("capture: instrument", len(faults), 0, "errors", said)
    if any((spans.root >= 0).any() for spans in run.clean):
        yield from _ran(run)
    if (changed := checks.get("changed")) is not None:
        said = f"modules that were exchanged, or compiled again, during the run{': ' + changed[0] if changed else ''}"
        yield bounded("capture: modules", len(changed), 0, "modules", said)
    for one in checks.get("profile", []):
        if one["ok"] is not None:
            said = f"of {one['total']}: {one['sentence']}"
            yield Verdict(f"profile: {one['name']}", one["ok"], one["count"], 0, "events", said)
    said_trace = str(checks.get("trace", "not checked"))
    if not said_trace.startswith("not "):
        yield bounded("profile: torch's validator", float(said_trace != "passed"), 0, "traces", said_trace)


def _mended(run: Run) -> dict[str, int]:
    """Return what had to be mended: when the run was made, or now, in marks that were damaged since."""
    mended = dict(run.manifest.get("checks", {}).get("repaired") or {})
    for one in run.passes:
        for name, count in vars(one.spans.repair).items() if one.spans is not None else ():
            mended[name] = max(mended.get(name, 0), count)
    return mended


def _ran(run: Run) -> Iterator[Verdict]:
    """Yield whether parts ran. One of two may rest: Video-LLaVA has a tower for images and one for videos."""
    ran = {part.role for part in run.anatomy.parts if part.fired != 0}
    silent = [part for part in run.anatomy.parts if part.role not in ran]
    missing = [one.path for one in silent if one.role in MUST_RUN or one.found_by == "user"]
    said = f"parts that never ran during generate(), nor another of their role{': ' * bool(missing)}"
    yield bounded("capture: parts that ran", len(missing), 0, "parts", said + ", ".join(missing))
    unseen = [one.path for one in silent if one.role in MAY_BE_USED and one.path not in missing]
    if unseen:
        said = f"never called, so their time, if their weights are used, stands elsewhere: {', '.join(unseen)}"
        yield unsettled("capture: parts that were called", len(unseen), 0, "parts", said)


def _encoded(run: Run) -> Iterator[Verdict]:
    encoded = run.manifest.get("checks", {}).get("encoded")
    if encoded is not None:
        repeats = encoded["repeats"]
        said = repeats[0]["sentence"] if repeats else "inputs that a tower encoded again"
        yield bounded("encoded twice", len(repeats), 0, "findings", said)
