"""The anatomy of a model: which part is where, how it was found, how often it ran; and the words of module trees.

Nothing here imports torch: modules are told apart by what they hold and by the names of their classes' bases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from html import escape
from typing import Any

from profkit.errors import InputError

ROLES = (
    "vision_tower",
    "audio_tower",
    "projector",
    "encoder",
    "decoder",
    "decoder_layers",
    "norm",
    "embed",
    "lm_head",
)


PartNames = Mapping[str, str | Sequence[str]]
"""Parts as a user names them: role → path or paths."""


@dataclass(frozen=True)
class Calls:
    """How often a module ran in one generate(): before the first forward, in prefill steps, in decode steps."""

    before: int = 0
    prefill: int = 0
    decode: int = 0

    @property
    def total(self) -> int:
        """All calls."""
        return self.before + self.prefill + self.decode


@dataclass(frozen=True)
class Part:
    """A part of a model.

    `found_by` says how: accessor, structure, probe, user. `calls` is None if no generate() was watched. `through`
    are the modules inside that are called without its own forward: bypassing it, or because it is a list.
    """

    role: str
    path: str
    class_name: str
    found_by: str
    calls: Calls | None = None
    through: tuple[str, ...] = ()

    @property
    def fired(self) -> int | None:
        """How often it ran in one generate(), None if that was not observed."""
        return None if self.calls is None else self.calls.total


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model, in ROLES' order.

    `ambiguities` are the choices that were made; `features` counts the calls of each get_*_features(); `outside`
    counts the operations on media that no part did, by the method or module in which they happened.
    """

    model_class: str
    parts: tuple[Part, ...]
    ambiguities: tuple[str, ...] = ()
    features: Mapping[str, int] = field(default_factory=dict)
    outside: Mapping[str, int] = field(default_factory=dict)

    def paths(self, role: str) -> list[str]:
        """Return the paths of the parts with a role, often none or one."""
        return [part.path for part in self.parts if part.role == role]

    def path(self, role: str) -> str | None:
        """Return the path of the first part with a role, or None."""
        return next(iter(self.paths(role)), None)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader must know: choices among candidates, parts that never fired, parts that are bypassed."""
        silent = [f"{part.role} {part.path} never fired during generate()." for part in self.parts if part.fired == 0]
        bypassed = [
            f"{part.role} {part.path}: its own forward is bypassed by calls of {_shortened(part.through)}."
            for part in self.parts
            if part.through and part.class_name != "ModuleList" and part.role not in ("decoder_layers", "embed")
        ]
        compiled = [
            f"{part.role} {part.path} is compiled: it is timed with all that is compiled with it."
            for part in self.parts
            if "_orig_mod" in part.path.split(".")
        ]
        return (*self.ambiguities, *silent, *bypassed, *compiled)

    def _repr_html_(self) -> str:
        """Show the parts, and what must be known of them, in a notebook."""
        names = ("role", "path", "class_name", "found_by", "fired")
        rows = ([str(getattr(part, name)) for name in names] for part in self.parts)
        cells = "".join("<tr>" + "".join(f"<td>{escape(one)}</td>" for one in row) + "</tr>" for row in rows)
        head = "".join(f"<th>{name}</th>" for name in ("part", "path", "class", "found by", "calls"))
        notes = "".join(f"<li>{escape(one)}</li>" for one in self.notes)
        return f"<p>{escape(self.model_class)}</p><table><tr>{head}</tr>{cells}</table><ul>{notes}</ul>"

    def to_dict(self) -> dict[str, Any]:
        """Return role → path or paths: vision_towers, audio_towers, projectors, decoder_layers, embed, lm_head."""
        return {
            "vision_towers": self.paths("vision_tower"),
            "audio_towers": self.paths("audio_tower"),
            "projectors": self.paths("projector"),
            "decoder_layers": self.path("decoder_layers"),
            "embed": self.path("embed"),
            "lm_head": self.path("lm_head"),
        }

    def with_calls(self, calls: Mapping[str, Calls]) -> Anatomy:
        """Return a copy with each part's calls taken from calls per path; parts missing there were not observed."""
        return replace(self, parts=tuple(replace(part, calls=_calls_of(part, calls)) for part in self.parts))

    def corrected(self, parts: PartNames) -> Anatomy:
        """Return a copy with the parts of some roles named by the user: role → path or paths.

        Raises InputError for a role that does not exist.
        """
        kept = [part for part in self.parts if part.role not in parts]
        check_roles(parts)
        for role, paths in parts.items():
            before = {part.path: part for part in self.parts}
            for path in [paths] if isinstance(paths, str) else paths:
                same = before.get(path, Part(role, path, "", "user"))
                kept.append(replace(same, role=role, found_by="user"))
        return replace(self, parts=tuple(sorted(kept, key=lambda part: ROLES.index(part.role))))

    def to_record(self) -> dict[str, Any]:
        """Return everything as plain values; from_record() reads it."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Anatomy:
        """Return the anatomy that to_record() gave."""

        def part(values: Mapping[str, Any]) -> Part:
            calls = Calls(**values["calls"]) if values["calls"] else None
            return Part(**{**values, "calls": calls, "through": tuple(values["through"])})

        parts = tuple(part(one) for one in record["parts"])
        return cls(
            record["model_class"],
            parts,
            tuple(record["ambiguities"]),
            dict(record["features"]),
            dict(record["outside"]),
        )


def check_roles(names: Iterable[str]) -> None:
    """Raise InputError for a role that does not exist."""
    for name in names:
        if name not in ROLES:
            raise InputError(f"There is no role {name!r}: choose one of {', '.join(ROLES)}.")


def _calls_of(part: Part, calls: Mapping[str, Calls]) -> Calls | None:
    """Return a part's calls; those of the module in it that ran most, where it is not called itself."""
    own = calls.get(part.path)
    if own is not None and own.total:
        return own
    return max((calls[path] for path in part.through if path in calls), key=lambda one: one.total, default=own)


def _shortened(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def is_layer_list(module: Any) -> bool:
    """Tell whether a module is a list of transformer layers."""
    if type(module).__name__ != "ModuleList" or not len(module):
        return False
    return all(derives_from(layer, "GradientCheckpointingLayer") for layer in module)


def ancestors(path: str) -> Iterable[str]:
    """Yield the paths above a module, nearest first, the root ("") last."""
    while path:
        path = parent(path)
        yield path


def within(path: str, outer: str) -> bool:
    """Tell whether a path is `outer` or lies below it."""
    return path == outer or outer == "" or path.startswith(outer + ".")


def parent(path: str) -> str:
    """Return the path of the module that holds this one; the root's is its own, ""."""
    return path.rpartition(".")[0]


def outermost(paths: Iterable[str]) -> list[str]:
    """Return those paths that lie in no other of them, in their order."""
    kept: list[str] = []
    for path in paths:
        if not any(within(path, other) for other in kept):
            kept = [other for other in kept if not within(other, path)] + [path]
    return kept


def derives_from(module: Any, class_name: str) -> bool:
    """Tell whether a class of this name is among a module's classes; no library need be imported for it."""
    return any(base.__name__ == class_name for base in type(module).__mro__)


def has_weights(module: Any) -> bool:
    """Tell whether a module or one in it holds weights, quantised ones included."""
    if next(iter(module.parameters()), None) is not None:
        return True
    return _holds_quantised(module)


def is_norm(module: Any) -> bool:
    """Tell whether a module only scales and shifts: it has weights, and none of more than one dimension."""
    weights = list(module.parameters())
    return bool(weights) and all(weight.dim() <= 1 for weight in weights) and not _holds_quantised(module)


def _holds_quantised(module: Any) -> bool:
    """Quantised layers keep matrices in buffers, or behind a method weight() that unpacks them."""
    packed = ("torch.int8", "torch.uint8", "torch.int32")
    matrices = any(buffer.dim() > 1 and str(buffer.dtype) in packed for buffer in module.buffers())
    return matrices or any(callable(getattr(one, "weight", None)) for one in module.modules())
