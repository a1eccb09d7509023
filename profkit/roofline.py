"""How far from the limit: work and time against what the machine can do, by stage and by step."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from profkit import stages
from profkit import tables as time_tables
from profkit.ceilings import Ceilings
from profkit.spans import Spans
from profkit.tables import MS, Latency
from profkit.work import QUANTITIES, Work, with_bytes

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
BITS = (16, 8, 4)
ROLE_OF_STAGE = {
    "vision": "vision_tower",
    "audio": "audio_tower",
    "projector": "projector",
    "embed": "embed",
    "prefill": "decoder",
    "decode": "decoder",
    "head": "lm_head",
}
COMPUTE, MEMORY = "compute", "memory"


@dataclass(frozen=True)
class Limits:
    """A device's ceilings for a model: FLOP/s by stage (as the dtype of its part has it), bytes/s, s a launch."""

    ceilings: Ceilings
    dtype: str
    of_stage: Mapping[str, str] = field(default_factory=dict)
    """The dtype of a stage whose part has one of its own."""

    @classmethod
    def of(cls, ceilings: Ceilings, work: Work, dtype: str) -> Limits:
        """Return the limits for a model whose weights mostly have `dtype`; parts of another one keep theirs."""
        rows = work.parts.to_dict(orient="records")
        # Whole numbers are a way of keeping weights, not of computing with them.
        own = {str(row["role"]): str(row["dtype"]) for row in rows if re.fullmatch(r"b?float\w+", str(row["dtype"]))}
        return cls(ceilings, dtype, {name: own[role] for name, role in ROLE_OF_STAGE.items() if role in own})

    def flops_per_s(self, names: pd.Series) -> np.ndarray:
        """Return the measured FLOP/s for each of these stages, NaN where its dtype was not measured."""
        return np.array([self.ceilings.peak(self.dtype_of(str(name))) for name in names], dtype=float)

    def dtype_of(self, stage: str) -> str:
        """Return the dtype that a stage computes in."""
        return self.of_stage.get(stage, self.dtype)

    def unmeasured(self, by_stage: pd.DataFrame) -> dict[str, list[str]]:
        """Return the dtypes without a ceiling, with the stages that have FLOPs in them."""
        found: dict[str, list[str]] = {}
        for name in map(str, by_stage.index[by_stage["flops"] > 0]):
            if self.dtype_of(name) not in self.ceilings.flops_per_s:
                found.setdefault(self.dtype_of(name), []).append(name)
        return found


def floors(work: Work, limits: Limits) -> pd.DataFrame:
    """Return a row for each step and stage: step, phase, stage, QUANTITIES, bytes, compute_ms, memory_ms, floor_ms.

    compute_ms is FLOPs over measured FLOP/s, memory_ms bytes over measured bytes/s; the floor is the higher of both, as
    they can run at once (the roofline of Williams, Waterman and Patterson, 2009). launch_ms is what as many operators
    take from the host one by one: no law of nature, fewer or captured ones take less.
    """
    table = work.table.groupby(["step", "phase", "stage"], sort=False, as_index=False)[list(QUANTITIES)].sum()
    table = with_bytes(table)
    compute_ms = np.where(table["flops"] > 0, table["flops"] / limits.flops_per_s(table["stage"]) * 1e3, 0.0)
    memory_ms = table["bytes"] / limits.ceilings.bytes_per_s * 1e3
    return table.assign(
        compute_ms=compute_ms,
        memory_ms=memory_ms,
        floor_ms=np.fmax(compute_ms, memory_ms),
        launch_ms=table["operators"] * limits.ceilings.launch_s.median * 1e3,
    )


SUMMED = [*QUANTITIES, "bytes", "compute_ms", "memory_ms", "floor_ms", "launch_ms"]


def _summed(table: pd.DataFrame, key: str) -> pd.DataFrame:
    """Return SUMMED by a column; a sum of which one term is not known is not known."""
    grouped = table.groupby(key, sort=False)
    return grouped[SUMMED].sum().assign(compute_ms=grouped["compute_ms"].agg(lambda each: each.sum(skipna=False)))


def stage_table(work: Work, limits: Limits, times_ms: pd.Series | None = None) -> pd.DataFrame:
    """Return a row a stage with work: time_ms, FLOPs and bytes, and the answers.

    `times_ms` has the measured time of each stage; without it, the answers that need one are NaN. Columns: time_ms,
    SUMMED, then those of answered().
    """
    sums = _summed(floors(work, limits), "stage")
    sums = sums.reindex([name for name in stages.NAMES if name in sums.index])
    time_ms = np.nan if times_ms is None else times_ms.reindex(sums.index)
    sums.insert(0, "time_ms", time_ms)
    peak = limits.flops_per_s(sums.index.to_series())
    return answered(sums, peak, limits.ceilings.bytes_per_s)


def step_table(work: Work, limits: Limits, times_ms: np.ndarray | None = None) -> pd.DataFrame:
    """Return a row a step, its whole iteration: step, phase, counted, time_ms, SUMMED, and those of answered().

    `mbu` is that of Databricks: weight and cache bytes over the time of an output token, over bytes/s.
    """
    sums = _summed(floors(work, limits), "step").sort_index()
    sums.insert(0, "time_ms", np.nan)
    if times_ms is not None:
        at = sums.index[(sums.index >= 0) & (sums.index < len(times_ms))]
        sums.loc[at, "time_ms"] = times_ms[at]
    told = work.table.groupby("step", sort=True)[["phase", "counted"]].first()
    found = answered(sums, limits.ceilings.peak(limits.dtype), limits.ceilings.bytes_per_s)
    return told.join(found).reset_index()


def answered(table: pd.DataFrame, flops_per_s: Any, bytes_per_s: float) -> pd.DataFrame:
    """Return a table of time_ms and SUMMED with answers.

    intensity: FLOPs a byte. mfu: FLOPs over time and peak FLOP/s (PaLM, arXiv 2204.02311). mbu: weight and cache bytes
    over time and peak bytes/s (Databricks). attained: floor over time, that is FLOP/s over those attainable at this
    intensity; ratio is its inverse. binds: the limit that makes the floor, "" without one, and where the FLOP/s were
    not measured.
    """
    seconds = table["time_ms"] / 1e3
    needed = table["weight_bytes"] + table["cache_read_bytes"] + table["cache_written_bytes"]
    with np.errstate(divide="ignore", invalid="ignore"):
        return table.assign(
            intensity=table["flops"] / table["bytes"].where(table["bytes"] > 0),
            mfu=table["flops"] / seconds / flops_per_s,
            mbu=needed / seconds / bytes_per_s,
            attained=table["floor_ms"] / table["time_ms"],
            ratio=table["time_ms"] / table["floor_ms"].where(table["floor_ms"] > 0),
            binds=np.select(
                [
                    (table["floor_ms"] <= 0) | table["compute_ms"].isna(),
                    table["compute_ms"] > table["memory_ms"],
                ],
                ["", COMPUTE],
                MEMORY,
            ),
        )


@dataclass(frozen=True)
class Latencies:
    """Floors of TTFT and TPOT in ms, beside what was measured (NaN without a run)."""

    ttft_floor_ms: float
    tpot_floor_ms: float
    ttft_ms: float = float("nan")
    tpot_ms: float = float("nan")


def latencies(work: Work, limits: Limits, ttft_ms: float = float("nan"), tpot_ms: float = float("nan")) -> Latencies:
    """Return the floors: of TTFT all stages' up to the first token, of TPOT the mean of the decode steps'."""
    each = floors(work, limits)
    is_first = (each["phase"] == "prefill") | (each["step"] < 0)
    decode = each[~is_first].groupby("step")["floor_ms"].sum()
    return Latencies(float(each.loc[is_first, "floor_ms"].sum()), float(decode.mean()), ttft_ms, tpot_ms)


def what_if(work: Work, limits: Limits, batch: int = 1) -> pd.DataFrame:
    """Return what other batches and fewer bits would make of a decode step's floor: analytic, nothing was run.

    Columns: bits (of a weight; the first row's are those the model has), batch, floor_ms, tokens_per_s, binds, times
    (tokens/s over those of the model as it is). FLOPs, cache and activations grow with the batch, weights do not; fewer
    bits shrink the weights alone, and compute stays in the model's dtype, as with weight-only quantisation. Nothing
    where the bytes of the weights or the FLOP/s of their dtype are not known.
    """
    middle = work.table[work.table["phase"] == "decode"]
    peak, bytes_per_s = limits.ceilings.peak(limits.dtype_of("decode")), limits.ceilings.bytes_per_s
    if not len(middle) or math.isnan(peak) or work.about.get("packed"):
        return pd.DataFrame(columns=["bits", "batch", "floor_ms", "tokens_per_s", "binds", "times"])
    steps = middle["step"].nunique()
    flops, weights = middle["flops"].sum() / steps, middle["weight_bytes"].sum() / steps
    others = with_bytes(middle)["bytes"].sum() / steps - weights
    own_bits = 32 if limits.dtype == "float32" else 16
    fewer = BITS if _has_plain_weights(work) else ()
    chosen = [(own_bits, one) for one in sorted({batch, *BATCHES})] + [
        (bits, batch) for bits in fewer if bits < own_bits
    ]
    rows = []
    for bits, size in chosen:
        compute_ms = flops * size / batch / peak * 1e3
        memory_ms = (weights * bits / own_bits + others * size / batch) / bytes_per_s * 1e3
        floor_ms = max(compute_ms, memory_ms)
        rows.append((bits, size, floor_ms, size / floor_ms * 1e3, COMPUTE if compute_ms > memory_ms else MEMORY))
    table = pd.DataFrame(rows, columns=["bits", "batch", "floor_ms", "tokens_per_s", "binds"])
    own = table.loc[(table["bits"] == own_bits) & (table["batch"] == batch), "tokens_per_s"].iloc[0]
    return table.assign(times=table["tokens_per_s"] / own)


def _has_plain_weights(work: Work) -> bool:
    """Tell whether the decoder's weights are floating-point ones, which could be quantised still."""
    found = work.parts.loc[work.parts["role"] == "decoder_layers", "dtype"]
    return len(found) > 0 and all(one in ("float32", "bfloat16", "float16") for one in found)


@dataclass(frozen=True)
class MediaCost:
    """What the prompt's media tokens cost, of one sequence: in the prefill, and again in every later step.

    Analytic: the decoder's FLOPs are a·n + b·n² for n tokens of prompt, with a and b from the counted decode steps;
    the media's are those that fewer tokens would save. prefill_share is of the decoder's FLOPs; bytes are the media's
    part of the cache, read in every step, and step_floor_ms the time that reading it takes at least.
    """

    prompt_tokens: int
    media_tokens: int
    prefill_flops: float
    prefill_share: float
    step_flops: float
    step_cache_bytes: float
    step_floor_ms: float

    @property
    def text_tokens(self) -> int:
        """The prompt's other tokens."""
        return self.prompt_tokens - self.media_tokens


def media_cost(
    work: Work, limits: Limits, prompt_tokens: int, media_tokens: int | None, batch: int = 1
) -> MediaCost | None:
    """Return what media tokens cost; None where they are not known, or the decoder's work is no such polynomial."""
    table = work.decoder_steps()
    decode, prefill = table[table["phase"] == "decode"], table[table["phase"] == "prefill"]
    if media_tokens is None or len(decode) < 2 or not prompt_tokens:
        return None
    first, second = (decode.iloc[number] for number in (0, 1))
    slope = float(second["flops"] - first["flops"])
    constant = float(first["flops"]) - slope * (prompt_tokens + 1)
    whole = constant * prompt_tokens + slope * prompt_tokens**2
    counted = float(prefill["flops"].sum())
    if not counted or abs(whole / counted - 1) > 0.01:
        return None
    text = prompt_tokens - media_tokens
    without = constant * text + slope * text**2
    cache = float(second["cache_read_bytes"] - first["cache_read_bytes"]) * media_tokens
    return MediaCost(
        prompt_tokens,
        media_tokens,
        (whole - without) / batch,
        (whole - without) / whole,
        slope * media_tokens / batch,
        cache / batch,
        cache / batch / limits.ceilings.bytes_per_s * 1e3,
    )


def without_formula(work: Work, operators: pd.DataFrame | None) -> pd.DataFrame:
    """Return the operators that did work and have no FLOP formula, and their share of the operators' time.

    `operators` is that of a run's profiled pass (device_tables.operator_table); without it shares are NaN. Columns:
    name, calls, operator_bytes, share (0 to 1: of the device's time where there is one, else of the host's own time).
    """
    silent = work.operators[~work.operators["formula"].astype(bool)]
    found = silent[["name", "calls", "operator_bytes"]].assign(share=np.nan)
    if operators is not None and len(operators):
        clock, of_kind = _timed(operators)
        by_name = of_kind.groupby("name")[clock].sum()
        found["share"] = (found["name"].map(by_name) / max(float(by_name.sum()), 1 / MS)).fillna(0.0)
    return found.sort_values(["share", "operator_bytes"], ascending=False, ignore_index=True)


def silent_share(work: Work, operators: pd.DataFrame | None, names: pd.Index) -> np.ndarray:
    """Return for each stage the share of its operators' time (0 to 1) that no FLOP formula covers; NaN if unknown.

    It explains a low MFU that is not the model's: time in which nothing was counted.
    """
    if operators is None or not len(operators):
        return np.full(len(names), np.nan)
    clock, of_kind = _timed(operators)
    silent = set(work.operators.loc[~work.operators["formula"].astype(bool), "name"])
    all_ms = of_kind.groupby("stage")[clock].sum()
    silent_ms = of_kind[of_kind["name"].isin(silent)].groupby("stage")[clock].sum()
    return (silent_ms.reindex(all_ms.index, fill_value=0.0) / all_ms.where(all_ms > 0)).reindex(names).to_numpy()


def _timed(operators: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """Return the column of time, the device's where there is one, and the rows of operators alone."""
    return ("device_ms" if operators["device_ms"].sum() > 0 else "self_ms"), operators[operators["kind"] == "operator"]


@dataclass(frozen=True)
class Roofline:
    """Every answer for one run, or, without times, for one count of work. See the functions that make each."""

    stages: pd.DataFrame
    steps: pd.DataFrame
    latencies: Latencies
    what_if: pd.DataFrame
    media: MediaCost | None
    without_formula: pd.DataFrame
    limits: Limits
    work: Work
    clock: str = ""
    """The clock that times are of: host or device; "" without."""
    prompt_tokens: int = 0
    media_tokens: int | None = None
    """How many of the prompt's tokens are media; None where that is unknown."""


def answers(
    work: Work,
    ceilings: Ceilings,
    dtype: str,
    *,
    spans: Spans | None = None,
    latency: Latency | None = None,
    operators: pd.DataFrame | None = None,
    batch: int = 1,
    media_tokens: int | None = None,
) -> Roofline:
    """Return every answer of one generate(): of a run's pass `spans`, with its latency and operators, or without times.

    Stages are timed on the device's clock where there is one; steps are whole iterations, on the host's.
    """
    limits = Limits.of(ceilings, work, dtype)
    times = None if spans is None else stage_times(spans)
    clock = "" if times is None else times.columns[0].removesuffix("_ms")
    iterations = None if spans is None else time_tables.step_table(spans)["iteration_ms"].to_numpy()
    measured = {} if latency is None else {"ttft_ms": latency.ttft_ms, "tpot_ms": latency.tpot_ms}
    prompt = latency.prompt_tokens if latency is not None else int(work.about.get("prompt_tokens") or 0)
    by_stage = stage_table(work, limits, None if times is None else times.iloc[:, 0])
    return Roofline(
        by_stage.assign(no_formula=silent_share(work, operators, by_stage.index)),
        step_table(work, limits, iterations),
        latencies(work, limits, **measured),
        what_if(work, limits, batch),
        media_cost(work, limits, prompt, media_tokens, batch),
        without_formula(work, operators),
        limits,
        work,
        str(clock),
        prompt,
        media_tokens,
    )


def stage_times(spans: Spans) -> pd.DataFrame:
    """Return one column with each stage's time: device_ms where a device was timed, else host_ms."""
    table = time_tables.stage_table(spans)
    return table[["device_ms" if table["device_ms"].notna().any() else "host_ms"]]
