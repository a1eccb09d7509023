"""Any trace file, analysed: owners, tables and doubts; directories of ranks, and the spread between them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profkit import chrome, device_tables, foreign, trust
from profkit.attribution import Owners, Why
from profkit.directories import write_directory
from profkit.errors import InputError
from profkit.events import DEVICE, HOST, Kind
from profkit.graphs import Capture, explained
from profkit.nesting import Forest, nest
from profkit.occupancy import Occupancy, occupancy

MS = 1e6
COLLECTIVE = re.compile(r"(?i)nccl|rccl")
RANK_IN_NAME = re.compile(r"(?i)(?<![a-z])rank[_-]?(\d+)")
SUFFIXES = (".json", ".json.gz")


@dataclass
class Analysis:
    """What one trace file says.

    `tables` holds DataFrames by name: devices, host, stages, steps, kernels, operators, coverage, reasons (see
    device_tables; stages
    and steps are those that were recognised, `evidence` says by what), checks. `rank` is None where the file tells
    none.
    """

    path: Path
    rank: int | None
    world_size: int | None
    device_names: dict[str, str]
    start_unix_ns: int
    end_unix_ns: int
    events: int
    evidence: str
    graphs: list[str]
    tables: dict[str, pd.DataFrame]
    scopes: str
    folder: Path | None = None
    """The directory that was given, if one was: its files are the ranks of one run."""
    checks: list[trust.Check] = field(default_factory=list)
    window: tuple[int, ...] = ()
    """The steps that were recorded, where the file says so: its sums are of these alone."""
    validated: str = "not asked"
    """What torch's own validator of traces said, if asked."""


@dataclass(frozen=True)
class Attributed:
    """A trace file with the owners of its events."""

    trace: chrome.Trace
    forest: Forest
    owners: Owners
    evidence: str


def attributed(path: Path) -> Attributed:
    """Read a trace file and find who owns its events. Raises InputError if it is none."""
    trace = chrome.read(path)
    if not (len(trace.events) or trace.others):
        raise InputError(f"{path} holds no events: its list is empty.")
    forest = nest(trace.events, trace.events.is_kind(*HOST))
    owners, evidence = foreign.owners_of(trace, forest)
    return Attributed(trace, forest, owners, evidence)


def analyze(path: Path, captures: Sequence[Attributed] = ()) -> Analysis:
    """Analyse one trace file; `captures` are traces of the passes that captured its device graphs.

    Raises InputError if nothing of the file is a trace.
    """
    found = attributed(path)
    trace, events, forest = found.trace, found.trace.events, found.forest
    known = [Capture(one.trace.events, one.owners, one.forest) for one in (found, *captures)]
    owners, graphs = explained(events, found.owners, known)
    occupied = occupancy(events, owners.launch, owners.begun_ns())
    checks = trust.checks(trace, owners, occupied, forest)
    tables = {
        "devices": _device_table(trace, occupied),
        "host": device_tables.host_table(events, owners, forest),
        "stages": device_tables.stage_table(events, owners, occupied),
        "steps": device_tables.step_table(events, owners, occupied),
        "kernels": device_tables.kernel_table(events, owners, forest),
        "operators": device_tables.operator_table(events, owners, forest),
        "coverage": device_tables.coverage(events, owners),
        "reasons": _reasons(trace, owners),
        "checks": pd.DataFrame([asdict(one) for one in checks]),
    }
    timed = events.kind != Kind.OTHER
    first, last = (int(events.start_ns[timed].min()), int(events.end_ns[timed].max())) if timed.any() else (0, 0)
    told = trace.header.get("baseTimeNanoseconds")
    base = int(told) if isinstance(told, int | float) else 0
    rank, world = _rank(trace.header, path)
    scopes = _scopes(trace, owners)
    devices = _device_names(trace.header)
    unix = (base + first, base + last)
    about = (path, rank, world, devices, *unix, len(events), found.evidence, graphs, tables, scopes)
    return Analysis(*about, checks=checks, window=_window(trace))


def _window(trace: chrome.Trace) -> tuple[int, ...]:
    """Return the steps that a profile of profkit's recorded, none if it recorded all or is another's."""
    told = trace.header.get("profkit")
    steps = told.get("steps") if isinstance(told, dict) else None
    return tuple(one for one in steps if isinstance(one, int)) if isinstance(steps, list) else ()


def _scopes(trace: chrome.Trace, owners: Owners) -> str:
    """Return what the scopes of a trace were."""
    if (trace.events.kind == Kind.PROFKIT).any():
        return "profkit's own tracks"
    levels = owners.scopes.levels
    kinds = [
        name for level, name in enumerate(("modules", "annotations", "outermost operators")) if (levels == level).any()
    ]
    return ", ".join(kinds) or "none: no operator, annotation or module was recorded"


def _rank(header: Mapping[str, Any], path: Path) -> tuple[int | None, int | None]:
    """Return a file's rank and how many there are, as far as the file, or else its name, tells."""
    told = header.get("distributedInfo")
    told = told if isinstance(told, dict) else {}
    rank, world = told.get("rank"), told.get("world_size")
    named = RANK_IN_NAME.search(path.name) or RANK_IN_NAME.search(path.parent.name)
    rank = rank if isinstance(rank, int) else int(named[1]) if named else None
    return rank, world if isinstance(world, int) else None


def _device_names(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of devices by number, as far as the file tells them."""
    listed = header.get("deviceProperties")
    entries = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return {str(one["id"]): str(one["name"]) for one in entries if one.get("name") and "id" in one}


def _device_table(trace: chrome.Trace, occupied: Occupancy) -> pd.DataFrame:
    """Return a row a device: span_ms (first begin to last end), busy_ms, sum_ms, idle_ms, kernels, collective_ms,
    streams.

    sum_ms adds the events of all streams; busy_ms is the union of their time, so the two differ where streams run at
    once.
    """
    events = trace.events
    names = _device_names(trace.header)
    collective = events.named([COLLECTIVE.search(name) is not None for name in events.names]) & (
        events.kind == Kind.KERNEL
    )
    rows = []
    for number, device in enumerate(events.devices):
        mine = occupied.row[occupied.device == number]
        if len(mine):
            start, end = events.start_ns[mine], events.start_ns[mine] + events.length_ns[mine]
            busy = int(occupied.busy_ns[occupied.device == number].sum())
            span = int(end.max() - start.min())
            rows.append(
                {
                    "device": device,
                    "name": names.get(device, ""),
                    "kernels": len(mine),
                    "streams": len(np.unique(events.stream[mine])),
                    "span_ms": span / MS,
                    "busy_ms": busy / MS,
                    "sum_ms": int(events.length_ns[mine].sum()) / MS,
                    "idle_ms": (span - busy) / MS,
                    "collective_ms": int(events.length_ns[mine[collective[mine]]].sum()) / MS,
                }
            )
    columns = ["device", "name", "kernels", "streams", "span_ms", "busy_ms", "sum_ms", "idle_ms", "collective_ms"]
    return pd.DataFrame(rows, columns=columns)


def _reasons(trace: chrome.Trace, owners: Owners) -> pd.DataFrame:
    """Return, for each way in which device events came to their owners, how many did and their share of the time."""
    rows = np.flatnonzero(trace.events.is_kind(*DEVICE))
    why, duration_ns = owners.why[rows], trace.events.length_ns[rows]
    total = max(int(duration_ns.sum()), 1)
    return pd.DataFrame(
        [
            {
                "why": one.name.lower(),
                "count": int((why == one).sum()),
                "share": int(duration_ns[why == one].sum()) / total,
            }
            for one in Why
            if (why == one).any()
        ],
        columns=["why", "count", "share"],
    )


def trace_files(path: Path) -> list[Path]:
    """Return the traces a path stands for: itself, or those in a directory (a run's, TensorBoard's, one file a rank).

    Raises InputError for a directory without any.
    """
    if not path.is_dir():
        return [path]
    if (path / "run.json").is_file() and (path / "trace.json.gz").is_file():
        return [path / "trace.json.gz"]
    inside = sorted(one for one in path.rglob("*") if one.is_file() and one.name.endswith(SUFFIXES))
    # A file that was damaged must not go unnoticed: only whole JSON of another kind is left out.
    found = [one for one in inside if chrome.may_be_trace(one)]
    if not found:
        raise InputError(f"{path} holds no traces: no .json or .json.gz file in it has a list traceEvents.")
    return found


def analyze_all(
    paths: Sequence[Path], captures: Sequence[Path] = (), progress: Callable[[str], object] = str
) -> tuple[list[Analysis], dict[str, str]]:
    """Return the analyses of all files and directories, and a sentence for each that there is none of.

    `captures` are traces of passes that captured device graphs. Raises InputError if one of those cannot be read.
    """
    explained = [attributed(one) for path in captures for one in trace_files(path)]
    found: list[Analysis] = []
    failed: dict[str, str] = {}
    for path in paths:
        for file in _files(path, failed):
            progress(f"reading {file}")
            _add(file, explained, path if path.is_dir() else None, found, failed)
    return found, failed


def _files(path: Path, failed: dict[str, str]) -> list[Path]:
    try:
        return trace_files(path)
    except InputError as error:
        failed[str(path)] = str(error)
        return []


def _add(
    file: Path, captures: Sequence[Attributed], folder: Path | None, found: list[Analysis], failed: dict[str, str]
) -> None:
    try:
        one = analyze(file, captures)
        one.folder = folder
        check_ranks(found, one)
    except InputError as error:
        failed[str(file)] = str(error)
    else:
        found.append(one)


def check_ranks(done: Iterable[Analysis], new: Analysis) -> None:
    """Raise InputError if a file is of a rank that another has: in one directory, or of files at the same time."""
    for other in done:
        same = new.rank is not None and new.rank == other.rank and new.folder == other.folder
        overlap = new.start_unix_ns < other.end_unix_ns and other.start_unix_ns < new.end_unix_ns
        if same and (overlap or new.folder is not None):
            raise InputError(
                f"{new.path} is of rank {new.rank}, and so is {other.path}: a rank counts once, give one of the two."
            )


def rank_table(analyses: Sequence[Analysis]) -> pd.DataFrame:
    """Return a row a rank, and the spread between ranks as (largest − smallest) / median, for each directory.

    Empty unless ranks differ; files that tell no rank are left out. Columns: folder, rank, file, kernels, launches,
    span_ms, busy_ms, sum_ms, idle_ms, collective_ms, summed over the rank's devices.
    """
    groups: dict[Path | None, list[Analysis]] = {}
    for one in analyses:
        if one.rank is not None:
            groups.setdefault(one.folder, []).append(one)
    tables = [_ranks_of(group) for group in groups.values() if len({one.rank for one in group}) > 1]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _ranks_of(ranks: Sequence[Analysis]) -> pd.DataFrame:
    rows = []
    for one in sorted(ranks, key=lambda one: one.rank or 0):
        devices, stages = one.tables["devices"], one.tables["stages"]
        launches = int(stages.loc[stages["stage"] == device_tables.ALL, "launches"].sum()) if len(stages) else 0
        sums = devices[["kernels", "busy_ms", "sum_ms", "idle_ms", "collective_ms"]].sum().to_dict()
        span = devices["span_ms"].max() if len(devices) else 0.0
        rows.append(
            {
                "rank": str(one.rank),
                "file": _readable(Path(one.path.name)),
                **sums,
                "launches": launches,
                "span_ms": span,
            }
        )
    table = pd.DataFrame(rows)[
        ["rank", "file", "kernels", "launches", "span_ms", "busy_ms", "sum_ms", "idle_ms", "collective_ms"]
    ]
    numbers = table.drop(columns=["rank", "file"]).astype(float)
    spread = (numbers.max() - numbers.min()) / numbers.median().replace(0.0, np.nan)
    last = pd.DataFrame([{"rank": "spread", "file": "", **spread.to_dict()}])
    whole = pd.concat([table, last], ignore_index=True)
    whole.insert(0, "folder", "" if ranks[0].folder is None else _readable(ranks[0].folder))
    return whole


def _readable(path: Path) -> str:
    """Return a path as text that any file can hold, whatever bytes its name is made of."""
    return os.fsencode(path).decode("utf-8", "replace")


def write_tables(analyses: Sequence[Analysis], between: pd.DataFrame, folder: Path, suffix: str) -> None:
    """Write every table of some analyses, those of all files in one, as folder/<table>.csv or .parquet, all or nothing.

    Raises InputError if the folder exists or cannot be written.
    """

    def fill(target: Path) -> None:
        names = analyses[0].tables if analyses else {}
        tables = {name: pd.concat([_labelled(one, name) for one in analyses], ignore_index=True) for name in names}
        if len(between):
            tables["ranks"] = between
        for name, table in tables.items():
            if suffix == "csv":
                table.to_csv(target / f"{name}.csv", index=False, float_format="%.6f")
            else:
                table.to_parquet(target / f"{name}.parquet", index=False, compression="zstd")

    write_directory(folder, fill)


def _labelled(one: Analysis, name: str) -> pd.DataFrame:
    """Return a table with columns that tell its file and rank."""
    table = one.tables[name]
    table = table.reset_index() if table.index.name else table.copy()
    table.insert(0, "rank", pd.array([one.rank] * len(table), dtype="Int64"))
    table.insert(0, "file", _readable(one.path))
    return table
