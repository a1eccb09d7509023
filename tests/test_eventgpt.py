"""EventGPT against data that the original code made, and its checkpoints in every form."""

from __future__ import annotations

import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import event_model
from handmade import SHARED_TRACES
from safetensors.torch import load_file, save_file

from profkit import event_streams, eventgpt, models
from profkit.errors import InputError
from profkit.eventgpt import OLD_TOWER, TOWER, EventGPT, EventGPTConfig

REFERENCE = SHARED_TRACES.parent / "eventgpt"
pytestmark = pytest.mark.smoke
with_reference = pytest.mark.skipif(not REFERENCE.exists(), reason="the reference data are not beside this checkout")
ONES = ("norm.weight", "layernorm.weight", "layrnorm.weight", "layer_norm1.weight", "layer_norm2.weight")


def reference_weight(name: str, shape: list[int]) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    values *= np.float32(0.02)
    return torch.from_numpy(values + np.float32(1) if name.endswith(ONES) else values)


@with_reference
def test_frames_equal_the_originals_to_the_pixel():
    drawn = event_streams.frames(event_streams.read_stream(REFERENCE / "events.npz"))
    with np.load(REFERENCE / "frames.npz") as expected:
        assert len(drawn) == len(expected.files) == 5
        for number, frame in enumerate(drawn):
            assert np.array_equal(frame, expected[f"frame{number}"])


@with_reference
def test_features_logits_and_tokens_are_those_of_the_original(tmp_path: Path):
    told = json.loads((REFERENCE / "model.json").read_text())
    parameters = dict(told["parameters"])
    save_file(
        {name: reference_weight(name, shape) for name, shape in parameters.items()}, tmp_path / "model.safetensors"
    )
    clip = {key: told["clip_config"][key] for key in ("num_attention_heads", "projection_dim", "hidden_act")}
    measured = eventgpt._tower_config({eventgpt._renamed(name, TOWER): shape for name, shape in parameters.items()})
    # The tiny tower's heads are wider than CLIP's, so the configuration must say so.
    config = {**told["llm_config"], "visual_tower": {**measured, **clip}}
    assert {key: measured[key] for key in measured if key != "num_attention_heads"} == {
        key: told["clip_config"][key] for key in measured if key != "num_attention_heads"
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = eventgpt.from_checkpoint(tmp_path)
    expected = load_file(REFERENCE / "reference.safetensors")
    frames = list(expected["pixel_values"].float())
    with torch.no_grad():
        features = model.model._encode_frame(frames[0])
        embeds, _ = model.spliced(expected["input_ids"], [frames])
    torch.testing.assert_close(features[::4, ::64], expected["adaptor_frame0_rows_every_4_cols_every_64"])
    torch.testing.assert_close(embeds[0][:, ::64], expected["prompt_embeds_cols_every_64"])
    output = model.generate(
        expected["input_ids"],
        event_tensors=[frames],
        event_image_sizes=told["event_image_size"],
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert output.sequences.tolist() == expected["tokens"].tolist()
    torch.testing.assert_close(output.logits[0][0], expected["first_step_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.logits[-1][0], expected["last_step_logits"], atol=1e-4, rtol=0)


@with_reference
def test_parameter_names_are_those_of_checkpoints():
    model, _ = event_model()
    told = json.loads((REFERENCE / "model.json").read_text())
    known = {eventgpt._renamed(name, TOWER).replace(".2.", ".1.") for name, _ in dict(told["parameters"]).items()}
    own = {eventgpt._renamed(name, TOWER).replace(".2.", ".1.") for name in model.state_dict()}
    # The reference has three layers, the small model two.
    assert own == known


# -- checkpoints -------------------------------------------------------------------------------------


def saved(folder: Path, old_tower: bool = False, **config) -> tuple[EventGPT, dict[str, torch.Tensor]]:
    """Write a configuration as released (without that of the tower), and return the model and its weights by name."""
    model, _ = event_model()
    told = {key: value for key, value in model.config.to_dict().items() if key not in ("visual_tower", "architectures")}
    (folder / "config.json").write_text(json.dumps({**told, "visual_tower": model.config.visual_tower, **config}))
    prefix = OLD_TOWER if old_tower else TOWER
    return model, {eventgpt._renamed(name, prefix): value.clone() for name, value in model.state_dict().items()}


def same(one: EventGPT, other: EventGPT) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("form", ["safetensors", "old tower", "sharded", "bin"])
def test_checkpoints_in_every_form(form: str, tmp_path: Path):
    model, weights = saved(tmp_path, old_tower=form == "old tower")
    names = sorted(weights)
    if form == "sharded":
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            save_file({name: weights[name] for name in part}, tmp_path / f"model-{number:05}-of-00002.safetensors")
    elif form == "bin":
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        save_file(weights, tmp_path / "model.safetensors")
    assert same(eventgpt.from_checkpoint(tmp_path), model)
    loaded = models.load_model(str(tmp_path), torch.device("cpu"))
    assert isinstance(loaded.model, EventGPT) and loaded.why_no_processor


def test_a_bin_file_runs_no_code(tmp_path: Path):
    saved(tmp_path)
    touched = tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return Path.touch, (touched,)

    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        pickle.dump({"lm_head.weight": Evil()}, file)
    with pytest.raises(InputError, match="Cannot read the weights"):
        eventgpt.from_checkpoint(tmp_path)
    assert not touched.exists()


def test_weights_that_are_missing_or_do_not_fit(tmp_path: Path):
    _, weights = saved(tmp_path)
    del weights["lm_head.weight"]
    weights["model.feature_adaptor.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 weights are missing \(lm_head.weight\); 1 have another shape") as raised:
        eventgpt.from_checkpoint(tmp_path)
    assert "feature_adaptor.weight [3, 3] instead of [32, 32]" in str(raised.value)


def test_a_directory_without_weights(tmp_path: Path):
    saved(tmp_path)
    with pytest.raises(InputError, match="holds no weights"):
        eventgpt.from_checkpoint(tmp_path)


# -- generate() --------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_and_gives_each_samples_tokens():
    model, kwargs = event_model()
    torch.manual_seed(1)
    frames = [torch.randn(3, 28, 28) for _ in range(5)]
    short, long = torch.tensor([[1, -200, 7, 8]]), torch.tensor([[1, -200, 7, 9]])
    options = {key: kwargs[key] for key in ("max_new_tokens", "min_new_tokens", "do_sample")}
    alone = [model.generate(ids, event_tensors=[frames], **options) for ids in (short, long)]
    both = model.generate(torch.cat([short, long]), event_tensors=[frames, frames], **options)
    assert both.tolist() == [alone[0][0].tolist(), alone[1][0].tolist()]


def test_events_are_needed_and_must_match():
    model, kwargs = event_model()
    with pytest.raises(NotImplementedError, match="give event_tensors"):
        model.generate(kwargs["inputs"])
    with pytest.raises(ValueError, match="1 prompts and the events of 2 samples"):
        model.generate(kwargs["inputs"], event_tensors=kwargs["event_tensors"] * 2)
    with pytest.raises(ValueError, match="this one has it 0 times"):
        model.generate(torch.tensor([[1, 2]]), event_tensors=kwargs["event_tensors"])


def test_pooling_keeps_a_row_a_frame_and_a_row_a_patch():
    model, kwargs = event_model()
    with torch.no_grad():
        pooled = model.model.encode_events(kwargs["event_tensors"][0])
        single = torch.stack([model.model._encode_frame(frame) for frame in kwargs["event_tensors"][0]])
    # 5 frames, (28 / 14)² patches and the class token: 5 + 5 rows
    assert pooled.shape == (5 + 5, 32)
    torch.testing.assert_close(pooled[3], single[3].mean(0))
    torch.testing.assert_close(pooled[5 + 2], single[:, 2].mean(0))


def test_prompts_are_cut_where_the_original_cuts_them():
    config = EventGPTConfig(**{**event_model()[0].config.to_dict(), "max_position_embeddings": 4096})
    model = EventGPT(config).eval()
    ids = torch.full((1, 2100), 5)
    ids[0, 3] = -200
    embeds, mask = model.spliced(ids, [[torch.randn(3, 28, 28)]])
    assert embeds.shape[:2] == mask.shape == (1, 2048)


def test_a_model_is_made_once(monkeypatch):
    """At full size a second decoder, made only to be replaced, is 13 GB."""
    made: list[int] = []
    plain = torch.nn.Embedding.__init__

    def counted(self, *args, **kwargs):
        made.append(args[0])
        plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Embedding, "__init__", counted)
    loaded = models.load_model("tiny-eventgpt", torch.device("cpu"))
    vocabulary = loaded.model.config.vocab_size
    assert made.count(vocabulary) == 1
