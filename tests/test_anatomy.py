"""The parts of a model, from its module tree."""

from __future__ import annotations

import pytest
import torch
import transformers
from builders import small_llava
from torch import nn

import profkit
from profkit import structure
from profkit.errors import AnatomyError

pytestmark = pytest.mark.smoke


def test_llava_by_structure_and_calls_by_running_it():
    model, kwargs = small_llava()
    state = torch.get_rng_state()
    found = profkit.inspect(model, **kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.to_dict() == {
        "vision_towers": ["model.vision_tower"],
        "audio_towers": [],
        "projectors": ["model.multi_modal_projector"],
        "decoder_layers": "model.language_model.layers",
        "embed": "model.language_model.embed_tokens",
        "lm_head": "lm_head",
    }
    assert {part.role: part.fired for part in found.parts} == {
        "vision_tower": 1,
        "projector": 1,
        "decoder": 2,
        "decoder_layers": 2,
        "norm": 2,
        "embed": 2,
        "lm_head": 2,
    }
    assert found.notes == ()


def test_a_part_that_never_fires_is_said():
    model, kwargs = small_llava()
    text_only = {key: value for key, value in kwargs.items() if key != "pixel_values"}
    found = profkit.inspect(model, **{**text_only, "input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": None})
    assert found.notes == (
        "vision_tower model.vision_tower never fired during generate().",
        "projector model.multi_modal_projector never fired during generate().",
    )


def test_a_plain_language_model_has_no_tower():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=99
    )
    found = profkit.inspect(transformers.LlamaForCausalLM(config))
    assert found.to_dict() == {
        "vision_towers": [],
        "audio_towers": [],
        "projectors": [],
        "decoder_layers": "model.layers",
        "embed": "model.embed_tokens",
        "lm_head": "lm_head",
    }


def test_no_generate_and_no_decoder_are_said():
    with pytest.raises(AnatomyError, match=r"Linear has no generate\(\)"):
        structure.find(nn.Linear(1, 1))
    model = nn.Linear(1, 1)
    model.generate = lambda: None
    with pytest.raises(AnatomyError, match="No decoder layers found in Linear"):
        structure.find(model)
