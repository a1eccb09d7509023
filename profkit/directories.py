"""Directories that hold runs: whether one can be written, writing all of it or nothing, and values as JSON has them."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from profkit.errors import InputError

SCHEMA = 1


def check_schema(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise InputError for a run of another schema than this profkit's."""
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{folder} has schema {manifest.get('schema')}, this profkit reads {SCHEMA}: use the profkit that wrote it."
        )


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


def writable(text: str) -> str:
    r"""Return a text as UTF-8 can hold it: what it cannot, such as a byte of a file's name, becomes like \udc80."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def plain(value: Any) -> Any:
    """Return a value as JSON in UTF-8 can hold it: NaN becomes null, numpy numbers plain ones, texts writable()."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int | float | bool | None):
        return value
    return writable(str(value))
