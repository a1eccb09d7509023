"""Known delays, put into one part of a model after the other: each must be found there, and there alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from torch import nn

from profkit import arguments, stages, stats, tables
from profkit.anatomy import Anatomy
from profkit.capture import profile
from profkit.environment import device_of
from profkit.ledger import NO_TIME
from profkit.spans import Spans
from profkit.stopwatches import Stopwatch, stopwatch_for
from profkit.verdicts import Verdict, between, bounded, known, within
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
    (read inside it), against the time really waited. What leaked: the largest change of any other scope in any stage,
    and of any stage as a whole, against runs without the delay, in alternation; its median over `repeats`.
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
        model.generate(**arguments.fresh(kwargs))  # type: ignore[operator]
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
        late, plain = (_own_ms(pair[which], clock) for which in (True, False))
        change_ms = late.sub(plain, fill_value=0.0)
        mine = _is_delayed(change_ms.index, path)
        found.append(_found_ms(pair[True], path, waits) if path else float(change_ms[mine].sum()))
        waited.append(waits.waited_ns / tables.MS)
        changes.append(_elsewhere(change_ms[~mine]))
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
    changed = pd.DataFrame(changes).fillna(0.0)
    middle = stats.medians(changed.to_numpy())
    worst = int(np.abs(middle).argmax())
    low, high = stats.median_interval(changed.iloc[:, worst].to_numpy())
    said = f"the largest change elsewhere, {_named(changed.columns, middle, worst)}: {middle[worst]:+.2f} ms"
    said += f" ({between((low, high), '+.2f', ' ms')})"
    share = middle[worst] / truth
    yield within(f"delay: {name}, elsewhere", share, (low / truth, high / truth), LEAKED, "", said)


def _spans(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy) -> Spans:
    with profile(model, granularity="layer", anatomy=anatomy) as run:
        model.generate(**arguments.fresh(kwargs))  # type: ignore[operator]
    return run.representative


def _found_ms(spans: Spans, path: str, waits: Waits) -> float:
    """Return the time attributed to a scope beyond what its own work took, on the waits' clock."""
    rows = np.array([scope.path == path for scope in spans.scopes])[spans.scope]
    times = spans.marks.device_ns if waits.watch.on_device else spans.marks.host_ns
    total_ns = int((times[spans.end[rows]] - times[spans.begin[rows]]).sum())
    return (total_ns - waits.own_ns) / tables.MS


def _own_ms(spans: Spans, clock: tables.Clock) -> pd.Series:
    """Return each scope's own time in each stage, in ms, under (path, stage)."""
    counted = spans.stage >= 0
    times = spans.host_ns if clock == "host" else np.where(spans.device_ns == NO_TIME, 0, spans.device_ns)
    code, stage = spans.scope[spans.owner[counted]], spans.stage[counted]
    sums = np.zeros((len(spans.scopes), len(stages.STAGES)))
    np.add.at(sums, (code, stage), times[counted] / tables.MS)
    kept = sorted(set(zip(code.tolist(), stage.tolist(), strict=True)))
    index = pd.MultiIndex.from_tuples([(spans.scopes[one].path, stages.NAMES[two]) for one, two in kept])
    return pd.Series([sums[one] for one in kept], index=index, dtype=float).groupby(level=[0, 1]).sum()


def _is_delayed(index: pd.Index, path: str) -> np.ndarray:
    """Return which own times hold the wait; that of a logits processor is generate()'s own, while it selects."""
    paths, names = (index.get_level_values(level) for level in (0, 1))
    return np.asarray(paths == path if path else paths.str.endswith("generate()") & (names == "select"))


def _elsewhere(change_ms: pd.Series) -> pd.Series:
    """Return changes scope by scope, and stage by stage, as a small one of many scopes may be a large one of all."""
    scopes = change_ms.set_axis([f"{path} in {stage}" for path, stage in change_ms.index])
    whole = change_ms.groupby(level=1).sum()
    return pd.concat([scopes, whole.set_axis([f"stage {name}" for name in whole.index])])


def _named(labels: pd.Index, change_ms: np.ndarray, worst: int) -> str:
    """Return where a change is: that of a whole stage with the scope in it that changed most."""
    name = str(labels[worst])
    if not name.startswith("stage "):
        return name
    inside = f" in {name.removeprefix('stage ')}"
    scopes = [number for number, label in enumerate(labels) if str(label).endswith(inside)]
    most = max(scopes, key=lambda number: abs(change_ms[number]))
    return f"{name}, most of it in {str(labels[most]).removesuffix(inside)}"


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
