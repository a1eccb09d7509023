"""Saved runs as one self-contained HTML page that people read."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from profkit import page, run_sections, sample_sections, side_by_side
from profkit.errors import InputError
from profkit.run import Run
from profkit.sample_runs import SampleRun, Saved


def write_report(saved: Sequence[Saved] | Saved, path: str | os.PathLike[str], force: bool = False) -> Path:
    """Write the page of one run, or of several side by side, and return its path.

    Raises InputError if the file exists and `force` is not given, or if it cannot be written.
    """
    target = Path(path)
    if target.exists() and not force:
        raise InputError(f"{target} already exists: choose another --out, or --force to replace it.")
    text = html_of([saved] if isinstance(saved, Run | SampleRun) else saved)
    fresh = target.with_name(f".{target.name}.new")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(target)
    except OSError as error:
        raise InputError(f"Cannot write {target}: {error.strerror or error}; choose another --out.") from error
    finally:
        fresh.unlink(missing_ok=True)
    return target


def html_of(saved: Sequence[Saved]) -> str:
    """Return the page of one run, or of several: side by side first, then each one's own."""
    names = [name_of(one) for one in saved]
    if len(saved) == 1:
        return page.document(f"profkit: {names[0]}", _whole(saved[0], "h1", "run"))
    parts = [f"<h1>{escape(' · '.join(names))}</h1>", *side_by_side.sections(saved)]
    for number, one in enumerate(saved):
        parts.append(page.fold(f"The report of {names[number]}", _whole(one, "h3", f"run{number}")))
    return page.document(f"profkit: {len(saved)} runs", parts)


def name_of(one: Saved) -> str:
    """Return how a run is called: its model, and its directory where it has one."""
    model = one.manifest.get("model") or one.manifest.get("model_class") or "a model"
    return f"{model} ({one.path.name})" if one.path else str(model)


def _whole(one: Saved, heading: str, key: str) -> Iterator[str]:
    yield f"<{heading}>{escape(name_of(one))}</{heading}>"
    yield page.paragraph(_about(one), "note")
    if isinstance(one, SampleRun):
        yield from sample_sections.sections(one, key)
    else:
        yield from run_sections.sections(one, key)
    yield page.section("Environment", _environment(one))


def _about(one: Saved) -> str:
    about = one.manifest
    weights = ", random weights" if about.get("weights") == "random" else ""
    size = about.get("parameters")
    parameters = f"{size / 1e6:,.1f} M parameters" if isinstance(size, int | float) else "parameters not known"
    device = about.get("device_name") or about.get("device") or "a device that the run does not name"
    return (
        f"{about.get('model_class') or 'a model of unknown class'}, {parameters}{weights}, "
        f"{about.get('dtype') or 'unknown dtype'} on {device}"
    )


def shell_line(command: Sequence[Any]) -> str:
    """Return a command as a shell takes it."""
    program, *arguments = map(str, command)
    # Earlier runs kept of `python -m profkit` the name of its file alone.
    return shlex.join([*(["python", "-m", "profkit"] if program == "__main__.py" else [program]), *arguments])


def _environment(one: Saved) -> Iterator[str]:
    about: dict[str, Any] = one.manifest
    lacking = [name for name in ("device", "dtype", "versions", "platform") if not about.get(name)]
    if lacking:
        yield page.paragraph(f"run.json does not tell: {', '.join(lacking)}.", "warning")
    yield page.pairs(
        [
            *(
                (name, about[name])
                for name in ("device", "device_name", "dtype", "attention", "threads", "platform")
                if name in about
            ),
            *(about.get("versions") or {}).items(),
            ("plan", about.get("plan")),
        ]
    )
    if command := about.get("command"):
        yield page.paragraph("To reproduce:")
        yield f"<pre>{escape(shell_line(command))}</pre>"
    yield page.fold("Configuration of the model", [f"<pre>{escape(page.json_text(about.get('config')))}</pre>"])
