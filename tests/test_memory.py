"""Memory by stage: real allocations, as the profiler lists them, above what an allocator says at each mark."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from builders import small_llava

import profkit
from profkit import memory, passes, text
from profkit.wrapping import Wrappers

MIB = 1 << 20


class Allocator:
    """Holds 100 MiB, and what it is told to."""

    def __init__(self) -> None:
        self.held = 100 * MIB

    def allocated(self) -> int:
        return self.held

    def reserved(self) -> int:
        return 2 * self.held


@pytest.fixture
def device(monkeypatch):
    """A model whose tower takes 40 MiB for a while, and keeps 1."""
    model, kwargs = small_llava()
    allocator, wrappers = Allocator(), Wrappers()
    tower = model.get_submodule("model.vision_tower")
    inner = tower.forward

    @functools.wraps(inner)
    def forward(*args, **given):
        torch.empty(40 * MIB, dtype=torch.uint8)
        allocator.held += MIB
        return inner(*args, **given)

    wrappers.put(tower, "forward", forward)
    wrappers.active = True
    monkeypatch.setattr(passes, "allocators_of", lambda devices: [allocator])
    yield model, kwargs
    wrappers.remove()


def test_peaks_belong_to_the_stage_that_reached_them(device, tmp_path):
    model, kwargs = device
    # The tower keeps 1 MiB in each pass: warm-up, control and clean come before.
    run = profkit.trace(model, kwargs, repeat=1, warmup=1, work=False, out=tmp_path / "run")
    before = 103 * MIB
    vision = run.memory.loc["vision"]
    assert vision[:3].tolist() == [before, before + MIB, 2 * (before + MIB)]
    assert vision["peak"] == run.memory.loc["total", "peak"] == pytest.approx(before + 40 * MIB, abs=MIB)
    for stage in ("setup", "prefill", "decode", "head", "select"):
        assert run.memory.loc[stage, "peak"] < before + 2 * MIB
    assert run.manifest["checks"]["same_tokens"] is True
    loaded = profkit.load(tmp_path / "run")
    assert loaded.memory.equals(run.memory)
    (first, second) = text.memory_lines(loaded)
    assert "103 before, peak 143, reserved 208" in first and "vision 143" in first
    # 2 layers of keys and values, 4 heads of 8 float32 each: 2 * 2 * 4 * 8 * 4 = 512 bytes.
    assert loaded.cache_bytes_per_token() == 512 and "cache: 0.5 KiB a token" in second


def test_peaks_between_marks():
    """Marks at 0, 10, 20 with 100, 130 and 110 bytes; +50 at 2, -20 at 4, +5 at 11, -25 at 12."""
    found = memory.peaks(
        np.array([0, 10, 20]), np.array([100, 130, 110]), np.array([12, 2, 4, 11, 30]), np.array([-25, 50, -20, 5, 999])
    )
    assert found.tolist() == [150, 135]
    assert memory.peaks(np.array([0, 10]), np.array([1, 3]), np.array([]), np.array([])).tolist() == [3]


def test_the_cache_of_beams_is_told_a_sequence():
    model, kwargs = small_llava()
    run = profkit.trace(model, {**kwargs, "num_beams": 3}, repeat=1, work=False)
    assert run.cache_bytes_per_token() == 512


def test_the_processors_allocator_keeps_no_statistics():
    model, kwargs = small_llava()
    assert memory.allocators_of([next(model.parameters()).device]) == []
    assert profkit.trace(model, kwargs, repeat=1, work=False).memory is None
