"""What only a device can show: python -m pytest tests/gpu, on a machine with one. Skipped elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import profkit
from profkit import attribution, chrome, inspection, kineto
from profkit.events import DEVICE, Kind
from profkit.explanation import explain
from profkit.ledger import Ledger
from profkit.probes import Instrument
from profkit.run import recorded
from profkit.spans import Spans

if not torch.accelerator.is_available():
    pytest.skip("needs an accelerator", allow_module_level=True)

from builders import event_model, small_llava

DEVICE_TYPE = torch.accelerator.current_accelerator()


def moved(value):
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE_TYPE)
    return [moved(one) for one in value] if isinstance(value, list) else value


@pytest.fixture(scope="module", params=[small_llava, event_model])
def model_and_kwargs(request):
    model, kwargs = request.param()
    return model.to(DEVICE_TYPE), {key: moved(value) for key, value in kwargs.items()}


@pytest.fixture(scope="module")
def live(model_and_kwargs):
    """A profiled generate(): spans on the profiler's clock, columns, the exported text."""
    model, kwargs = model_and_kwargs
    model.generate(**kwargs)
    anatomy = inspection.inspect(model, **kwargs)
    ledger, session = Ledger(), kineto.Session(frozenset(range(5)), DEVICE_TYPE)
    instrument = Instrument(model, anatomy, ledger, "layer", None, session.wrap, session.on_iteration)
    with session, instrument:
        model.generate(**kwargs)
        torch.accelerator.synchronize()
    events = session.events()
    return attribution.aligned(Spans(ledger.marks(), ledger.scopes.list), events), events, session.export()


def test_columns_equal_the_exported_trace(live):
    _, events, text = live
    trace = chrome.parse(text)
    base = int(trace.header["baseTimeNanoseconds"])
    for kinds in ((Kind.KERNEL,), (Kind.MEMCPY, Kind.MEMSET), (Kind.RUNTIME,), (Kind.OPERATOR,)):
        one, other = (each.select(each.is_kind(*kinds)) for each in (events, trace.events))
        assert len(one) == len(other)
        mine = sorted(zip(one.start_ns.tolist(), one.duration_ns.tolist(), one.correlation.tolist(), strict=True))
        theirs = sorted(
            zip((other.start_ns + base).tolist(), other.duration_ns.tolist(), other.correlation.tolist(), strict=True)
        )
        assert mine == theirs


def test_every_kernel_has_a_launch_a_stage_and_a_scope(live):
    spans, events, _ = live
    found = explain(spans, events, recorded(spans, range(5)))
    assert found.kernels is not None and found.device is not None
    assert [one.name for one in found.checks if one.ok is False] == []
    total = found.kernels["total_ms"].sum()
    assert found.kernels.loc[found.kernels["stage"] != "outside", "total_ms"].sum() >= 0.999 * total
    assert {"vision", "projector", "prefill", "decode", "head"} <= set(found.kernels["stage"])
    assert found.kernels.loc[found.kernels["path"] != "", "total_ms"].sum() >= 0.999 * total
    device = events.is_kind(*DEVICE)
    assert found.kernels["count"].sum() == device.sum()
    assert set(found.device["verdict"]) <= {"host-bound", "device-bound", "mixed", "waiting"}


def test_a_run_has_device_times_and_busy_times(model_and_kwargs, tmp_path):
    model, kwargs = model_and_kwargs
    run = profkit.trace(model, kwargs, out=tmp_path / "run", repeat=3)
    assert run.manifest["checks"]["same_tokens"] is True
    stages = run.stages()
    for name in ("vision", "prefill", "decode"):
        assert 0 < stages.loc[name, "busy_ms"] <= 1.05 * stages.loc[name, "device_ms"]
    loaded = profkit.load(tmp_path / "run")
    assert loaded.kernels is not None and np.isclose(loaded.kernels["total_ms"].sum(), run.kernels["total_ms"].sum())
    assert loaded.stages().equals(stages)
