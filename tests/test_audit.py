"""Was anything encoded twice? The mistake of the published benchmark, in each of the three systems, and its kin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from builders import small_llava, tiny_llava
from click.testing import CliRunner

import profkit
from profkit import checks, cli, encodings, models, samples, text
from profkit.sample_lists import Item
from profkit.sampling import Plan, describe, measure

OPTIONS = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
SYSTEMS = ("tiny-llava", "tiny-video-llava", "tiny-eventgpt")


def system(name: str):
    """A preset and the arguments of its generate()."""
    loaded = models.load_model(name, torch.device("cpu"))
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 2)
    return loaded.model, {**sample.transfer(sample.preprocess(sample.load())), **OPTIONS}


def vision_alone(model, kwargs):
    """What the published benchmark timed as its stage 3, ahead of generate()."""
    if "pixel_values" in kwargs:
        return model.get_image_features(kwargs["pixel_values"])
    if "pixel_values_videos" in kwargs:
        return model.model.get_video_features(kwargs["pixel_values_videos"])
    return model.model.encode_events(kwargs["event_tensors"][0])


def repeats(run):
    checks = run.manifest["checks"]["encoded"]
    assert run.manifest["faults"] == [] and checks["not_compared"] == 0
    return checks["repeats"]


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_original_mistake_is_caught(name):
    model, kwargs = system(name)
    with torch.no_grad(), profkit.profile(model) as prof:
        vision_alone(model, kwargs)
        model.generate(**kwargs)
    (found,) = repeats(prof)
    spans = prof.representative
    assert found["items"] == {"tiny-llava": 1, "tiny-video-llava": 8, "tiny-eventgpt": 5}[name]
    assert found["place"].startswith("outside generate()") and "test_audit.py" in found["place"]
    assert found["place"].endswith("in vision_alone)") and found["other"].endswith(f"in {here()})")
    assert found["proof"] == "same storage"
    # All that ran outside is lost: tower, projector, and the method around them.
    outside = spans.nearest(spans.is_kind("generate")) < 0
    lost_ns = spans.total_ns[outside & (spans.depth == 0)].sum()
    assert found["lost_ms"] == pytest.approx(lost_ns / 1e6)
    assert any(
        "encoded twice" in str(line) and "ms lost" in str(line) for line in text.check_lines(checks.kept_verdicts(prof))
    )


def here() -> str:
    return "test_the_original_mistake_is_caught"


@pytest.mark.parametrize("name", SYSTEMS)
def test_honest_use_is_not_reported(name):
    model, kwargs = system(name)
    with profkit.profile(model) as prof:
        for _ in range(2):
            model.generate(**kwargs)
    assert repeats(prof) == []


def test_media_that_beams_multiply():
    """Some versions of transformers encode an image once a beam, some once: what is reported is what happened."""
    model, kwargs = system("tiny-llava")
    encoded = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    with profkit.profile(model) as prof:
        encoded.clear()
        model.generate(**kwargs, num_beams=3)
    hook.remove()
    assert sum(one["items"] for one in repeats(prof)) == encoded[-1] - 1


def test_equal_content_in_another_tensor_and_dtype():
    model, kwargs = system("tiny-llava")
    model.bfloat16()
    pixels = kwargs["pixel_values"]
    with torch.no_grad(), profkit.profile(model) as prof:
        model.model.vision_tower(pixels.bfloat16())
        model.generate(**{**kwargs, "pixel_values": pixels})
    (found,) = repeats(prof)
    assert (found["proof"], found["items"]) == ("equal content", 1)


def test_another_image_is_another_image():
    model, kwargs = system("tiny-llava")
    with torch.no_grad(), profkit.profile(model) as prof:
        vision_alone(model, {"pixel_values": kwargs["pixel_values"].flip(-1)})
        model.generate(**kwargs)
    assert repeats(prof) == []


def test_a_tower_that_generate_itself_runs_twice():
    model, kwargs = system("tiny-llava")
    inner, tower = model.model.get_image_features, model.model.vision_tower

    def wasteful(pixel_values, **others):
        tower(pixel_values)
        return inner(pixel_values, **others)

    model.model.get_image_features = wasteful
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    (found,) = repeats(prof)
    assert found["place"].startswith("in generate()") and found["other"].startswith("in generate()")
    assert found["items"] == 1 and found["lost_ms"] > 0
    assert found["lost_ms"] < prof.stages()["host_ms"]["vision"]


def test_frames_that_look_alike_are_frames():
    model, kwargs = system("tiny-video-llava")
    frames = kwargs["pixel_values_videos"]
    still = {**kwargs, "pixel_values_videos": frames[:, :1].expand_as(frames).contiguous()}
    with torch.no_grad(), profkit.profile(model) as prof:
        model.generate(**still)
    assert repeats(prof) == []


def test_inputs_changed_or_let_go_are_not_compared(monkeypatch):
    model, kwargs = system("tiny-llava")
    pixels = kwargs["pixel_values"].clone()
    with torch.no_grad(), profkit.profile(model) as prof:
        vision_alone(model, {"pixel_values": pixels})
        pixels.zero_()
        model.generate(**kwargs)
    assert prof.manifest["checks"]["encoded"] == {"repeats": [], "not_compared": 1}
    monkeypatch.setattr(encodings, "MOST_HELD_BYTES", pixels.numel() * 4)
    with torch.no_grad(), profkit.profile(model) as prof:
        vision_alone(model, kwargs)
        model.generate(**kwargs)
    assert prof.manifest["checks"]["encoded"] == {"repeats": [], "not_compared": 1}


def test_a_failing_audit_does_not_reach_the_program(monkeypatch):
    model, kwargs = system("tiny-llava")

    def broken(self, args, kwargs):
        raise RuntimeError("audit")

    monkeypatch.setattr(encodings.Encodings, "add", broken)
    monkeypatch.setattr(encodings.Encodings, "note_given", broken)
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    assert sorted(prof.manifest["faults"]) == [
        "arguments of generate(): RuntimeError: audit",
        "note of a mark: RuntimeError: audit",
    ]


class EncodesFirst:
    """A processor that runs the tower itself, as user code may."""

    def __init__(self, loaded):
        self.loaded = loaded

    def __getattr__(self, name):
        return getattr(self.loaded.processor, name)

    def __call__(self, **inputs):
        batch = self.loaded.processor(**inputs)
        with torch.no_grad():
            self.loaded.model.model.vision_tower(batch["pixel_values"])
        return batch


def wasteful_processor():
    loaded = tiny_llava()
    return loaded.model, EncodesFirst(loaded)


def test_a_processor_that_encodes(tmp_path: Path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = tmp_path / "run"
    arguments = ["trace", "test_audit:wasteful_processor", "--repeat", "1", "--no-profile", "--out", str(out)]
    result = CliRunner().invoke(cli.cli, [*arguments, "--max-new-tokens", "2", "--json"])
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["checks"]["encoded"]["repeats"]
    assert found["place"].startswith("in preprocess(), outside generate() (") and found["place"].endswith("__call__)")
    assert found["other"] == "in generate()"


def test_samples_say_what_was_encoded_twice(tmp_path: Path):
    model, processor = wasteful_processor()
    plan = Plan(2, options=OPTIONS)
    items = [Item(str(number), (samples.default_image(),)) for number in range(2)]
    run = measure(model, processor, items, tmp_path / "run", plan, describe(model, plan, {"model": "wasteful"}))
    assert (run.good["encoded_again_ms"] > 0).all()
    assert all("encoded twice" in notes[-1] for notes in run.good["notes"])


@pytest.mark.parametrize(("outside", "uses", "needless"), [(1, 1, 0), (2, 1, 1), (4, 1, 3), (2, 2, 0), (3, 2, 1)])
def test_a_tower_run_ahead_more_often_than_it_is_used(outside, uses, needless):
    model, kwargs = small_llava()
    pixels = kwargs.pop("pixel_values")
    with profkit.profile(model) as prof:
        for _ in range(outside):
            features = model.base_model.get_image_features(pixel_values=pixels, return_dict=True)
        for _ in range(uses):
            model.generate(**kwargs, mm_encoder_outputs={"image": features})
    repeats = prof.manifest["checks"]["encoded"]["repeats"]
    assert sum(one["items"] for one in repeats) == needless * len(pixels)
    assert all(one["proof"] == "same storage" and one["lost_ms"] > 0 for one in repeats)
