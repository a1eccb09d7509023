"""What a model can do that matters to those who measure or serve it: tried on the model itself, tokens compared."""

from __future__ import annotations

import functools
import hashlib
import inspect as signatures
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from profkit.anatomy import Anatomy
from profkit.environment import preserved_random_state
from profkit.probes import prompt_of, sequence_length, sequences
from profkit.probing import shortened, unwatched
from profkit.wrapping import Wrappers

NEW_TOKENS = 4
FEATURES_OF = re.compile(r"get_(\w+)_features\(\)$")


@dataclass(frozen=True)
class Capability:
    """A question, the answer (None: it does not arise, or could not be tried) and what was seen."""

    name: str
    question: str
    answer: bool | None
    evidence: str


@dataclass
class _Seen:
    """What one generate() showed: tokens, inputs of decoder and towers, sizes of the decoder's passes."""

    tokens: torch.Tensor | None = None
    embeds: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    tower_calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = field(default_factory=dict)
    compiled_calls: int = 0


def measure(model: nn.Module, anatomy: Anatomy, generate_kwargs: Mapping[str, Any]) -> list[Capability]:
    """Return the capability table of a model, from a few short runs of generate() that leave it as it was."""
    kwargs = shortened(generate_kwargs, NEW_TOKENS)
    with unwatched(model), preserved_random_state(), torch.no_grad():
        seen = _run(model, anatomy, kwargs)
        return [
            _features(model, anatomy, kwargs, seen),
            _embeddings(model, kwargs, seen),
            _cache(kwargs, seen),
            _tower(model, seen),
            _compiles(model, seen),
            _encodes_twice(seen),
        ]


def _run(model: nn.Module, anatomy: Anatomy, kwargs: Mapping[str, Any]) -> _Seen:
    seen, wrappers = _Seen(), Wrappers()

    def watch(module: nn.Module, name: str, note: Callable[..., None]) -> None:
        bound = getattr(module, name)

        @functools.wraps(bound)
        def watched(*args: Any, **given: Any) -> Any:
            output = bound(*args, **given)
            note(args, given, output)
            return output

        wrappers.put(module, name, watched)

    def decoder_pass(args: tuple[Any, ...], given: dict[str, Any], _: Any) -> None:
        embeds = given.get("inputs_embeds")
        if not seen.lengths and isinstance(embeds, torch.Tensor):
            seen.embeds = embeds.clone()
        seen.lengths.append(sequence_length(args, given))

    def compiled(*_: Any) -> None:
        seen.compiled_calls += 1

    try:
        if (decoder := _decoder(anatomy)) is not None:
            watch(model.get_submodule(decoder), "forward", decoder_pass)
        for path in (*anatomy.paths("vision_tower"), *anatomy.paths("audio_tower")):
            calls = seen.tower_calls.setdefault(path, [])
            watch(
                model.get_submodule(path),
                "forward",
                lambda args, given, output, calls=calls: calls.append((args, given, tree_leaves(output))),
            )
        if hasattr(model, "get_compiled_call"):
            watch(model, "get_compiled_call", compiled)
        seen.tokens = _generate(model, kwargs)
    finally:
        wrappers.remove()
    return seen


def _decoder(anatomy: Anatomy) -> str | None:
    """Return the module whose calls are the decoder's passes: where none holds its layers, the first of them."""
    layers = next((part.through for part in anatomy.parts if part.role == "decoder_layers"), ())
    return anatomy.path("decoder") or next(iter(layers), None)


def _generate(model: nn.Module, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    with preserved_random_state():
        return sequences(model.generate(**kwargs))  # type: ignore[operator]


def _same_end(first: torch.Tensor | None, second: torch.Tensor | None) -> bool:
    """Tell whether two outputs end in the same new tokens; the prompt may lead one of them and not the other."""
    if first is None or second is None:
        return False
    count = min(first.shape[1], second.shape[1], NEW_TOKENS)
    return count > 0 and torch.equal(first[:, -count:], second[:, -count:])


def _media(model: nn.Module, anatomy: Anatomy, kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (modality, method, arguments) of each get_*_features() that ran, outermost first."""
    done: set[str] = set()
    for path in sorted(anatomy.features, key=len):
        match = FEATURES_OF.search(path)
        if match is None or match[1] in done:
            continue
        owner = path.rpartition(".")[0]
        method = getattr(model.get_submodule(owner), f"get_{match[1]}_features")
        takes = signatures.signature(method).parameters
        every = any(one.kind is signatures.Parameter.VAR_KEYWORD for one in takes.values())
        prompt = prompt_of((), kwargs)
        given = {
            name: value
            for name, value in kwargs.items()
            if (name in takes or every) and isinstance(value, torch.Tensor) and value is not prompt
        }
        done.add(match[1])
        yield match[1], method, given


def _features(model: nn.Module, anatomy: Anatomy, kwargs: Mapping[str, Any], seen: _Seen) -> Capability:
    name, question = "precomputed_features", "takes pre-computed features (mm_encoder_outputs)"
    found = list(_media(model, anatomy, kwargs))
    if not found:
        return Capability(name, question, None, "no get_*_features() ran in generate()")
    try:
        outputs, used = {}, set()
        for modality, method, given in found:
            only = {key: value for key, value in given.items() if key not in ("attention_mask", "token_type_ids")}
            outputs[modality] = method(**only, return_dict=True)
            used |= {key for key, value in only.items() if value.is_floating_point()}
        rest = {key: value for key, value in kwargs.items() if key not in used}
        tokens = _generate(model, {**rest, "mm_encoder_outputs": outputs})
    except Exception as error:
        return Capability(name, question, False, _said(error))
    equal = _same_end(tokens, seen.tokens)
    return Capability(name, question, equal, "tokens equal" if equal else "it ran, but its tokens differ")


def _embeddings(model: nn.Module, kwargs: Mapping[str, Any], seen: _Seen) -> Capability:
    name, question = "inputs_embeds", "takes embeddings instead of ids and media (inputs_embeds)"
    if seen.embeds is None:
        return Capability(name, question, None, "the decoder is not given inputs_embeds")
    keep = {
        key: value
        for key, value in kwargs.items()
        if not any(isinstance(one, torch.Tensor) for one in tree_leaves(value))
    }
    mask = torch.ones(seen.embeds.shape[:2], dtype=torch.long, device=seen.embeds.device)
    given = kwargs.get("attention_mask")
    if isinstance(given, torch.Tensor) and given.shape == mask.shape:
        mask = given
    try:
        tokens = _generate(model, {**keep, "inputs_embeds": seen.embeds, "attention_mask": mask})
    except Exception as error:
        return Capability(name, question, False, _said(error))
    equal = _same_end(tokens, seen.tokens)
    return Capability(name, question, equal, "tokens equal" if equal else "it ran, but its tokens differ")


def _cache(kwargs: Mapping[str, Any], seen: _Seen) -> Capability:
    name, question = "kv_cache", "keeps a KV cache"
    if len(seen.lengths) < 2 or min(seen.lengths[:2]) < 1:
        return Capability(name, question, None, "the decoder's passes could not be counted, or there was only one")
    # Without a cache the second pass reads the prompt again, and one token more.
    kept = seen.lengths[1] <= seen.lengths[0]
    return Capability(name, question, kept, f"passes of the decoder read {', '.join(map(str, seen.lengths))} tokens")


def _tower(model: nn.Module, seen: _Seen) -> Capability:
    name, question = "tower_alone", "the tower can be called directly"
    called = {path: calls for path, calls in seen.tower_calls.items() if calls}
    if not called:
        return Capability(name, question, None, "no tower ran by its own forward")
    differing = []
    for path, calls in called.items():
        args, given, expected = calls[0]
        try:
            output = model.get_submodule(path)(*args, **given)
        except Exception as error:
            return Capability(name, question, False, f"{path}: {_said(error)}")
        if not _same_tensors(output, expected):
            differing.append(path)
    if differing:
        return Capability(
            name, question, False, f"its output differs from that inside generate(): {', '.join(differing)}"
        )
    return Capability(name, question, True, f"same output as inside generate(): {', '.join(called)}")


def _compiles(model: nn.Module, seen: _Seen) -> Capability:
    name, question = "compiles_decode", "generate() compiles its decode step"
    if not hasattr(model, "get_compiled_call"):
        return Capability(name, question, None, "this generate() has no such path")
    device = next(model.parameters()).device
    times = f"asked for a compiled forward {seen.compiled_calls} times"
    return Capability(name, question, seen.compiled_calls > 0, f"on {device}, with these arguments: {times}")


def _encodes_twice(seen: _Seen) -> Capability:
    name, question = "encodes_twice", "encodes the same input more than once"
    calls = {path: [_content(args, given) for args, given, _ in calls] for path, calls in seen.tower_calls.items()}
    calls = {path: contents for path, contents in calls.items() if contents}
    if not calls:
        return Capability(name, question, None, "no tower ran by its own forward")
    counts = ", ".join(f"{path}: {len(all_)} calls, {len(set(all_))} inputs" for path, all_ in calls.items())
    return Capability(name, question, any(len(set(all_)) < len(all_) for all_ in calls.values()), counts)


def _content(args: tuple[Any, ...], given: Mapping[str, Any]) -> str:
    digest = hashlib.sha256()
    for leaf in tree_leaves((args, dict(given))):
        if isinstance(leaf, torch.Tensor):
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _same_tensors(first: Any, second: Any) -> bool:
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=False)
    both = [(one, other) for one, other in pairs if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)]
    return bool(both) and all(torch.allclose(one, other, rtol=1e-3, atol=1e-5, equal_nan=True) for one, other in both)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
