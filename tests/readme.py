"""The figures in README.md, made from committed runs and results: python tests/readme.py writes them."""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console

import profkit
from profkit import text

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RUN = ROOT / "traces" / "tiny-llava-cpu"
OVERHEAD = ROOT / "tests" / "benchmarks" / "results" / "overhead.txt"


def table() -> str:
    """Return what `profkit trace` printed for the committed run."""
    run = profkit.load(RUN)
    console = Console(file=io.StringIO(), width=118, highlight=False, color_system=None)
    for part in text.report(run):
        console.print(part)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def filled(readme: str) -> str:
    """Return the README with each figure block replaced by what the runs give."""
    for name, content in (("table", table()), ("overhead", OVERHEAD.read_text(encoding="utf-8").rstrip())):
        block = f"<!-- {name} -->\n```\n{content}\n```\n<!-- /{name} -->"
        readme, count = re.subn(
            rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, block=block: block, readme, flags=re.S
        )
        assert count == 1, name
    return readme


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
