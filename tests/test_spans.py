"""Stages and steps of hand-written runs, with their arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from builders import (
    DECODER,
    EMBED,
    FORWARD,
    GENERATE,
    HEAD,
    LAYER,
    LOAD,
    SAMPLE,
    TOWER,
    Script,
    generation,
)
from hypothesis import given
from hypothesis import strategies as st

from profkit import stages
from profkit.errors import LedgerError
from profkit.spans import Spans


def stage_ns(spans: Spans) -> dict[str, int]:
    return {
        name: int(spans.host_ns[spans.stage == number].sum())
        for number, name in enumerate(stages.NAMES)
        if (spans.stage == number).any()
    }


def test_vision_before_the_first_forward():
    spans = generation(pre_encoded=True).spans()
    assert stage_ns(spans) == {
        "vision": 20,
        "projector": 5,
        "merge": 6 + 1 + 4,  # around tower and projector; in the prefill's forward 1 before the embedding and 4 after
        "setup": 10 + 1 + 2 + 2 + 2,  # before encoding, up to prepare, prepare, up to the forward; prepare of step 1
        "embed": 2 * 2,
        "prefill": 16,
        "decode": 16,
        "head": 2 * 4,
        "select": 7 + 1 + 2 + 7,  # after each forward 7; in step 1 also around prepare: 1 before, 2 after
        "other": (1 + 1) + (1 + 4 + 1 + 1),  # around the head 2; in decode also 1 before the embedding and 4 after
    }
    spans.check()


def test_vision_inside_the_prefill_forward():
    """transformers 4.57: the encoder runs in the first forward, after the embedding."""
    spans = generation(pre_encoded=False).spans()
    found = stage_ns(spans)
    assert found["vision"] == 20
    assert found["projector"] == 5
    assert found["merge"] == 6 + 4
    assert found["prefill"] == 16
    assert found["setup"] == 10 + 1 + 2 + 2 + 2
    spans.check()


def test_a_text_prompt_has_no_merge():
    script = Script()
    script.enter(GENERATE, 0, tokens=3)
    script.enter(FORWARD, 10)
    script.call(EMBED, 11, 12)
    script.call(DECODER, 20, 30, tokens=3)
    script.leave(FORWARD, 31)
    script.leave(GENERATE, 40)
    assert stage_ns(script.spans()) == {"setup": 10, "embed": 1, "prefill": 10, "select": 9, "other": 1 + 8 + 1}


def test_chunked_prefill_is_several_prefill_steps():
    spans = generation(prompt=10, chunks=(4, 4, 2)).spans()
    assert spans.steps.prefill.tolist() == [True, True, True, False]
    assert spans.steps.tokens.tolist() == [4, 4, 2, 1]


def test_many_tokens_in_a_decode_step_are_no_prefill():
    """Assisted decoding checks several candidate tokens in one pass."""
    spans = generation(prompt=10, chunks=(10, 5, 5)).spans()
    assert spans.steps.prefill.tolist() == [True, False, False, False]


def test_iterations_reach_from_input_preparation_to_the_next_and_cover_generate():
    spans = generation().spans()
    host = spans.marks.host_ns
    starts, stops = host[spans.steps.start], host[spans.steps.stop]
    assert starts.tolist() == [
        0,
        83,
    ]  # 41 encoding, 8 + 26 to the forward's end, 7 of selection, 1 until prepare begins
    assert stops.tolist() == [83, 123]
    assert (stops - starts).sum() == spans.total_ns[0]


def test_generate_inside_generate_counts_steps_at_the_inner_loop():
    """BLIP: the outer generate() encodes and calls the text decoder's own generate()."""
    outer, script = GENERATE, Script()
    inner = type(GENERATE)("text_decoder.generate()", "generate")
    script.enter(outer, 0, tokens=2)
    script.call(TOWER, 5, 25)
    script.enter(inner, 30, tokens=2)
    script.call(DECODER, 40, 50, tokens=2)
    script.call(DECODER, 60, 65, tokens=1)
    script.leave(inner, 70)
    script.leave(outer, 100)
    spans = script.spans()
    assert stage_ns(spans) == {"vision": 20, "setup": 5 + 5 + 10, "prefill": 10, "decode": 5, "select": 10 + 5 + 30}
    assert spans.steps.prefill.tolist() == [True, False]
    spans.check()


def test_two_calls_of_generate_have_steps_of_their_own():
    script = Script()
    for start in (0, 1000):
        script.enter(GENERATE, start, tokens=4)
        script.call(DECODER, start + 10, start + 20, tokens=4)
        script.call(DECODER, start + 30, start + 35, tokens=1)
        script.leave(GENERATE, start + 50)
    spans = script.spans()
    assert spans.steps.prefill.tolist() == [True, False, True, False]
    # The 950 ns between the calls belong to nobody.
    assert sum(stage_ns(spans).values()) == 2 * 50
    spans.check()


def test_a_sample_counts_its_inputs_and_modules_outside_of_it_do_not_count():
    script = Script()
    script.call(TOWER, 0, 100)  # the user's own call of the tower
    script.enter(SAMPLE, 200)
    script.call(LOAD, 201, 211)
    script.enter(GENERATE, 215, tokens=1)
    script.call(DECODER, 220, 230, tokens=1)
    script.leave(GENERATE, 240)
    script.leave(SAMPLE, 241)
    spans = script.spans()
    assert stage_ns(spans) == {"load": 10, "setup": 5, "prefill": 10, "select": 10, "other": 1 + 4 + 1}
    spans.check()


def test_generate_without_a_decoder_pass_is_all_other():
    script = Script()
    script.call(GENERATE, 0, 30)
    assert stage_ns(script.spans()) == {"other": 30}


def test_several_passes_in_one_forward_are_steps_each():
    script = Script()
    script.enter(GENERATE, 0, tokens=2)
    script.enter(FORWARD, 5)
    script.call(DECODER, 10, 20, tokens=2)
    script.call(DECODER, 30, 40, tokens=1)
    script.leave(FORWARD, 45)
    script.leave(GENERATE, 50)
    spans = script.spans()
    assert spans.marks.host_ns[spans.steps.start].tolist() == [0, 30]
    assert (spans.step >= 0).sum() == len(spans.owner)


def test_a_doctored_ledger_is_caught():
    spans = generation().spans()
    spans.check()
    spans.host_ns = spans.host_ns.copy()
    spans.host_ns[4] += 1
    with pytest.raises(LedgerError, match="sum to"):
        spans.check()


def test_time_running_backwards_is_caught():
    script = Script()
    script.enter(GENERATE, 100)
    script.leave(GENERATE, 50)
    with pytest.raises(LedgerError, match="backwards"):
        script.spans()


@given(st.data())
def test_stages_and_steps_partition_any_generation(data):
    """Random lengths everywhere, vision where it likes: each segment in one stage, sums exact."""
    gap = st.integers(0, 50)
    script, now = Script(), 0

    def after() -> int:
        nonlocal now
        now += data.draw(gap)
        return now

    script.enter(GENERATE, after(), tokens=data.draw(st.integers(0, 8)))
    for _ in range(data.draw(st.integers(0, 4))):
        for scope in data.draw(st.lists(st.sampled_from([TOWER, EMBED, HEAD]), max_size=3)):
            script.call(scope, after(), after())
        inside = data.draw(st.booleans())
        if inside:
            script.enter(FORWARD, after())
        script.enter(DECODER, after(), tokens=data.draw(st.integers(1, 5)))
        script.call(LAYER, after(), after())
        script.leave(DECODER, after())
        if inside:
            script.leave(FORWARD, after())
    script.leave(GENERATE, after())
    spans = script.spans()
    spans.check()
    assert (spans.stage >= 0).all()
    in_stack = np.isin(spans.stage, [stages.INDEX["prefill"], stages.INDEX["decode"]])
    decoder = spans.is_kind("decoder")
    assert spans.host_ns[in_stack].sum() == spans.total_ns[decoder].sum()
    starts = spans.marks.host_ns[spans.steps.start]
    stops = spans.marks.host_ns[spans.steps.stop]
    assert (stops - starts).sum() == (spans.total_ns[0] if len(spans.steps) else 0)
