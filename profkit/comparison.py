"""Runs side by side: stages with intervals, ratios, equal work, and what makes two runs unlike."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profkit import run as runs
from profkit import stages, stats, tables, work_comparison
from profkit.errors import InputError
from profkit.sample_runs import SampleRun, Saved, load_any

WORK = {
    "new_tokens": "output length",
    "prompt_tokens": "prompt tokens",
    "media_items": "images or frames",
    "batch": "batch",
}
TOTAL, OUTPUT_LENGTH = "total", "a new token"
GATE = re.compile(r"\s*([\w ]+?)\s*>\s*(\d+(?:\.\d+)?)\s*%\s*")


@dataclass(frozen=True)
class Measured:
    """What a run measured, one row a sample or repeat: host time in ms by stage, and the work it was for.

    `work` has columns prompt_tokens, new_tokens, batch and media_items (images or frames; NaN where not known); `ids`
    tell samples apart, None for repeats; `contents` are hashes of their files and prompts, "" where unknown.
    """

    name: str
    about: dict[str, Any]
    times: pd.DataFrame
    work: pd.DataFrame
    ids: list[str] | None
    contents: list[str] = field(default_factory=list)
    counted: dict[str, float] = field(default_factory=dict)
    """FLOPs, bytes and how far from the limit, where a run has them: see work_comparison.figures_of()."""

    @property
    def failed(self) -> list[str]:
        """The checks that the run failed: its figures are not to be trusted."""
        verdicts = (self.about.get("checks") or {}).get("verdicts") or []
        return [one["check"] for one in verdicts if one["ok"] is False]


def measured(one: Saved) -> Measured:
    """Return what a run measured, whether of one sample or of many."""
    found = of_samples(one) if isinstance(one, SampleRun) else of_run(one)
    return replace(found, name=f"{found.name} ({one.path.name})") if one.path else found


def read(path: Path) -> Measured:
    """Return what a saved run measured, or the figures that a .json file tells of one: see of_figures().

    Raises InputError if it is neither.
    """
    if not path.is_file():
        return measured(load_any(path))
    try:
        return of_figures(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is neither a run's directory nor a file of figures ({type(error).__name__}: {error}): that has "
            "name, stages_ms, unsplit_ms and new_tokens."
        ) from error


def told_apart(measured: Sequence[Measured]) -> list[Measured]:
    """Return runs with names of their own: those of one name get numbers."""
    if len({one.name for one in measured}) == len(measured):
        return list(measured)
    return [replace(one, name=f"{number}: {one.name}") for number, one in enumerate(measured, start=1)]


def of_figures(told: Mapping[str, Any]) -> Measured:
    """Return published figures as one row: name, stages_ms (ms by stage), unsplit_ms (what nobody split), new_tokens.

    What was not split counts as `other`; where decoding is not told apart, a token's time is that of everything inside
    generate() by its tokens.
    """
    strange = sorted(set(told.get("stages_ms", {})) - set(stages.NAMES))
    if strange:
        raise InputError(
            f"{told['name']}: there are no stages {', '.join(strange)}; they are {', '.join(stages.NAMES)}."
        )
    numbers = [*told.get("stages_ms", {}).values(), told["unsplit_ms"], told["new_tokens"]]
    if not all(isinstance(one, int | float) and 0 <= one < float("inf") for one in numbers) or not told["new_tokens"]:
        raise ValueError("its times must be numbers of ms, not negative, and new_tokens more than none")
    times = pd.DataFrame([{**told.get("stages_ms", {}), "other": float(told["unsplit_ms"])}], dtype=float)
    work = pd.DataFrame([{"new_tokens": float(told["new_tokens"])}]).reindex(columns=list(WORK))
    about = {"device_name": told.get("device"), "published": told.get("source", "")}
    return Measured(str(told["name"]), about, _present(times), work, None)


def of_run(run: runs.Run) -> Measured:
    """Return the clean passes of a run as rows. Raises InputError if there is none that can be read."""
    if not run.clean:
        raise InputError(f"{run.path or 'A run'} holds no clean pass that can be read: there is nothing to compare.")
    times = pd.DataFrame([tables.stage_ns(spans) / 1e6 for spans in run.clean], columns=list(stages.NAMES))
    call = (run.manifest.get("calls") or [{}])[0]
    found = run.latency()
    work = {
        "prompt_tokens": found.prompt_tokens,
        "new_tokens": found.new_tokens,
        "batch": call.get("batch") or 1,
        "media_items": run.manifest.get("media_items", np.nan),
    }
    rows = pd.DataFrame([work] * len(times))
    together = run.manifest.get("together")
    # Repeats that were made in turn with another run's are pairs with them.
    ids = [f"{together} {number}" for number in range(len(times))] if together else None
    name = str(run.manifest.get("model") or run.anatomy.model_class)
    return Measured(name, run.manifest, _present(times), rows, ids, counted=work_comparison.figures_of(run))


def of_samples(run: SampleRun) -> Measured:
    """Return the good samples of a run as rows. Raises InputError if there is none."""
    if not len(run.good):
        raise InputError(f"{run.path} holds no sample that was measured: there is nothing to compare.")
    work = run.good.reindex(columns=list(WORK)).reset_index(drop=True)
    times = run.by_stage.reset_index(drop=True)
    contents = run.good.get("content", pd.Series("", index=run.good.index)).fillna("")
    name = str(run.manifest.get("model"))
    return Measured(name, run.manifest, times, work, run.good["id"].tolist(), contents.tolist())


def _present(times: pd.DataFrame) -> pd.DataFrame:
    return times[[name for name in times if times[name].any()]]


def compare(base: Measured, other: Measured) -> pd.DataFrame:
    """Return a row a stage, one for the total, and rows of equal work.

    Columns: base_ms and other_ms (medians), base_low, base_high, other_low, other_high (95 % intervals of the
    medians), ratio (other over base), ratio_low, ratio_high, differs (stats.differ(), at a level lowered for the
    number of rows, so that in 95 % of comparisons of one thing with itself no row differs), enough (stats.can_differ():
    with fewer repeats no difference whatever would be told from chance).
    Where both runs measured the same samples, or repeats in turn, ratios are paired: the median of the pairs' own.
    """
    one, two, paired = _aligned(base, other)
    quantities: dict[str, Callable[[Measured], pd.Series]] = {
        **{name: _stage(name) for name in stages.NAMES if name in one.times and name in two.times},
        TOTAL: lambda measured: measured.times.sum(axis=1),
        "encoding an image or frame": _encoding,
        "prefill a prompt token": _per("prefill", "prompt_tokens"),
        "decode a step": _per("decode", "new_tokens", less=1),
        OUTPUT_LENGTH: lambda measured: measured.times.sum(axis=1) / measured.work["new_tokens"],
    }
    values = {name: (value(one), value(two)) for name, value in quantities.items()}
    known = {name: pair for name, pair in values.items() if all(one.notna().any() for one in pair)}
    rows = {name: _row(a, b, paired, len(known)) for name, (a, b) in known.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what")


def _stage(name: str) -> Callable[[Measured], pd.Series]:
    # A stage that a sample has not (one new token needs no decode step) has no time, rather than none at all.
    return lambda measured: measured.times[name].where(measured.times[name] > 0)


def _encoding(measured: Measured) -> pd.Series:
    """Return what comes before the language model (towers, projector, merge), for each image or frame."""
    names = [name for name in measured.times if stages.BY_NAME[str(name)].group is stages.ENCODE]
    units = measured.work["media_items"].astype(float)
    if not names:
        return pd.Series(np.nan, index=units.index)
    return measured.times[names].sum(axis=1) / units.where(units > 0)


def _per(stage: str, work: str, less: int = 0) -> Callable[[Measured], pd.Series]:
    def value(measured: Measured) -> pd.Series:
        units = (measured.work[work] - less).astype(float)
        times = measured.times.get(stage, pd.Series(np.nan, index=units.index))
        return times.where(times > 0) / units.where(units > 0)

    return value


def _aligned(base: Measured, other: Measured) -> tuple[Measured, Measured, bool]:
    """Return both runs in the order of the samples they share, if they share any: by id, and by content where known."""
    if base.ids is None or other.ids is None:
        return base, other, False
    theirs, mine = (dict(zip(one.ids or [], one.contents, strict=False)) for one in (other, base))
    shared = [one for one in base.ids if one in set(other.ids) and _agree(mine.get(one), theirs.get(one))]
    if not shared:
        return base, other, False
    return _rows_of(base, shared), _rows_of(other, shared), True


def _agree(one: str | None, other: str | None) -> bool:
    return one == other or not one or not other


def _rows_of(measured: Measured, ids: list[str]) -> Measured:
    place = {one: number for number, one in enumerate(measured.ids or [])}
    rows = [place[one] for one in ids]
    times, work = (table.iloc[rows].reset_index(drop=True) for table in (measured.times, measured.work))
    contents = [measured.contents[row] for row in rows] if measured.contents else []
    return replace(measured, times=times, work=work, ids=ids, contents=contents)


def _row(one: pd.Series, two: pd.Series, paired: bool, rows: int) -> dict[str, Any]:
    a, b = one.to_numpy(dtype=float), two.to_numpy(dtype=float)
    if paired:
        whole = np.isfinite(a) & np.isfinite(b)
        a, b = a[whole], b[whole]
    else:
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    low, high = stats.ratio_interval(a, b, paired)
    return {
        "base_ms": stats.median(a),
        **dict(zip(("base_low", "base_high"), stats.median_interval(a), strict=True)),
        "other_ms": stats.median(b),
        **dict(zip(("other_low", "other_high"), stats.median_interval(b), strict=True)),
        "ratio": stats.median_ratio(a, b, paired),
        "ratio_low": low,
        "ratio_high": high,
        "differs": stats.differ(a, b, paired, rows),
        "enough": stats.can_differ(len(a), len(b), paired, rows),
    }


def unlike(base: Measured, other: Measured) -> list[str]:
    """Return a sentence for each thing, other than the model, in which two runs are not alike."""
    found = []
    if base.about.get("published") is not None or other.about.get("published") is not None:
        found.append("published figures: what they were measured with is not known here")
    for key, said in (
        *(("device_name", "device"), ("dtype", "dtype"), ("attention", "attention kernel"), ("threads", "threads")),
        *(("weights", "weights"), ("platform", "platform")),
    ):
        one, two = base.about.get(key), other.about.get(key)
        if one != two:
            found.append(f"{said}: {one} and {two}")
    ranks = base.about.get("ranks", 1), other.about.get("ranks", 1)
    if ranks[0] != ranks[1]:
        found.append(f"ranks that ran at once: {ranks[0]} and {ranks[1]}")
    versions = base.about.get("versions") or {}, other.about.get("versions") or {}
    every = sorted(set(versions[0]) | set(versions[1]))
    found += [f"{name}: {a} and {b}" for name in every if (a := versions[0].get(name)) != (b := versions[1].get(name))]
    one, two, paired = _aligned(base, other)
    found += _other_work(one.work, two.work, paired)
    plans = base.about.get("plan") or {}, other.about.get("plan") or {}
    found += [
        f"{key}: {a} and {b}"
        for key in ("warmup", "granularity")
        if (a := plans[0].get(key)) != (b := plans[1].get(key))
    ]
    if base.ids is not None and other.ids is not None:
        named, shared = len(set(base.ids) & set(other.ids)), len(one.ids or []) if paired else 0
        if named > shared:
            found.append(f"contents: {named - shared} of {named} samples have one id and other files or prompts")
        if set(base.ids) != set(other.ids):
            found.append(f"samples: {len(base.ids)} and {len(other.ids)}, {named} ids in both")
    return found


def _other_work(one: pd.DataFrame, two: pd.DataFrame, paired: bool) -> Iterator[str]:
    """Yield in what two runs' work differs: sample by sample where they are the same, else in the median."""
    for key, said in WORK.items():
        a, b = one[key].astype(float), two[key].astype(float)
        middle = [stats.median(values.dropna().to_numpy()) for values in (a, b)]
        differ = int((a.fillna(-1) != b.fillna(-1)).sum()) if paired else 0
        if middle[0] != middle[1] and not np.isnan(middle).all():
            yield f"{said}: {middle[0]:g} and {middle[1]:g} (medians)"
        elif differ and not np.isnan(middle).all():
            yield f"{said}: other in {differ} of {len(a)} samples"


@dataclass(frozen=True)
class Gap:
    """The difference of two runs' totals, in ms (medians), split: what output length makes, and what is left at equal
    length.

    At equal length means: the longer run's decoding cut to the other's new tokens, at its own time a step. Of figures
    in which decoding was not split off, a step is generate()'s time by its tokens.
    """

    total_ms: float
    output_length_ms: float

    @property
    def rest_ms(self) -> float:
        """What remains at equal output length."""
        return self.total_ms - self.output_length_ms

    def sentence(self, base: str, other: str) -> str:
        """Return the split in words."""
        if not self.total_ms:
            return f"{base} and {other} take the same time."
        slower, faster = (other, base) if self.total_ms > 0 else (base, other)
        said = f"{slower} takes {abs(self.total_ms):.1f} ms longer than {faster}"
        if not self.output_length_ms:
            return f"{said}; both make outputs of the same length."
        made = self.output_length_ms if self.total_ms > 0 else -self.output_length_ms
        most = "most of it, " if abs(self.total_ms) / 2 < made <= abs(self.total_ms) else ""
        at_equal, less = (other, base) if self.rest_ms > 0 else (base, other)
        return (
            f"{said}; output length makes {most}{made:.1f} ms, and at equal length {at_equal} takes "
            f"{abs(self.rest_ms):.1f} ms longer than {less}."
        )


def gap(base: Measured, other: Measured) -> Gap:
    """Return how far the totals of two runs differ, and how much of it is output length alone.

    Of the samples that both measured, if there are any, as compare() does.
    """
    base, other, _ = _aligned(base, other)
    total = [stats.median(measured.times.sum(axis=1).to_numpy()) for measured in (base, other)]
    tokens = [stats.median(measured.work["new_tokens"].to_numpy(dtype=float)) for measured in (base, other)]
    steps = [stats.median(_step_ms(measured).dropna().to_numpy()) for measured in (base, other)]
    # The longer one's own time a step: what it would save by stopping where the other does.
    step = steps[1] if tokens[1] > tokens[0] else steps[0]
    made = (tokens[1] - tokens[0]) * step if tokens[0] != tokens[1] else 0.0
    return Gap(total[1] - total[0], made)


def _step_ms(measured: Measured) -> pd.Series:
    """Return the time of a decode step; where nobody split it off, that of generate() by its tokens."""
    if "decode" in measured.times or "prefill" in measured.times:
        return _per("decode", "new_tokens", less=1)(measured)
    return measured.times.get("other", pd.Series(dtype=float)) / measured.work["new_tokens"]


def gate(condition: str, table: pd.DataFrame) -> str:
    """Return why a comparison fails a condition such as "prefill > 5%", "" if it passes.

    It fails if the ratio is higher than allowed and its interval lies above 1: a difference within the noise is none.
    Raises InputError for a condition that cannot be read.
    """
    match = GATE.fullmatch(condition)
    if match is None or match[1] not in table.index:
        known = ", ".join(map(str, table.index))
        raise InputError(f"--fail-if {condition!r} is not WHAT > PERCENT%, with WHAT one of: {known}.")
    row, allowed = table.loc[match[1]], float(match[2])
    slower = (row["ratio"] - 1) * 100
    if slower <= allowed or row["ratio_low"] <= 1:
        return ""
    unknown = np.isnan(row["ratio_low"])
    interval = "unknown, too few repeats" if unknown else f"{row['ratio_low']:.3f} to {row['ratio_high']:.3f}"
    return f"{match[1]} is {slower:.1f} % slower (95 % interval of the ratio: {interval})"
