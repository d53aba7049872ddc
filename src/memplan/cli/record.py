"""`memplan record`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memplan.cli.options import JobArgument, Overrides, with_job_flags

EXIT_CODES = {"completed": 0, "out_of_memory": 1}
"""By outcome of the measurement; 2 for all others."""


@with_job_flags
def record(
    job: JobArgument = None,
    overrides: Overrides = None,
    steps: Annotated[str, typer.Option("--steps", metavar="NUMBER", help="Optimizer steps to run")] = "3",
    output: Annotated[
        str, typer.Option("--output", metavar="FILE", help="Where the record goes")
    ] = "record.json",
    limits: Annotated[
        bool,
        typer.Option(
            "--limits", help="Find the smallest capacity that completes: up to 8 more runs, CUDA only"
        ),
    ] = False,
    no_trace: Annotated[
        bool, typer.Option("--no-trace", help="Leave the list of allocations out of the record")
    ] = False,
    time_limit: Annotated[
        str, typer.Option("--time-limit", metavar="SECONDS", help="End the measuring process after this long")
    ] = "600",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Run a few real steps of a job and record what they take, beside the plan

    With random weights. On CUDA from the caching allocator's statistics and history, on the CPU from
    torch's profiler. Exit code: 0 the steps ran, 1 out of memory, 2 anything else. Needs
    `pip install "memplan[train]"`.
    """
    from memplan.cli.output import emit, note
    from memplan.cli.planning import read_job
    from memplan.record.launch import record_job
    from memplan.record.report import record_lines

    path = Path(output)
    measured = record_job(
        read_job(job, overrides, flags),
        path,
        steps=_number("--steps", steps),
        limits=limits,
        trace=not no_trace,
        time_limit_seconds=_number("--time-limit", time_limit),
    )
    emit("\n".join(record_lines(measured)) + "\n")
    note(f"record: {path}")
    return EXIT_CODES.get(measured.fields["outcome"], 2)


def _number(flag: str, text: str) -> int:
    """A whole number above 0; raises JobError."""
    from memplan.errors import JobError

    if not text.isdecimal() or int(text) < 1:
        raise JobError(f"`{flag}` cannot be `{text}`", hint="give a whole number above 0")
    return int(text)
