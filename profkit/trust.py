"""What a trace gives reason to doubt: counts of what is missing, impossible or damaged in it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from profkit.attribution import Owners, ambiguous, is_launch
from profkit.chrome import Trace
from profkit.events import DEVICE, NOTHING, Events, Kind, kind_of
from profkit.graphs import in_capture
from profkit.nesting import Forest
from profkit.occupancy import Occupancy, overlapping

COPY_NAME = re.compile(r"(?i)memcpy|memset")
NO_WORK = ("Trace", "trace")
"""Categories of frames around everything: the profiler's own row from begin to end."""
LIKE_DEVICE = re.compile(r"(?i)kernel|memcpy|memset|device|npu|gpu|tpu|xla|hpu|mtia")
FLOW_CATEGORIES = ("ac2g", "async_cpu_to_gpu", "async")


@dataclass(frozen=True)
class Check:
    """One question asked of a trace: how many of how many are doubtful, and what that means.

    `ok` is None where the answer says nothing bad, or where there was nothing to ask.
    """

    name: str
    ok: bool | None
    count: int
    total: int
    sentence: str


def checks(trace: Trace, owners: Owners, occupied: Occupancy, forest: Forest) -> list[Check]:
    """Return every check of a trace, those of the file first."""
    return [*_of_file(trace), *of_events(trace.events, owners, occupied, forest), *_of_flows(trace, owners)]


def of_events(events: Events, owners: Owners, occupied: Occupancy, forest: Forest) -> Iterator[Check]:
    """Yield the checks of events, wherever they come from."""
    device = events.is_kind(*DEVICE)
    kernels = int(device.sum())
    orphans = device & (owners.launch < 0)
    share = int(events.length_ns[orphans].sum()) / max(int(events.length_ns[device].sum()), 1)
    yield _check(
        "launches of kernels",
        int(orphans.sum()),
        kernels,
        f"device events without a recorded launch, {share:.1%} of the time",
    )
    mixed = int(ambiguous(events).sum())
    if mixed:
        said = "device events whose launch may be in any of several processes: give a file for each"
        yield Check("processes", False, mixed, kernels, said)
    missing, called = _unanswered(events, owners)
    kernels_only = events.named([COPY_NAME.search(name) is None for name in events.names])
    said = "kernel launches without a recorded device event (captured ones left out)"
    yield _check("kernels of launches", int((missing & kernels_only).sum()), int((called & kernels_only).sum()), said)
    said = "copies and sets without a device event (those of no bytes have none)"
    yield Check(
        "copies and sets", None, int((missing & ~kernels_only).sum()), int((called & ~kernels_only).sum()), said
    )
    overlaps = int(overlapping(events).sum())
    yield _check(
        "streams in order", overlaps, kernels, "device events begin before the one before them on their stream ended"
    )
    early = int((occupied.delay_ns < 0).sum())
    yield _check("device clock", early, int(occupied.leads.sum()), "device events begin before their launch was called")
    over = forest.overhanging()
    yield _check("nesting on the host", over, len(forest), "host events end after the event around them")
    ranges = events.kind == Kind.DEVICE_RANGE
    opened = np.isin(events.name[ranges], events.name[events.kind == Kind.ANNOTATION])
    said = "ranges that the device saw have no annotation on the host"
    yield _check("ranges on the device", int((~opened).sum()), int(ranges.sum()), said)
    negative = int((events.duration_ns < 0).sum())
    yield _check("durations", negative, len(events), "events of negative length")
    empty = int((events.duration_ns[device] == 0).sum())
    yield Check("kernels of no length", None, empty, kernels, "device events of length zero (coarse clocks give them)")


def _check(name: str, count: int, total: int, sentence: str) -> Check:
    return Check(name, count == 0 if total else None, count, total, sentence)


def _unanswered(events: Events, owners: Owners) -> tuple[np.ndarray, np.ndarray]:
    """Return which launches have no device event, and which are launches at all, captured ones left out."""
    called = is_launch(events) & (events.correlation > 0)
    called[in_capture(events)[0]] = False
    answered = np.zeros(len(events), dtype=bool)
    answered[owners.launch[owners.launch > NOTHING]] = True
    return called & ~answered, called


def _of_file(trace: Trace) -> Iterator[Check]:
    damage, size = trace.damage, len(trace.events) + sum(trace.others.values())
    said = f" ({damage.reason})" if damage.reason else ""
    yield _check("text of the file", damage.lost, size + damage.lost, f"events could not be decoded{said}")
    if damage.mended:
        yield Check(
            "text of the file", False, damage.mended, size, f"pieces held bytes that JSON forbids, mended{said}"
        )
    if damage.reason and not (damage.lost or damage.mended or damage.cut_short):
        yield Check("compression", False, 1, 1, f"the file's compression is damaged behind its events{said}")
    if damage.cut_short:
        yield Check("end of the file", False, 1, 1, f"the file ends before its list of events does{said}")
    yield from _unknown(trace.events)
    pairs = _phase(trace.others, "B") + _phase(trace.others, "E")
    if pairs:
        yield Check("begin and end events", False, pairs, size, "events of phases B and E are not read")


def _unknown(events: Events) -> Iterator[Check]:
    """Yield what categories profkit does not know: their events stand in no table."""
    times = np.bincount(events.category, minlength=len(events.categories))
    unknown = {name: int(count) for name, count in zip(events.categories, times, strict=True) if count}
    unknown = {name: count for name, count in unknown.items() if kind_of(name) is Kind.OTHER and name not in NO_WORK}
    if unknown:
        listed = ", ".join(f"{name or 'none'} {count}" for name, count in sorted(unknown.items())[:5])
        doubt = False if any(LIKE_DEVICE.search(name) for name in unknown) else None
        said = f"events of categories that profkit does not know, in no table: {listed}"
        yield Check("categories", doubt, sum(unknown.values()), len(events), said)


def _of_flows(trace: Trace, owners: Owners) -> Iterator[Check]:
    launched = int((owners.launch >= 0).sum())
    starts = sum(trace.others[("s", category)] for category in FLOW_CATEGORIES)
    ends = sum(trace.others[("f", category)] for category in FLOW_CATEGORIES)
    missing = max(launched - ends, 0)
    said = f"launches and kernels without an arrow between them in viewers ({starts} arrows begin, {ends} end)"
    yield Check("flows", None if not launched else missing == 0, missing, launched, said)


def _phase(others: Counter[tuple[str, str]], phase: str) -> int:
    return sum(count for (one, _), count in others.items() if one == phase)
