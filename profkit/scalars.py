"""A run as TensorBoard's scalars, histograms and texts: by step and repeat, or by sample."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from profkit import hierarchy, tables
from profkit.checks import kept_verdicts
from profkit.errors import InputError
from profkit.run import Run
from profkit.sample_runs import LATENCIES, SampleRun, Saved

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

SUFFIX = ".profkit"
"""Ends the names of the files that are profkit's: those of an earlier time are replaced."""
OF_STEPS = ("tokens", "host_ms", "device_ms", "iteration_ms")
ABOUT = ("model", "model_class", "device", "device_name", "dtype", "attention", "threads", "platform")


def is_installed() -> bool:
    """Tell whether TensorBoard is."""
    return importlib.util.find_spec("tensorboard") is not None


def require() -> None:
    """Raise InputError where TensorBoard is not installed; better asked before measuring than after."""
    if not is_installed():
        raise InputError("TensorBoard is not installed: pip install 'profkit[tensorboard]'.")


def write_scalars(saved: Saved, folder: Path) -> Path:
    """Write what TensorBoard shows of a run into `folder`, in place of what was written there before.

    Of one sample: each step's times and bytes of the cache, each repeat's stages, the distribution of layers' times
    by step and of the gaps between tokens; of many samples: each one's stages, latency and tokens, in their order, and
    their distributions; as texts the breakdown, the checks or errors, and the environment. Returns the file. Raises
    InputError where TensorBoard is not installed or the folder cannot be written.
    """
    require()
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as scratch:
        with SummaryWriter(scratch, filename_suffix=SUFFIX) as writer:
            if isinstance(saved, Run):
                _of_run(saved, writer)
            else:
                _of_samples(saved, writer)
        (made,) = Path(scratch).iterdir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob(f"events.out.tfevents.*{SUFFIX}"):
                old.unlink()
            return Path(shutil.copyfile(made, folder / made.name))
        except OSError as error:
            raise InputError(f"Cannot write {folder}: {error.strerror or error}.") from error


def _of_run(run: Run, writer: SummaryWriter) -> None:
    if not run.clean:
        writer.add_text("what is missing", "\n\n".join(run.unreadable) or "there is no finished clean pass")
        return
    steps = run.steps()
    cache_bytes = run.manifest.get("cache_bytes") or []
    for number, row in enumerate(steps.to_dict(orient="records")):
        of_step = {f"step/{name}": row[name] for name in OF_STEPS}
        if number < len(cache_bytes):
            of_step["step/cache_bytes"] = cache_bytes[number]
        _scalars(writer, of_step, number)
    for number, spans in enumerate(run.clean):
        of_stage = tables.stage_table(spans)["host_ms"]
        _scalars(writer, {f"stage/{name}_ms": value for name, value in of_stage.items()}, number)
        _scalars(writer, {"stage/total_ms": float(of_stage.sum())}, number)
        _histogram(writer, "token_gaps_ms", tables.token_gaps_ms(spans), number)
    for step, times in hierarchy.layer_table(run.representative).items():
        _histogram(writer, "layers_ms", times.dropna().to_numpy(), int(str(step)))
    writer.add_text("breakdown", _markdown(run.breakdown().drop(columns="host_ns").reset_index()))
    writer.add_text("checks", _markdown(pd.DataFrame(list(_verdict_rows(run)))))
    writer.add_text("environment", _markdown(_environment(run.manifest)))


def _of_samples(run: SampleRun, writer: SummaryWriter) -> None:
    each = run.by_stage
    whole = pd.concat([each.add_suffix("_ms").add_prefix("stage/"), each.sum(axis=1).rename("stage/total_ms")], axis=1)
    figures = [name for name in (*LATENCIES, "prompt_tokens", "new_tokens") if name in run.good]
    whole = whole.join(run.good[figures].add_prefix("sample/"))
    for number, row in whole.iterrows():
        _scalars(writer, {str(name): value for name, value in row.items()}, int(str(number)))
    for name in whole:
        _histogram(writer, str(name), whole[name].dropna().to_numpy(dtype=float), 0)
    writer.add_text("breakdown", _markdown(run.breakdown().reset_index()))
    for number, one in run.rows.iterrows():
        said = f"**{_cell(one['id'])}** {_cell(one['error']) or 'measured'}"
        writer.add_text("sample", said, int(str(number)))
    writer.add_text("environment", _markdown(_environment(run.manifest)))


def _scalars(writer: SummaryWriter, values: Mapping[str, Any], step: int) -> None:
    for name, value in values.items():
        if pd.notna(value):
            writer.add_scalar(name, float(value), step)


def _histogram(writer: SummaryWriter, name: str, values: np.ndarray, step: int) -> None:
    if len(values):
        writer.add_histogram(name, values, step)


def _verdict_rows(run: Run) -> Iterator[dict[str, Any]]:
    said = {True: "passed", False: "FAILED", None: "open"}
    for one in kept_verdicts(run):
        yield {"found": said[one.ok], "check": one.check, "measured": one.measured, "at most": one.allowed}


def _environment(manifest: Mapping[str, Any]) -> pd.DataFrame:
    known = {name: manifest[name] for name in ABOUT if manifest.get(name) is not None}
    known |= manifest.get("versions") or {}
    return pd.DataFrame({"what": list(known), "value": [str(value) for value in known.values()]})


def _markdown(frame: pd.DataFrame) -> str:
    """Return a table as TensorBoard's texts show one."""
    rows = [[str(name) for name in frame.columns], ["---"] * len(frame.columns)]
    rows += [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.4g}"
    return " ".join(str(value).split()).replace("|", "\\|")
