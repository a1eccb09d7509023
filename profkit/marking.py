"""What writing a mark costs on this machine: calibrated on modules that do nothing."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter_ns
from typing import Any

from torch import nn

from profkit import stats
from profkit.anatomy import Anatomy
from profkit.clock import DeviceClock
from profkit.corrections import MarkCost
from profkit.ledger import Ledger, Scope, Scopes
from profkit.probes import Instrument
from profkit.spans import Spans

CHILDREN, ROUNDS = 256, 9
WARM_UP = 2
"""Rounds that are thrown away."""


class _Empty(nn.Module):
    """A generate() that calls modules which do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.ModuleList(nn.Identity() for _ in range(CHILDREN))

    def generate(self) -> None:
        """Call each child."""
        for child in self.idle:
            child(None)


def calibrated(clock: DeviceClock | None = None, now: Callable[[], int] = perf_counter_ns) -> MarkCost:
    """Return what a call's two marks cost, in ns of the clock `now`: medians of rounds with and without them, in turn.

    What the caches forget in a real model comes on top: it is the least that marks cost. `clock` adds device events.
    """
    model = _Empty()
    places: list[tuple[nn.Module, str, Scope]] = [
        (child, "forward", Scope(f"child {number}", "module")) for number, child in enumerate(model.idle)
    ]
    scopes, added, inside = Scopes(), [], []
    for number in range(WARM_UP + ROUNDS):
        plain_ns = _timed(model, now)
        ledger = Ledger(scopes, now=now)
        with Instrument(model, Anatomy("Empty", ()), ledger, clock=clock, known=places):
            probed_ns = _timed(model, now)
        spans = Spans(ledger.marks(), scopes.list)
        if number >= WARM_UP:
            # generate() itself is marked, too.
            added.append((probed_ns - plain_ns) / (CHILDREN + 1))
            inside.append(stats.median(spans.total_ns[spans.depth == 1]))
    # What an empty forward itself takes is inside too; it is some tens of ns.
    pair_ns, inside_ns = max(stats.median(added), 0.0), stats.median(inside)
    return MarkCost(min(inside_ns, pair_ns), max(pair_ns - inside_ns, 0.0))


def _timed(model: Any, now: Callable[[], int]) -> int:
    begin = now()
    model.generate()
    return now() - begin
