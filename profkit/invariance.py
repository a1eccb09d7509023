"""Does the instrument change what it measures? Tokens, random state and the model, with probes and without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from profkit import arguments
from profkit.anatomy import Anatomy
from profkit.capture import profile
from profkit.environment import device_of, modules_of, preserved_random_state, random_state, synchronize
from profkit.plan import GRANULARITIES
from profkit.probes import sequences
from profkit.verdicts import Verdict, bounded, known, unsettled

SEED = 0
DECODING: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}


def invariance(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy) -> Iterator[Verdict]:
    """Yield whether generate() gives the same with the instrument, for greedy decoding and sampling from one seed.

    Also whether the random state is the same afterwards, and whether the model is: no probe left on any module, no
    more memory of its device in use. `kwargs` are those of generate().
    """
    before = modules_of(model)
    with preserved_random_state():
        # A first generate() may put hooks of its own library's on, and fill caches.
        _run(model, arguments.greedy(model, kwargs))
        hooks, used = _hooks(model), _device_bytes(model)
        for name, options in DECODING.items():
            yield from _one_way(model, {**arguments.greedy(model, kwargs), **options}, anatomy, name)
    left = [path for path, module in model.named_modules() if _is_probed(module)]
    left += [path for path, module in modules_of(model).items() if before.get(path) != module]
    left += [path for path, hooked in _hooks(model).items() if hooks.get(path) != hooked]
    said = f"modules with a probe or other hooks left on them, or exchanged{': ' + left[0] if left else ''}"
    yield bounded("same model", len(left), 0, "modules", said)
    if used is None:
        said = f"torch does not count the memory that tensors take on {device_of(model).type}, so it cannot be known"
        yield unsettled("same memory", float("nan"), 0, "bytes", said)
    else:
        more = (_device_bytes(model) or 0) - used
        yield bounded("same memory", max(more, 0), 0, "bytes", "more memory of the device in use than before")


def _one_way(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy, name: str) -> Iterator[Verdict]:
    tokens, state = _run(model, kwargs)
    again, _ = _run(model, kwargs)
    if tokens is None or again is None or not torch.equal(tokens, again):
        said = f"{name}: the model gives other tokens each time by itself, so nothing can be compared"
        yield known(f"same tokens: {name}", float("nan"), "", said)
        return
    for granularity in GRANULARITIES:
        with profile(model, granularity=granularity, anatomy=anatomy):  # type: ignore[arg-type]
            measured, after = _run(model, kwargs)
        differ = measured is None or not torch.equal(tokens, measured)
        said = f"{name}, {granularity} granularity: tokens against those of the plain run"
        yield bounded(f"same tokens: {name}, {granularity}", float(differ), 0, "runs", said)
        other = not all(torch.equal(one, two) for one, two in zip(state, after, strict=True))
        said = f"{name}, {granularity} granularity: torch's random state afterwards"
        yield bounded(f"same random state: {name}, {granularity}", float(other), 0, "runs", said)


def _run(model: nn.Module, kwargs: Mapping[str, Any]) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    given = arguments.fresh(kwargs)
    torch.manual_seed(SEED)
    with torch.no_grad():
        found = sequences(model.generate(**given))  # type: ignore[operator]
    return (None if found is None else found.cpu()), random_state()


def _is_probed(module: nn.Module) -> bool:
    return any(hasattr(value, "__profkit__") for value in module.__dict__.values())


def _hooks(model: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return which of torch's own hooks stand on each module."""
    return {
        path: {
            name: tuple(map(id, value.values()))
            for name, value in module.__dict__.items()
            if name.endswith("_hooks") and isinstance(value, dict)
        }
        for path, module in model.named_modules()
    }


def _device_bytes(model: nn.Module) -> int | None:
    device = device_of(model)
    if device.type == "cpu" or not hasattr(torch.accelerator, "memory_allocated"):
        return None
    synchronize(device)
    return int(torch.accelerator.memory_allocated(device))
