"""The trail of a short generate(): which module ran when, inside what, and fed by what.

Every tensor carries *labels* that say what it was made of: the name of an argument of generate(), or an output
of a call. Operations unite the labels of their inputs. What leaves a module gets that call's label, and the
labels it had inside are kept with the call. So the flow of data can be followed backwards from any
input, at whatever depth of the module tree is asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

Label = str | tuple[int, int]
"""The name of an argument of generate(), or (number of a call, position among its outputs)."""
Labels = frozenset[Label]
NOTHING: Labels = frozenset()


@dataclass(frozen=True)
class Output:
    """A tensor that left a call: what it was made of inside, its shape, and whether it holds floating numbers."""

    made_of: Labels
    shape: tuple[int, ...]
    floating: bool


@dataclass
class Seen:
    """One call of a module. `begin` and `end` are ticks of a counter that runs through the whole trail."""

    path: str
    begin: int
    fed_by: Labels
    shapes_in: tuple[tuple[int, ...], ...] = ()
    end: int = 0
    outputs: list[Output] = field(default_factory=list)


@dataclass
class Trail:
    """What was seen: calls in order of entry; how often each get_*_features() ran; the arguments that are media.

    Media are the tensors among generate()'s arguments that are neither the prompt nor shaped like it (ids, masks).
    `operations` counts, for each innermost module or method, operations by the labels of what they worked on.
    """

    calls: list[Seen] = field(default_factory=list)
    operations: dict[str, Counter[Labels]] = field(default_factory=dict)
    features: dict[str, int] = field(default_factory=dict)
    media: frozenset[str] = frozenset()

    def by_path(self) -> Mapping[str, list[int]]:
        """Return the numbers of each module's calls, in order."""
        found: dict[str, list[int]] = {}
        for number, seen in enumerate(self.calls):
            found.setdefault(seen.path, []).append(number)
        return found

    def back(self, labels: Iterable[Label], stop: Callable[[str], bool] | None = None) -> set[Label]:
        """Return all labels that these were made of, themselves included.

        What a call was made of is left out where `stop` holds for its module's path.
        """
        reached: set[Label] = set()
        front = list(labels)
        while front:
            label = front.pop()
            if label in reached:
                continue
            reached.add(label)
            if not isinstance(label, str):
                seen = self.calls[label[0]]
                if stop is None or not stop(seen.path):
                    front.extend(seen.outputs[label[1]].made_of)
        return reached

    def paths(self, labels: Iterable[Label]) -> Iterator[str]:
        """Yield the paths of the modules among labels."""
        for label in labels:
            if not isinstance(label, str):
                yield self.calls[label[0]].path
