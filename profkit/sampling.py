"""Many samples, one after the other: a row each, appended as it comes, so that nothing measured is ever lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from profkit import environment, samples, stages, tables
from profkit.anatomy import PartNames
from profkit.capture import call_dict
from profkit.directories import plain
from profkit.errors import InputError, MeasurementError, ProfkitError
from profkit.page_cache import are_cached
from profkit.passes import Plan as Passes
from profkit.passes import Tracing
from profkit.plan import Granularity
from profkit.ranks import ALONE, Ranks
from profkit.sample_lists import Item
from profkit.sample_runs import SampleRun, drop_half_line, load_rows, merge, rows_file
from profkit.sample_runs import write_manifest as write
from profkit.spans import Spans

PARTS = "preprocess()."
Progress = Callable[[int, int, int], None]
"""Called after each sample with how many are done, how many there are, and how many failed."""


@dataclass
class Plan:
    """What measure() is to do; see there."""

    max_new_tokens: int
    prompt: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 1
    granularity: Granularity = "layer"
    seed: int | None = 0
    parts: PartNames | None = None
    reading: samples.Reading = samples.PLAIN
    fail_fast: bool = False
    resume: bool = False
    progress: Progress = lambda done, total, failed: None


def measure(
    model: nn.Module,
    processor: Any,
    items: Sequence[Item],
    out: Path,
    plan: Plan,
    manifest: dict[str, Any],
    ranks: Ranks = ALONE,
) -> SampleRun:
    """Measure generate() once for each sample, and return the run; rows are in `out` as they come.

    A sample that cannot be read or generated from has a row with its error, and the next one follows, unless
    `fail_fast`. With `resume`, samples that `out` has a good row for are left out. Each sample's own files are read
    inside the measurement; the first is also run `warmup` times before. Several ranks share the samples, each with a
    file of its own; rank 0 puts them together once all are done.

    Raises InputError for an `out` that cannot be used, MeasurementError if fail_fast stopped, LostRankError on rank 0
    if another rank ended early: the rows are there, and `resume` goes on with the samples that have none.
    """
    manifest = {**manifest, "listed": len(items), "ranks": ranks.world}
    done = ranks.first(lambda: _opened(out, plan, manifest, {item.id: item.fingerprint for item in items}))
    waiting = ranks.share([item for item in items if item.id not in done])
    failed = 0
    out.mkdir(parents=True, exist_ok=True)
    path = out / rows_file(ranks.rank, ranks.world)
    drop_half_line(path)
    with path.open("a", encoding="utf-8") as file:
        rows = _rows(model, processor, waiting, plan)
        for number, (item, row) in enumerate(zip(waiting, rows, strict=False), start=1):
            file.write(json.dumps(plain({"id": item.id, "rank": ranks.rank, **row}), ensure_ascii=False) + "\n")
            # What is flushed survives the process, however it ends.
            file.flush()
            failed += row["error"] != ""
            plan.progress(len(done) + number, len(done) + len(waiting), failed)
            if row["error"] and plan.fail_fast:
                raise MeasurementError(f"Sample {item.id}: {row['error']} (stopped, as --fail-fast says).")
    shares = ranks.gathered((path.name, path.read_bytes()))
    if shares is not None:
        # A rank on another machine has written to a disk of its own.
        for name, content in shares if len(shares) > 1 else ():
            (out / name).write_bytes(content)
        merge(out, [item.id for item in items])
        write(out, {**manifest, "complete": True})
    return SampleRun.load(out, partial=shares is None)


def _opened(out: Path, plan: Plan, manifest: dict[str, Any], listed: Mapping[str, str]) -> set[str]:
    """Make the directory, or take one to resume, and return the ids that have a good row."""
    if out.exists() and not plan.resume:
        raise InputError(f"{out} already exists: --resume goes on with it, or choose another --out.")
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        write(out, {**manifest, "complete": False})
        return set()
    earlier = SampleRun.load(out, partial=True).manifest
    alike = ("model", "plan", "dtype", "device", "weights", "attention")
    changed = [key for key in alike if earlier.get(key) != plain(manifest).get(key)]
    if changed:
        raise InputError(f"{out} was measured with another {', '.join(changed)}: choose another --out.")
    rows = load_rows(out)
    given = rows["listed"].fillna("") if "listed" in rows else [""] * len(rows)
    other = {one for one, told in zip(rows["id"], given, strict=True) if told and told != listed.get(one, told)}
    if strange := sorted((set(rows["id"]) - set(listed)) | other):
        raise InputError(
            f"{out} holds {len(strange)} samples that are not in this list (the first: {strange[0]}): resume with the "
            "list and the --limit it was made with, or choose another --out."
        )
    merge(out, [])
    write(out, {**manifest, "complete": False})
    return set(rows.loc[rows["error"] == "", "id"]) if len(rows) else set()


def _rows(model: nn.Module, processor: Any, items: Sequence[Item], plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield a row a sample."""
    tracing: Tracing | None = None
    for item in items:
        begin = time.perf_counter()
        row: dict[str, Any] = {"error": item.error}
        if not item.error:
            with _errors_in(row):
                prompt = plan.prompt or item.prompt
                sample = samples.sample_for(
                    processor, model, item.files, prompt, plan.max_new_tokens, False, plan.reading, item.media
                )
                tracing = tracing or _warm(model, sample, plan)
                # Asked when the sample's turn comes: the first one's files were read by the warm-up.
                row["cached"] = are_cached(item.files)
                row |= _measured(tracing, sample)
                row["content"] = sample.content
            row["listed"] = item.fingerprint
        row["wall_ms"] = (time.perf_counter() - begin) * 1000
        yield row


@contextmanager
def _errors_in(row: dict[str, Any]) -> Iterator[None]:
    """Note what the body raises in a row; other samples may be better."""
    try:
        yield
    except ProfkitError as error:
        row["error"] = str(error)
    except Exception as error:
        # What a library makes of a damaged file; --fail-fast stops at it.
        row["error"] = f"Unexpected {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _warm(model: nn.Module, sample: samples.Sample, plan: Plan) -> Tracing:
    """Find the model's parts and run the first sample before it counts."""
    passes = Passes(warmup=0, repeat=1, granularity=plan.granularity, profile=False, seed=plan.seed)
    tracing = Tracing(model, sample, plan.options, None, plan.parts, passes)
    tracing.find_parts()
    for _ in range(plan.warmup):
        tracing.control()
    return tracing


def _measured(tracing: Tracing, sample: samples.Sample) -> dict[str, Any]:
    """Run one sample and return its figures; nothing of it stays behind."""
    tracing.sample, tracing.calls, tracing.faults, tracing.notes = sample, [], [], []
    for kept in tracing.tokens.values():
        kept.clear()
    spans = tracing.clean().spans
    assert spans is not None
    spans.check()
    repeats = (tracing.encoded or {}).get("repeats", [])
    return {
        **_figures(spans, call_dict(tracing.calls[0])),
        "media_items": sample.media_items,
        "notes": [*tracing.faults, *tracing.notes, *(f"encoded twice: {one['sentence']}" for one in repeats)],
        "faults": len(tracing.faults),
        "encoded_again_ms": sum(one["lost_ms"] for one in repeats),
    }


def _figures(spans: Spans, call: dict[str, int | None]) -> dict[str, Any]:
    """Return a sample's figures: ns by stage and by part of preprocessing, latency, tokens."""
    by_stage = tables.stage_ns(spans)
    occurring = {stages.NAMES[one]: int(by_stage[one]) for one in np.flatnonzero(by_stage).tolist()}
    begins = [scope.path.startswith(PARTS) for scope in spans.scopes]
    rows = np.flatnonzero(np.array(begins, dtype=bool)[spans.scope])
    found = tables.latency(spans, call["batch"] or 1, call["new_tokens"])
    return {
        "stages_ns": occurring,
        "parts_ms": {
            spans.scopes[spans.scope[row]].path.removeprefix(PARTS): int(spans.total_ns[row]) / 1e6
            for row in rows.tolist()
        },
        "total_ns": int(by_stage.sum()),
        **asdict(found),
    }


def describe(model: nn.Module, plan: Plan, about: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a run over samples."""
    told = {
        key: value for key, value in vars(plan).items() if key not in ("progress", "resume", "fail_fast", "reading")
    }
    told |= vars(plan.reading)
    return {**environment.describe(model), **about, "plan": told, "started_unix_ms": int(time.time() * 1000)}
