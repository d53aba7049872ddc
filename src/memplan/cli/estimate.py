"""`memplan estimate`"""

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
from memplan.errors import MemplanError


class EngineUnavailable(MemplanError):
    """The engine asked for is not there, so this question has no answer."""

    exit_code = 3


@with_job_flags
def estimate(
    job: JobArgument = None,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option("--engine", metavar="shape", help="What writes the tape")] = "shape",
    strict: Strict = False,
    output_format: OutputFormat = "text",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Show where every byte of a job goes, and whether it fits --gpu

    Needs no GPU, no torch and no weights. Exit code: 0 fits or no GPU asked about, 1 does not fit, 2 the
    question is malformed, 3 cannot tell.
    """
    from memplan.cli.output import write_report
    from memplan.cli.planning import against, exit_code, job_path, job_words, plan, read_job
    from memplan.render.report import Report

    check_choice("--format", output_format, REPORT_FORMATS)
    _check_engine(engine)
    loaded = read_job(job, overrides, flags)
    _, result = plan(loaded)
    if loaded.job.gpu is not None:
        from memplan.gpu import resolve_capacity

        result = against(result, resolve_capacity(loaded.job.gpu))
    report = Report(result, "estimate", job_words(job, overrides, flags), job_path(loaded))
    write_report(report, output_format)
    return exit_code(result, strict=strict)


def _check_engine(engine: str) -> None:
    if engine == "trace":
        raise EngineUnavailable(
            "`--engine trace` is not available in this version",
            hint="use `--engine shape`, which needs no torch",
        )
    check_choice("--engine", engine, ("shape",))
