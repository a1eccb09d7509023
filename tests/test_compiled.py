"""Compiled decoding: steps are marked from outside, nothing is compiled again, and what is not split is said."""

from __future__ import annotations

import pytest
import torch
from builders import small_llava
from transformers import CompileConfig
from transformers.utils import is_torch_flex_attn_available

import profkit
from profkit import environment, models, text

pytestmark = pytest.mark.smoke


@pytest.fixture
def compiled():
    """A model whose generate() compiles its decode step, as it does by itself on an accelerator; warm."""
    torch._dynamo.reset()
    model, kwargs = small_llava()
    config = CompileConfig(backend="eager", mode=None, dynamic=False)
    config._compile_all_devices = True
    kwargs |= {"cache_implementation": "static", "compile_config": config}
    tokens = model.generate(**kwargs)
    assert hasattr(model, "_compiled_call")
    return model, kwargs, tokens


@pytest.mark.parametrize("granularity", ["stage", "layer", "module"])
def test_steps_are_marked_and_nothing_is_compiled_again(compiled, granularity):
    model, kwargs, tokens = compiled
    before = environment.graphs_compiled(), environment.modules_of(model)
    with profkit.profile(model, granularity=granularity) as prof:
        assert torch.equal(model.generate(**kwargs), tokens)
        assert torch.equal(model.generate(**kwargs), tokens)
    assert (environment.graphs_compiled(), environment.modules_of(model)) == before
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert prof.manifest["faults"] == []
    steps = prof.steps()
    assert steps["phase"].tolist() == ["prefill", *["decode"] * 4] * 2
    assert steps["tokens"].tolist() == [8, 1, 1, 1, 1] * 2
    table = prof.stages()
    # The second prefill is split like the first: probes are back by then.
    assert table["calls"][["vision", "embed", "prefill", "head", "decode"]].tolist() == [2, 2, 2, 2, 8]
    assert table["host_ns"].sum() == prof.representative.run_ns()
    (note,) = prof.manifest["notes"]
    assert "8 of 10 steps are inside one graph" in note
    assert torch.equal(model.generate(**kwargs), tokens) and environment.graphs_compiled() == before[0]


def test_a_trace_of_it(compiled):
    model, kwargs, _ = compiled
    run = profkit.trace(model, kwargs, repeat=2)
    checks = {one["check"]: one["ok"] for one in run.manifest["checks"]["verdicts"]}
    assert checks["tokens"] and checks["capture: modules"] and checks["sums: stages"]
    assert len(run.manifest["cache_bytes"]) == 5 and len(set(run.manifest["cache_bytes"])) == 1
    modules = run.modules().set_index("path")
    assert modules.loc["LlavaForConditionalGeneration (compiled)", ["stage", "calls"]].tolist() == ["decode", 4]
    assert any("inside one graph" in line for line in text.confessions(run))


def test_a_model_that_is_not_compiled_has_no_such_step():
    model, kwargs = small_llava()
    with profkit.profile(model) as prof:
        model.generate(**kwargs, cache_implementation="static")
    assert prof.manifest["notes"] == []
    assert not any("(compiled)" in path for path in prof.modules()["path"])


def test_what_the_user_compiled_is_said_to_be_one():
    model, kwargs = small_llava()
    tower = model.model.vision_tower
    tower.forward = torch.compile(tower.forward, backend="eager")
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    assert prof.manifest["notes"] == ["model.vision_tower is compiled and timed as one: what is inside is not split"]
    assert prof.stages().loc["vision", "calls"] == 1


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flex_attention"])
def test_every_attention_kernel_is_measured_alike(kernel):
    if kernel == "flex_attention" and not is_torch_flex_attn_available():
        pytest.skip("torch has no flex attention here")
    model, kwargs = small_llava()
    models.choose_attention(model, kernel)
    plain = model.generate(**kwargs)
    with profkit.profile(model, granularity="module") as prof:
        assert torch.equal(model.generate(**kwargs), plain)
    assert prof.manifest["attention"] == kernel and prof.manifest["faults"] == []
    assert prof.stages()["calls"][["vision", "prefill", "decode", "head"]].tolist() == [1, 1, 4, 5]


def test_a_model_whose_weights_are_quantised():
    model, kwargs = small_llava()
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    plain = quantised.generate(**kwargs)
    with profkit.profile(quantised) as prof:
        assert torch.equal(quantised.generate(**kwargs), plain)
    assert prof.stages()["calls"][["vision", "prefill", "decode", "head"]].tolist() == [1, 1, 4, 5]
    assert prof.manifest["faults"] == []
