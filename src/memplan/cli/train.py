"""`memplan train`"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from memplan.cli.options import JobArgument, Overrides, with_job_flags


@with_job_flags
def train(
    job: JobArgument = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything up to the first step of training, then stop")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if the preflight says that it does not fit")
    ] = False,
    *,
    flags: dict[str, Any],
) -> int:
    """
    Train a job, after a preflight

    Without a GPU it trains on the CPU and says so. Needs `pip install "memplan[train]"`.
    """
    from memplan.cli.main import report_error
    from memplan.cli.output import note, write_report
    from memplan.cli.planning import job_path, job_words, plan, read_job
    from memplan.preflight.run import run_preflight
    from memplan.render.report import Report
    from memplan.train.launch import check_trainable, launch

    loaded = read_job(job, overrides, flags)
    check_trainable(loaded)
    architecture, result = plan(loaded)
    found = run_preflight(loaded, architecture, result)
    words = job_words(job, overrides, flags)
    write_report(Report(found.result, "preflight", words, job_path(loaded), preflight=found), "text")
    if found.live.gpu is None:
        note("no GPU here: training runs on the CPU")
    elif found.exit_code() and not force:
        report_error("not started: it does not fit", "`--force` starts it all the same")
        return found.exit_code()
    return launch(loaded, resume=resume, dry_run=dry_run)
