"""The command line: what runs a model, and the way in. Only the cli modules print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from profkit import __version__, checks, cli_reading, cli_roofline, cli_view, jobs, text
from profkit.command import Command, model_options, quiet_libraries
from profkit.errors import InputError, InterruptedRunError, MeasurementError
from profkit.options import new_directory, rank_here

if TYPE_CHECKING:
    from collections.abc import Sequence

    from profkit.run import Run
    from profkit.verdicts import Verdict

DEFAULT_MODEL = "tiny-llava"
OF_ONE_SAMPLE = ("repeat", "profile", "profile_steps", "trace_budget", "corrected", "work", "energy")
OF_MANY = ("media_root", "limit", "resume", "fail_fast")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="profkit")
def cli() -> None:
    """Where does a multimodal model's generate() spend its time?"""


for command in (cli_reading.analyze, cli_reading.compare, cli_reading.report, cli_roofline.roofline, cli_view.view):
    cli.add_command(command)


@cli.command(cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[MODEL] [INPUTS]...")
@model_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=32)
@click.option("--min-new-tokens", type=click.IntRange(1), help="Go on at least so long, past an end token: equal work.")
@click.option("--cache", help="generate()'s cache_implementation: static lets it compile its decode step on a device.")
@click.option("--warmup", type=click.IntRange(0), default=1, help="Passes before measuring.")
@click.option("--repeat", type=click.IntRange(1), default=6, help="Clean passes, each beside a control.")
@click.option("--granularity", type=click.Choice(["stage", "layer", "module"]), default="layer")
@click.option("--profile/--no-profile", default=True, help="A pass inside torch.profiler.")
@click.option("--profile-steps", default="0-4", help="Steps that this pass records; 0 is the prefill.")
@click.option("--trace-budget", default="50MB", help="What the compressed trace may take; later steps are left out.")
@click.option("--energy", is_flag=True, help="Also measure joules by stage, afterwards, where a counter can be read.")
@click.option("--work/--no-work", default=True, help="Count FLOPs and bytes, after everything that is timed.")
@click.option("--seed", type=int, default=0, help="Random state of every pass.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: traces/<model>-<time>]")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
@click.option(
    "--corrected", is_flag=True, help="Also show times without what the instrument's marks cost, as calibrated."
)
@click.option("--tensorboard", is_flag=True, help="Also write scalars, histograms and texts for TensorBoard.")
@click.option("--strict", is_flag=True, help="Exit with status 1 if the run fails a check.")
@click.option(
    "--samples",
    "listed",
    type=click.Path(path_type=Path),
    metavar="LIST",
    help="Many samples: a directory of files, .jsonl, .json or .parquet with image, video or events, prompt and id.",
)
@click.option(
    "--media-root",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Where the files are that --samples names.  [default: the list's own directory]",
)
@click.option("--limit", type=click.IntRange(1), help="Of --samples, the first so many.")
@click.option("--resume", is_flag=True, help="Go on with the samples of --out that have no good row yet.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first sample that cannot be measured.")
def trace(arguments: tuple[str, ...], model: str | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure an unmodified generate() and say where the time went.

    MODEL is a preset (tiny-llava, the default, tiny-video-llava, tiny-eventgpt; llava-1.5-7b, video-llava-7b,
    eventgpt-7b), a checkpoint's directory or hub id, or package.module:function, which returns (model,
    generate_kwargs) or (model, processor). INPUTS are image files, a video, or an event stream (.npz, .npy), as the
    model takes them; without any, what ships with profkit.

    Example: profkit trace llava-1.5-7b photo.jpg --weights random --dtype bfloat16
    """
    name, inputs = _named(arguments, model)
    if options["listed"]:
        if inputs:
            raise InputError("--samples names the inputs: leave INPUTS out.")
        _refuse(OF_ONE_SAMPLE, "is for a single sample: leave it out with --samples")
        _trace_samples(name, out, as_json, options)
        return
    _refuse(OF_MANY, "is for many samples: give them by --samples")
    if rank_here() is not None:
        raise InputError("Several ranks share a list of samples: give --samples, or run without torchrun.")
    with Console(stderr=True).status("starting") as status:
        run = jobs.measure(name, inputs, out, options, status.update)
    if as_json:
        click.echo(json.dumps(text.as_dict(run, options["corrected"]), indent=1, allow_nan=False))
    else:
        _print_report(run, options["corrected"])
    if options["strict"]:
        _be_strict(checks.failed(run))


def _refuse(options: Sequence[str], why: str) -> None:
    """Raise InputError for the first of these options that was given."""
    context = click.get_current_context()
    for option in options:
        if context.get_parameter_source(option) is ParameterSource.COMMANDLINE:
            raise InputError(f"--{option.replace('_', '-')} {why}.")


def _be_strict(failed: Sequence[Verdict]) -> None:
    if failed:
        named = "; ".join(f"{one.check} ({text.figure(one)})" for one in failed)
        raise MeasurementError(f"The run is saved, but these checks failed: {named}.")


def _trace_samples(name: str, out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    """Measure a list of samples and print what they took, typically; under torchrun each rank measures its share."""
    from profkit import sample_checks, sample_lists, sample_runs, sample_text

    jobs.check_length(options)
    items = sample_lists.read_items(options["listed"], options["media_root"])[: options["limit"]]
    if options["resume"] and out is None:
        raise InputError("--resume needs --out: the run to go on with.")
    if options["resume"] and options["force"]:
        raise InputError("--resume goes on with a run, --force replaces it: give one of them.")
    quiet_libraries()
    from profkit import ranks, scalars

    if options["tensorboard"]:
        scalars.require()
    with ranks.joined() as here:
        target = here.first(lambda: sample_runs.target(out or new_directory(name), options["force"]))
        bar = Progress(*sample_text.COLUMNS, console=Console(stderr=True), disable=here.rank > 0)
        try:
            with bar:
                run = jobs.measure_samples(name, items, target, options, here, bar)
        except KeyboardInterrupt:
            kept = len(sample_runs.SampleRun.load(target, partial=True).good) if target.exists() else 0
            raise InterruptedRunError(f"Interrupted: {kept} samples are kept in {target}, --resume goes on.") from None
        except ranks.LostRankError as error:
            kept = len(sample_runs.SampleRun.load(target).good)
            raise ranks.LostRankError(
                f"A rank ended before the others: {kept} of {len(items)} samples are in {target}, --resume goes on "
                f"({error})."
            ) from error
        if here.rank > 0:
            return
        if options["tensorboard"]:
            scalars.write_scalars(run, target / "tensorboard")
    if as_json:
        click.echo(json.dumps(sample_text.as_dict(run), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for part in sample_text.report(run):
            console.print(part)
        console.print(f"Wrote {escape(str(target))}", soft_wrap=True)
    if not len(run.good):
        raise MeasurementError(f"None of the {len(run.rows)} samples could be measured.")
    if options["strict"]:
        _be_strict([one for one in sample_checks.verdicts(run) if one.ok is False])


@cli.command(name="inspect", cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[MODEL] [INPUTS]...")
@model_options
@click.option("--capabilities/--no-capabilities", default=True, help="Also try what the model can do.")
def inspect_command(arguments: tuple[str, ...], model: str | None, as_json: bool, **options: Any) -> None:
    """Show where a model's parts are, how each was found, how often it runs, and what the model can do.

    MODEL and INPUTS are those of profkit trace. The model runs a few short generate()s.

    Example: profkit inspect tiny-llava --part projector=model.multi_modal_projector
    """
    name, inputs = _named(arguments, model)
    with Console(stderr=True).status("starting") as status:
        found, parts, abilities = jobs.inspect(name, inputs, options, status.update)
    if as_json:
        click.echo(json.dumps(text.anatomy_as_dict(found, parts, abilities), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    for part in text.anatomy_report(found, parts, abilities):
        console.print(part)


@cli.command(cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="MODEL|RUN [INPUTS]...")
@model_options
@click.option("--max-new-tokens", type=click.IntRange(2), default=8)
@click.option("--repeat", type=click.IntRange(3), default=15, help="Repeats, and pairs of every experiment.")
@click.option("--seed", type=int, default=0, help="Random state of every pass.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: traces/<model>-<time>]")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
def verify(arguments: tuple[str, ...], model: str | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Show whether a run's figures can be trusted: every check with what was measured and what is allowed.

    Of a saved RUN what it can tell; of a MODEL (as profkit trace takes it) experiments too: the same tokens with and
    without probes, media encoded alone and generate() from their features against what was attributed, and known
    delays put into one part after the other. Exit status 1 if a check fails.

    Example: profkit verify tiny-llava
    """
    from profkit import run as runs
    from profkit import sample_checks, sample_runs, sample_text, saved_checks

    name, inputs = _named(arguments, model)
    result: sample_runs.Saved
    if model is None and not inputs and (Path(name) / "run.json").is_file():
        result = sample_runs.load_any(name)
    else:
        with Console(stderr=True).status("starting") as status:
            result = jobs.verify(name, inputs, out, options, status.update)
    if isinstance(result, runs.Run):
        headline, found = text.headline(result), saved_checks.complete(result)
    else:
        headline, found = sample_text.headline(result), sample_checks.verdicts(result)
    if as_json:
        click.echo(json.dumps(text.verdicts_as_dict(found), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        console.print(headline)
        console.print(text.verdict_table(found))
        if result.path:
            console.print(f"Run: {escape(str(result.path))}", soft_wrap=True)
    if failed := [one.check for one in found if one.ok is False]:
        raise MeasurementError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}.")


def _named(arguments: tuple[str, ...], model: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the model's name and the inputs among the arguments."""
    return (model, arguments) if model else ((*arguments, DEFAULT_MODEL)[0], arguments[1:])


def _print_report(run: Run, corrected: bool) -> None:
    console, saved = Console(highlight=False), run.path
    assert saved is not None
    for part in text.report(run, corrected):
        console.print(part)
    console.print(f"Wrote {escape(str(saved))}", soft_wrap=True)
    code = f"import profkit; print(profkit.load({str(saved)!r}).breakdown())"
    console.print(f'Read it again: python -c "{escape(code)}"', soft_wrap=True)
    if run.trace_json is not None:
        console.print(f"Open in https://ui.perfetto.dev: {escape(str(saved / 'trace.json.gz'))}", soft_wrap=True)


def main() -> None:
    """Entry point of the `profkit` command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "×" shall show "?" rather than end a finished measurement.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cli(prog_name="profkit")


if __name__ == "__main__":
    main()
