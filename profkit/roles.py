"""From a trail to an anatomy: which module plays which part, judged by what fed it and what it fed.

The *trunk* is everything around the decoder's layers, the token embedding and the towers; a *branch* is what
hangs on it. Branches through which media reach the decoder are towers (they hold a stack of layers), text
encoders (the token embedding feeds them too) or projectors (a tower feeds them).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from profkit.anatomy import (
    ROLES,
    Anatomy,
    Calls,
    Part,
    PartNames,
    ancestors,
    derives_from,
    has_weights,
    is_norm,
    parent,
    within,
)
from profkit.language import Language
from profkit.stacks import Stacks
from profkit.trail import Label, Trail

AUDIO_ARGUMENT = re.compile(r"audio|speech|sound|wav|mel|^input_(features|values)")
"""Arguments of generate() that hold sound, as processors name them."""


def settle(model: Any, structure: Anatomy, trail: Trail, parts: PartNames | None = None) -> Anatomy:
    """Return the anatomy of a model from its structure and the trail of a short generate().

    `parts` are those that the user names.
    """
    settling = _Settling(model, structure, trail)
    return settling.anatomy().corrected(parts or {}).with_calls(settling.calls())


class _Settling:
    def __init__(self, model: Any, structure: Anatomy, trail: Trail) -> None:
        self.model, self.structure, self.trail = model, structure, trail
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.numbers = trail.by_path()
        self.stacks = Stacks(self.modules, trail)
        self.language = Language(self.modules, structure, trail)
        self.layers = self.language.layers
        self.trunk = set(self.language.around)

    def anatomy(self) -> Anatomy:
        """Return the settled anatomy."""
        roles = self._branch_roles()
        while self._descend(roles):
            roles = self._branch_roles()
        found: list[tuple[str, str | None]] = [
            (self._tower_role(path) if role == "tower" else role, path) for path, role in roles.items()
        ]
        for path in [path for path, role in roles.items() if role == "tower"]:
            found += [("projector", inner) for inner in self._inner_projectors(path, roles)]
        found += [("lm_head", self.language.head), ("embed", self.language.embed), ("decoder", self.language.decoder)]
        parts = [self._part(role, path) for role, path in found if path is not None]
        # What structure alone knows: parts that did not take part in this generate(), and those that need no probe.
        for part in self.structure.parts:
            if part.role == "decoder_layers" and part.path != self.layers:
                part = self._part(part.role, self.layers)
            if part.role not in SETTLED or (part.role in MEDIA_ROLES and self._is_idle(part)):
                parts.append(part)
        parts.sort(key=lambda part: ROLES.index(part.role))
        name, features = self.structure.model_class, dict(self.trail.features)
        return Anatomy(name, tuple(parts), self.structure.ambiguities, features, self._outside())

    def _is_idle(self, part: Part) -> bool:
        """Tell whether a part did not run, for want of its kind of input: a projector is idle with a tower only."""
        towers = self.structure.paths("vision_tower") + self.structure.paths("audio_tower")
        wanting = part.role != "projector" or not all(map(self._fired, towers))
        return wanting and not self._fired(part.path)

    def _outside(self) -> dict[str, int]:
        """Return how many operations on media happened ahead of the decoder's layers, outside every part."""
        found: dict[str, int] = {}
        for path, counts in self.trail.operations.items():
            if path in self.modules and path not in self.trunk:
                continue
            for labels, count in counts.items():
                behind = any(within(at, self.layers) for at in self.trail.paths(self.trail.back(labels)))
                media = any(label in self.trail.media or label in self.carriers for label in labels)
                if media and not behind:
                    found[path] = found.get(path, 0) + count
        return found

    def _part(self, role: str, path: str) -> Part:
        found_by = [part.found_by for part in self.structure.parts if (part.role, part.path) == (role, path)]
        # Entered elsewhere than by its own forward: as a list, through a method, or by somebody who knows its insides.
        through: list[str] = []
        end = -1
        for seen in self.trail.calls if role in MEDIA_ROLES else ():
            if within(seen.path, path) and seen.begin > end:
                through, end = [*through, seen.path], seen.end
        others = tuple(one for one in dict.fromkeys(through) if one != path)
        if role == "embed":
            others = tuple(one for one in self.language.embeddings if one != path)
        if role == "decoder_layers":
            others = tuple(f"{path}.{name}" for name in self.modules[path]._modules)
        return Part(role, path, type(self.modules[path]).__name__, ", ".join([*found_by, "probe"]), through=others)

    def calls(self) -> dict[str, Calls]:
        """Return how often each module ran in which phase; 0 for those that did not."""
        first_layer = next((path for path in self.numbers if parent(path) == self.layers), "")
        passes = self.numbers.get(self.language.decoder or first_layer, [])
        begins = [self._forward_around(number) for number in passes]
        begins = list(dict.fromkeys(begins))
        first, second = [*begins, *[len(self.trail.calls) * 2] * 2][:2]
        result = {}
        for path in self.modules:
            ticks = [self.trail.calls[number].begin for number in self.numbers.get(path, [])]
            before = sum(tick < first for tick in ticks)
            decode = sum(tick >= second for tick in ticks)
            result[path] = Calls(before, len(ticks) - before - decode, decode)
        return result

    def _forward_around(self, number: int) -> int:
        """Return the tick at which the outermost call around a pass of the decoder began."""
        inner = self.trail.calls[number]
        around = [seen.begin for seen in self.trail.calls[: number + 1] if seen.end >= inner.end]
        return min(around, default=inner.begin)

    # -- the flow of data ----------------------------------------------------------------------

    @cached_property
    def layer_inputs(self) -> frozenset[Label]:
        """What fed the decoder's layers, in every step: some models are given media bit by bit."""
        given = {label for seen in self.trail.calls if parent(seen.path) == self.layers for label in seen.fed_by}
        # What an encoder left in the cache is no argument of any layer, but is worked on inside them.
        inside = [counts for path, counts in self.trail.operations.items() if within(path, self.layers)]
        return frozenset(given).union(*(labels for counts in inside for labels in counts))

    @cached_property
    def reached(self) -> set[Label]:
        """Everything that the decoder's inputs were made of, back to its own layers of the step before."""
        return self.trail.back(self.layer_inputs, stop=lambda path: within(path, self.layers))

    @cached_property
    def carriers(self) -> set[Label]:
        """The outputs of calls that were made of media."""
        found: set[Label] = set()
        calls = self.trail.calls
        # A call ends after all that it was made of.
        for number in sorted(range(len(calls)), key=lambda number: calls[number].end):
            for position, output in enumerate(calls[number].outputs):
                if any(label in (self.trail.media if isinstance(label, str) else found) for label in output.made_of):
                    found.add((number, position))
        return found

    def _path(self, label: Label) -> str | None:
        return None if isinstance(label, str) else self.trail.calls[label[0]].path

    def _labels_within(self, path: str, labels: Iterable[Label]) -> list[Label]:
        return [label for label in labels if (at := self._path(label)) is not None and within(at, path)]

    def _fired(self, path: str) -> bool:
        return any(within(one, path) for one in self.numbers)

    # -- branches ------------------------------------------------------------------------------

    def _branch(self, path: str) -> str | None:
        """Return the outermost module around `path` that is not in the trunk; None for the language model's own."""
        if path in self.trunk or self.language.holds(path):
            return None
        return [path, *(above for above in ancestors(path) if above not in self.trunk)][-1]

    def _branch_roles(self) -> dict[str, str]:
        """Return the role of each branch that carries media to the decoder: tower, encoder, projector."""
        labels: dict[str, list[Label]] = {}
        for label in sorted(
            (one for one in self.reached & self.carriers), key=lambda label: self.trail.calls[int(label[0])].end
        ):
            branch = self._branch(self._path(label) or "")
            if branch is not None:
                labels.setdefault(branch, []).append(label)
        roles: dict[str, str] = {}
        sources: dict[str, set[str]] = {}
        for branch, own in labels.items():
            sources[branch] = self._sources(branch, own)
            roles[branch] = self._role(branch, sources[branch], roles)
        for branch in [one for one, role in roles.items() if role == "projector"]:
            # What feeds a tower is the tower's beginning.
            if any(branch in sources[other] for other, role in roles.items() if role == "tower"):
                roles[branch] = "tower"
        return {branch: role for branch, role in roles.items() if role not in ("language", "nothing")}

    def _role(self, branch: str, sources: set[str], roles: dict[str, str]) -> str:
        """Return the role of a branch.

        That is tower, encoder, projector, language (the language model's own), nothing (it has no matrices) or
        wrapper (it holds a tower, and merges what comes out of it with the text).
        """
        fed_by = {roles.get(source) for source in sources}
        if self._is_slight(branch):
            return "language" if "language" in fed_by else "nothing"
        has_stack = bool(self.stacks.within(branch))
        if self.layers in sources or any(one in sources for one in self.language.embeddings):
            if any(not self._is_fed_by_text(stack) for stack in self.stacks.within(branch)):
                return "wrapper"
            joint = has_stack and self.layers not in sources and not self._inside_decoder(branch)
            return "encoder" if joint else "language"
        if fed_by & {"encoder", "language"}:
            return "language"
        return "tower" if has_stack and not fed_by & {"tower", "projector"} else "projector"

    def _sources(self, branch: str, own: Iterable[Label]) -> set[str]:
        """Return what fed a branch: other branches, the embedding, the decoder's layers."""
        found: set[str] = set()

        def another(path: str) -> bool:
            if path in self.trunk or within(path, branch):
                return False
            # What holds no matrices, such as dropout or a norm, passes things on.
            other = self._branch(path)
            return other is None or not self._is_slight(other)

        for path in self.trail.paths(self.trail.back(own, stop=another)):
            if another(path):
                found.add(self._branch(path) or (self.layers if within(path, self.layers) else path))
        return found

    def _is_slight(self, path: str) -> bool:
        return not has_weights(self.modules[path]) or is_norm(self.modules[path])

    def _inside_decoder(self, branch: str) -> bool:
        decoder = self.language.decoder
        around = [self.trail.calls[number] for number in self.numbers.get(decoder or "", [])]
        own = [seen for seen in self.trail.calls if within(seen.path, branch)]
        return any(outer.begin < seen.begin < outer.end for outer in around for seen in own)

    # -- towers --------------------------------------------------------------------------------

    def _descend(self, roles: dict[str, str]) -> bool:
        """Take wrappers around towers into the trunk; tell whether there were any."""
        before = len(self.trunk)
        self.trunk.update(branch for branch, role in roles.items() if role == "wrapper")
        for branch in [branch for branch, role in roles.items() if role == "tower"]:
            for stack in self.stacks.within(branch):
                self.trunk.update(ancestors(self._tower_root(branch, stack)))
        return len(self.trunk) > before

    def _is_fed_by_text(self, stack: str) -> bool:
        """Tell whether the token embedding is among what the members of a stack were made of."""
        fed_by = [label for seen in self.trail.calls if parent(seen.path) == stack for label in seen.fed_by]
        made_of = self.trail.back(fed_by, stop=lambda path: within(path, self.layers))
        return any(self.language.holds(path) for path in self.trail.paths(made_of))

    def _tower_root(self, branch: str, stack: str) -> str:
        """Return the outermost pretrained model around a stack, else the outermost module there that ran."""
        around = [above for above in (stack, *ancestors(stack)) if within(above, branch)]
        models = [above for above in around if derives_from(self.modules[above], "PreTrainedModel")]
        called = [above for above in around if above in self.numbers]
        return (models or called or [branch])[-1]

    def _tower_role(self, path: str) -> str:
        declared = getattr(self.modules[path], "input_modalities", "text")
        kinds = {declared} if isinstance(declared, str) else set(declared)
        # A whole family's list may be inherited: it tells only where it leaves no choice.
        if kinds & {"image", "video"} and "audio" not in kinds:
            return "vision_tower"
        if kinds == {"audio"}:
            return "audio_tower"
        takes = [str(getattr(self.modules[path], "main_input_name", ""))]
        labels = self._labels_within(path, self.reached & self.carriers)
        takes += [label for label in self.trail.back(labels) if isinstance(label, str) and label in self.trail.media]
        return "audio_tower" if any(AUDIO_ARGUMENT.search(name) for name in takes) else "vision_tower"

    def _inner_projectors(self, tower: str, roles: dict[str, str]) -> Iterator[str]:
        """Yield the mergers inside a tower: what its layers feed and what reaches the decoder, norms aside.

        Between layers, and where a projector follows outside, only what leaves fewer tokens counts.
        """
        stacks = self.stacks.within(tower)
        chain = {above for stack in stacks for above in ancestors(stack) if within(above, tower)}
        leaving = self._labels_within(tower, self._made_of_outside(tower))
        if any(not self._output(label).floating for label in leaving) or self._makes_token_ids(tower):
            return
        followed = self._is_followed(tower, roles)
        members = [seen for stack in stacks for seen in self.trail.calls if parent(seen.path) == stack]
        feeds_layers = self.trail.back(label for seen in members for label in seen.fed_by)
        for path in self._children(chain):
            module = self.modules[path]
            if path in chain or path in stacks or not has_weights(module) or is_norm(module):
                continue
            labels = self._labels_within(path, self.reached)
            behind = [at for at in self.trail.paths(self.trail.back(labels)) if any(within(at, one) for one in stacks)]
            if not behind:
                continue
            between_layers = bool(self._labels_within(path, feeds_layers))
            merges = self._shrinks(path) if between_layers else not followed or self._merges_tokens(path)
            if merges:
                yield path

    def _makes_token_ids(self, tower: str) -> bool:
        """Tell whether what leaves a tower goes through the token embedding: then it is a tokenizer."""
        head = self.language.head

        def written_before(path: str) -> bool:
            return within(path, self.layers) or path == head

        embedded = [label for seen in self.trail.calls if seen.path == self.language.embed for label in seen.fed_by]
        return bool(self._labels_within(tower, self.trail.back(embedded, stop=written_before)))

    def _children(self, paths: Iterable[str]) -> Iterator[str]:
        for path in self.modules:
            if path and parent(path) in set(paths):
                yield path

    def _made_of_outside(self, tower: str) -> set[Label]:
        """Return the labels that the decoder, and calls outside a tower that reach it, were made of."""
        found = set(self.layer_inputs)
        for label in self.reached:
            path = self._path(label)
            if path is not None and not within(path, tower):
                found |= self._output(label).made_of
        return found

    def _output(self, label: Label) -> Any:
        assert not isinstance(label, str)
        return self.trail.calls[label[0]].outputs[label[1]]

    def _is_followed(self, tower: str, roles: dict[str, str]) -> bool:
        """Tell whether a projector outside is fed by this tower."""
        for branch, role in roles.items():
            if role == "projector" and tower in self._sources(branch, self._labels_within(branch, self.reached)):
                return True
        return False

    def _merges_tokens(self, path: str) -> bool:
        """Tell whether a module makes fewer tokens, of whatever width; convolutions make maps, not tokens."""
        if any(derives_from(one, "_ConvNd") for one in self.modules[path].modules()):
            return False
        calls = [seen for seen in self.stacks.calls(path) if seen.outputs and seen.shapes_in]
        return any(_size(seen.outputs[0].shape[:-1]) < _size(seen.shapes_in[0][:-1]) for seen in calls)

    def _shrinks(self, path: str) -> bool:
        """Tell whether a module makes fewer tokens of the same width."""
        for seen in self.stacks.calls(path):
            if seen.outputs and seen.shapes_in:
                given, made = seen.shapes_in[0], seen.outputs[0].shape
                if given[-1:] == made[-1:] and _size(made) < _size(given):
                    return True
        return False


MEDIA_ROLES = ("vision_tower", "audio_tower", "projector", "encoder")
SETTLED = (*MEDIA_ROLES, "decoder", "embed", "lm_head")


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
