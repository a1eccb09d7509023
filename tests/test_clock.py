"""The device's clock, with recorded times in place of a device."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from builders import small_llava

import profkit
from profkit import clock as clocks
from profkit.clock import DeviceClock


class FakeEvent:
    """An event on a device that takes 2 µs from each record to the next, whatever the host does."""

    ticks = itertools.count()

    def record(self) -> None:
        self.time_us = 2 * next(self.ticks)

    def elapsed_time(self, end_event: FakeEvent) -> float:
        return (end_event.time_us - self.time_us) / 1000


def fake_clock() -> tuple[DeviceClock, list[str]]:
    waits: list[str] = []
    return DeviceClock(FakeEvent, lambda: waits.append("wait")), waits


def test_events_are_pooled_and_resolved_with_one_wait():
    clock, waits = fake_clock()
    assert [clock.record() for _ in range(5)] == [0, 1, 2, 3, 4]
    assert waits == []
    assert np.diff(clock.resolve()).tolist() == [2000] * 4
    assert waits == ["wait"]
    pool = list(clock._pool)
    clock.restart()
    assert clock.record() == 0
    assert clock._pool == pool


def test_device_times_of_a_run_sum_exactly(monkeypatch):
    clock, waits = fake_clock()
    monkeypatch.setattr(clocks.DeviceClock, "of", classmethod(lambda cls, device: clock))
    model, kwargs = small_llava()
    with profkit.profile(model) as prof:
        model.generate(**kwargs)
    assert waits == ["wait"]
    spans = prof.representative
    # Every mark has an event and each is 2 µs after the one before.
    assert prof.stages()["device_ms"].sum() == pytest.approx((len(spans.marks) - 1) * 0.002)
    assert (prof.modules()["device_ms"] > 0).all()
    assert prof.steps()["device_ms"].notna().all()


def test_the_processor_has_no_device_clock():
    assert DeviceClock.of(torch.device("cpu")) is None


def test_a_device_that_cannot_be_read_does_not_hide_the_programs_error(monkeypatch):
    def broken() -> None:
        raise RuntimeError("device-side assert")

    clock = DeviceClock(FakeEvent, broken)
    monkeypatch.setattr(clocks.DeviceClock, "of", classmethod(lambda cls, device: clock))
    model, kwargs = small_llava()
    with pytest.raises(KeyError), profkit.profile(model) as prof:
        model.generate(**kwargs)
        raise KeyError("the program's own")
    assert prof.manifest["faults"] == ["device events: RuntimeError: device-side assert"]
    assert prof.stages()["host_ms"].sum() > 0
    assert prof.stages()["device_ms"].isna().all()
