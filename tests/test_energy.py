"""Energy: counters in a made-up /sys and a made-up NVML, windows with a clock of the test's, exact joules."""

from __future__ import annotations

import time

import builders
import pytest

import profkit
from profkit import energy, energy_pass, inspection, roofline_text
from profkit.energy import Nvml, Rapl, Window, window


def zone(root, name, energy_uj, range_uj=1_000_000):
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")


def test_rapl_sums_packages_and_goes_on_after_a_wrap(tmp_path):
    zone(tmp_path, "intel-rapl:0", 900_000)
    zone(tmp_path, "intel-rapl:1", 100)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0, which its sum holds already
    meter = Rapl(tmp_path)
    assert meter.joules() == 0
    zone(tmp_path, "intel-rapl:0", 100_000)
    zone(tmp_path, "intel-rapl:1", 300_100)
    assert meter.joules() == pytest.approx(0.2 + 0.3)
    assert meter.joules() == pytest.approx(0.5)


class FakeNvml:
    def __init__(self, millijoules=(1000, 3500), error=None):
        self.values, self.error = list(millijoules), error

    def nvmlInit(self):
        if self.error:
            raise self.error

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"device {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-abc": "device 2"}[uuid]

    def nvmlDeviceGetTotalEnergyConsumption(self, device):
        assert device == "device 2"
        return self.values.pop(0)


def test_nvml_tells_joules():
    assert Nvml(2, FakeNvml()).joules() == Nvml(0, FakeNvml(), uuid="abc").joules() == 3.5
    with pytest.raises(OSError, match="does not tell"):
        Nvml(2, FakeNvml(error=RuntimeError("Not Supported")))


def test_what_cannot_be_read_is_said(tmp_path):
    meter, why = energy.meter_of("cpu", root=tmp_path)
    assert meter is None and why.startswith("Energy is not measured") and "no RAPL zones" in why
    zone(tmp_path, "intel-rapl:0", "?")
    assert energy.meter_of("cpu", root=tmp_path)[0] is None
    assert "no counter of xpu devices" in energy.meter_of("xpu")[1]
    zone(tmp_path, "intel-rapl:0", 1)
    assert energy.meter_of("cpu", root=tmp_path)[0] is not None


class Machine:
    """A machine that draws `watts`, whose counter changes every `update_s`."""

    name = "made up"

    def __init__(self, watts=100.0, update_s=0.1):
        self.time_s, self.watts, self.update_s = 0.0, watts, update_s

    def joules(self):
        return self.watts * self.update_s * int(self.time_s / self.update_s + 1e-9)

    def work(self, seconds):
        self.time_s += seconds

    def window(self, meter, work):
        return window(self, work, now=lambda: self.time_s)


def test_a_window_is_twenty_updates_long():
    machine = Machine()
    found = machine.window(machine, lambda: machine.work(0.3))
    # 2 s hold 6.7 executions of 0.3 s: seven, 2.1 s, 210 J, 30 J each.
    assert (found.repeats, found.joules, found.seconds) == (7, pytest.approx(210), pytest.approx(2.1))
    assert found.each_joules == pytest.approx(30) and found.watts == pytest.approx(100)
    assert found.uncertainty == pytest.approx(0.1 / 2.1)


def test_what_does_not_fill_a_window_is_left_out():
    machine = Machine()
    assert window(machine, lambda: machine.work(0.001), now=lambda: machine.time_s, most_s=1.0) is None


def test_stages_are_told_apart_by_repeating_them(monkeypatch):
    machine = Machine(watts=50.0)
    model, kwargs = builders.small_llava()
    anatomy = inspection.anatomy_for(model, kwargs)
    windows = {}

    def each(meter, work):
        work()
        return windows.setdefault(
            len(windows), [Window(40.0, 2, 20, 0.05), Window(600, 3, 100, 0.03), None][len(windows)]
        )

    found = energy_pass.measure(model, lambda: kwargs, anatomy, 5, machine, each)
    # The tower 2 J, up to the first token 6 J: 4 J are the prefill's; all tokens together filled no window.
    assert found["joules"] == pytest.approx({"vision": 2.0, "prefill": 4.0})
    assert found["notes"] == ["energy of decode is left out: a window of the counter was not filled"]
    assert found["watts"] == 200
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_run_without_counters_says_so_once(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    model, kwargs = builders.small_llava()
    found = energy_pass.measure(model, lambda: kwargs, inspection.anatomy_for(model, kwargs), 5)
    assert found["joules"] == {} and len(found["notes"]) == 1


def test_a_trace_measures_energy_where_it_is_asked_and_can(monkeypatch, tmp_path):
    model, kwargs = builders.small_llava()
    plan = {"repeat": 1, "warmup": 0, "profile": False, "work": False}
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)
    run = profkit.trace(model, kwargs, energy=True, out=tmp_path / "without", **plan)
    assert run.manifest["energy"]["joules"] == {}
    assert sum("Energy is not measured" in note for note in run.manifest["notes"]) == 1
    machine = Machine(update_s=0.01)
    machine.joules = lambda: 7.0 * time.perf_counter()
    monkeypatch.setattr(energy, "meter_of", lambda *_, **__: (machine, ""))
    run = profkit.trace(model, kwargs, energy=True, out=tmp_path / "with", **plan)
    found = profkit.load(run.path).manifest["energy"]
    assert set(found["joules"]) == {"vision", "prefill", "decode"} and found["watts"] == pytest.approx(7, rel=0.2)
    assert "7." in roofline_text.energy_line(found) or "6." in roofline_text.energy_line(found)
    assert roofline_text.energy_line(None) == roofline_text.energy_line({"joules": {}}) == ""


def test_a_difference_within_the_doubt_is_left_out():
    found = {"vision": Window(39.8, 2, 20, 0.05), "first token": Window(200.0, 2, 100, 0.05), "whole": None}
    # 2.0 - 1.99 J, where each may be off by 0.1 J.
    split = energy_pass._split(found, Machine(), new_tokens=1)
    assert split["joules"] == pytest.approx({"vision": 1.99})
    assert len(split["notes"]) == 1 and "prefill is left out: 0.01 J" in split["notes"][0]
