"""The commands, put together."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from memplan.cli.environment import env
from memplan.cli.estimate import estimate
from memplan.cli.fit import fit
from memplan.cli.lists import gpus, jobs, models, schema
from memplan.cli.options import Command
from memplan.cli.preflight import preflight
from memplan.cli.train import train


def command() -> Any:
    """The click command behind `memplan`."""
    app = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(invoke_without_command=True)(_root)
    for function in (estimate, fit, preflight, train, env, models, gpus, jobs, schema):
        app.command(cls=Command)(function)
    return typer.main.get_command(app)


def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit")] = False,
) -> None:
    """
    Where every byte of a fine-tuning job goes, whether it fits a GPU, and the smallest change that makes it
    fit.
    """
    if version:
        from memplan import __version__

        print(f"memplan {__version__}")
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(0)
