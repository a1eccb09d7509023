"""The work of an unmodified generate(), counted in a pass of its own; without weights where that can be done."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from profkit import cache, fakes, formulas
from profkit.anatomy import Anatomy
from profkit.arguments import fresh
from profkit.counting import Counter, plain_tensors
from profkit.environment import device_of, preserved_random_state
from profkit.errors import MeasurementError
from profkit.ledger import Ledger, Scopes
from profkit.lines import Line, line_of
from profkit.plan import Granularity, is_compiled
from profkit.probes import Instrument
from profkit.spans import Spans
from profkit.work import QUANTITIES, Work, work_table

PROMPTS = ("inputs_embeds", "input_ids", "inputs")
FEW = 6
"""Tokens that are counted where the others follow: that of the prefill and five of decoding."""
MOST = 64
"""Steps after which a line that held throughout is followed, even where its end cannot be counted."""


class Counting:
    """One count: of which model, with which arguments, of how many steps."""

    def __init__(
        self,
        model: nn.Module,
        kwargs: Mapping[str, Any],
        anatomy: Anatomy,
        granularity: Granularity,
        tokens: int | None,
    ) -> None:
        self.model, self.kwargs, self.anatomy = model, dict(kwargs), anatomy
        self.granularity, self.tokens = granularity, tokens
        self.about: dict[str, Any] = {"convention": formulas.CONVENTION}
        self.operators = pd.DataFrame()

    def work(self) -> Work:
        """Count on fake weights; where data decide what is done, on the model itself."""
        begin = time.perf_counter()
        try:
            with preserved_random_state(), fakes.quietly():
                table = self._followed(fakes.without_weights(self.model))
            self.about |= {"weights": "fake", "why": ""}
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self._refuse_without_weights(why, error)
            table = self._table(self.model, self.kwargs)
            self.about |= {"weights": "real", "why": why, "line": "", "steps_counted": _steps(table)}
        self.about["gaps"] = _gaps(self.operators)
        self.about |= {"steps": _steps(table), "seconds": time.perf_counter() - begin}
        return Work(table, self.operators, part_table(self.model, self.anatomy), self.about)

    def _refuse_without_weights(self, why: str, error: Exception) -> None:
        # An offloaded model brings its weights as they are needed.
        if hasattr(self.model, "hf_device_map"):
            return
        if any(one.is_meta or fakes.is_fake(one) for one in self.model.parameters()):
            raise MeasurementError(
                f"The work of {type(self.model).__name__} cannot be counted without its weights, as what it does "
                f"depends on data: load them, --weights real ({why})."
            ) from error

    def _followed(self, fake: nn.Module) -> pd.DataFrame:
        """Count a few tokens, and let the other steps follow if they lie on a line up to the last."""
        wanted = self.tokens
        if wanted is None or wanted <= FEW:
            return self._exactly(fake, wanted)
        few = self._exactly(fake, FEW)
        steps, line = _steps(few) - FEW + wanted, line_of(few)
        ends_on = None if line is None else self._ends_on(line, fake, steps)
        if line is not None and ends_on:
            self.about["line"] = "the last step was counted too, with a prompt as long as the context is then"
            return line.upto(steps)
        if wanted > MOST and line is not None and ends_on is None:
            line = line_of(self._exactly(fake, MOST))
            if line is not None:
                self.about["line"] = f"it held in the {MOST} steps that were counted"
                return line.upto(steps)
        return self._exactly(fake, wanted)

    def _exactly(self, fake: nn.Module, tokens: int | None) -> pd.DataFrame:
        """Count so many tokens. Raises MeasurementError if generate() makes others."""
        table = self._table(fake, _for_fakes(fake, self.kwargs, tokens))
        made = table.loc[table["phase"] == "decode", "step"].nunique() + 1
        if tokens is not None and made != tokens:
            raise MeasurementError(f"generate() made {made} steps of tokens without data, and {tokens} with them")
        self.about |= {"line": "", "steps_counted": _steps(table)}
        return table

    def _ends_on(self, line: Line, fake: nn.Module, steps: int) -> bool | None:
        """Tell whether the last step is on the line: the third of a prompt that is longer by the steps between.

        None if that cannot be counted, or if the prompt is read in several steps.
        """
        kwargs = _lengthened(self.kwargs, steps - 3)
        if kwargs is None or line.prefills > 1:
            return None
        operators, prompt_tokens = self.operators, self.about["prompt_tokens"]
        try:
            return line.meets(self._table(fake, _for_fakes(fake, kwargs, 3)), at=2, step=steps - 1)
        except Exception:
            return None
        finally:
            self.operators, self.about["prompt_tokens"] = operators, prompt_tokens

    def _table(self, model: nn.Module, kwargs: Mapping[str, Any]) -> pd.DataFrame:
        original = self.model if model is not self.model else None
        counter, scopes = Counter(model, original), Scopes()
        ledger = Ledger(scopes, now=counter.tick)
        follow = counter.following(scopes.list)
        instrument = Instrument(
            *(model, self.anatomy, ledger, self.granularity, None, follow, counter.begin_step),
            on_output=functools.partial(_note_cache, counter) if self.anatomy.path("decoder") is not None else None,
        )
        given = fresh(kwargs)
        counter.hold_cache(_filled(given.get("past_key_values")))
        with _eagerly(model), instrument, counter:
            model.generate(**given)  # type: ignore[operator]
        self.operators = operator_table(counter)
        self.about["packed"] = sorted(counter.packed)
        sums = np.array(counter.ticks, dtype=np.int64).reshape(-1, len(QUANTITIES))
        spans = Spans(ledger.marks(), scopes.list)
        self.about["prompt_tokens"] = int(np.maximum(spans.steps.tokens[spans.steps.prefill], 0).sum())
        return work_table(spans, sums)


def count(
    model: nn.Module,
    generate_kwargs: Mapping[str, Any],
    anatomy: Anatomy,
    *,
    granularity: Granularity = "layer",
    new_tokens: int | None = None,
) -> Work:
    """Return the work of model.generate(**generate_kwargs), counted in a pass of its own.

    It is counted on a copy whose weights have no data, so that ids, masks and media take the way they take and a large
    model needs no memory; where that cannot be done, because data decide what is done, on the model itself: `about` of
    the result says which, and why. `new_tokens` is how many steps of the measured generate() gave a token; of many,
    the later ones follow from the first if they lie on a line. The model and the random state are left as they were.

    Raises MeasurementError for a model without weights whose work depends on them, and what generate() raises.
    """
    with preserved_random_state():
        return Counting(model, generate_kwargs, anatomy, granularity, new_tokens).work()


def _gaps(operators: pd.DataFrame) -> dict[str, float]:
    """Return the operators that torch's own counter takes for nothing, and their share of the counted FLOPs."""
    silent = {f"aten::{name}" for name in formulas.gaps()}
    found = operators[operators["name"].isin(silent) & (operators["flops"] > 0)]
    shares = found["flops"] / max(int(operators["flops"].sum()), 1)
    return dict(zip(found["name"], map(float, shares), strict=True))


def _steps(table: pd.DataFrame) -> int:
    return int(table["step"].max()) + 1 if len(table) else 0


def _for_fakes(model: nn.Module, kwargs: Mapping[str, Any], tokens: int | None) -> dict[str, Any]:
    """Return generate()'s arguments for a model without data: so many tokens, and scores that are made real."""
    # Nobody shall be shown tokens that are none.
    given = {key: value for key, value in kwargs.items() if key != "streamer"}
    known = hasattr(model, "_get_logits_processor")
    if tokens is not None and (known or "max_new_tokens" in given):
        given["max_new_tokens"] = given["min_new_tokens"] = tokens
    if known:
        token = fakes.plain_token(getattr(model, "config", None), getattr(model, "generation_config", None))
        given["logits_processor"] = [*(given.get("logits_processor") or []), fakes.RealScores(token)]
    return given


def _lengthened(kwargs: Mapping[str, Any], tokens: int) -> dict[str, Any] | None:
    """Return arguments whose prompt has so many more tokens, all like its last; None if they hold no prompt."""
    name, prompt = next(
        ((one, value) for one in PROMPTS if isinstance(value := kwargs.get(one), torch.Tensor) and value.dim() > 1),
        ("", None),
    )
    if prompt is None:
        return None

    def longer(key: str, value: Any) -> Any:
        alike = isinstance(value, torch.Tensor) and value.shape == prompt.shape[:2]
        return torch.cat([value, value[:, -1:].repeat_interleave(tokens, 1)], 1) if alike or key == name else value

    return {key: longer(key, value) for key, value in kwargs.items()}


def _eagerly(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context in which nothing compiled runs: graphs hide their operators, and fakes need none."""
    compiled = any(is_compiled(module) for module in model.modules())
    if not compiled and device_of(model).type == "cpu":
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def _filled(given: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a cache that holds tokens: one made ahead of them may have room for them only."""
    length = getattr(given, "get_seq_length", None)
    if length is None or int(length()):
        yield from cache.tensors_of(given)


def _note_cache(counter: Counter, given: Mapping[str, Any], output: Any) -> None:
    """Tell the counter what the cache holds after a pass of the decoder."""
    with suppress(Exception):
        held = getattr(output, "past_key_values", None)
        counter.note_cache(cache.tensors_of(held if held is not None else given.get("past_key_values")))


def operator_table(counter: Counter) -> pd.DataFrame:
    """Return a row an operator that ran: name, calls, flops, operator_bytes, formula."""
    rows = [
        (name, one.calls, one.flops, one.operator_bytes, one.formula is not None)
        for name, one in counter.operators.items()
        if one.calls
    ]
    return pd.DataFrame(rows, columns=["name", "calls", "flops", "operator_bytes", "formula"])


def part_table(model: nn.Module, anatomy: Anatomy) -> pd.DataFrame:
    """Return a row a part: role, path, parameters, bytes, dtype (several, if it has several)."""
    rows = []
    for part in anatomy.parts:
        own = list(model.get_submodule(part.path).parameters())
        held = [inner for one in own for inner in plain_tensors(one)]
        dtypes = sorted({str(one.dtype).removeprefix("torch.") for one in held})
        count = sum(one.numel() for one in own)
        rows.append((part.role, part.path, count, sum(one.nbytes for one in held), ", ".join(dtypes)))
    return pd.DataFrame(rows, columns=["role", "path", "parameters", "bytes", "dtype"])
