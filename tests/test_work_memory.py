"""What work is counted of: a copy that must be one, caches that were given, weights that no list of parameters has."""

from __future__ import annotations

import functools

import builders
import pandas as pd
import pytest
import torch
from test_roofline import ceilings
from test_work import counted

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
