"""Memory at the boundaries of stages, of a device that is simulated: modules allocate when they are called."""

from __future__ import annotations

import functools

import pytest
from builders import small_llava

import profkit
from profkit import memory, passes, text
from profkit.wrapping import Wrappers

MIB = 1 << 20


class Allocator:
    """Allocates what it is told."""

    def __init__(self) -> None:
        self.now, self.most, self.resets = 100 * MIB, 900 * MIB, 0

    def take(self, size: int, keep: int = 0) -> None:
        self.most = max(self.most, self.now + size)
        self.now += keep

    def allocated(self) -> int:
        return self.now

    def reserved(self) -> int:
        return 2 * self.now

    def peak(self) -> int:
        return self.most

    def reset_peak(self) -> None:
        self.most, self.resets = self.now, self.resets + 1

    def raise_peak(self, size: int) -> None:
        self.take(max(size - self.now, 0))


@pytest.fixture
def device(monkeypatch):
    """A model whose tower takes 40 MiB for a while and keeps 1, and whose head takes 7 at each step."""
    model, kwargs = small_llava()
    allocator, wrappers = Allocator(), Wrappers()

    def taking(path: str, size: int, keep: int) -> None:
        module = model.get_submodule(path)
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args, **kwargs):
            allocator.take(size, keep)
            return inner(*args, **kwargs)

        wrappers.put(module, "forward", forward)

    taking("model.vision_tower", 40 * MIB, 1 * MIB)
    taking("lm_head", 7 * MIB, 0)
    wrappers.active = True
    monkeypatch.setattr(passes, "allocators_of", lambda devices: [allocator])
    yield model, kwargs, allocator
    wrappers.remove()


def test_peaks_belong_to_the_stage_that_reached_them(device):
    model, kwargs, allocator = device
    # The tower keeps 1 MiB in each pass: warm-up, control and clean come before.
    run = profkit.trace(model, kwargs, repeat=1, warmup=1, profile=False)
    before = run.memory.loc["setup", "allocated_before"]
    assert before == 103 * MIB
    assert run.memory.loc["vision"].tolist() == [before, before + MIB, 2 * (before + MIB), before + 40 * MIB]
    assert run.memory.loc["head", "peak"] == before + 8 * MIB
    assert run.memory.loc["prefill", "peak"] == run.memory.loc["decode", "peak"] == before + MIB
    assert run.memory.loc["total"].tolist() == [before, before + MIB, 2 * (before + MIB), before + 40 * MIB]
    # The user's own peak is there again.
    assert allocator.peak() == 900 * MIB and allocator.resets > 10
    assert run.manifest["checks"]["same_tokens"] is True


def test_memory_is_saved_and_shown(device, tmp_path):
    model, kwargs, _ = device
    run = profkit.trace(model, kwargs, repeat=1, out=tmp_path / "run")
    loaded = profkit.load(tmp_path / "run")
    assert loaded.memory.equals(run.memory)
    (first, second) = text.memory_lines(loaded)
    assert "peak 143, reserved 208" in first and "vision 143" in first
    # 2 layers of keys and values, 4 heads of 8 float32 each: 2 * 2 * 4 * 8 * 4 = 512 bytes.
    assert loaded.cache_bytes_per_token() == 512 and "cache: 0.5 KiB a token" in second


def test_the_user_gets_the_peak_back_even_if_generate_fails(device):
    model, kwargs, allocator = device
    calls = []
    inner = model.generate

    @functools.wraps(inner)
    def failing(**given):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("no")
        return inner(**given)

    model.generate = failing
    with pytest.raises(profkit.errors.MeasurementError):
        profkit.trace(model, kwargs, repeat=1, warmup=1, profile=False)
    assert allocator.peak() == 900 * MIB


def test_the_processors_allocator_keeps_no_statistics():
    model, kwargs = small_llava()
    assert memory.allocators_of([next(model.parameters()).device]) == []
    assert profkit.trace(model, kwargs, repeat=1, profile=False).memory is None
