"""Everything one measurement found, as an object and as a directory that can be reloaded."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profkit import (
    annotate,
    ceilings,
    corrections,
    device_tables,
    roofline,
    run_work,
    saved_tables,
    stages,
    stats,
    tables,
    tensorboard,
)
from profkit.anatomy import Anatomy
from profkit.ceilings import Ceilings
from profkit.directories import SCHEMA, check_schema, plain, write_directory
from profkit.errors import InputError, ProfkitError
from profkit.ledger import Scope
from profkit.spans import Spans
from profkit.work import Work

OF_PROFILE = ("operators", "kernels", "device", "timeline", "trees")
"""Tables of the profiled pass, kept as they were computed."""
KEPT = (*OF_PROFILE, "memory")


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
    timeline.timeline), `trees` those steps from stages down to operators and kernels (see joint.trees). None without
    such a pass; `kernels` and `device` also without a device. `memory` is that of the
    devices at the boundaries of stages, in bytes (see memory.memory_table); None where there is none to read.
    """

    manifest: dict[str, Any]
    anatomy: Anatomy
    scopes: list[Scope]
    passes: list[Pass]
    operators: pd.DataFrame | None = None
    kernels: pd.DataFrame | None = None
    device: pd.DataFrame | None = None
    timeline: pd.DataFrame | None = None
    trees: pd.DataFrame | None = None
    memory: pd.DataFrame | None = None
    work: Work | None = None
    """What generate() had to do, where it was counted (see work.Work)."""
    ceilings: Ceilings | None = None
    """What the machine can do, where it was measured (see ceilings.Ceilings)."""
    trace_json: bytes | None = None
    path: Path | None = None
    unreadable: list[str] = field(default_factory=list)
    """What of a saved run could not be read, a sentence each."""
    kept: saved_tables.Kept | None = None
    """Tables of the clean passes that were saved beside their marks, where these cannot be read."""

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
            raise InputError(self._no_times())
        totals = [float(tables.stage_table(spans)["host_ns"].sum()) for spans in self.clean]
        return self.clean[stats.median_index(totals)]

    def _no_times(self) -> str:
        said = "This run holds no finished clean pass, so there are no times to show"
        return f"{said}: {'; '.join(self.unreadable)}." if self.unreadable else f"{said}."

    def stages(self) -> pd.DataFrame:
        """Return a row a stage: index `stage`; columns calls, host_ns, host_ms, device_ms, busy_ms, share.

        Where there is a device, starved_ms too: device_ms less busy_ms, what its stream was given nothing to do.
        Rows sum to the total of the calls of generate(), `other` included; where the run also loaded and
        preprocessed its inputs, these have rows of their own and the sum is the sample's total.
        """
        if not self.clean and self.kept is not None and self.kept.stages is not None:
            return self.kept.stages.set_index("stage")
        table = tables.stage_table(self.representative)
        if self.device is None:
            return table
        busy_ms = self._busy_ms(table.index)
        return table.assign(busy_ms=busy_ms, starved_ms=table["device_ms"] - busy_ms)

    def _busy_ms(self, names: pd.Index) -> np.ndarray:
        """Return each stage's busy time, NaN where unknown: that of a recorded step, times the clean pass's steps."""
        assert self.device is not None
        of_stages = self.device[self.device["stage"] != device_tables.ALL]
        per_step = (of_stages["busy_ms"] / of_stages["steps"]).groupby(of_stages["stage"]).sum()
        made = tables.steps_by_stage(self.representative)
        return (per_step * made).reindex(names).to_numpy()

    def spread(self) -> pd.DataFrame:
        """Return, over all clean passes, each stage's median_ms, p10_ms and p90_ms, and those of the total."""
        if not self.clean and self.kept is not None and self.kept.spread is not None:
            return self.kept.spread
        each = pd.DataFrame([tables.stage_table(spans)["host_ms"] for spans in self.clean]).fillna(0.0)
        each = each[[name for name in stages.NAMES if name in each.columns]]
        each["total"] = each.sum(axis=1)
        columns = {"median_ms": 50, "p10_ms": 10, "p90_ms": 90}
        rows = {name: [stats.percentile(each[name].to_numpy(), q) for q in columns.values()] for name in each}
        return pd.DataFrame.from_dict(rows, orient="index", columns=list(columns)).rename_axis("stage")

    def steps(self) -> pd.DataFrame:
        """Return a row a step: call, step, phase (prefill or decode), tokens, host_ms, device_ms, iteration_ms."""
        if not self.clean and self.kept is not None and self.kept.steps is not None:
            return self.kept.steps
        return tables.step_table(self.representative)

    def modules(self) -> pd.DataFrame:
        """Return a row a module path or probed method: path, stage, calls, total_ms, self_ms, device_ms."""
        if not self.clean and self.kept is not None and self.kept.modules is not None:
            return self.kept.modules
        return tables.module_table(self.representative)

    def latency(self) -> tables.Latency:
        """Return TTFT, TPOT and throughput of the representative pass, and ITL over all clean passes."""
        if not self.clean and self.kept is not None and self.kept.latency is not None:
            return self.kept.latency
        first, shown = (self.manifest.get("calls") or [{}])[0], self.representative
        pooled_ms = np.concatenate([tables.token_gaps_ms(spans) for spans in self.clean])
        return tables.latency(shown, first.get("batch") or 1, first.get("new_tokens"), pooled_ms)

    def check_work(self) -> Work:
        """Return the work of this run. Raises InputError if it was not counted, or cannot be read."""
        return run_work.counted(self)

    def damage_of(self, file: str) -> str:
        """Return what was wrong with a file of the saved run, in a sentence; "" if nothing was."""
        return next((one for one in self.unreadable if file in one), "")

    def roofline(self, known: Ceilings | None = None) -> roofline.Roofline:
        """Return how far each stage and step is from the limit, with these ceilings or those that the run holds.

        Without the marks of its passes there are floors, and no times of stages and steps. Raises InputError for a run
        whose work was not counted, or without ceilings.
        """
        return run_work.roofline_of(self, known)

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

    def cache_bytes_per_token(self) -> float | None:
        """Return by how many bytes the cache grows a token of a sequence; None if it does not, or is not known."""
        sizes = self.manifest.get("cache_bytes") or []
        tokens = np.cumsum(self.steps()["tokens"].to_numpy()[: len(sizes)])
        call = (self.manifest.get("calls") or [{}])[0]
        grown = (sizes[-1] - sizes[0]) / (tokens[-1] - tokens[0]) if len(tokens) > 1 and tokens[-1] > tokens[0] else 0
        return grown / (self.manifest.get("cache_rows") or call.get("batch") or 1) if grown > 0 else None

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
    check_schema(folder, manifest)
    try:
        return _read(folder, manifest)
    except ProfkitError:
        raise
    except Exception as error:
        raise InputError(f"The run in {folder} is damaged: {type(error).__name__}: {error}.") from error


def _write(run: Run, folder: Path) -> None:
    scopes = [asdict(scope) for scope in run.scopes[1:]]
    passes = [
        {
            "kind": one.kind,
            "generate_ns": one.generate_ns,
            "steps_recorded": list(one.steps_recorded),
            "marks": 0 if one.spans is None else len(one.spans.marks),
        }
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
    marks = [
        saved_tables.marks_frame(number, one.spans) for number, one in enumerate(run.passes) if one.spans is not None
    ]
    if not marks:
        raise InputError(run._no_times())
    _parquet(pd.concat(marks, ignore_index=True), folder / "marks.parquet")
    if run.clean:
        _parquet(run.stages().reset_index(), folder / "stages.parquet")
        _parquet(run.steps(), folder / "steps.parquet")
        _parquet(run.modules(), folder / "modules.parquet")
        run.breakdown().to_csv(folder / "breakdown.csv", float_format="%.6f")
    for name in KEPT:
        if (table := getattr(run, name)) is not None:
            _parquet(table.reset_index() if table.index.name else table, folder / f"{name}.parquet")
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


def _read(folder: Path, manifest: dict[str, Any]) -> Run:
    unreadable: list[str] = []
    lacking = [name for name in ("anatomy", "scopes", "passes") if name not in manifest]
    if lacking:
        unreadable.append(f"run.json lacks {', '.join(lacking)}")
    scopes = [Scope("", "outside"), *(Scope(**scope) for scope in manifest.pop("scopes", []))]
    passes = _passes(folder, manifest.pop("passes", []), scopes, unreadable)
    record = manifest.pop("anatomy", None)
    anatomy = Anatomy.from_record(record) if record else Anatomy(str(manifest.get("model_class")), ())
    manifest.pop("schema")
    latency = manifest.pop("latency", None)
    run = Run(manifest, anatomy, scopes, passes, path=folder, unreadable=unreadable)
    if not run.clean:
        run.kept = saved_tables.kept(folder, latency, unreadable)
    for name in KEPT:
        setattr(run, name, saved_tables.read(folder / f"{name}.parquet", unreadable))
    if run.memory is not None:
        run.memory = run.memory.set_index("stage")
    record = manifest.pop("work", None)
    if record is not None and (table := saved_tables.work(folder, unreadable)) is not None:
        run.work = Work.from_record(record, table)
    run.ceilings, damage = ceilings.read(folder / "ceilings.json")
    unreadable += [damage] if damage else []
    return run


def _passes(folder: Path, told: Sequence[Any], scopes: list[Scope], unreadable: list[str]) -> list[Pass]:
    """Return the passes; without their spans, which is said, where the marks cannot be read."""

    def passes(frame: pd.DataFrame | None) -> list[Pass]:
        return [
            Pass(
                *(
                    one["kind"],
                    one["generate_ns"],
                    None if frame is None else saved_tables.spans_of(frame, number, scopes),
                ),
                tuple(one["steps_recorded"]),
            )
            for number, one in enumerate(told)
        ]

    if len(scopes) < 2:
        unreadable.append("marks.parquet cannot be read without the scopes in run.json")
        return passes(None)
    try:
        frame = pd.read_parquet(folder / "marks.parquet")
        found, here = passes(frame), frame["pass"].value_counts()
    except Exception as error:
        unreadable.append(f"marks.parquet cannot be read, so what is made of the marks is missing: {_said(error)}")
        return passes(None)
    unreadable += [
        f"marks.parquet holds {here.get(number, 0)} marks of pass {number}, which had {one['marks']}"
        for number, one in enumerate(told)
        if one.get("marks", here.get(number, 0)) != here.get(number, 0)
    ]
    return found


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
