"""Lists of samples: directories, JSON lines, Parquet, and JSON lists, as files and prompts with an id each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from profkit import media
from profkit.directories import writable
from profkit.errors import InputError

FIELDS = {
    "images": ("image", "images"),
    "videos": ("video", "videos"),
    "events": ("events", "event", "event_data", "event_path"),
}
PROMPTS = ("prompt", "question", "text")
PLACEHOLDERS = ("<image>", "<video>", "<event>")


@dataclass(frozen=True)
class Item:
    """One sample of a list: its id, its files, its prompt (None: the default), what is wrong with it, if anything."""

    id: str
    files: tuple[Path, ...] = ()
    prompt: str | None = None
    error: str = ""
    media: str = ""
    """What the list says the files are (images, videos, events); "" leaves it to their names."""

    @property
    def fingerprint(self) -> str:
        """What tells this sample from another one of the same id: a hash of its files' places and its prompt."""
        told = "\0".join([*(str(one.absolute()) for one in self.files), self.prompt or ""])
        return hashlib.sha256(writable(told).encode()).hexdigest()


def read_items(path: Path, root: Path | None = None) -> list[Item]:
    """Return the samples that a directory, a .jsonl, .json or .parquet file lists.

    Paths in a list are relative to `root`, else to the list's own directory.
    A directory's samples are its files of known kinds. What is wrong with a single sample (a broken line, a file that
    is missing, an id that another has) stands in its `error`. Raises InputError if the list itself cannot be read, or
    is empty.
    """
    if path.is_dir():
        files = sorted(one for one in path.rglob("*") if one.suffix.lower() in media.KIND_OF_SUFFIX)
        items = _checked([Item(writable(str(one.relative_to(path))), (one,)) for one in files])
    elif path.suffix.lower() in media.KIND_OF_SUFFIX:
        kind = media.KIND_OF_SUFFIX[path.suffix.lower()]
        raise InputError(
            f"{path} is {media.with_article(kind)}, no list of samples: give it as an input, or its folder."
        )
    else:
        items = _checked([*_listed(path, root or path.parent)])
    if not items:
        raise InputError(f"{path} lists no samples.")
    return items


def _listed(path: Path, root: Path) -> Iterator[Item]:
    try:
        if path.suffix.lower() == ".parquet":
            for number, row in enumerate(pd.read_parquet(path).to_dict(orient="records")):
                kept = {str(key): value for key, value in row.items() if _is_given(value)}
                yield _item(kept, f"row {number}", root)
        elif path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise InputError(f"{path} is JSON, but not a list of samples.")
            for number, row in enumerate(rows):
                yield _item(row, f"entry {number}", root)
        else:
            with path.open(encoding="utf-8-sig", errors="replace") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _line(line, f"line {number}", root)
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"Cannot read the samples {path}: {' '.join(str(error).split())[:200]}.") from error


def _is_given(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and value != value)


def _line(line: str, place: str, folder: Path) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Item(place, error=f"{place} is not JSON: {error}.")
    return _item(row, place, folder)


def _item(row: Any, place: str, folder: Path) -> Item:
    """Return the sample that a row describes; paths are relative to a folder."""
    if not isinstance(row, Mapping):
        return Item(place, error=f"{place} is no object with fields.")
    name = _name(place if row.get("id") is None else row["id"])
    if strange := [key for key in PROMPTS if row.get(key) is not None and not isinstance(row[key], str)]:
        return Item(name, error=f"{place}: {strange[0]} must be text, got {type(row[strange[0]]).__name__}.")
    given = {kind: value for kind, names in FIELDS.items() for key in names if (value := row.get(key)) is not None}
    known = ", ".join(names[0] for names in FIELDS.values())
    if not given:
        return Item(name, error=f"{place} names no file: it needs a field of {known}.")
    if len(given) > 1:
        return Item(name, error=f"{place} names files of several kinds ({', '.join(given)}): one a sample.")
    ((kind, value),) = given.items()
    listed = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    if not listed:
        return Item(name, error=f"{place} names no file: its field of {kind} is empty.")
    if not all(isinstance(one, str) for one in listed):
        return Item(name, error=f"{place}: files must be given as paths, got {type(listed[0]).__name__}.")
    files = tuple(folder / one for one in listed)
    missing = [str(one) for one in files if not _is_file(one)]
    said = f"{place}: there is no file {missing[0][:300]}." if missing else ""
    return Item(name, files, _prompt(row), said, kind)


def _name(value: Any) -> str:
    """Return an id as text; tables with a gap in a column of whole numbers hold 1.0 for 1."""
    return writable(str(int(value) if isinstance(value, float) and value.is_integer() else value))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # Names that no file can have: too long, or with a null byte.
        return False


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


def _checked(items: Sequence[Item]) -> list[Item]:
    """Return the samples; of those with one id the later ones are in error, under ids that no other has."""
    taken, seen, found = {item.id for item in items}, set[str](), []
    for item in items:
        if item.id in seen:
            said = f"the id {item.id!r} was given before; ids tell samples apart."
            fresh = next(name for number in count(2) if (name := f"{item.id} ({number})") not in taken)
            item = replace(item, id=fresh, error=item.error or said)
        taken.add(item.id)
        seen.add(item.id)
        found.append(item)
    return found
