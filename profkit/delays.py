"""Known delays, put into one part of a model after the other: each must be found there, and there alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from profkit import stages, stats, tables
from profkit.anatomy import Anatomy
from profkit.capture import profile
from profkit.environment import device_of
from profkit.spans import Spans
from profkit.stopwatches import Stopwatch, stopwatch_for
from profkit.verdicts import Verdict, bounded, known, within
from profkit.wrapping import Wrappers

RECOVERED, RECOVERED_MS, LEAKED = 0.02, 0.05, 0.01
"""A delay is found if the scope's time tells it within this share, or this many ms; the last may leak elsewhere."""
WAIT_MS, DEVICE_WAIT_MS, REPEATS = 300.0, 50.0, 9
"""The wait in one generate(), on the host or on a device, and pairs of runs with and without it. It is long, and made
once: what runs after a wait finds caches cold and is slower for a while, which is no leak, and must be small
against it."""


@dataclass
class Waits:
    """What one delayed part did: when each of its calls began, was done, and was left; it waits in call number `at`."""

    watch: Stopwatch
    at: int
    calls: list[tuple[Any, Any, Any]] = field(default_factory=list)

    @property
    def own_ns(self) -> int:
        """How long its own work took, in all."""
        return sum(self.watch.elapsed_ns(begin, done) for begin, done, _ in self.calls)

    @property
    def waited_ns(self) -> int:
        """How long it waited, in all."""
        return sum(self.watch.elapsed_ns(done, end) for _, done, end in self.calls)

    def around(self, inner: Callable[..., Any], wait_ns: int) -> Callable[..., Any]:
        """Return a function that calls `inner` and, in one of its calls, waits behind it."""
        now = self.watch.now

        @functools.wraps(inner)
        def delayed(*args: Any, **kwargs: Any) -> Any:
            begin = now()
            output = inner(*args, **kwargs)
            done = now()
            if len(self.calls) == self.at:
                self.watch.wait(wait_ns)
            self.calls.append((begin, done, now()))
            return output

        return delayed


class _WaitingProcessor(transformers.LogitsProcessor):
    """A logits processor that leaves scores alone, and waits."""

    def __init__(self, waits: Waits, wait_ns: int) -> None:
        self._wait = waits.around(lambda scores: scores, wait_ns)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._wait(scores)


def delays(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    anatomy: Anatomy,
    wait_ms: float | None = None,
    repeats: int = REPEATS,
) -> Iterator[Verdict]:
    """Yield, for tower, projector, a decoder layer, head and a logits processor, how much of a delay was found there.

    The host waits busily, a CUDA device runs a kernel that spins, and times are those of that clock: `wait_ms` is
    WAIT_MS or DEVICE_WAIT_MS.

    Two verdicts each. What was found: the time attributed to the delayed scope, less what the scope's own work took
    (read inside it), against the time really waited. What leaked: the largest change of any other stage, against runs
    without the delay, in alternation; its median over `repeats`.
    """
    watch = stopwatch_for(device_of(model))
    if watch is None:
        said = f"torch has no kernel of known length for {device_of(model).type}"
        yield known("delay", float("nan"), "", f"nothing can be delayed: {said}")
        return
    wait_ns = round((wait_ms or (DEVICE_WAIT_MS if watch.on_device else WAIT_MS)) * tables.MS)
    for name, path in _targets(model, anatomy).items():
        calls = _calls(model, kwargs, anatomy, path)
        if not calls:
            yield known(f"delay: {name}", float("nan"), "", f"{path} did not run, so it cannot be delayed")
            continue
        yield from _one(model, kwargs, anatomy, name, path, watch, calls // 2, wait_ns, repeats)


def _targets(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Return the path of each part to delay; "" stands for a logits processor."""
    found = {}
    for name, role in (("vision", "vision_tower"), ("audio", "audio_tower"), ("projector", "projector")):
        part = next((part for part in anatomy.parts if part.role == role and not part.through), None)
        if part is not None:
            found[name] = part.path
    if layers := anatomy.path("decoder_layers"):
        names = [name for name, _ in model.get_submodule(layers).named_children()]
        found["decoder layer"] = f"{layers}.{names[len(names) // 2]}"
    if head := anatomy.path("lm_head"):
        found["head"] = head
    return {**found, "select": ""}


def _calls(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy, path: str) -> int:
    """Return how often a part runs in one generate(); a logits processor runs as often as the head."""
    with profile(model, granularity="layer", anatomy=anatomy) as run:
        model.generate(**kwargs)  # type: ignore[operator]
    modules = run.modules().set_index("path")["calls"]
    return int(modules.get(path or str(anatomy.path("lm_head")), 0))


def _one(
    model: nn.Module,
    kwargs: Mapping[str, Any],
    anatomy: Anatomy,
    name: str,
    path: str,
    watch: Stopwatch,
    at: int,
    wait_ns: int,
    repeats: int,
) -> Iterator[Verdict]:
    found, waited, changes = [], [], []
    clock: tables.Clock = "device" if watch.on_device else "host"
    for number in range(repeats):
        waits = Waits(watch, at)
        pair: dict[bool, Spans] = {}
        for slow in (False, True) if number % 2 == 0 else (True, False):
            with _delayed(model, kwargs, path, waits, wait_ns) if slow else nullcontext(kwargs) as given:
                pair[slow] = _spans(model, given, anatomy)
        late, plain = (tables.stage_ns(pair[which], clock=clock) for which in (True, False))
        change_ms = (late - plain) / tables.MS
        mine = _stages_of(pair[True], path)
        found.append(_found_ms(pair[True], path, waits) if path else float(change_ms[stages.INDEX["select"]]))
        waited.append(waits.waited_ns / tables.MS)
        changes.append(np.where(mine, 0.0, change_ms))
    truth = stats.median(waited)
    allowed = max(RECOVERED * truth, RECOVERED_MS)
    where = path or "a logits processor"
    said = f"{stats.median(found):.2f} ms of {truth:.2f} ms waited in {where} were found in its scope"
    if path:
        missed = stats.median(np.abs(np.array(found) - np.array(waited)))
        yield bounded(f"delay: {name}", missed, allowed, "ms", said)
    else:
        # A module's own work is read in every run; what selecting took without the delay only in its pair.
        off = np.array(found) - np.array(waited)
        yield within(f"delay: {name}", stats.median(off), stats.median_interval(off), allowed, "ms", said)
    middle = stats.medians(np.array(changes))
    worst = int(np.abs(middle).argmax())
    low, high = stats.median_interval(np.array(changes)[:, worst])
    said = f"the largest change of another stage, {stages.NAMES[worst]}: {middle[worst]:+.2f} ms"
    said += f" (95 % interval {low:+.2f} to {high:+.2f} ms)"
    share = middle[worst] / truth
    yield within(f"delay: {name}, elsewhere", share, (low / truth, high / truth), LEAKED, "", said)


def _spans(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy) -> Spans:
    with profile(model, granularity="layer", anatomy=anatomy) as run:
        model.generate(**kwargs)  # type: ignore[operator]
    return run.representative


def _found_ms(spans: Spans, path: str, waits: Waits) -> float:
    """Return the time attributed to a scope beyond what its own work took, on the waits' clock."""
    rows = np.array([scope.path == path for scope in spans.scopes])[spans.scope]
    times = spans.marks.device_ns if waits.watch.on_device else spans.marks.host_ns
    total_ns = int((times[spans.end[rows]] - times[spans.begin[rows]]).sum())
    return (total_ns - waits.own_ns) / tables.MS


def _stages_of(spans: Spans, path: str) -> np.ndarray:
    """Return which stages the delayed scope's own time lies in."""
    if not path:
        return np.arange(len(stages.STAGES)) == stages.INDEX["select"]
    scope = np.array([scope.path == path for scope in spans.scopes])[spans.scope]
    inside = np.append(spans.nearest(scope), -1)[spans.owner] >= 0
    return np.isin(np.arange(len(stages.STAGES)), spans.stage[inside])


@contextmanager
def _delayed(
    model: nn.Module, kwargs: Mapping[str, Any], path: str, waits: Waits, wait_ns: int
) -> Iterator[Mapping[str, Any]]:
    """Delay a module's forward, below the probes, or add a logits processor that waits."""
    if not path:
        given = [*kwargs.get("logits_processor", []), _WaitingProcessor(waits, wait_ns)]
        yield {**kwargs, "logits_processor": transformers.LogitsProcessorList(given)}
        return
    module, wrappers = model.get_submodule(path), Wrappers()
    wrappers.put(module, "forward", waits.around(module.forward, wait_ns))
    wrappers.active = True
    try:
        yield kwargs
    finally:
        wrappers.remove()
