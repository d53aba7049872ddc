"""The one place where errors become text and exit codes."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence

from memplan.errors import MemplanError, report_error

INTERNAL_ERROR = 70
"""EX_SOFTWARE of sysexits.h: a fault of ours, none of the documented answers."""
INTERRUPTED = 130


_process = {"is_own": False}


def has_own_process() -> bool:
    """Whether this process was started for one command, and ends with it."""
    return _process["is_own"]


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line and return its exit code; `arguments` default to those of the process.

    Nothing but a bug ends in a traceback, and that one only with MEMPLAN_DEBUG=1.
    """
    _process["is_own"] = arguments is None
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except MemplanError as error:
        report_error(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        silence_stdout()
        return 0
    except Exception as error:
        if os.environ.get("MEMPLAN_DEBUG") == "1":
            raise
        report_error(
            f"memplan failed on its own account: {type(error).__name__}: {error}",
            "report it with the output of the same command under `MEMPLAN_DEBUG=1`",
        )
        return INTERNAL_ERROR


def silence_stdout() -> None:
    """
    Send the rest of stdout nowhere: its reader has gone, and the interpreter would complain when it flushes.
    """
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _run(arguments: Sequence[str]) -> int:
    # Modules and tapes make many small objects that live on; looking for garbage among them every 700 costs 5 %.
    gc.set_threshold(100_000)
    import typer

    from memplan.cli.app import command

    usage_error: type[Exception] = typer.BadParameter.__mro__[
        2
    ]  # ClickException, wherever this typer keeps it
    try:
        status = command(arguments).main(args=list(arguments), prog_name="memplan", standalone_mode=False)
    except typer.Abort:
        return INTERRUPTED
    except usage_error as error:
        report_error(*_usage_text(error))
        return 2
    return status if isinstance(status, int) else 0


def _usage_text(error: Exception) -> tuple[str, str]:
    """The sentence of a usage error without its full stop, and where the usage is."""
    sentence = getattr(error, "format_message", lambda: str(error))()
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "memplan"
    return sentence.strip().rstrip("."), f"`{path} --help` lists what it takes"
