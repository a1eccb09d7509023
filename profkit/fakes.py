"""Models without weights: a copy whose parameters have shapes and no data, and what lets generate() run on it.

Ids, masks and pixels stay real, so that generate() takes the way that it takes; what meets a weight has a shape alone.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from profkit.errors import MeasurementError

aten = torch.ops.aten
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
GROUPED = aten._grouped_mm.default if hasattr(aten, "_grouped_mm") else None
CHOOSING = {aten.argmax.default, aten.multinomial.default}


def without_weights(model: nn.Module, device: torch.device | None = None) -> nn.Module:
    """Return a copy of a model whose parameters and buffers are fake; the model itself is left as it is.

    `device` is where they claim to be: that of the weights, the CPU for a model made on the meta device.
    Raises MeasurementError for a model that cannot be copied.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    memo: dict[int, Any] = {}
    for tensor in _tensors(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = _fake(mode, tensor, device)
    try:
        made = copy.deepcopy(model, memo)
        _rebind(made)
        return made
    except Exception as error:
        raise MeasurementError(f"{type(model).__name__} cannot be copied: {type(error).__name__}: {error}") from error


def _rebind(made: nn.Module) -> None:
    """Take compiled methods off a copy: deepcopy() leaves functions as they are, and they would run the original."""
    for module in made.modules():
        for name, value in list(vars(module).items()):
            inner = getattr(value, "_torchdynamo_orig_callable", None)
            method = getattr(type(module), name, None)
            if inspect.ismethod(inner) and inner.__func__ is method:
                del module.__dict__[name]


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters, buffers, and tensors without data that modules keep as plain attributes."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        yield from (one for one in vars(module).values() if isinstance(one, torch.Tensor) and one.is_meta)


def _fake(mode: FakeTensorMode, tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    if not tensor.is_meta:
        # Shares storages as the real ones do: tied weights stay tied.
        fake: torch.Tensor = mode.from_tensor(tensor, static_shapes=True)
    else:
        with mode:
            where = device or torch.device("cpu")
            fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=where)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=False)
    return fake


@contextmanager
def quietly() -> Iterator[None]:
    """Keep to itself what torch logs of an operator that cannot run without data: it is told otherwise."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_fake(value: Any) -> bool:
    """Tell whether a value is a tensor without data."""
    return isinstance(value, FakeTensor)


def substitute(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...] | torch.Tensor:
    """Return the arguments with which an operator can run without data, or what it returns if data decide.

    Masks that pick from what has no data become numbers of places, so that shapes are known; a choice of tokens
    from scores without data is the token 0.
    """
    if func in MASKED and is_fake(args[0]):
        return args[0], _places(args[1]), *args[2:]
    if func is aten.masked_select.default and is_fake(args[0]) and not is_fake(args[1]):
        return aten.index.Tensor(args[0].expand(args[1].shape), list(_places([args[1]])))
    if func is GROUPED and is_fake(args[0]) and args[0].dim() == 2 and args[1].dim() == 3:
        # The formula for shapes wants bfloat16, whatever the device takes.
        return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
    if func in CHOOSING and is_fake(args[0]):
        made = func(*args, **kwargs)
        return torch.zeros(made.shape, dtype=made.dtype, device=made.device)
    return args


def _places(indices: Any) -> list[Any]:
    found: list[Any] = []
    for index in indices:
        masks = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) and not is_fake(index)
        found += index.nonzero().unbind(1) if masks else [index]
    return found


class RealScores:
    """A logits processor: scores without data become zeros, one token above the others, so that tokens are real."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return real scores [batch, vocabulary] on the device of `input_ids`."""
        if not is_fake(scores):
            return scores
        with _disable_current_modes():  # What is made here is no work of the model's.
            real = torch.zeros(scores.shape, dtype=scores.dtype, device=input_ids.device)
            real[:, self.token % scores.shape[-1]] = 1.0
        return real


def plain_token(*configs: Any) -> int:
    """Return the lowest token id of which no configuration says that it is special (ends, pads, stands for media)."""
    special = {number for config in configs for number in _special(config)}
    return next(number for number in range(len(special) + 1) if number not in special)


def _special(config: Any, key: str = "") -> Iterator[int]:
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        for name, value in config.items():
            yield from _special(value, str(name))
    elif isinstance(config, list | tuple):
        for value in config:
            yield from _special(value, key)
    elif isinstance(config, int) and "token" in key:
        yield config
