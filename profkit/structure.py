"""What the module tree alone says about a model's anatomy: accessors first, then structure. Runs nothing.

It knows the classic shape: towers beside a decoder under one parent, what else stands there being the projector.
"""

from __future__ import annotations

import difflib
from typing import Any

from profkit.anatomy import (
    ROLES,
    Anatomy,
    Part,
    PartNames,
    ancestors,
    check_roles,
    derives_from,
    has_weights,
    is_layer_list,
    outermost,
    parent,
    within,
)
from profkit.errors import AnatomyError, InputError

HEARS = ("input_features", "input_values")


def find(model: Any, parts: PartNames | None = None) -> Anatomy:
    """Return the anatomy of a model from its module tree, without running it.

    `parts` are those that the user names: role → path or paths. Raises AnatomyError if the model has no generate() or
    no decoder layers can be found, InputError if `parts` names a role or a module that does not exist.
    """
    parts = parts or {}
    check_roles(parts)
    tree = _Tree(model)
    for role, paths in parts.items():
        for path in [paths] if isinstance(paths, str) else paths:
            if path not in tree.modules:
                near = difflib.get_close_matches(path, tree.modules, n=3)
                hint = f" (nearest: {', '.join(near)})" if near else ""
                raise InputError(f"{tree.name} has no module {path!r} to be its {role}{hint}.")
    layers = parts.get("decoder_layers")
    return tree.anatomy(layers if isinstance(layers, str) or layers is None else layers[0]).corrected(parts)


class _Tree:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.name = type(model).__name__
        if not callable(getattr(model, "generate", None)):
            raise AnatomyError(f"{self.name} has no generate(): profkit measures generate() of models that have one.")
        self.modules: dict[str, Any] = dict(model.named_modules())
        self.path_of = {id(module): path for path, module in self.modules.items()}
        self.lists = self._layer_lists()
        self.embed = self._accessor("get_input_embeddings")
        self.head = self._accessor("get_output_embeddings")

    def anatomy(self, layers_by_user: str | None) -> Anatomy:
        """Return the anatomy."""
        named = (layers_by_user, "user", ()) if layers_by_user else None
        layers, found_by, notes = named or self._decoder_layers()
        decoder = parent(layers)
        encoders = self._encoders(decoder)
        towers = [(role, path, "structure") for path, role in encoders.items()]
        norm = self._final_norm(decoder)
        projectors = self._projectors(list(encoders), decoder, [layers, *([norm] if norm else [])])
        found = [
            *towers,
            *(("projector", path, "structure") for path in projectors),
            ("decoder", decoder, found_by),
            ("decoder_layers", layers, found_by),
            ("norm", norm, "structure"),
            ("embed", self.embed, "get_input_embeddings()"),
            ("lm_head", self.head, "get_output_embeddings()"),
        ]
        parts = [self._part(role, path, how) for role, path, how in found if path is not None]
        return Anatomy(self.name, tuple(sorted(parts, key=lambda part: ROLES.index(part.role))), notes)

    def _part(self, role: str, path: str, found_by: str) -> Part:
        module = self.modules[path]
        # A list is never called itself: its members stand for it.
        members = tuple(f"{path}.{name}" for name, _ in module.named_children())
        through = members if type(module).__name__ == "ModuleList" or role == "decoder_layers" else ()
        return Part(role, path, type(module).__name__, found_by, through=through)

    def _accessor(self, name: str, **arguments: Any) -> str | None:
        """Return the path of the module that an accessor gives, None if it gives none of this model's."""
        try:
            return self.path_of.get(id(getattr(self.model, name)(**arguments)))
        except Exception:  # accessors are the model's own code: they raise what they like
            return None

    def _layer_lists(self) -> list[str]:
        """Return the outermost lists of transformer layers; where there are none, of modules of one class."""
        lists = outermost(path for path, module in self.modules.items() if is_layer_list(module))
        if lists:
            return lists
        return outermost(path for path, module in self.modules.items() if _is_uniform_list(module))

    def _decoder_layers(self) -> tuple[str, str, tuple[str, ...]]:
        """Return the list of the decoder's layers, how it was found, and a note if that was a choice."""
        if not self.lists:
            raise AnatomyError(
                f"No decoder layers found in {self.name}: it holds no list of layers (a ModuleList of "
                "GradientCheckpointingLayer, or of modules of one class). Name them: --part decoder_layers=PATH, "
                "or profile(model, anatomy=…)."
            )
        named = self._accessor("get_decoder")
        has_encoder = bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))
        encoder = self._accessor("get_encoder") if has_encoder else None

        def rank(path: str) -> tuple[int, ...]:
            outside_encoder = not encoder or not within(path, encoder)
            inside_named = bool(named) and within(path, named or "")
            shared = next((above for above in ancestors(path) if within(self.embed or "", above)), "")
            return (
                outside_encoder,
                parent(path) == named,
                inside_named,
                not self._takes_media(path, shared),
                len(shared.split(".")) if shared else 0,
                len(list(self.modules[path].children())),
            )

        ranked = sorted(self.lists, key=rank, reverse=True)
        best = ranked[0]
        if parent(best) == named:
            return best, "get_decoder()", ()
        found_by = "get_decoder(), structure" if named and within(best, named) else "structure"
        rivals = [path for path in ranked[1:] if rank(path)[:-1] == rank(best)[:-1]]
        said = f"{1 + len(rivals)} candidates for decoder_layers: {', '.join([best, *rivals])}; took {best}."
        return best, found_by, (said,) if rivals else ()

    def _takes_media(self, path: str, home: str) -> bool:
        """Tell whether a model around `path`, below `home`, says that it takes something else than text."""
        around = [self.modules[above] for above in ancestors(path) if within(above, home) and above != home]
        return any(_takes(module) != "text" for module in around)

    def _encoders(self, decoder: str) -> dict[str, str]:
        """Return the role of each encoder: the outermost model around other layers, not around the decoder."""
        text_encoder = self._accessor("get_encoder")
        found: dict[str, str] = {}
        for path in self.lists:
            around = [above for above in ancestors(path) if above and not within(decoder, above)]
            models = [above for above in around if derives_from(self.modules[above], "PreTrainedModel")]
            if not models:
                continue
            takes = _takes(self.modules[models[-1]])
            # Some keep their tower inside the decoder, as LLaVA's first code does.
            if within(path, decoder) and takes == "text":
                continue
            if takes == "text" and text_encoder and within(models[-1], text_encoder):
                found[models[-1]] = "encoder"
            else:
                found[models[-1]] = "audio_tower" if takes == "audio" else "vision_tower"
        return found

    def _projectors(self, encoders: list[str], decoder: str, inner: list[str]) -> list[str]:
        """Return the modules with weights that stand beside a tower and are no other part; `inner` are the decoder's.

        A tower that stands alone in a module of its own has its neighbours where that module stands.
        """
        others = [path for path in (*encoders, self.embed, self.head) if path]
        found: list[str] = []
        for home in dict.fromkeys(self._home(tower) for tower in encoders):
            known = [*others, *(inner if within(home, decoder) else [decoder])]
            for name, child in self.modules[home].named_children():
                path = f"{home}.{name}" if home else name
                related = any(within(path, other) or within(other, path) for other in known)
                if not related and has_weights(child):
                    found.append(path)
        return found

    def _home(self, tower: str) -> str:
        """Return the module around a tower, and around whatever holds nothing but it."""
        home = parent(tower)
        while home and len([child for child in self.modules[home].children() if has_weights(child)]) < 2:
            home = parent(home)
        return home

    def _final_norm(self, decoder: str) -> str | None:
        """Return the last norm that is the decoder's direct child, if it has one."""
        norms = [
            name for name, child in self.modules[decoder].named_children() if "norm" in type(child).__name__.lower()
        ]
        return f"{decoder}.{norms[-1]}".lstrip(".") if norms else None


def _takes(module: Any) -> str:
    """Return what a module says it takes: media, audio (which is media too), or text, which is the default."""
    declared = getattr(module, "input_modalities", "text")
    kinds = {declared} if isinstance(declared, str) else set(declared)
    main = str(getattr(module, "main_input_name", "input_ids"))
    if kinds == {"audio"} or main in HEARS:
        return "audio"
    return "media" if "text" not in kinds or main not in ("input_ids", "inputs_embeds") else "text"


def _is_uniform_list(module: Any) -> bool:
    """Tell whether a module is a list of modules of one class, each of several with weights."""
    children = list(module.children())
    if type(module).__name__ not in ("ModuleList", "Sequential") or not children:
        return False
    composite = all(sum(map(has_weights, child.children())) > 1 for child in children)
    return composite and len({type(child) for child in children}) == 1
