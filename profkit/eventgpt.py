"""EventGPT on today's transformers: a language model that answers questions about event-camera streams.

Written from the published description (EventGPT, CVPR 2025); parameter names are those of released checkpoints.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn

try:
    from transformers.initialization import no_init_weights
except ImportError:  # transformers 4
    from transformers.modeling_utils import no_init_weights

from profkit.errors import InputError

PLACEHOLDER = -200
"""The id in a prompt that the events' features replace."""
MOST_PROMPT_TOKENS = 2048
OLD_TOWER, TOWER = "model.visual_tower.visual_tower.vision_model.", "model.visual_tower.visual_tower."
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
Frames = Sequence[torch.Tensor]


class EventGPTConfig(transformers.LlamaConfig):
    """A Llama's configuration with that of the vision tower beside it."""

    model_type = "EventChat_llama"

    def __init__(self, visual_tower: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.visual_tower = dict(visual_tower or {})


class VisualTower(nn.Module):
    """Holds the tower under the name that checkpoints have for it; is never called itself."""

    def __init__(self, config: transformers.CLIPVisionConfig) -> None:
        super().__init__()
        self.visual_tower = transformers.CLIPVisionModel(config)


class EventGPTModel(transformers.LlamaModel):
    """The decoder, with tower, projector and adaptor."""

    config_class = EventGPTConfig

    def __init__(self, config: EventGPTConfig) -> None:
        super().__init__(config)
        vision = transformers.CLIPVisionConfig(**config.visual_tower)
        self.visual_tower = VisualTower(vision)
        self.visual_projector = nn.Sequential(
            nn.Linear(vision.hidden_size, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.feature_adaptor = nn.Linear(config.hidden_size, config.hidden_size)
        self.post_init()

    def encode_events(self, frames: Frames) -> torch.Tensor:
        """Return the features of one sample's frames, each [3, S, S]: their pooled tokens, [T + P, C].

        Every frame runs through the tower by itself. T rows are the means over a frame's patches, P rows the means
        of each patch over frames.
        """
        features = torch.stack([self._encode_frame(frame) for frame in frames])
        return torch.cat([features.mean(dim=1), features.mean(dim=0)])

    def _encode_frame(self, frame: torch.Tensor) -> torch.Tensor:
        tower = self.visual_tower.visual_tower
        parameter = next(tower.parameters())
        seen = tower(frame[None].to(parameter.device, parameter.dtype)).last_hidden_state
        return self.feature_adaptor(self.visual_projector(seen))[0]


class EventGPT(transformers.LlamaForCausalLM):
    """Generates from `inputs`, ids with one PLACEHOLDER a sample, and `event_tensors`, the frames of each sample."""

    config_class = EventGPTConfig

    def __init__(self, config: EventGPTConfig) -> None:
        # Not LlamaForCausalLM's own: it would make a decoder, too, only to be replaced.
        super(transformers.LlamaForCausalLM, self).__init__(config)
        self.model = EventGPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_visual_tower(self) -> nn.Module:
        """Return what holds the vision tower."""
        return self.model.visual_tower

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        event_tensors: Sequence[Frames] | Frames | None = None,
        event_image_sizes: Any = None,
        event_feature: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return new tokens for prompts with events.

        `inputs` are ids [batch, length]; `event_tensors` a list a sample of frames [3, S, S], or one sample's frames.
        `event_image_sizes` and `event_feature` are accepted and not used, as in the original. Without events it raises
        NotImplementedError, with events that do not match the prompts ValueError.
        """
        if event_tensors is None:
            raise NotImplementedError("EventGPT generates about events only: give event_tensors.")
        assert inputs is not None
        samples = [event_tensors] if isinstance(event_tensors[0], torch.Tensor) else event_tensors
        if len(samples) != len(inputs):
            raise ValueError(f"There are {len(inputs)} prompts and the events of {len(samples)} samples.")
        embeds, mask = self.spliced(inputs, samples)  # type: ignore[arg-type]
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)

    def spliced(self, inputs: torch.Tensor, samples: Sequence[Frames]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the embedded prompts with events in the place of placeholders, padded on the right, and the mask."""
        rows = [self._splice(ids, frames) for ids, frames in zip(inputs, samples, strict=True)]
        embeds = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=embeds.device)
        mask = torch.arange(embeds.shape[1], device=embeds.device)[None] < lengths[:, None]
        return embeds, mask.long()

    def _splice(self, ids: torch.Tensor, frames: Frames) -> torch.Tensor:
        at = (ids == PLACEHOLDER).nonzero().flatten().tolist()
        if len(at) != 1:
            raise ValueError(f"A prompt must hold the placeholder {PLACEHOLDER} once, this one has it {len(at)} times.")
        embed = self.get_input_embeddings()
        before, after = embed(ids[: at[0]]), embed(ids[at[0] + 1 :])
        events = self.model.encode_events(frames).to(before.dtype)
        return torch.cat([before, events, after])[:MOST_PROMPT_TOKENS]


def from_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> EventGPT:
    """Return the model that a checkpoint's directory holds, on the CPU.

    What the configuration does not say of the vision tower is read off its weights. `dtype` is that of the
    configuration unless given. Raises InputError if something is missing or does not fit.
    """
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shapes = {name: tensor.shape for name, tensor in _weights(folder)}
    told.setdefault("visual_tower", _tower_config({_renamed(name, TOWER): shape for name, shape in shapes.items()}))
    config = EventGPTConfig.from_dict(told)
    wanted = dtype or getattr(torch, str(told.get("dtype") or told.get("torch_dtype") or "float32"))
    with no_init_weights():
        model = EventGPT._from_config(config, dtype=wanted).eval()
    load_weights(model, folder)
    return model


def _tower_config(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the configuration of a CLIP tower with weights of these shapes; its heads are 64 wide, as CLIP's are."""
    try:
        width, _, patch, _ = shapes[f"{TOWER}embeddings.patch_embedding.weight"]
        positions, _ = shapes[f"{TOWER}embeddings.position_embedding.weight"]
        inner, _ = shapes[f"{TOWER}encoder.layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise InputError(f"The checkpoint has no weights of a CLIP tower: {error} is missing.") from error
    start = f"{TOWER}encoder.layers."
    layers = {name.removeprefix(start).partition(".")[0] for name in shapes if name.startswith(start)}
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64,
        "image_size": math.isqrt(positions - 1) * patch,
        "patch_size": patch,
    }


def load_weights(model: EventGPT, folder: Path) -> None:
    """Load a checkpoint's weights by its names, whatever transformers version wrote them, one tensor at a time.

    Takes safetensors or .bin, whole or sharded; .bin files are read as weights alone. Raises InputError if weights are
    missing or of another shape.
    """
    own = model.state_dict()
    prefix = OLD_TOWER if any(name.startswith(OLD_TOWER) for name in own) else TOWER
    missing, wrong = set(own), []
    for name, value in _weights(folder):
        renamed = _renamed(name, prefix)
        if renamed not in own:
            continue
        missing.discard(renamed)
        if own[renamed].shape != value.shape:
            wrong.append(f"{name} {list(value.shape)} instead of {list(own[renamed].shape)}")
        else:
            own[renamed].copy_(value)
    # Position ids were saved by old versions; they are no weights.
    missing = {name for name in missing if not name.endswith("position_ids")}
    if missing or wrong:
        lacking = f"{len(missing)} weights are missing ({', '.join(sorted(missing)[:3])})" if missing else ""
        other = f"{len(wrong)} have another shape ({', '.join(wrong[:3])})" if wrong else ""
        raise InputError(f"The checkpoint {folder} does not fit: {'; '.join(filter(None, (lacking, other)))}.")


def _weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a checkpoint's tensors by name, without holding all of them."""
    for file in _weight_files(folder):
        yield from _weights_in(file)


def _weights_in(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    yield name, opened.get_tensor(name)
        else:
            yield from torch.load(file, "cpu", weights_only=True, mmap=True).items()
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        raise InputError(f"Cannot read the weights {file}: {' '.join(str(error).split())[:200]}.") from error


def _weight_files(folder: Path) -> list[Path]:
    for single in SINGLE_FILES:
        stem, _, suffix = single.rpartition(".")
        if (folder / single).is_file():
            return [folder / single]
        if shards := sorted(folder.glob(f"{stem}-*-of-*.{suffix}")):
            return shards
    raise InputError(f"{folder} holds no weights: no {' or '.join(SINGLE_FILES)}, whole or in shards.")


def _renamed(name: str, prefix: str) -> str:
    """Return a tower's parameter under the prefix that this transformers gives it."""
    for old in (OLD_TOWER, TOWER):
        if name.startswith(old):
            return prefix + name.removeprefix(old)
    return name
