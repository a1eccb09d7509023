"""A self-contained HTML page: escaped text, tables that sort, figures, and a policy that runs no other script."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from profkit.errors import ProfkitError

MOST_ROWS = 200
"""Rows of a table that a page shows where there may be many."""
TALL = 25
"""Rows from which on a table scrolls in a box of its own."""


@dataclass(frozen=True)
class Column:
    """A column of a table: its name in the frame, its title, and the digits behind the point of its numbers."""

    name: str
    title: str
    digits: int = 2
    percent: bool = False


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; `kind` is a class of the style sheet: note, warning, failure, answer."""
    return f"<p{_class(kind)}>{escape(text)}</p>"


def items(texts: Iterable[str], kind: str = "") -> str:
    """Return a list of sentences."""
    return f"<ul{_class(kind)}>" + "".join(f"<li>{escape(one)}</li>" for one in texts) + "</ul>"


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def table(frame: pd.DataFrame, columns: Sequence[Column], most: int | None = None, weight: str = "") -> str:
    """Return a table that sorts by a click on a title.

    `most` limits its rows; what is left out is said, with its share of the column `weight`.
    """
    shown = frame if most is None else frame.head(most)
    aligned = ((_class(_align(frame[one.name])), escape(one.title)) for one in columns)
    head = "".join(f'<th scope="col"{where}>{title}</th>' for where, title in aligned)
    body = "".join(
        "<tr>" + "".join(_cell(value, column) for value, column in zip(row, columns, strict=True)) + "</tr>"
        for row in shown[[one.name for one in columns]].itertuples(index=False)
    )
    tall = " tall" if len(shown) > TALL else ""
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    text = f'<div class="wide{tall}"><table class="sorts">{inside}</table></div>'
    if len(shown) < len(frame):
        share = shown[weight].sum() / frame[weight].sum() if weight and frame[weight].sum() else math.nan
        of_time = "" if math.isnan(share) else f", with {share:.1%} of the time"
        text += paragraph(
            f"The first {len(shown)} of {len(frame)} rows{of_time}; all are in the run directory.", "note"
        )
    return text


def _align(values: pd.Series) -> str:
    """Return the class of a column: numbers stand to the right."""
    return "number" if pd.api.types.is_numeric_dtype(values) else ""


def _cell(value: Any, column: Column) -> str:
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        number = float(value)
        if math.isnan(number):
            return '<td class="number" data-value="">–</td>'
        said = f"{number:.1%}" if column.percent else f"{number:,.{column.digits}f}"
        return f'<td class="number" data-value="{number!r}">{said}</td>'
    return f"<td>{escape(str(value))}</td>"


def pairs(values: Iterable[tuple[str, Any]]) -> str:
    """Return names beside values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in values)
    return f'<div class="wide"><table class="pairs"><tbody>{rows}</tbody></table></div>'


def figure(fig: go.Figure, name: str, search: bool = False, choices: Sequence[str] = ()) -> str:
    """Return a plotly figure; with `search`, a field above it that finds nodes by what their names hold.

    `choices` are the titles of its traces, if one of them is shown at a time: buttons choose it.
    """
    # The text of a script element ends at "</": no angle bracket of a name must reach it.
    data = str(fig.to_json()).replace("<", "\\u003c")
    field = f'<input type="search" data-for="{name}" placeholder="search" aria-label="search {name}"><output></output>'
    buttons = "".join(
        f'<button type="button" data-for="{name}" data-trace="{number}" aria-pressed="{str(not number).lower()}">'
        f"{escape(title)}</button>"
        for number, title in enumerate(choices)
    )
    choice = f'<div class="choices">{buttons}</div>' if len(choices) > 1 else ""
    return (
        f'<div class="figure">{choice}{field if search else ""}<div id="{name}" class="plot"></div>'
        f'<script type="application/json" data-figure="{name}">{data}</script></div>'
    )


def section(title: str, parts: Iterable[str], anchor: str = "") -> str:
    """Return a section with a heading."""
    mark = f' id="{anchor}"' if anchor else ""
    return f"<section{mark}><h2>{escape(title)}</h2>{guarded(title, parts)}</section>"


def guarded(title: str, parts: Iterable[str]) -> str:
    """Return parts as far as they can be made; what stopped them is said, and the rest of the page goes on."""
    made: list[str] = []
    try:
        made.extend(parts)
    except ProfkitError as error:
        made.append(paragraph(f"{title} cannot be shown: {error}", "failure"))
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        made.append(
            paragraph(f"{title} cannot be shown in full, as the run holds what was not expected: {said}.", "failure")
        )
    return "".join(made)


def fold(title: str, parts: Iterable[str]) -> str:
    """Return parts that open on a click."""
    return f"<details><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def label(text: str, longest: int = 90) -> str:
    """Return a name as plotly may show it, which reads some HTML: escaped, its middle left out if it is long."""
    if len(text) > longest:
        half = longest // 2 - 1
        text = f"{text[:half]}…{text[-half:]}"
    return escape(text, quote=False)


def document(title: str, parts: Iterable[str]) -> str:
    """Return the whole page. It loads nothing, and a policy lets its own two scripts run and no other."""
    data = files("profkit") / "data"
    scripts = [get_plotlyjs(), (data / "report.js").read_text(encoding="utf-8")]
    hashes = " ".join(f"'sha256-{_digest(one)}'" for one in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'"
    style = (data / "report.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>{''.join(parts)}</main>"
        f"{''.join(f'<script>{one}</script>' for one in scripts)}</body></html>\n"
    )


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def json_text(value: Any) -> str:
    """Return a value as indented JSON."""
    return json.dumps(value, indent=1, ensure_ascii=False, default=str)
