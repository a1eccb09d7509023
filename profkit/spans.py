"""From marks to spans and segments: the exact partition of a run into stages and steps.

A *span* is one call of a scope. A *segment* is the time between two consecutive marks of a thread; it
belongs to the innermost span open then. Segments do not overlap and leave no gap, so whatever they
are grouped by (scope, stage, step) sums to the total, to the nanosecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from profkit import stages
from profkit.errors import LedgerError
from profkit.ledger import NO_TIME, Marks, Scope, pairs, repaired

NOBODY = -1


@dataclass(frozen=True)
class Steps:
    """The passes of the decoder stack, one row each, in order.

    `span` is the decoder's span, `loop` the span of the generate() around it, `call` that of the outermost one
    (some models' generate() calls their language model's), `outermost` the child of the loop which holds
    the pass (the forward), `start` the mark where the step's iteration begins and `stop` the mark where it
    ends: the next one's start, or the end of the outermost generate().
    """

    span: np.ndarray
    loop: np.ndarray
    call: np.ndarray
    outermost: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    tokens: np.ndarray
    prefill: np.ndarray

    def __len__(self) -> int:
        return len(self.span)


class Spans:
    """One pass, partitioned. All columns are numpy arrays; times are integer nanoseconds.

    Spans (one row a call, in order of entry): scope, parent, begin, end, depth.
    Segments (one row for each mark but the last): owner, host_ns, device_ns (NO_TIME where unknown),
    stage (index into stages.STAGES, -1 outside any run), step (row of `steps`, -1 outside).
    """

    def __init__(self, marks: Marks, scopes: Sequence[Scope]) -> None:
        self.marks, self.repair = repaired(marks)
        self.scopes = list(scopes)
        code = self.marks.code
        self.begin, self.end, self.depth = pairs(code)
        self.scope = code[self.begin]
        after = self._innermost_after_each_mark()
        self.owner = after[:-1]
        self.parent = np.where(self.depth > 0, after[self.begin - 1], NOBODY)
        self.host_ns = np.diff(self.marks.host_ns)
        self.device_ns = _gaps(self.marks.device_ns)
        if self.owner.size and (self.host_ns[self.owner >= 0] < 0).any():
            raise LedgerError("The host clock ran backwards inside a scope; the run cannot be partitioned.")

    def __len__(self) -> int:
        return len(self.begin)

    def _innermost_after_each_mark(self) -> np.ndarray:
        code = self.marks.code
        if not len(code):
            return np.empty(0, dtype=np.int64)
        depth_after = np.cumsum(np.sign(code))
        size = len(code) + 1
        # The innermost span after mark i is the last one entered at the current depth, at or before i.
        by_depth = np.argsort(self.depth, kind="stable")
        keys = self.depth[by_depth] * size + self.begin[by_depth]
        wanted = (depth_after - 1) * size + np.arange(len(code))
        found = by_depth[np.maximum(np.searchsorted(keys, wanted, side="right") - 1, 0)]
        return np.where(depth_after > 0, found, NOBODY)

    # -- relations between spans ---------------------------------------------------------------

    def nearest(self, wanted: np.ndarray) -> np.ndarray:
        """Return for each span the nearest span around it, itself included, where `wanted` holds (or -1)."""
        found = np.where(wanted, np.arange(len(self)), NOBODY)
        for depth in range(1, int(self.depth.max(initial=0)) + 1):
            rows = np.flatnonzero((self.depth == depth) & (found == NOBODY))
            found[rows] = found[self.parent[rows]]
        return found

    def is_kind(self, kind: str) -> np.ndarray:
        """Return which spans are of a kind of scope."""
        return np.array([scope.kind == kind for scope in self.scopes])[self.scope]

    @cached_property
    def root(self) -> np.ndarray:
        """For each span the sample or generate() that it belongs to, -1 for calls outside of both."""
        around = self.nearest(self.depth == 0)
        counted = self.is_kind("sample") | self.is_kind("generate")
        return np.where(counted[around], around, NOBODY) if len(self) else around

    @cached_property
    def total_ns(self) -> np.ndarray:
        """Host time of each span, children included."""
        return self.marks.host_ns[self.end] - self.marks.host_ns[self.begin]

    @cached_property
    def self_ns(self) -> np.ndarray:
        """Host time of each span that belongs to no child."""
        owned = self.owner >= 0
        return _sum_by(self.owner[owned], self.host_ns[owned], len(self))

    @cached_property
    def stage_rule(self) -> np.ndarray:
        """For each span the nearest scope around it that says where its time goes."""
        with_rule = self._fixed_stage_of_span >= 0
        for kind in ("sample", "generate", "forward", "decoder", "stack"):
            with_rule |= self.is_kind(kind)
        return self.nearest(with_rule)

    @cached_property
    def _fixed_stage_of_span(self) -> np.ndarray:
        fixed = [stages.INDEX[scope.stage] if scope.stage else NOBODY for scope in self.scopes]
        return np.array(fixed, dtype=np.int64)[self.scope]

    @cached_property
    def calls(self) -> np.ndarray:
        """For each scope its calls before the first forward of its generate(), in prefill steps, in decode steps."""
        step = np.append(self.step, NOBODY)[np.minimum(self.begin, len(self.step))]
        forwards = np.append(self.begin[self.steps.outermost], len(self.marks))[step]
        first = step == np.append(np.searchsorted(self.steps.call, self.steps.call), NOBODY)[step]
        before = (step < 0) | (first & (self.begin < forwards))
        phase = np.where(before, 0, np.where(np.append(self.steps.prefill, False)[step], 1, 2))
        counts = np.zeros((len(self.scopes), 3), dtype=np.int64)
        np.add.at(counts, (self.scope, phase), 1)
        return counts

    # -- steps ---------------------------------------------------------------------------------

    @cached_property
    def steps(self) -> Steps:
        """The passes of the decoder stack inside generate()."""
        is_decoder, is_loop = self.is_kind("decoder"), self.is_kind("generate")
        around = np.where(self.parent >= 0, self.parent, 0)
        loop_around = self.nearest(is_loop)
        inside_decoder = (self.parent >= 0) & (self.nearest(is_decoder)[around] >= 0) if len(self) else is_decoder
        span = np.flatnonzero(is_decoder & ~inside_decoder & (loop_around >= 0))
        loop = loop_around[span]
        is_loop_child = (self.parent >= 0) & is_loop[around]
        outermost = self.nearest(is_loop_child)[span]
        call = self._outermost_loop(is_loop)[span]
        start = self._iteration_starts(span, call, outermost, np.flatnonzero(is_loop_child))
        last = np.append(call[1:] != call[:-1], True)[: len(span)]
        stop = np.where(last, self.end[call], np.append(start[1:], 0)[: len(span)])
        tokens = self.marks.note[self.begin[span]]
        return Steps(span, loop, call, outermost, start, stop, tokens, self._is_prefill(loop, tokens))

    def _outermost_loop(self, is_loop: np.ndarray) -> np.ndarray:
        """Return for each span the outermost generate() around it, -1 if there is none."""
        found = self.nearest(is_loop)
        while True:
            above = np.where(found >= 0, self.parent[found], NOBODY)
            further = np.where(above >= 0, self.nearest(is_loop)[above], NOBODY)
            if not (further >= 0).any():
                return found
            found = np.where(further >= 0, further, found)

    def _iteration_starts(
        self, span: np.ndarray, call: np.ndarray, outermost: np.ndarray, children: np.ndarray
    ) -> np.ndarray:
        """Return the mark where each step's iteration begins.

        That is the start of generate() for the first; then the first entry below generate() once
        the previous forward was left (input preparation), or the pass itself where one forward makes several.
        """
        if not len(span):
            return np.empty(0, dtype=np.int64)
        first = np.append(True, call[1:] != call[:-1])
        same_forward = np.append(False, outermost[1:] == outermost[:-1]) & ~first
        left = self.end[np.append(outermost[0], outermost[:-1])]
        entries = self.begin[children]
        following = entries[np.minimum(np.searchsorted(entries, left), len(entries) - 1)]
        start = np.where(same_forward, self.begin[span], np.minimum(following, self.begin[span]))
        return np.where(first, self.begin[call], start)

    def _is_prefill(self, loop: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Return which steps read the prompt: the first, and those after it until the prompt is consumed."""
        if not len(loop):
            return np.zeros(0, dtype=bool)
        # A pass that does not tell its tokens is taken to read the whole prompt.
        known = np.where(tokens < 0, np.int64(1 << 40), tokens)
        read_before = np.cumsum(known) - known
        first_row = np.searchsorted(loop, loop)
        prompt_tokens = self.marks.note[self.begin[loop]]
        return (read_before - read_before[first_row] < prompt_tokens) | (first_row == np.arange(len(loop)))

    # -- where each segment belongs --------------------------------------------------------------

    @cached_property
    def step(self) -> np.ndarray:
        """For each segment the row of `steps` whose iteration it lies in, -1 outside."""
        position = np.arange(len(self.owner))
        if not len(self.steps):
            return np.full(len(self.owner), NOBODY)
        row = np.searchsorted(self.steps.start, position, side="right") - 1
        inside = (row >= 0) & (position < self.steps.stop[np.maximum(row, 0)]) & (self.owner >= 0)
        return np.where(inside, row, NOBODY)

    @cached_property
    def stage(self) -> np.ndarray:
        """For each segment its stage (index into stages.STAGES), -1 outside samples and generate()."""
        owner = np.maximum(self.owner, 0)
        if not len(self):
            return np.empty(0, dtype=np.int64)
        rule = self.stage_rule[owner]
        kind = {name: self.is_kind(name)[rule] & (rule >= 0) for name in ("generate", "forward", "decoder", "stack")}
        in_stack = kind["decoder"] | kind["stack"]
        result = np.full(len(owner), stages.INDEX["other"])
        result[in_stack] = self._phase()[in_stack]
        result[kind["generate"]] = self._loop_stage()[kind["generate"]]
        result[kind["forward"]] = np.where(self._is_merge(), stages.INDEX["merge"], stages.INDEX["other"])[
            kind["forward"]
        ]
        fixed = np.where(rule >= 0, self._fixed_stage_of_span[rule], NOBODY)
        result = np.where(fixed >= 0, fixed, result)
        counted = (self.owner >= 0) & (self.root[owner] >= 0)
        return np.where(counted, result, NOBODY)

    def _phase(self) -> np.ndarray:
        prefill = np.append(self.steps.prefill, False)[self.step]
        return np.where(prefill, stages.INDEX["prefill"], stages.INDEX["decode"])

    def _loop_stage(self) -> np.ndarray:
        """generate()'s own time: setup until its first forward begins, then the selection of tokens.

        What it does itself between encoders, and between them and the embedding, is merge.
        """
        position = np.arange(len(self.owner))
        loop = np.maximum(self.stage_rule[np.maximum(self.owner, 0)], 0)
        forwards = self.begin[self.steps.outermost]
        made_before_loop = np.searchsorted(forwards, self.begin[loop])
        made = np.searchsorted(forwards, position, side="right") - made_before_loop
        made_in_all = np.searchsorted(forwards, self.end[loop]) - made_before_loop
        setup = np.where(self._is_among_encoders(position), stages.INDEX["merge"], stages.INDEX["setup"])
        stage = np.where(made == 0, setup, stages.INDEX["select"])
        return np.where(made_in_all > 0, stage, stages.INDEX["other"])

    def _is_among_encoders(self, position: np.ndarray) -> np.ndarray:
        """Return which segments lie between the first encoder and the last encoder or embedding before a forward."""
        media, row = self._is_media, np.maximum(self.step, 0)
        if not len(self.steps) or not media.any():
            return np.zeros(len(position), dtype=bool)
        parts = np.flatnonzero(media | (self._fixed_stage_of_span == stages.INDEX["embed"]))
        begin, end = self.begin[media], np.append(NOBODY, np.sort(self.end[parts]))
        forward = self.begin[self.steps.outermost]
        start = self.steps.start
        first = np.append(begin, len(self.marks))[np.searchsorted(begin, start)]
        last = end[np.searchsorted(end, forward) - 1]
        return (self.step >= 0) & (position >= first[row]) & (position < last[row])

    @cached_property
    def _is_media(self) -> np.ndarray:
        return np.isin(self._fixed_stage_of_span, [stages.INDEX[name] for name in stages.MEDIA])

    def _is_merge(self) -> np.ndarray:
        """A forward's own time before the decoder, once media were encoded in this prompt or iteration."""
        position, step = np.arange(len(self.owner)), self.step
        if not len(self.steps):
            return np.zeros(len(position), dtype=bool)
        row = np.maximum(step, 0)
        begins = np.append(self.begin[self._is_media], len(position))
        latest = np.append(NOBODY, begins)[np.searchsorted(begins, position, side="left")]
        since = np.where(self.steps.prefill, self.begin[self.steps.call], self.steps.start)[row]
        return (step >= 0) & (position < self.begin[self.steps.span][row]) & (latest >= since)

    # -- checks --------------------------------------------------------------------------------

    def run_ns(self) -> int:
        """Return the total of the runs, samples or calls of generate(), in ns."""
        return int(self.total_ns[(self.depth == 0) & (self.root >= 0)].sum())

    def residuals_ns(self) -> dict[str, int]:
        """Return by how many ns self times over scopes, and over stages, miss the total of the runs."""
        return {
            "scopes": int(self.self_ns[self.root >= 0].sum()) - self.run_ns(),
            "stages": int(self.host_ns[self.stage >= 0].sum()) - self.run_ns(),
        }

    def check(self) -> None:
        """Raise LedgerError unless self times, and stages, sum to the total of the runs exactly."""
        for what, missed in self.residuals_ns().items():
            if missed:
                total = self.run_ns()
                raise LedgerError(f"Times over {what} sum to {total + missed} ns, the total is {total} ns.")


def _gaps(times: np.ndarray) -> np.ndarray:
    if not len(times):
        return times
    known = (times[1:] != NO_TIME) & (times[:-1] != NO_TIME)
    return np.where(known, times[1:] - np.where(known, times[:-1], 0), NO_TIME)


def _sum_by(groups: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Return integer sums of `values` by group number (np.bincount would round through floats)."""
    sums = np.zeros(size, dtype=np.int64)
    np.add.at(sums, groups, values)
    return sums
