"""The commands that read what was recorded: analyze, compare, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.markup import escape

from profkit.command import Command, quiet_libraries
from profkit.errors import InputError, MeasurementError

if TYPE_CHECKING:
    from profkit.analysis import Analysis

MOST_VALIDATED = 300_000
"""Events that torch's validator, which loads them as Python objects, is asked to check unless told so."""


@click.command(cls=Command, context_settings={"show_default": True})
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
    or a directory of traces, such as TensorBoard's or one file a rank. A file that cannot be read is named, and the
    next one goes on.

    Example: profkit analyze trace.json.gz --parquet tables
    """
    from profkit import analysis, trace_text

    targets = {suffix: options[suffix] for suffix in ("csv", "parquet") if options[suffix]}
    if len(set(targets.values())) < len(targets):
        raise InputError("--csv and --parquet name one directory: give each its own.")
    for target in targets.values():
        if target.exists():
            raise InputError(f"{target} already exists: choose another directory.")
    with Console(stderr=True).status("reading") as status:
        found, failed = analysis.analyze_all(files, captures, status.update)
        for one in found:
            one.validated = _validated(one, options["validate"])
    between = analysis.rank_table(found)
    unranked = sum(one.rank is None and one.folder is not None for one in found)
    if as_json:
        click.echo(json.dumps(trace_text.all_as_dict(found, between, failed), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for one in found:
            for part in (*trace_text.report(one, options["top"]), ""):
                console.print(part)
        if len(between):
            for part in trace_text.ranks(between):
                console.print(part)
            if unranked:
                console.print(f"{unranked} files tell no rank and are left out of these rows")
    for suffix, target in targets.items():
        if found:
            analysis.write_tables(found, between, target, suffix)
            click.echo(f"Wrote {target}", err=as_json)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    for sentence in failed.values():
        errors.print(f"[red]Error:[/red] {escape(sentence)}")
    if failed:
        click.get_current_context().exit(InputError.exit_status)


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN RUN...")
@click.option("--fail-if", "conditions", multiple=True, metavar="COND", help="e.g. 'prefill > 5%': exit status 1 then.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def compare(paths: tuple[Path, ...], conditions: tuple[str, ...], as_json: bool, debug: bool) -> None:
    """Show runs side by side: stages with intervals, ratios, equal work, and in what the runs are not alike.

    The others are compared with the first. Runs of one sample bring their repeats, runs of many samples their samples,
    in pairs where they are the same. Figures that somebody published can be given as a .json file. --fail-if makes it a
    gate: it fails where a stage is slower than allowed, beyond the noise.

    Example: profkit compare traces/before traces/after --fail-if 'prefill > 5%'
    """
    from profkit import comparison, comparison_text

    if len(paths) < 2:
        raise InputError("compare takes two runs or more.")
    base, *others = comparison.told_apart([comparison.read(path) for path in paths])
    if as_json:
        click.echo(json.dumps(comparison_text.as_dict(base, others), indent=1, allow_nan=False))
    else:
        console = Console(highlight=False)
        for part in comparison_text.report(base, others):
            console.print(part)
    tables = [(other.name, comparison.compare(base, other)) for other in others]
    failed = [
        f"{name}: {said}" if len(others) > 1 else said
        for name, table in tables
        for condition in conditions
        if (said := comparison.gate(condition, table))
    ]
    if failed:
        raise MeasurementError(f"{'; '.join(failed)}.")


@click.command(cls=Command)
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN [RUN]...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page.  [default: RUN/report.html; of several, report.html]"
)
@click.option("--force", is_flag=True, help="Replace the page that is there.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def report(paths: tuple[Path, ...], out: Path | None, force: bool, debug: bool) -> None:
    """Write a run as one page that needs no network: where the time goes, steps, layers, kernels, checks.

    Several runs stand side by side, with intervals, ratios to the first and equal work; each one's own report follows.

    Example: profkit report traces/mine
    """
    from profkit import report as reports
    from profkit import sample_runs

    target = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    written = reports.write_report([sample_runs.load_any(path) for path in paths], target, force)
    click.echo(f"Wrote {written}")


def _validated(one: Analysis, validate: bool | None) -> str:
    """Return what torch's validator says of a trace, or why it was not asked."""
    if validate is None and one.events > MOST_VALIDATED:
        return f"not asked, as there are {one.events} events (--validate)"
    if validate is False:
        return "not asked (--no-validate)"
    from profkit import validation

    quiet_libraries()
    return validation.validate(one.path)
