"""Probes around an unmodified generate() → Run: what profile() does, and what every pass needs."""

from __future__ import annotations

import functools
import inspect as signatures
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
from torch import nn

from profkit import audit, checks, environment, inspection, structure
from profkit.anatomy import Anatomy, Calls
from profkit.clock import DeviceClock
from profkit.environment import devices_of
from profkit.ledger import Ledger, Marks, Scopes
from profkit.plan import COMPILED, Granularity, is_compiled
from profkit.probes import Call, Instrument
from profkit.run import Pass, Run
from profkit.spans import Spans
from profkit.wrapping import Wrappers, unwrapped


@contextmanager
def profile(model: nn.Module, *, granularity: Granularity = "layer", anatomy: Anatomy | None = None) -> Iterator[Run]:
    """Measure every generate() in the body with probes and device events alone; the value is a Run.

    `granularity` is "stage", "layer" (also decoder and tower layers, attention, MLP) or "module".
    The Run's tables are there once the body is left. An exception in the body propagates unchanged, and
    what was measured until then is kept; probes come off in every case.

    Without `anatomy` the parts are found as inspect() finds them: ahead of the first model.generate() in the body,
    with its arguments, in a short run of its own that is not measured.
    """
    model = unwrapped(model)
    found = anatomy or structure.find(model)
    scopes = Scopes()
    ledger = Ledger(scopes)
    result = Run(environment.describe(model), found, scopes.list, [])
    clock = DeviceClock.of(devices_of(model))
    instrument = Instrument(model, found, ledger, granularity, clock)
    try:
        with instrument, nullcontext() if anatomy else _finding_parts(model, instrument):
            yield result
    finally:
        # This runs while the body's exception, if any, is on its way: nothing here may take its place.
        try:
            marks = marks_of(ledger, clock)
        except Exception as error:
            ledger.fault(error, "device events")
            marks = ledger.marks()
        spans = Spans(marks, scopes.list)
        result.passes = [Pass("clean", _generate_ns(spans), spans)]
        result.anatomy = instrument.anatomy.with_calls(calls_by_path(spans))
        result.manifest["calls"] = [call_dict(call) for call in instrument.calls]
        result.manifest["faults"], result.manifest["notes"] = ledger.faults, not_split(model, spans)
        result.manifest["checks"] = {"repaired": vars(spans.repair), "encoded": encoded(spans, instrument)}
        try:
            result.manifest["checks"]["verdicts"] = [asdict(one) for one in checks.verdicts(result)]
        except Exception as error:
            ledger.fault(error, "verdicts")


@contextmanager
def _finding_parts(model: nn.Module, instrument: Instrument) -> Iterator[None]:
    """Ahead of the first model.generate(), look for the parts with its arguments, and probe those from then on."""
    wrappers, searching = Wrappers(), threading.Lock()
    bound = model.generate

    @functools.wraps(bound)  # type: ignore[arg-type]
    def first_generate(*args: Any, **kwargs: Any) -> Any:
        with searching:
            if wrappers.active:
                wrappers.remove()
                try:
                    named = signatures.signature(bound).bind_partial(*args).arguments  # type: ignore[arg-type]
                    instrument.replan(inspection.anatomy_for(model, {**named, **kwargs}))
                except Exception as error:
                    instrument.ledger.fault(error, "parts are known by structure alone")
        return bound(*args, **kwargs)  # type: ignore[operator]

    wrappers.put(model, "generate", first_generate)
    wrappers.active = True
    try:
        yield
    finally:
        wrappers.remove()


def marks_of(ledger: Ledger, clock: DeviceClock | None) -> Marks:
    """Return a ledger's marks, with device times where there is a clock."""
    return ledger.marks(clock.resolve if clock else None)


def not_split(model: nn.Module, spans: Spans) -> list[str]:
    """Return a sentence for each thing that is one scope because torch.compile() made it one."""
    found = [
        f"{path or type(model).__name__} is compiled and timed as one: what is inside is not split"
        for path, module in model.named_modules()
        if is_compiled(module)
    ]
    compiled = np.array([scope.path.endswith(COMPILED) for scope in spans.scopes])[spans.scope]
    if count := int(compiled.sum()):
        found.append(
            f"generate() compiled its decode step: {count} of {len(spans.steps)} steps are inside one graph, so their "
            "embedding, layers and head are not split"
        )
    return found


def encoded(spans: Spans, instrument: Instrument) -> dict[str, Any] | None:
    """Return what the towers encoded needlessly, as audit.Audit.as_dict(); None if that cannot be told."""
    try:
        return audit.audit(spans, instrument.encodings).as_dict()
    except Exception as error:
        instrument.ledger.fault(error, "audit of encodings")
        return None


def _generate_ns(spans: Spans) -> int:
    outer = spans.is_kind("generate") & (spans.depth == 0)
    return int(spans.total_ns[outer].sum())


def calls_by_path(spans: Spans) -> dict[str, Calls]:
    """Return how often each probed path was called in which phase."""
    counts = spans.calls.tolist()
    return {scope.path: Calls(*count) for scope, count in zip(spans.scopes, counts, strict=True)}


def call_dict(call: Call) -> dict[str, int | None]:
    """Return the sizes of a call of generate()."""
    return {"batch": call.batch, "prompt_tokens": call.prompt_tokens, "new_tokens": call.new_tokens()}
