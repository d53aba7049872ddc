"""From what was typed to a result: the stages that every command begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from memplan.budget.estimate import estimate_written
from memplan.budget.result import Result
from memplan.errors import MemplanError, NoSuchAttention, NotTrained, UnknownModel
from memplan.gpu.capacity import Capacity
from memplan.model import ResolvedConfig, architecture_from_config, resolve_config, resolve_model
from memplan.model.architecture import Architecture
from memplan.model.stored import read_stored
from memplan.tape.stored import as_stored
from memplan.tape.tape import WrittenTape
from memplan.tape.writer import by_trace_alone
from memplan.tracing.estimate import estimate_traced, missing_software
from memplan.tracing.lean import without_the_unused

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob
    from memplan.job.spec import Job

_DEFAULTS = ("memplan default", "tool default")
"""Origins of what nobody asked for."""

EXIT_CODES = {"fits": 0, "tight": 0, "does_not_fit": 1, "unknown": 3}


def read_job(source: str | None, overrides: Sequence[str] | None, flags: Mapping[str, Any]) -> LoadedJob:
    """
    The job of a file or a name, with `--accelerate`, `--set` and the other flags applied, with an attention that the
    model can do where none is named, and as transformers loads weights that are stored quantised.
    """
    from memplan.job.load import load_job

    fields = dict(flags)
    launch = fields.pop("accelerate", None)
    loaded = load_job(source, list(overrides or ()), flags=fields, accelerate=launch)
    try:
        resolved = resolve_config(loaded.job.model, base_dir=loaded.base_dir)
    except MemplanError:  # whoever needs the model will say that it cannot be found
        return loaded
    job, notes = loaded.job, loaded.notes
    if loaded.origins["attention"] in _DEFAULTS and _softcaps_attention(resolved):
        job = job.replace(attention="eager")
        notes += ("`attention: eager`, as the model caps its scores and sdpa cannot",)
    with suppress(MemplanError):
        stored = read_stored(resolved.config, resolved.name)
        if stored is not None:
            given = [name for name, origin in loaded.origins.items() if origin not in _DEFAULTS]
            job, changes = as_stored(job, stored, given=given)
            notes += changes
    return loaded._replace(job=job, notes=notes)


def _softcaps_attention(resolved: ResolvedConfig) -> bool:
    """False as well for a model that cannot be planned by shape."""
    try:
        architecture = architecture_from_config(resolved.config, name=resolved.name, source=resolved.source)
    except MemplanError:
        return False
    return architecture.attn_logit_softcapping is not None


class Plan(NamedTuple):
    """A planned job."""

    architecture: Architecture | None
    """None where only the trace writer could plan the model."""
    written: WrittenTape
    result: Result


def plan(loaded: LoadedJob, engine: str = "auto", *, alone: bool = False) -> Plan:
    """
    The tape and the result of a job, without a capacity.

    Args:
        engine: `shape`, `trace`, or `auto`: shape, and trace for architectures that it has no program for.
        alone: nothing else is planned in this process.

    Raises:
        UnknownModel: no engine at hand can plan the architecture.
        NotTrained: none can, whatever is installed.
        TraceError: the trace failed.
    """
    from memplan.preflight.lints import Subject, lint

    job, notes = loaded.job, loaded.notes
    architecture, unknown = None, None
    try:
        architecture = resolve_model(job.model, base_dir=loaded.base_dir)
    except NotTrained:
        raise
    except UnknownModel as error:
        unknown = error
    if unknown is None and job.offload.activations != "none":
        if engine == "shape":
            raise by_trace_alone()
        architecture, unknown = None, by_trace_alone()
    if unknown is not None and (engine == "shape" or (engine == "auto" and missing_software())):
        raise UnknownModel(
            unknown.message,
            hint='pip install "memplan[train]": with torch, transformers and peft memplan traces the real model',
        )
    written: WrittenTape
    if architecture is None or engine == "trace":
        config = resolve_config(job.model, base_dir=loaded.base_dir).config
        with _lean(alone=alone and job.world_size == 1):
            job, notes, (written, result) = _traced(loaded, config)
    else:
        written, result = estimate_written(job, architecture)
    findings = lint(Subject(job, architecture))
    warnings = (*notes, *result.warnings, *map(str, findings))
    return Plan(architecture, written, replace(result, origins=dict(loaded.origins), warnings=warnings))


def _traced(
    loaded: LoadedJob, config: dict[str, Any]
) -> tuple[Job, tuple[str, ...], tuple[WrittenTape, Result]]:
    """The job as it was traced, its notes, and what came of it: with eager attention where that is all there is."""
    try:
        return loaded.job, loaded.notes, estimate_traced(loaded.job, config)
    except NoSuchAttention as error:
        if loaded.origins["attention"] not in _DEFAULTS:
            raise
        job = loaded.job.replace(attention="eager")
        notes = (*loaded.notes, f"`attention: eager`, as {error.message}")
        return job, notes, estimate_traced(job, config)


def _lean(*, alone: bool) -> AbstractContextManager[None]:
    """Imports of torch and transformers that others in this process may use are whole."""
    from memplan.cli.main import has_own_process

    return without_the_unused(alone=alone) if has_own_process() else nullcontext()


def against(result: Result, capacity: Capacity | None, margin: str | None = None) -> Result:
    """
    The result with its verdict on a capacity; unchanged without one. `margin` is that of a recording, which knows no
    job.
    """
    from memplan.preflight.verdict import judge

    if capacity is None:
        return result
    if result.job is not None:
        margin = result.job.margin
    return replace(result, capacity=capacity, verdict=judge(result, capacity, margin))


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
