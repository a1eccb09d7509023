"""Probes on real models: tokens equal, everything off afterwards, whatever happens in between."""

from __future__ import annotations

import inspect as python_inspect
import threading

import pytest
import torch
from builders import small_llava

import profkit
from profkit import probes, structure
from profkit.errors import InputError
from profkit.ledger import Ledger

pytestmark = pytest.mark.smoke


def instance_state(model) -> list:
    """Everything a probe or hook could leave behind on any module."""
    return [
        (path, sorted(module.__dict__), dict(module._forward_hooks), dict(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ]


@pytest.fixture
def llava():
    model, kwargs = small_llava()
    model.generate(**kwargs)  # on its first run transformers leaves hooks of its own on the tower's layers
    return model, kwargs


@pytest.mark.parametrize("granularity", probes.GRANULARITIES)
def test_tokens_are_equal_and_nothing_is_left_behind(llava, granularity):
    model, kwargs = llava
    plain = model.generate(**kwargs)
    before = instance_state(model)
    with profkit.profile(model, granularity=granularity) as prof:
        assert torch.equal(model.generate(**kwargs), plain)
    assert instance_state(model) == before
    prof.representative.check()
    assert not prof.manifest["faults"]
    assert not prof.anatomy.notes
    table = prof.stages()
    assert table["host_ns"].sum() == prof.passes[0].generate_ns
    assert table.loc["vision", "calls"] == 1
    assert table.loc["prefill", "calls"] == 1
    assert table.loc["decode", "calls"] == 4
    assert table.loc["head", "calls"] == 5


def test_every_granularity_sees_more(llava):
    model, kwargs = llava
    seen = {}
    for granularity in probes.GRANULARITIES:
        with profkit.profile(model, granularity=granularity) as prof:
            model.generate(**kwargs)
        modules = prof.modules()
        assert modules["self_ms"].sum() == pytest.approx(prof.stages()["host_ms"].sum())
        seen[granularity] = set(modules["path"])
    assert seen["stage"] < seen["layer"] < seen["module"]
    assert "model.language_model.layers.1.self_attn" in seen["layer"]
    assert "model.language_model.layers.1.self_attn.q_proj" in seen["module"]


def test_several_calls_add_up(llava):
    model, kwargs = llava
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
        model.generate(**{**kwargs, "max_new_tokens": 3, "min_new_tokens": 3})
    steps = prof.steps()
    assert steps["call"].tolist() == [0] * 5 + [1] * 3
    assert steps["phase"].tolist() == ["prefill", *["decode"] * 4, "prefill", *["decode"] * 2]
    assert steps["tokens"].tolist() == [8, 1, 1, 1, 1, 8, 1, 1]
    stages = prof.stages()
    assert stages.loc[["prefill", "decode"], "host_ms"].sum() == pytest.approx(steps["host_ms"].sum())
    assert [call["new_tokens"] for call in prof.manifest["calls"]] == [5, 3]
    assert [call["prompt_tokens"] for call in prof.manifest["calls"]] == [8, 8]


class BoomError(Exception):
    """Nobody else's."""


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize(
    "where", ["model.vision_tower.encoder.layers.1.mlp", "model.language_model.layers.1", "lm_head"]
)
def test_an_exception_propagates_unchanged_and_every_probe_comes_off(llava, error, where):
    model, kwargs = llava
    if where.startswith("model.vision_tower") and not hasattr(model.model.vision_tower, "encoder"):
        where = where.replace("vision_tower", "vision_tower.vision_model")  # transformers 4
    raised = error("boom")

    def fail(module, args):
        raise raised

    handle = model.get_submodule(where).register_forward_pre_hook(fail)
    before = instance_state(model)
    found = structure.find(model)
    with pytest.raises(error) as caught, profkit.profile(model, granularity="module", anatomy=found) as prof:
        model.generate(**kwargs)
    assert caught.value is raised
    assert instance_state(model) == before
    assert not any(prof.manifest["checks"]["repaired"].values())
    prof.representative.check()
    assert prof.stages()["host_ns"].sum() == prof.passes[0].generate_ns > 0
    handle.remove()


def test_an_error_in_the_instrument_does_not_reach_the_program(llava, monkeypatch):
    model, kwargs = llava
    plain = model.generate(**kwargs)

    def broken(args, kwargs):
        raise RuntimeError("instrument")

    monkeypatch.setattr(probes, "sequence_length", broken)
    with profkit.profile(model) as prof:
        assert torch.equal(model.generate(**kwargs), plain)
    assert prof.manifest["faults"] == ["note of a mark: RuntimeError: instrument"] * 5


def test_a_failure_while_attaching_takes_off_what_was_on(llava, monkeypatch):
    model, _ = llava
    before = instance_state(model)

    found = probes.places(model, profkit.inspect(model), "layer")
    broken = (*found, (model, "no_such_method", found[0][2]))
    monkeypatch.setattr(probes, "places", lambda *_: broken)
    with pytest.raises(AttributeError, match="no_such_method"), profkit.profile(model):
        pass
    assert instance_state(model) == before


def test_other_hooks_and_instance_methods_stay(llava):
    model, kwargs = llava
    calls = []
    handle = model.lm_head.register_forward_hook(lambda *_: calls.append("hook"))
    original = model.lm_head.forward

    def own_forward(x):
        calls.append("own")
        return original(x)

    model.lm_head.forward = own_forward
    with profkit.profile(model, granularity="module", anatomy=structure.find(model)):
        model.generate(**kwargs)
    assert calls == ["own", "hook"] * 5
    assert model.lm_head.__dict__["forward"] is own_forward
    assert handle.id in model.lm_head._forward_hooks


def test_a_wrapper_put_on_inside_the_body_survives_and_measures_no_more(llava):
    model, kwargs = llava
    ledger = Ledger()
    with probes.Instrument(model, structure.find(model), ledger):
        probe = model.lm_head.forward
        model.lm_head.forward = lambda x: probe(x)
        model.generate(**kwargs)
    count = len(ledger.marks())
    model.generate(**kwargs)
    assert len(ledger.marks()) == count
    del model.lm_head.forward


def test_profiles_nest(llava):
    model, kwargs = llava
    before = instance_state(model)
    with profkit.profile(model) as outer, profkit.profile(model) as inner:
        model.generate(**kwargs)
    assert instance_state(model) == before
    assert outer.stages().loc["decode", "calls"] == inner.stages().loc["decode", "calls"] == 4


def test_profiles_that_end_in_the_order_they_began_leave_nothing(llava):
    model, kwargs = llava
    before = instance_state(model)
    first, second = profkit.profile(model), profkit.profile(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    model.generate(**kwargs)
    second.__exit__(None, None, None)
    assert instance_state(model) == before


def test_generate_in_a_thread_and_two_at_once(llava):
    """A streamer's generate() runs in a thread of its own."""
    model, kwargs = llava
    with profkit.profile(model) as prof:
        threads = [threading.Thread(target=model.generate, kwargs=kwargs) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    prof.representative.check()
    assert not any(prof.manifest["checks"]["repaired"].values())
    assert prof.steps()["tokens"].tolist() == [8, 1, 1, 1, 1] * 2


def test_probes_keep_signatures(llava):
    model, _ = llava
    plain = {name: python_inspect.signature(getattr(model, name)) for name in ("forward", "generate")}
    with profkit.profile(model):
        assert {name: python_inspect.signature(getattr(model, name)) for name in plain} == plain


def test_an_unknown_granularity_is_refused(llava):
    model, _ = llava
    with pytest.raises(InputError, match="Unknown granularity 'fine'"), profkit.profile(model, granularity="fine"):
        pass


def test_prompt_and_pass_sizes():
    ids, embeds = torch.zeros(2, 7, dtype=torch.long), torch.zeros(3, 5, 8)
    assert probes.prompt_of((), {"input_ids": ids}).shape == (2, 7)
    assert probes.prompt_of((ids,), {}).shape == (2, 7)
    assert probes.prompt_of((), {"inputs_embeds": embeds}).shape == (3, 5, 8)
    assert probes.prompt_of((), {"pixel_values": torch.zeros(1, 3, 4, 4)}) is None
    assert probes.sequence_length((), {"inputs_embeds": embeds}) == 5
    assert probes.sequence_length((embeds,), {}) == 5
    assert probes.sequence_length((), {}) == -1


def test_what_was_returned_tells_new_tokens_only_behind_the_prompt():
    prompt = torch.tensor([[1, 2, 3]])
    assert probes.Call(prompt, torch.tensor([[1, 2, 3, 7, 8]])).new_tokens() == 2
    assert probes.Call(prompt, torch.tensor([[7, 8, 9, 7]])).new_tokens() is None
    assert probes.Call(prompt, torch.tensor([[7, 8]])).new_tokens() is None
    assert probes.Call(torch.zeros(1, 3, 8), torch.tensor([[7, 8]])).new_tokens() is None
    assert probes.Call(None, None).new_tokens() is None


TEXT = {"input_ids": torch.tensor([[1, 5, 6, 7, 8, 9, 10, 11]]), "pixel_values": None}
"""transformers 4 cannot split a prompt with an image into chunks."""


@pytest.mark.parametrize(
    ("options", "decode_steps", "new_tokens", "batch"),
    [
        ({"num_beams": 3}, 4, 5, 1),
        ({"prefill_chunk_size": 3, **TEXT}, 4, 5, 1),
        ({"use_cache": False}, 4, 5, 1),
        ({"do_sample": True, "num_return_sequences": 3}, 4, 5, 3),
        ({"cache_implementation": "static"}, 4, 5, 1),
        ({"return_dict_in_generate": True, "output_scores": True}, 4, 5, 1),
        ({"prompt_lookup_num_tokens": 2, "max_new_tokens": 10, "min_new_tokens": 10}, None, 10, 1),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_ways_of_decoding(llava, options, decode_steps, new_tokens, batch):
    """Steps are passes of the decoder: neither "the prompt" nor "one token" each."""
    model, kwargs = llava
    kwargs = {name: value for name, value in {**kwargs, **options}.items() if value is not None}
    torch.manual_seed(0)
    plain = probes.sequences(model.generate(**kwargs))
    torch.manual_seed(0)
    with profkit.profile(model) as prof:
        found = probes.sequences(model.generate(**kwargs))
    assert torch.equal(found, plain)
    prof.representative.check()
    steps = prof.steps()
    prefill = steps["phase"] == "prefill"
    assert (
        steps["tokens"][prefill].sum() == 8
    )  # in one chunk, three, or four (transformers 4 keeps the last token apart)
    assert (~prefill).sum() == decode_steps or decode_steps is None
    assert prof.latency().new_tokens == new_tokens
    assert prof.latency().batch == batch


def test_a_continued_conversation_reads_only_what_is_new(llava):
    model, kwargs = llava
    first = model.generate(**kwargs, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    with profkit.profile(model) as prof:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=first.past_key_values,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
        )
    assert prof.steps()["phase"].tolist() == ["prefill", "decode", "decode", "decode"]
    assert prof.steps()["tokens"].tolist() == [4, 1, 1, 1]  # the last token was never read, and three are new
    assert prof.latency().new_tokens == 4


def test_tables_asked_for_too_early_are_there_later(llava):
    model, kwargs = llava
    with profkit.profile(model) as prof:
        with pytest.raises(InputError, match="no finished clean pass"):
            prof.stages()
        model.generate(**kwargs)
    assert len(prof.stages())
