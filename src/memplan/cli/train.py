"""`memplan train`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.cli.options import JobArgument, Overrides, check_choice, with_job_flags
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.preflight.run import Preflight


@with_job_flags
def train(
    job: JobArgument = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest complete checkpoint")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, start nothing")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Start even if the preflight says that it does not fit")
    ] = False,
    on_oom: Annotated[
        str,
        typer.Option(
            "--on-oom",
            metavar="stop|replan",
            help="Out of memory: explain and stop, or go on with the smallest change that learns the same",
        ),
    ] = "stop",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Train a job, after a preflight

    Without a GPU it trains on the CPU, and says so. Needs `pip install "memplan[train]"`.
    """
    from memplan.cli.output import note, write_report
    from memplan.cli.planning import job_path, job_words, plan, read_job
    from memplan.errors import report_error
    from memplan.preflight.run import run_preflight
    from memplan.render.report import Report
    from memplan.train.launch import launch
    from memplan.train.refusals import check_trainable

    check_choice("--on-oom", on_oom, ("stop", "replan"))
    loaded = read_job(job, overrides, flags)
    check_trainable(loaded)
    planned = plan(loaded)
    found = run_preflight(loaded, planned.architecture, planned.result)
    if found.live.gpu is None:
        note(f"live check: skipped ({found.live.skipped}); without a GPU, training runs on the CPU")
    else:
        words = job_words(job, overrides, flags)
        report = Report(found.result, "preflight", words, job_path(loaded), preflight=found)
        write_report(report, "text")
    problem = obstacle(found)
    if problem is not None and not force:
        report_error(f"not started: {problem}", "`--force` starts it all the same")
        return 1
    return launch(loaded, resume=resume, dry_run=dry_run, replans=on_oom == "replan")


def obstacle(found: Preflight) -> str | None:
    """What speaks against starting here: a card that is too small counts only where a card is."""
    verdict = found.verdict
    if found.live.gpu is not None and verdict is not None and verdict.state == "does_not_fit":
        return "it does not fit this GPU"
    if not found.disk.is_enough:
        needed, free = format_bytes(found.disk.needed_bytes), format_bytes(found.disk.free_bytes)
        return f"the run keeps up to {needed} on disk, {free} are free in `{found.disk.path}`"
    return None
