"""The command line: what runs a model, and the way in. Only the cli modules print."""

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

from profkit import __version__, checks, cli_reading, cli_view, text
from profkit.command import Command, model_options, quiet_libraries
from profkit.errors import InputError, InterruptedRunError, MeasurementError
from profkit.options import new_directory, parse_parts, parse_size, parse_steps, parse_window, rank_here

if TYPE_CHECKING:
    from profkit.models import Loaded
    from profkit.ranks import Ranks
    from profkit.run import Run
    from profkit.sample_lists import Item
    from profkit.sample_runs import SampleRun
    from profkit.samples import Sample
    from profkit.verdicts import Verdict

DEFAULT_MODEL = "tiny-llava"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="profkit")
def cli() -> None:
    """Where does a multimodal model's generate() spend its time?"""


for command in (cli_reading.analyze, cli_reading.compare, cli_reading.report, cli_view.view):
    cli.add_command(command)


@cli.command(cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[MODEL] [INPUTS]...")
@model_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=32)
@click.option("--warmup", type=click.IntRange(0), default=1, help="Passes before measuring.")
@click.option("--repeat", type=click.IntRange(1), default=5, help="Clean passes, each beside a control.")
@click.option("--granularity", type=click.Choice(["stage", "layer", "module"]), default="layer")
@click.option("--profile/--no-profile", default=True, help="A pass inside torch.profiler.")
@click.option("--profile-steps", default="0-4", help="Steps that this pass records; 0 is the prefill.")
@click.option("--trace-budget", default="50MB", help="What the compressed trace may take; later steps are left out.")
@click.option("--seed", type=int, default=0, help="Random state of every pass.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: traces/<model>-<time>]")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
@click.option("--strict", is_flag=True, help="Exit with status 1 if the run fails a check.")
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
    if rank_here() is not None:
        raise InputError("Several ranks share a list of samples: give --samples, or run without torchrun.")
    profile_steps = parse_steps(options["profile_steps"])
    parse_size(options["trace_budget"])
    status = Console(stderr=True).status("starting")
    with status:
        run, saved = _measure(name, inputs, out, profile_steps, options, status.update)
    if as_json:
        click.echo(json.dumps(text.as_dict(run, saved), indent=1, allow_nan=False))
    else:
        _print_report(run, saved)
    if options["strict"] and (failed := checks.failed(run)):
        named = "; ".join(f"{one.check} ({text.figure(one)})" for one in failed)
        raise MeasurementError(f"The run is saved, but these checks failed: {named}.")


def _trace_samples(name: str, out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    """Measure a list of samples and print what they took, typically; under torchrun each rank measures its share."""
    from profkit import sample_lists, sample_runs, sample_text

    items = sample_lists.read_items(options["listed"])[: options["limit"]]
    if options["resume"] and out is None:
        raise InputError("--resume needs --out: the run to go on with.")
    quiet_libraries()
    from profkit import ranks

    with ranks.joined() as here:
        target = here.first(lambda: out or new_directory(name))
        bar = Progress(*sample_text.COLUMNS, console=Console(stderr=True), disable=here.rank > 0)
        try:
            with bar:
                run = _measure_samples(name, items, target, options, here, bar)
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
    if as_json:
        click.echo(json.dumps(sample_text.as_dict(run), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    for part in sample_text.report(run):
        console.print(part)
    console.print(f"Wrote {escape(str(target))}", soft_wrap=True)


def _measure_samples(
    name: str, items: Sequence[Item], target: Path, options: dict[str, Any], here: Ranks, bar: Progress
) -> SampleRun:
    """Load the model and measure this rank's share of the samples, showing how far it is."""
    from profkit import sampling

    task = bar.add_task(f"loading {name}", total=len(here.share(items)), failed=0)
    loaded = _load(name, options, lambda what: None)
    if loaded.processor is None:
        raise InputError(f"{name} comes without a processor, which --samples needs.")
    shown = f"{name}, rank 0 of {here.world}" if here.world > 1 else name
    plan = sampling.Plan(
        options["max_new_tokens"],
        options["prompt"],
        _generate_options(loaded, options),
        **{key: options[key] for key in ("warmup", "granularity", "seed", "fail_fast")},
        resume=options["resume"] or here.restarted,
        event_window_us=parse_window(options["event_window"]),
        progress=lambda done, total, failed: bar.update(
            task, description=shown, completed=done, total=total, failed=failed
        ),
    )
    about = {"model": name, "weights": "random" if loaded.random_weights else "as loaded"}
    manifest = sampling.describe(loaded.model, plan, {**about, "samples": str(options["listed"])})
    return sampling.measure(loaded.model, loaded.processor, items, target, plan, manifest, here)


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
    name, inputs = _named(arguments, model)
    if model is None and not inputs and (Path(name) / "run.json").is_file():
        from profkit import run as runs

        result = runs.load(name)
        found = checks.verdicts(result)
    else:
        with Console(stderr=True).status("starting") as status:
            result, found = _verified(name, inputs, out, options, status.update)
    if as_json:
        click.echo(json.dumps(text.verdicts_as_dict(found), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        console.print(text.headline(result))
        console.print(text.verdict_table(found))
        if result.path:
            console.print(f"Run: {escape(str(result.path))}", soft_wrap=True)
    if failed := [one.check for one in found if one.ok is False]:
        raise MeasurementError(f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}.")


def _verified(
    name: str, inputs: Sequence[str], out: Path | None, options: dict[str, Any], progress: Any
) -> tuple[Run, list[Verdict]]:
    """Trace a model, make the experiments, and return the run, saved, and every verdict."""
    target = out or new_directory(name)
    quiet_libraries()
    progress("importing torch and transformers")
    from profkit import run, tracing, verification

    run.check_target(target, options["force"])
    loaded = _load(name, options, progress)
    sample = _sample(loaded, inputs, options)
    generate_options = _generate_options(loaded, options)
    kwargs = {**(tracing.prepared(sample) if sample else loaded.generate_kwargs or {}), **generate_options}
    result = tracing.trace(
        loaded.model,
        loaded.generate_kwargs,
        sample=sample,
        options=generate_options,
        manifest={"model": name, "weights": "random" if loaded.random_weights else "as loaded"},
        parts=parse_parts(options["part"]),
        repeat=options["repeat"],
        seed=options["seed"],
        progress=progress,
    )
    found = verification.verify(loaded.model, kwargs, result, options["repeat"], progress)
    result.save(target, options["force"])
    return result, found


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
    from profkit import run, tracing

    run.check_target(target, options["force"])
    loaded = _load(name, options, progress)
    sample = _sample(loaded, inputs, options)
    if sample and options["profile"] and min(profile_steps) >= options["max_new_tokens"]:
        raise InputError(
            f"--profile-steps {options['profile_steps']}: {options['max_new_tokens']} new tokens take the steps 0 to "
            f"{options['max_new_tokens'] - 1}; choose from those, or raise --max-new-tokens."
        )
    result = tracing.trace(
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
            **({"inputs": sample.hashes(), "media_items": sample.media_items} if sample else {}),
        },
        parts=parse_parts(options["part"]),
        profile=options["profile"],
        profile_steps=profile_steps,
        trace_budget_bytes=parse_size(options["trace_budget"]),
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
    window = parse_window(options["event_window"])
    return samples.sample_for(
        loaded.processor,
        loaded.model,
        files,
        options["prompt"],
        options["max_new_tokens"],
        event_window_us=window,
    )


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
