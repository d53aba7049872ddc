"""Jobs over checkpoints whose weights are stored quantised: the job has to say what transformers loads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from memplan.errors import JobError
from memplan.job.check import check_job
from memplan.job.fields import field_value
from memplan.job.spec import Job
from memplan.model.stored import Stored


def as_stored(job: Job, stored: Stored, *, given: Collection[str] = ()) -> tuple[Job, tuple[str, ...]]:
    """
    The job as transformers runs it over these weights, and what that changes of it: LoRA is QLoRA, the storage is the
    checkpoint's, and what is not `given` as the checkpoint is made for. What trains or converts whole weights is left
    as it is, for `refuse_unlike_stored`.
    """
    if job.method not in ("lora", "qlora"):
        return job, ()
    open_fields = {name: value for name, value in stored.preferences().items() if name not in given}
    wanted: dict[str, Any] = {"method": "qlora", **stored.settings(), **open_fields}
    changed = {name: value for name, value in wanted.items() if field_value(job, name) != value}
    if not changed:
        return job, ()
    said = ", ".join(f"`{name}: {_as_yaml(value)}`" for name, value in changed.items())
    return job.replace(**changed), (f"{said}, as the weights of `{job.model}` are stored in {stored.words}",)


def refuse_unlike_stored(job: Job, stored: Stored | None) -> None:
    """
    Refuse a job that says otherwise than the checkpoint stores its weights: it would be planned as what it is not.

    Raises:
        JobError: with what agrees.
    """
    if stored is None:
        return
    wanted = {"method": "qlora", **stored.settings()}
    unlike = {name: value for name, value in wanted.items() if field_value(job, name) != value}
    if not unlike:
        _refuse_what_does_not_run(job, stored)
        return
    first = next(iter(unlike))
    hint = " ".join(f"--set {name}={_as_yaml(value)}" for name, value in unlike.items())
    raise JobError(
        f"the weights of `{job.model}` are stored in {stored.words}, and the job has "
        f"`{first}: {_as_yaml(field_value(job, first))}`",
        hint=f"use `{hint}`, or name the checkpoint it was made from",
    )


def agrees(job: Job, stored: Stored | None, changes: Mapping[str, Any]) -> bool:
    """Whether a job with these fields changed runs over what the checkpoint stores."""
    changed = job.replace(**changes)
    try:
        refuse_unlike_stored(changed, stored)
    except JobError:
        return False
    return not check_job(changed)


def _refuse_what_does_not_run(job: Job, stored: Stored) -> None:
    for conflict in check_job(job):
        raise JobError(conflict.message, hint=conflict.hint)
    if stored.compute_dtype not in (None, job.dtype):
        raise JobError(
            f"the weights of `{job.model}` are dequantised to {stored.compute_dtype} (`bnb_4bit_compute_dtype` of its "
            f"config.json), and the job computes in `dtype: {job.dtype}`",
            hint=f"use `--set dtype={stored.compute_dtype}`, or name the checkpoint it was made from",
        )
    if job.loop == "memplan" and (job.parallel.strategy != "NO_SHARD" or job.offload.params):
        raise JobError(
            f"the weights of `{job.model}` are stored in {stored.words}, and memplan's own loop shards and offloads "
            "those that it has packed itself",
            hint="name the checkpoint it was made from, or use `--set loop=hf_trainer`",
        )


def _as_yaml(value: Any) -> str:
    """
    >>> _as_yaml(True), _as_yaml(("lm_head", "gate")), _as_yaml("nf4")
    ('true', '[lm_head, gate]', 'nf4')
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)
