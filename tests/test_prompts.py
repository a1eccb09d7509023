"""Media tokens told from text by what the decoder reads, on the three systems and where it cannot be told."""

from __future__ import annotations

import builders
import pytest
import torch

from profkit import inspection, models, passes, prompts, samples

# 16 x 16 patches; 8 frames of 8 x 8 patches and a class token; the means of 5 frames, and of 16 x 16 + 1 patches.
MEDIA = {"tiny-llava": 16 * 16, "tiny-video-llava": 8 * (8 * 8 + 1), "tiny-eventgpt": 5 + 16 * 16 + 1}


@pytest.mark.parametrize("name", MEDIA)
def test_the_three_systems(name):
    loaded = models.load_model(name, torch.device("cpu"))
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 3)
    kwargs = {**passes.prepared(sample), "max_new_tokens": 3, "min_new_tokens": 3}
    anatomy = inspection.anatomy_for(loaded.model, kwargs)
    state = torch.get_rng_state()
    assert prompts.media_tokens(loaded.model, kwargs, anatomy) == MEDIA[name]
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("forward" in vars(module) for module in loaded.model.modules())


def test_a_prompt_of_text_has_none():
    model, kwargs = builders.small_llava()
    kwargs = {**kwargs, "input_ids": torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]])}
    del kwargs["pixel_values"]
    assert prompts.media_tokens(model, kwargs, inspection.anatomy_for(*builders.small_llava())) == 0


def test_what_cannot_be_told_is_unknown():
    model = builders.HomeMade().eval()
    kwargs = {"picture": torch.randn(1, 4, 12), "ids": torch.tensor([[3, 4, 5]])}
    # No module holds a pass of its decoder.
    assert prompts.media_tokens(model, kwargs, inspection.anatomy_for(model, kwargs)) is None

    # Something is added to every row on the way: not one is as it was embedded.
    model, kwargs = builders.small_llava()
    with prompts.PromptWatch(model, inspection.anatomy_for(model, kwargs)) as watch:
        model.generate(**{**kwargs, "max_new_tokens": 1, "min_new_tokens": 1})
    assert watch.media_tokens() == 4
    watch.read = watch.read + 1
    assert watch.media_tokens() is None
