"""Everything one measurement found, as an object and as a directory that can be reloaded."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profkit import annotate, ceilings, corrections, device_tables, roofline, stages, stats, tables, tensorboard
from profkit.anatomy import Anatomy
from profkit.ceilings import Ceilings
from profkit.errors import InputError, ProfkitError
from profkit.ledger import Marks, Scope
from profkit.spans import Spans
from profkit.work import Work

SCHEMA = 1
OF_PROFILE = ("operators", "kernels", "device", "timeline")
"""Tables of the profiled pass, kept as they were computed."""


@dataclass(frozen=True)
class Pass:
    """One execution of generate().

    `kind` is control (nothing attached), clean (probes alone) or profiled. `generate_ns` is the host time
    around generate(); `spans` is None for a control. `steps_recorded` are the steps torch.profiler saw.
    """

    kind: str
    generate_ns: int
    spans: Spans | None = None
    steps_recorded: tuple[int, ...] = ()


@dataclass(repr=False)
class Run:
    """One measurement. Tables come from the clean pass of median total: a real one, so its rows add up.

    `manifest` holds what was run, where and with what result, as plain JSON values. `operators`, `kernels` and `device`
    (see device_tables: operator_table, kernel_table, stage_table) are of the profiled pass and sum over the steps it
    recorded, whose number stands in each row. `timeline` is a prefill and a decode step of it, slice by slice (see
    timeline.timeline). None without such a pass; `kernels` and `device` also without a device.
    """

    manifest: dict[str, Any]
    anatomy: Anatomy
    scopes: list[Scope]
    passes: list[Pass]
    operators: pd.DataFrame | None = None
    kernels: pd.DataFrame | None = None
    device: pd.DataFrame | None = None
    timeline: pd.DataFrame | None = None
    work: Work | None = None
    """What generate() had to do, where it was counted (see work.Work)."""
    ceilings: Ceilings | None = None
    """What the machine can do, where it was measured (see ceilings.Ceilings)."""
    trace_json: bytes | None = None
    path: Path | None = None
    unreadable: list[str] = field(default_factory=list)
    """What of a saved run could not be read, a sentence each."""

    def __repr__(self) -> str:
        name = self.manifest.get("model") or self.anatomy.model_class
        kinds = ", ".join(
            f"{len(self.of_kind(kind))} {kind}" for kind in dict.fromkeys(one.kind for one in self.passes)
        )
        return f"<Run of {name}: {kinds or 'no'} passes>"

    def _repr_html_(self) -> str:
        """Show the breakdown in a notebook."""
        if not self.clean:
            return f"<p>{escape(repr(self))}</p>"
        shown = self.breakdown().drop(columns=["host_ns"]).dropna(axis=1, how="all")
        return f"<p>{escape(repr(self))}</p>{shown.to_html(float_format='{:.2f}'.format)}"

    def of_kind(self, kind: str) -> list[Pass]:
        """Return the passes of a kind: control, clean or profiled."""
        return [one for one in self.passes if one.kind == kind]

    @property
    def clean(self) -> list[Spans]:
        """The clean passes' spans, in the order they were made."""
        return [one.spans for one in self.of_kind("clean") if one.spans is not None]

    @cached_property
    def representative(self) -> Spans:
        """The clean pass whose total is the median (the lower one of two)."""
        if not self.clean:
            raise InputError("This run holds no finished clean pass, so there are no times to show.")
        totals = [float(tables.stage_table(spans)["host_ns"].sum()) for spans in self.clean]
        return self.clean[stats.median_index(totals)]

    def stages(self) -> pd.DataFrame:
        """Return a row a stage: index `stage`; columns calls, host_ns, host_ms, device_ms, busy_ms, share.

        Rows sum to the total of the calls of generate(), `other` included; where the run also loaded and
        preprocessed its inputs, these have rows of their own and the sum is the sample's total.
        """
        table = tables.stage_table(self.representative)
        return table if self.device is None else table.assign(busy_ms=self._busy_ms(table.index))

    def _busy_ms(self, names: pd.Index) -> np.ndarray:
        """Return each stage's busy time, NaN where unknown: that of a recorded step, times the clean pass's steps."""
        assert self.device is not None
        of_stages = self.device[self.device["stage"] != device_tables.ALL]
        per_step = (of_stages["busy_ms"] / of_stages["steps"]).groupby(of_stages["stage"]).sum()
        made = tables.steps_by_stage(self.representative)
        return (per_step * made).reindex(names).to_numpy()

    def spread(self) -> pd.DataFrame:
        """Return, over all clean passes, each stage's median_ms, p10_ms and p90_ms, and those of the total."""
        each = pd.DataFrame([tables.stage_table(spans)["host_ms"] for spans in self.clean]).fillna(0.0)
        each = each[[name for name in stages.NAMES if name in each.columns]]
        each["total"] = each.sum(axis=1)
        columns = {"median_ms": 50, "p10_ms": 10, "p90_ms": 90}
        rows = {name: [stats.percentile(each[name].to_numpy(), q) for q in columns.values()] for name in each}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).rename_axis("stage")

    def steps(self) -> pd.DataFrame:
        """Return a row a step: call, step, phase (prefill or decode), tokens, host_ms, device_ms, iteration_ms."""
        return tables.step_table(self.representative)

    def modules(self) -> pd.DataFrame:
        """Return a row a module path or probed method: path, stage, calls, total_ms, self_ms, device_ms."""
        return tables.module_table(self.representative)

    def latency(self) -> tables.Latency:
        """Return TTFT, TPOT and throughput of the representative pass, and ITL over all clean passes."""
        first = (self.manifest.get("calls") or [{}])[0]
        pooled_ms = np.concatenate([tables.token_gaps_ms(spans) for spans in self.clean])
        return tables.latency(self.representative, first.get("batch") or 1, first.get("new_tokens"), pooled_ms)

    def check_work(self) -> Work:
        """Return the work of this run. Raises InputError if it was not counted."""
        if self.work is None:
            raise InputError("The work of this run was not counted: trace it again, without --no-work.")
        return self.work

    def roofline(self, known: Ceilings | None = None) -> roofline.Roofline:
        """Return how far each stage and step is from the limit, with these ceilings or those that the run holds.

        Raises InputError for a run whose work was not counted, or without ceilings.
        """
        work, limits = self.check_work(), known or self.ceilings
        if limits is None:
            raise InputError(
                "The ceilings of this run's device are not known: measure them there, by profkit roofline."
            )
        call, dtype = (self.manifest.get("calls") or [{}])[0], str(self.manifest.get("dtype"))
        counts: dict[str, Any] = {"batch": call.get("batch") or 1, "media_tokens": self.manifest.get("media_tokens")}
        passed: dict[str, Any] = {"spans": self.representative, "latency": self.latency(), "operators": self.operators}
        return roofline.answers(work, limits, dtype, **passed, **counts)

    def overhead(self) -> float:
        """Return clean over control time of generate(), the median of pairs; NaN without controls."""
        clean = [one.generate_ns for one in self.of_kind("clean")]
        control = [one.generate_ns for one in self.of_kind("control")]
        return stats.paired_ratio(clean, control) if control else float("nan")

    def dilation(self) -> pd.DataFrame:
        """Return, per stage, profiled_ms, clean_ms (median) over the profiled steps, and their ratio."""
        profiled = next((one for one in self.of_kind("profiled") if one.spans is not None), None)
        if profiled is None or profiled.spans is None:
            return pd.DataFrame(columns=["profiled_ms", "clean_ms", "ratio"])
        steps = profiled.steps_recorded
        slow = tables.stage_table(profiled.spans, recorded(profiled.spans, steps))["host_ms"]
        fast = [tables.stage_table(spans, recorded(spans, steps))["host_ms"] for spans in self.clean]
        table = pd.DataFrame({"profiled_ms": slow, "clean_ms": pd.DataFrame(fast).median()})
        table = table.reindex([name for name in stages.NAMES if name in table.index])
        table.loc["total"] = table.sum()
        return table.assign(ratio=table["profiled_ms"] / table["clean_ms"])

    def corrected(self) -> pd.DataFrame:
        """Return, per stage, host_ms, marks_ms (what the instrument's marks took of it) and corrected_ms without it.

        What a mark costs was calibrated as the run was made. Raises InputError for a run made without.
        """
        known = (self.manifest.get("machine") or {}).get("mark_cost")
        if known is None:
            raise InputError("This run does not say what a mark costs: corrected times need profkit.trace().")
        return corrections.corrected_table(self.representative, corrections.MarkCost(**known))

    def breakdown(self) -> pd.DataFrame:
        """Return stages() and spread() side by side, with the number of the classic stage (1 to 4)."""
        table = self.stages().join(self.spread())
        number = [stages.BY_NAME[name].group.number for name in table.index]
        table.insert(0, "classic_stage", number)
        return table

    def save(self, path: Path, force: bool = False) -> Path:
        """Write the run to a directory, all or nothing, and return its path."""
        write_directory(path, lambda folder: _write(self, folder), force)
        self.path = path
        return path


def recorded(spans: Spans, steps: Sequence[int]) -> np.ndarray:
    """Return which segments lie in these steps; what comes before generate() goes with step 0."""
    position = np.arange(len(spans.step))
    before = position < (spans.steps.start[0] if len(spans.steps) else len(position))
    return np.isin(spans.step, list(steps)) | (before & (0 in steps))


def load(path: str | os.PathLike[str]) -> Run:
    """Return the run saved in a directory. Raises InputError if it is not one."""
    folder = Path(path)
    try:
        manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{folder} is not a run directory: it has no readable run.json.") from error
    except ValueError as error:
        raise InputError(f"{folder / 'run.json'} is damaged: {error}.") from error
    if manifest.get("kind") == "samples":
        raise InputError(f"{folder} is a run over many samples: read it with profkit.sample_runs.SampleRun.load().")
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{folder} has schema {manifest.get('schema')}, this profkit reads {SCHEMA}: use the profkit that wrote it."
        )
    try:
        return _read(folder, manifest)
    except ProfkitError:
        raise
    except Exception as error:
        raise InputError(f"The run in {folder} is damaged: {type(error).__name__}: {error}.") from error


def check_target(path: Path, force: bool) -> None:
    """Raise InputError if a run cannot be written to `path`; better asked before measuring than after."""
    if len(os.fsencode(path.name)) > 200:
        raise InputError(f"The name of {path} is too long for a directory: choose another --out.")
    if path.exists() and not force:
        raise InputError(f"{path} already exists: choose another --out, or --force to replace it.")
    if path.exists() and not (path / "run.json").is_file():
        raise InputError(f"{path} is not a run directory, so --force will not replace it: choose another --out.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        # Permission bits do not tell: root passes them all, and a read-only file system has its own mind.
        Path(tempfile.mkdtemp(prefix=".profkit-", dir=parent)).rmdir()
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror} in {parent}; choose another --out.") from error


def write_directory(path: Path, fill: Callable[[Path], None], force: bool = False) -> None:
    """Fill a directory beside `path` and move it there in one step, so that no half of it is ever seen."""
    check_target(path, force)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror}; choose another --out.") from error
    try:
        folder.chmod(0o755)
        fill(folder)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            try:
                path.rename(old / "run")
                folder.rename(path)
            finally:
                if not path.exists():
                    (old / "run").rename(path)
                shutil.rmtree(old)
        else:
            folder.rename(path)
    except OSError as error:
        raise InputError(f"Cannot write {path}: {error.strerror or error}; choose another --out.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN becomes null, numpy numbers plain ones."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _write(run: Run, folder: Path) -> None:
    scopes = [asdict(scope) for scope in run.scopes[1:]]
    passes = [
        {"kind": one.kind, "generate_ns": one.generate_ns, "steps_recorded": list(one.steps_recorded)}
        for one in run.passes
    ]
    manifest = {
        "schema": SCHEMA,
        **run.manifest,
        "anatomy": {**run.anatomy.to_record(), "roles": run.anatomy.to_dict()},
        "latency": asdict(run.latency()) if run.clean else None,
        "scopes": scopes,
        "passes": passes,
    }
    marks = [_marks_frame(number, one.spans) for number, one in enumerate(run.passes) if one.spans is not None]
    _parquet(pd.concat(marks, ignore_index=True), folder / "marks.parquet")
    if run.clean:
        _parquet(run.stages().reset_index(), folder / "stages.parquet")
        _parquet(run.steps(), folder / "steps.parquet")
        _parquet(run.modules(), folder / "modules.parquet")
        run.breakdown().to_csv(folder / "breakdown.csv", float_format="%.6f")
    for name in OF_PROFILE:
        if (table := getattr(run, name)) is not None:
            _parquet(table, folder / f"{name}.parquet")
    earlier = run.path / "trace.json.gz" if run.path is not None else None
    if run.trace_json is not None:
        annotate.write(folder / "trace.json.gz", run.trace_json)
    elif earlier is not None and earlier.exists():
        shutil.copyfile(earlier, folder / "trace.json.gz")
    if (folder / "trace.json.gz").exists():
        board = folder / "tensorboard"
        board.mkdir()
        when_ms = int(run.manifest.get("started_unix_ms", 0))
        text = run.trace_json or gzip.decompress((folder / "trace.json.gz").read_bytes())
        annotate.write(board / f"profkit.{when_ms}.pt.trace.json.gz", tensorboard.plugin_copy(text))
    if run.work is not None:
        manifest["work"] = run.work.to_record()
        _parquet(run.work.table, folder / "work.parquet")
    if run.ceilings is not None:
        ceilings.write(run.ceilings, folder / "ceilings.json")
    described = json.dumps(plain(manifest), indent=1, ensure_ascii=False)
    (folder / "run.json").write_text(described + "\n", encoding="utf-8")


def _parquet(frame: pd.DataFrame, path: Path) -> None:
    frame.to_parquet(path, index=False, compression="zstd")


def _marks_frame(number: int, spans: Spans) -> pd.DataFrame:
    marks = spans.marks
    columns = {"code": marks.code, "thread": marks.thread, "host_ns": marks.host_ns}
    return pd.DataFrame(
        {"pass": np.int16(number), **columns, "device_ns": marks.device_ns, "note": marks.note},
    )


def _read(folder: Path, manifest: dict[str, Any]) -> Run:
    scopes = [Scope("", "outside"), *(Scope(**scope) for scope in manifest.pop("scopes"))]
    frame = pd.read_parquet(folder / "marks.parquet")
    passes = [
        Pass(one["kind"], one["generate_ns"], _spans_of(frame, number, scopes), tuple(one["steps_recorded"]))
        for number, one in enumerate(manifest.pop("passes"))
    ]
    anatomy = Anatomy.from_record(manifest.pop("anatomy"))
    for key in ("schema", "latency"):
        manifest.pop(key)
    run = Run(manifest, anatomy, scopes, passes, path=folder)
    for name in OF_PROFILE:
        setattr(run, name, _kept_table(folder / f"{name}.parquet", run.unreadable))
    record = manifest.pop("work", None)
    if record is not None and (table := _kept_table(folder / "work.parquet", run.unreadable)) is not None:
        run.work = Work.from_record(record, table)
    run.ceilings, damage = ceilings.read(folder / "ceilings.json")
    run.unreadable += [damage] if damage else []
    return run


def _kept_table(path: Path, unreadable: list[str]) -> pd.DataFrame | None:
    """Return a table that explains more than the marks do, and without which a run can still be shown."""
    try:
        return pd.read_parquet(path) if path.exists() else None
    except Exception as error:
        unreadable.append(f"{path.name} is damaged, so its table is missing: {type(error).__name__}")
        return None


def _spans_of(frame: pd.DataFrame, number: int, scopes: list[Scope]) -> Spans | None:
    rows = frame[frame["pass"] == number]
    if not len(rows):
        return None
    columns = [rows[name].to_numpy() for name in ("code", "thread", "host_ns", "device_ns", "note")]
    return Spans(Marks(*columns), scopes)
