"""`memplan diff`"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memplan.cli.options import Accelerate, check_choice
from memplan.errors import JobError
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.snapshot.compare import Comparison, Side

FORMATS = ("text", "json", "markdown")

SideArgument = Annotated[
    str,
    typer.Argument(
        help="Job file, a name from memplan jobs, or a memory snapshot of torch", show_default=False
    ),
]


def diff(
    a: SideArgument,
    b: SideArgument,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="TEXT", help="Capacity asked about, in place of the jobs' own"),
    ] = None,
    fail_over: Annotated[
        str | None,
        typer.Option("--fail-over", metavar="5%|1GiB", help="Exit with 1 if B needs this much more than A"),
    ] = None,
    accelerate: Accelerate = None,
    output_format: Annotated[
        str, typer.Option("--format", metavar="|".join(FORMATS), help="What to print")
    ] = "text",
) -> int:
    """
    Show what B takes more or less than A, tensor by tensor

    Two jobs, two recorded runs, or a plan and its run: totals, categories and phases side by side, and the
    tensors that differ at the peak, largest first. Launch settings of accelerate lie over either job. Exit
    code: 0, or 1 if B needs more than --fail-over allows.
    """
    from memplan.cli.output import emit, note, write_screen
    from memplan.cli.recording import is_recording
    from memplan.snapshot.compare import compare

    check_choice("--format", output_format, FORMATS)
    if accelerate is not None and is_recording(a) and is_recording(b):
        raise JobError(
            "`--accelerate` lies over a job, and both sides are recordings",
            hint="leave it out, or name a job in place of one of them",
        )
    left, right = read_side(a, gpu, accelerate), read_side(b, gpu, accelerate)
    allowed = None if fail_over is None else allowed_bytes(fail_over, left.result.need_bytes)
    comparison = compare(left, right)
    if output_format == "text":
        from memplan.render.diff_text import diff_screen

        write_screen(lambda screen: diff_screen(screen, comparison))
    elif output_format == "json":
        from memplan.render.json import dump

        emit(dump(comparison.to_json()))
    else:
        from memplan.render.diff_markdown import diff_markdown

        emit(diff_markdown(comparison))
    if allowed is not None and comparison.need.change_bytes > allowed:
        note(too_much(comparison, allowed))
        return 1
    return 0


def read_side(source: str, gpu: str | None, accelerate: str | None = None) -> Side:
    """A job with its plan, or a recording; with a verdict where the job or `gpu` names a capacity."""
    from memplan.cli.planning import against, plan, read_job
    from memplan.cli.recording import is_recording, open_recording
    from memplan.gpu import resolve_capacity
    from memplan.snapshot.compare import Side
    from memplan.snapshot.result import summarise_recording

    if is_recording(source):
        recorded = open_recording(source)
        result = summarise_recording(recorded, file=source, gpu=gpu)
        side = Side(source, recorded, recorded.settings, result)
    else:
        loaded = read_job(source, None, {"gpu": gpu, "accelerate": accelerate})
        planned = plan(loaded)
        gpu = loaded.job.gpu
        side = Side(source, planned.written, loaded.job.allocator, planned.result)
    if gpu is None:
        return side
    from dataclasses import replace

    return replace(side, result=against(side.result, resolve_capacity(gpu)))


def allowed_bytes(text: str, need_bytes: int) -> int:
    """
    Bytes of `--fail-over`: a share of A's need, or a size.

    Raises:
        JobError: it is neither.
    """
    from memplan.preflight.verdict import margin_bytes

    try:
        return margin_bytes(text, need_bytes)
    except JobError:
        raise JobError(
            f"`--fail-over {text}` is neither a percentage nor a size",
            hint="write it as `--fail-over 5%` or `--fail-over 1GiB`",
        ) from None


def too_much(comparison: Comparison, allowed: int) -> str:
    """Why the exit code is 1."""
    more = format_bytes(comparison.need.change_bytes)
    return f"B needs {more} more than A, and {format_bytes(allowed)} are allowed"
