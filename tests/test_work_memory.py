"""What work is counted of: a copy that must be one, caches that were given, weights that no list of parameters has."""

from __future__ import annotations

import functools

import builders
import pandas as pd
import pytest
import torch
import transformers
from test_roofline import ceilings
from test_work import counted
from torch.utils._pytree import tree_map

from profkit import doubts, inspection, roofline, workload


def covered(model, name):
    """Put a plain function over a method of a module, as who times it by hand does."""
    part = model.get_submodule(name)
    original = part.forward

    @functools.wraps(original)
    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    part.forward = forward


@pytest.mark.parametrize("path", ["", "model.language_model"])
def test_a_forward_that_the_copy_cannot_have_is_not_taken_for_one(path):
    plain = counted(builders.small_llava)
    model, kwargs = builders.small_llava()
    covered(model, path)
    work = workload.count(model, kwargs, inspection.anatomy_for(model, kwargs))
    assert work.about["weights"] == "real" and "runs the model itself" in work.about["why"]
    pd.testing.assert_frame_equal(work.stages(), plain.stages())


@pytest.mark.parametrize("path", ["", "model.language_model"])
def test_a_compiled_forward_is_that_of_the_copy(path):
    plain = counted(builders.small_llava)
    model, kwargs = builders.small_llava()
    anatomy, part = inspection.anatomy_for(model, kwargs), model.get_submodule(path)
    part.forward = compiled = torch.compile(part.forward, backend="eager")
    work = workload.count(model, kwargs, anatomy)
    assert work.about["weights"] == "fake" and part.forward is compiled
    pd.testing.assert_frame_equal(work.stages(), plain.stages())


# -- caches that are given -----------------------------------------------------------------------------


def llama():
    """Keys and values of 2 layers, 2 heads of 8 floats of 4 bytes each: 256 bytes a token."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 99}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = torch.arange(3, 15)[None]
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "min_new_tokens": 4}
    return transformers.LlamaForCausalLM(config).eval(), {**kwargs, "do_sample": False}


@pytest.mark.parametrize("tokens", [4, 20])
def test_what_a_given_cache_holds_is_read_and_was_not_written(tokens):
    model, kwargs = llama()
    kwargs |= {"max_new_tokens": tokens, "min_new_tokens": tokens}
    anatomy = inspection.anatomy_for(model, kwargs)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(kwargs["input_ids"][:, :8], past_key_values=cache, use_cache=True)
    work = workload.count(model, {**kwargs, "past_key_values": cache}, anatomy, new_tokens=tokens)
    steps = work.steps()
    assert steps["cache_read_bytes"].tolist() == [256 * held for held in (8, *range(12, 11 + tokens))]
    assert steps["cache_written_bytes"].tolist() == [256 * 4] + [256] * (tokens - 1)
    assert work.stages()["activation_bytes"].get("prefill", 0) < 256 * 8
    assert cache.get_seq_length() == 8


def test_a_cache_with_room_alone_holds_nothing():
    model, kwargs = llama()
    anatomy = inspection.anatomy_for(model, kwargs)
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    given = workload.count(model, {**kwargs, "past_key_values": cache}, anatomy, new_tokens=4).steps()
    own = workload.count(model, {**kwargs, "cache_implementation": "static"}, anatomy, new_tokens=4).steps()
    assert given["cache_read_bytes"].iloc[0] == own["cache_read_bytes"].iloc[0] == 0


# -- weights that no list of parameters has ----------------------------------------------------------


def test_a_weight_that_is_a_plain_attribute_is_a_weight():
    plain = counted(builders.small_llava).steps()
    model, kwargs = builders.small_llava()
    anatomy = inspection.anatomy_for(model, kwargs)
    weight = model.lm_head.weight.detach()
    del model.lm_head.weight
    model.lm_head.weight = weight
    work = workload.count(model, kwargs, anatomy)
    assert work.steps()["weight_bytes"].tolist() == plain["weight_bytes"].tolist()
    assert work.total()["activation_bytes"] == counted(builders.small_llava).total()["activation_bytes"]


def test_weights_that_are_packed_away_are_said():
    model, kwargs = builders.small_llava()
    anatomy = inspection.anatomy_for(model, kwargs)
    packed = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    work = workload.count(packed, kwargs, anatomy)
    assert work.about["packed"] == ["quantized::linear_dynamic"]
    found = roofline.answers(work, ceilings(), "float32")
    assert any("quantized::linear_dynamic reads weights" in one for one in doubts.of(found))
    assert not len(found.what_if)
    assert counted(builders.small_llava).about["packed"] == []


class Int8(torch.Tensor):
    """A weight of whole numbers and a scale a row, which looks like one of floats: as torchao makes them."""

    @staticmethod
    def __new__(cls, whole, scale):
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype, device=whole.device)

    def __init__(self, whole, scale):
        self.whole, self.scale = whole, scale

    def __tensor_flatten__(self):
        return ["whole", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, _, size, stride):
        return Int8(inner["whole"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].whole, args[0].scale)

        def plain(one):
            return one.whole.to(one.scale.dtype) * one.scale if isinstance(one, Int8) else one

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


def test_weights_in_a_wrapper_are_what_it_holds():
    plain, kwargs = llama()
    anatomy = inspection.anatomy_for(plain, kwargs)
    wanted = workload.count(plain, kwargs, anatomy).steps()
    model, _ = llama()
    saved = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            weight = module.weight.data
            scale = weight.abs().amax(1, keepdim=True) / 127
            module.weight = torch.nn.Parameter(Int8((weight / scale).round().to(torch.int8), scale), False)
            saved += 3 * weight.numel() - 4 * scale.numel()
    work = workload.count(model, kwargs, anatomy)
    steps, parts = work.steps(), work.parts.set_index("role")
    assert (wanted["weight_bytes"] - steps["weight_bytes"]).tolist() == [saved] * 4
    assert steps["activation_bytes"].tolist() == wanted["activation_bytes"].tolist()
    assert steps["flops"].tolist() == wanted["flops"].tolist()
    assert parts.loc["decoder_layers", "dtype"] == "float32, int8"
    assert not set(roofline.what_if(work, roofline.Limits.of(ceilings(), work, "float32"))["bits"]) & {8, 4}
