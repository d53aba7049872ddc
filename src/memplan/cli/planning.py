"""From what was typed to a result: the stages that every command begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from memplan.budget.result import Capacity, Result
from memplan.model.architecture import Architecture

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob

EXIT_CODES = {"fits": 0, "tight": 0, "does_not_fit": 1, "unknown": 3}


def read_job(source: str | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> LoadedJob:
    """The job of a file or a name, with `--set` and the flags applied."""
    from memplan.job.load import load_job

    return load_job(source, list(overrides or ()), flags=dict(flags))


def plan(loaded: LoadedJob) -> tuple[Architecture, Result]:
    """The architecture and the result of a job, without a capacity; a pure function of the job."""
    from memplan.budget.estimate import estimate
    from memplan.model import resolve_model
    from memplan.preflight.lints import Subject, lint

    architecture = resolve_model(loaded.job.model, base_dir=loaded.base_dir)
    result = estimate(loaded.job, architecture)
    findings = lint(Subject(loaded.job, architecture))
    return architecture, replace(
        result,
        origins=dict(loaded.origins),
        warnings=(*loaded.notes, *result.warnings, *map(str, findings)),
    )


def against(result: Result, capacity: Capacity | None) -> Result:
    """The result with its verdict on a capacity; unchanged without one."""
    from memplan.preflight.verdict import judge

    if capacity is None:
        return result
    return replace(result, capacity=capacity, verdict=judge(result, capacity, result.job.margin))


def exit_code(result: Result, *, strict: bool = False) -> int:
    """0 fits or not asked, 1 does not fit (with `strict` also tight), 3 cannot tell."""
    if result.verdict is None:
        return 0
    if strict and result.verdict.state == "tight":
        return 1
    return EXIT_CODES[result.verdict.state]


def job_words(source: str | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> str:
    """The job as typed, to go behind another command."""
    import shlex

    words = [] if source is None else [source]
    for name, value in flags.items():
        flag = name.replace("_", "-").replace(".", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", value]
    for override in overrides or ():
        words += ["--set", override]
    return " ".join(map(shlex.quote, words))


def job_path(loaded: LoadedJob) -> str | None:
    """
    The job file as GitHub's annotations name it: relative to the working directory where it is below it.
    """
    from pathlib import Path

    if loaded.path is None:
        return None
    path = Path(loaded.path).absolute()
    working_dir = Path.cwd()
    return str(path.relative_to(working_dir)) if path.is_relative_to(working_dir) else str(path)
