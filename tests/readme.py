"""The figures in README.md, made from committed runs and results: python tests/readme.py writes them."""

from __future__ import annotations

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
OVERHEAD = ROOT / "tests" / "benchmarks" / "results" / "overhead.txt"


def table() -> str:
    """Return what `profkit trace` printed for the committed run."""
    return printed(text.report(profkit.load(RUN)))


def inspection() -> str:
    """Return what `profkit inspect` prints for the small LLaVA."""
    result = CliRunner().invoke(cli.cli, ["inspect"], env={"COLUMNS": "118"}, catch_exceptions=False)
    return "\n".join(line.rstrip() for line in result.stdout.splitlines())


def printed(parts: Iterable[Any]) -> str:
    """Return the parts of a report as a terminal of 118 columns shows them."""
    console = Console(file=io.StringIO(), width=118, highlight=False, color_system=None)
    for part in parts:
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def filled(readme: str) -> str:
    """Return the README with each figure block replaced by what the runs give."""
    blocks = {"table": table(), "inspect": inspection(), "overhead": OVERHEAD.read_text(encoding="utf-8").rstrip()}
    for name, content in blocks.items():
        block = f"<!-- {name} -->\n```\n{content}\n```\n<!-- /{name} -->"
        readme, count = re.subn(
            rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, readme, flags=re.S
        )
        assert count == 1, name
    return readme


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
