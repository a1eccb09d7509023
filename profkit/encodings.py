"""What went into the towers, and from where: kept until a pass is over, to tell whether anything was encoded twice."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

TOWERS = ("vision", "audio")
"""Stages whose scopes are towers."""
MOST_HELD_BYTES = 256 << 20
"""Of inputs that are kept; beyond it the oldest are let go, and counted as not compared."""
LIBRARIES = ("torch", "transformers", "profkit", "accelerate", "contextlib", "functools")
COMMAND_LINE = "profkit.cli"
"""Above it there is nobody's code but profkit's."""
UNKNOWN_VERSION = -1


@dataclass(frozen=True)
class Held:
    """A tensor, and how often it had been changed in place when it was seen."""

    tensor: torch.Tensor
    version: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Held:
        """Keep a tensor: not its values, which would take a copy."""
        return cls(tensor.detach(), version_of(tensor))

    @property
    def is_unchanged(self) -> bool:
        """Whether the values are still those that were seen."""
        return version_of(self.tensor) == self.version


@dataclass
class Encoding:
    """One call of a tower: its inputs (None once they were let go) and the line that asked for it, if known."""

    inputs: list[Held] | None
    place: str


@dataclass
class Encodings:
    """The calls of towers in a pass, by number, and the media that each generate() was given."""

    seen: list[Encoding] = field(default_factory=list)
    given: list[list[Held]] = field(default_factory=list)
    _kept: deque[tuple[int, Encoding]] = field(default_factory=deque)
    _bytes: int = 0

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Remember a call of a tower and return its number. Cheap: nothing is copied, compared or waited for."""
        inputs = [Held.of(one) for one in _media((*args, *kwargs.values()))]
        encoding = Encoding(inputs, _place())
        self.seen.append(encoding)
        size = sum(one.tensor.numel() * one.tensor.element_size() for one in inputs)
        self._kept.append((size, encoding))
        self._bytes += size
        while self._bytes > MOST_HELD_BYTES and self._kept:
            freed, oldest = self._kept.popleft()
            self._bytes -= freed
            oldest.inputs = None
        return len(self.seen) - 1

    def note_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Remember the media among the arguments of a generate(), which the caller holds anyway."""
        self.given.append([Held.of(one) for one in _media((*args, *kwargs.values()))])


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was changed in place; those of inference mode do not tell."""
    return UNKNOWN_VERSION if tensor.is_inference() else tensor._version


def _media(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the floating tensors of two dimensions or more among values, and in lists of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.is_floating_point() and value.dim() >= 2:
                yield value
        elif isinstance(value, list | tuple):
            yield from _media(value)


def _place() -> str:
    """Return file, line and function of the innermost caller that is no library's, "" if there is none."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") != COMMAND_LINE:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in LIBRARIES:
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back
    return ""
