"""Prefill and decode steps in traces that say nothing of profkit."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from builders import qwen2_vl, small_llava, whisper
from handmade import HandMade
from torch.profiler import ProfilerActivity

from profkit import analysis
from profkit.events import NOTHING
from profkit.phases import DECODE, MIXED, PREFILL, phase_of


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        ("execute_context_1(888_788544)_generation_0(0)", PREFILL),
        ("execute_32_context_0(sq0sk0sqsq0sqsk0)_generation_32(sq32sk32785sqsq32sqsk32785)", DECODE),
        ("execute_context_2(64)_generation_3(3)", MIXED),
        ("step[DECODE bs=32]", DECODE),
        ("capture_32_DECODE", DECODE),
        ("Prefill", PREFILL),
        ("step[EXTEND bs=1 toks=800]", PREFILL),
        ("decode_step 4", DECODE),
        ("## decoder fp8 None ##", NOTHING),
        ("decode_image", NOTHING),
        ("vae_decode", NOTHING),
        ("jpeg decode", NOTHING),
        ("list.extend", NOTHING),
        ("model.decode", DECODE),
        ("cuda_graph_decode_bs_8", DECODE),
        ("chunked prefill", PREFILL),
        ("prefill and decode", NOTHING),
        ("ProfilerStep#4", NOTHING),
    ],
)
def test_what_names_of_ranges_tell(name: str, phase: int):
    assert phase_of(name) == phase


def profiled(path: Path, model, kwargs, repeat: int = 1, **options) -> analysis.Analysis:
    """Record generate() as anyone would, and analyse the file."""
    if options.get("with_stack"):
        importlib.import_module("torch.profiler._cupti_monitor")
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], **options) as profiler:
        for _ in range(repeat):
            model.generate(**kwargs)
    profiler.export_chrome_trace(str(path))
    return analysis.analyze(path)


@pytest.mark.parametrize("build", [small_llava, qwen2_vl, whisper])
@pytest.mark.parametrize("with_stack", [False, True])
def test_the_steps_of_a_recorded_generate(build, with_stack, tmp_path):
    model, kwargs = build()
    found = profiled(tmp_path / "t.json", model, kwargs, with_stack=with_stack)
    steps = found.tables["steps"]
    new_tokens = kwargs.get("max_new_tokens", 0)
    assert steps["phase"].tolist() == ["prefill"] + ["decode"] * (new_tokens - 1)
    assert ("generate()" if with_stack else "selection of a token") in found.evidence
    # Four decode steps call more matrix products than one prefill, though their time is less.
    operators = found.tables["operators"]
    calls = operators[operators["name"] == "aten::mm"].groupby("stage")["calls"].sum()
    assert calls["decode"] > calls["prefill"] > 0


def test_two_generates_have_two_prefills(tmp_path):
    model, kwargs = small_llava()
    found = profiled(tmp_path / "t.json", model, kwargs, repeat=2, with_stack=True)
    assert found.tables["steps"]["phase"].tolist() == (["prefill"] + ["decode"] * 4) * 2


def test_one_token_leaves_the_steps_open(tmp_path):
    model, kwargs = small_llava()
    found = profiled(tmp_path / "t.json", model, {**kwargs, "max_new_tokens": 1, "min_new_tokens": 1})
    assert len(found.tables["steps"]) == 0
    assert found.evidence.startswith("no steps")


def loop(first: list[str], every: list[str], times: int = 4) -> HandMade:
    made, at = HandMade(), 0
    for name in first + every * times:
        made.host(name, at, 5)
        at += 10
    return made


EVERY = ["aten::embedding", "aten::mm", "aten::argmax"]


def steps_of(made: HandMade, path: Path):
    found = analysis.analyze(made.write(path / "t.json"))
    return found.tables["steps"]["phase"].tolist(), found.evidence


def test_an_evaluation_whose_rounds_are_all_the_same_is_not_called_decoding(tmp_path):
    phases, evidence = steps_of(loop([], EVERY), tmp_path)
    assert phases == [""] * 4
    assert "what they do is open" in evidence


def test_training_is_no_generation(tmp_path):
    first = ["autograd::engine::evaluate_function: MmBackward0", "aten::conv2d", *EVERY]
    assert steps_of(loop(first, EVERY), tmp_path)[0] == []


def test_inputs_made_before_a_loop_are_no_prefill(tmp_path):
    assert steps_of(loop(["aten::randint", *EVERY], EVERY), tmp_path)[0] == [""] * 5


def test_a_prefill_differs_from_what_repeats(tmp_path):
    assert steps_of(loop(["aten::conv2d", *EVERY], EVERY), tmp_path)[0] == ["prefill"] + ["decode"] * 4


def test_a_generation_recorded_from_its_middle_on_is_left_open(tmp_path):
    assert steps_of(loop(["aten::mm", "aten::argmax"], EVERY), tmp_path)[0] == [""] * 5


def test_selections_that_do_not_repeat_prove_nothing(tmp_path):
    made = loop([], ["aten::argmax", "aten::mm", "aten::argmax", "aten::add", "aten::argmax", "aten::embedding"], 1)
    assert steps_of(made, tmp_path)[0] == []
