"""Where the parts of a model are, and how each was found.

This reads the module tree alone (accessors and structure) and needs no torch. It knows the classic
shape: towers beside a decoder under one parent, what else stands there being the projector.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from profkit.errors import AnatomyError

ROLES = ("vision_tower", "audio_tower", "projector", "decoder", "decoder_layers", "norm", "embed", "lm_head")


@dataclass(frozen=True)
class Part:
    """A part of a model. `fired` counts its calls in one generate(), None if that was not observed."""

    role: str
    path: str
    class_name: str
    found_by: str
    fired: int | None = None


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model, in ROLES' order; `notes` says what is ambiguous or never fired."""

    model_class: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...] = field(default=())

    def paths(self, role: str) -> list[str]:
        """Return the paths of the parts with a role, often none or one."""
        return [part.path for part in self.parts if part.role == role]

    def path(self, role: str) -> str | None:
        """Return the path of the first part with a role, or None."""
        return next(iter(self.paths(role)), None)

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

    def with_calls(self, calls: dict[str, int]) -> Anatomy:
        """Return a copy with each part's `fired` taken from calls per path; silent parts are noted.

        Parts that are missing in `calls` were not observed. A module list is never called itself, so it
        counts as its first layer.
        """

        def fired(part: Part) -> int | None:
            return calls.get(f"{part.path}.0" if part.role == "decoder_layers" else part.path)

        parts = tuple(replace(part, fired=fired(part)) for part in self.parts)
        silent = tuple(f"{part.role} {part.path} never fired during generate()." for part in parts if part.fired == 0)
        return replace(self, parts=parts, notes=self.notes + silent)


def find(model: Any) -> Anatomy:
    """Return the anatomy of a model from its module tree, without running it.

    Raises AnatomyError if it has no generate() or no decoder layers can be found.
    """
    name = type(model).__name__
    if not callable(getattr(model, "generate", None)):
        raise AnatomyError(f"{name} has no generate(): profkit measures generate() of models that have one.")
    modules = dict(model.named_modules())
    path_of = {id(module): path for path, module in modules.items()}
    layer_lists = [path for path, module in modules.items() if is_layer_list(module)]
    decoder_path, found_by = _decoder(model, modules, path_of, layer_lists)
    layers = next(path for path in layer_lists if _parent(path) == decoder_path)
    embed = _accessor(model, "get_input_embeddings", path_of)
    head = _accessor(model, "get_output_embeddings", path_of)
    towers = [(role, path, "structure") for role, path in _towers(modules, layer_lists, decoder_path)]
    projectors = _projectors(modules, [path for _, path, _ in towers], decoder_path, embed, head)
    norm = _final_norm(modules[decoder_path], decoder_path)
    found = [
        *towers,
        *(("projector", path, "structure") for path in projectors),
        ("decoder", decoder_path, found_by),
        ("decoder_layers", layers, "structure"),
        ("norm", norm, "structure"),
        ("embed", embed, "get_input_embeddings()"),
        ("lm_head", head, "get_output_embeddings()"),
    ]
    parts = [Part(role, path, type(modules[path]).__name__, how) for role, path, how in found if path is not None]
    return Anatomy(name, tuple(sorted(parts, key=lambda part: ROLES.index(part.role))))


def is_layer_list(module: Any) -> bool:
    """Tell whether a module is a list of transformer layers."""
    if type(module).__name__ != "ModuleList" or not len(module):
        return False
    return all(_derives_from(layer, "GradientCheckpointingLayer") for layer in module)


def ancestors(path: str) -> Iterable[str]:
    """Yield the paths above a module, nearest first, the root ("") last."""
    while path:
        path = _parent(path)
        yield path


def within(path: str, outer: str) -> bool:
    """Tell whether a path is `outer` or lies below it."""
    return path == outer or outer == "" or path.startswith(outer + ".")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _derives_from(module: Any, class_name: str) -> bool:
    return any(base.__name__ == class_name for base in type(module).__mro__)


def _accessor(model: Any, name: str, path_of: dict[int, str]) -> str | None:
    try:
        return path_of.get(id(getattr(model, name)()))
    except (AttributeError, NotImplementedError, TypeError):
        return None


def _decoder(model: Any, modules: dict[str, Any], path_of: dict[int, str], layer_lists: list[str]) -> tuple[str, str]:
    """Return the module that holds the decoder's layers, and how it was found."""
    owners = {_parent(path) for path in layer_lists}
    named = _accessor(model, "get_decoder", path_of)
    inside = [owner for owner in owners if named is not None and within(owner, named)]
    if named in owners:
        return str(named), "get_decoder()"
    if len(inside) == 1:
        return inside[0], "get_decoder(), structure"
    embed = _accessor(model, "get_input_embeddings", path_of)
    for above in ancestors(embed) if embed else ():
        inside = [owner for owner in owners if within(owner, above)]
        if len(inside) == 1:
            return inside[0], "structure"
    raise AnatomyError(
        f"No decoder layers found in {type(model).__name__} (tried get_decoder(), GradientCheckpointingLayer "
        "lists and the token embedding's surroundings)."
    )


def _towers(modules: dict[str, Any], layer_lists: list[str], decoder_path: str) -> list[tuple[str, str]]:
    """Return (role, path) of each encoder: the outermost model around other layers, not around the decoder."""
    towers: dict[str, str] = {}
    for path in layer_lists:
        around = [above for above in ancestors(path) if above and not within(decoder_path, above)]
        models = [above for above in around if _derives_from(modules[above], "PreTrainedModel")]
        if models and not within(path, decoder_path):
            towers[models[-1]] = "audio_tower" if _hears(modules[models[-1]]) else "vision_tower"
    return [(role, path) for path, role in towers.items()]


def _hears(tower: Any) -> bool:
    """Tell audio from vision by what the tower says it takes."""
    return str(getattr(tower, "main_input_name", "")) in ("input_features", "input_values")


def _projectors(
    modules: dict[str, Any], towers: list[str], decoder_path: str, embed: str | None, head: str | None
) -> list[str]:
    """Return the modules with weights that stand beside a tower and are neither decoder, embedding nor head."""
    known = [path for path in (*towers, decoder_path, embed, head) if path]
    found: list[str] = []
    for home in dict.fromkeys(_parent(tower) for tower in towers):
        for name, child in modules[home].named_children():
            path = f"{home}.{name}" if home else name
            related = any(within(path, other) or within(other, path) for other in known)
            if not related and next(iter(child.parameters()), None) is not None:
                found.append(path)
    return found


def _final_norm(decoder: Any, decoder_path: str) -> str | None:
    """Return the last norm that is the decoder's direct child, if it has one."""
    norms = [name for name, child in decoder.named_children() if "norm" in type(child).__name__.lower()]
    return f"{decoder_path}.{norms[-1]}" if norms and decoder_path else (norms[-1] if norms else None)
