"""The figures in README.md, made from committed runs and results: python tests/readme.py writes them."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from rich.console import Console

import profkit
from profkit import cli, text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RUN = ROOT / "traces" / "tiny-llava-cpu"
RESULTS = ROOT / "tests" / "benchmarks" / "results"


def _beside(name: str, path: Path) -> Any:
    """Import a module by its path, wherever this one was started from."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_summary = _beside("gpu_summary", ROOT / "tests" / "gpu" / "summary.py")


def table() -> str:
    """Return what `profkit trace` printed for the committed run."""
    return printed(text.report(profkit.load(RUN)))


def command(*arguments: str) -> str:
    """Return what a command of profkit prints, `inspect` of the small LLaVA for one."""
    result = CliRunner().invoke(cli.cli, arguments, env={"COLUMNS": "118"}, catch_exceptions=False)
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


def analysis() -> str:
    """Return what `profkit analyze` prints for the committed run."""
    printed = command("analyze", str(RUN), "--top", "6", "--validate")
    return printed.replace(str(ROOT) + "/", "").rstrip()


def fidelity() -> str:
    """Return what the benchmark of fidelity found of the first system, the rows of equal tokens left out."""
    first, second, *_ = (RESULTS / "fidelity.txt").read_text(encoding="utf-8").split("\n\n")
    return "\n".join(line for line in f"{first}\n{second}".splitlines() if "  same " not in line)


def printed(parts: Iterable[Any]) -> str:
    """Return the parts of a report as a terminal of 118 columns shows them."""
    console = Console(file=io.StringIO(), width=118, highlight=False, color_system=None)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def filled(readme: str) -> str:
    """Return the README with each figure block replaced by what the runs give."""
    shown = ("overhead", "attribution", "comparison", "report", "work")
    measured = {name: (RESULTS / f"{name}.txt").read_text(encoding="utf-8").rstrip() for name in shown}
    measured["fidelity"] = fidelity()
    figures = [str(RUN.parent / "published" / f"{name}.json") for name in ("eventgpt", "video-llava")]
    measured["gpu"] = gpu_summary.newest()
    measured["published"] = command("compare", *figures)
    blocks = {"table": table(), "inspect": command("inspect"), "analyze": analysis(), **measured}
    for name, content in blocks.items():
        block = f"<!-- {name} -->\n```\n{content}\n```\n<!-- /{name} -->"
        readme, count = re.subn(
            rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, readme, flags=re.S
        )
        assert count == 1, name
    return readme


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
