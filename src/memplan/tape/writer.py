"""One call from a job to its tape, whatever blocks had to be recorded for it."""

from __future__ import annotations

from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.tape.repeat import Expansion, NotRepeatable, Selection, choose_layers
from memplan.tape.shape import Behaviour, checkpointed_layers, npt_layers, record

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
) -> Expansion:
    """
    The tape of loading and of the optimizer steps `first_step` to `num_steps` on the fullest rank.

    `device` is `cuda` or `cpu`: kernels differ in what they allocate. Raises UnknownModel where there is no program,
    JobError where the job asks for what no loop does.
    """
    converted, checkpointed = npt_layers(job, architecture), checkpointed_layers(job, architecture)
    kinds = [(layer in converted, layer in checkpointed) for layer in range(architecture.num_hidden_layers)]
    selection = choose_layers(kinds)
    try:
        return _expand(job, architecture, selection, device, behaviour, num_steps, first_step)
    except NotRepeatable:
        every = Selection(tuple(range(architecture.num_hidden_layers)), {})
        return _expand(job, architecture, every, device, behaviour, num_steps, first_step)


def _expand(
    job: Job,
    architecture: Architecture,
    selection: Selection,
    device: str,
    behaviour: Behaviour | None,
    num_steps: int,
    first_step: int,
) -> Expansion:
    recording = record(
        job,
        architecture,
        list(selection.layers),
        num_steps=num_steps,
        first_step=first_step,
        device=device,
        behaviour=behaviour,
    )
    return Expansion(recording.graph, recording.events, recording.marks, selection)
