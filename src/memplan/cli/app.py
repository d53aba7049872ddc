"""The commands, put together."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

from memplan.cli.options import Command, Group

COMMANDS = {
    "estimate": "memplan.cli.estimate",
    "fit": "memplan.cli.fit",
    "diff": "memplan.cli.diff",
    "preflight": "memplan.cli.preflight",
    "train": "memplan.cli.train",
    "watch": "memplan.cli.watch",
    "merge": "memplan.cli.merge",
    "record": "memplan.cli.record",
    "env": "memplan.cli.environment",
    "models": "memplan.cli.lists",
    "gpus": "memplan.cli.lists",
    "jobs": "memplan.cli.lists",
    "schema": "memplan.cli.lists",
}
"""
Names of the commands in the order of `memplan --help`, and the modules that hold the functions of that name.
"""


def command(arguments: Sequence[str]) -> Any:
    """
    The click command behind `memplan`, with the one subcommand that is asked for, or all of them.

    Building the options of a command takes as long as an estimate of a small job.
    """
    app = typer.Typer(
        cls=Group,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback(invoke_without_command=True)(_root)
    asked = [name for name in arguments[:1] if name in COMMANDS]
    for name in asked or COMMANDS:
        function = getattr(import_module(COMMANDS[name]), name)
        app.command(name, cls=Command)(function)
    return typer.main.get_command(app)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False,
) -> None:
    """
    Where every byte of a fine-tuning job goes, whether it fits a GPU, and the smallest change that makes it
    fit
    """
    if version:
        from memplan import __version__

        print(f"memplan {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(0)
