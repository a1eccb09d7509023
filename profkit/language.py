"""The language model in a trail: the decoder's layers and the module around them, token embeddings, head."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from profkit.anatomy import (
    Anatomy,
    ancestors,
    derives_from,
    has_weights,
    is_layer_list,
    is_norm,
    outermost,
    parent,
    within,
)
from profkit.trail import Trail


class Language:
    """What of a model is its language model, by structure and by what ran."""

    def __init__(self, modules: dict[str, Any], structure: Anatomy, trail: Trail) -> None:
        self.modules, self.structure, self.trail = modules, structure, trail
        self.numbers = trail.by_path()
        self.layers = self._decoder_layers()
        self.embed = structure.path("embed") or self._embedding_that_ran()
        self.embeddings = self._tied_embeddings()
        self.around = {above for path in (self.layers, *self.embeddings) for above in ancestors(path)}

    def holds(self, path: str) -> bool:
        """Tell whether a module is a token embedding or lies in the decoder's layers."""
        return within(path, self.layers) or any(within(path, one) for one in self.embeddings)

    @cached_property
    def decoder(self) -> str | None:
        """The innermost module around the decoder's layers that is itself called."""
        return next((above for above in ancestors(self.layers) if above in self.numbers), None)

    @cached_property
    def head(self) -> str | None:
        """The outermost module around the output embeddings that holds nothing of the decoder."""
        head = self.structure.path("lm_head") or self._last_after_decoder()
        for above in ancestors(head) if head else ():
            if above in self.around or above not in self.numbers:
                break
            head = above
        return head

    def _decoder_layers(self) -> str:
        """Return the structure's choice if it ran in the last step, else the list of layers that ran last."""
        chosen = self.structure.path("decoder_layers") or ""
        embed = self.numbers.get(self.structure.path("embed") or "none", [0])[-1]
        latest = max((ns[-1] for path, ns in self.numbers.items() if parent(path) == chosen), default=-1)
        if latest > embed:
            return chosen
        last = {parent(path): numbers[-1] for path, numbers in self.numbers.items()}
        lists = outermost(path for path in last if is_layer_list(self.modules[path]))
        return max(lists, key=lambda path: last[path], default=chosen)

    def _embedding_that_ran(self) -> str | None:
        """Return, of the embeddings that ran most often, the one with the most rows."""
        ran = [path for path in self.numbers if derives_from(self.modules[path], "Embedding")]
        often = max((len(self.numbers[path]) for path in ran), default=0)
        every_step = [path for path in ran if len(self.numbers[path]) == often and not within(path, self.layers)]
        return max(every_step, key=lambda path: len(self.modules[path].weight), default=None)

    def _tied_embeddings(self) -> list[str]:
        """Return the token embedding and those that ran with its weights, as encoder and decoder often share them."""
        if self.embed is None:
            return []
        weight = getattr(self.modules[self.embed], "weight", None)
        ran = [one for one in self.numbers if one != self.embed and derives_from(self.modules[one], "Embedding")]
        return [self.embed, *(one for one in ran if self.modules[one].weight is weight)]

    def _last_after_decoder(self) -> str | None:
        """Return the last module with weights, norms aside, that the last of the decoder's layers fed."""
        last = max((n for path, ns in self.numbers.items() if parent(path) == self.layers for n in ns), default=0)
        for number in reversed(range(last + 1, len(self.trail.calls))):
            path = self.trail.calls[number].path
            module = self.modules[path]
            outside = path not in self.around and not self.holds(path)
            if outside and has_weights(module) and not is_norm(module):
                return path
        return None
