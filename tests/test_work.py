"""Work: closed forms with their arithmetic, exact sums, the same without weights, and a model left as it was."""

from __future__ import annotations

import threading

import builders
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_zoo import TRUTH, build
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import profkit
from profkit import fakes, formulas, inspection, jobs, models, passes, prompts, samples, workload
from profkit.errors import InputError, MeasurementError
from profkit.probes import sequences
from profkit.work import FLOOR, QUANTITIES

MODELS = [
    builders.small_llava,
    builders.qwen2_vl,
    builders.blip2,
    builders.whisper,
    builders.t5,
    builders.event_model,
]
OPTIONS = {
    **dict.fromkeys(("dtype", "weights"), "auto"),
    **dict.fromkeys(("prompt", "event_window", "sensor", "attention")),
    "trust_remote_code": False,
    "part": (),
}


def counted(make, **options):
    model, kwargs = make()
    return workload.count(model, kwargs, inspection.anatomy_for(model, kwargs), **options)


def with_weights(monkeypatch, model, kwargs, anatomy):
    def refuse(*_):
        raise MeasurementError("asked to count with weights")

    with monkeypatch.context() as patch:
        patch.setattr(fakes, "without_weights", refuse)
        return workload.count(model, kwargs, anatomy)


# -- closed forms ------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_clip_and_llama_by_hand():
    stages = counted(builders.small_llava).stages()["flops"]
    # CLIP, 28 x 28 in patches of 14: 4 patches and the class token, 5 tokens of 32.
    patches = 2 * 4 * 32 * (3 * 14 * 14)
    # A layer: q, k, v, o and two matrices of 32 x 37; scores and values, 5 x 5 each.
    layer = 2 * 5 * (4 * 32 * 32 + 2 * 32 * 37) + 2 * 2 * 5 * 5 * 32
    assert stages["vision"] == patches + 2 * layer == 286_208
    # Two linear layers of 32 x 32 for each of 4 patches.
    assert stages["projector"] == 2 * 4 * 2 * 32 * 32 == 16_384
    # Llama over a prompt of 8: q, k, v, o, three matrices of 32 x 37, attention over 8 x 8, counted whole.
    linear = 4 * 32 * 32 + 3 * 32 * 37
    prefill = 2 * (2 * 8 * linear + 4 * 8 * 8 * 32)
    # Four decode steps over contexts of 9 to 12.
    decode = 2 * (4 * 2 * linear + 4 * (9 + 10 + 11 + 12) * 32)
    # transformers 4 multiplies the 4 frequencies of the positions as matrices, by 1 for each token.
    rotary = stages["prefill"] - prefill
    assert rotary in (0, 2 * 4 * 8)
    assert (stages["prefill"] - rotary, stages["decode"] - rotary / 2) == (261_120, 133_120) == (prefill, decode)
    assert stages["head"] == 5 * 2 * 32 * 99
    assert set(stages.index[stages == 0]) == {"merge", "setup", "embed", "select"}


def test_bytes_by_hand():
    work = counted(builders.small_llava)
    steps = work.steps()
    decode = steps[steps["phase"] == "decode"]
    # Keys and values of 2 layers, 32 floats of 4 bytes each: 512 bytes a token.
    assert decode["cache_read_bytes"].tolist() == [512 * context for context in (8, 9, 10, 11)]
    assert decode["cache_written_bytes"].tolist() == [512] * 4
    assert steps["cache_written_bytes"][0] == 8 * 512 and steps["cache_read_bytes"][0] == 0
    layer = 4 * 32 * 32 + 3 * 32 * 37 + 2 * 32
    # Two layers, the norm, the head, one row of the embedding, and 4 frequencies of the positions.
    assert decode["weight_bytes"].tolist() == [4 * (2 * layer + 32 + 32 * 99 + 32 + 4)] * 4
    # The projector is given four patches of 32 by the tower: written once, read once.
    assert work.stages()["activation_bytes"]["projector"] == 2 * 4 * 32 * 4
    assert (work.stages()["bytes"] <= work.stages()["operator_bytes"].clip(lower=1)).all()


def test_a_weight_that_is_shared_counts_once_a_step():
    def tied():
        model, kwargs = builders.small_llava()
        model.lm_head.weight = model.get_input_embeddings().weight
        return model, kwargs

    step = counted(tied).steps().iloc[1]
    other = counted(builders.small_llava).steps().iloc[1]
    # The row that was looked up is one of those that the head reads; the order of touch decides who is charged.
    assert step["weight_bytes"] == other["weight_bytes"] - 32 * 4


def closed_form_7b(tokens, context):
    """LLaVA-1.5-7B's decoder: 32 layers of 4096, 11008 inside; `tokens` at once, `context` with them."""
    linear = 4 * 4096**2 + 3 * 4096 * 11008
    return 32 * (2 * tokens * linear + 4 * tokens * context * 4096)


@pytest.mark.smoke
def test_llava_7b_without_its_weights():
    work, dtype = jobs.count("llava-1.5-7b", (), {**OPTIONS, "max_new_tokens": 3}, lambda what: None)
    assert dtype == "bfloat16" and work.about["weights"] == "fake"
    stages, steps, prompt = work.stages()["flops"], work.decoder_steps()["flops"], work.about["prompt_tokens"]
    # CLIP-L: 24 layers of 1024 over 24 x 24 patches of 14 x 14 and the class token.
    clip = 2 * 576 * 1024 * 588 + 24 * (2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 4 * 577**2 * 1024)
    assert stages["vision"] == pytest.approx(clip, rel=0.01)
    assert stages["projector"] == 2 * 576 * (1024 * 4096 + 4096**2)
    assert steps[0] == pytest.approx(closed_form_7b(prompt, prompt), rel=0.01)
    for number in (1, 2):
        assert steps[number] == pytest.approx(closed_form_7b(1, prompt + number), rel=0.01)
    assert stages["head"] == 3 * 2 * 4096 * 32064
    assert work.parts.set_index("role")["parameters"]["decoder_layers"] == 32 * (202_375_168 + 2 * 4096)


def test_a_checkpoint_is_counted_without_reading_its_weights(tmp_path):
    loaded = builders.tiny_llava()
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    options = {**OPTIONS, "max_new_tokens": 3}
    work, dtype = jobs.count(str(tmp_path), (), options, lambda what: None)
    preset, _ = jobs.count("tiny-llava", (), options, lambda what: None)
    assert dtype == "float32"
    assert work.total()["flops"] == preset.total()["flops"] and work.parts.equals(preset.parts)


def test_the_attention_that_is_asked_for_is_counted_or_refused():
    options = {**OPTIONS, "max_new_tokens": 2}
    default, _ = jobs.count("tiny-llava", (), options, lambda what: None)
    eager, _ = jobs.count("tiny-llava", (), {**options, "attention": "eager"}, lambda what: None)
    loaded = models.load_model("tiny-llava", torch.device("cpu"))
    models.choose_attention(loaded.model, "eager")
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 2)
    kwargs = {**passes.prepared(sample), "max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    real = workload.count(loaded.model, kwargs, inspection.anatomy_for(loaded.model, kwargs))
    columns = ["flops", "operator_bytes", "operators"]
    pd.testing.assert_frame_equal(eager.stages()[columns], real.stages()[columns])
    assert eager.stages().loc["vision", "operators"] > default.stages().loc["vision", "operators"]
    with pytest.raises(InputError, match="--attention flash_attention_2"):
        jobs.count("tiny-llava", (), {**options, "attention": "flash_attention_2"}, lambda what: None)


# -- sums, and the same without weights --------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_without_weights_as_with_them(make, monkeypatch):
    model, kwargs = make()
    anatomy = inspection.anatomy_for(model, kwargs)
    fake, real = workload.count(model, kwargs, anatomy), with_weights(monkeypatch, model, kwargs, anatomy)
    assert fake.about["weights"] == "fake" and real.about["weights"] == "real"
    pd.testing.assert_frame_equal(fake.table, real.table)
    for one in (fake.stages(), fake.steps(), fake.modules()):
        for name in QUANTITIES:
            assert one[name].sum() == fake.total()[name] == fake.table[name].sum()
    assert fake.total()["bytes"] == fake.table[list(FLOOR)].to_numpy().sum()
    assert fake.operators["flops"].sum() == fake.total()["flops"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-video-llava", "tiny-eventgpt"])
def test_the_three_systems(name, monkeypatch):
    loaded = models.load_model(name, torch.device("cpu"))
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 3)
    kwargs = {**passes.prepared(sample), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    anatomy = inspection.anatomy_for(loaded.model, kwargs)
    real = with_weights(monkeypatch, loaded.model, kwargs, anatomy)
    pd.testing.assert_frame_equal(workload.count(loaded.model, kwargs, anatomy).table, real.table)
    # The same from the preset alone, with parts that structure tells.
    made, _ = jobs.count(name, (), {**OPTIONS, "max_new_tokens": 3}, lambda what: None)
    assert made.stages()["flops"].to_dict() == real.stages()["flops"].to_dict()
    media_tokens = prompts.media_tokens(loaded.model, kwargs, anatomy)
    assert made.about["media_tokens"] == media_tokens > 0


ZOO = ["florence2", "gemma3", "idefics3", "mllama", "qwen2_audio", "qwen3_5_moe", "voxtral"]


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.skipif(not TRUTH, reason="the zoo is not here")
def test_the_zoo(name, monkeypatch):
    model, kwargs = build(name)
    anatomy = inspection.anatomy_for(model, kwargs)
    fake, real = workload.count(model, kwargs, anatomy), with_weights(monkeypatch, model, kwargs, anatomy)
    assert fake.about["weights"] == "fake"
    pd.testing.assert_frame_equal(fake.table, real.table)


@pytest.mark.smoke
def test_the_model_and_the_random_state_stay():
    model, kwargs = builders.small_llava()
    anatomy = inspection.anatomy_for(model, kwargs)
    before = {name: (id(one), one.clone()) for name, one in model.state_dict(keep_vars=True).items()}
    tokens, state = sequences(model.generate(**kwargs)), torch.get_rng_state()
    # After a first generate(), as transformers puts hooks of its own on then.
    attributes = {path: dict(vars(module)) for path, module in model.named_modules()}
    workload.count(model, {**kwargs, "do_sample": True}, anatomy)
    assert torch.equal(torch.get_rng_state(), state)
    assert {path: vars(module) for path, module in model.named_modules()} == attributes
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == number and torch.equal(after[name], one) for name, (number, one) in before.items())
    assert torch.equal(sequences(model.generate(**kwargs)), tokens)


# -- steps on a line -----------------------------------------------------------------------------------


def llama(**config):
    torch.manual_seed(0)
    made = transformers.MistralConfig(**builders.LLAMA, num_key_value_heads=2, pad_token_id=0, **config)
    ids = torch.tensor([[5, 6, 7, 8]])
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "min_new_tokens": 20}
    return transformers.MistralForCausalLM(made).eval(), {**kwargs, "do_sample": False}


@pytest.mark.smoke
def test_later_steps_follow_from_a_few():
    line, whole = counted(llama, new_tokens=20), counted(llama)
    assert line.about["steps_counted"] == 6 and line.about["steps"] == whole.about["steps_counted"] == 20
    assert line.steps()["counted"].tolist() == [True] * 6 + [False] * 14
    keys = ["step", "stage", "path"]
    one, other = (work.table.drop(columns="counted").sort_values(keys, ignore_index=True) for work in (line, whole))
    pd.testing.assert_frame_equal(one, other)


def test_the_last_step_is_counted_whatever_the_prompt_is():
    model, kwargs = builders.event_model()
    anatomy = inspection.anatomy_for(model, kwargs)
    kwargs |= {"max_new_tokens": 12, "min_new_tokens": 12}
    assert workload.count(model, kwargs, anatomy, new_tokens=12).about["steps_counted"] == 6

    def embedded():
        model, kwargs = llama()
        ids = kwargs.pop("input_ids")
        return model, {**kwargs, "inputs_embeds": model.get_input_embeddings()(ids).detach()}

    assert counted(embedded, new_tokens=20).about["steps_counted"] == 6


def test_a_window_that_closes_later_is_counted_step_by_step():
    def windowed():
        return llama(sliding_window=14)

    found, whole = counted(windowed, new_tokens=20), counted(windowed)
    assert found.about["steps_counted"] == 20 and not found.about["line"]
    pd.testing.assert_frame_equal(found.table, whole.table)
    # The cache stops to grow: 13 of 14 are kept, the new one is the 14th.
    assert found.steps()["cache_read_bytes"].diff().iloc[-3:].tolist() == [0, 0, 0]


def test_a_window_that_closes_after_many_steps_is_not_followed_past_its_end():
    def windowed():
        model, kwargs = llama(sliding_window=80)
        return model, {**kwargs, "max_new_tokens": 90, "min_new_tokens": 90}

    found = counted(windowed, new_tokens=90)
    assert found.about["steps_counted"] == 90
    assert found.steps()["cache_read_bytes"].diff().iloc[-3:].tolist() == [0, 0, 0]


def test_a_cache_and_a_streamer_of_the_users_stay_as_they_are():
    class Streamer:
        shown = 0

        def put(self, tokens):
            self.shown += 1

        def end(self):
            self.shown += 1

    model, kwargs = llama()
    cache, streamer = transformers.DynamicCache(config=model.config), Streamer()
    kwargs |= {"past_key_values": cache, "streamer": streamer, "max_new_tokens": 8, "min_new_tokens": 8}
    anatomy = inspection.anatomy_for(model, llama()[1])
    work = workload.count(model, kwargs, anatomy, new_tokens=8)
    assert work.about["weights"] == "fake" and cache.get_seq_length() == 0 and streamer.shown == 0
    plain = workload.count(*llama(), anatomy, new_tokens=20)
    assert work.steps()["flops"].tolist() == plain.steps()["flops"].tolist()[:8]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 3},
        {"use_cache": False},
        {"repetition_penalty": 1.2, "output_scores": True, "return_dict_in_generate": True},
    ],
    ids=lambda one: next(iter(one)),
)
def test_ways_of_generating(options, monkeypatch):
    model, kwargs = builders.small_llava()
    anatomy, kwargs = inspection.anatomy_for(model, kwargs), {**kwargs, **options}
    fake, real = workload.count(model, kwargs, anatomy, new_tokens=5), with_weights(monkeypatch, model, kwargs, anatomy)
    assert fake.about["weights"] == "fake", fake.about["why"]
    exact = [name for name in QUANTITIES if name != "operator_bytes"]
    pd.testing.assert_frame_equal(fake.table[exact], real.table[exact])
    # 512 bytes a token and sequence: a prompt of 8 and four later ones, each read in every step after its own.
    sequences = options.get("num_beams", options.get("num_return_sequences", 1))
    if "use_cache" not in options and "cache_implementation" not in options:
        assert fake.total()["cache_written_bytes"] == 512 * sequences * (8 + 4)
        chunks = 3 + 6 if "prefill_chunk_size" in options else 0
        assert fake.total()["cache_read_bytes"] == 512 * sequences * (8 + 9 + 10 + 11 + chunks)


def test_what_was_compiled_is_counted_eagerly():
    model, kwargs = builders.small_llava()
    anatomy = inspection.anatomy_for(model, kwargs)
    plain = workload.count(model, kwargs, anatomy)
    model.model.vision_tower.forward = torch.compile(model.model.vision_tower.forward)
    work = workload.count(model, kwargs, anatomy)
    assert work.stages()["flops"].to_dict() == plain.stages()["flops"].to_dict()


# -- where data decide, and what is not known --------------------------------------------------------


class Deciding(builders.HomeMade):
    """A model that looks at its own results."""

    def generate(self, picture, ids, max_new_tokens=8, **_):
        return super().generate(picture, ids, max_new_tokens=2 + int(self.bridge(picture).abs().sum().item() > 0))


def test_a_generate_of_no_library(monkeypatch):
    model = builders.HomeMade().eval()
    kwargs = {"picture": torch.randn(1, 4, 12), "ids": torch.tensor([[3, 4, 5]]), "max_new_tokens": 4}
    anatomy = inspection.anatomy_for(model, kwargs)
    fake = workload.count(model, kwargs, anatomy)
    assert fake.about["weights"] == "fake"
    pd.testing.assert_frame_equal(fake.table, with_weights(monkeypatch, model, kwargs, anatomy).table)


def test_where_data_decide_the_model_itself_is_counted():
    model = Deciding().eval()
    kwargs = {"picture": torch.randn(1, 4, 12), "ids": torch.tensor([[3, 4, 5]])}
    anatomy = inspection.anatomy_for(model, kwargs)
    work = workload.count(model, kwargs, anatomy, new_tokens=3)
    assert work.about["weights"] == "real" and "DataDependent" in work.about["why"] and len(work.steps()) == 3
    with pytest.raises(MeasurementError, match="cannot be counted without its weights"):
        workload.count(fakes.without_weights(model), kwargs, anatomy)


def test_a_model_that_cannot_be_copied_is_counted_itself():
    model, kwargs = builders.small_llava()
    model.lock = threading.Lock()
    work = workload.count(model, kwargs, inspection.anatomy_for(model, kwargs))
    assert work.about["weights"] == "real" and "cannot be copied" in work.about["why"]


# -- formulas ---------------------------------------------------------------------------------------------


def flops(function, *tensors):
    with FlopCounterMode(display=False) as theirs:
        function(*tensors)
    model = nn.Linear(1, 1)
    from profkit.counting import Counter

    counter = Counter(model)
    with counter:
        function(*tensors)
    ours = {name: one.flops for name, one in counter.operators.items() if one.flops}
    return theirs.get_total_flops(), sum(ours.values())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_attention_on_the_cpu_is_a_gap_of_torch_and_has_a_formula(context):
    query, key = torch.randn(1, 8, 16, 32), torch.randn(1, 2, 20, 32)
    wanted = 2 * (2 * 8 * 16 * 20 * 32)
    with context():
        theirs, ours = flops(lambda q, k: F.scaled_dot_product_attention(q, k, k, enable_gqa=True), query, key)
        assert (theirs, ours) == (0, wanted)
        assert flops(lambda q, k: q @ k.transpose(-1, -2), query, query) == (2 * 8 * 16 * 16 * 32,) * 2
        linear = nn.Linear(4, 6)
        assert flops(linear, torch.randn(2, 3, 4)) == (2 * 2 * 3 * 4 * 6,) * 2
    assert "_scaled_dot_product_flash_attention_for_cpu" in formulas.gaps()


def test_a_gap_that_bites_is_named():
    work = counted(builders.small_llava)
    attention = 4 * 32 * 2 * (5 * 5 + 8 * 8 + 9 + 10 + 11 + 12)
    share = attention / work.total()["flops"]
    assert work.about["gaps"] == {"aten::_scaled_dot_product_flash_attention_for_cpu": pytest.approx(share)}


def test_small_products_are_gaps_of_torch():
    matrix, vector = torch.randn(3, 4), torch.randn(4)
    assert flops(torch.mv, matrix, vector) == (0, 2 * 3 * 4)
    assert flops(torch.dot, vector, vector) == (0, 2 * 4)
    assert flops(torch.addmv, torch.randn(3), matrix, vector) == (0, 2 * 3 * 4)
    batch, other = torch.randn(5, 2, 3), torch.randn(5, 3, 4)
    assert flops(torch.addbmm, torch.randn(2, 4), batch, other) == (0, 2 * 5 * 2 * 3 * 4)
    grouped = torch.randn(6, 16), torch.randn(2, 16, 8), torch.tensor([2, 6], dtype=torch.int32)
    if hasattr(torch, "_grouped_mm"):
        assert flops(lambda a, b, c: torch._grouped_mm(a, b, offs=c), *grouped)[1] == 2 * 6 * 16 * 8


def test_eager_attention_is_what_flop_counter_mode_counts():
    model, kwargs = builders.small_llava()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as theirs:
        model.generate(**kwargs)
    work = workload.count(model, kwargs, inspection.anatomy_for(model, kwargs))
    assert work.total()["flops"] == theirs.get_total_flops()
    model.set_attn_implementation("sdpa")
    with FlopCounterMode(display=False) as blind:
        model.generate(**kwargs)
    # Two layers of CLIP over 5 x 5, two of Llama over 8 x 8 and 1 x (9 … 12): what CPU attention hides from torch.
    assert theirs.get_total_flops() - blind.get_total_flops() == 4 * 32 * 2 * (5 * 5 + 8 * 8 + 9 + 10 + 11 + 12)


def test_operators_without_a_formula_are_named():
    @torch.library.custom_op("profkit_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    twice.register_fake(torch.empty_like)
    model, kwargs = builders.small_llava()
    original = model.lm_head.forward
    model.lm_head.forward = lambda hidden: twice(original(hidden))
    work = workload.count(model, kwargs, inspection.anatomy_for(model, kwargs))
    row = work.operators.set_index("name").loc["profkit_test::twice"]
    assert not row["formula"] and row["calls"] == 5


# -- in a run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    model, kwargs = builders.small_llava()
    return profkit.trace(model, kwargs, repeat=1, warmup=0, out=tmp_path_factory.mktemp("work") / "run")


def test_a_run_keeps_its_work(run):
    again = profkit.load(run.path)
    pd.testing.assert_frame_equal(again.work.table, run.work.table)
    pd.testing.assert_frame_equal(again.work.operators, run.work.operators)
    pd.testing.assert_frame_equal(again.work.parts, run.work.parts)
    assert again.work.about == run.work.about
    assert again.manifest["media_tokens"] == 4


def test_work_comes_after_everything_timed_or_not_at_all():
    said = []
    model, kwargs = builders.small_llava()
    without = profkit.trace(model, kwargs, repeat=1, warmup=0, profile=False, work=False, progress=said.append)
    assert without.work is None and not any("work" in one for one in said)
    with pytest.raises(InputError, match="was not counted"):
        without.roofline()
    profkit.trace(model, kwargs, repeat=1, warmup=0, progress=said.append)
    assert said[-1] == "counting the work"


def test_a_damaged_table_of_work_is_said_and_the_rest_is_read(run, tmp_path):
    copy = run.path.parent / "damaged"
    profkit.load(run.path).save(copy)
    (copy / "work.parquet").write_bytes(b"nonsense")
    again = profkit.load(copy)
    assert again.work is None and "work.parquet is damaged" in again.unreadable[0]
    assert len(again.stages())


def test_what_cannot_be_counted_is_a_note(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no counting today")

    monkeypatch.setattr(workload, "count", fail)
    model, kwargs = builders.small_llava()
    run = profkit.trace(model, kwargs, repeat=1, warmup=0, profile=False)
    assert run.work is None and "no counting today" in run.manifest["notes"][-1]
