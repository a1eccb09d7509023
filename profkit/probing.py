"""One short generate() that is watched: what ran when, and fed by what. It leaves the model as it was."""

from __future__ import annotations

import copy
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from profkit.environment import preserved_random_state
from profkit.plan import FEATURES
from profkit.probes import prompt_of
from profkit.trail import NOTHING, Labels, Output, Seen, Trail
from profkit.wrapping import Wrappers, unwrap

NEW_TOKENS = 2
"""A prefill and one decode step: enough to tell what runs once from what runs in every step."""

MOST_COORDINATES = 8

NOT_FOR_PROBING = (
    "max_length",
    "min_length",
    "max_time",
    "streamer",
    "stopping_criteria",
    "logits_processor",
    "assistant_model",
    "prompt_lookup_num_tokens",
)
"""Arguments of generate() that would make the short run longer, or would show it to others."""


def probe(model: nn.Module, kwargs: Mapping[str, Any]) -> Trail:
    """Return the trail of an unmodified generate() of two new tokens.

    Random state, generation configuration, attributes, buffers and hooks of the model are as before when it
    returns. What generate() raises is passed on.
    """
    with unwatched(model), preserved_random_state(), _Watch(model) as watch:
        watch.run(shortened(kwargs, NEW_TOKENS))
    return watch.trail


def shortened(kwargs: Mapping[str, Any], new_tokens: int) -> dict[str, Any]:
    """Return generate()'s arguments for a short run of `new_tokens` that nobody else sees."""
    short = {key: value for key, value in kwargs.items() if key not in NOT_FOR_PROBING}
    if "past_key_values" in short:
        short["past_key_values"] = copy.deepcopy(short["past_key_values"])
    return {**short, "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}


@contextmanager
def unwatched(model: nn.Module) -> Iterator[None]:
    """Take profkit's own wrappers off for a while, and leave the model untouched."""
    with untouched(model):
        unwrap(model)
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, what the attributes, buffers and hooks of every module were at the beginning."""
    owners = [*model.modules(), *filter(None, [getattr(model, "generation_config", None)])]
    saved = []
    for owner in owners:
        # A module keeps its buffers, children and hooks in dictionaries of its own: these are put back too.
        inner = {key: dict(value) for key, value in owner.__dict__.items() if isinstance(value, dict)}
        saved.append((owner, dict(owner.__dict__), inner))
    try:
        yield
    finally:
        for owner, attributes, inner in saved:
            owner.__dict__.clear()
            owner.__dict__.update(attributes)
            for key, content in inner.items():
                now = owner.__dict__[key]
                if list(now) != list(content) or any(now[name] is not value for name, value in content.items()):
                    owner.__dict__[key].clear()
                    owner.__dict__[key].update(content)


class _Watch:
    """A context that watches every module's forward and every operation."""

    def __init__(self, model: nn.Module) -> None:
        self.trail = Trail()
        self._model = model
        self._wrappers = Wrappers()
        self._labels = _Labelling(self.trail.operations)
        self._tick = itertools.count().__next__

    def __enter__(self) -> _Watch:
        for path, module in self._model.named_modules():
            self._wrappers.put(module, "forward", self._watched(path, module.forward))
            for name in dir(type(module)):
                if FEATURES.fullmatch(name) and callable(getattr(module, name, None)):
                    self._wrappers.put(module, name, self._counted(f"{path}.{name}()".lstrip("."), module, name))
        self._wrappers.active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._wrappers.remove()

    def run(self, kwargs: Mapping[str, Any]) -> None:
        """Run generate() with every tensor among its arguments labelled by its name."""
        prompt = prompt_of((), kwargs)
        media = set()
        for name, value in kwargs.items():
            tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            for tensor in tensors:
                self._labels.set(tensor, frozenset([name]))
            if tensors and not any(_is_text(tensor, prompt) for tensor in tensors):
                media.add(name)
        self.trail.media = frozenset(media)
        # Compiled parts run as they were written, for else there would be nothing to watch in them.
        with self._labels, torch.compiler.set_stance("force_eager"):
            self._model.generate(**kwargs)  # type: ignore[operator]

    def _watched(self, path: str, bound: Any) -> Any:
        calls, labels, tick = self.trail.calls, self._labels, self._tick
        here = threading.get_ident()

        @functools.wraps(bound)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:  # somebody else's generate() at the same time
                return bound(*args, **kwargs)
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            seen = Seen(path, tick(), labels.of(given), tuple(tuple(leaf.shape) for leaf in given))
            number = len(calls)
            calls.append(seen)
            labels.inside.append(path)
            try:
                output = bound(*args, **kwargs)
            finally:
                labels.inside.pop()
                seen.end = tick()
            for leaf in tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    seen.outputs.append(Output(labels.of([leaf]), tuple(leaf.shape), leaf.is_floating_point()))
                    labels.set(leaf, frozenset([(number, len(seen.outputs) - 1)]))
            return output

        return watched

    def _counted(self, path: str, module: nn.Module, name: str) -> Any:
        bound, features, inside = getattr(module, name), self.trail.features, self._labels.inside
        here = threading.get_ident()

        @functools.wraps(bound)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return bound(*args, **kwargs)
            features[path] = features.get(path, 0) + 1
            inside.append(path)
            try:
                return bound(*args, **kwargs)
            finally:
                inside.pop()

        return counted


class _Labelling(TorchDispatchMode):
    """Unites the labels of each operation's inputs in its outputs.

    Labels belong to storages, so that views share them. A weak reference is kept with them, for as long as
    it lives no other storage can have the same address.
    """

    supports_higher_order_operators = True
    """Such as flex attention: without a schema, and never in place."""

    def __init__(self, operations: dict[str, Counter[Labels]]) -> None:
        super().__init__()
        self.inside = ["generate()"]
        self._operations = operations
        self._known: dict[int, tuple[StorageWeakRef, Labels]] = {}

    def of(self, tensors: list[torch.Tensor]) -> Labels:
        """Return the labels of all these tensors."""
        found = [self._known[key][1] for tensor in tensors if (key := _storage_key(tensor)) in self._known]
        return found[0].union(*found[1:]) if found else NOTHING

    def set(self, tensor: torch.Tensor, labels: Labels) -> None:
        """Label a tensor, and every view of it."""
        key = _storage_key(tensor)
        if key:
            known = self._known.get(key)
            reference = known[0] if known else StorageWeakRef(tensor.untyped_storage())
            self._known[key] = (reference, labels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and label what it returns or writes to."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        labels = self.of(list(_tensors((args, kwargs))))
        if labels:
            self._operations.setdefault(self.inside[-1], Counter())[labels] += 1
            for tensor in _tensors(output):
                self.set(tensor, labels)
            schema = getattr(func, "_schema", None)
            if schema is not None and schema.is_mutable:
                for argument, value in zip(schema.arguments, args, strict=False):
                    if argument.alias_info is not None and argument.alias_info.is_write:
                        for tensor in _tensors(value):
                            self.set(tensor, labels)
        return output


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in an operation's arguments or result: nested lists and dictionaries, no deeper classes."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)


def _storage_key(tensor: torch.Tensor) -> int:
    """Return a number that stands for the tensor's storage, 0 if it has none (sparse tensors)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return 0


def _is_text(tensor: torch.Tensor, prompt: torch.Tensor | None) -> bool:
    """Tell whether an argument is the prompt itself, or ids, masks or types of its tokens."""
    if tensor is prompt:
        return True
    if prompt is None or tensor.shape[:2] != prompt.shape[:2]:
        return False
    # Floating numbers of a few to a token are positions, such as the boxes of words.
    return not tensor.is_floating_point() or (tensor.dim() == 3 and tensor.shape[2] <= MOST_COORDINATES)
