"""What a generate() had to do: FLOPs and bytes by stage, step and module, and the arithmetic on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from profkit import stages
from profkit.spans import NOBODY, Spans

QUANTITIES = (
    *("flops", "weight_bytes", "cache_read_bytes", "cache_written_bytes", "activation_bytes"),
    *("operator_bytes", "operators"),
)
"""flops: see formulas.CONVENTION. The floor of bytes is the sum of the next four: each weight once a step (of tables,
the rows that were looked up), what the cache held when it is first read in a step, what was added to it, and what one
part of the model made and another reads (written once, read once by each part). operator_bytes: what the operators move
one by one, inputs and outputs, views aside; fused kernels move less. operators: how many they are."""
FLOOR = QUANTITIES[1:5]
KEYS = ["step", "stage", "path"]


@dataclass(frozen=True)
class Work:
    """The work of one generate().

    `table` has a row for each step, stage and scope with work of its own: step, phase (prefill or decode), stage, path,
    counted (False: follows from counted steps by a line), and QUANTITIES as integers; rows sum to the total.
    `operators` has name, calls, flops, operator_bytes and formula (whether there is one) over the counted steps.
    `parts` has role, path, parameters, bytes and dtype. `about` says how it was counted.
    """

    table: pd.DataFrame
    operators: pd.DataFrame
    parts: pd.DataFrame
    about: Mapping[str, Any] = field(default_factory=dict)

    def stages(self) -> pd.DataFrame:
        """Return a row a stage with work: QUANTITIES and bytes, their floor."""
        sums = self.table.groupby("stage", sort=False)[list(QUANTITIES)].sum()
        return with_bytes(sums.reindex([name for name in stages.NAMES if name in sums.index]))

    def steps(self) -> pd.DataFrame:
        """Return a row a step, everything of its iteration included: step, phase, counted, QUANTITIES and bytes."""
        grouped = self.table.groupby("step", sort=True)
        sums = grouped[list(QUANTITIES)].sum()
        told = grouped[["phase", "counted"]].first()
        return with_bytes(told.join(sums)).reset_index()

    def decoder_steps(self) -> pd.DataFrame:
        """Return steps() of the decoder stack alone: what a step's prefill or decode stage does."""
        inside = self.table[self.table["stage"].isin(["prefill", "decode"])]
        return Work(inside, self.operators, self.parts, self.about).steps()

    def modules(self) -> pd.DataFrame:
        """Return a row a scope with work of its own: path, stage, QUANTITIES and bytes (its own, children apart)."""
        sums = self.table.groupby(["path", "stage"], sort=False)[list(QUANTITIES)].sum()
        return with_bytes(sums).reset_index()

    def total(self) -> pd.Series:
        """Return the sums of QUANTITIES, and bytes."""
        return with_bytes(self.table[list(QUANTITIES)].sum().to_frame().T).iloc[0]

    def to_record(self) -> dict[str, Any]:
        """Return all but the table as plain values."""
        rows = {name: getattr(self, name).to_dict(orient="records") for name in ("operators", "parts")}
        return {"about": dict(self.about), **rows}

    @classmethod
    def from_record(cls, record: Mapping[str, Any], table: pd.DataFrame) -> Work:
        """Return the work that to_record() and its table describe."""
        return cls(table, pd.DataFrame(record["operators"]), pd.DataFrame(record["parts"]), record["about"])


def with_bytes(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table of QUANTITIES with a column bytes: the floor of what must move."""
    return table.assign(bytes=table[list(FLOOR)].sum(axis=1))


def work_table(spans: Spans, sums: np.ndarray) -> pd.DataFrame:
    """Return Work.table of a pass whose host clock numbers the rows of `sums` [ticks, QUANTITIES].

    Each segment gets what was counted between its marks: the partition of time into stages, steps and scopes is that of
    work. Work outside of generate() is left out, as its time is.
    """
    at = spans.marks.host_ns
    each = np.diff(sums[at], axis=0)
    inside = spans.stage >= 0
    owner = spans.scope[np.maximum(spans.owner, 0)]
    paths = np.array([scope.path for scope in spans.scopes], dtype=object)
    prefill = np.append(spans.steps.prefill, True)
    frame = pd.DataFrame(each[inside], columns=list(QUANTITIES))
    frame.insert(0, "step", spans.step[inside])
    frame.insert(1, "phase", np.where(prefill[spans.step[inside]], "prefill", "decode"))
    frame.insert(2, "stage", np.array(stages.NAMES)[spans.stage[inside]])
    frame.insert(3, "path", paths[owner[inside]])
    frame.insert(4, "counted", True)
    frame = frame[(frame[list(QUANTITIES)] != 0).any(axis=1) | (frame["step"] == NOBODY)]
    return frame.groupby([*KEYS[:1], "phase", *KEYS[1:], "counted"], sort=False, as_index=False).sum()
