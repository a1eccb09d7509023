"""The tables of a saved run as they are read back: what is damaged or lacking is named, the rest is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profkit.ledger import Marks, Scope
from profkit.spans import Spans
from profkit.tables import Latency
from profkit.work import QUANTITIES


@dataclass(frozen=True)
class Shape:
    """The columns of a table: those without which it tells nothing, and others, of texts and of numbers."""

    needed: tuple[str, ...]
    texts: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()


SHAPES = {
    "operators": Shape(
        ("name",),
        ("kind", "stage", "path"),
        ("calls", "total_ms", "self_ms", "kernels", "device_ms", "steps"),
    ),
    "kernels": Shape(
        ("name",),
        ("kind", "stage", "path", "operator"),
        ("count", "total_ms", "mean_us", "share", "steps"),
    ),
    "device": Shape(
        ("device", "stage"),
        ("verdict", "evidence"),
        ("steps", "busy_ms", "sum_ms", "idle_ms", "launches_per_step"),
    ),
    "timeline": Shape(("step", "row", "lane", "name", "start_ms", "duration_ms"), ("stage", "kind")),
    "memory": Shape(("stage", "peak"), (), ("allocated_before", "allocated_after", "reserved_after")),
    "work": Shape(("step", "phase", "stage", "path", "counted", *QUANTITIES)),
    "trees": Shape(("clock", "id", "parent", "label", "level", "calls", "total_ms", "self_ms")),
    "stages": Shape(("stage", "host_ms"), (), ("calls", "host_ns", "device_ms", "busy_ms", "share")),
    "steps": Shape(("phase", "host_ms"), (), ("call", "step", "tokens", "device_ms", "iteration_ms")),
    "modules": Shape(("path",), ("stage",), ("calls", "total_ms", "self_ms", "device_ms")),
}
LATER = {"timeline": {"kind"}}
"""Columns that runs of this schema may be without, as they were made before there were any."""


@dataclass(frozen=True)
class Kept:
    """What a run says of its clean passes where their marks cannot be read; None where that cannot be read either."""

    stages: pd.DataFrame | None = None
    spread: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    modules: pd.DataFrame | None = None
    latency: Latency | None = None


def read(path: Path, unreadable: list[str]) -> pd.DataFrame | None:
    """Return a table with all its columns, empty where the file lacks them; None without a table.

    What is wrong with the file is added to `unreadable`, a sentence each.
    """
    if not path.exists():
        return None
    try:
        found = pd.read_parquet(path)
    except Exception as error:
        unreadable.append(f"{path.name} is damaged, so its table is missing: {type(error).__name__}")
        return None
    shape = SHAPES[path.stem]
    lacking = [name for name in (*shape.needed, *shape.texts, *shape.numbers) if name not in found]
    lacking += [name for name in shape.numbers if name in found and not pd.api.types.is_numeric_dtype(found[name])]
    told = sorted(set(lacking) - LATER.get(path.stem, set()))
    said = f"{path.name} lacks {', '.join(told)}"
    if set(lacking) & set(shape.needed):
        unreadable.append(f"{said}, so its table is missing")
        return None
    if told:
        unreadable.append(f"{said}: what needs it is missing")
    return found.assign(**{name: "" if name in shape.texts else float("nan") for name in lacking})


def work(folder: Path, unreadable: list[str]) -> pd.DataFrame | None:
    """Return the table of a run's counted work; None, which is said, if the file is gone, empty or damaged."""
    path = folder / "work.parquet"
    found = read(path, unreadable)
    if found is not None and len(found):
        return found
    if found is not None or not path.exists():
        unreadable.append(f"{path.name} {'is gone' if found is None else 'is empty'}, so the counted work is missing")
    return None


def kept(folder: Path, latency: Mapping[str, Any] | None, unreadable: list[str]) -> Kept:
    """Return what was saved of the clean passes beside their marks; `latency` is what the manifest tells of it."""
    tables = {name: read(folder / f"{name}.parquet", unreadable) for name in ("stages", "steps", "modules")}
    return Kept(spread=_spread(folder / "breakdown.csv"), latency=_latency(latency), **tables)


def _spread(path: Path) -> pd.DataFrame | None:
    try:
        return pd.read_csv(path, index_col="stage")[["median_ms", "p10_ms", "p90_ms"]]
    except (OSError, ValueError, KeyError):
        return None


def _latency(told: Mapping[str, Any] | None) -> Latency | None:
    figures: dict[str, Any]
    try:
        figures = {name: float("nan") if value is None else value for name, value in (told or {}).items()}
        return Latency(**figures)
    except TypeError:
        return None


def marks_frame(number: int, spans: Spans) -> pd.DataFrame:
    """Return the marks of a pass as they are saved, under the pass's number."""
    marks = spans.marks
    columns = {"code": marks.code, "thread": marks.thread, "host_ns": marks.host_ns}
    return pd.DataFrame(
        {"pass": np.int16(number), **columns, "device_ns": marks.device_ns, "note": marks.note},
    )


def spans_of(frame: pd.DataFrame, number: int, scopes: list[Scope]) -> Spans | None:
    """Return the spans of a pass from the marks of all; None if it has none."""
    rows = frame[frame["pass"] == number]
    if not len(rows):
        return None
    columns = [rows[name].to_numpy() for name in ("code", "thread", "host_ns", "device_ns", "note")]
    return Spans(Marks(*columns), scopes)
