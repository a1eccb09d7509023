"""Decode steps on a line: where each step's work grows by the same, the later ones follow from a few."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from profkit.work import QUANTITIES

KEYS = ["stage", "path"]
NEARLY = ["activation_bytes", "operator_bytes"]
EXACT = [name for name in QUANTITIES if name not in NEARLY]


@dataclass(frozen=True)
class Line:
    """A table of counted steps (see work.Work) whose decode steps lie on a line in every quantity, row by row.

    `last` and `slope` are the last counted step's rows, indexed by stage and path, and what each step adds to them.
    """

    counted: pd.DataFrame
    last: pd.DataFrame
    slope: pd.DataFrame

    @property
    def last_step(self) -> int:
        """The number of the last counted step."""
        return int(self.counted["step"].max())

    @property
    def prefills(self) -> int:
        """In how many steps the prompt was read."""
        return int(self.counted.loc[self.counted["phase"] == "prefill", "step"].nunique())

    def at(self, step: int) -> pd.DataFrame:
        """Return the rows of a step."""
        return self.last + (step - self.last_step) * self.slope

    def upto(self, steps: int) -> pd.DataFrame:
        """Return the table with so many steps; those that follow have counted False."""
        numbers = np.arange(self.last_step + 1, steps)
        beyond = (numbers - self.last_step)[:, None, None]
        values = self.last.to_numpy()[None] + beyond * self.slope.to_numpy()[None]
        rows = pd.DataFrame(values.reshape(-1, len(QUANTITIES)), columns=list(QUANTITIES))
        keys = self.last.index.to_frame(index=False)
        rows[KEYS] = pd.concat([keys] * len(numbers), ignore_index=True) if len(numbers) else keys[:0]
        rows["step"], rows["phase"], rows["counted"] = np.repeat(numbers, len(keys)), "decode", False
        return pd.concat([self.counted, rows[self.counted.columns]], ignore_index=True)

    def meets(self, table: pd.DataFrame, at: int, step: int) -> bool:
        """Tell whether step number `at` of another table is what this line says of `step`.

        FLOPs, weights, cache and the number of operators must be equal, row by row; other bytes may miss by 1 %
        of a step's: where the prompt is embeddings, generate()'s own list of ids is shorter than the context.
        """
        found, told = _rows(table, at), self.at(step)
        if not found.index.equals(told.index) or not found[EXACT].equals(told[EXACT]):
            return False
        return abs(int((found[NEARLY] - told[NEARLY]).to_numpy().sum())) <= int(told["operator_bytes"].sum()) / 100


def line_of(table: pd.DataFrame) -> Line | None:
    """Return the line of a table's decode steps, None unless the two before each of its last two predict it exactly."""
    decode = np.unique(table["step"][table["phase"] == "decode"])
    if len(decode) < 4:
        return None
    rows = [_rows(table, int(step)) for step in decode[-4:]]
    if not all(one.index.equals(rows[0].index) for one in rows):
        return None
    values = np.stack([one.to_numpy() for one in rows])
    if np.diff(values, n=2, axis=0).any():
        return None
    return Line(table, rows[-1], rows[-1] - rows[-2])


def _rows(table: pd.DataFrame, step: int) -> pd.DataFrame:
    return table[table["step"] == step].set_index(KEYS)[list(QUANTITIES)].sort_index()
