"""The device's clock, with recorded times in place of a device."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders import small_llava

import profkit
from profkit import clock as clocks
from profkit import environment, probes
from profkit.clock import DeviceClock


class FakeEvent:
    """An event on a FakeDevice."""

    time_us = 0
    passed = True

    def query(self) -> bool:
        return self.passed

    def elapsed_time(self, end_event: FakeEvent) -> float:
        # As a driver tells it.
        return float(np.float32((end_event.time_us - self.time_us) / 1000))


class FakeDevice:
    """A device that takes some us from each record to the next, whatever the host does."""

    def __init__(self, device: str = "cuda:0", step_us: int = 2) -> None:
        self.device, self.step_us = torch.device(device), step_us
        self.now_us = self.waits = 0
        self.events: list[FakeEvent] = []
        self.is_behind = False

    def new(self) -> FakeEvent:
        self.events.append(FakeEvent())
        return self.events[-1]

    def record(self, event: FakeEvent) -> None:
        self.now_us += self.step_us
        event.time_us, event.passed = self.now_us, not self.is_behind

    def synchronize(self) -> None:
        self.waits += 1


def test_events_are_pooled_and_resolved_with_one_wait():
    device = FakeDevice()
    clock = DeviceClock([device])
    record = clock.recorder()
    assert [record() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert device.waits == 0
    assert clock.resolve().tolist() == [2000, 4000, 6000, 8000, 10_000]
    assert device.waits == 1
    made = len(device.events)
    clock.restart()
    assert record() == 0
    assert len(device.events) == made


def test_events_that_were_passed_are_used_again_while_the_program_runs(monkeypatch):
    monkeypatch.setattr(clocks, "KEPT", 100)
    device = FakeDevice()
    record = (clock := DeviceClock([device])).recorder()
    for _ in range(10_000):
        record()
    assert len(device.events) <= 103 and device.waits == 0
    # A device that lags is not waited for: there are more events then.
    device.is_behind = True
    for _ in range(500):
        record()
    assert 400 <= len(device.events) <= 603 and device.waits == 0
    assert np.diff(clock.resolve()).tolist() == [2000] * 10_499


def test_times_are_exact_after_minutes():
    """A driver tells ms as float32: after 200 s that is 15 us."""
    device = FakeDevice(step_us=20_001)
    record = (clock := DeviceClock([device])).recorder()
    for _ in range(10_000):
        record()
    gaps = np.diff(clock.resolve())
    assert float(np.float32(200_000.001)) != 200_000.001
    assert np.abs(gaps - 20_001_000).max() <= 2000
    assert abs(gaps.sum() - 9999 * 20_001_000) < 20_000


def test_a_model_over_two_devices_has_both_on_one_clock():
    near, far = FakeDevice("cuda:0"), FakeDevice("cuda:1", step_us=500)
    clock = DeviceClock([near, far])
    # Both zeros are taken while both are idle.
    assert (near.waits, far.waits) == (1, 1)
    here, there = clock.recorder(torch.device("cuda:0")), clock.recorder(torch.device("cuda:1"))
    assert [here(), there(), here(), here(), there()] == [0, 1, 2, 3, 4]
    # What was enqueued until a mark is done when both devices are: 2, 500, max(4, 500), max(6, 500), 1000 us.
    assert clock.resolve().tolist() == [2000, 500_000, 500_000, 500_000, 1_000_000]


def test_modules_are_marked_where_they_run(monkeypatch):
    model, kwargs = small_llava()
    near, far = FakeDevice("cuda:0"), FakeDevice("cuda:1")
    tower = set(model.model.vision_tower.modules())
    monkeypatch.setattr(probes, "runs_on", lambda module: torch.device(f"cuda:{int(module in tower)}"))
    monkeypatch.setattr(clocks.DeviceClock, "of", classmethod(lambda cls, devices: DeviceClock([near, far])))
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    spans = prof.representative
    of_tower = [scope.path.startswith("model.vision_tower") for scope in spans.scopes]
    marks = np.array(of_tower)[np.abs(spans.marks.code)]
    # One event a device for its zero.
    assert (len(far.events) - 1, len(near.events) - 1) == (marks.sum(), (~marks).sum())
    assert prof.stages()["device_ms"].notna().all()


def test_the_devices_of_a_model_that_accelerate_spread():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta"), torch.nn.Identity())
    assert environment.devices_of(model) == [torch.device("cpu"), torch.device("meta")]
    model[1]._hf_hook = SimpleNamespace(execution_device=torch.device("cuda:1"))
    model[2]._hf_hook = SimpleNamespace(execution_device="cuda:0")
    assert [str(one) for one in environment.devices_of(model)] == ["cuda:1", "cuda:0", "cpu"]
    assert environment.device_of(torch.nn.Identity()) == torch.device("cpu")


def test_device_times_of_a_run_sum_exactly(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(clocks.DeviceClock, "of", classmethod(lambda cls, devices: DeviceClock([device])))
    model, kwargs = small_llava()
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    assert device.waits == 1
    spans = prof.representative
    # Every mark has an event and each is 2 µs after the one before.
    assert prof.stages()["device_ms"].sum() == pytest.approx((len(spans.marks) - 1) * 0.002)
    assert (prof.modules()["device_ms"] > 0).all()
    assert prof.steps()["device_ms"].notna().all()


def test_the_processor_has_no_device_clock():
    assert DeviceClock.of([torch.device("cpu")]) is None


def test_a_device_that_cannot_be_read_does_not_hide_the_programs_error(monkeypatch):
    class Broken(FakeDevice):
        def synchronize(self) -> None:
            raise RuntimeError("device-side assert")

    monkeypatch.setattr(clocks.DeviceClock, "of", classmethod(lambda cls, devices: DeviceClock([Broken()])))
    model, kwargs = small_llava()
    with pytest.raises(KeyError), profkit.profile(model) as prof:
        model.generate(**kwargs)
        raise KeyError("the program's own")
    assert prof.manifest["faults"] == ["device events: RuntimeError: device-side assert"]
    assert prof.stages()["host_ms"].sum() > 0
    assert prof.stages()["device_ms"].isna().all()
