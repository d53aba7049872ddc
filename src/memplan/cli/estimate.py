"""`memplan estimate`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
from memplan.cli.recording import estimate_recording, is_recording
from memplan.errors import JobError

ENGINES = ("auto", "shape", "trace", "snapshot")

if TYPE_CHECKING:
    from memplan.job.spec import Job
    from memplan.model.architecture import Architecture


@with_job_flags
def estimate(
    job: JobArgument = None,
    overrides: Overrides = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="|".join(ENGINES),
            help="What writes the tape: shape needs no torch; trace runs the real step on meta tensors; "
            "snapshot reads the FILE of a recording in place of JOB",
        ),
    ] = "auto",
    strict: Strict = False,
    snapshot: Annotated[
        str | None,
        typer.Option(
            "--snapshot", metavar="FILE", help="Write the plan for pytorch.org/memory_viz to a new file"
        ),
    ] = None,
    output_format: OutputFormat = "text",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Show where every byte of a job goes, and whether it fits --gpu

    Needs no GPU, no torch and no weights; a model that memplan has no program for is traced, which takes
    torch, transformers and peft. A memory snapshot of torch in place of the job shows where every byte was
    in that run. Exit code: 0 fits or no GPU asked about, 1 does not fit, 2 the question is malformed, 3
    cannot tell.
    """
    from memplan.cli.output import write_report
    from memplan.cli.planning import against, exit_code, job_path, job_words, plan, read_job
    from memplan.render.report import Report

    check_choice("--format", output_format, REPORT_FORMATS)
    check_choice("--engine", engine, ENGINES)
    if job is not None and (engine == "snapshot" or is_recording(job)):
        check_choice("--engine", engine, ("auto", "snapshot"))
        if snapshot is not None:
            raise JobError("`--snapshot` writes a plan, and this is a snapshot already", hint="leave it out")
        return estimate_recording(job, overrides, flags, strict=strict, output_format=output_format)
    if engine == "snapshot":
        raise JobError("`--engine snapshot` reads a memory snapshot, and none is named", hint="name its file")
    loaded = read_job(job, overrides, flags)
    planned = plan(loaded, engine, alone=True)
    result = planned.result
    if planned.architecture is not None:
        _mention_past_runs(loaded.job, planned.architecture)
    if loaded.job.gpu is not None:
        from memplan.gpu import resolve_capacity

        result = against(result, resolve_capacity(loaded.job.gpu))
    report = Report(result, "estimate", job_words(job, overrides, flags), job_path(loaded))
    if snapshot is not None:
        from memplan.cli.output import note
        from memplan.snapshot import write_snapshot

        write_snapshot(planned.written, snapshot, loaded.job.allocator)
        note(f"wrote `{snapshot}`; open it at https://pytorch.org/memory_viz")
    write_report(report, output_format)
    return exit_code(result, strict=strict)


def _mention_past_runs(job: Job, architecture: Architecture) -> None:
    """What the same job took when it ran on this machine; the estimate itself knows nothing of it."""
    import os

    from memplan.store import store_path

    path = store_path(os.environ)
    if path is None or not path.is_file():
        return
    from memplan.cli.output import note
    from memplan.store import fingerprint, past_run_words, past_runs

    for run in past_runs(path, fingerprint(job, architecture)):
        note(past_run_words(run))
