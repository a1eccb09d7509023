"""Inputs to measure with: images and a prompt, loaded, preprocessed and moved as three stages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from torch import nn

from profkit.environment import device_of
from profkit.errors import InputError

DEFAULT_PROMPT = "What is shown in this image?"


def default_image() -> Path:
    """Return the path of the photograph that ships with profkit."""
    return Path(str(resources.files("profkit") / "data" / "cat.jpg"))


@dataclass
class ImageSample:
    """One prompt about some images, for a model with a processor.

    A prompt that holds the processor's image placeholder is used as written; another is put into the
    processor's chat template, one placeholder an image.
    """

    images: Sequence[Path]
    prompt: str
    processor: Any
    model: nn.Module
    max_new_tokens: int

    def load(self) -> list[Image.Image]:
        """Read and decode the files. Raises InputError naming the one that cannot be."""
        return [read_image(path) for path in self.images]

    def preprocess(self, loaded: list[Image.Image]) -> Any:
        """Run the processor; the result holds tensors on the CPU."""
        text = prompt_text(self.processor, self.prompt, len(self.images))
        try:
            images = {"images": loaded} if loaded else {}
            batch = self.processor(text=text, return_tensors="pt", **images)
        except (ValueError, IndexError, TypeError) as error:
            raise InputError(f"{type(self.processor).__name__} refused the inputs: {_one_line(error)}") from error
        self._check_room(int(batch["input_ids"].shape[1]))
        return batch

    def transfer(self, batch: Any) -> Mapping[str, Any]:
        """Move the tensors to the model's device, floating ones to its dtype."""
        device, dtype = device_of(self.model), next(self.model.parameters()).dtype
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) if hasattr(value, "to") else value
            for name, value in batch.items()
        }

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file and of the prompt."""
        files = {f"file:{path}": hashlib.sha256(path.read_bytes()).hexdigest() for path in self.images}
        return {**files, "prompt": hashlib.sha256(self.prompt.encode()).hexdigest()}

    def _check_room(self, prompt_tokens: int) -> None:
        config: Any = getattr(self.model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        room = getattr(text_config, "max_position_embeddings", None)
        if isinstance(room, int) and prompt_tokens + self.max_new_tokens > room:
            raise InputError(
                f"The prompt takes {prompt_tokens} tokens and {self.max_new_tokens} new ones are wanted, "
                f"but the model has room for {room}: shorten the prompt, give fewer images, or lower --max-new-tokens."
            )


def read_image(path: Path) -> Image.Image:
    """Return a decoded RGB image. Raises InputError if the file is missing or not an image."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except UnidentifiedImageError as error:
        raise InputError(f"{path} is not an image that Pillow can read.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"Cannot read the image {path}: {_one_line(error)}.") from error


def prompt_text(processor: Any, prompt: str, images: int) -> str:
    """Return the complete prompt, with a placeholder for each image. Raises InputError if there is no room for them."""
    placeholder = image_placeholder(processor)
    found = prompt.count(placeholder) if placeholder else 0
    if found and found != images:
        raise InputError(f"The prompt has {found} {placeholder} for {images} image(s): write one for each.")
    if found:
        return prompt
    if not getattr(processor, "chat_template", None):
        if images and placeholder:
            raise InputError(
                f"The prompt has no room for the image: {type(processor).__name__} has no chat template, "
                f"so write {placeholder} where the image goes."
            )
        return prompt
    content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


def image_placeholder(processor: Any) -> str | None:
    """Return the text that stands for an image in the processor's prompts, None if it does not say."""
    token = getattr(processor, "image_token", None)
    return str(token) if token else None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
