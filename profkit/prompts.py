"""How many of the tokens that a decoder reads are media, and how many text: seen in a prefill of its own."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from profkit.anatomy import Anatomy
from profkit.environment import preserved_random_state
from profkit.wrapping import Wrappers

INPUTS = ("inputs_embeds", "hidden_states")
PLACEHOLDER = re.compile(r"(image|video|audio|event)_token_(id|index)")


class PromptWatch:
    """A context that keeps the ids given to the token embedding, and what the decoder's first pass reads."""

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        self._embed = _module(model, anatomy.path("embed"))
        self._decoder = _module(model, anatomy.path("decoder"))
        self._embedding = None if self._embed is None else self._embed.forward
        self._wrappers = Wrappers()
        self.ids: list[torch.Tensor] = []
        self.read: torch.Tensor | None = None

    def __enter__(self) -> PromptWatch:
        if self._embed is not None and self._decoder is not None:
            embedding, pass_on = self._embed.forward, self._decoder.forward

            @functools.wraps(embedding)
            def embedded(*args: Any, **kwargs: Any) -> Any:
                self.ids += [one.detach().clone() for one in args[:1] if self.read is None and _are_ids(one)]
                return embedding(*args, **kwargs)

            @functools.wraps(pass_on)
            def decoded(*args: Any, **kwargs: Any) -> Any:
                given = [kwargs.get(name) for name in INPUTS] + list(args[:1])
                if self.read is None:
                    states = (one for one in given if isinstance(one, torch.Tensor) and one.is_floating_point())
                    self.read = next((one.detach().clone() for one in states if one.dim() == 3), None)
                return pass_on(*args, **kwargs)

            self._wrappers.put(self._embed, "forward", embedded)
            self._wrappers.put(self._decoder, "forward", decoded)
        return self

    def __exit__(self, *_: object) -> None:
        self._wrappers.remove()

    def media_tokens(self) -> int | None:
        """Return how many rows of the first sequence the decoder read are no row of the embedding; None if unknown.

        Text reaches the decoder as it was embedded; where not a single row does (positions or types were added), the
        two cannot be told apart.
        """
        if self.read is None or not self.ids or self._embedding is None:
            return None
        with torch.no_grad():
            unique = torch.cat([one.reshape(-1) for one in self.ids]).unique()
            rows = self._embedding(unique.reshape(1, -1))[0].to(self.read)
        if rows.shape[-1] != self.read.shape[-1]:
            return None
        known = {row.numpy().tobytes() for row in rows.float().cpu()}
        text = sum(row.numpy().tobytes() in known for row in self.read[0].float().cpu())
        return len(self.read[0]) - text if text else None


def media_tokens(model: nn.Module, generate_kwargs: Mapping[str, Any], anatomy: Anatomy) -> int | None:
    """Return how many tokens of the prompt are media, from one generate() of a single token; None if it is unknown.

    The model and the random state are left as they were. Raises what generate() raises.
    """
    kwargs = {**generate_kwargs, "max_new_tokens": 1}
    kwargs = {name: 1 if name == "min_new_tokens" else value for name, value in kwargs.items()}
    with preserved_random_state(), PromptWatch(model, anatomy) as watch:
        model.generate(**kwargs)  # type: ignore[operator]
    return watch.media_tokens()


def media_tokens_by_ids(config: Any, ids: Any, prompt_tokens: int) -> int | None:
    """Return how many of the decoder's `prompt_tokens` stand for media, from ids alone; None if that is unknown.

    Ids are placeholders where the configuration says so, or where they are negative; what is no placeholder is text,
    and all else that the decoder read is media, whether a placeholder stands for one token or for all of an image.
    """
    if not _are_ids(ids) or ids.dim() != 2 or not prompt_tokens:
        return None
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    known = [number for key, number in told.items() if PLACEHOLDER.fullmatch(key) and isinstance(number, int)]
    stands = (ids[0] < 0) | torch.isin(ids[0], torch.tensor(known, dtype=ids.dtype, device=ids.device))
    media = prompt_tokens - int((~stands).sum())
    return media if stands.any() and media >= 0 else None


def _module(model: nn.Module, path: str | None) -> nn.Module | None:
    return None if path is None else model.get_submodule(path)


def _are_ids(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.int32, torch.int64)
