"""The command line: the only file that prints."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from profkit import __version__, text
from profkit.errors import InputError, MeasurementError, ProfkitError

if TYPE_CHECKING:
    from profkit.models import Loaded
    from profkit.run import Run
    from profkit.samples import ImageSample

DEFAULT_MODEL = "tiny-llava"
MOST_STEPS = 1_000_000


class Command(click.Command):
    """Turns profkit's errors into one sentence and an exit status; --debug shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, catching what it raises."""
        errors = Console(stderr=True, soft_wrap=True, highlight=False)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            errors.print("Interrupted: nothing was written.")
            ctx.exit(130)
        except Exception as error:
            if ctx.params.get("debug"):
                click.echo(traceback.format_exc(), err=True)
            expected = isinstance(error, ProfkitError)
            sentence = str(error) if expected else f"Unexpected {type(error).__name__}: {error} (--debug shows where)"
            errors.print(f"[red]Error:[/red] {escape(sentence)}")
            ctx.exit(error.exit_status if isinstance(error, ProfkitError) else MeasurementError.exit_status)


def _model_options(command: Any) -> Any:
    """Add the options of every command that loads and runs a model."""
    devices = "cpu, cuda, cuda:1, xpu, mps; auto: the accelerator if there is one."
    options = [
        click.option("--model", help="MODEL by name; then every argument is an input."),
        click.option("--device", default="auto", help=devices),
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"),
        click.option("--weights", type=click.Choice(["auto", "real", "random"]), default="auto", help="Of a preset."),
        click.option("--prompt", help="A question, or a whole prompt with the processor's image placeholders."),
        click.option(
            "--part", multiple=True, metavar="ROLE=PATH", help="Name a part yourself, e.g. projector=model.merger."
        ),
        click.option("--trust-remote-code", is_flag=True, help="Run code that a checkpoint brings along."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables."),
        click.option("--debug", is_flag=True, help="Show tracebacks."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="profkit")
def cli() -> None:
    """Where does a multimodal model's generate() spend its time?"""


@cli.command(cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[MODEL] [INPUTS]...")
@_model_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=32)
@click.option("--warmup", type=click.IntRange(0), default=1, help="Passes before measuring.")
@click.option("--repeat", type=click.IntRange(1), default=5, help="Clean passes, each beside a control.")
@click.option("--granularity", type=click.Choice(["stage", "layer", "module"]), default="layer")
@click.option("--profile/--no-profile", default=True, help="A pass inside torch.profiler.")
@click.option("--profile-steps", default="0-4", help="Steps that this pass records; 0 is the prefill.")
@click.option("--seed", type=int, default=0, help="Random state of every pass.")
@click.option("--out", type=click.Path(path_type=Path), help="Run directory.  [default: traces/<model>-<time>]")
@click.option("--force", is_flag=True, help="Replace the run in --out.")
def trace(arguments: tuple[str, ...], model: str | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure an unmodified generate() and say where the time went.

    MODEL is a preset (tiny-llava, the default; llava-1.5-7b), a checkpoint's directory or hub id, or
    package.module:function, which returns (model, generate_kwargs) or (model, processor). INPUTS are image files;
    without any, a photograph that ships with profkit.

    Example: profkit trace llava-1.5-7b photo.jpg --weights random --dtype bfloat16
    """
    name, inputs = _named(arguments, model)
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


@cli.command(name="inspect", cls=Command, context_settings={"show_default": True})
@click.argument("arguments", nargs=-1, metavar="[MODEL] [INPUTS]...")
@_model_options
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


def _inspect(name: str, inputs: Sequence[str], options: dict[str, Any], progress: Any) -> tuple[Any, Any, list[Any]]:
    """Load the model and return its anatomy, the table of its parts and its capabilities."""
    _quiet_libraries()
    progress("importing torch and transformers")
    from profkit import capabilities, inspection

    loaded = _load(name, options, progress)
    kwargs = dict(loaded.generate_kwargs or {})
    if inputs or hasattr(loaded.processor, "image_processor"):
        kwargs = _sample_kwargs(_sample(loaded, inputs, {**options, "max_new_tokens": 4}))
    progress("watching a short generate()")
    found = inspection.inspect(loaded.model, parts=parse_parts(options["part"]), **kwargs)
    abilities = []
    if options["capabilities"] and kwargs:
        progress("trying what the model can do")
        abilities = [asdict(one) for one in capabilities.measure(loaded.model, found, kwargs)]
    return found, inspection.part_table(loaded.model, found), abilities


def _sample_kwargs(sample: ImageSample | None) -> dict[str, Any]:
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


def parse_parts(parts: Sequence[str]) -> dict[str, list[str]]:
    """Return role → paths from words such as projector=model.merger. Raises InputError for others."""
    named: dict[str, list[str]] = {}
    for word in parts:
        role, equals, path = word.partition("=")
        if not (role and equals and path):
            raise InputError(f"--part {word!r} is not role=path, such as projector=model.multi_modal_projector.")
        named.setdefault(role, []).append(path)
    return named


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
    target = out or _new_directory(name)
    _quiet_libraries()
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


def _quiet_libraries() -> None:
    """Keep libraries' chatter out of the output; must come before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _sample(loaded: Loaded, inputs: Sequence[str], options: dict[str, Any]) -> ImageSample | None:
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
    takes_images = hasattr(loaded.processor, "image_processor")
    if inputs and not takes_images:
        raise InputError(f"{loaded.name} takes text alone: leave INPUTS out.")
    images = [Path(one) for one in inputs] or [samples.default_image()] * takes_images
    for image in images:
        samples.read_image(image)
    prompt = samples.DEFAULT_PROMPT if options["prompt"] is None else options["prompt"]
    return samples.ImageSample(images, prompt, loaded.processor, loaded.model, options["max_new_tokens"])


def _generate_options(loaded: Loaded, options: dict[str, Any]) -> dict[str, Any]:
    """Return what is added to generate()'s arguments; those of the user's own function stay as they are."""
    if loaded.generate_kwargs is not None:
        return {}
    chosen: dict[str, Any] = {"max_new_tokens": options["max_new_tokens"]}
    if loaded.random_weights:
        # Random weights may emit the end token at any time: all passes shall do the same work.
        chosen |= {"min_new_tokens": options["max_new_tokens"], "do_sample": False}
    return chosen


def parse_steps(steps: str) -> frozenset[int]:
    """Return the step numbers in a list such as "0-4,10". Raises InputError if it is not one."""
    chosen: set[int] = set()
    for part in steps.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise InputError(f"--profile-steps {steps!r} is not a list of steps such as 0-4,10.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last > MOST_STEPS:
            raise InputError(f"--profile-steps {steps!r} reaches beyond step {MOST_STEPS}.")
        chosen.update(range(first, last + 1))
    return frozenset(chosen)


def _new_directory(model: str) -> Path:
    """Return traces/<model>-<time>, with a number behind it if that is taken."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rpartition("/")[2]).strip("-.") or "model"
    base = f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = (Path("traces") / (f"{base}-{number}" if number > 1 else base) for number in itertools.count(1))
    return next(path for path in candidates if not path.exists())


def main() -> None:
    """Entry point of the `profkit` command."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show "×" shall show "?" rather than end a finished measurement.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    cli(prog_name="profkit")


if __name__ == "__main__":
    main()
