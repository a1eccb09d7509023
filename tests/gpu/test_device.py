"""What only a device can show: python -m pytest tests/gpu, on a machine with one. Skipped elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import profkit
from profkit import attribution, chrome, delays, inspection, kineto
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


def test_device_times_sum_to_the_span_of_the_device(model_and_kwargs):
    model, kwargs = model_and_kwargs
    model.generate(**kwargs)
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    spans = prof.representative
    device = spans.marks.device_ns
    assert (np.diff(device) >= 0).all()
    assert prof.stages()["device_ms"].sum() * 1e6 == pytest.approx(device[-1] - device[0], rel=0.001)
    assert abs((device[-1] - device[0]) / (spans.marks.host_ns[-1] - spans.marks.host_ns[0]) - 1) < 0.2


def test_a_spinning_kernel_is_found_where_it_is(model_and_kwargs):
    if DEVICE_TYPE.type != "cuda":
        pytest.skip("torch has a kernel of known length for CUDA alone")
    model, kwargs = model_and_kwargs
    found = [*delays.delays(model, kwargs, profkit.inspect(model, **kwargs), wait_ms=10, repeats=3)]
    by_name = {one.check: one for one in found}
    for name in ("vision", "projector", "decoder layer", "head"):
        assert by_name[f"delay: {name}"].ok, by_name[f"delay: {name}"]


def test_memory_has_peaks_and_leaves_the_users_alone(model_and_kwargs):
    model, kwargs = model_and_kwargs
    ballast = torch.empty(64 << 20, dtype=torch.uint8, device=DEVICE_TYPE)
    del ballast
    before = torch.accelerator.max_memory_allocated()
    run = profkit.trace(model, kwargs, repeat=1, profile=False)
    assert torch.accelerator.max_memory_allocated() >= before
    assert run.memory is not None
    assert run.memory.loc["total", "peak"] == run.memory["peak"].max() < before
    assert (run.memory["peak"] >= run.memory["allocated_before"].min()).all()


def test_compiled_steps_are_marked(model_and_kwargs):
    model, kwargs = model_and_kwargs
    if not getattr(model, "_can_compile_fullgraph", False):
        pytest.skip("generate() does not compile this model")
    static = {**kwargs, "cache_implementation": "static"}
    tokens = model.generate(**static)
    with profkit.profile(model) as prof:
        assert torch.equal(model.generate(**static), tokens)
    assert prof.steps()["phase"].tolist().count("decode") == 4
    assert prof.stages().loc["decode", "device_ms"] > 0


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
