"""Do the experiments of `profkit verify` have teeth? Each thing they watch is broken once, and they must see it."""

from __future__ import annotations

import functools
import time
from dataclasses import replace

import pytest
import torch
import transformers
from builders import DECODER, FORWARD, GENERATE, Script, small_llava, tiny_llava
from simulated import Stream

import profkit
from profkit import (
    arguments,
    checks,
    clock,
    decoupled,
    delays,
    environment,
    invariance,
    ledger,
    overhead,
    probes,
    samples,
    stopwatches,
    verification,
    wrapping,
)
from profkit.probes import sequences
from profkit.verdicts import Verdict, known

GREEDY = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}


@pytest.fixture(scope="module")
def llava():
    loaded = tiny_llava()
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 3)
    kwargs = {**sample.transfer(sample.preprocess(sample.load())), **GREEDY}
    return loaded.model, kwargs, profkit.inspect(loaded.model, **kwargs)


def by_name(verdicts) -> dict[str, Verdict]:
    return {one.check: one for one in verdicts}


def test_the_instrument_changes_nothing(llava):
    found = list(invariance.invariance(*llava))
    by_memory = found.pop()
    assert {one.ok for one in found} == {True} and len(found) == 13
    assert by_memory.ok is None and "cannot be known" in by_memory.sentence


def test_experiments_see_a_probe_that_spoils(llava, monkeypatch):
    plain = probes.Instrument._plain_probe

    def spoiling(self, bound, code, mark, wrappers):
        probe = plain(self, bound, code, mark, wrappers)

        def probed(*args, **kwargs):
            torch.rand(1)
            output = probe(*args, **kwargs)
            return -output if isinstance(output, torch.Tensor) and wrappers.active else output

        return functools.wraps(bound)(probed)

    monkeypatch.setattr(probes.Instrument, "_plain_probe", spoiling)
    found = by_name(invariance.invariance(*llava))
    assert found["same tokens: greedy, stage"].ok is False
    assert found["same random state: greedy, stage"].ok is False


def test_a_model_that_is_not_deterministic_is_said(llava):
    model, kwargs, anatomy = llava
    plain, count = model.generate, iter(range(1000))
    model.generate = lambda **given: plain(**given) + next(count)
    try:
        found = by_name(invariance.invariance(model, kwargs, anatomy))
    finally:
        del model.generate
    assert found["same tokens: greedy"].ok is None
    assert "other tokens each time by itself" in found["same tokens: greedy"].sentence


@pytest.mark.parametrize("name", ["tiny-llava", "tiny-eventgpt"])
def test_the_truth_is_to_be_had_by_features_and_by_embeddings(name):
    from profkit import models

    loaded = models.load_model(name, torch.device("cpu"))
    sample = samples.sample_for(loaded.processor, loaded.model, [], None, 3)
    kwargs = {**sample.transfer(sample.preprocess(sample.load())), **GREEDY}
    anatomy = profkit.inspect(loaded.model, **kwargs)
    before = dict(loaded.model.__dict__)
    found = by_name(decoupled.decoupled(loaded.model, kwargs, anatomy, repeats=3))
    assert set(found) == {f"decoupled truth: {one}" for one in ("encoding", "generating", "the rest")}
    assert all(0 <= one.measured < 1 for one in found.values())
    assert loaded.model.__dict__.keys() == before.keys()


def test_a_tower_that_the_instrument_slows_is_seen_by_the_truth(llava, monkeypatch):
    plain = probes.Instrument._tower_probe

    def slow(self, bound, code, mark, wrappers):
        def delayed(*args, **kwargs):
            time.sleep(0.3)
            return bound(*args, **kwargs)

        return plain(self, delayed, code, mark, wrappers)

    monkeypatch.setattr(probes.Instrument, "_tower_probe", slow)
    found = by_name(decoupled.decoupled(*llava, repeats=3))["decoupled truth: encoding"]
    assert found.measured > 1 and found.ok is not True


def test_where_the_truth_is_not_to_be_had_it_is_said(llava, monkeypatch):
    monkeypatch.setattr(decoupled, "_splits", lambda *_: ([], ["the test says so"]))
    (found,) = decoupled.decoupled(*llava)
    assert found.ok is None and "not to be had: the test says so" in found.sentence


def test_the_users_mask_goes_with_the_embeddings():
    model, kwargs = small_llava()
    padded = {name: torch.nn.functional.pad(kwargs[name], (2, 0)) for name in ("input_ids", "attention_mask")}
    kwargs |= padded
    splits, _ = decoupled._splits(model, kwargs, profkit.inspect(model, **kwargs))
    plain = sequences(model.generate(**kwargs))
    assert torch.equal(splits[-1].given["attention_mask"], padded["attention_mask"])
    assert [decoupled._wrong(model, one, plain) for one in splits] == [""] * len(splits)


def test_other_tokens_are_no_truth_and_the_next_way_is_tried(llava, monkeypatch):
    by_features, by_embeddings = decoupled._by_features, decoupled._by_embeddings

    def wrong_features(kwargs, features):
        split = by_features(kwargs, features)
        outputs = {name: type(one)(pooler_output=None) for name, one in split.given["mm_encoder_outputs"].items()}
        return replace(split, given={**split.given, "mm_encoder_outputs": outputs})

    def wrong_embeddings(*args):
        split = by_embeddings(*args)
        return replace(split, given={**split.given, "inputs_embeds": split.given["inputs_embeds"].flip(1)})

    monkeypatch.setattr(decoupled, "_by_features", wrong_features)
    found = by_name(decoupled.decoupled(*llava, repeats=1))
    assert "from inputs_embeds" in found["decoupled truth: generating"].sentence
    monkeypatch.setattr(decoupled, "_by_embeddings", wrong_embeddings)
    (found,) = decoupled.decoupled(*llava, repeats=1)
    assert found.ok is None and "from mm_encoder_outputs failed" in found.sentence
    assert "from inputs_embeds gives other tokens than the whole" in found.sentence


def test_a_model_that_draws_for_itself_has_no_truth(llava):
    model, kwargs, anatomy = llava
    plain, count = model.generate, iter(range(1000))
    model.generate = lambda **given: plain(**given) + next(count)
    try:
        (found,) = decoupled.decoupled(model, kwargs, anatomy)
    finally:
        del model.generate
    assert found.ok is None and "not deterministic" in found.sentence


class ScriptedWatch:
    """A stopwatch on a clock that only the test moves."""

    on_device = False

    def __init__(self):
        self.time_ns = 0

    def now(self):
        return self.time_ns

    def wait(self, wait_ns):
        self.time_ns += wait_ns

    def elapsed_ns(self, begin, end):
        return end - begin


@pytest.mark.parametrize("leak_ms", [0, 100])
def test_a_delay_that_leaks_into_another_layer_of_its_stage(monkeypatch, leak_ms):
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
    watch = ScriptedWatch()

    def spans(model, kwargs, anatomy):
        script = Script()
        script.enter(GENERATE, watch.time_ns, tokens=1)
        for _ in range(2):
            script.enter(FORWARD, watch.time_ns)
            script.enter(DECODER, watch.time_ns, tokens=1)
            for number, layer in enumerate(model.layers):
                scope = ledger.Scope(f"layers.{number}", "layer")
                script.enter(scope, watch.time_ns)
                watch.time_ns += 5_000_000
                layer.forward(torch.zeros(1))
                slow = "forward" in model.layers[1].__dict__
                watch.time_ns += leak_ms * 500_000 if slow and number == 0 else 0
                script.leave(scope, watch.time_ns)
            script.leave(DECODER, watch.time_ns)
            script.leave(FORWARD, watch.time_ns)
        script.leave(GENERATE, watch.time_ns)
        return script.spans()

    monkeypatch.setattr(delays, "_spans", spans)
    found = by_name(delays._one(model, {}, None, "decoder layer", "layers.1", watch, 1, 100_000_000, 6))
    # Its own 5 ms are outside of forward() here, twice.
    assert found["delay: decoder layer"].measured == 10
    elsewhere = found["delay: decoder layer, elsewhere"]
    assert elsewhere.ok is (leak_ms == 0)
    assert elsewhere.measured == leak_ms / 200
    assert leak_ms == 0 or "layers.0 in decode: +50.00 ms" in elsewhere.sentence


def test_hooks_and_modules_that_stay_behind_are_noticed(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    off = wrapping.Wrappers.remove

    def hooking(self):
        off(self)
        model.lm_head.register_forward_hook(lambda *_: None)

    monkeypatch.setattr(wrapping.Wrappers, "remove", hooking)
    found = by_name(invariance.invariance(model, kwargs, anatomy))["same model"]
    assert found.ok is False and "lm_head" in found.sentence


def test_a_probe_that_stays_on_is_noticed(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    monkeypatch.setattr(wrapping.Wrappers, "remove", lambda self: None)
    assert by_name(invariance.invariance(model, kwargs, anatomy))["same model"].ok is False


def test_memory_that_stays_taken_is_noticed(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    used = iter([1000, 1512])
    monkeypatch.setattr(invariance, "_device_bytes", lambda model: next(used))
    found = by_name(invariance.invariance(model, kwargs, anatomy))["same memory"]
    assert found.ok is False and found.measured == 512


def test_experiments_take_a_cache_of_the_users_and_drop_what_greedy_decoding_does_not_take(monkeypatch):
    model, kwargs = small_llava()
    several = {**kwargs, "do_sample": True, "num_return_sequences": 2}
    assert arguments.greedy(model, several)["num_return_sequences"] == 1
    assert arguments.greedy(model, {**several, "num_beams": 2})["num_return_sequences"] == 2
    short = functools.partial(delays.delays, wait_ms=1.0)
    monkeypatch.setattr(verification, "delays", short)
    for given in (several, {**kwargs, "past_key_values": transformers.DynamicCache()}):
        run = profkit.trace(model, given, repeat=1, profile=False, seed=0)
        found = by_name(verification.verify(model, given, run, repeats=1))
        assert found["same tokens: greedy, layer"].ok and found["same tokens: sampling, layer"].ok
        assert not [one for one in found if one.startswith("experiment")]
        assert {"delay: head", "overhead: decode", "decoupled truth: generating"} <= set(found)


def test_an_experiment_that_fails_is_open_and_the_others_go_on(monkeypatch):
    model, kwargs = small_llava()
    run = profkit.trace(model, kwargs, repeat=1, profile=False)

    def failing_after_one(*args, **others):
        yield known("delay: head", 1.0, "ms", "")
        raise ValueError("no more")

    monkeypatch.setattr(verification, "delays", failing_after_one)
    monkeypatch.setattr(verification, "decoupled", failing_after_one)
    found = by_name(verification.verify(model, kwargs, run, repeats=1))
    one = found["experiment: known delays"]
    assert one.ok is None and "ValueError: no more" in one.sentence and "delay: head" in found
    assert "experiment: media encoded alone" in {one.check for one in checks.kept_verdicts(run)}


def test_outputs_of_unequal_length_are_not_held_together(monkeypatch):
    model, kwargs = small_llava()
    anatomy = profkit.inspect(model, **kwargs)
    plain, lengths = model.generate, iter(range(3, 9))

    def generate(**given):
        return plain(**{**given, "max_new_tokens": next(lengths), "min_new_tokens": 1})

    model.generate = generate
    (found,) = overhead.overhead_by_stage(model, kwargs, anatomy, "layer", repeats=2)
    assert found.ok is None and "from 3 to 6 steps" in found.sentence


def test_delays_are_found_where_they_are(llava):
    model, kwargs, anatomy = llava
    before = environment.modules_of(model)
    found = by_name(delays.delays(model, kwargs, anatomy, repeats=3))
    assert all(found[f"delay: {name}"].ok for name in ("vision", "projector", "decoder layer", "head"))
    assert environment.modules_of(model) == before
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.fixture
def on_device(llava, monkeypatch):
    """A model whose work is done by a simulated device, which the host runs ahead of."""
    model, _, anatomy = llava
    stream = Stream()
    monkeypatch.setattr(clock.DeviceClock, "of", classmethod(lambda cls, device: stream.clock()))
    watch = stopwatches.DeviceStopwatch(stream, stream.enqueue)
    monkeypatch.setattr(delays, "stopwatch_for", lambda device: watch)
    layers = [f"{anatomy.path('decoder_layers')}.{number}" for number in range(2)]
    work_ns = dict.fromkeys(layers, 3_000_000) | {str(anatomy.path("vision_tower")): 20_000_000}
    monkeypatch.setattr(decoupled, "synchronize", lambda device: stream.synchronize())
    with stream.working_for(model, work_ns):
        yield stream


def test_delays_on_a_device_are_found_on_its_clock(llava, on_device):
    found = by_name(delays.delays(*llava, repeats=3))
    for name in ("vision", "projector", "decoder layer", "head", "select"):
        # What selecting takes without the delay is known from another run alone: noise may leave it open.
        assert found[f"delay: {name}"].ok or name == "select", found[f"delay: {name}"]
        assert found[f"delay: {name}"].measured < 25
        assert "ms of 50." in found[f"delay: {name}"].sentence


def test_the_truth_on_a_device_is_that_of_its_clock(llava, on_device):
    found = by_name(decoupled.decoupled(*llava, repeats=3))
    # Alone the host waits for the tower's 20 ms; inside generate() it does not, and only the device's clock has them.
    for name, least_ms in (("encoding", 20), ("generating", 18)):
        one = found[f"decoupled truth: {name}"]
        assert abs(one.measured) < 0.3, one
        assert float(one.sentence.split(": ")[1].split(" ms")[0]) >= least_ms


def test_a_device_without_a_spin_kernel_is_said(llava, monkeypatch):
    monkeypatch.setattr(delays, "stopwatch_for", lambda device: None)
    (found,) = delays.delays(*llava)
    assert found.ok is None and "no kernel of known length" in found.sentence


def test_a_probe_that_does_not_mark_loses_the_delay(llava, monkeypatch):
    plain = probes.Instrument._attach

    def blind(self, wrappers, module, name, scope):
        if "projector" not in scope.path:
            plain(self, wrappers, module, name, scope)

    monkeypatch.setattr(probes.Instrument, "_attach", blind)
    found = by_name(delays.delays(*llava, repeats=3))
    assert found["delay: projector"].ok is not True
    assert found["delay: vision"].ok is True
