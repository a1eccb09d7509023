"""The plan of an instrument: which methods of which modules are probed, and under which scope."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from torch import nn

from profkit.anatomy import Anatomy, ancestors, is_layer_list, within
from profkit.errors import InputError
from profkit.ledger import Scope

Granularity = Literal["stage", "layer", "module"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)

STAGE_OF_ROLE = {
    "vision_tower": "vision",
    "audio_tower": "audio",
    "projector": "projector",
    "encoder": "prefill",
    "embed": "embed",
    "lm_head": "head",
}
FEATURES = re.compile(r"get_(\w+_)?features")
COMPILED_CALL, COMPILED = "get_compiled_call", " (compiled)"


Place = tuple[nn.Module, str, Scope]
"""A method to probe: its object, its name, and the scope that a call of it is."""


def places(model: nn.Module, anatomy: Anatomy, granularity: Granularity) -> list[Place]:
    """Return every method to probe but generate() itself, which is the instrument's entry."""
    found = [*forwards(model, anatomy, granularity), *methods(model, anatomy)]
    return [(module, name, scope) for module, name, scope in found if module is not model or name != "generate"]


def forwards(model: nn.Module, anatomy: Anatomy, granularity: Granularity) -> Iterator[Place]:
    """Yield (module, name of its forward, scope) for the modules whose forward is probed, each module once.

    What is compiled is one scope: probes inside would be traced away, and make torch compile it again.
    """
    modules = dict(model.named_modules())
    scopes: dict[str, Scope] = {}
    for part in anatomy.parts:
        if part.role in STAGE_OF_ROLE:
            for path in (*_callable(modules, part.path), *part.through):
                scopes.setdefault(path, _scope(model, path, "module", STAGE_OF_ROLE[part.role]))
        elif part.role in ("decoder", "norm"):
            scopes.setdefault(part.path, _scope(model, part.path, "decoder" if part.role == "decoder" else "module"))
    if anatomy.path("decoder") is None:
        # No module holds a pass of the decoder: its first layer begins a step, the others belong to it.
        for number, path in enumerate(_callable(modules, anatomy.path("decoder_layers") or "")):
            scopes.setdefault(path, _scope(model, path, "stack" if number else "decoder"))
    for path in _around_embedding(anatomy):
        scopes.setdefault(path, _scope(model, path, "module", "embed"))
    for path in _around(anatomy):
        scopes.setdefault(path, _scope(model, path, "forward"))
    if granularity != "stage":
        for path in _layer_paths(modules, anatomy):
            scopes.setdefault(path, _scope(model, path, "layer"))
            for name, child in modules[path].named_children():
                if within(path, anatomy.path("decoder") or "") and next(child.children(), None) is not None:
                    scopes.setdefault(f"{path}.{name}", _scope(model, f"{path}.{name}", "module"))
    if granularity == "module":
        for path in modules:
            scopes.setdefault(path, _scope(model, path, "module"))
    compiled = [path for path, module in modules.items() if is_compiled(module)]
    ahead = {part.path for part in anatomy.parts if part.calls and part.calls.before and not part.calls.prefill}
    decoder = anatomy.path("decoder")

    def holds(path: str) -> bool:
        return decoder is not None and within(decoder, path)

    seen: set[str] = set()
    for path, scope in scopes.items():
        # Encoders that run ahead of the first forward do not run inside it, even where it is compiled.
        is_ahead = any(within(path, one) for one in ahead)
        path = next((one for one in compiled if within(path, one) and not (is_ahead and holds(one))), path)
        if path not in seen:
            seen.add(path)
            kind, stage = ("decoder", None) if path in compiled and holds(path) else (scope.kind, scope.stage)
            whole = Scope(path or type(model).__name__, kind, stage)
            name = "forward" if getattr(modules[path], "_compiled_call_impl", None) is None else "_compiled_call_impl"
            yield modules[path], name, whole


def is_compiled(module: nn.Module) -> bool:
    """Tell whether torch.compile() was put around a module, its forward, or into it by module.compile()."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")
    )


def methods(model: nn.Module, anatomy: Anatomy) -> Iterator[Place]:
    """Yield (module, method name, scope) for the methods to probe, on every module around the parts.

    generate() asks get_compiled_call() for the function that its decode steps call, if it compiles them.
    """
    modules = dict(model.named_modules())
    for path in dict.fromkeys((*_around(anatomy), "")):
        module = modules[path]
        for name in dir(type(module)):
            if name == COMPILED_CALL:
                yield module, name, Scope(f"{path or type(module).__name__}{COMPILED}", "decoder")
                continue
            if name in ("generate", "prepare_inputs_for_generation"):
                kind, stage = ("generate", None) if name == "generate" else ("prepare", "setup")
            elif FEATURES.fullmatch(name):
                kind, stage = "features", "merge"
            else:
                continue
            if callable(getattr(module, name, None)):
                yield module, name, Scope(f"{path}.{name}()".lstrip("."), kind, stage)


def _around(anatomy: Anatomy) -> Iterator[str]:
    """Yield the modules around the decoder, then those around the other parts, each part's own insides aside."""
    yield from ancestors(anatomy.path("decoder") or "")
    inside = [part.path for part in anatomy.parts if part.role in (*STAGE_OF_ROLE, "decoder")]
    for part in anatomy.parts:
        if part.role in STAGE_OF_ROLE:
            yield from (above for above in ancestors(part.path) if not any(within(above, path) for path in inside))


def _around_embedding(anatomy: Anatomy) -> Iterator[str]:
    """Yield the modules around the token embedding that hold no other part: positions, types and norms."""
    embed = anatomy.path("embed")
    others = [part.path for part in anatomy.parts if part.role != "embed"]
    for above in ancestors(embed) if embed else ():
        if any(within(path, above) for path in others):
            return
        yield above


def _scope(model: nn.Module, path: str, kind: str, stage: str | None = None) -> Scope:
    return Scope(path or type(model).__name__, kind, stage)


def _callable(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Return the module, or, for a list, which is never called itself, its members. InputError if there is none."""
    if path not in modules:
        raise InputError(f"{type(modules['']).__name__} has no module {path!r}: the anatomy is of another model.")
    if not isinstance(modules[path], nn.ModuleList | nn.Sequential) or isinstance(modules[path], nn.Sequential):
        return [path]
    return [f"{path}.{name}" for name, _ in modules[path].named_children()]


def _layer_paths(modules: Mapping[str, nn.Module], anatomy: Anatomy) -> Iterator[str]:
    """Yield the layers of the decoder and of the towers."""
    homes = [anatomy.path("decoder_layers"), *anatomy.paths("vision_tower"), *anatomy.paths("audio_tower")]
    for path, module in modules.items():
        named = path == anatomy.path("decoder_layers")
        if named or (is_layer_list(module) and any(home is not None and within(path, home) for home in homes)):
            yield from (f"{path}.{name}" for name, _ in module.named_children())
