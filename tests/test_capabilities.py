"""The capability table: each answer tried on the model itself."""

from __future__ import annotations

import builders
import pytest
import torch

import profkit
from profkit import capabilities

pytestmark = pytest.mark.smoke


def answers(model, kwargs):
    found = profkit.inspect(model, **kwargs)
    return {one.name: one.answer for one in capabilities.measure(model, found, kwargs)}


def test_llava():
    model, kwargs = builders.small_llava()
    before = {path: dict(module.__dict__) for path, module in model.named_modules()}
    state = torch.get_rng_state()
    found = answers(model, kwargs)
    assert {path: dict(module.__dict__) for path, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    # transformers 4 has no mm_encoder_outputs, and says so by refusing it.
    assert found.pop("precomputed_features") is hasattr(model, "_prepare_multimodal_encoder_kwargs_for_generation")
    assert found == {
        "inputs_embeds": True,
        "kv_cache": True,
        "tower_alone": True,
        "compiles_decode": False,
        "encodes_twice": False,
    }


def test_a_model_that_can_do_little():
    found = answers(builders.HomeMade(), {"picture": torch.randn(1, 4, 12), "ids": torch.tensor([[1, 2]])})
    assert found["kv_cache"] is False
    assert found["inputs_embeds"] is None
    assert found["precomputed_features"] is None
    assert found["compiles_decode"] is None


def test_encoding_the_same_frame_again_is_noticed():
    model, kwargs = builders.event_model()
    assert answers(model, kwargs)["encodes_twice"] is False
    frames = kwargs["event_tensors"][0]
    assert answers(model, {**kwargs, "event_tensors": [[*frames, frames[0].clone()]]})["encodes_twice"] is True


def test_embeddings_that_change_the_tokens_are_not_called_equal(monkeypatch):
    """The comparison has teeth."""
    model, kwargs = builders.small_llava()
    generate = capabilities._generate

    def doctored(model, given):
        if "inputs_embeds" in given:
            given = {**given, "inputs_embeds": -given["inputs_embeds"]}
        return generate(model, given)

    monkeypatch.setattr(capabilities, "_generate", doctored)
    assert answers(model, kwargs)["inputs_embeds"] is False
