"""The command that serves a run to a browser: view."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from profkit.command import Command
from profkit.errors import InputError


@click.command(cls=Command, context_settings={"show_default": True})
@click.argument("path", type=click.Path(path_type=Path), metavar="RUN")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; 0: a free one.")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def view(path: Path, port: int, debug: bool) -> None:
    """Serve a run to a browser on this machine: its report, and its trace in Perfetto. Ctrl-C ends it.

    With profkit[view] installed Perfetto's own page is served too, and nothing is fetched from the web; without it
    ui.perfetto.dev opens the trace, which stays on this machine. TensorBoard starts as well where it is installed.

    Example: profkit view traces/mine
    """
    from profkit.viewing import TRACE, server_for

    with _ended_by_sigterm(), server_for(path, port) as server, _tensorboard(path) as board:
        for title, link in {**server.links, **board}.items():
            click.echo(f"{title}: {link}")
        if TRACE not in server.site.files:
            click.echo("no trace: this run was made with --no-profile, or over many samples")
        click.echo("Ctrl-C ends it")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("")


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Make of SIGTERM, a scheduler's way to end a command, an exception: what was started is ended, copies removed."""

    def end(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _tensorboard(path: Path) -> Iterator[dict[str, str]]:
    """Run TensorBoard while the body runs, where it is installed, on a copy: looking at a run leaves it as it is."""
    from profkit.sample_runs import load_any
    from profkit.scalars import is_installed, write_scalars

    if not is_installed():
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="profkit-") as folder:
        write_scalars(load_any(path), Path(folder) / path.name)
        for trace in (path / "tensorboard").glob("*.pt.trace.json.gz"):
            shutil.copy(trace, Path(folder) / path.name)
        port = _free_port()
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1"]
        process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            yield {"TensorBoard": f"http://127.0.0.1:{port}/"}
        finally:
            process.terminate()
            process.wait()


def _free_port() -> int:
    import socket

    try:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            return int(taken.getsockname()[1])
    except OSError as error:
        raise InputError(f"No port of 127.0.0.1 can be opened: {error.strerror}.") from error
