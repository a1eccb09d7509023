"""The command line: the only file that prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from profkit import __version__, text
from profkit.command import Command, model_options, quiet_libraries
from profkit.errors import InputError, MeasurementError
from profkit.options import new_directory, parse_parts, parse_steps

if TYPE_CHECKING:
    from profkit.models import Loaded
    from profkit.run import Run
    from profkit.samples import Sample

DEFAULT_MODEL = "tiny-llava"
MOST_VALIDATED = 300_000
"""Events that torch's validator, which loads them as Python objects, is asked to check unless told so."""


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="profkit")
def cli() -> None:
    """Where does a multimodal model's generate() spend its time?"""


@cli.command(cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[MODEL] [INPUTS]...")
@model_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=32)
@click.option("--warmup", type=click.IntRange(0), default=1, help="Passes before measuring.")
@click.option("--repeat", type=click.IntRange(1), default=5, help="Clean passes, each beside a control.")
@click.option("--granularity", type=click.Choice(["stage", "layer", "module"]), default="layer")
@click.option("--profile/--no-profile", default=True, help="A pass inside torch.profiler.")
@click.option("--profile-steps", default="0-4", help="Steps that this pass records; 0 is the prefill.")
@click.option("--seed", type=int, default=0, help="Random state of every pass.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: traces/<model>-<time>]")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
@click.option(
    "--samples",
    "listed",
    type=click.Path(path_type=Path),
    metavar="LIST",
    help="Many samples: a directory of files, .jsonl, .json or .parquet with image, video or events, prompt and id.",
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
        _trace_samples(name, out, as_json, options)
        return
    profile_steps = parse_steps(options["profile_steps"])
    status = Console(stderr=True).status("starting")
    with status:
        run, saved = _measure(name, inputs, out, profile_steps, options, status.update)
    if as_json:
        click.echo(json.dumps(text.as_dict(run, saved), indent=1, allow_nan=False))
    else:
        _print_report(run, saved)
    if failed := text.failed_checks(run):
        raise MeasurementError(f"The run is saved, but these checks failed: {'; '.join(failed)}.")


def _trace_samples(name: str, out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    """Measure a list of samples and print what they took, typically."""
    from profkit import sample_lists, sample_text

    items = sample_lists.read_items(options["listed"])[: options["limit"]]
    if options["resume"] and out is None:
        raise InputError("--resume needs --out: the run to go on with.")
    target = out or new_directory(name)
    quiet_libraries()
    from profkit import sampling

    with Progress(*sample_text.COLUMNS, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"loading {name}", total=len(items), failed=0)
        loaded = _load(name, options, lambda what: None)
        if loaded.processor is None:
            raise InputError(f"{name} comes without a processor, which --samples needs.")
        plan = sampling.Plan(
            options["max_new_tokens"],
            options["prompt"],
            _generate_options(loaded, options),
            **{key: options[key] for key in ("warmup", "granularity", "seed", "fail_fast", "resume")},
            progress=lambda done, total, failed: progress.update(
                task, description=name, completed=done, total=total, failed=failed
            ),
        )
        about = {"model": name, "weights": "random" if loaded.random_weights else "as loaded"}
        manifest = sampling.describe(loaded.model, plan, {**about, "samples": str(options["listed"])})
        run = sampling.measure(loaded.model, loaded.processor, items, target, plan, manifest)
    if as_json:
        click.echo(json.dumps(sample_text.as_dict(run), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    for part in sample_text.report(run):
        console.print(part)
    console.print(f"Wrote {escape(str(target))}", soft_wrap=True)


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
        found, parts, abilities = _inspect(name, inputs, options, status.update)
    if as_json:
        click.echo(json.dumps(text.anatomy_as_dict(found, parts, abilities), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    for part in text.anatomy_report(found, parts, abilities):
        console.print(part)


@cli.command(cls=Command, context_settings={"show_default": True})
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@click.option(
    "--capture",
    "captures",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A trace of the pass that captured the device graphs: it tells what replayed kernels belong to.",
)
@click.option("--top", type=click.IntRange(1), default=15, help="Rows of the tables of kernels and operators.")
@click.option("--csv", type=click.Path(path_type=Path), metavar="DIR", help="Also write every table as CSV.")
@click.option("--parquet", type=click.Path(path_type=Path), metavar="DIR", help="Also write every table as Parquet.")
@click.option(
    "--validate/--no-validate",
    default=None,
    help="torch's own validator of traces, which needs torch.  [default: up to 300,000 events]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def analyze(files: tuple[Path, ...], captures: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Say which scope owns each kernel of a trace, and whether host or device sets the pace.

    FILE is a Chrome trace that torch.profiler wrote, plain or gzip, from any version and device; a run of profkit's;
    or a
    directory of traces, such as TensorBoard's or one file a rank. A file that cannot be read is named, and the next
    one goes on.

    Example: profkit analyze trace.json.gz --parquet tables
    """
    from profkit import analysis, trace_text

    targets = {suffix: options[suffix] for suffix in ("csv", "parquet") if options[suffix]}
    for target in targets.values():
        if target.exists():
            raise InputError(f"{target} already exists: choose another directory.")
    with Console(stderr=True).status("reading") as status:
        found, failed = analysis.analyze_all(files, captures, status.update)
        for one in found:
            one.validated = _validated(one, options["validate"])
    between = analysis.rank_table(found)
    if as_json:
        click.echo(json.dumps(trace_text.all_as_dict(found, between, failed), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for one in found:
            for part in (*trace_text.report(one, options["top"]), ""):
                console.print(part)
        if len(between):
            console.print(trace_text.ranks(between))
    for suffix, target in targets.items():
        if found:
            analysis.write_tables(found, between, target, suffix)
            click.echo(f"Wrote {target}", err=as_json)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in failed.values():
        errors.print(f"[red]Error:[/red] {escape(sentence)}")
    if failed:
        click.get_current_context().exit(InputError.exit_status)


@cli.command(cls=Command, name="compare")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN...")
@click.option("--fail-if", "conditions", multiple=True, metavar="COND", help="e.g. 'prefill > 5%': exit status 1 then.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def compare_command(paths: tuple[Path, ...], conditions: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Show runs side by side: stages with intervals, ratios, equal work, and in what the runs are not alike.

    The others are compared with the first. Runs of one sample bring their repeats, runs of many samples their samples,
    in pairs where they are the same. --fail-if makes it a gate: it fails where a stage is slower than allowed, beyond
    the noise.

    Example: profkit compare traces/before traces/after --fail-if 'prefill > 5%'
    """
    from profkit import comparison, comparison_text

    if len(paths) < 2:
        raise InputError("compare takes two runs or more.")
    base, *others = (comparison.load(path) for path in paths)
    if as_json:
        click.echo(json.dumps(comparison_text.as_dict(base, others), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for part in comparison_text.report(base, others):
            console.print(part)
    tables = [comparison.compare(base, other) for other in others]
    failed = [said for table in tables for condition in conditions if (said := comparison.gate(condition, table))]
    if failed:
        raise MeasurementError(f"{'; '.join(failed)}.")


def _validated(one: Any, validate: bool | None) -> str:
    """Return what torch's validator says of a trace, or why it was not asked."""
    if validate is None and one.events > MOST_VALIDATED:
        return f"not asked, as there are {one.events} events (--validate)"
    if validate is False:
        return "not asked (--no-validate)"
    from profkit import validation

    quiet_libraries()
    return validation.validate(one.path)


def _inspect(name: str, inputs: Sequence[str], options: dict[str, Any], progress: Any) -> tuple[Any, Any, list[Any]]:
    """Load the model and return its anatomy, the table of its parts and its capabilities."""
    quiet_libraries()
    progress("importing torch and transformers")
    from profkit import capabilities, inspection

    loaded = _load(name, options, progress)
    kwargs = dict(loaded.generate_kwargs or {})
    if inputs or hasattr(loaded.processor, "image_processor") or hasattr(loaded.processor, "media"):
        kwargs = _sample_kwargs(_sample(loaded, inputs, {**options, "max_new_tokens": 4}))
    progress("watching a short generate()")
    found = inspection.inspect(loaded.model, parts=parse_parts(options["part"]), **kwargs)
    abilities = []
    if options["capabilities"] and kwargs:
        progress("trying what the model can do")
        abilities = [asdict(one) for one in capabilities.measure(loaded.model, found, kwargs)]
    return found, inspection.part_table(loaded.model, found), abilities


def _sample_kwargs(sample: Sample | None) -> dict[str, Any]:
    return dict(sample.transfer(sample.preprocess(sample.load()))) if sample else {}


def _load(name: str, options: dict[str, Any], progress: Any) -> Loaded:
    from profkit import models

    device = models.choose_device(options["device"])
    dtype = models.DTYPES.get(options["dtype"])
    progress(f"loading {name}")
    return models.load_model(name, device, dtype, options["weights"], options["trust_remote_code"])


def _named(arguments: tuple[str, ...], model: str | None) -> tuple[str, tuple[str, ...]]:
    """Return the model's name and the inputs among the arguments."""
    return (model, arguments) if model else ((*arguments, DEFAULT_MODEL)[0], arguments[1:])


def _print_report(run: Run, saved: Path) -> None:
    console = Console(highlight=False)
    for part in text.report(run):
        console.print(part)
    console.print(f"Wrote {escape(str(saved))}", soft_wrap=True)
    code = f"import profkit; print(profkit.load({str(saved)!r}).breakdown())"
    console.print(f'Read it again: python -c "{escape(code)}"', soft_wrap=True)
    if run.trace_json is not None:
        console.print(f"Open in https://ui.perfetto.dev: {escape(str(saved / 'trace.json.gz'))}", soft_wrap=True)


def _measure(
    name: str,
    inputs: Sequence[str],
    out: Path | None,
    profile_steps: frozenset[int],
    options: dict[str, Any],
    progress: Any,
) -> tuple[Any, Path]:
    """Load the model, trace it, and return the run and where it was saved."""
    target = out or new_directory(name)
    quiet_libraries()
    progress("importing torch and transformers")
    from profkit import capture, run

    run.check_target(target, options["force"])
    loaded = _load(name, options, progress)
    sample = _sample(loaded, inputs, options)
    if sample and options["profile"] and min(profile_steps) >= options["max_new_tokens"]:
        raise InputError(
            f"--profile-steps {options['profile_steps']}: {options['max_new_tokens']} new tokens take the steps 0 to "
            f"{options['max_new_tokens'] - 1}; choose from those, or raise --max-new-tokens."
        )
    result = capture.trace(
        loaded.model,
        loaded.generate_kwargs,
        sample=sample,
        options=_generate_options(loaded, options),
        out=target,
        force=options["force"],
        manifest={
            "model": name,
            "weights": "random" if loaded.random_weights else "as loaded",
            "model_load_ms": loaded.load_ms,
            **({"inputs": sample.hashes()} if sample else {}),
        },
        parts=parse_parts(options["part"]),
        profile=options["profile"],
        profile_steps=profile_steps,
        progress=progress,
        **{key: options[key] for key in ("warmup", "repeat", "granularity", "seed")},
    )
    return result, target


def _sample(loaded: Loaded, inputs: Sequence[str], options: dict[str, Any]) -> Sample | None:
    from profkit import samples

    if loaded.generate_kwargs is not None:
        if inputs or options["prompt"] is not None:
            raise InputError(f"{loaded.name} brings its own generate_kwargs: leave INPUTS and --prompt out.")
        return None
    if loaded.processor is None:
        raise InputError(
            f"{loaded.name} comes without a processor or tokenizer, so no inputs can be made for it: save its "
            "processor beside it, or give package.module:function, which returns (model, generate_kwargs). "
            f"(transformers said: {loaded.why_no_processor})"
        )
    files = [Path(one) for one in inputs]
    return samples.sample_for(loaded.processor, loaded.model, files, options["prompt"], options["max_new_tokens"])


def _generate_options(loaded: Loaded, options: dict[str, Any]) -> dict[str, Any]:
    """Return what is added to generate()'s arguments; those of the user's own function stay as they are."""
    if loaded.generate_kwargs is not None:
        return {}
    chosen: dict[str, Any] = {"max_new_tokens": options["max_new_tokens"]}
    if loaded.random_weights:
        # Random weights may emit the end token at any time: all passes shall do the same work.
        chosen |= {"min_new_tokens": options["max_new_tokens"], "do_sample": False}
    return chosen


def main() -> None:
    """Entry point of the `profkit` command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "×" shall show "?" rather than end a finished measurement.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cli(prog_name="profkit")


if __name__ == "__main__":
    main()
