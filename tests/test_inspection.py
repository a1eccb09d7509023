"""The parts of models of every kind, found by structure and one short run that leaves nothing behind."""

from __future__ import annotations

import copy

import builders
import pytest
import torch
import transformers
from torch import nn

import profkit
from profkit import inspection, structure
from profkit.anatomy import Calls
from profkit.errors import AnatomyError, InputError

pytestmark = pytest.mark.smoke


def home_made():
    torch.manual_seed(0)
    return builders.HomeMade(), {"picture": torch.randn(1, 4, 12), "ids": torch.tensor([[1, 2]])}


def parts(layers, embed, head, *, vision=(), audio=(), projectors=()):
    return {
        "vision_towers": list(vision),
        "audio_towers": list(audio),
        "projectors": list(projectors),
        "decoder_layers": layers,
        "embed": embed,
        "lm_head": head,
    }


LANGUAGE = ("model.language_model.layers", "model.language_model.embed_tokens", "lm_head")
OPT = ("language_model.model.decoder.layers", "language_model.model.decoder.embed_tokens", "language_model.lm_head")
MODELS = {
    "llava": (
        builders.small_llava,
        parts(*LANGUAGE, vision=["model.vision_tower"], projectors=["model.multi_modal_projector"]),
    ),
    "qwen2_vl": (
        builders.qwen2_vl,
        parts(*LANGUAGE, vision=["model.visual"], projectors=["model.visual.merger"]),
    ),
    "blip2": (
        builders.blip2,
        parts(*OPT, vision=["vision_model"], projectors=["qformer", "language_projection"]),
    ),
    "whisper": (
        builders.whisper,
        parts("model.decoder.layers", "model.decoder.embed_tokens", "proj_out", audio=["model.encoder"]),
    ),
    "t5": (builders.t5, parts("decoder.block", "shared", "lm_head")),
    "event": (
        builders.event_model,
        parts(
            *("model.layers", "model.embed_tokens", "lm_head"),
            vision=["model.visual_tower.visual_tower"],
            projectors=["model.visual_projector", "model.feature_adaptor"],
        ),
    ),
    "home made": (home_made, parts("blocks", "words", "out", vision=["eye"], projectors=["bridge"])),
}


def state(model):
    """Everything that a run could leave on a model: attributes, buffers, hooks, by identity."""
    kept = []
    for module in model.modules():
        inner = {key: dict(value) for key, value in module.__dict__.items() if isinstance(value, dict)}
        kept.append((dict(module.__dict__), inner))
    return kept


def is_same(before, after):
    return all(
        one.keys() == other.keys() and all(one[key] is other[key] for key in one)
        for (outer, inner), (outer_now, inner_now) in zip(before, after, strict=True)
        for one, other in [(outer, outer_now), *((inner[key], inner_now[key]) for key in inner)]
    )


@pytest.mark.parametrize("name", MODELS)
def test_parts_are_found_and_nothing_is_left_behind(name):
    build, expected = MODELS[name]
    model, kwargs = build()
    random, before = torch.get_rng_state(), state(model)
    configuration = copy.deepcopy(getattr(model, "generation_config", None))
    found = profkit.inspect(model, **kwargs)
    assert found.to_dict() == expected
    assert is_same(before, state(model))
    assert torch.equal(torch.get_rng_state(), random)
    if configuration is not None:
        assert model.generation_config.to_dict() == configuration.to_dict()


@pytest.mark.parametrize("name", MODELS)
def test_stages_of_any_model_sum_and_tokens_are_equal(name):
    model, kwargs = MODELS[name][0]()
    plain = model.generate(**kwargs)
    with profkit.profile(model) as prof:
        measured = model.generate(**kwargs)
    assert torch.equal(plain, measured)
    assert prof.manifest["faults"] == []
    prof.representative.check()
    assert prof.stages()["host_ns"].sum() == prof.passes[0].generate_ns
    steps = 8 if name == "home made" else 5
    assert prof.steps()["phase"].tolist() == ["prefill"] + ["decode"] * (steps - 1)
    assert prof.anatomy.to_dict() == MODELS[name][1]


def test_each_part_says_when_it_ran_and_how_it_was_found():
    model, kwargs = builders.event_model()
    found = {part.path: part for part in profkit.inspect(model, **kwargs).parts}
    assert found["model.visual_tower.visual_tower"].calls == Calls(before=5)
    assert found["model.visual_tower.visual_tower"].found_by == "structure, probe"
    assert found["model.layers"].calls == Calls(prefill=1, decode=1)
    assert found["model.embed_tokens"].found_by == "get_input_embeddings(), probe"


def test_work_outside_modules_is_merge():
    """EventGPT pools features and splices them into the prompt between calls of modules."""
    model, kwargs = builders.event_model()
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    stages = prof.stages()
    assert stages.loc["vision", "calls"] == 5
    assert stages.loc["projector", "calls"] == 10
    assert stages.loc["merge", "host_ns"] > 0


def test_a_tower_behind_another_module_is_no_tower():
    """What a tower feeds is a projector even where it holds layers, as a Q-Former does."""
    model, kwargs = builders.blip2()
    structural = structure.find(model).to_dict()
    assert structural["vision_towers"] == ["vision_model", "qformer"]
    assert profkit.inspect(model, **kwargs).paths("vision_tower") == ["vision_model"]


def test_without_inputs_they_are_made_up():
    for build, what in ((builders.small_llava, "noise as image of 4 tokens"), (builders.t5, "text alone")):
        found = profkit.inspect(build()[0])
        assert found.ambiguities[-1] == f"Watched with made-up inputs: {what}."
        assert found.path("decoder_layers")
    model, _ = home_made()
    found = profkit.inspect(model)
    assert "no inputs were given, and none could be made up" in found.notes[-1]


def test_the_user_knows_better():
    model, kwargs = builders.small_llava()
    found = profkit.inspect(model, parts={"projector": "model.multi_modal_projector.linear_2"}, **kwargs)
    assert found.paths("projector") == ["model.multi_modal_projector.linear_2"]
    assert next(part.found_by for part in found.parts if part.role == "projector") == "user"
    with profkit.profile(model, anatomy=found) as prof:
        model.generate(**kwargs)
    modules = prof.modules().set_index("path")
    assert modules.loc["model.multi_modal_projector.linear_2", "stage"] == "projector"
    with pytest.raises(InputError, match="There is no role 'eye'"):
        profkit.inspect(model, parts={"eye": "model.vision_tower"})
    with pytest.raises(InputError, match=r"no module 'model.merger' to be its projector"):
        profkit.inspect(model, parts={"projector": "model.merger"})


def test_candidates_are_named():
    model, kwargs = home_made()
    found = profkit.inspect(model, **kwargs)
    assert found.ambiguities == ("2 candidates for decoder_layers: blocks, eye; took blocks.",)


def test_refusals_say_what_was_tried_and_what_to_pass():
    model, kwargs = builders.small_llava()
    with pytest.raises(
        AnatomyError, match=r"refused the inputs \(input_ids, pixel_values\) in a probing run"
    ) as caught:
        profkit.inspect(model, input_ids=torch.tensor([[1, 98]]), pixel_values=kwargs["pixel_values"])
    assert "--part role=path" in str(caught.value)
    with torch.device("meta"):
        empty = type(model)(model.config)
    with pytest.raises(AnatomyError, match="on the meta device"):
        profkit.inspect(empty)
    silent = builders.HomeMade()
    silent.generate = lambda **_: torch.zeros(1, 1)
    with pytest.raises(AnatomyError, match="no list of layers ran in it"):
        profkit.inspect(silent, ids=torch.tensor([[1]]))


def test_an_error_in_the_search_leaves_generate_alone():
    """The probing run may fail where the user's does not: structure must do, and that is said."""
    model, kwargs = builders.small_llava()
    generate, calls = model.generate, []

    def only_once(**given):
        calls.append(given["max_new_tokens"])
        if given["max_new_tokens"] == 2:
            raise RuntimeError("not two tokens")
        return generate(**given)

    model.generate = only_once
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    assert calls == [2, 5]
    assert "parts are known by structure alone" in prof.manifest["faults"][0]
    assert len(prof.steps()) == 5


def test_the_search_is_made_once_for_a_model_and_its_kind_of_input():
    model, kwargs = builders.small_llava()
    first = inspection.anatomy_for(model, kwargs)
    assert inspection.anatomy_for(model, {**kwargs, "max_new_tokens": 3}) is first
    text = {"input_ids": torch.tensor([[1, 5]]), "max_new_tokens": 3}
    assert inspection.anatomy_for(model, text).notes == (
        "vision_tower model.vision_tower never fired during generate().",
        "projector model.multi_modal_projector never fired during generate().",
    )


def test_what_is_wrapped_around_a_model_is_looked_through():
    model, kwargs = builders.small_llava()
    expected = MODELS["llava"][1]
    assert profkit.inspect(nn.DataParallel(model), **kwargs).to_dict() == expected
    tied = copy.deepcopy(model)
    tied.lm_head.weight = tied.model.language_model.embed_tokens.weight
    assert profkit.inspect(tied, **kwargs).to_dict() == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_quantised_layers():
    model, kwargs = builders.small_llava()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert profkit.inspect(quantised, **kwargs).to_dict() == MODELS["llava"][1]


def test_adapters_around_a_model():
    peft = pytest.importorskip("peft")
    model, kwargs = builders.small_llava()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "linear_1"], r=2))
    found = profkit.inspect(adapted, **kwargs).to_dict()
    assert found["vision_towers"] == ["base_model.model.model.vision_tower"]
    assert found["projectors"] == ["base_model.model.model.multi_modal_projector"]
    assert found["lm_head"] == "base_model.model.lm_head"


def test_a_model_spread_over_devices(tmp_path):
    pytest.importorskip("accelerate")
    model, kwargs = builders.small_llava()
    model.save_pretrained(tmp_path / "model")
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    spread = type(model).from_pretrained(
        tmp_path / "model", device_map={**places, "model.language_model": "disk"}, offload_folder=tmp_path / "off"
    )
    assert any(parameter.is_meta for parameter in spread.parameters())
    assert profkit.inspect(spread, **kwargs).to_dict() == MODELS["llava"][1]
    with profkit.profile(spread) as prof:
        tokens = spread.generate(**kwargs)
    assert torch.equal(tokens, model.generate(**kwargs))
    assert len(prof.steps()) == 5


@pytest.mark.parametrize("path", ["model.language_model", "model.vision_tower"])
def test_a_compiled_part_is_timed_as_one(path):
    model, kwargs = builders.small_llava()
    plain = model.generate(**kwargs)
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, torch.compile(model.get_submodule(path), backend="eager"))
    model.generate(**kwargs)
    with profkit.profile(model) as prof:
        assert torch.equal(model.generate(**kwargs), plain)
    assert prof.steps()["phase"].tolist() == ["prefill", *["decode"] * 4]
    assert prof.stages().loc["vision", "calls"] == 1
    assert f"{path}._orig_mod is compiled" in " ".join(prof.anatomy.notes)


def test_assisted_decoding_shows_the_other_model():
    model, kwargs = builders.small_llava()
    assistant, _ = builders.small_llava()
    kwargs.pop("min_new_tokens")  # transformers 4 refuses it beside an assistant
    with profkit.profile(model) as prof:
        model.generate(**kwargs, assistant_model=assistant)
    row = prof.modules().set_index("path").loc["assistant_model"]
    assert row["stage"] == "other"
    assert row["calls"] >= 1
    assert "forward" not in assistant.__dict__


@pytest.mark.skipif(not hasattr(transformers, "T5Gemma2Config"), reason="transformers 4 has no such model")
def test_an_encoder_of_text_and_media_is_neither_tower_nor_projector():
    """T5Gemma 2 encodes the image, merges it into the text and encodes both, all in one module."""
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    text = {**layers, **kinds, "vocab_size": 99, "num_key_value_heads": 2, "head_dim": 8}
    vision = {**layers, "image_size": 28, "patch_size": 7}
    media = {"vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 98}
    torch.manual_seed(0)
    config = transformers.T5Gemma2Config(
        encoder={"text_config": text, "vocab_size": 99, **media}, decoder=text, image_token_index=98
    )
    model = transformers.T5Gemma2ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 98, 98, 98, 98, 7]])
    kwargs = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28), "decoder_start_token_id": 1}
    found = profkit.inspect(model, **kwargs)
    assert found.paths("vision_tower") == ["model.encoder.vision_tower"]
    assert found.paths("projector") == ["model.encoder.multi_modal_projector"]
    assert found.paths("encoder") == ["model.encoder.text_model.layers"]
    with profkit.profile(model) as prof:
        model.generate(**kwargs, **builders.GENERATION)
    assert prof.steps()["phase"].tolist() == ["prefill", *["decode"] * 4]
    assert prof.modules().set_index("path").loc["model.encoder.text_model.layers.0", "stage"] == "prefill"
