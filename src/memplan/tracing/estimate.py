"""From a job to its result through a trace of the real step."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from memplan.budget.count import count_parameters
from memplan.budget.estimate import summarise
from memplan.budget.host import host_of
from memplan.budget.notes import accelerate_notes, attention_notes, optimizer_notes, quantization_notes
from memplan.budget.result import Result
from memplan.errors import MemplanError, TraceError
from memplan.job.spec import Job
from memplan.model.config import architecture_from_config, class_name_of, is_supported
from memplan.tape.behaviour import Behaviour
from memplan.tape.tape import WrittenTape

NEEDED = ("torch", "transformers", "peft")


def missing_software() -> list[str]:
    """Packages that a trace needs and that are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def estimate_traced(job: Job, config: dict[str, Any], *, device: str = "cuda") -> tuple[WrittenTape, Result]:
    """
    Where every byte of the job goes, with the model, adapters, optimizer and loop of the software at hand.

    Args:
        config: the model's `config.json`.

    Raises:
        TraceError: software is missing, or the job cannot be run on meta tensors.
        UnknownModel: the installed transformers cannot build the model.
    """
    missing = missing_software()
    if missing:
        raise TraceError(
            f"a trace runs the real model, and `{missing[0]}` is not installed",
            hint='pip install "memplan[train]", or use `--engine shape`',
        )
    from importlib.metadata import version

    from memplan.tracing.reference_code import note_on_reference_code
    from memplan.tracing.step_notes import notes_on_torch
    from memplan.tracing.writer import trace_job

    try:
        traced = trace_job(job, config, device=device)
    except MemplanError:
        raise
    except Exception as error:  # of torch, transformers, peft, or a model's own code
        raise _refusal(job, config, device, error) from error
    engine = {"name": "trace", "device": device} | {name: version(name) for name in NEEDED}
    parameters = traced.parameters
    if parameters.active is None and is_supported(config):
        architecture = architecture_from_config(config, name=job.model, source="the model's config")
        parameters = replace(parameters, active=count_parameters(job, architecture).active)
    host = host_of(job, traced.sizes)
    result = summarise(traced, job, engine=engine, host=host, parameters=parameters)
    return traced, result.with_warnings(
        *notes_on_torch(),
        *attention_notes(job, traced.target),
        *accelerate_notes(job, Behaviour.for_job(job)),
        *quantization_notes(job, Behaviour.for_job(job)),
        *optimizer_notes(job),
        *_notes_on_offload(job),
        *_notes_on_class(config, traced.class_name),
        *_notes(job, traced.unknown_values),
        *note_on_reference_code(traced.replaced_packages),
    )


def _refusal(job: Job, config: dict[str, Any], device: str, error: Exception) -> TraceError:
    """What to say, and to do, about a model whose code ends with an error of its own."""
    from memplan.tracing.dtypes import is_of_dtypes

    if job.dtype != "float32" and is_of_dtypes(error) and _runs_in_float32(job, config, device):
        return TraceError(
            f"the code of `{job.model}` does not run with weights in {job.dtype}: {_reason(error)}",
            hint="use `--set dtype=float32`, with which it runs",
        )
    return TraceError(
        f"`{job.model}` cannot be run on meta tensors: {_reason(error)}",
        hint="use `--engine shape`"
        if is_supported(config)
        else "`memplan record` measures a few real steps of it",
    )


def _runs_in_float32(job: Job, config: dict[str, Any], device: str) -> bool:
    """Whether the same job is traced with weights in float32."""
    from memplan.tracing.writer import trace_job

    try:
        trace_job(job.replace(dtype="float32"), config, device=device)
    except Exception:
        return False
    return True


def _reason(error: Exception) -> str:
    """The first sentence of what an error says, after its kind: `KeyError: 4`."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    first = re.split(r"(?<=[^\s.])[.!](?:\s|$)", said, maxsplit=1)[0]
    return f"{type(error).__name__}: {first}".removesuffix(": ")


def _notes_on_class(config: dict[str, Any], traced: str) -> list[str]:
    notes = []
    if not is_supported(config):
        notes.append(f"no measured run was of {traced}: the error band is that of other architectures")
    named = class_name_of(config)
    if config.get("architectures") and named != traced:
        notes.append(f"the config names {named}; {traced} is traced, which is its causal language model")
    if "vision_config" in config or "audio_config" in config:
        notes.append("batches hold tokens alone: images and sounds are not planned")
    return notes


def _notes_on_offload(job: Job) -> tuple[str, ...]:
    if job.offload.activations == "none":
        return ()
    return (
        "`offload.activations`: as TRL 1.16 moves tensors; no published run that does has been planned to compare with",
    )


def _notes(job: Job, unknown_values: int) -> list[str]:
    from memplan.tracing.packages import FLASH_ATTENTION, LIGER

    notes = []
    if job.attention == "flash_attention_2":
        notes.append(f"flash-attn is stood in for: what {FLASH_ATTENTION} allocates, read from its source")
    if job.loss == "fused" and job.method != "npt":
        notes.append(f"Liger is stood in for: what liger-kernel {LIGER} allocates, read from its source")
    if unknown_values:
        notes.append(
            f"the model's code looked at {unknown_values} values that only real data has; the trace took them as 1"
        )
    return notes
