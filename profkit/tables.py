"""Stages, steps, modules and operators as DataFrames. Milliseconds first appear here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from profkit import stages
from profkit.ledger import NO_TIME
from profkit.spans import NOBODY, Spans
from profkit.stats import percentile

MS = 1e6
Clock = Literal["host", "device"]


def stage_table(spans: Spans, segments: np.ndarray | None = None) -> pd.DataFrame:
    """Return a row a stage that occurs, in the order of stages.STAGES.

    Columns: calls, host_ns, host_ms, device_ms, busy_ms, share (of host time, 0 to 1). Rows sum to the total of the
    samples, or of the calls of generate(). device_ms is NaN without device events; busy_ms needs
    the kernels of a profiled pass on a device and is NaN without. `segments` limits it to a mask of segments.
    """
    counted = spans.stage >= 0
    rows = counted if segments is None else counted & segments
    stage, size = spans.stage[rows], len(stages.STAGES)
    host_ns = stage_ns(spans, rows)
    total = max(int(host_ns.sum()), 1)
    table = pd.DataFrame(
        {
            "calls": _stage_calls(spans),
            "host_ns": host_ns,
            "host_ms": host_ns / MS,
            "device_ms": _device_ms(spans, rows, stage, size),
            "busy_ms": np.nan,
            "share": host_ns / total,
        },
        index=pd.Index(stages.NAMES, name="stage"),
    )
    return table[host_ns > 0]


def stage_ns(spans: Spans, segments: np.ndarray | None = None, clock: Clock = "host") -> np.ndarray:
    """Return time by stage, one number for each of stages.STAGES; of the segments in a mask, if given.

    On the device's clock segments that are not between two device events count nothing.
    """
    rows = spans.stage >= 0 if segments is None else segments & (spans.stage >= 0)
    sums = np.zeros(len(stages.STAGES), dtype=np.int64)
    times = spans.host_ns if clock == "host" else np.where(spans.device_ns == NO_TIME, 0, spans.device_ns)
    np.add.at(sums, spans.stage[rows], times[rows])
    return sums


def _device_ms(spans: Spans, rows: np.ndarray, group: np.ndarray, size: int) -> np.ndarray:
    """Return device time by group; NaN where a group has no segment between two device events."""
    device_ns = spans.device_ns[rows]
    known = device_ns != NO_TIME
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, group[known], device_ns[known])
    counts = np.bincount(group[known], minlength=size)
    return np.where(counts > 0, sums / MS, np.nan)


def _stage_calls(spans: Spans) -> np.ndarray:
    """Return how often each stage was begun: outermost scopes of a stage; steps for those that steps make."""
    fixed = np.array([stages.INDEX[scope.stage] if scope.stage else NOBODY for scope in spans.scopes])
    own = fixed[spans.scope] if len(spans) else np.empty(0, dtype=np.int64)
    around = np.where(spans.parent >= 0, spans.stage_rule[spans.parent], NOBODY)
    outermost = (own >= 0) & (np.where(around >= 0, own[around], NOBODY) != own) & (spans.root >= 0)
    calls = np.bincount(own[outermost], minlength=len(stages.STAGES))
    prefills = int(spans.steps.prefill.sum())
    calls[stages.INDEX["prefill"]] = prefills
    calls[stages.INDEX["decode"]] = len(spans.steps) - prefills
    calls[stages.INDEX["select"]] = len(spans.steps)
    return calls


def steps_by_stage(spans: Spans) -> pd.Series:
    """Return for each stage in how many steps it occurs, at least one: load and preprocess belong to none."""
    counted = spans.stage >= 0
    pairs = pd.DataFrame({"stage": spans.stage[counted], "step": spans.step[counted]}).drop_duplicates()
    steps = pairs[pairs["step"] >= 0].groupby("stage").size()
    found = steps.reindex(np.unique(pairs["stage"]), fill_value=0).clip(lower=1)
    return found.rename(index=dict(enumerate(stages.NAMES)))


def step_table(spans: Spans) -> pd.DataFrame:
    """Return a row a pass of the decoder stack.

    Columns: call (number of the generate()), step, phase (prefill or decode), tokens (given to the
    pass, -1 if unknown), host_ms and device_ms (the stack's own stage: prefill or decode; they sum to those
    stages), iteration_ms (host time from the step's input preparation, for step 0 from the call
    of generate(), to the selection of its token).
    """
    steps, size = spans.steps, len(spans.steps)
    in_stack = np.isin(spans.stage, [stages.INDEX["prefill"], stages.INDEX["decode"]]) & (spans.step >= 0)
    host_ns = np.zeros(size, dtype=np.int64)
    np.add.at(host_ns, spans.step[in_stack], spans.host_ns[in_stack])
    host = spans.marks.host_ns
    call = np.unique(steps.call, return_inverse=True)[1]
    first = np.searchsorted(steps.call, steps.call)
    return pd.DataFrame(
        {
            "call": call,
            "step": np.arange(size) - first,
            "phase": np.where(steps.prefill, "prefill", "decode"),
            "tokens": steps.tokens,
            "host_ms": host_ns / MS,
            "device_ms": _device_ms(spans, in_stack, spans.step[in_stack], size),
            "iteration_ms": (host[steps.stop] - host[steps.start]) / MS,
        }
    )


def module_table(spans: Spans) -> pd.DataFrame:
    """Return a row a scope: path, stage, calls, total_ms, self_ms (host time), device_ms (self).

    `stage` is the one in which most of the scope's own time lies; methods end in `()`.
    """
    size = len(spans.scopes)
    owned = spans.owner >= 0
    scope = spans.scope[spans.owner[owned]] if len(spans) else np.empty(0, dtype=np.int64)
    by_stage = np.zeros((size, len(stages.STAGES) + 1), dtype=np.int64)
    np.add.at(by_stage, (scope, spans.stage[owned]), spans.host_ns[owned])
    calls = np.bincount(spans.scope, minlength=size)
    total_ns = np.zeros(size, dtype=np.int64)
    np.add.at(total_ns, spans.scope, np.where(_inside_itself(spans), 0, spans.total_ns))
    names = np.array([*stages.NAMES, "outside"])
    table = pd.DataFrame(
        {
            "path": [scope.path for scope in spans.scopes],
            "stage": names[by_stage.argmax(axis=1)],
            "calls": calls,
            "total_ms": total_ns / MS,
            "self_ms": by_stage.sum(axis=1) / MS,
            "device_ms": _device_ms(spans, owned, scope, size),
        }
    )
    return table[calls > 0].reset_index(drop=True)


def _inside_itself(spans: Spans) -> np.ndarray:
    """Return which spans lie inside a span of the same scope, so that its total counts once."""
    inside = np.zeros(len(spans), dtype=bool)
    above = spans.parent.copy()
    while (above >= 0).any():
        inside |= (above >= 0) & (spans.scope[above] == spans.scope)
        above = np.where(above >= 0, spans.parent[above], NOBODY)
    return inside


@dataclass(frozen=True)
class Latency:
    """The figures people quote, from the host's clock, in ms; NaN where there were too few tokens.

    ttft_ms: from the call of generate() to the first new token, media encoding included (NVIDIA NIM).
    tpot_ms: (end to end - TTFT) / (n - 1) (vLLM). itl_*_ms: percentiles of the gaps between successive tokens,
    pooled over the repeats (vLLM). tokens_per_s: batch * (n - 1) / the time from the first token to the end
    (optimum-benchmark).
    prefill_tokens_per_s: batch * prompt tokens, media included, over the prefill stage, encoder excluded.
    """

    new_tokens: int
    prompt_tokens: int
    batch: int
    end_to_end_ms: float
    ttft_ms: float
    tpot_ms: float
    itl_p50_ms: float
    itl_p90_ms: float
    itl_p99_ms: float
    tokens_per_s: float
    prefill_tokens_per_s: float


def token_gaps_ms(spans: Spans) -> np.ndarray:
    """Return the times between successive tokens of the first generate() in a pass, in ms."""
    return np.diff(_token_ns(spans)) / MS


def _token_ns(spans: Spans) -> np.ndarray:
    """Return when each token of the first generate() was there: as the iteration ends that selected it."""
    steps = spans.steps
    of_first = steps.call == steps.call[:1] if len(steps) else np.zeros(0, dtype=bool)
    # The last prefill step gives the first token.
    prefills = int((of_first & steps.prefill).sum())
    return spans.marks.host_ns[steps.stop[np.flatnonzero(of_first)[max(prefills - 1, 0) :]]]


def latency(spans: Spans, batch: int = 1, new_tokens: int | None = None, gaps_ms: np.ndarray | None = None) -> Latency:
    """Return the latency figures of the first generate() in a pass.

    `new_tokens` is how many tokens it made; None counts each decode step as one. With speculative decoding
    a step gives several, which appear at once: the gaps of ITL are those between steps. `gaps_ms` are gaps pooled
    over several passes; without it, ITL is this pass's alone.
    """
    steps = spans.steps
    token_ns = _token_ns(spans)
    host, nan = spans.marks.host_ns, float("nan")
    if not len(token_ns):
        return Latency(0, 0, batch, *([nan] * 8))
    call = int(steps.call[0])
    of_first = steps.call == call
    prefill = of_first & steps.prefill
    begin_ns, end_ns = int(host[spans.begin[call]]), int(host[spans.end[call]])
    count = len(token_ns) if new_tokens is None else new_tokens
    ttft_ns = int(token_ns[0]) - begin_ns
    gaps_ms = np.diff(token_ns) / MS if gaps_ms is None else gaps_ms
    decoding_ns = end_ns - int(token_ns[0])
    by_stage = stage_ns(spans, np.isin(spans.step, np.flatnonzero(of_first)))
    prefill_ms = int(by_stage[stages.INDEX["prefill"]]) / MS
    prompt = int(np.maximum(steps.tokens[prefill], 0).sum())
    return Latency(
        new_tokens=count,
        prompt_tokens=prompt,
        batch=batch,
        end_to_end_ms=(end_ns - begin_ns) / MS,
        ttft_ms=ttft_ns / MS,
        tpot_ms=decoding_ns / (count - 1) / MS if count > 1 else nan,
        itl_p50_ms=percentile(gaps_ms, 50),
        itl_p90_ms=percentile(gaps_ms, 90),
        itl_p99_ms=percentile(gaps_ms, 99),
        tokens_per_s=batch * (count - 1) / (decoding_ns / 1e9) if count > 1 else nan,
        prefill_tokens_per_s=batch * prompt / (prefill_ms / 1e3) if prefill_ms > 0 else nan,
    )
