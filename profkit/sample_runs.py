"""A run over many samples, as a directory that grows row by row and can be read at any time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from profkit import directories, stages, stats
from profkit import run as runs
from profkit.directories import plain
from profkit.errors import InputError
from profkit.run import Run

ROWS, MANIFEST, SCHEMA = "samples.jsonl", "run.json", 1
KIND = "samples"
MS = 1e6
LATENCIES = ("ttft_ms", "tpot_ms", "itl_p50_ms", "tokens_per_s", "prefill_tokens_per_s")
OPTIONAL: dict[str, float | None] = {
    **dict.fromkeys(("total_ns", "encoded_again_ms"), float("nan")),
    **dict.fromkeys(("cached", "notes"), None),
}
"""Columns that readers ask for, and what stands in them where no row has any."""


@dataclass(repr=False)
class SampleRun:
    """Measurements over many samples, one pass each.

    `rows` has a row a sample: id, rank (of the process that measured it), error ("" if none), cached (whether its
    files were in the page cache, None if unknown), total_ns, ns by stage as `stage:<name>`, ms by part of
    preprocessing as `part:<name>`, latency figures, tokens.
    """

    manifest: dict[str, Any]
    rows: pd.DataFrame
    path: Path
    unreadable: list[str] = field(default_factory=list)
    """What of a saved run could not be read, a sentence each."""

    def __repr__(self) -> str:
        return f"<SampleRun of {self.manifest.get('model')}: {len(self.good)} samples, {len(self.bad)} in error>"

    @classmethod
    def load(cls, path: str | os.PathLike[str], partial: bool = False) -> SampleRun:
        """Read a run; with `partial`, also one of which no row was written yet. Raises InputError if it is none."""
        folder = Path(path)
        manifest = _manifest(folder)
        if manifest.get("kind") != KIND:
            raise InputError(f"{folder} is a run of one sample, not of many.")
        directories.check_schema(folder, manifest)
        rows = load_rows(folder)
        if not len(rows) and not partial:
            raise InputError(f"{folder} holds no sample that was measured.")
        unreadable = _damage(folder)
        if len(rows) and "total_ns" not in rows:
            unreadable.append(f"the rows of {folder.name} lack total_ns: whether stages sum to it cannot be checked")
        empty = {name: value for name, value in OPTIONAL.items() if name not in rows}
        return cls(manifest, rows.assign(**empty), folder, unreadable)

    @property
    def good(self) -> pd.DataFrame:
        """The rows of samples that were measured."""
        return self.rows[self.rows["error"] == ""]

    @property
    def bad(self) -> pd.DataFrame:
        """The rows of samples that could not be."""
        return self.rows[self.rows["error"] != ""]

    @cached_property
    def by_stage(self) -> pd.DataFrame:
        """A row a good sample, a column a stage in its order: host time in ms, 0 where a stage did not occur."""
        names = [name for name in stages.NAMES if f"stage:{name}" in self.good]
        return self.good[[f"stage:{name}" for name in names]].fillna(0).set_axis(names, axis=1) / MS

    def breakdown(self) -> pd.DataFrame:
        """Return a row a stage: classic_stage, mean_ms, median_ms, p10_ms, p90_ms, share; means sum to the mean
        total."""
        each = self.by_stage
        total = float(each.sum(axis=1).mean()) if len(each) else float("nan")
        rows = {
            name: {
                "classic_stage": stages.BY_NAME[name].group.number,
                "mean_ms": float(each[name].mean()),
                "median_ms": stats.median(each[name].to_numpy()),
                "p10_ms": stats.percentile(each[name].to_numpy(), 10),
                "p90_ms": stats.percentile(each[name].to_numpy(), 90),
                "share": float(each[name].mean()) / total,
            }
            for name in each.columns
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("stage")

    def parts(self) -> pd.DataFrame:
        """Return what preprocessing consists of: index part, columns mean_ms, median_ms."""
        columns = [str(name) for name in self.good if str(name).startswith("part:")]
        values = self.good[columns].fillna(0).set_axis([name.removeprefix("part:") for name in columns], axis=1)
        return pd.DataFrame({"mean_ms": values.mean(), "median_ms": values.median()}).rename_axis("part")

    def latency(self) -> dict[str, float]:
        """Return the median of each latency figure over samples, and of the tokens."""
        names = ("prompt_tokens", "new_tokens", *LATENCIES)
        return {name: stats.median(self.good[name].dropna().to_numpy()) for name in names if name in self.good}


Saved = Run | SampleRun


def load_any(path: str | os.PathLike[str]) -> Saved:
    """Return a saved run, of one sample or of many. Raises InputError if it is none."""
    return SampleRun.load(path) if _manifest(Path(path)).get("kind") == KIND else runs.load(path)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is not a run directory: it has no readable {MANIFEST}.") from error
    except ValueError as error:
        raise InputError(f"{folder / MANIFEST} is damaged: {error}.") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{folder / MANIFEST} is damaged: it is no object with fields.")
    return manifest


def target(path: Path, force: bool) -> Path:
    """Return where a new run goes; with `force`, what a run left there is taken away. Raises InputError if there is
    something else."""
    if force and path.exists():
        directories.check_target(path, force)
        shutil.rmtree(path)
    if not path.exists():
        directories.check_target(path, force)
    return path


def rows_file(rank: int, world: int) -> str:
    """Return the name of the file that a rank appends its rows to."""
    return ROWS if world == 1 else f"samples-{rank}.jsonl"


def load_rows(folder: Path) -> pd.DataFrame:
    """Return the rows of a directory, the last one of each id."""
    found = {row["id"]: _flat(row) for row in _rows(folder)}
    return pd.DataFrame(found.values()) if found else pd.DataFrame({"id": [], "error": []})


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows, those of the ranks' own files, which are newer, last."""
    for _, _, row in _lines(folder):
        if row is not None:
            yield row


def _lines(folder: Path) -> Iterator[tuple[str, int, dict[str, Any] | None]]:
    """Yield file, line number and row, None for a line that is damaged; half a line at the very end, as a crash leaves
    it, is left out."""
    for path in (folder / ROWS, *sorted(folder.glob("samples-*.jsonl"))):
        if not path.exists():
            continue
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                row = _row_in(line)
                if row is not None or (line.strip() and line.endswith("\n")):
                    yield path.name, number, row


def _row_in(line: str) -> dict[str, Any] | None:
    with suppress(ValueError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("id"), str) and isinstance(row.get("error"), str):
            return row
    return None


def _damage(folder: Path) -> list[str]:
    """Return a sentence for each file that has damaged lines."""
    lines: dict[str, list[int]] = {}
    for name, number, row in _lines(folder):
        if row is None:
            lines.setdefault(name, []).append(number)
    return [f"{name}: {_numbered(numbers)}: what they measured is missing" for name, numbers in lines.items()]


def _numbered(numbers: Sequence[int], most: int = 10) -> str:
    said = ", ".join(map(str, numbers[:most])) + ", …" * (len(numbers) > most)
    return f"{len(numbers)} damaged line{'s' * (len(numbers) > 1)} ({said})"


def drop_half_line(path: Path) -> None:
    """Cut off what a crash left of a line, so that the next row begins on one of its own."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def merge(folder: Path, ids: Sequence[str]) -> None:
    """Put the files of all ranks into one, in the order of `ids`."""
    place = {one: number for number, one in enumerate(ids)}
    rows = sorted({row["id"]: row for row in _rows(folder)}.values(), key=lambda row: place.get(row["id"], len(ids)))
    fresh = folder / f".{ROWS}.new"
    fresh.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    fresh.replace(folder / ROWS)
    for path in folder.glob("samples-*.jsonl"):
        path.unlink()


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    stage = {f"stage:{name}": value for name, value in row.pop("stages_ns", {}).items()}
    part = {f"part:{name}": value for name, value in row.pop("parts_ms", {}).items()}
    return {**row, **stage, **part}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write run.json in one step."""
    text = json.dumps(plain({"schema": SCHEMA, "kind": KIND, **manifest}), indent=1, ensure_ascii=False)
    fresh = folder / f".{MANIFEST}.new"
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(folder / MANIFEST)
