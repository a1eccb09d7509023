"""Stacks of layers: lists of modules whose members feed one another, told from mere lists by the trail."""

from __future__ import annotations

from typing import Any

from profkit.anatomy import has_weights, is_layer_list, outermost, within
from profkit.trail import Seen, Trail


class Stacks:
    """The stacks in a model that ran."""

    def __init__(self, modules: dict[str, Any], trail: Trail) -> None:
        self.modules, self.trail = modules, trail
        self.numbers = trail.by_path()

    def _ran(self, path: str) -> bool:
        return any(within(one, path) for one in self.numbers)

    def within(self, root: str) -> list[str]:
        """Return the outermost lists of layers in a module that ran: lists whose members feed one another."""
        lists = [path for path in self.modules if within(path, root) and self._is_list_that_ran(path)]
        # A single layer could be a single merger as well: it counts only where nothing surer is found.
        return outermost(path for path in lists if self._is_stack(path)) or outermost(
            path for path in lists if self._is_deep(path)
        )

    def _is_list_that_ran(self, path: str) -> bool:
        return type(self.modules[path]).__name__ in ("ModuleList", "Sequential") and self._ran(path)

    def _members(self, path: str) -> list[str]:
        """Return the members of a list that hold other modules with weights."""
        # A module that is shared is known by its first path alone.
        members = [one for name in self.modules[path]._modules if (one := f"{path}.{name}") in self.modules]
        return [one for one in members if any(has_weights(child) for child in self.modules[one].children())]

    def _is_deep(self, path: str) -> bool:
        """Tell whether members of a list hold modules that hold modules with weights, as layers hold attention."""
        inner = [
            grand for one in self._members(path) for child in self.modules[one].children() for grand in child.children()
        ]
        return type(self.modules[path]).__name__ == "ModuleList" and any(map(has_weights, inner))

    def _is_stack(self, path: str) -> bool:
        if is_layer_list(self.modules[path]):
            return True
        composite = self._members(path)
        for member in composite[1:]:
            others = [one for one in composite if one != member]
            fed_by = [label for seen in self.calls(member) for label in seen.fed_by]
            inner = self.trail.back(fed_by, stop=lambda at: any(within(at, one) for one in composite))
            if any(within(at, one) for at in self.trail.paths(inner) for one in others):
                return True
        return False

    def calls(self, path: str) -> list[Seen]:
        """Return the calls of a module, or, where it was never called itself, of what was called in it."""
        inside = [one for one in self.numbers if within(one, path)]
        return [self.trail.calls[number] for one in outermost(inside) for number in self.numbers[one]]
