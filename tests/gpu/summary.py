"""The suite's results as a table: for the terminal, and for the README."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NONE_YET = "no results yet: no device was at hand when this was built (python -m tests.gpu.suite --out DIR makes them)"
CLOCKS = ("host_ms", "device_ms", "busy_ms")
GROUPS = {1: "load", 2: "preprocess", 3: "vision encoding", 4: "LLM"}
MARKS = {True: "pass", False: "FAIL", None: "open"}
MIB = 1 << 20


def newest() -> str:
    """Return the table of the newest results in results/, or that there are none."""
    found = sorted(RESULTS.glob("*.json"), key=lambda path: path.stem[-10:])
    return summary(json.loads(found[-1].read_text(encoding="utf-8"))) if found else NONE_YET


def summary(results: dict[str, Any]) -> str:
    """Return the table of one run of the suite."""
    return "\n".join(line.rstrip() for line in _lines(results))


def _lines(results: dict[str, Any]) -> Iterator[str]:
    about = results["about"]
    yield f"{about['device']}, {about['size']}, torch {about['torch']}, transformers {about['transformers']}"
    for name, one in results.items():
        if isinstance(one, dict) and ("failed" in one or "not_run" in one):
            yield f"{name}: {'FAILED, ' + one['failed'] if 'failed' in one else 'not run, ' + one['not_run']}"
    yield from _systems({name: one for name, one in results.items() if isinstance(one, dict) and "stages" in one})
    yield from _overhead(results.get("overhead") or {})
    yield from _verdicts("decoupled truth", results.get("decoupled truth"))
    for wait, found in (results.get("known delays") or {}).items():
        if isinstance(found, list):
            yield from _verdicts(f"known delays, {wait}", found)
    for name, one in (results.get("side by side") or {}).items():
        if isinstance(one, dict):
            yield f"{name}: {one['sentence']}"
    speed = results.get("attribution") or {}
    if "us_an_event" in speed:
        yield f"attribution from a file: {speed['events']} events in {speed['seconds']:.2f} s"


def _systems(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    header = "".join(f"{name:>17}" for name in GROUPS.values())
    yield f"{'ms':<44}{'':<8}{header}{'total':>12}{'TTFT':>9}{'TPOT':>9}"
    for name, one in found.items():
        for clock in CLOCKS:
            sums = {number: _sum(one["stages"], number, clock) for number in GROUPS}
            if clock != "host_ms" and all(value is None for value in sums.values()):
                continue
            cells = "".join(f"{'–' if value is None else format(value, '.2f'):>17}" for value in sums.values())
            total = sum(value for value in sums.values() if value is not None)
            latency = one["latency"]
            ends = f"{latency['ttft_ms']:>9.2f}{latency['tpot_ms'] or 0:>9.2f}" if clock == "host_ms" else ""
            yield f"{name if clock == 'host_ms' else '':<44}{clock.removesuffix('_ms'):<8}{cells}{total:>12.2f}{ends}"
        said = [f"tokens {'equal' if one['same_tokens'] else 'DIFFER'}"]
        if (owned := one.get("kernels_owned")) is not None:
            said.append(f"kernel time in stages {owned['in_stages']:.3%}, in modules {owned['in_modules']:.3%}")
        if one.get("memory"):
            said.append(f"peak memory {max(row['peak'] for row in one['memory']) / MIB:.0f} MiB")
        if failed := [row["check"] for row in one["verdicts"] if row["ok"] is False]:
            said.append(f"FAILED {', '.join(failed)}")
        yield f"{'':<4}{'; '.join(said + one['notes'])}"


def _sum(stages: list[dict[str, Any]], group: int, clock: str) -> float | None:
    values = [row[clock] for row in stages if row["classic_stage"] == group and row.get(clock) is not None]
    return sum(values) if values else None


def _overhead(found: dict[str, Any]) -> Iterator[str]:
    for name, one in found.items():
        if isinstance(one, dict):
            low, high = ("–" if one[key] is None else format(one[key], ".4f") for key in ("low", "high"))
            said = f"{low} … {high}, {one['pairs']} pairs, {one['plain_ms']:.1f} ms without"
            yield f"overhead, {name:<28} ×{one['ratio']:.4f}  ({said})"


def _verdicts(title: str, found: Any) -> Iterator[str]:
    for one in found if isinstance(found, list) else []:
        yield f"{title}: {MARKS[one['ok']]} {one['check']}: {one['sentence']}"
