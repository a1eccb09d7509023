"""What tests are made of: a scripted ledger, tiny real models, hand-made events."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from profkit import models
from profkit.eventgpt import EventGPT, EventGPTConfig
from profkit.events import NOTHING, Events
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
    zeros, none = np.zeros(len(listed), dtype=np.int64), np.full(len(listed), NOTHING)
    name = np.array([names.index(name) for name, *_ in listed], dtype=np.int64)
    times = columns[:, 0], columns[:, 1]
    return Events(names, [category], [], name, zeros, *times, zeros.copy(), columns[:, 2], none, none, none, none)


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


def event_model() -> tuple[EventGPT, dict[str, Any]]:
    """An EventGPT of two layers, and generate() arguments for five tokens about five frames."""
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = EventGPTConfig(
        visual_tower={**tower, "image_size": 28, "patch_size": 14},
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    frames = [torch.randn(3, 28, 28) for _ in range(5)]
    kwargs = {"inputs": torch.tensor([[1, 5, -200, 6, 7]]), "event_tensors": [frames]}
    return EventGPT(config).eval(), {**kwargs, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


class Block(nn.Module):
    """A residual layer of no library."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix, self.feed = nn.Linear(width, width), nn.Sequential(nn.Linear(width, width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix with the mean of what came before, then feed forward."""
        return x + self.feed(self.mix(x).cumsum(1))


class HomeMade(nn.Module):
    """An image-to-text model that uses nothing of transformers: no accessors, no configuration, no base class."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Sequential(*(Block(12) for _ in range(2)))
        self.bridge = nn.Linear(12, 16)
        self.words = nn.Embedding(50, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(3))
        self.out = nn.Linear(16, 50)

    @torch.no_grad()
    def generate(self, picture: torch.Tensor, ids: torch.Tensor, max_new_tokens: int = 8, **_: Any) -> torch.Tensor:
        """Greedy, without a cache: every step reads everything."""
        seen = self.bridge(self.eye(picture))
        for _ in range(max_new_tokens):
            hidden = torch.cat([seen, self.words(ids)], 1)
            for block in self.blocks:
                hidden = block(hidden)
            ids = torch.cat([ids, self.out(hidden[:, -1:]).argmax(-1)], 1)
        return ids


GENERATION = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
LLAMA = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def qwen2_vl() -> tuple[Any, dict[str, Any]]:
    """A tower that holds its merger, fed with flattened patches."""
    text = {**LLAMA, "num_key_value_heads": 4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 14, "mlp_ratio": 1}
    tokens = {"image_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96, "video_token_id": 95}
    torch.manual_seed(0)
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **tokens)
    model = transformers.Qwen2VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, 97, 98, 98, 98, 98, 96, 5]])
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(16, 1176)}
    return model, {**kwargs, "image_grid_thw": torch.tensor([[1, 4, 4]]), **GENERATION}


def blip2() -> tuple[Any, dict[str, Any]]:
    """A Q-Former between tower and decoder; the root's own forward is never called."""
    layers = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Blip2Config(
        vision_config={**layers, "image_size": 28, "patch_size": 14},
        qformer_config={**layers, "vocab_size": 99, "encoder_hidden_size": 32},
        text_config={
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 37,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 99,
            "word_embed_proj_dim": 32,
        },
        num_query_tokens=4,
        image_token_index=98,
    )
    torch.manual_seed(0)
    model = transformers.Blip2ForConditionalGeneration(config).eval()
    ids = torch.tensor([[98, 98, 98, 98, 2, 5, 6]])
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 28, 28)}
    return model, {**kwargs, **GENERATION}


def whisper() -> tuple[Any, dict[str, Any]]:
    """An encoder-decoder that hears; no projector."""
    layers = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    sizes = {"d_model": 32, "encoder_ffn_dim": 37, "decoder_ffn_dim": 37, "vocab_size": 99, "max_source_positions": 30}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    torch.manual_seed(0)
    config = transformers.WhisperConfig(num_mel_bins=8, max_target_positions=50, **layers, **sizes, **special)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    return model, {"input_features": torch.randn(1, 8, 60), **GENERATION}


def t5() -> tuple[Any, dict[str, Any]]:
    """An encoder-decoder of text alone, whose shared embedding is never called itself."""
    config = transformers.T5Config(
        d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, vocab_size=99, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config).eval(), {
        "input_ids": torch.tensor([[5, 6, 7]]),
        **GENERATION,
    }
