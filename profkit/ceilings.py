"""What a machine can do at most, as measured: rates of arithmetic and memory, kept by device, driver and version."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from profkit import stats
from profkit.datasheets import Datasheet, datasheet
from profkit.errors import InputError

SCHEMA = 1
KINDS: Mapping[str, Any] = {
    **dict.fromkeys(("device", "device_name", "driver", "torch"), str),
    "threads": int,
    "measured_unix": int | float,
    "notes": list | tuple,
}
NOISY = 0.05
"""A ceiling whose rounds lie further apart (p90 over p10 of the median) is called noisy."""


@dataclass(frozen=True)
class Ceiling:
    """A rate (or, of launches, a time in s), measured in several rounds: their median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Ceiling:
        """Return what a list of rounds says."""
        given = np.asarray(values, dtype=float)
        median, p10, p90 = (stats.percentile(given, q) for q in (50, 10, 90))
        return cls(median, p10, p90, len(given))

    @property
    def spread(self) -> float:
        """How far the rounds lie apart: (p90 - p10) / median."""
        return (self.p90 - self.p10) / self.median if self.median else float("nan")


@dataclass(frozen=True)
class Ceilings:
    """The measured limits of one device.

    `device_name` is as torch gives it, `driver` the driver's version ("" for a CPU), `threads` those of a CPU's
    operators. `flops_per_s` by dtype: a large product of square matrices. `copy_bytes_per_s`: a large copy, bytes read
    and written; `read_bytes_per_s`: a large sum. `launch_s`: one small operator from the host, of many in a row.
    `upload_bytes_per_s`: host to device, from pinned memory; None where they are one.
    """

    device: str
    device_name: str
    driver: str
    torch: str
    threads: int
    flops_per_s: Mapping[str, Ceiling]
    copy_bytes_per_s: Ceiling
    read_bytes_per_s: Ceiling
    launch_s: Ceiling
    upload_bytes_per_s: Ceiling | None = None
    measured_unix: float = 0.0
    notes: tuple[str, ...] = field(default=())

    @property
    def bytes_per_s(self) -> float:
        """The most that memory gave: copies or reads."""
        return max(self.copy_bytes_per_s.median, self.read_bytes_per_s.median)

    def peak(self, dtype: str) -> float:
        """Return the measured FLOP/s of a dtype, NaN where it was not measured."""
        found = self.flops_per_s.get(dtype)
        return found.median if found else float("nan")

    @property
    def datasheet(self) -> Datasheet | None:
        """What the maker says, where that is known."""
        return datasheet(self.device_name)

    def rows(self) -> list[tuple[str, str, Ceiling, float]]:
        """Return each ceiling: what, unit, measured, and the maker's figure (NaN where it is not known)."""
        sheet, none = self.datasheet, float("nan")
        found = [
            (f"{dtype} matrix product", "FLOP/s", one, sheet.flops_per_s.get(dtype, none) if sheet else none)
            for dtype, one in self.flops_per_s.items()
        ]
        memory = sheet.bytes_per_s if sheet else none
        found.append(("copy, read and written", "B/s", self.copy_bytes_per_s, memory))
        found.append(("read", "B/s", self.read_bytes_per_s, memory))
        if self.upload_bytes_per_s is not None:
            found.append(("host to device", "B/s", self.upload_bytes_per_s, none))
        return [*found, ("launch of an operator", "s", self.launch_s, none)]

    def to_record(self) -> dict[str, Any]:
        """Return plain values."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Ceilings:
        """Return the ceilings that to_record() described. Raises InputError for anything else."""
        try:
            values = {key: value for key, value in record.items() if key != "schema"}
            if record["schema"] != SCHEMA:
                raise ValueError(f"schema {record['schema']}, this profkit reads {SCHEMA}")
            values["flops_per_s"] = {name: _ceiling(name, one) for name, one in record["flops_per_s"].items()}
            for name in ("copy_bytes_per_s", "read_bytes_per_s", "launch_s"):
                values[name] = _ceiling(name, record[name])
            upload = record["upload_bytes_per_s"]
            values["upload_bytes_per_s"] = None if upload is None else _ceiling("upload_bytes_per_s", upload)
            for name, kind in KINDS.items():
                if isinstance(values[name], bool) or not isinstance(values[name], kind):
                    raise TypeError(f"{name} is {values[name]!r}")
            if not all(isinstance(one, str) for one in values["notes"]):
                raise TypeError(f"notes are {values['notes']!r}")
            values["notes"] = tuple(values["notes"])
            return cls(**values)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"These are no ceilings: {type(error).__name__}: {error}.") from error


def _ceiling(name: str, record: Mapping[str, Any]) -> Ceiling:
    """Return a recorded ceiling. Raises ValueError for what no clock can have measured."""
    found = Ceiling(**record)
    numbers = [found.median, found.p10, found.p90, found.rounds]
    if not all(isinstance(one, int | float) and math.isfinite(one) and one > 0 for one in numbers):
        raise ValueError(f"{name} is {dict(record)}")
    return found


def cache_folder() -> Path:
    """Return where ceilings are kept: profkit/ceilings in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "profkit" / "ceilings"


def file_of(device_name: str, driver: str, torch: str, threads: int) -> Path:
    """Return the file that keeps the ceilings of a device."""
    key = json.dumps([device_name, driver, torch, threads])
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()[:60]
    return cache_folder() / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.json"


def read(path: Path) -> tuple[Ceilings | None, str]:
    """Return the ceilings in a file, None if there are none that can be read, and in a sentence what was wrong."""
    try:
        return Ceilings.from_record(json.loads(path.read_text(encoding="utf-8"))), ""
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, InputError) as error:
        return None, f"{path} is damaged, so it is not used: {' '.join(str(error).split())[:200]}"


def write(found: Ceilings, path: Path) -> str:
    """Keep ceilings in a file; return why not in a sentence, "" if it went well: they are good without."""
    fresh = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(found.to_record(), indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
        return ""
    except OSError as error:
        return f"The ceilings are not kept: cannot write {path}: {error.strerror}."
    finally:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)


def kept_for(device_name: str, torch: str, threads: int, driver: str | None = None) -> Ceilings | None:
    """Return the newest ceilings kept for a device; None if there are none. `driver` None: whatever its driver."""
    found = [read(path)[0] for path in cache_folder().glob("*.json")] if cache_folder().is_dir() else []
    fits = [
        one
        for one in found
        if one is not None
        and (one.device_name, one.torch) == (device_name, torch)
        and driver in (None, one.driver)
        # An accelerator does not care how many threads the host has.
        and (one.device != "cpu" or one.threads == threads)
    ]
    return max(fits, key=lambda one: one.measured_unix, default=None)
