"""Made-up inputs of generate(), from what a model's configuration and its get_*_features() say."""

from __future__ import annotations

import inspect as signatures
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from profkit.environment import device_of, preserved_random_state
from profkit.probing import untouched

TEXT_TOKENS = 4
MOST_MEDIA_TOKENS = 4096
MEDIA_TOKEN = ("{}_token_id", "{}_token_index")


def candidates(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (generate() arguments, what they are), the richest first: an image or sound with text, text alone."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    for modality, maker in (("image", _images), ("audio", _sounds)):
        token = next((getattr(config, name.format(modality), None) for name in MEDIA_TOKEN), None)
        token = token if token is not None else getattr(config, f"{modality}_token_index", None)
        if not isinstance(token, int):
            continue
        for inputs in maker(model, config):
            count = _feature_tokens(model, modality, inputs)
            if count and count <= MOST_MEDIA_TOKENS:
                yield {**_text(model, config, [token] * count), **inputs}, f"noise as {modality} of {count} tokens"
    yield _text(model, config, []), "text alone"


def _text(model: nn.Module, config: Any, media: list[int]) -> dict[str, Any]:
    """Return a prompt: plain tokens around those that stand for media."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(getattr(text_config, "vocab_size", 100))
    special = [value for key, value in vars(config).items() if key.endswith(("_token_id", "_token_index"))]
    plain = [token for token in range(min(vocabulary, 1000)) if token not in special][-2 * TEXT_TOKENS :]
    ids = torch.tensor([[*plain[:TEXT_TOKENS], *media, *plain[TEXT_TOKENS:]]], device=device_of(model))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _images(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Yield image inputs of the usual shapes: pixels, tiles of pixels, flattened patches with their grid."""
    vision = getattr(config, "vision_config", config)
    size, channels = getattr(vision, "image_size", None) or 64, getattr(vision, "num_channels", None) or 3
    height, width = size if isinstance(size, list | tuple) else (size, size)
    patch = getattr(vision, "patch_size", None) or 14
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    pixels = _noise(model, 1, channels, height, width)
    sizes = torch.tensor([[height, width]], device=device_of(model))
    merge = int(getattr(vision, "spatial_merge_size", None) or 2)
    in_channels = getattr(vision, "in_channels", None) or channels
    patches = _noise(model, (2 * merge) ** 2, in_channels * int(getattr(vision, "temporal_patch_size", 1)) * patch**2)
    grid = torch.tensor([[1, 2 * merge, 2 * merge]], device=device_of(model))
    takes = set(_parameters(model, "image"))
    forms: list[dict[str, Any]] = [
        {"pixel_values": patches, "image_grid_thw": grid},
        {"pixel_values": pixels, "image_sizes": sizes},
        {"pixel_values": pixels[None], "image_sizes": sizes},
        {"pixel_values": pixels},
        {"pixel_values": pixels[None]},
    ]
    for form in forms:
        if set(form) <= takes:
            yield form


def _sounds(model: nn.Module, config: Any) -> Iterator[dict[str, Any]]:
    """Yield audio inputs: mel spectra with their mask, in either order of dimensions."""
    audio = getattr(config, "audio_config", None) or getattr(config, "encoder_config", config)
    bins = next((n for name in ("num_mel_bins", "input_dim") if (n := getattr(audio, name, None))), 80)
    frames = 2 * int(getattr(audio, "max_source_positions", None) or 100)
    mask = torch.ones(1, frames, dtype=torch.long, device=device_of(model))
    takes = set(_parameters(model, "audio"))
    for shape, name in itertools.product(
        ((1, bins, frames), (1, frames, bins)), ("feature_attention_mask", "input_features_mask", "")
    ):
        form = {"input_features": _noise(model, *shape), **({name: mask} if name else {})}
        if set(form) <= takes:
            yield form


def _noise(model: nn.Module, *shape: int) -> torch.Tensor:
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(parameter.device, parameter.dtype)


def _features_method(model: nn.Module, modality: str) -> Any:
    owner = getattr(model, "base_model", model)
    return getattr(owner, f"get_{modality}_features", None) or getattr(model, f"get_{modality}_features", None)


def _parameters(model: nn.Module, modality: str) -> list[str]:
    method = _features_method(model, modality)
    return list(signatures.signature(method).parameters) if method else []


def _feature_tokens(model: nn.Module, modality: str, inputs: Mapping[str, Any]) -> int:
    """Return how many tokens the model makes of these media, 0 if it does not take them."""
    try:
        with torch.no_grad(), untouched(model), preserved_random_state():
            found = _features_method(model, modality)(**inputs)
    except Exception:  # the model's own code, with inputs that are a guess
        return 0
    found = getattr(found, "pooler_output", found)
    features = [found] if isinstance(found, torch.Tensor) else list(found)
    if not features or not all(isinstance(one, torch.Tensor) and one.dim() >= 2 for one in features):
        return 0
    return sum(int(one.shape[:-1].numel()) for one in features)
