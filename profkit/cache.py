"""How large the key-value cache is after each step, seen in the profiled pass alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from profkit.ledger import Ledger

DEEP = 8
"""How far into a cache object tensors are looked for: pair of caches, cache, list of layers, layer, list of states,
each with its dictionary in between."""


class CacheWatch:
    """Notes, after each pass of a decoder, the bytes of the cache that it was given or gave back.

    `bytes_by_step` stays empty for models without one. Nothing waits for the device: sizes are known on the host.
    `memory_by_step` holds the bytes allocated on an accelerator then; `rows` is of how many sequences, beams counted.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.bytes_by_step: list[int] = []
        self.memory_by_step: list[int] = []
        self.rows: int | None = None
        self._ledger = ledger

    def note(self, given: Mapping[str, Any], output: Any) -> None:
        """Note a pass: the decoder's named arguments and what it returned."""
        self._note(given.get("past_key_values"), getattr(output, "past_key_values", None))

    def series(self) -> dict[str, dict[int, float]]:
        """Return what was noted as series by step, under the names of counters."""
        noted = {"cache (bytes)": self.bytes_by_step, "device memory (bytes)": self.memory_by_step}
        return {name: dict(enumerate(map(float, values))) for name, values in noted.items() if values}

    def _note(self, given: Any, returned: Any) -> None:
        try:
            cache = returned if returned is not None else given
            if cache is not None:
                self.bytes_by_step.append(bytes_of(cache))
                self.rows = next((int(one.shape[0]) for one in _tensors(cache, DEEP) if one.dim() == 4), None)
            if torch.accelerator.is_available() and hasattr(torch.accelerator, "memory_allocated"):
                self.memory_by_step.append(int(torch.accelerator.memory_allocated()))
        except Exception as error:
            self._ledger.fault(error, "size of the cache")


def bytes_of(cache: Any) -> int:
    """Return the bytes of the distinct tensors that a cache object holds."""
    storages = {one.untyped_storage().data_ptr(): one.nbytes for one in _tensors(cache, DEEP)}
    return sum(storages.values())


def tensors_of(cache: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that a cache object holds."""
    return _tensors(cache, DEEP)


def _tensors(value: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one, depth - 1)
    elif depth and isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one, depth - 1)
    elif depth and hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from _tensors(vars(value), depth - 1)
