"""The README's figures come from committed runs, its commands and names exist."""

from __future__ import annotations

import re

import click
import readme
from click.testing import CliRunner

from profkit import stages
from profkit.cli import cli

TEXT = readme.README.read_text(encoding="utf-8")


def test_figures_are_those_of_the_committed_runs():
    assert readme.filled(TEXT) == TEXT


def test_the_committed_run_is_whole():
    run = readme.profkit.load(readme.RUN)
    for spans in run.clean:
        spans.check()
    assert run.manifest["checks"]["same_tokens"] is True
    assert (readme.RUN / "trace.json.gz").stat().st_size < 2_000_000


def test_every_stage_is_explained():
    rows = re.findall(r"^\| ([a-z, ]+) \| [1-4] \|", TEXT, flags=re.M)
    assert sorted(name for row in rows for name in row.split(", ")) == sorted(stages.NAMES)


def test_every_command_is_in_the_readme_and_every_option_says_what_it_is_for():
    for name, command in cli.commands.items():
        assert f"profkit {name} " in TEXT, name
        assert command.help and "Example: profkit" in command.help
        for option in command.params:
            named = option.opts[0] in ("--granularity", "--max-new-tokens", "--dtype")
            assert isinstance(option, click.Argument) or named or option.help, (name, option.opts)


def test_options_in_the_readme_exist():
    help_text = CliRunner().invoke(cli, ["trace", "--help"]).stdout
    for option in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", " ".join(re.findall(r"profkit trace.*", TEXT)))):
        assert option in help_text or option == "--help", option
