"""`memplan watch`"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from memplan.train.run_folder import RunView

ENDED_BADLY = ("interrupted", "out_of_memory", "failed", "killed")


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The output folder of a run")],
    once: Annotated[
        bool, typer.Option("--once", help="Print one line and exit, as without a terminal")
    ] = False,
    seconds: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two looks")] = 1.0,
) -> int:
    """
    Watch a run: step, loss, speed, memory planned and measured, checkpoints, time left

    Reads only the files of the run's folder, on this machine or a mounted one. Exit code: 0 it runs or has
    completed, 1 it ended in another way, 2 there is no run in the folder.
    """
    from memplan.cli.output import emit
    from memplan.render.watch_text import watch_line
    from memplan.train.run_folder import view_run

    view = view_run(Path(run))
    if once or not sys.stdout.isatty():
        emit(watch_line(view) + "\n")
    else:
        view = _follow(view, seconds)
    return 1 if view.state in ENDED_BADLY else 0


def _follow(view: RunView, seconds: float) -> RunView:
    """Draw the run until it is over or Ctrl-C; the last view."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from memplan.render.watch_text import watch_lines
    from memplan.train.run_folder import view_run

    with Live(console=Console(), auto_refresh=False) as live:
        try:
            while True:
                live.update(Text("\n".join(watch_lines(view))), refresh=True)
                if view.is_over:
                    break
                time.sleep(seconds)
                view = view_run(view.folder)
        except KeyboardInterrupt:
            pass
    return view
