"""The command line's words for parts, steps and places, parsed; and what torchrun says of this process."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from profkit.errors import InputError

MOST_STEPS = 1_000_000


def parse_parts(parts: Sequence[str]) -> dict[str, list[str]]:
    """Return role → paths from words such as projector=model.merger. Raises InputError for others."""
    named: dict[str, list[str]] = {}
    for word in parts:
        role, equals, path = word.partition("=")
        if not (role and equals and path):
            raise InputError(f"--part {word!r} is not role=path, such as projector=model.multi_modal_projector.")
        named.setdefault(role, []).append(path)
    return named


def parse_steps(steps: str) -> frozenset[int]:
    """Return the step numbers in a list such as "0-4,10". Raises InputError if it is not one."""
    chosen: set[int] = set()
    for part in steps.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"--profile-steps {steps!r} is not a list of steps such as 0-4,10.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MOST_STEPS:
            raise InputError(f"--profile-steps {steps!r} reaches beyond step {MOST_STEPS}.")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def parse_window(window: str | None) -> tuple[int, int] | None:
    """Return begin and end in us of a window such as "0-50" ms. Raises InputError if it is none."""
    if window is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*-\s*(\d+(?:\.\d+)?)\s*", window)
    if match is None or float(match[1]) >= float(match[2]):
        raise InputError(f"--event-window {window!r} is no window in ms such as 0-50.")
    return round(float(match[1]) * 1000), round(float(match[2]) * 1000)


def parse_sensor(sensor: str | None) -> tuple[int, int] | None:
    """Return (height, width) of a sensor such as "640x480" (width first). Raises InputError if it is none."""
    if sensor is None:
        return None
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", sensor)
    if match is None or not int(match[1]) or not int(match[2]):
        raise InputError(f"--sensor {sensor!r} is no size in pixels such as 640x480.")
    return int(match[2]), int(match[1])


def parse_size(size: str) -> int:
    """Return the bytes in a size such as "50MB" (powers of ten). Raises InputError if it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMG]?)B?\s*", size)
    if match is None:
        raise InputError(f"--trace-budget {size!r} is no size such as 50MB or 800kB.")
    found = round(float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[match[2]])
    if not found:
        raise InputError(f"--trace-budget {size!r} is nothing: --no-profile leaves the trace out.")
    return found


def new_directory(model: str) -> Path:
    """Return traces/<model>-<time>, with a number behind it if that is taken."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "model"
    base = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (Path("traces") / (f"{base}-{number}" if number > 1 else base) for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def rank_here() -> int | None:
    """Return this process's number among those that torchrun started, None if it is alone."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None
