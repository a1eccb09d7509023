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

from profkit import arguments, stats, tables
from profkit.anatomy import Anatomy
from profkit.capture import profile
from profkit.environment import device_of, synchronize
from profkit.plan import methods
from profkit.probes import sequences
from profkit.run import Run
from profkit.verdicts import Verdict, between, known, within
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

    The second half is model.generate() with `given`, which inside `_text_generate()` is that of transformers.
    """

    way: str
    encode: Callable[[], Any]
    given: Mapping[str, Any]
    covers: tuple[str, ...]

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the second half, for one call."""
        return {
            name: dict(value) if isinstance(value, dict) else value
            for name, value in arguments.fresh(self.given).items()
        }

    def going_on(self, model: Any) -> Callable[[], Any]:
        """Return the second half, ready to be called once."""
        return functools.partial(model.generate, **self.arguments())


def decoupled(
    model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy, repeats: int = REPEATS
) -> Iterator[Verdict]:
    """Yield by how much attribution and truth differ, where the model takes features computed before.

    Two halves are run by themselves, in turn with the whole: the media are encoded; generate() goes on from their
    features (`mm_encoder_outputs`, else `inputs_embeds`), which must give the same tokens. `kwargs` must be greedy.
    """
    plain, again = (_tokens(model.generate(**arguments.fresh(kwargs))) for _ in range(2))  # type: ignore[operator]
    if plain is None or again is None or not torch.equal(plain, again):
        why_not = ["the model is not deterministic: it gives other tokens each time by itself"]
        if plain is None:
            why_not = ["generate() gives no tokens to compare"]
    else:
        splits, why_not = _splits(model, kwargs, anatomy)
        for split in splits:
            wrong = _wrong(model, split, plain)
            if not wrong:
                yield from _compared(model, kwargs, anatomy, split, repeats)
                return
            why_not.append(wrong)
    yield known("decoupled truth", float("nan"), "", f"not to be had: {'; '.join(why_not)}")


def _wrong(model: nn.Module, split: Split, plain: torch.Tensor) -> str:
    """Return why the second half is not the same as in the whole, "" if it is."""
    try:
        with _text_generate(model):
            tokens = _tokens(split.going_on(model)())
    except Exception as error:
        return f"generate() from {split.way} failed: {type(error).__name__}: {str(error)[:100]}"
    if tokens is None or not torch.equal(plain[:, -tokens.shape[1] :], tokens):
        return f"generate() from {split.way} gives other tokens than the whole"
    return ""


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

        def alone(name: str, times: dict[str, float] = times) -> None:
            with _text_generate(model):
                half = split.encode if name == "encode" else split.going_on(model)
                begin = perf_counter_ns()
                half()
                synchronize(device)
                times[name] = (perf_counter_ns() - begin) / tables.MS

        def whole(times: dict[str, float] = times) -> None:
            with profile(model, granularity="stage", anatomy=anatomy) as run:
                model.generate(**arguments.fresh(kwargs))  # type: ignore[operator]
            times |= _by_stage("whole", run)

        def half(times: dict[str, float] = times) -> None:
            with _text_generate(model), profile(model, granularity="stage", anatomy=anatomy) as run:
                split.going_on(model)()
            times |= _by_stage("half", run)

        turns: list[Callable[[], None]] = [whole, lambda: alone("encode"), lambda: alone("generate"), half]
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
    said = f"{said}: {attributed:.2f} ms and {true:.2f} ms, {off:+.1%} ({between((low, high))})"
    found = within(f"decoupled truth: {name}", off, (low, high), ALLOWED, "", said)
    return found if binding else known(found.check, found.measured, "", said)


def _sum(times: Mapping[str, float], which: str, names: Sequence[str]) -> float:
    return sum(times.get(f"{which} {name}", 0.0) for name in names)


def _tokens(output: Any) -> torch.Tensor | None:
    found = sequences(output)
    return None if found is None else found.cpu()


# -- the halves --------------------------------------------------------------------------------------


def _splits(model: nn.Module, kwargs: Mapping[str, Any], anatomy: Anatomy) -> tuple[list[Split], list[str]]:
    """Return the halves of a generate(), in the ways to be tried in turn, and why there are no more."""
    features, parts, passes = _watched(model, kwargs, anatomy)
    found = []
    if features and "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        found.append(_by_features(kwargs, features))
    if not passes or not isinstance(passes[0].kwargs.get("inputs_embeds"), torch.Tensor):
        return found, [] if found else ["the decoder is given no embeddings, and the model takes no features"]
    if not (features or parts):
        return found, ["no part was seen to encode media"]
    return [*found, _by_embeddings(kwargs, features, parts, passes[0].kwargs["inputs_embeds"])], []


def _by_embeddings(
    kwargs: Mapping[str, Any], features: Sequence[Seen], parts: Sequence[Seen], embedded: torch.Tensor
) -> Split:
    # Parts alone leave out what lies between them: only they can be held against their own time.
    alone, covers = (features, ENCODING) if features else (parts, ENCODING[:-1])
    embeds = embedded.detach().clone()
    known_names = {
        *vars(transformers.GenerationConfig()),
        *inspect.signature(transformers.GenerationMixin.generate).parameters,
    }
    options = {name: value for name, value in kwargs.items() if name in known_names and not _is_input(value)}
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.shape != embeds.shape[:2]:
        # The user's is of ids, of which one may stand for many embeddings.
        mask = torch.ones(embeds.shape[:2], dtype=torch.long).to(embeds.device)
    given = {"inputs_embeds": embeds, "attention_mask": mask, **options}
    return Split("inputs_embeds", _again(alone), given, covers)


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


def _by_features(kwargs: Mapping[str, Any], features: Sequence[Seen]) -> Split:
    outputs = {_modality(one.name): one.output for one in features}
    # What went to the encoders is theirs alone.
    taken = {name for one in features for name in inspect.signature(one.call).parameters}
    given = {name: value for name, value in kwargs.items() if name not in taken}
    return Split("mm_encoder_outputs", _again(features), {**given, "mm_encoder_outputs": outputs}, ENCODING)


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
        model.generate(**arguments.fresh(kwargs))  # type: ignore[operator]
    finally:
        wrappers.remove()
    return features, parts, passes
