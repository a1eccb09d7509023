"""Was anything encoded twice? The calls of towers, held against each other once a pass is over."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from profkit import stages
from profkit.encodings import TOWERS, Encoding, Encodings, Held
from profkit.spans import NOBODY, Spans

Content = bytes
"""Stands for the values of one image, frame or recording."""


@dataclass
class Repeat:
    """Something that a tower encoded more often than the inputs call for, and the time that this took.

    `place` is where the needless encoding was asked for, `other` where the same input was encoded too. `proof` says
    how the inputs are known to be the same: one storage, or equal content.
    """

    tower: str
    place: str
    other: str
    proof: str
    items: int
    lost_ms: float

    def sentence(self) -> str:
        """Return the finding in words."""
        return (
            f"{self.tower} encoded {self.items} input(s) again ({self.proof}): {self.place}, and {self.other}; "
            f"{self.lost_ms:.2f} ms lost"
        )


@dataclass
class Audit:
    """What was found, and how many calls of towers could not be compared, as their inputs were changed or let go."""

    repeats: list[Repeat]
    not_compared: int

    def as_dict(self) -> dict[str, Any]:
        """Return the findings as plain values."""
        repeats = [{**asdict(one), "sentence": one.sentence()} for one in self.repeats]
        return {"repeats": repeats, "not_compared": self.not_compared}


@dataclass
class _Call:
    """A call of a tower: its span, what it encoded, and the generate() around it (NOBODY: none)."""

    span: int
    encoding: Encoding
    generate: int
    tower: str
    contents: list[Content] = field(default_factory=list)

    @property
    def storages(self) -> set[int]:
        return {one.tensor.untyped_storage().data_ptr() for one in self.encoding.inputs or ()}


def audit(spans: Spans, encodings: Encodings) -> Audit:
    """Compare the inputs of all calls of towers in a pass.

    Reported is a call outside any generate() whose input a generate() encodes too, or which was encoded outside before
    and more often than there are generate()s to use it; and inputs that one generate() encodes more often than they
    are among its arguments. Several generate()s of one input are what repeats are.
    Compares values, on the host, where there is more than one call of a tower to an input: not for hot paths.
    """
    return _Audit(spans, encodings).result()


class _Audit:
    """One audit()."""

    def __init__(self, spans: Spans, encodings: Encodings) -> None:
        self.spans, self.encodings = spans, encodings
        self.loop = spans.nearest(spans.is_kind("generate"))
        self.host_ns = spans.total_ns

    def result(self) -> Audit:
        calls = self.calls
        if self._is_plain(calls):
            return Audit([], 0)
        for call in calls:
            call.contents = self._contents(call.encoding.inputs)
        comparable = [one for one in calls if one.contents]
        found = list(_summed([*self._outside(comparable), *self._within(comparable)]))
        return Audit(found, len(calls) - len(comparable))

    @cached_property
    def calls(self) -> list[_Call]:
        """The calls of towers, each outermost one, in order."""
        spans = self.spans
        is_tower = np.array([scope.stage in TOWERS for scope in spans.scopes])[spans.scope]
        inside = np.where(spans.parent >= 0, spans.nearest(is_tower)[spans.parent], NOBODY) >= 0
        numbers = spans.marks.note[spans.begin]
        rows = np.flatnonzero(is_tower & ~inside & (numbers >= 0))
        found = []
        for row in rows.tolist():
            encoding = self.encodings.seen[numbers[row]]
            path = spans.scopes[spans.scope[row]].path
            found.append(_Call(row, encoding, int(self.loop[row]), path))
        return found

    def _is_plain(self, calls: Sequence[_Call]) -> bool:
        """Tell whether every generate() encodes no more than it is given, and nothing is encoded elsewhere."""
        items: Counter[tuple[int, str]] = Counter()
        for call in calls:
            if call.generate == NOBODY or call.encoding.inputs is None:
                return False
            items[call.generate, call.tower] += sum(_items(one.tensor) for one in call.encoding.inputs)
        given = (sum(_items(one.tensor) for one in held) for held in self.encodings.given)
        return not items or max(items.values()) <= min(given, default=0)

    @cached_property
    def precision(self) -> torch.dtype:
        """The coarsest of all dtypes: what was cast on its way to the tower shall still be known."""
        held = [one for encoding in self.encodings.seen for one in encoding.inputs or ()]
        dtypes = {one.tensor.dtype for one in (*held, *(one for given in self.encodings.given for one in given))}
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)

    def _contents(self, inputs: list[Held] | None) -> list[Content]:
        """Return what stands for the values of each input; nothing if they are not what they were."""
        if inputs is None or not all(one.is_unchanged for one in inputs):
            return []
        return [content for one in inputs for content in _hashes(one.tensor.to(self.precision))]

    @cached_property
    def given(self) -> Counter[Content]:
        """How often an input is among the arguments of a generate(), at most."""
        most: Counter[Content] = Counter()
        for held in self.encodings.given:
            most |= Counter(self._contents(held))
        return most

    def _outside(self, calls: Sequence[_Call]) -> Iterator[Repeat]:
        """Yield what was encoded outside generate() and inside as well, or outside more often than can be of use."""
        inside = [one for one in calls if one.generate != NOBODY]
        uses, before = max(len(np.unique(self.loop[self.loop != NOBODY])), 1), list[_Call]()
        for call in calls:
            if call.generate != NOBODY:
                continue
            same = [other for other in before if other.tower == call.tower and set(other.contents) & set(call.contents)]
            before.append(call)
            others = [*inside, *(same if len(same) >= uses else [])]
            shared = [
                (set(call.contents) & set(other.contents), other) for other in others if other.tower == call.tower
            ]
            items, other = max(shared, key=lambda one: len(one[0]), default=(set(), call))
            if items:
                share = sum(one in items for one in call.contents) / len(call.contents)
                yield self._repeat(call, other, len(items), share * self._lost_outside_ns(call.span))

    def _within(self, calls: Sequence[_Call]) -> Iterator[Repeat]:
        """Yield what a generate() encoded more often than it was given."""
        before: dict[tuple[int, str, Content], list[_Call]] = defaultdict(list)
        for call in calls:
            if call.generate == NOBODY:
                continue
            again: dict[int, int] = Counter()
            for content in call.contents:
                earlier = before[call.generate, call.tower, content]
                if len(earlier) >= max(self.given[content], 1) and self._is_known(content, call, earlier[0]):
                    again[id(earlier[0])] += 1
                earlier.append(call)
            others = {id(one): one for row in before.values() for one in row}
            for number, items in again.items():
                share = items / len(call.contents)
                yield self._repeat(call, others[number], items, share * float(self.host_ns[call.span]))

    def _is_known(self, content: Content, call: _Call, other: _Call) -> bool:
        """Tell whether two encodings are of one input: given once, or of one storage; two frames may look alike."""
        return content in self.given or (call is not other and bool(call.storages & other.storages))

    def _repeat(self, call: _Call, other: _Call, items: int, lost_ns: float) -> Repeat:
        proof = "same storage" if call.storages & other.storages else "equal content"
        return Repeat(call.tower, self._where(call), self._where(other), proof, items, lost_ns / 1e6)

    def _where(self, call: _Call) -> str:
        """Return where a call was made: in which generate() or stage of the sample, and from which line."""
        asked = f" ({call.encoding.place})" if call.encoding.place else ""
        if call.generate != NOBODY:
            loops = np.unique(self.loop[self.loop != NOBODY])
            number = int(np.searchsorted(loops, call.generate)) + 1
            return f"in generate(){f' number {number}' if len(loops) > 1 else ''}{asked}"
        around = self.spans.nearest(self.spans.is_kind("input"))[call.span]
        name = f"in {self.spans.scopes[self.spans.scope[around]].path}, " if around != NOBODY else ""
        return f"{name}outside generate(){asked}"

    @cached_property
    def _outside_owner(self) -> np.ndarray:
        """For each outermost span of media outside generate() the call of a tower it goes with: the last one begun."""
        spans = self.spans
        media = [scope.stage in (*stages.MEDIA, "merge") for scope in spans.scopes]
        wanted = np.array(media)[spans.scope] & (self.loop == NOBODY)
        above = np.where(spans.parent >= 0, spans.nearest(wanted)[spans.parent], NOBODY)
        outermost = wanted & (above == NOBODY)
        # A method around a tower begins before it: it belongs to the first tower inside.
        ends = spans.end[[one.span for one in self.calls]]
        begins = spans.begin[[one.span for one in self.calls]]
        first_inside = np.searchsorted(begins, spans.begin)
        holds = np.append(ends, np.iinfo(np.int64).max)[first_inside] <= spans.end
        owner = np.where(holds, first_inside, first_inside - 1)
        return np.where(outermost, owner, NOBODY)

    def _lost_outside_ns(self, span: int) -> float:
        number = next(number for number, one in enumerate(self.calls) if one.span == span)
        return float(self.host_ns[self._outside_owner == number].sum())


def _hashes(tensor: torch.Tensor) -> list[Content]:
    """Return a hash for each image or frame in a tensor [..., channels, height, width]; others count as one."""
    items = tensor.reshape(_items(tensor), *tensor.shape[-3:])
    return [hashlib.blake2b(one.contiguous().view(-1).view(torch.uint8).cpu().numpy()).digest() for one in items]


def _items(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape[:-3])


def _summed(repeats: Iterable[Repeat]) -> Iterator[Repeat]:
    """Yield repeats, those of the same places in one."""
    groups: dict[tuple[str, str, str, str], list[Repeat]] = defaultdict(list)
    for one in repeats:
        groups[one.tower, one.place, one.other, one.proof].append(one)
    for (tower, place, other, proof), same in groups.items():
        yield Repeat(tower, place, other, proof, sum(one.items for one in same), sum(one.lost_ms for one in same))
