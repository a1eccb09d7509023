"""What tests are made of: a scripted ledger, tiny real models, hand-made events."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

from profkit import models
from profkit.events import Events
from profkit.ledger import Ledger, Scope
from profkit.spans import Spans

SAMPLE = Scope("sample", "sample")
LOAD = Scope("load()", "input", "load")
GENERATE = Scope("generate()", "generate")
PREPARE = Scope("prepare_inputs_for_generation()", "prepare", "setup")
FEATURES = Scope("model.get_image_features()", "features", "merge")
TOWER = Scope("model.vision_tower", "module", "vision")
PROJECTOR = Scope("model.projector", "module", "projector")
FORWARD = Scope("Model", "forward")
EMBED = Scope("model.embed_tokens", "module", "embed")
DECODER = Scope("model.layers_home", "decoder")
LAYER = Scope("model.layers_home.layers.0", "layer")
HEAD = Scope("lm_head", "module", "head")


class Script:
    """Writes marks at times of the test's choosing: `enter(scope, at)`, `leave(scope, at)`."""

    def __init__(self) -> None:
        self.time_ns = 0
        self.ledger = Ledger(capacity=4, now=lambda: self.time_ns)
        self._mark = self.ledger.marker()

    def enter(self, scope: Scope, at: int, tokens: int | None = None) -> None:
        self.time_ns = at
        index = self._mark(self.ledger.scopes.number(scope))
        if tokens is not None:
            self.ledger.note(index, tokens)

    def leave(self, scope: Scope, at: int) -> None:
        self.time_ns = at
        self._mark(-self.ledger.scopes.number(scope))

    def call(self, scope: Scope, start: int, stop: int, tokens: int | None = None) -> None:
        self.enter(scope, start, tokens)
        self.leave(scope, stop)

    def spans(self) -> Spans:
        return Spans(self.ledger.marks(), self.ledger.scopes.list)


def generation(pre_encoded: bool = True, prompt: int = 10, chunks: Iterable[int] = (10,)) -> Script:
    """A generate() of two new tokens, written out by hand, with vision before the first forward or inside it."""
    script = Script()
    script.enter(GENERATE, 0, tokens=prompt)
    now = 10  # 0..10 setup
    if pre_encoded:
        now = _encode(script, now)
    for tokens in (*chunks, 1):
        script.call(PREPARE, now + 1, now + 3)
        script.enter(FORWARD, now + 5)
        script.call(EMBED, now + 6, now + 8)
        now += 8
        if not pre_encoded and tokens != 1:
            now = _encode(script, now)
        script.enter(DECODER, now + 4, tokens=tokens)
        script.call(LAYER, now + 6, now + 16)
        script.leave(DECODER, now + 20)
        script.call(HEAD, now + 21, now + 25)
        script.leave(FORWARD, now + 26)
        now += 33  # 7 ns of selection
    script.leave(GENERATE, now)
    return script


def _encode(script: Script, now: int) -> int:
    """20 ns of vision, 5 of the projector, 6 of packing around them."""
    script.enter(FEATURES, now)
    script.call(TOWER, now + 2, now + 22)
    script.call(PROJECTOR, now + 24, now + 29)
    script.leave(FEATURES, now + 31)
    return now + 31


def events_of(rows: Iterable[tuple[str, int, int, int]], category: str = "cpu_op") -> Events:
    """Events from (name, start, duration, thread)."""
    listed = list(rows)
    names = list(dict.fromkeys(name for name, *_ in listed))
    columns = np.array([row[1:] for row in listed], dtype=np.int64).reshape(-1, 3)
    zeros = np.zeros(len(listed), dtype=np.int64)
    name = np.array([names.index(name) for name, *_ in listed], dtype=np.int64)
    return Events(names, [category], name, zeros, columns[:, 0], columns[:, 1], zeros, columns[:, 2])


@cache
def tiny_llava() -> models.Loaded:
    """The embedded default."""
    return models.load_model("tiny-llava", torch.device("cpu"))


def small_llava() -> tuple[Any, dict[str, Any]]:
    """A LLaVA of two layers each, and generate() arguments for five new tokens."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    text = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, vocab_size=99, pad_token_id=0
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=98)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 98, 98, 98, 98, 5, 6, 7]])
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": image}
    return model, {**kwargs, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
