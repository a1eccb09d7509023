"""What the commands share: errors as sentences with an exit status, options of models, quiet libraries."""

from __future__ import annotations

import os
import traceback
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from profkit.errors import MeasurementError, ProfkitError
from profkit.options import rank_here


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
            rank = "" if rank_here() is None else f"rank {rank_here()}: "
            errors.print(f"[red]Error:[/red] {rank}{escape(sentence)}")
            ctx.exit(error.exit_status if isinstance(error, ProfkitError) else MeasurementError.exit_status)


def model_options(command: Any) -> Any:
    """Add the options of every command that loads and runs a model."""
    devices = "cpu, cuda, cuda:1, xpu, mps; auto: the accelerator if there is one."
    options = [
        click.option("--model", help="MODEL by name; then every argument is an input."),
        click.option("--device", default="auto", help=devices),
        click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto"),
        click.option("--weights", type=click.Choice(["auto", "real", "random"]), default="auto", help="Of a preset."),
        click.option(
            "--attention",
            type=click.Choice(["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]),
            help="The attention kernel.  [default: the model's]",
        ),
        click.option("--prompt", help="A question, or a whole prompt with the processor's image placeholders."),
        click.option("--event-window", metavar="MS-MS", help="Of event streams, the part to take, e.g. 0-50."),
        click.option("--sensor", metavar="WxH", help="Of event streams, the sensor: events off it are an error."),
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


def quiet_libraries() -> None:
    """Keep libraries' chatter out of the output; must come before torch is imported."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
