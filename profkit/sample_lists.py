"""Lists of samples: directories, JSON lines, Parquet, and JSON lists, as files and prompts with an id each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from profkit.errors import InputError

FIELDS = {
    "images": ("image", "images"),
    "videos": ("video", "videos"),
    "events": ("events", "event", "event_data", "event_path"),
}
PROMPTS = ("prompt", "question", "text")
PLACEHOLDERS = ("<image>", "<video>", "<event>")
SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".npz", ".npy"),
)


@dataclass(frozen=True)
class Item:
    """One sample of a list: its id, its files, its prompt (None: the default), and what is wrong with it, if
    anything."""

    id: str
    files: tuple[Path, ...] = ()
    prompt: str | None = None
    error: str = ""


def read_items(path: Path) -> list[Item]:
    """Return the samples that a directory, a .jsonl, .json or .parquet file lists.

    A directory's samples are its files of known kinds. What is wrong with a single sample (a broken line, a file that
    is
    missing, an id that another has) stands in its `error`. Raises InputError if the list itself cannot be read, or is
    empty.
    """
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES)
        items = [Item(str(one.relative_to(path)), (one,)) for one in files]
    else:
        items = [*_checked(_listed(path))]
    if not items:
        raise InputError(f"{path} lists no samples.")
    return items


def _listed(path: Path) -> Iterator[Item]:
    try:
        if path.suffix == ".parquet":
            for number, row in enumerate(pd.read_parquet(path).to_dict(orient="records")):
                kept = {str(key): value for key, value in row.items() if _is_given(value)}
                yield _item(kept, f"row {number}", path.parent)
        elif path.suffix == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(rows, list):
                raise InputError(f"{path} is JSON, but not a list of samples.")
            for number, row in enumerate(rows):
                yield _item(row, f"entry {number}", path.parent)
        else:
            with path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _line(line, f"line {number}", path.parent)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read the samples {path}: {' '.join(str(error).split())[:200]}.") from error


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value != value)


def _line(line: str, place: str, folder: Path) -> Item:
    try:
        row = json.loads(line)
    except ValueError as error:
        return Item(place, error=f"{place} is not JSON: {error}.")
    return _item(row, place, folder)


def _item(row: Any, place: str, folder: Path) -> Item:
    """Return the sample that a row describes; paths are relative to the list's folder."""
    if not isinstance(row, Mapping):
        return Item(place, error=f"{place} is no object with fields.")
    name = str(row.get("id", place))
    given = [value for names in FIELDS.values() for key in names if (value := row.get(key)) is not None]
    listed = [one for value in given for one in ([value] if isinstance(value, str) else list(value))]
    if not all(isinstance(one, str) for one in listed):
        return Item(name, error=f"{place}: files must be given as paths.")
    files = tuple(folder / one for one in listed)
    if not files:
        known = ", ".join(names[0] for names in FIELDS.values())
        return Item(name, error=f"{place} names no file: it needs a field of {known}.")
    missing = [str(one) for one in files if not one.is_file()]
    return Item(name, files, _prompt(row), f"{place}: there is no file {missing[0]}." if missing else "")


def _prompt(row: Mapping[str, Any]) -> str | None:
    """Return a row's prompt: a field of its own, or what the human says first in a conversation."""
    for key in PROMPTS:
        if isinstance(row.get(key), str):
            return str(row[key])
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and isinstance(turns[0], Mapping):
        said = str(turns[0].get("value", ""))
        for placeholder in PLACEHOLDERS:
            said = said.replace(placeholder, "")
        return said.strip()
    return None


def _checked(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the samples; of those with one id the later ones are in error, under ids of their own."""
    seen: dict[str, int] = {}
    for item in items:
        times = seen[item.id] = seen.get(item.id, 0) + 1
        if times == 1:
            yield item
        else:
            said = f"the id {item.id!r} was given before; ids tell samples apart."
            yield replace(item, id=f"{item.id} ({times})", error=item.error or said)
