"""The command that says how far a run is from the limit, and what the limits are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from profkit.command import Command, model_options, quiet_libraries


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[RUN|MODEL] [INPUTS]...")
@model_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=32)
@click.option("--again", is_flag=True, help="Measure the ceilings again, instead of taking those that were kept.")
def roofline(arguments: tuple[str, ...], model: str | None, as_json: bool, again: bool, **options: Any) -> None:
    """Say how far each stage and step is from what the machine can do, and which limit binds.

    Alone it measures this machine's ceilings, once: matrix products, copies, launches. Of a saved RUN, whose FLOPs and
    bytes profkit trace counted, it says MFU, MBU, floors and what media tokens cost. Of a MODEL (as profkit trace takes
    it) it counts the work without running it, a preset without its weights, and says the floors.

    Example: profkit roofline traces/mine
    """
    from profkit import limits, roofline_text

    quiet_libraries()
    name, inputs = (model, arguments) if model else ((*arguments, None)[0], arguments[1:])
    answers, energy = None, None
    with Console(stderr=True).status("starting") as status:
        if name is None:
            found, notes = limits.of_device(options["device"], again, status.update)
        elif model is None and not inputs and (Path(name) / "run.json").is_file():
            from profkit import run as runs

            saved = runs.load(name)
            saved.check_work()
            energy = saved.manifest.get("energy")
            found, notes = limits.of_run(saved, again, status.update)
            answers = saved.roofline(found)
        else:
            answers, notes = limits.of_model(name, inputs, options, again, status.update)
            found = answers.limits.ceilings
    if as_json:
        said = roofline_text.ceilings_as_dict(found) if answers is None else roofline_text.as_dict(answers)
        click.echo(json.dumps({**said, "energy": energy, "notes": notes}, indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    for part in roofline_text.ceilings_report(found):
        console.print(part)
    for part in roofline_text.report(answers) if answers is not None else ():
        console.print(part)
    if line := roofline_text.energy_line(energy):
        console.print(line)
    for note in notes:
        console.print(f"[yellow]note: {escape(note)}[/yellow]", soft_wrap=True)
