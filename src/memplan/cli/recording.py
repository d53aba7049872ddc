"""`memplan estimate` of a memory snapshot in place of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.errors import JobError

if TYPE_CHECKING:
    from memplan.snapshot import RecordedTape

FLAGS = ("gpu", "margin")
"""Flags of a job that mean something for a recording."""

_DEVICE = re.compile(r"(?P<file>.+):(?P<device>\d+)")


def split_device(source: str) -> tuple[Path, int | None]:
    """
    A file and the number of a device behind it, if there is one.

    >>> split_device("run.pickle:1"), split_device("run.pickle")
    ((PosixPath('run.pickle'), 1), (PosixPath('run.pickle'), None))
    """
    match = _DEVICE.fullmatch(source)
    if match is not None and not Path(source).exists():
        return Path(match["file"]), int(match["device"])
    return Path(source), None


def is_recording(source: str | None) -> bool:
    """Whether what was typed in place of a job is a memory snapshot."""
    from memplan.snapshot import is_pickle

    return source is not None and source != "-" and is_pickle(split_device(source)[0])


def open_recording(source: str) -> RecordedTape:
    """The tape of `FILE` or `FILE:DEVICE`."""
    from memplan.snapshot import read_snapshot

    path, device = split_device(source)
    return read_snapshot(path, device=device)


def refuse_job_flags(overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> None:
    """
    Raises:
        JobError: a flag changes the job, of which a recording knows nothing.
    """
    unfit = [f"--{name.replace('_', '-').replace('.', '-')}" for name in flags if name not in FLAGS]
    unfit += ["--set"] if overrides else []
    if unfit:
        raise JobError(
            f"`{unfit[0]}` changes a job, and a memory snapshot is what was recorded",
            hint="`--gpu` and `--margin` can be asked of it",
        )


def estimate_recording(
    source: str,
    overrides: Sequence[str] | None,
    flags: Mapping[str, Any],
    *,
    strict: bool,
    output_format: str,
) -> int:
    """Where every byte was at the measured peak, and whether it would fit `--gpu`; the exit code."""
    from memplan.cli.output import write_report
    from memplan.cli.planning import against, exit_code, job_words
    from memplan.render.report import Report
    from memplan.snapshot.result import summarise_recording

    refuse_job_flags(overrides, flags)
    gpu = flags.get("gpu")
    result = summarise_recording(open_recording(source), file=source, gpu=gpu)
    if gpu is not None:
        from memplan.gpu import resolve_capacity

        result = against(result, resolve_capacity(gpu), flags.get("margin"))
    write_report(Report(result, "estimate", job_words(source, overrides, flags)), output_format)
    return exit_code(result, strict=strict)
