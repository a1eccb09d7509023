"""Two walls: imports go down only, torch stays below, and only the command line prints."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "profkit"

FLOORS = {
    1: {"stages", "errors", "stats", "verdicts", "media", "page_cache", "datasheets"},
    2: {
        *("ledger", "events", "anatomy", "trail", "wrapping", "clock", "environment", "processors"),
        *("event_streams", "videos", "eventgpt", "page", "options", "encodings", "steadiness", "directories"),
        *("arguments", "formulas", "fakes", "ceilings", "energy"),
    },
    3: {
        *("cache", "stopwatches", "stress", "prompts", "energy_pass"),
        *("spans", "pieces", "nesting", "plan", "structure", "stacks", "language", "models", "samples", "validation"),
        *("sample_lists", "command", "ranks"),
    },
    4: {"attribution", "audit", "chrome", "phases", "probes", "roles", "annotate", "work"},
    5: {
        *("hierarchy", "foreign", "occupancy", "graphs", "tables", "tracks", "kineto", "probing"),
        *("lines", "counting"),
    },
    6: {
        "corrections",
        "device_tables",
        "trust",
        "dummies",
        "pace",
        "timeline",
        "tensorboard",
        "saved_tables",
        "memory",
        "joint",
        "workload",
        "roofline",
    },
    7: {"run_work", "doubts"},
    8: {"marking", "run", "inspection", "capabilities", "explanation"},
    9: {"checks", "work_pass", "work_comparison"},
    10: {"analysis", "capture", "sample_runs", "trace_file"},
    11: {
        "sample_checks",
        "saved_checks",
        "text",
        "figures",
        "roofline_text",
        "trace_text",
        "passes",
        "comparison",
        "invariance",
        "delays",
        "decoupled",
        "findings",
        "scalars",
        "overhead",
    },
    12: {
        *("sample_text", "comparison_text", "sampling", "verification", "tracing", "verdict_sections"),
        *("roofline_page",),
    },
    13: {"run_sections", "sample_sections", "side_by_side", "jobs"},
    14: {"report", "limits"},
    15: {"cli_reading", "viewing"},
    16: {"cli_view", "cli_roofline"},
    17: {"cli"},
}
WITH_TORCH = {
    "cache",
    *("clock", "environment", "wrapping", "processors", "models", "samples", "plan", "probes", "kineto"),
    *("probing", "dummies", "inspection", "capabilities", "capture", "tracing", "eventgpt", "sampling", "ranks"),
    *(
        "encodings",
        "audit",
        "invariance",
        "delays",
        "decoupled",
        "verification",
        "marking",
        "overhead",
        "passes",
        "stopwatches",
        "memory",
    ),
    *("formulas", "fakes", "counting", "workload", "stress", "prompts", "work_pass", "energy_pass"),
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))


def imported(module: str) -> set[str]:
    """profkit's modules that a module imports at its top level or in its functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "profkit":
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("profkit."):
            found.add(node.module.split(".")[1])
    return found & set(MODULES)


def test_every_module_has_a_floor():
    assert set(FLOOR_OF) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_only(module):
    upward = {other for other in imported(module) if FLOOR_OF[other] >= FLOOR_OF[module]}
    assert not upward


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module):
    if module.startswith("cli"):
        return
    calls = [node for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_the_pure_half_loads_without_torch():
    pure = sorted(set(MODULES) - WITH_TORCH)
    code = f"""
import sys
sys.modules["torch"] = None
sys.modules["transformers"] = None
import profkit
for module in {pure!r}:
    __import__("profkit." + module)
profkit.load
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_modules_say_what_they_are_for_and_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert text.count("\n") <= 400
