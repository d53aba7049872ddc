"""`memplan preflight`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from memplan.cli.options import (
    REPORT_FORMATS,
    JobArgument,
    OutputFormat,
    Overrides,
    Strict,
    check_choice,
    with_job_flags,
)


@with_job_flags
def preflight(
    job: JobArgument = None,
    overrides: Overrides = None,
    wait: Annotated[
        str,
        typer.Option("--wait", metavar="TIME", help="How long to wait for memory that others hold, e.g. 60s"),
    ] = "0s",
    strict: Strict = False,
    output_format: OutputFormat = "text",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Check a job against this machine before it starts

    Looks at memory, other processes, allocator settings and disk. Works without a GPU and without torch, and
    then says what it could not check. Exit code: 0 fits, 1 does not fit, 2 the question is malformed, 3
    cannot tell.
    """
    from memplan.cli.output import note, write_report
    from memplan.cli.planning import job_path, job_words, plan, read_job
    from memplan.preflight.live import parse_seconds
    from memplan.preflight.run import run_preflight
    from memplan.render.report import Report

    check_choice("--format", output_format, REPORT_FORMATS)
    seconds = parse_seconds(wait)
    loaded = read_job(job, overrides, flags)
    planned = plan(loaded)
    found = run_preflight(loaded, planned.architecture, planned.result, wait_seconds=seconds, on_wait=note)
    report = Report(
        found.result, "preflight", job_words(job, overrides, flags), job_path(loaded), preflight=found
    )
    write_report(report, output_format)
    return found.exit_code(strict=strict)
