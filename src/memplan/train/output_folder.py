"""The output folder as a run finds and leaves it: its names, the job in it, and which run may go on in it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError, RunError
from memplan.job.fields import job_fields
from memplan.job.spec import Job
from memplan.train.checkpoint import has_checkpoint
from memplan.train.report import resume_command

JOB_FILE = "job.yaml"
CHECKPOINTS = "checkpoints"
FINAL = "final"

MAY_CHANGE = (
    "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "activation_offload",
    "attention", "attention_kernel", "loss", "optimizer_kernel", "npt.form", "loop", "gpu", "margin", "data.eval",
    "train.max_steps", "train.epochs", "train.save_every", "train.keep_checkpoints", "train.eval_every",
    "train.keep_best", "train.early_stopping", "train.report_to", "train.output_dir",
    "train.sample_prompts", "train.sample_tokens", "allocator.", "offload.", "load.", "parallel.",
)  # fmt: skip
"""Fields that a resumed run may change: they decide memory, speed or length, not what is learned."""


def check_folder(folder: Path, job: Job, *, resume: bool) -> None:
    """
    Refuse to write over another run, or to resume what is not there.

    A run that left neither a checkpoint nor final weights has nothing to lose and may be started over.

    Raises:
        RunError: with another `output_dir` or `--resume` as the remedy.
    """
    elsewhere = "choose another folder with `--set train.output_dir=...`"
    if not (folder / JOB_FILE).exists():
        if resume:
            raise RunError(
                f"there is no run to resume in `{folder}`",
                hint="leave out `--resume`, or check `train.output_dir`",
            )
        if (folder / FINAL).exists() or has_checkpoint(folder / CHECKPOINTS):
            raise RunError(f"`{folder}` holds weights of a run without its `{JOB_FILE}`", hint=elsewhere)
        return
    has_weights = (folder / FINAL).exists() or has_checkpoint(folder / CHECKPOINTS)
    if not has_weights and not resume:
        return
    different = different_fields(read_job(folder / JOB_FILE), job)
    if different:
        names = ", ".join(f"`{name}`" for name in different)
        raise RunError(
            f"`{folder}` holds a run of a different job: it differs in {names}",
            hint=elsewhere,
        )
    if not resume:
        raise RunError(
            f"`{folder}` already holds a run of this job",
            hint=f"continue it with `{resume_command(folder)}`, or {elsewhere}",
        )


def different_fields(before: Job, after: Job) -> list[str]:
    """
    Dotted fields in which two jobs would learn something else: all but `MAY_CHANGE`, and the global batch
    size.
    """
    old, new = _flatten(dataclasses.asdict(before)), _flatten(dataclasses.asdict(after))
    fixed = [name for name in new if not name.startswith(tuple(_prefixes())) and name not in MAY_CHANGE]
    different = [name for name in fixed if old[name] != new[name]]
    if before.global_batch_size != after.global_batch_size:
        different.append("global_batch_size")
    return different


def _prefixes() -> list[str]:
    return [name for name in MAY_CHANGE if name.endswith(".")]


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def write_job(path: Path, job: Job) -> None:
    """The job with every field spelt out, so that later defaults cannot change it."""
    from memplan.job import write

    write.write_job(path, job, origins=dict.fromkeys(job_fields(), "user"), overwrite=True)


def read_job(path: Path) -> Job:
    """
    The job that `write_job` wrote.

    Raises:
        RunError: it is not one.
    """
    from memplan.job.load import load_job

    try:
        return load_job(str(path)).job
    except MemplanError as error:
        raise RunError(
            f"`{path}` cannot be read: {error.message}", hint="choose another `train.output_dir`"
        ) from error
