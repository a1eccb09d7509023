"""Finding a model's parts: structure first, then one short watched generate()."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import torch
from torch import nn

from profkit import dummies, probing, roles, structure
from profkit.anatomy import Anatomy, PartNames, within
from profkit.errors import AnatomyError
from profkit.wrapping import unwrapped

_remembered: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Anatomy]] = WeakKeyDictionary()


def inspect(model: nn.Module, *, parts: PartNames | None = None, **generate_kwargs: Any) -> Anatomy:
    """Return where the parts of a model are, how each was found, and how often it ran in which phase.

    The model runs for two new tokens and is left as it was: random state, configuration, attributes, hooks. Without
    `generate_kwargs` the inputs are made up from its configuration; where that cannot be done, the answer
    rests on structure alone, and `notes` says so. `parts` names parts that are known better: role → path or paths.

    Raises AnatomyError if the model has no generate(), is on the meta device, refuses the inputs or holds no decoder;
    InputError if `parts` names a role or a module that does not exist.
    """
    parts, model = parts or {}, unwrapped(model)
    found = structure.find(model, parts)
    # A model that is offloaded keeps its weights elsewhere and brings them as they are needed.
    if any(parameter.is_meta for parameter in model.parameters()) and not hasattr(model, "hf_device_map"):
        raise AnatomyError(
            f"{found.model_class} has parameters on the meta device, so it cannot run: load its weights, or make "
            "random ones with model.to_empty(device=…)."
        )
    if generate_kwargs:
        return _settled(model, found, parts, generate_kwargs)
    for kwargs, what in dummies.candidates(model):
        try:
            result = _settled(model, found, parts, kwargs)
        except AnatomyError:
            continue
        return replace(result, ambiguities=(*result.ambiguities, f"Watched with made-up inputs: {what}."))
    note = (
        "Not run: no inputs were given, and none could be made up from the configuration; give generate()'s arguments."
    )
    return replace(found, ambiguities=(*found.ambiguities, note))


def anatomy_for(model: nn.Module, generate_kwargs: Mapping[str, Any], parts: PartNames | None = None) -> Anatomy:
    """Return inspect()'s answer, remembered for this model and arguments of these names."""
    if parts:
        return inspect(model, parts=parts, **generate_kwargs)
    key = (*sorted(generate_kwargs), sum(1 for _ in model.modules()))
    known = _remembered.setdefault(model, {})
    if key not in known:
        known[key] = inspect(model, **generate_kwargs)
    return known[key]


def _settled(model: nn.Module, found: Anatomy, parts: PartNames, generate_kwargs: Mapping[str, Any]) -> Anatomy:
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
    result = roles.settle(model, found, trail, parts)
    layers = next((part for part in result.parts if part.role == "decoder_layers"), None)
    if layers is None or not layers.fired:
        raise AnatomyError(
            f"{found.model_class}.generate() returned, but no list of layers ran in it (tried "
            f"{layers.path if layers else 'none'}): it does not decode with modules that can be watched. Name its "
            "layers: profile(model, anatomy=…), --part decoder_layers=PATH."
        )
    return result


def part_table(model: nn.Module, anatomy: Anatomy) -> pd.DataFrame:
    """Return a row a part, in the order of the module tree.

    Columns: role, path, class_name, parameters, dtype, device, before, prefill, decode (calls, NaN if not watched),
    found_by, depth (how many other parts lie around it).
    """
    modules = dict(model.named_modules())
    order = {path: number for number, path in enumerate(modules)}
    rows = []
    for part in sorted(anatomy.parts, key=lambda one: order.get(one.path, len(order))):
        weights = list(modules[part.path].parameters())
        calls = asdict(part.calls) if part.calls else dict.fromkeys(("before", "prefill", "decode"))
        rows.append(
            {
                "role": part.role,
                "path": part.path,
                "class_name": type(modules[part.path]).__name__,
                "parameters": sum(weight.numel() for weight in weights),
                "dtype": ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in weights})),
                "device": ", ".join(sorted({str(weight.device) for weight in weights})),
                **calls,
                "found_by": part.found_by,
                "depth": sum(one.path != part.path and within(part.path, one.path) for one in anatomy.parts),
            }
        )
    return pd.DataFrame(rows)
