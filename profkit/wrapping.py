"""Putting functions around a module's methods, and taking them off without a trace."""

from __future__ import annotations

from typing import Any

from torch import nn


class Wrappers:
    """A set of wrappers of bound methods, each kept in its module's own dictionary.

    `active` is for the wrappers to read: one that somebody else has wrapped since cannot be taken off, and
    must then do nothing but pass calls on.
    """

    def __init__(self) -> None:
        self.active = False
        self._all: list[tuple[nn.Module, str, Any, Any]] = []

    def put(self, module: nn.Module, name: str, wrapper: Any) -> None:
        """Put `wrapper` in place of the method `name` of one module."""
        original = module.__dict__.get(name)
        wrapper.__profkit__ = (self, original)
        self._all.append((module, name, wrapper, original))
        module.__dict__[name] = wrapper

    def remove(self) -> None:
        """Take off every wrapper of this set, and nothing else."""
        self.active = False
        while self._all:
            module, name, wrapper, original = self._all.pop()
            if module.__dict__.get(name) is not wrapper:
                continue
            # Two sets may be taken off in the order they were put on: what was under this wrapper may be dead.
            while (below := getattr(original, "__profkit__", None)) and not below[0].active:
                original = below[1]
            if original is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = original


def unwrap(model: nn.Module) -> None:
    """Take every wrapper of every set off a model, for as long as somebody else keeps the state to put back."""
    for module in model.modules():
        for name, value in list(module.__dict__.items()):
            original = value
            while hasattr(original, "__profkit__"):
                original = original.__profkit__[1]
            if original is None and value is not None:
                del module.__dict__[name]
            elif original is not value:
                module.__dict__[name] = original


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel or torch.compile(): that is the one whose generate() is called."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
