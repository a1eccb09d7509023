"""Do the checks have teeth? Each thing they watch is broken once, and the check must see it."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from builders import small_llava, tiny_llava

import profkit
from profkit import (
    arguments,
    attribution,
    capture,
    checks,
    comparison,
    corrections,
    kineto,
    ledger,
    marking,
    overhead,
    probes,
    samples,
    validation,
)
from profkit.anatomy import Calls
from profkit.errors import InputError
from profkit.verdicts import Verdict, bounded, known, within

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def llava():
    loaded = tiny_llava()
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 3)
    kwargs = {**sample.transfer(sample.preprocess(sample.load())), **GREEDY}
    return loaded.model, kwargs, profkit.inspect(loaded.model, **kwargs)


def by_name(verdicts) -> dict[str, Verdict]:
    return {one.check: one for one in verdicts}


def traced(**plan):
    model, kwargs = small_llava()
    return profkit.trace(model, kwargs, **{"repeat": 3, "warmup": 1, "profile": False, **plan})


def failing(run) -> list[str]:
    """What a run failed, the machine's own unrest and the price of probes on a model of microseconds left out."""
    return [one.check for one in checks.failed(run) if not one.check.startswith(("steadiness", "overhead"))]


def test_a_sound_run_passes():
    run = traced(profile=True)
    assert failing(run) == []
    found = by_name(checks.verdicts(run))
    assert {"sums: scopes", "tokens", "overhead", "dilation", "profile: ranges", "capture: modules"} <= set(found)
    assert "steadiness: clock" in found


def test_figures_and_bounds():
    assert bounded("a", 1.0, 2.0, "ms", "").ok is True
    assert bounded("a", 3.0, 2.0, "ms", "").ok is False
    assert bounded("a", float("nan"), 2.0, "ms", "").ok is known("a", 1.0, "", "").ok is None
    # Sure to be inside, sure to be outside; noisy, reaching in from outside, and out from inside.
    cases = {(0.01, 0.0, 0.02): True, (0.09, 0.06, 0.1): False, (0.0, -0.2, 0.2): None, (0.06, 0.01, 0.07): None}
    cases |= {(0.028, 0.006, 0.066): None, (0.0, 0.0, 0.06): None, (-0.09, -0.1, -0.06): False}
    for (off, low, high), ok in cases.items():
        assert within("a", off, (low, high), 0.05, "", "").ok is ok
    nan = float("nan")
    unknown = within("a", 0.0, (nan, nan), 0.05, "", "")
    assert unknown.ok is None and "too few repeats" in unknown.sentence


# -- what a run can tell ---------------------------------------------------------------------------


def test_a_probe_that_changes_what_passes_through(monkeypatch):
    plain = probes.Instrument._plain_probe

    def spoiling(self, bound, code, mark, wrappers):
        probe = plain(self, bound, code, mark, wrappers)

        def probed(*args, **kwargs):
            output = probe(*args, **kwargs)
            return -output if isinstance(output, torch.Tensor) and wrappers.active else output

        return functools.wraps(bound)(probed)

    monkeypatch.setattr(probes.Instrument, "_plain_probe", spoiling)
    assert "tokens" in failing(traced())


def test_a_ledger_that_loses_a_mark(monkeypatch):
    whole = ledger.Ledger.marks

    def losing(self, *args):
        marks = whole(self, *args)
        kept = np.ones(len(marks), dtype=bool)
        kept[len(marks) // 2] = False
        return ledger.Marks(*(getattr(marks, name)[kept] for name in vars(marks)))

    monkeypatch.setattr(ledger.Ledger, "marks", losing)
    assert "capture: marks" in failing(traced())


def test_a_scope_that_counts_twice():
    run = traced()
    spans = run.clean[0]
    doubled = spans.self_ns.copy()
    doubled[len(doubled) // 2] *= 2
    spans.__dict__["self_ns"] = doubled
    found = by_name(checks.verdicts(run))["sums: scopes"]
    assert found.ok is False and found.measured > 0


def test_a_profile_that_lost_ranges(monkeypatch):
    whole = kineto.Session.events

    def losing(self):
        events = whole(self)
        ranges = np.flatnonzero(attribution.is_range(events))
        keep = np.ones(len(events), dtype=bool)
        keep[ranges[len(ranges) // 2]] = False
        return events.select(keep)

    monkeypatch.setattr(kineto.Session, "events", losing)
    assert "profile: ranges" in failing(traced(profile=True))


def test_a_part_that_is_exchanged_meanwhile():
    model, kwargs = small_llava()
    exchanged = iter(range(100))
    plain = model.generate

    def generate(**given):
        if next(exchanged) == 4:
            model.lm_head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
        return plain(**given)

    model.generate = generate
    run = profkit.trace(model, kwargs, repeat=3, warmup=1, profile=False)
    assert "capture: modules" in failing(run)


def test_a_part_that_is_exchanged_in_the_profiled_pass_alone():
    model, kwargs = small_llava()
    plain, calls = model.generate, []

    def generate(**given):
        calls.append(1)
        # Inspection, warm-up, three pairs: the profiled pass is the ninth.
        if len(calls) == 9:
            head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
            head.weight = model.lm_head.weight
            model.lm_head = head
        return plain(**given)

    model.generate = generate
    run = profkit.trace(model, kwargs, repeat=3, warmup=1, work=False)
    assert len(calls) == 9
    assert "capture: modules" in failing(run)


def test_an_error_inside_the_instrument(monkeypatch):
    monkeypatch.setattr(capture.audit, "audit", lambda *_: 1 / 0)
    assert "capture: instrument" in failing(traced())


def test_device_times_that_do_not_sum():
    run = traced()
    spans = run.clean[0]
    size = len(spans.owner)
    spans.marks = replace(spans.marks, device_ns=np.arange(size + 1) * 1000)
    spans.device_ns = np.full(size, 1000)
    assert by_name(checks.verdicts(run))["sums: device"].ok is True
    spans.device_ns[size // 2] += 1000 * size
    assert by_name(checks.verdicts(run))["sums: device"].ok is False


def test_a_step_that_is_lost_and_a_stage_that_is_lost():
    run = traced()
    spans = run.clean[0]
    lost = spans.step.copy()
    lost[lost == 1] = -1
    spans.__dict__["step"] = lost
    assert by_name(checks.verdicts(run))["sums: steps"].ok is False
    stage = spans.stage.copy()
    stage[stage == stage[len(stage) // 2]] = -1
    spans.__dict__["stage"] = stage
    assert by_name(checks.verdicts(run))["sums: stages"].ok is False


def test_stages_that_change_places_under_the_profiler():
    run = traced(profile=True)
    times = {"clean_ms": [10.0, 2.0, 30.0], "profiled_ms": [3.0, 12.0, 40.0]}
    table = pd.DataFrame(times, index=["vision", "prefill", "decode"])
    table.loc["total"] = table.sum()
    run.dilation = lambda: table.assign(ratio=table["profiled_ms"] / table["clean_ms"])
    found = by_name(checks.verdicts(run))
    assert found["dilation: order"].measured == 1 and "vision and prefill" in found["dilation: order"].sentence
    assert found["dilation: prefill"].measured == 6 and found["dilation: prefill"].ok is None


def test_a_clock_too_coarse_for_what_it_timed():
    run = traced()
    run.manifest["machine"]["clock_ns"] = 1e9
    assert by_name(checks.verdicts(run))["steadiness: clock"].ok is False


def test_what_torch_says_of_a_trace(monkeypatch):
    monkeypatch.setattr(validation, "validate_text", lambda text: "order (1 times): an event before its parent")
    assert "profile: torch's validator" in failing(traced(profile=True))


def test_probes_that_cost_too_much(monkeypatch):
    mark = ledger.Ledger.marker

    def slow(self, *args):
        inner = mark(self, *args)

        def marking(code):
            time.sleep(0.002)
            return inner(code)

        return marking

    monkeypatch.setattr(ledger.Ledger, "marker", slow)
    run = traced(repeat=6)
    assert by_name(checks.verdicts(run))["overhead"].ok is False


def test_marks_that_cost_too_much_in_one_stage(llava, monkeypatch):
    model, kwargs, anatomy = llava
    assert list(overhead.overhead_by_stage(model, kwargs, anatomy, "stage")) == []
    found = by_name(overhead.overhead_by_stage(model, kwargs, anatomy, "layer", repeats=6))
    assert {"overhead: prefill", "overhead: decode"} <= set(found)
    plain = probes.Instrument._plain_probe

    def slow(self, bound, code, mark, wrappers):
        probe = plain(self, bound, code, mark, wrappers)
        if self.ledger.scopes.list[code].kind != "layer":
            return probe

        @functools.wraps(probe)
        def late(*args, **kwargs):
            time.sleep(0.02)
            return probe(*args, **kwargs)

        return late

    monkeypatch.setattr(probes.Instrument, "_plain_probe", slow)
    found = by_name(overhead.overhead_by_stage(model, kwargs, anatomy, "layer", repeats=6))
    assert found["overhead: decode"].ok is False


def test_the_calibrated_cost_is_that_of_a_mark(monkeypatch):
    cost = marking.calibrated()
    assert 0 < cost.inside_ns + cost.outside_ns < 1_000_000
    mark, time_ns = ledger.Ledger.marker, [0]

    def dear(self, *args):
        inner = mark(self, *args)

        def marking(code):
            time_ns[0] += 20_000 if code > 0 else 7000
            return inner(code)

        return marking

    monkeypatch.setattr(ledger.Ledger, "marker", dear)
    # What a mark takes before it reads the clock is outside of the call on entry, inside on exit.
    assert marking.calibrated(now=lambda: time_ns[0]) == corrections.MarkCost(7000, 20_000)


def test_corrected_times_lack_what_marks_cost_wherever_they_stand():
    run = traced(repeat=1)
    cost = run.manifest["machine"]["mark_cost"]
    spans = run.representative
    taken = corrections.cost_ns(spans, corrections.MarkCost(10.0, 30.0))
    assert set(taken) == {10.0, 20.0, 30.0}
    # generate() is the outermost call: all of a call's two marks but those outside of its own.
    assert taken.sum() == 40 * len(spans) - 30
    table = run.corrected()
    assert np.allclose(np.maximum(table["host_ms"] - table["marks_ms"], 0), table["corrected_ms"])
    each_ms = (cost["inside_ns"] + cost["outside_ns"]) / 1e6
    assert table["marks_ms"].sum() == pytest.approx(each_ms * len(spans), rel=0.01)
    assert by_name(checks.verdicts(run))["overhead: calibrated"].ok is None
    del run.manifest["machine"]["mark_cost"]
    with pytest.raises(InputError, match="does not say what a mark costs"):
        run.corrected()


def test_a_tower_that_rests_is_no_fault():
    model, kwargs = small_llava()
    model.image_tower = torch.nn.Identity()
    run = profkit.trace(model, kwargs, repeat=1, profile=False)
    parts = tuple(run.anatomy.parts)
    tower = next(part for part in parts if part.role == "vision_tower")
    resting = replace(tower, path="image_tower", calls=Calls())
    run.anatomy = replace(run.anatomy, parts=(resting, *parts))
    assert by_name(checks.verdicts(run))["capture: parts that ran"].ok is True
    run.anatomy = replace(run.anatomy, parts=(resting, *(part for part in parts if part is not tower)))
    assert by_name(checks.verdicts(run))["capture: parts that ran"].ok is False


def test_a_projector_that_is_never_called_is_no_pass():
    model, kwargs = small_llava()
    model.unused = torch.nn.Linear(2, 2)
    run = profkit.trace(model, kwargs, repeat=1, profile=False, parts={"projector": "unused"})
    assert "capture: parts that ran" in failing(run)
    run = profkit.trace(model, kwargs, repeat=1, profile=False)
    silent = [replace(part, calls=Calls()) if part.role == "projector" else part for part in run.anatomy.parts]
    run.anatomy = replace(run.anatomy, parts=tuple(silent))
    found = by_name(checks.verdicts(run))
    assert found["capture: parts that ran"].ok is True
    assert found["capture: parts that were called"].ok is None


def test_sampling_without_a_seed_is_said():
    found = {}
    for seed in (None, 3):
        model, kwargs = small_llava()
        run = profkit.trace(model, {**kwargs, "do_sample": True}, repeat=1, profile=False, seed=seed)
        found[seed] = by_name(checks.kept_verdicts(run))["tokens"]
    assert found[3].ok is True
    assert found[None].ok is None and "sampling without a seed" in found[None].sentence
    model, kwargs = small_llava()
    model.generation_config.do_sample = True
    assert arguments.samples(model, {}) and not arguments.samples(model, kwargs)


def test_a_model_that_draws_for_itself_is_not_blamed_on_the_instrument():
    model, kwargs = small_llava()
    plain, count = model.generate, iter(range(1000))
    model.generate = lambda **given: plain(**given) + next(count)
    run = profkit.trace(model, kwargs, repeat=2, profile=False)
    found = by_name(checks.kept_verdicts(run))["tokens"]
    assert found.ok is None and "not deterministic" in found.sentence


def test_profile_keeps_its_verdicts_too():
    model, kwargs = small_llava()
    inner = model.model.get_image_features

    def wasteful(pixel_values, **others):
        model.model.vision_tower(pixel_values)
        return inner(pixel_values, **others)

    model.model.get_image_features = wasteful
    with profkit.profile(model) as run:
        model.generate(**kwargs)
    assert comparison.measured(run).failed == ["encoded twice"]
    with profkit.profile(model) as nothing:
        pass
    assert comparison.Measured("", nothing.manifest, *[pd.DataFrame()] * 2, None).failed == []


def test_a_tower_that_runs_twice():
    model, kwargs = small_llava()
    inner = model.model.get_image_features

    def wasteful(pixel_values, **others):
        model.model.vision_tower(pixel_values)
        return inner(pixel_values, **others)

    model.model.get_image_features = wasteful
    assert "encoded twice" in failing(profkit.trace(model, kwargs, repeat=1, profile=False))
