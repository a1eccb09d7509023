"""The split made for real: media encoded alone, then generate() from the features, held against what was attributed."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any

import torch
import transformers
from torch import nn

from profkit import stats, tables
from profkit.anatomy import Anatomy
from profkit.capture import profile
from profkit.environment import device_of, synchronize
from profkit.plan import methods
from profkit.probes import sequences
from profkit.run import Run
from profkit.verdicts import Verdict, known, within
from profkit.wrapping import Wrappers

ALLOWED, REPEATS, SHARE = 0.03, 15, 0.20
"""How far attribution may be from the truth, repeats, and the share of vision below which the first says little."""
ENCODING = ("vision", "audio", "projector", "merge")
GENERATING = ("prefill", "decode", "head", "select")
MODALITY = re.compile(r"get_(image|video|audio)_features$")
PARTS = ("vision_tower", "audio_tower", "projector")


@dataclass
class Seen:
    """A call of a method or module as it was made: what to call, with what, and what it gave."""

    name: str
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None


@dataclass
class Split:
    """The two halves of a generate(), each to be run alone. `covers` are the stages that the first half is.

    The second half calls model.generate(), which inside `_text_generate()` is that of transformers.
    """

    way: str
    encode: Callable[[], Any]
    generate: Callable[[], Any]
    covers: tuple[str, ...]


def decoupled(
    model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy, repeats: int = REPEATS
) -> Iterator[Verdict]:
    """Yield by how much attribution and truth differ, where the model takes features computed before.

    Two halves are run by themselves, in turn with the whole: the media are encoded; generate() goes on from their
    features (`mm_encoder_outputs`, else `inputs_embeds`), which must give the same tokens. `kwargs` must be greedy.
    """
    plain = _tokens(model.generate(**kwargs))  # type: ignore[operator]
    split, why_not = _split(model, kwargs, anatomy)
    if split is None:
        yield known("decoupled truth", float("nan"), "", f"not to be had: {why_not}")
        return
    try:
        with _text_generate(model):
            tokens = _tokens(split.generate())
    except Exception as error:
        said = f"not to be had: generate() from {split.way} failed: {type(error).__name__}: {str(error)[:100]}"
        yield known("decoupled truth", float("nan"), "", said)
        return
    if plain is None or tokens is None or not torch.equal(plain[:, -tokens.shape[1] :], tokens):
        said = f"not to be had: generate() from {split.way} gives other tokens than the whole"
        yield known("decoupled truth", float("nan"), "", said)
        return
    yield from _compared(model, kwargs, anatomy, split, repeats)


def _compared(
    model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy, split: Split, repeats: int
) -> Iterator[Verdict]:
    device = device_of(model)
    encoding: list[tuple[float, float]] = []
    generating: list[tuple[float, float]] = []
    rest: list[tuple[float, float]] = []
    shares = []
    for number in range(repeats):
        times: dict[str, float] = {}

        def alone(name: str, half: Callable[[], Any], times: dict[str, float] = times) -> None:
            with _text_generate(model):
                begin = perf_counter_ns()
                half()
                synchronize(device)
                times[name] = (perf_counter_ns() - begin) / tables.MS

        def whole(times: dict[str, float] = times) -> None:
            with profile(model, granularity="stage", anatomy=anatomy) as run:
                model.generate(**kwargs)  # type: ignore[operator]
            times |= _by_stage("whole", run)

        def half(times: dict[str, float] = times) -> None:
            with _text_generate(model), profile(model, granularity="stage", anatomy=anatomy) as run:
                split.generate()
            times |= _by_stage("half", run)

        turns: list[Callable[[], None]] = [
            whole,
            lambda: alone("encode", split.encode),
            lambda: alone("generate", split.generate),
            half,
        ]
        for turn in turns if number % 2 == 0 else reversed(turns):
            turn()
        total = sum(value for name, value in times.items() if name.startswith("whole "))
        mine = _sum(times, "whole", split.covers)
        encoding.append((mine, times["encode"]))
        generating.append((_sum(times, "whole", GENERATING), _sum(times, "half", GENERATING)))
        rest.append((total - _sum(times, "whole", ENCODING), times["generate"]))
        shares.append(mine / total)
    share = stats.median(shares)
    small = f"; vision takes {share:.0%} of the time here, too little to hold it to this" if share < SHARE else ""
    covers = " + ".join(name for name in split.covers)
    yield _held("encoding", encoding, f"{covers} against the media encoded alone{small}", not small)
    said = f"{' + '.join(GENERATING)} against the same of generate() from {split.way}"
    yield _held("generating", generating, said)
    yield _held("the rest", rest, f"all but the encoding against the time of generate() from {split.way}, unprobed")


def _by_stage(which: str, run: Run) -> dict[str, float]:
    """Return each stage's ms; those of a device where there is one, as the host runs ahead of it."""
    table = run.stages()
    column = "device_ms" if table["device_ms"].notna().any() else "host_ms"
    return {f"{which} {name}": value for name, value in table[column].fillna(0.0).items()}


def _held(name: str, pairs: Sequence[tuple[float, float]], said: str, binding: bool = True) -> Verdict:
    """Return the verdict on attributed times and true ones, in pairs; open where noise is larger than the bound."""
    attributed, true = (stats.median([pair[side] for pair in pairs]) for side in (0, 1))
    ratios = torch.tensor([one / other for one, other in pairs], dtype=torch.float64).numpy()
    off = stats.median(ratios) - 1
    low, high = (edge - 1 for edge in stats.median_interval(ratios))
    said = f"{said}: {attributed:.2f} ms and {true:.2f} ms, {off:+.1%} (95 % interval {low:+.1%} to {high:+.1%})"
    found = within(f"decoupled truth: {name}", off, (low, high), ALLOWED, "", said)
    return found if binding else known(found.check, found.measured, "", said)


def _sum(times: Mapping[str, float], which: str, names: Sequence[str]) -> float:
    return sum(times.get(f"{which} {name}", 0.0) for name in names)


def _tokens(output: Any) -> torch.Tensor | None:
    found = sequences(output)
    return None if found is None else found.cpu()


# -- the halves --------------------------------------------------------------------------------------


def _split(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy) -> tuple[Split | None, str]:
    """Return the halves of a generate(), or why there are none."""
    features, parts, passes = _watched(model, kwargs, anatomy)
    if features and "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        return _by_features(model, kwargs, features), ""
    if not passes or not isinstance(passes[0].kwargs.get("inputs_embeds"), torch.Tensor):
        return None, "the decoder is given no embeddings, and the model takes no features"
    if not (features or parts):
        return None, "no part was seen to encode media"
    # Parts alone leave out what lies between them: only they can be held against their own time.
    alone, covers = (features, ENCODING) if features else (parts, ENCODING[:-1])
    embeds = passes[0].kwargs["inputs_embeds"].detach().clone()
    known_names = {
        *vars(transformers.GenerationConfig()),
        *inspect.signature(transformers.GenerationMixin.generate).parameters,
    }
    options = {name: value for name, value in kwargs.items() if name in known_names and not _is_input(value)}
    given = {
        "inputs_embeds": embeds,
        "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long).to(embeds.device),
    }

    def generate() -> Any:
        return model.generate(**given, **options)  # type: ignore[operator]

    return Split("inputs_embeds", _again(alone), generate, covers), ""


@contextmanager
def _text_generate(model: nn.Module) -> Iterator[None]:
    """Give a model that overrides generate(), for its media, that of transformers for a while."""
    original = transformers.GenerationMixin.generate
    if getattr(type(model), "generate", None) is original or "generate" in model.__dict__:
        yield
        return
    model.__dict__["generate"] = functools.partial(original, model)
    try:
        yield
    finally:
        del model.__dict__["generate"]


def _by_features(model: nn.Module, kwargs: Mapping[str, Any], features: Sequence[Seen]) -> Split:
    outputs = {_modality(one.name): one.output for one in features}
    # What went to the encoders is theirs alone.
    taken = {name for one in features for name in inspect.signature(one.call).parameters}
    given = {name: value for name, value in kwargs.items() if name not in taken}

    def generate() -> Any:
        return model.generate(**given, mm_encoder_outputs=dict(outputs))  # type: ignore[operator]

    return Split("mm_encoder_outputs", _again(features), generate, ENCODING)


def _modality(name: str) -> str:
    match = MODALITY.search(name)
    return match[1] if match else name


def _again(calls: Sequence[Seen]) -> Callable[[], Any]:
    """Return a function that makes calls again, as they were made."""

    @torch.no_grad()
    def again() -> None:
        for one in calls:
            one.call(*one.args, **one.kwargs)

    return again


def _is_input(value: Any) -> bool:
    """Tell whether an argument of generate() is data: tensors, or lists that hold some."""
    if isinstance(value, list | tuple):
        return any(_is_input(one) for one in value)
    return isinstance(value, torch.Tensor)


def _watched(
    model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy
) -> tuple[list[Seen], list[Seen], list[Seen]]:
    """Return the outermost calls of get_*_features(), those of towers and projectors, and the decoder's passes."""
    features: list[Seen] = []
    parts: list[Seen] = []
    passes: list[Seen] = []
    inside: list[Seen] = []
    wrappers = Wrappers()

    def watch(module: nn.Module, method: str, kept: list[Seen], nested: bool) -> None:
        bound = getattr(module, method)

        @functools.wraps(bound)
        def watched(*args: Any, **given: Any) -> Any:
            seen = Seen(method, bound, args, given)
            if nested or not inside:
                kept.append(seen)
            inside.append(seen)
            try:
                seen.output = bound(*args, **given)
            finally:
                inside.pop()
            return seen.output

        wrappers.put(module, method, watched)

    try:
        for module, name, scope in methods(model, anatomy):
            if scope.kind == "features" and MODALITY.search(name):
                watch(module, name, features, nested=False)
        for part in anatomy.parts:
            if part.role in PARTS and not part.through:
                watch(model.get_submodule(part.path), "forward", parts, nested=True)
            elif part.role == "decoder" and not passes:
                watch(model.get_submodule(part.path), "forward", passes, nested=True)
        model.generate(**kwargs)  # type: ignore[operator]
    finally:
        wrappers.remove()
    return features, parts, passes
