"""Real processors that need no download: CLIP image processing and a byte-level tokenizer."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

IMAGE_TOKEN = "<image>"

LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's prompt: `USER: <image>` and a line feed, the question, `ASSISTANT:`."""


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


def _pad_id(config: transformers.LlavaConfig) -> int:
    return config.pad_token_id if config.pad_token_id is not None else config.text_config.pad_token_id
