"""Real processors that need no download: CLIP image processing and a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

IMAGE_TOKEN, VIDEO_TOKEN, EVENT_TOKEN = "<image>", "<video>", "<event>"
Part = Callable[[str], AbstractContextManager[Any]]
"""Given the name of a part of preprocessing, a context that measures it."""

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's prompt: `USER: <image>` and a line feed, the question, `ASSISTANT:`."""
VIDEO_PROMPT = "USER: <video>\n{} ASSISTANT:"
"""Video-LLaVA's prompt."""
EVENT_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <ev_start><event><ev_end>\n{} ASSISTANT:"
)
"""EventGPT's prompt: the first template of Vicuna around the place for the events."""


def byte_tokenizer(special_ids: dict[str, int]) -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer with a token a byte (ids 3 to 258), special tokens <unk> 0, <s> 1, </s> 2 and those given.

    It stands where a model has random weights and so no vocabulary: any text goes in, ids stay below 259.
    """
    special = {"<unk>": 0, "<s>": 1, "</s>": 2, **special_ids}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {**special, **{character: 3 + number for number, character in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        # LLaVA's generate() refuses the token_type_ids that transformers 4 would add.
        model_input_names=["input_ids", "attention_mask"],
    )


def clip_image_processor(image_size: int) -> Any:
    """Return CLIP's image processing for a square input, in the variant that needs no torchvision."""
    # transformers 5 named it apart; in 4.x the plain name is the PIL variant.
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    crop = {"height": image_size, "width": image_size}
    return getattr(transformers, name)(size={"shortest_edge": image_size}, crop_size=crop)


def llava(config: transformers.LlavaConfig) -> transformers.LlavaProcessor:
    """Return the processor for a LLaVA model with random weights; takes images and a prompt with <image>."""
    vision = config.vision_config
    return transformers.LlavaProcessor(
        image_processor=clip_image_processor(vision.image_size),
        tokenizer=byte_tokenizer({IMAGE_TOKEN: config.image_token_index, "<pad>": _pad_id(config)}),
        patch_size=vision.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


@dataclass
class FramesProcessor:
    """Image processing and a tokenizer for models that are shown several frames at once."""

    image_processor: Any
    tokenizer: Any
    media: str
    prompt: str
    """The template around a question, with the placeholder for the frames."""
    placeholder: str
    placeholder_id: int
    tokens: int
    """How many ids the placeholder becomes."""
    frames: int

    def pixels(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """Return frames, uint8 [height, width, 3] each, as one tensor [frames, 3, size, size]."""
        listed = [np.ascontiguousarray(frame) for frame in frames]
        return self.image_processor(listed, return_tensors="pt")["pixel_values"]

    def ids(self, text: str) -> torch.Tensor:
        """Return a prompt's ids [1, length]; a text without the placeholder is put into the template first."""
        whole = text if self.placeholder in text else self.prompt.format(text)
        before, _, after = whole.partition(self.placeholder)
        head = self.tokenizer(before)["input_ids"]
        tail = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        return torch.tensor([[*head, *[self.placeholder_id] * self.tokens, *tail]])


def video_llava(config: transformers.VideoLlavaConfig, frames: int = 8) -> FramesProcessor:
    """Return a processor for a Video-LLaVA with random weights."""
    vision = config.vision_config
    tokens = frames * ((vision.image_size // vision.patch_size) ** 2 + 1)
    tokenizer = byte_tokenizer({VIDEO_TOKEN: config.video_token_index, "<pad>": _pad_id(config)})
    pixels = clip_image_processor(vision.image_size)
    index = config.video_token_index
    return FramesProcessor(pixels, tokenizer, "videos", VIDEO_PROMPT, VIDEO_TOKEN, index, tokens, frames)


def eventgpt(config: Any, tokenizer: Any = None, frames: int = 5, image_size: int | None = None) -> FramesProcessor:
    """Return a processor for an EventGPT, the original's class as well; without a tokenizer, for random weights.

    `image_size` is the tower's, in pixels; profkit's own configuration tells it.
    """
    pixels = clip_image_processor(image_size or config.visual_tower["image_size"])
    tokenizer = tokenizer or byte_tokenizer({"<pad>": config.pad_token_id or 0})
    return FramesProcessor(pixels, tokenizer, "events", EVENT_PROMPT, EVENT_TOKEN, -200, 1, frames)


def _pad_id(config: Any) -> int:
    return config.pad_token_id if config.pad_token_id is not None else config.text_config.pad_token_id


class _Measured:
    """Stands for a part of a processor while it is called, and measures its calls."""

    def __init__(self, inner: Any, name: str, part: Part) -> None:
        self._inner, self._name, self._part = inner, name, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._part(self._name):
            return self._inner(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


PARTS = {
    "image_processor": "resize and normalise",
    "video_processor": "resize and normalise",
    "feature_extractor": "extract features",
    "tokenizer": "tokenise",
}


@contextmanager
def measured(processor: Any, part: Part) -> Iterator[None]:
    """Measure the calls of a processor's parts in the body, and leave the processor as it was."""
    found = {name: inner for name in PARTS if (inner := vars(processor).get(name)) is not None}
    try:
        for name, inner in found.items():
            setattr(processor, name, _Measured(inner, PARTS[name], part))
        yield
    finally:
        for name, inner in found.items():
            setattr(processor, name, inner)
