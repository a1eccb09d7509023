"""Inputs to measure with: images, a video or an event stream and a prompt, loaded, preprocessed and moved as stages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import nn

from profkit import event_streams, media
from profkit.environment import device_of
from profkit.errors import InputError
from profkit.processors import Part, measured

DEFAULT_PROMPT = "What is shown in this {}?"
FILES = {"images": "cat.jpg", "videos": "cat.mp4", "events": "cat_events.npz"}


def default_file(media: str) -> Path:
    """Return the path of the photograph, the video or the event stream that ships with profkit."""
    return Path(str(resources.files("profkit") / "data" / FILES[media]))


def default_image() -> Path:
    """Return the path of the photograph that ships with profkit."""
    return default_file("images")


def unmeasured(_: str) -> nullcontext[None]:
    """Measure nothing."""
    return nullcontext()


@dataclass(frozen=True)
class Reading:
    """How an event stream is read: the part to take, counted from its first event, and the sensor, (height, width)."""

    window_us: tuple[int, int] | None = None
    sensor: tuple[int, int] | None = None


PLAIN = Reading()


@dataclass
class Sample:
    """One prompt about some files, for a model with a processor; see the kinds below."""

    paths: Sequence[Path]
    prompt: str
    processor: Any
    model: nn.Module
    max_new_tokens: int
    reading: Reading = PLAIN
    notes: list[str] = field(default_factory=list)
    """What a reader of the figures must know of the inputs."""

    @property
    def media_items(self) -> int:
        """How many images or frames the model is shown."""
        return int(getattr(self.processor, "frames", len(self.paths)))

    def load(self) -> Any:
        """Read and decode the files. Raises InputError naming the one that cannot be."""
        raise NotImplementedError

    def preprocess(self, loaded: Any, part: Part = unmeasured) -> Any:
        """Turn what was loaded into generate()'s arguments on the host; `part` measures what it consists of."""
        raise NotImplementedError

    def transfer(self, batch: Any) -> Mapping[str, Any]:
        """Move the tensors to the model's device, floating ones to its dtype."""
        device, dtype = device_of(self.model), next(self.model.parameters()).dtype

        def moved(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            return [moved(one) for one in value] if isinstance(value, list) else value

        return {name: moved(value) for name, value in batch.items()}

    @property
    def content(self) -> str:
        """What tells this sample's files and prompt from others': a hash of theirs."""
        return hashlib.sha256("".join(self.hashes().values()).encode()).hexdigest()

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of each file, by its number and name, and of the prompt."""
        files = {
            f"file {number}: {path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
            for number, path in enumerate(self.paths, start=1)
        }
        return {**files, "prompt": hashlib.sha256(self.prompt.encode()).hexdigest()}

    def check_room(self, prompt_tokens: int) -> None:
        """Raise InputError if prompt and new tokens are more than the model has positions for."""
        config: Any = getattr(self.model, "config", None)
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        room = getattr(text_config, "max_position_embeddings", None)
        if isinstance(room, int) and prompt_tokens + self.max_new_tokens > room:
            raise InputError(
                f"The prompt takes {prompt_tokens} tokens and {self.max_new_tokens} new ones are wanted, "
                f"but the model has room for {room}: shorten the prompt, give fewer images, or lower --max-new-tokens."
            )


class ImageSample(Sample):
    """Images, for a processor of transformers.

    A prompt that holds the processor's image placeholder is used as written; another is put into the
    processor's chat template, one placeholder an image.
    """

    def load(self) -> list[Image.Image]:
        """Read and decode the images."""
        return [read_image(path) for path in self.paths]

    def preprocess(self, loaded: list[Image.Image], part: Part = unmeasured) -> Any:
        """Run the processor; the result holds tensors on the CPU."""
        text = prompt_text(self.processor, self.prompt, len(self.paths))
        try:
            images = {"images": loaded} if loaded else {}
            with measured(self.processor, part):
                batch = self.processor(text=text, return_tensors="pt", **images)
        except (ValueError, IndexError, TypeError) as error:
            raise InputError(f"{type(self.processor).__name__} refused the inputs: {_one_line(error)}") from error
        self.check_room(int(batch["input_ids"].shape[1]))
        return batch


class VideoSample(Sample):
    """A video, of which the model sees a fixed number of frames at equal distances."""

    def load(self) -> np.ndarray:
        """Decode the frames: uint8 [frames, height, width, 3]."""
        from profkit.videos import read_frames

        return read_frames(self.paths[0], self.processor.frames)

    def preprocess(self, loaded: np.ndarray, part: Part = unmeasured) -> dict[str, Any]:
        """Return ids, mask and pixels [1, frames, 3, size, size]."""
        with part("resize and normalise"):
            pixels = self.processor.pixels(list(loaded))
        with part("tokenise"):
            ids = self.processor.ids(self.prompt)
        self.check_room(ids.shape[1])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels[None]}


class EventSample(Sample):
    """An event stream, drawn as frames for EventGPT."""

    def load(self) -> event_streams.EventStream:
        """Read the events, of which the window is taken; a stream longer than EventGPT admits has a note."""
        found = event_streams.read_stream(self.paths[0], self.reading.sensor)
        if self.reading.window_us is not None:
            found = found.between(*self.reading.window_us)
            if not len(found):
                first, last = (one / 1e3 for one in self.reading.window_us)
                raise InputError(f"There are no events between {first:g} and {last:g} ms in {self.paths[0]}.")
        limit_ms = event_streams.EVENTGPT_LIMIT_US // 1000
        if found.length_us >= event_streams.EVENTGPT_LIMIT_US and not self.notes:
            self.notes.append(
                f"the event stream {self.paths[0].name} lasts {found.length_us / 1e3:.0f} ms, and EventGPT's own code "
                f"refuses {limit_ms} ms and more: --event-window 0-{limit_ms - 1} takes a part"
            )
        return found

    def preprocess(self, loaded: event_streams.EventStream, part: Part = unmeasured) -> dict[str, Any]:
        """Return ids with the placeholder, and the frames' pixels [3, size, size] in a list."""
        with part("rasterise"):
            frames = event_streams.frames(loaded, self.processor.frames)
        with part("resize and normalise"):
            pixels = self.processor.pixels(frames)
        with part("tokenise"):
            ids = self.processor.ids(self.prompt)
        self.check_room(ids.shape[1])
        sizes = [list(frames[0].shape[:2])]
        return {"inputs": ids, "event_tensors": [list(pixels)], "event_image_sizes": sizes}


KINDS: dict[str, type[Sample]] = {"images": ImageSample, "videos": VideoSample, "events": EventSample}


def sample_for(
    processor: Any,
    model: nn.Module,
    files: Sequence[Path],
    prompt: str | None,
    max_new_tokens: int,
    check: bool = True,
    reading: Reading = PLAIN,
    given: str = "",
) -> Sample:
    """Return the sample of some files that suits a processor; without files, of what ships with profkit.

    `given` says what the files are (images, videos, events); "" leaves it to their names.

    Raises InputError for files that the model cannot take and, with `check`, for those that cannot be read.
    """
    taken = getattr(processor, "media", "images" if hasattr(processor, "image_processor") else "")
    if files and not taken:
        raise InputError(f"{type(model).__name__} takes text alone: leave INPUTS out.")
    for path in files:
        kind = given or media.KIND_OF_SUFFIX.get(path.suffix.lower(), "images")
        if kind != taken:
            wanted = f"{media.with_article(taken)}, which is what {type(model).__name__} takes here"
            raise InputError(
                f"{path} is {'given as ' + media.with_article(given) + ', ' if given else ''}not {wanted}."
            )
    if reading != PLAIN and taken != "events":
        raise InputError(f"--event-window and --sensor are for event streams, and {type(model).__name__} takes none.")
    if taken in ("videos", "events") and len(files) > 1:
        raise InputError(f"{type(model).__name__} takes one {media.WORDS[taken]}, got {len(files)}.")
    paths = list(files) or ([default_file(taken)] if taken else [])
    question = DEFAULT_PROMPT.format(media.WORDS[taken or "images"]) if prompt is None else prompt
    sample = KINDS[taken or "images"](paths, question, processor, model, max_new_tokens, reading)
    if check:
        sample.load()
    return sample


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
