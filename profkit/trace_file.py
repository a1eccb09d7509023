"""The trace of a profiled pass as it is written: profkit's part and the profiler's, within a budget of bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from profkit import annotate, tracks
from profkit.attribution import RANGE_PREFIX
from profkit.events import Events
from profkit.explanation import Explanation
from profkit.run import recorded
from profkit.spans import Spans

SMALLER = 0.9
"""A window that was estimated to fit and did not is tried again with so much of the budget."""


ROOM_BYTES = 4000
"""What the run's checks take, compressed, which are put behind when all else is done."""


@dataclass(frozen=True)
class TraceFile:
    """The text of a trace, the steps that it holds, and its compressed size where even one step passes the budget."""

    text: bytes
    steps: tuple[int, ...]
    over_bytes: int = 0

    def notes(self, recorded: int, budget_bytes: int) -> Iterator[str]:
        """Yield what the budget left out, and whether what is left passes it, too."""
        budget, kept = f"{budget_bytes / 1e6:g} MB", len(self.steps)
        if kept < recorded:
            yield f"the trace holds {kept} of {recorded} recorded steps: more pass {budget}"
        if self.over_bytes:
            size = f"{self.over_bytes / 1e6:g} MB"
            said = f"the trace takes about {size}, more than the {budget} of --trace-budget"
            yield f"{said}: one step is kept in any case"


def written(
    content: bytes,
    spans: Spans,
    events: Events,
    found: Explanation,
    steps: Sequence[int],
    budget_bytes: int,
    metadata: Mapping[str, object],
    by_step: Mapping[str, Mapping[int, float]],
) -> TraceFile:
    """Return the trace of the recorded steps, or of the first of them that fit into a budget once compressed.

    `content` is what the profiler exported, `spans` and `events` are on its clock, `by_step` are series for counters.
    One step is kept in any case.
    """
    count, allowed = len(steps), float(budget_bytes)
    room = ROOM_BYTES
    while True:
        kept = tuple(steps[:count])
        text = _text(content, spans, events, found, kept, count < len(steps), metadata, by_step)
        # Text that would fit as it stands need not be compressed to know.
        if len(text) + room <= budget_bytes or (size := len(annotate.compressed(text)) + room) <= budget_bytes:
            return TraceFile(text, kept)
        if count == 1:
            return TraceFile(text, kept, size)
        count = min(count - 1, max(1, int(count * allowed / size)))
        allowed *= SMALLER


def _text(
    content: bytes,
    spans: Spans,
    events: Events,
    found: Explanation,
    kept: tuple[int, ...],
    cut: bool,
    metadata: Mapping[str, object],
    by_step: Mapping[str, Mapping[int, float]],
) -> bytes:
    within = recorded(spans, kept)
    until_ns = int(spans.marks.host_ns[spans.steps.stop[kept[-1]]]) if cut else None
    arrows = tracks.flows(spans, events, found.owners)
    own = annotate.Own(
        tracks.of(spans, within),
        tracks.counters(spans, within, **by_step, **found.busy_share),
        [one for one in arrows if until_ns is None or max(one.from_ns, one.to_ns) < until_ns],
        {**metadata, "steps": kept},
    )
    return annotate.annotated(content, RANGE_PREFIX, own, until_ns)
