"""`memplan fit`"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from memplan.budget.result import Change
from memplan.cli.options import (
    REPORT_FORMATS,
    JobArgument,
    OutputFormat,
    Overrides,
    check_choice,
    with_job_flags,
)
from memplan.errors import JobError, RunError

if TYPE_CHECKING:
    from memplan.cli.planning import Plan
    from memplan.fit import Evaluate
    from memplan.job.load import LoadedJob
    from memplan.job.spec import Job
    from memplan.model.architecture import Architecture, Outline

FRONTIERS = ("max_seq_len", "micro_batch_size")


@with_job_flags
def fit(
    job: JobArgument = None,
    overrides: Overrides = None,
    write: Annotated[
        str | None, typer.Option("--write", metavar="FILE", help="Write the changed job to a new file")
    ] = None,
    allow: Annotated[
        str | None,
        typer.Option(
            "--allow", metavar="capacity", help="Also try what makes the trained part of the model smaller"
        ),
    ] = None,
    field: Annotated[
        str | None,
        typer.Option(
            "--maximize", metavar="|".join(FRONTIERS), help="Find the largest value of a field that fits"
        ),
    ] = None,
    output_format: OutputFormat = "text",
    *,
    flags: dict[str, Any],
) -> int:
    """
    Find the smallest change that makes a job fit --gpu

    Nothing is applied unless --write says where to. Exit code: 0 it fits as it is or with a change, 1 nothing
    fits.
    """
    from memplan.budget.estimate import with_known_need
    from memplan.cli.output import write_report
    from memplan.cli.planning import against, job_path, job_words, plan, read_job
    from memplan.gpu import resolve_capacity
    from memplan.job.foreign import lines_for
    from memplan.preflight.verdict import judge, less_margin
    from memplan.render.report import Report

    check_choice("--format", output_format, REPORT_FORMATS)
    if allow is not None:
        check_choice("--allow", allow, ("capacity",))
    if field is not None:
        check_choice("--maximize", field, FRONTIERS)
    loaded = read_job(job, overrides, flags)
    if loaded.job.gpu is None:
        raise JobError(
            "`fit` needs a GPU to fit", hint="add `--gpu 24GB`, a name from `memplan gpus`, or `--gpu live`"
        )
    capacity = resolve_capacity(loaded.job.gpu)
    planned = plan(loaded)
    assert planned.result.job is not None
    loaded = loaded._replace(job=planned.result.job)
    model, evaluate = searched(loaded, planned)
    result = against(planned.result, capacity)
    room = less_margin(capacity, loaded.job.margin)
    report = Report(
        result,
        "fit",
        job_words(job, overrides, flags),
        job_path(loaded),
        tool=loaded.tool,
        allow_capacity=allow is not None,
    )
    changes: tuple[Change, ...] = ()
    if field is not None:
        from memplan.fit import maximize

        frontier = maximize(loaded.job, model, room, field, evaluate=evaluate)
        frontier = replace(frontier, headroom_bytes=capacity.usable_bytes - frontier.need_bytes)
        report = report._replace(frontier=frontier)
        edits = {} if frontier.value is None else {field: frontier.value}
        found = frontier.value is not None
    else:
        from memplan.fit import smallest_changes

        changes = smallest_changes(
            loaded.job,
            model,
            room,
            evaluate=evaluate,
            allow_capacity=allow is not None,
            can_make=None if loaded.tool is None else lambda edits: lines_for(loaded.tool, edits) is not None,
        )
        changes = tuple(
            replace(change, headroom_bytes=capacity.usable_bytes - change.need_bytes) for change in changes
        )
        report = report._replace(
            result=replace(result, changes=changes), truncations=truncations(loaded, changes)
        )
        edits = changes[0].set if changes else {}
        found = bool(changes)
    sets = [edits] if field is not None else [change.set for change in report.result.changes or ()]
    if loaded.job.loop != "memplan":
        sets = sets[:1]  # the same for all of them
    report = report._replace(
        not_trained=tuple(why_not_trained(loaded.job.replace(**each), planned.architecture) for each in sets)
    )
    if edits:
        need_bytes = report.frontier.need_bytes if report.frontier is not None else changes[0].need_bytes
        changed = with_known_need(result, loaded.job.replace(**edits), need_bytes)
        report = report._replace(verdict_with=judge(changed, capacity, loaded.job.margin))
    write_report(report, output_format)
    if write is not None and found:
        write_changed(loaded, edits, write)
    return 0 if found else 1


def searched(loaded: LoadedJob, planned: Plan) -> tuple[Architecture | Outline, Evaluate | None]:
    """What the search knows of the model, and what says what a changed job needs; None: the shape writer."""
    if planned.architecture is not None:
        return planned.architecture, None
    from memplan.cli.output import note
    from memplan.model import resolve_config
    from memplan.tracing.evaluate import TracedEstimate, outline

    note("the real step is traced for every change that is tried: this takes a while")
    config = resolve_config(loaded.job.model, base_dir=loaded.base_dir).config
    return outline(loaded.job.model, config), TracedEstimate(config)


def why_not_trained(job: Job, architecture: Architecture | None) -> str | None:
    """What `memplan train` would refuse this job with; None where it runs it."""
    from memplan.train.refusals import refuse_untrainable

    if job.loop != "memplan":
        return f"the job is planned for another loop (`loop: {job.loop}`)"
    if architecture is not None and architecture.is_encoder:
        return f"`{job.model}` is an encoder, and causal language models are trained"
    try:
        refuse_untrainable(job)
    except RunError as error:
        return error.message
    return None


def truncations(loaded: LoadedJob, changes: Sequence[Change]) -> dict[int, tuple[int, int]]:
    """
    {max_seq_len: (samples cut, samples in all)} for the changes that shorten sequences, where the data can be
    read.
    """
    lengths = {change.set["max_seq_len"] for change in changes if "max_seq_len" in change.set}
    if not lengths or loaded.job.data.train is None:
        return {}
    from memplan.train.truncation import count_truncated

    counted = {}
    for length in lengths:
        count = count_truncated(loaded, length)
        if count is not None:
            num_samples, num_longer = count
            counted[length] = (num_longer, num_samples)
    return counted


def write_changed(loaded: LoadedJob, edits: dict[str, Any], destination: str) -> None:
    """Write the job with the edits to a new file and say so."""
    from memplan.cli.output import note
    from memplan.job.write import write_job

    origins = {**loaded.origins, **dict.fromkeys(edits, "user")}
    write_job(destination, loaded.job.replace(**edits), origins=origins, base_dir=loaded.base_dir)
    note(f"wrote `{destination}`")
