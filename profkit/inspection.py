"""Finding a model's parts: structure first, then one short watched generate()."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from profkit import dummies, probing, roles, structure
from profkit.anatomy import ROLES, Anatomy, Part
from profkit.errors import AnatomyError, InputError

_settled: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Anatomy]] = WeakKeyDictionary()


def inspect(model: nn.Module, **generate_kwargs: Any) -> Anatomy:
    """Return where the parts of a model are, how each was found, and how often it ran in which phase.

    The model runs for two new tokens and is left as it was: random state, configuration, attributes, hooks. Without
    `generate_kwargs` the inputs are made up from its configuration; where that cannot be done, the answer
    rests on structure alone, and `notes` says so.

    Raises AnatomyError if the model has no generate(), is on the meta device, refuses the inputs or holds no decoder.
    """
    found = structure.find(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise AnatomyError(
            f"{found.model_class} has parameters on the meta device, so it cannot run: load its weights, or make "
            "random ones with model.to_empty(device=…)."
        )
    if generate_kwargs:
        return settled(model, found, generate_kwargs)
    for kwargs, what in dummies.candidates(model):
        try:
            result = settled(model, found, kwargs)
        except AnatomyError:
            continue
        return replace(result, ambiguities=(*result.ambiguities, f"Watched with made-up inputs: {what}."))
    note = (
        "Not run: no inputs were given, and none could be made up from the configuration; give generate()'s arguments."
    )
    return replace(found, ambiguities=(*found.ambiguities, note))


def anatomy_for(model: nn.Module, generate_kwargs: Mapping[str, Any]) -> Anatomy:
    """Return inspect()'s answer, remembered for this model and arguments of these names."""
    key = (*sorted(generate_kwargs), sum(1 for _ in model.modules()))
    known = _settled.setdefault(model, {})
    if key not in known:
        known[key] = inspect(model, **generate_kwargs)
    return known[key]


def settled(model: nn.Module, found: Anatomy, generate_kwargs: Mapping[str, Any]) -> Anatomy:
    """Return an anatomy from structure and one probing run. Raises AnatomyError if the model will not run."""
    try:
        trail = probing.probe(model, generate_kwargs)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise AnatomyError(
            f"{found.model_class}.generate() refused the inputs ({', '.join(generate_kwargs)}) in a probing run of "
            f"{probing.NEW_TOKENS} tokens: {type(error).__name__}: {text}. Pass inputs that it takes, or name the "
            "parts yourself: profile(model, anatomy=…), --part role=path."
        ) from error
    result = roles.settle(model, found, trail)
    layers = next((part for part in result.parts if part.role == "decoder_layers"), None)
    if layers is None or not layers.fired:
        raise AnatomyError(
            f"{found.model_class}.generate() returned, but no list of layers ran in it (tried "
            f"{layers.path if layers else 'none'}): it does not decode with modules that can be watched. Name its "
            "layers: profile(model, anatomy=…), --part decoder_layers=PATH."
        )
    return result


def corrected(model: nn.Module, found: Anatomy, parts: Mapping[str, list[str]]) -> Anatomy:
    """Return an anatomy with the parts of some roles named by the user: role → paths.

    Raises InputError for a role or a path that does not exist.
    """
    modules = dict(model.named_modules())
    replaced = [part for part in found.parts if part.role not in parts]
    for role, paths in parts.items():
        if role not in ROLES:
            raise InputError(f"There is no role {role!r}: choose one of {', '.join(ROLES)}.")
        for path in paths:
            if path not in modules:
                raise InputError(f"{found.model_class} has no module {path!r} to be its {role}.")
            module = modules[path]
            members = tuple(f"{path}.{name}" for name, _ in module.named_children())
            through = members if isinstance(module, nn.ModuleList) else ()
            replaced.append(Part(role, path, type(module).__name__, "user", through=through))
    replaced.sort(key=lambda part: ROLES.index(part.role))
    return replace(found, parts=tuple(replaced))
