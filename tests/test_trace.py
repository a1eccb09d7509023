"""profkit.trace on the embedded default: the run, its directory, its trace file."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pandas as pd
import perfetto
import pytest
import torch
from builders import small_llava, tiny_llava

import profkit
from profkit import chrome, comparison, samples, stages, tables, tracing
from profkit.errors import InputError, MeasurementError
from profkit.events import Kind
from profkit.kineto import Session

OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


@pytest.fixture(scope="module")
def run_and_path(tmp_path_factory):
    loaded = tiny_llava()
    sample = samples.ImageSample(
        [samples.default_image()], samples.DEFAULT_PROMPT, loaded.processor, loaded.model, OPTIONS["max_new_tokens"]
    )
    path = tmp_path_factory.mktemp("runs") / "run"
    state = torch.get_rng_state()
    run = profkit.trace(
        loaded.model, sample=sample, options=OPTIONS, out=path, repeat=3, seed=0, profile_steps=frozenset([0, 1, 2, 5])
    )
    assert torch.equal(torch.get_rng_state(), state)
    return run, path


def test_rows_sum_to_the_sample_exactly(run_and_path):
    run, _ = run_and_path
    for spans in run.clean:
        spans.check()
    spans = run.representative
    table = run.stages()
    assert table["host_ns"].sum() == spans.total_ns[spans.is_kind("sample")].sum()
    inputs = table.loc[["load", "preprocess", "transfer"], "host_ns"].sum()
    generate = spans.total_ns[spans.is_kind("generate")].sum()
    assert table["host_ns"].sum() - inputs >= generate  # the sample's own time between its parts is `other`
    assert table["share"].sum() == pytest.approx(1)
    steps = run.steps()
    assert steps["host_ms"].sum() == pytest.approx(table.loc[["prefill", "decode"], "host_ms"].sum())
    assert steps["iteration_ms"].sum() == pytest.approx(generate / 1e6)
    assert run.modules()["self_ms"].sum() == pytest.approx(table["host_ms"].sum())


def test_every_stage_of_llava_is_there(run_and_path):
    run, _ = run_and_path
    expected = [name for name in stages.NAMES if name != "audio"]
    assert run.stages().index.tolist() == expected
    assert set(run.breakdown()["classic_stage"]) == {1, 2, 3, 4}
    assert run.stages().loc[["load", "vision", "projector", "prefill"], "calls"].tolist() == [1, 1, 1, 1]
    assert run.stages().loc[["embed", "head", "select"], "calls"].tolist() == [8, 8, 8]


def test_latency_follows_its_definitions(run_and_path):
    run, _ = run_and_path
    found, steps = run.latency(), run.steps()
    assert found.new_tokens == 8
    assert found.prompt_tokens == run.manifest["calls"][0]["prompt_tokens"] == steps["tokens"][0]
    assert found.ttft_ms == pytest.approx(steps["iteration_ms"][0])
    assert found.tpot_ms == pytest.approx((found.end_to_end_ms - found.ttft_ms) / 7)
    assert tables.latency(run.representative).itl_p50_ms == pytest.approx(np.median(steps["iteration_ms"][1:]))
    assert found.tokens_per_s == pytest.approx(1000 / found.tpot_ms)


def test_checks_and_costs(run_and_path):
    run, _ = run_and_path
    assert run.manifest["checks"]["same_tokens"] is True
    verdicts = {one["check"]: one for one in run.manifest["checks"]["verdicts"]}
    for name in ("sums: scopes", "sums: stages", "sums: steps", "tokens", "capture: marks", "encoded twice"):
        assert (verdicts[name]["ok"], verdicts[name]["measured"]) == (True, 0)
    assert run.manifest["faults"] == []
    assert run.anatomy.notes == ()
    assert len(run.of_kind("control")) == len(run.of_kind("clean")) == 3
    assert run.overhead() > 0
    dilation = run.dilation()
    assert dilation.loc["total", "profiled_ms"] == pytest.approx(dilation["profiled_ms"][:-1].sum())
    assert dilation["ratio"].notna().all()


def test_operators_land_in_stages(run_and_path):
    run, _ = run_and_path
    by_stage = run.operators.groupby("stage")["self_ms"].sum()
    total = by_stage.sum()
    assert by_stage.get("outside", 0) / total < 0.001
    assert by_stage.get("other", 0) / total < 0.01
    convolution = run.operators[run.operators["name"] == "aten::convolution"]
    assert set(convolution["stage"]) == {"vision"}
    assert set(run.operators[run.operators["path"] == "lm_head"]["stage"]) == {"head"}


def test_a_saved_run_is_the_live_one(run_and_path):
    run, path = run_and_path
    loaded = profkit.load(path)
    for table in ("stages", "steps", "modules", "spread", "breakdown", "dilation"):
        pd.testing.assert_frame_equal(getattr(loaded, table)(), getattr(run, table)())
    pd.testing.assert_frame_equal(loaded.operators, run.operators)
    assert loaded.latency() == run.latency()
    assert loaded.anatomy == run.anatomy
    assert loaded.overhead() == run.overhead()


def test_the_directory_holds_what_it_should(run_and_path):
    _, path = run_and_path
    files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    board = next(
        name for name in files if name.startswith("tensorboard/profkit.") and name.endswith(".pt.trace.json.gz")
    )
    names = ("marks", "stages", "steps", "modules", "operators", "timeline", "trees", "work")
    tables = {f"{name}.parquet" for name in names}
    files.discard("ceilings.json")  # There where this machine's ceilings were measured before.
    assert files == {"run.json", "breakdown.csv", "trace.json.gz", board, *tables}
    manifest = json.loads((path / "run.json").read_text())
    assert manifest["schema"] == 1
    for key in ("command", "versions", "device", "dtype", "config", "plan", "checks", "tokens", "latency"):
        assert manifest[key] is not None
    assert manifest["plan"]["seed"] == 0
    assert pd.read_csv(path / "breakdown.csv")["host_ms"].sum() == pytest.approx(
        pd.read_parquet(path / "stages.parquet")["host_ms"].sum(), abs=1e-4
    )
    assert [one.name for one in path.parent.iterdir()] == ["run"]


def test_torch_accepts_the_trace(run_and_path):
    validator = pytest.importorskip("torch.profiler._trace_validator")
    _, path = run_and_path
    passed, violations = validator.validate_trace(str(path / "trace.json.gz"))
    assert passed, violations


def test_perfetto_drops_nothing(run_and_path):
    _, path = run_and_path
    written = json.loads(gzip.decompress((path / "trace.json.gz").read_bytes()))["traceEvents"]
    complete = [event for event in written if event["ph"] == "X"]
    slices, problems = perfetto.query(
        path / "trace.json.gz",
        "select count(*) as n, sum(dur) as ns from slice; select name, value from stats where value != 0 and "
        "severity != 'info'",
    )
    assert problems == []
    assert int(slices[0]["n"]) == len(complete)
    assert int(slices[0]["ns"]) == sum(round(event["dur"] * 1000) for event in complete)


def test_perfetto_shows_profkits_tracks_with_their_arguments(run_and_path):
    run, path = run_and_path
    threads = "from slice join thread_track on slice.track_id = thread_track.id join thread using (utid)"
    tracks, steps, ranges = perfetto.query(
        path / "trace.json.gz",
        f"select thread.name as track {threads} join process using (upid) where process.name = 'profkit' group by 1;"
        "select slice.name as name, extract_arg(arg_set_id, 'args.phase') as phase, "
        f"extract_arg(arg_set_id, 'args.tokens') as tokens {threads} where thread.name = 'steps' order by ts;"
        "select count(*) as n from slice where name like 'profkit:%'",
    )
    assert [row["track"] for row in tracks] == ["layers", "stages", "steps"]
    prompt = str(run.latency().prompt_tokens)
    assert [(row["name"], row["phase"], row["tokens"]) for row in steps] == [
        ("prefill 0", "prefill", prompt),
        ("decode 1", "decode", "1"),
        ("decode 2", "decode", "1"),
        ("decode 5", "decode", "1"),
    ]
    assert ranges == [{"n": "0"}]


def test_stage_slices_on_the_trace_are_the_profiled_pass(run_and_path):
    run, path = run_and_path
    trace = chrome.read(path / "trace.json.gz")
    own = trace.events.is_kind(Kind.PROFKIT)
    names = [trace.events.names[name] for name in trace.events.name[own]]
    assert {"vision", "projector", "prefill", "decode", "head", "select"} <= set(names)
    durations = pd.Series(trace.events.duration_ns[own], index=names).groupby(level=0).sum()
    # On torch's clock and between ranges instead of marks: close to, not equal to, the ledger's own times.
    assert durations["vision"] / 1e6 == pytest.approx(run.dilation().loc["vision", "profiled_ms"], rel=0.05, abs=0.1)


def test_the_profile_gives_no_reason_to_doubt_it(run_and_path):
    run, _ = run_and_path
    profile = {one["name"]: one for one in run.manifest["checks"]["profile"]}
    assert profile["ranges"]["ok"] is True and profile["ranges"]["total"] > 100
    assert not [name for name, one in profile.items() if one["ok"] is False]


def test_trace_size_does_not_grow_with_the_output():
    model, kwargs = small_llava()
    sizes = []
    for tokens in (8, 40):
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        run = profkit.trace(model, {**kwargs, **lengths}, warmup=0, repeat=1)
        sizes.append(len(chrome.parse(run.trace_json).events))
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0]


def test_sampling_draws_the_same_tokens_in_every_pass():
    model, kwargs = small_llava()
    sampling = {**kwargs, "do_sample": True, "temperature": 2.0, "max_new_tokens": 12, "min_new_tokens": 12}
    torch.manual_seed(5)
    expected = model.generate(**sampling)
    torch.manual_seed(5)
    run = profkit.trace(model, sampling, warmup=0, repeat=2)
    assert run.manifest["checks"]["same_tokens"] is True
    assert run.manifest["tokens"] == expected.tolist()
    seeded = profkit.trace(model, sampling, warmup=0, repeat=1, profile=False, seed=5)
    assert seeded.manifest["tokens"] == expected.tolist()


def test_an_instrument_that_changes_tokens_is_caught(monkeypatch):
    """The check has teeth: a probe that doctors the head's output changes the tokens."""
    model, kwargs = small_llava()
    from profkit import probes

    plain_attach = probes.Instrument._attach

    def doctored(self, wrappers, module, name, scope):
        plain_attach(self, wrappers, module, name, scope)
        if scope.path == "lm_head":
            probe = module.__dict__[name]
            wrappers.put(module, name, lambda *args: -probe(*args))

    monkeypatch.setattr(probes.Instrument, "_attach", doctored)
    run = profkit.trace(model, kwargs, warmup=0, repeat=1, profile=False)
    assert run.manifest["checks"]["same_tokens"] is False


def test_a_users_cache_does_not_remember_the_last_pass():
    from transformers import DynamicCache

    model, kwargs = small_llava()
    cache = DynamicCache(config=model.config.get_text_config())
    run = profkit.trace(model, {**kwargs, "past_key_values": cache}, warmup=1, repeat=2, profile=False)
    assert run.manifest["checks"]["same_tokens"] is True
    assert cache.get_seq_length() == 0


def test_failures_inside_generate_say_what_happened(tmp_path):
    model, kwargs = small_llava()

    def fail(module, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with pytest.raises(MeasurementError, match=r"ran out of memory on cpu: try --dtype"):
        profkit.trace(model, kwargs, out=tmp_path / "run")
    handle.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MeasurementError, match=r"generate\(\) failed: ValueError: Image features"):
        profkit.trace(model, {**kwargs, "input_ids": kwargs["input_ids"][:, 1:] * 0 + 1})


def test_wrong_plans_are_refused(tmp_path):
    model, kwargs = small_llava()
    for plan, words in (
        ({"repeat": 0}, "at least one clean pass"),
        ({"warmup": -1}, "cannot be negative"),
        ({"sample": object()}, "not both"),
    ):
        with pytest.raises(InputError, match=words):
            profkit.trace(model, kwargs, **plan)


def test_steps_that_do_not_come_cost_the_profile_and_nothing_else():
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=1, profile_steps=frozenset([77]))
    assert run.trace_json is None
    assert "none is among the 5 seen" in run.manifest["notes"][0]
    assert run.stages()["host_ns"].sum() > 0


def test_what_was_given_to_generate_is_hashed():
    model, kwargs = small_llava()
    plan = {"warmup": 0, "repeat": 1, "profile": False}
    first, second = (profkit.trace(model, dict(kwargs), **plan).manifest["inputs"] for _ in range(2))
    assert first == second
    assert set(first) == set(kwargs)
    kwargs["pixel_values"] = kwargs["pixel_values"] + 1
    other = profkit.trace(model, kwargs, **plan).manifest["inputs"]
    assert [name for name in first if first[name] != other[name]] == ["pixel_values"]


def test_itl_is_pooled_over_the_repeats():
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, warmup=0, repeat=3, profile=False)
    gaps_ms = np.concatenate([tables.token_gaps_ms(spans) for spans in run.clean])
    assert len(gaps_ms) == 3 * (run.latency().new_tokens - 1)
    assert run.latency().itl_p50_ms == np.percentile(gaps_ms, 50)


def test_another_profiler_is_refused_before_anything_runs(monkeypatch):
    model, kwargs = small_llava()
    with torch.profiler.profile(), pytest.raises(InputError, match=r"Another torch\.profiler is recording"):
        profkit.trace(model, kwargs)
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    with pytest.raises(InputError, match="Nsight Systems is recording"):
        profkit.trace(model, kwargs)
    assert profkit.trace(model, kwargs, warmup=0, repeat=1, profile=False).trace_json is None


def test_a_session_closes_the_ranges_that_an_interrupt_left_open():
    session = Session(frozenset([0]), torch.device("cpu"))
    mark = session.wrap(lambda code: 7)
    with pytest.raises(KeyboardInterrupt), session:
        mark(1)
        raise KeyboardInterrupt
    names = [event["name"] for event in json.loads(session.export())["traceEvents"] if event["ph"] == "X"]
    assert "profkit:7" in names
    assert not torch._C._autograd._profiler_enabled()


def test_models_measured_in_turn_are_compared_in_pairs():
    model, kwargs = small_llava()
    other, _ = small_llava()
    one, two = tracing.trace_together([(model, kwargs), (other, kwargs)], repeat=4, profile=False, warmup=0)
    assert one.manifest["together"] == two.manifest["together"]
    assert [len(run.clean) for run in (one, two)] == [4, 4]
    # In turn, and each pair in the other order: 1 2, 2 1, 1 2, 2 1.
    begins = [[int(spans.marks.host_ns[0]) for spans in run.clean] for run in (one, two)]
    assert [a < b for a, b in zip(*begins, strict=True)] == [True, False, True, False]
    measured = [comparison.of_run(run) for run in (one, two)]
    assert measured[0].ids == measured[1].ids
    ratios = measured[1].times["prefill"] / measured[0].times["prefill"]
    assert comparison.compare(*measured).loc["prefill", "ratio"] == pytest.approx(ratios.median())
    alone = comparison.of_run(profkit.trace(model, kwargs, repeat=3, profile=False))
    assert alone.ids is None
