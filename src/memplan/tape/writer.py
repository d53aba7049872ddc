"""One call from a job to its tape, whatever blocks had to be recorded for it."""

from __future__ import annotations

from dataclasses import replace

from memplan.errors import UnknownModel
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.tape.behaviour import Behaviour
from memplan.tape.repeat import Expansion, NotRepeatable, Selection, choose_layers
from memplan.tape.shape import checkpointed_layers, npt_layers, record
from memplan.tape.sharded.zero_groups import as_deepspeed_runs_it, zero_stage
from memplan.tape.targets import targets_by_block
from memplan.tape.vocabulary import with_special_tokens

NUM_STEPS = 2
"""Optimizer states appear in the first step; from the second on every step is the same."""


def write_tape(
    job: Job,
    architecture: Architecture,
    *,
    device: str = "cuda",
    behaviour: Behaviour | None = None,
    num_steps: int = NUM_STEPS,
    first_step: int = 1,
    read_bytes: int | None = None,
) -> Expansion:
    """
    The tape of loading and of the optimizer steps `first_step` to `num_steps` on the fullest rank. With `read_bytes`,
    loading reads a checkpoint whose largest tensor has so many bytes: weights, and the optimizer's states with them.

    `device` is `cuda` or `cpu`: kernels differ in what they allocate. Raises UnknownModel where there is no program,
    JobError where the job asks for what no loop does.
    """
    if job.offload.activations != "none":
        raise by_trace_alone()
    architecture = with_special_tokens(job, architecture)
    if zero_stage(job):  # partitions and buckets end inside blocks, so that no two blocks need be alike
        behaviour = behaviour or replace(Behaviour.for_model(job, architecture.family), float_output=False)
        first_step = 1 if zero_stage(job) == 3 else first_step  # which records what later ones fetch ahead
        job, selection = as_deepspeed_runs_it(job), _every_block(architecture)
        return _expand(job, architecture, selection, device, behaviour, num_steps, first_step, read_bytes)
    converted, checkpointed = (
        npt_layers(job, architecture),
        checkpointed_layers(job, architecture.num_hidden_layers),
    )
    attention = architecture.layer_types or ("",) * architecture.num_hidden_layers
    software = behaviour or Behaviour.for_model(job, architecture.family)
    # Norms that write over gradients give the last block one that nothing may be added to in place.
    unlike = architecture.num_hidden_layers - 1 if software.liger or software.triton_norm else None
    kinds = [
        (layer in converted, layer in checkpointed, kind, layer == unlike)
        for layer, kind in enumerate(attention)
    ]
    if (
        targets_by_block(job, architecture) is not None
    ):  # norms of gradients and DDP's buckets count all of them
        selection = _every_block(architecture)
        return _expand(job, architecture, selection, device, behaviour, num_steps, first_step, read_bytes)
    selection = choose_layers(kinds)
    try:
        return _expand(job, architecture, selection, device, behaviour, num_steps, first_step, read_bytes)
    except NotRepeatable:
        selection = _every_block(architecture)
        return _expand(job, architecture, selection, device, behaviour, num_steps, first_step, read_bytes)


def by_trace_alone() -> UnknownModel:
    """What a job with `offload.activations` is told: what backward needs, tensor by tensor, strides are part of."""
    return UnknownModel(
        "`offload.activations` is planned by a trace of the step alone", hint="use `--engine trace`"
    )


def _every_block(architecture: Architecture) -> Selection:
    return Selection(tuple(range(architecture.num_hidden_layers)), {})


def _expand(
    job: Job,
    architecture: Architecture,
    selection: Selection,
    device: str,
    behaviour: Behaviour | None,
    num_steps: int,
    first_step: int,
    read_bytes: int | None,
) -> Expansion:
    recording = record(
        job,
        architecture,
        list(selection.layers),
        num_steps=num_steps,
        first_step=first_step,
        read_bytes=read_bytes,
        device=device,
        behaviour=behaviour,
    )
    return Expansion(recording.graph, recording.events, recording.marks, selection)
