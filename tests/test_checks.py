"""Do the checks have teeth? Each thing they watch is broken once, and the check must see it."""

from __future__ import annotations

import functools
import gzip
import re
import shutil
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from builders import DECODER, FORWARD, GENERATE, Script, small_llava, tiny_llava
from simulated import Stream

import profkit
from profkit import (
    arguments,
    attribution,
    capture,
    checks,
    clock,
    comparison,
    corrections,
    decoupled,
    delays,
    environment,
    invariance,
    kineto,
    ledger,
    marking,
    overhead,
    probes,
    samples,
    saved_checks,
    stopwatches,
    validation,
    verification,
    wrapping,
)
from profkit.anatomy import Calls
from profkit.errors import InputError
from profkit.probes import sequences
from profkit.steadiness import steadiness
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
    run = profkit.trace(model, kwargs, repeat=3, warmup=1)
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
            time.sleep(0.002)
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
    assert np.allclose(table["host_ms"] - table["marks_ms"], table["corrected_ms"])
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


# -- saved runs ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    model, kwargs = small_llava()
    profkit.trace(model, kwargs, repeat=1, out=folder)
    return folder


def failing_again(folder) -> list[str]:
    found = saved_checks.complete(profkit.load(folder))
    return [one.check for one in found if one.ok is False and one.check.startswith(("capture", "profile", "sums"))]


def test_a_saved_run_that_lost_a_mark(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    assert failing_again(folder) == []
    marks = pd.read_parquet(folder / "marks.parquet")
    marks.drop(index=len(marks) // 2).to_parquet(folder / "marks.parquet", index=False)
    assert "capture: marks" in failing_again(folder)


@pytest.mark.parametrize("how", ["no gzip", "half", "negative"])
def test_a_saved_trace_that_was_damaged(saved, tmp_path, how):
    folder = shutil.copytree(saved, tmp_path / "run")
    whole = (folder / "trace.json.gz").read_bytes()
    negative = re.sub(rb'"dur": ?', rb'"dur": -', gzip.decompress(whole))
    damaged = {"no gzip": b"xx", "half": whole[: len(whole) // 2], "negative": gzip.compress(negative)}[how]
    (folder / "trace.json.gz").write_bytes(damaged)
    found = failing_again(folder)
    assert {"no gzip": "profile: trace file", "half": "profile: end of the file", "negative": "profile: durations"}[
        how
    ] in found


def test_a_saved_trace_that_is_gone_is_said(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    (folder / "trace.json.gz").unlink()
    found = by_name(saved_checks.complete(profkit.load(folder)))["profile: trace file"]
    assert found.ok is None and "gone" in found.sentence


def test_a_tower_that_runs_twice():
    model, kwargs = small_llava()
    inner = model.model.get_image_features

    def wasteful(pixel_values, **others):
        model.model.vision_tower(pixel_values)
        return inner(pixel_values, **others)

    model.model.get_image_features = wasteful
    assert "encoded twice" in failing(profkit.trace(model, kwargs, repeat=1, profile=False))


# -- steadiness ------------------------------------------------------------------------------------


def noise(count: int, spread: float = 0.005) -> np.ndarray:
    return 100 * (1 + spread * np.random.default_rng(0).standard_normal(count))


def test_steady_repeats_may_be_quoted():
    quiet = {"busy_s": 0.0, "own_s": 0.0, "stolen_s": 0.0, "frequency_mhz": 3000.0, "throttled": 7}
    quiet |= {"device_mhz": 1980.0}
    after = {"wall_s": 10.0, "busy_s": 10.2, "own_s": 10.0, "stolen_s": 0.1, "frequency_mhz": 2990.0}
    after |= {"throttled": 7, "device_mhz": 1965.0}
    machine = {"cores": 2, "before": {"wall_s": 0.0, **quiet}, "after": after}
    found = by_name(steadiness(noise(20), machine))
    assert [one.check for one in found.values() if one.ok is not True] == []
    machine["after"] |= {"busy_s": 15.0, "stolen_s": 4.0, "frequency_mhz": 2000.0, "throttled": 9, "device_mhz": 1200.0}
    found = by_name(steadiness(noise(20), machine))
    for name in ("background load", "stolen time", "frequency", "device's frequency", "throttling"):
        assert found[f"steadiness: {name}"].ok is False


@pytest.mark.parametrize(
    ("values", "name"),
    [
        (noise(20) * np.linspace(1, 1.2, 20), "drift"),
        (np.append(150, noise(19)), "warm-up"),
        (noise(20) * np.where(np.arange(20) % 3, 1, 2), "outliers"),
        (noise(6, 0.2), "median"),
    ],
)
def test_what_is_not_steady_is_said(values, name):
    found = by_name(steadiness(values, {}))
    assert found[f"steadiness: {name}"].ok is False
    if name == "median":
        assert "repeats would give ±2%" in found["steadiness: median"].sentence


@pytest.mark.parametrize("values", [[200, 100, 150, 90, 140, 80, 120], [200, 200, 200, 200, 100, 100, 100, 100]])
def test_what_noise_hides_is_open_and_its_figure_is_what_was_measured(values):
    found = by_name(steadiness(values, {}))
    drift, warm = found["steadiness: drift"], found["steadiness: warm-up"]
    assert drift.ok is None and "too noisy to tell" in drift.sentence and drift.measured > 0.3
    assert warm.ok is not True and warm.measured == pytest.approx(values[0] / np.median(values[1:]) - 1)


def test_temperatures_are_told_and_what_cannot_be_read_is_said():
    found = by_name(steadiness(noise(5), {"before": {"temperature_c": 50.0}, "after": {"temperature_c": 71.0}}))
    assert found["steadiness: temperature of the hottest sensor"].measured == 71
    for name in ("frequency", "heat", "background load"):
        one = by_name(steadiness(noise(5), {}))[f"steadiness: {name}"]
        assert one.ok is None and "be read here" in one.sentence


def test_few_repeats_leave_it_open():
    found = by_name(steadiness([1.0, 1.1], {}))
    assert {one.ok for one in found.values()} == {None}
    assert "cannot be read" in found["steadiness: background load"].sentence


# -- experiments -----------------------------------------------------------------------------------


def test_the_instrument_changes_nothing(llava):
    found = list(invariance.invariance(*llava))
    by_memory = found.pop()
    assert {one.ok for one in found} == {True} and len(found) == 13
    assert by_memory.ok is None and "cannot be known" in by_memory.sentence


def test_experiments_see_a_probe_that_spoils(llava, monkeypatch):
    plain = probes.Instrument._plain_probe

    def spoiling(self, bound, code, mark, wrappers):
        probe = plain(self, bound, code, mark, wrappers)

        def probed(*args, **kwargs):
            torch.rand(1)
            output = probe(*args, **kwargs)
            return -output if isinstance(output, torch.Tensor) and wrappers.active else output

        return functools.wraps(bound)(probed)

    monkeypatch.setattr(probes.Instrument, "_plain_probe", spoiling)
    found = by_name(invariance.invariance(*llava))
    assert found["same tokens: greedy, stage"].ok is False
    assert found["same random state: greedy, stage"].ok is False


def test_a_model_that_is_not_deterministic_is_said(llava):
    model, kwargs, anatomy = llava
    plain, count = model.generate, iter(range(1000))
    model.generate = lambda **given: plain(**given) + next(count)
    try:
        found = by_name(invariance.invariance(model, kwargs, anatomy))
    finally:
        del model.generate
    assert found["same tokens: greedy"].ok is None
    assert "other tokens each time by itself" in found["same tokens: greedy"].sentence


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-eventgpt"])
def test_the_truth_is_to_be_had_by_features_and_by_embeddings(name):
    from profkit import models

    loaded = models.load_model(name, torch.device("cpu"))
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 3)
    kwargs = {**sample.transfer(sample.preprocess(sample.load())), **GREEDY}
    anatomy = profkit.inspect(loaded.model, **kwargs)
    before = dict(loaded.model.__dict__)
    found = by_name(decoupled.decoupled(loaded.model, kwargs, anatomy, repeats=3))
    assert set(found) == {f"decoupled truth: {one}" for one in ("encoding", "generating", "the rest")}
    assert all(0 <= one.measured < 1 for one in found.values())
    assert loaded.model.__dict__.keys() == before.keys()


def test_a_tower_that_the_instrument_slows_is_seen_by_the_truth(llava, monkeypatch):
    plain = probes.Instrument._tower_probe

    def slow(self, bound, code, mark, wrappers):
        def delayed(*args, **kwargs):
            time.sleep(0.3)
            return bound(*args, **kwargs)

        return plain(self, delayed, code, mark, wrappers)

    monkeypatch.setattr(probes.Instrument, "_tower_probe", slow)
    found = by_name(decoupled.decoupled(*llava, repeats=3))["decoupled truth: encoding"]
    assert found.measured > 1 and found.ok is not True


def test_where_the_truth_is_not_to_be_had_it_is_said(llava, monkeypatch):
    monkeypatch.setattr(decoupled, "_splits", lambda *_: ([], ["the test says so"]))
    (found,) = decoupled.decoupled(*llava)
    assert found.ok is None and "not to be had: the test says so" in found.sentence


def test_the_users_mask_goes_with_the_embeddings():
    model, kwargs = small_llava()
    padded = {name: torch.nn.functional.pad(kwargs[name], (2, 0)) for name in ("input_ids", "attention_mask")}
    kwargs |= padded
    splits, _ = decoupled._splits(model, kwargs, profkit.inspect(model, **kwargs))
    plain = sequences(model.generate(**kwargs))
    assert torch.equal(splits[-1].given["attention_mask"], padded["attention_mask"])
    assert [decoupled._wrong(model, one, plain) for one in splits] == [""] * len(splits)


def test_other_tokens_are_no_truth_and_the_next_way_is_tried(llava, monkeypatch):
    by_features, by_embeddings = decoupled._by_features, decoupled._by_embeddings

    def wrong_features(kwargs, features):
        split = by_features(kwargs, features)
        outputs = {name: type(one)(pooler_output=None) for name, one in split.given["mm_encoder_outputs"].items()}
        return replace(split, given={**split.given, "mm_encoder_outputs": outputs})

    def wrong_embeddings(*args):
        split = by_embeddings(*args)
        return replace(split, given={**split.given, "inputs_embeds": split.given["inputs_embeds"].flip(1)})

    monkeypatch.setattr(decoupled, "_by_features", wrong_features)
    found = by_name(decoupled.decoupled(*llava, repeats=1))
    assert "from inputs_embeds" in found["decoupled truth: generating"].sentence
    monkeypatch.setattr(decoupled, "_by_embeddings", wrong_embeddings)
    (found,) = decoupled.decoupled(*llava, repeats=1)
    assert found.ok is None and "from mm_encoder_outputs failed" in found.sentence
    assert "from inputs_embeds gives other tokens than the whole" in found.sentence


def test_a_model_that_draws_for_itself_has_no_truth(llava):
    model, kwargs, anatomy = llava
    plain, count = model.generate, iter(range(1000))
    model.generate = lambda **given: plain(**given) + next(count)
    try:
        (found,) = decoupled.decoupled(model, kwargs, anatomy)
    finally:
        del model.generate
    assert found.ok is None and "not deterministic" in found.sentence


class ScriptedWatch:
    """A stopwatch on a clock that only the test moves."""

    on_device = False

    def __init__(self):
        self.time_ns = 0

    def now(self):
        return self.time_ns

    def wait(self, wait_ns):
        self.time_ns += wait_ns

    def elapsed_ns(self, begin, end):
        return end - begin


@pytest.mark.parametrize("leak_ms", [0, 100])
def test_a_delay_that_leaks_into_another_layer_of_its_stage(monkeypatch, leak_ms):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    watch = ScriptedWatch()

    def spans(model, kwargs, anatomy):
        script = Script()
        script.enter(GENERATE, watch.time_ns, tokens=1)
        for _ in range(2):
            script.enter(FORWARD, watch.time_ns)
            script.enter(DECODER, watch.time_ns, tokens=1)
            for number, layer in enumerate(model.layers):
                scope = ledger.Scope(f"layers.{number}", "layer")
                script.enter(scope, watch.time_ns)
                watch.time_ns += 5_000_000
                layer.forward(torch.zeros(1))
                slow = "forward" in model.layers[1].__dict__
                watch.time_ns += leak_ms * 500_000 if slow and number == 0 else 0
                script.leave(scope, watch.time_ns)
            script.leave(DECODER, watch.time_ns)
            script.leave(FORWARD, watch.time_ns)
        script.leave(GENERATE, watch.time_ns)
        return script.spans()

    monkeypatch.setattr(delays, "_spans", spans)
    found = by_name(delays._one(model, {}, None, "decoder layer", "layers.1", watch, 1, 100_000_000, 6))
    # Its own 5 ms are outside of forward() here, twice.
    assert found["delay: decoder layer"].measured == 10
    elsewhere = found["delay: decoder layer, elsewhere"]
    assert elsewhere.ok is (leak_ms == 0)
    assert elsewhere.measured == leak_ms / 200
    assert leak_ms == 0 or "layers.0 in decode: +50.00 ms" in elsewhere.sentence


def test_hooks_and_modules_that_stay_behind_are_noticed(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    off = wrapping.Wrappers.remove

    def hooking(self):
        off(self)
        model.lm_head.register_forward_hook(lambda *_: None)

    monkeypatch.setattr(wrapping.Wrappers, "remove", hooking)
    found = by_name(invariance.invariance(model, kwargs, anatomy))["same model"]
    assert found.ok is False and "lm_head" in found.sentence


def test_a_probe_that_stays_on_is_noticed(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    monkeypatch.setattr(wrapping.Wrappers, "remove", lambda self: None)
    assert by_name(invariance.invariance(model, kwargs, anatomy))["same model"].ok is False


def test_memory_that_stays_taken_is_noticed(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    used = iter([1000, 1512])
    monkeypatch.setattr(invariance, "_device_bytes", lambda model: next(used))
    found = by_name(invariance.invariance(model, kwargs, anatomy))["same memory"]
    assert found.ok is False and found.measured == 512


def test_experiments_take_a_cache_of_the_users_and_drop_what_greedy_decoding_does_not_take(monkeypatch):
    model, kwargs = small_llava()
    several = {**kwargs, "do_sample": True, "num_return_sequences": 2}
    assert arguments.greedy(model, several)["num_return_sequences"] == 1
    assert arguments.greedy(model, {**several, "num_beams": 2})["num_return_sequences"] == 2
    short = functools.partial(delays.delays, wait_ms=1.0)
    monkeypatch.setattr(verification, "delays", short)
    for given in (several, {**kwargs, "past_key_values": transformers.DynamicCache()}):
        run = profkit.trace(model, given, repeat=1, profile=False, seed=0)
        found = by_name(verification.verify(model, given, run, repeats=1))
        assert found["same tokens: greedy, layer"].ok and found["same tokens: sampling, layer"].ok
        assert not [one for one in found if one.startswith("experiment")]
        assert {"delay: head", "overhead: decode", "decoupled truth: generating"} <= set(found)


def test_an_experiment_that_fails_is_open_and_the_others_go_on(monkeypatch):
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, repeat=1, profile=False)

    def failing_after_one(*args, **others):
        yield known("delay: head", 1.0, "ms", "")
        raise ValueError("no more")

    monkeypatch.setattr(verification, "delays", failing_after_one)
    monkeypatch.setattr(verification, "decoupled", failing_after_one)
    found = by_name(verification.verify(model, kwargs, run, repeats=1))
    one = found["experiment: known delays"]
    assert one.ok is None and "ValueError: no more" in one.sentence and "delay: head" in found
    assert "experiment: media encoded alone" in {one.check for one in checks.kept_verdicts(run)}


def test_outputs_of_unequal_length_are_not_held_together(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    plain, lengths = model.generate, iter(range(3, 9))

    def generate(**given):
        return plain(**{**given, "max_new_tokens": next(lengths), "min_new_tokens": 1})

    model.generate = generate
    (found,) = overhead.overhead_by_stage(model, kwargs, anatomy, "layer", repeats=2)
    assert found.ok is None and "from 3 to 6 steps" in found.sentence


def test_delays_are_found_where_they_are(llava):
    model, kwargs, anatomy = llava
    before = environment.modules_of(model)
    found = by_name(delays.delays(model, kwargs, anatomy, repeats=3))
    assert all(found[f"delay: {name}"].ok for name in ("vision", "projector", "decoder layer", "head"))
    assert environment.modules_of(model) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.fixture
def on_device(llava, monkeypatch):
    """A model whose work is done by a simulated device, which the host runs ahead of."""
    model, _, anatomy = llava
    stream = Stream()
    monkeypatch.setattr(clock.DeviceClock, "of", classmethod(lambda cls, device: stream.clock()))
    watch = stopwatches.DeviceStopwatch(stream, stream.enqueue)
    monkeypatch.setattr(delays, "stopwatch_for", lambda device: watch)
    layers = [f"{anatomy.path('decoder_layers')}.{number}" for number in range(2)]
    work_ns = dict.fromkeys(layers, 3_000_000) | {str(anatomy.path("vision_tower")): 20_000_000}
    monkeypatch.setattr(decoupled, "synchronize", lambda device: stream.synchronize())
    with stream.working_for(model, work_ns):
        yield stream


def test_delays_on_a_device_are_found_on_its_clock(llava, on_device):
    found = by_name(delays.delays(*llava, repeats=3))
    for name in ("vision", "projector", "decoder layer", "head", "select"):
        # What selecting takes without the delay is known from another run alone: noise may leave it open.
        assert found[f"delay: {name}"].ok or name == "select", found[f"delay: {name}"]
        assert found[f"delay: {name}"].measured < 25
        assert "ms of 50." in found[f"delay: {name}"].sentence


def test_the_truth_on_a_device_is_that_of_its_clock(llava, on_device):
    found = by_name(decoupled.decoupled(*llava, repeats=3))
    # Alone the host waits for the tower's 20 ms; inside generate() it does not, and only the device's clock has them.
    for name, least_ms in (("encoding", 20), ("generating", 18)):
        one = found[f"decoupled truth: {name}"]
        assert abs(one.measured) < 0.3, one
        assert float(one.sentence.split(": ")[1].split(" ms")[0]) >= least_ms


def test_a_device_without_a_spin_kernel_is_said(llava, monkeypatch):
    monkeypatch.setattr(delays, "stopwatch_for", lambda device: None)
    (found,) = delays.delays(*llava)
    assert found.ok is None and "no kernel of known length" in found.sentence


def test_a_probe_that_does_not_mark_loses_the_delay(llava, monkeypatch):
    plain = probes.Instrument._attach

    def blind(self, wrappers, module, name, scope):
        if "projector" not in scope.path:
            plain(self, wrappers, module, name, scope)

    monkeypatch.setattr(probes.Instrument, "_attach", blind)
    found = by_name(delays.delays(*llava, repeats=3))
    assert found["delay: projector"].ok is not True
    assert found["delay: vision"].ok is True
