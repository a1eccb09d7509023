"""Joules of the stages that can be told apart by repeating them: the tower, up to the first token, each later step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from profkit import energy
from profkit.anatomy import Anatomy
from profkit.energy import Meter, Window
from profkit.environment import device_of, preserved_random_state, synchronize
from profkit.wrapping import Wrappers

TakeWindow = Callable[[Meter, Callable[[], object]], Window | None]


def measure(
    model: nn.Module,
    prepared: Callable[[], Mapping[str, Any]],
    anatomy: Anatomy,
    new_tokens: int,
    meter: Meter | None = None,
    window: TakeWindow = energy.window,
) -> dict[str, Any]:
    """Return joules by stage, as plain values: {"meter", "watts", "joules": {stage: J}, "notes": […]}.

    vision or audio: the tower called again with what generate() gave it; prefill: generate() of one token, less the
    towers; decode: generate() of all tokens, less that of one. Each in windows of its own (see energy.window); what did
    not fill one is left out and noted. The random state is left as it was. Without a counter `joules` is empty, and the
    note says why.
    """
    device = device_of(model)
    if meter is None:
        meter, why = energy.meter_of(device.type, device.index or 0, uuid=_uuid(device))
        if meter is None:
            return {"meter": None, "watts": None, "joules": {}, "notes": [why]}

    def once(tokens: int) -> Callable[[], object]:
        kwargs = {**prepared(), "max_new_tokens": tokens, "min_new_tokens": tokens}

        def run() -> None:
            model.generate(**kwargs)  # type: ignore[operator]
            synchronize(device)

        return run

    with preserved_random_state(), torch.no_grad():
        towers = _tower_calls(model, anatomy, once(1))
        found = {stage: window(meter, _waiting(call, device)) for stage, call in towers.items()}
        found["first token"] = window(meter, once(1))
        found["whole"] = window(meter, once(new_tokens)) if new_tokens > 1 else None
    return _split(found, meter, new_tokens)


def _split(found: Mapping[str, Window | None], meter: Meter, new_tokens: int) -> dict[str, Any]:
    """Return the stages' joules from windows; a difference within what the windows' ends may be off is left out."""
    towers = [name for name in found if name in ("vision", "audio")]
    wanted: dict[str, tuple[str, tuple[str, ...]]] = {name: (name, ()) for name in towers}
    wanted |= {"prefill": ("first token", tuple(towers)), "decode": ("whole", ("first token",))}
    joules: dict[str, float] = {}
    notes = []
    for stage, (whole, less) in wanted.items():
        windows = [one for name in (whole, *less) if (one := found[name]) is not None]
        if len(windows) < 1 + len(less):
            if stage != "decode" or new_tokens > 1:
                notes.append(f"energy of {stage} is left out: a window of the counter was not filled")
            continue
        first, *others = windows
        value = first.each_joules - sum(one.each_joules for one in others)
        unsure = sum(one.each_joules * one.uncertainty for one in windows)
        if value > unsure:
            joules[stage] = value
        else:
            notes.append(f"energy of {stage} is left out: {value:.3g} J are no more than the {unsure:.3g} J of doubt")
    longest = max((one for one in found.values() if one), key=lambda one: one.seconds, default=None)
    watts = longest.watts if longest else None
    return {"meter": meter.name, "watts": watts, "joules": joules, "notes": notes}


def _tower_calls(model: nn.Module, anatomy: Anatomy, run: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """Return for each kind of tower a function that makes the calls that generate() makes of it."""
    stages = {"vision_tower": "vision", "audio_tower": "audio"}
    calls: dict[str, list[Callable[[], object]]] = {}
    with _recording(model, anatomy, {role: calls.setdefault(stage, []) for role, stage in stages.items()}):
        run()
    return {stage: functools.partial(_all, made) for stage, made in calls.items() if made}


@contextmanager
def _recording(model: nn.Module, anatomy: Anatomy, calls: Mapping[str, list[Callable[[], object]]]) -> Iterator[None]:
    wrappers = Wrappers()
    try:
        for part in anatomy.parts:
            if part.role in calls:
                module = model.get_submodule(part.path)
                wrappers.put(module, "forward", _recorder(module.forward, calls[part.role]))
        yield
    finally:
        wrappers.remove()


def _recorder(bound: Callable[..., Any], made: list[Callable[[], object]]) -> Callable[..., Any]:
    @functools.wraps(bound)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        made.append(functools.partial(bound, *args, **kwargs))
        return bound(*args, **kwargs)

    return recorded


def _all(made: list[Callable[[], object]]) -> None:
    for call in made:
        call()


def _waiting(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    def run() -> None:
        call()
        synchronize(device)

    return run


def _uuid(device: torch.device) -> str:
    """Return what NVIDIA's tools call a device by, "" where torch does not tell."""
    if device.type != "cuda":
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
