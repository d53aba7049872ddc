"""
From a job to its result: tape, replay, and what was alive at the peak. Pure: same job, same bytes, anywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from memplan.allocator import replay, replay_with_need, reserved_at_either_pace, smallest_capacity
from memplan.budget.accuracy import error_band
from memplan.budget.alive import Snapshot, snapshots, timeline
from memplan.budget.count import count_parameters
from memplan.budget.host import host_memory
from memplan.budget.notes import (
    accelerate_notes,
    architecture_notes,
    attention_notes,
    optimizer_notes,
    quantization_notes,
    zero_notes,
)
from memplan.budget.outside import non_torch_bytes
from memplan.budget.result import Host, ParameterCount, Peak, PhaseLine, Result, TensorLine, highest_by
from memplan.job.spec import AllocatorSettings, Job
from memplan.model.architecture import Architecture
from memplan.tape.behaviour import Behaviour
from memplan.tape.sharded.zero_groups import zero_stage
from memplan.tape.tape import Tape, WrittenTape
from memplan.tape.vocabulary import with_special_tokens
from memplan.tape.writer import NUM_STEPS, write_tape
from memplan.units import MiB

BLOCK_BYTES = 512
"""What the CUDA allocator rounds every request up to."""
CAPACITY_STEP_BYTES = 2 * MiB
"""Granularity of device memory, and so of any need."""
TOP_TENSORS = 20


def estimate(
    job: Job,
    architecture: Architecture,
    *,
    device: str = "cuda",
    behaviour: Behaviour | None = None,
    read_bytes: int | None = None,
) -> Result:
    """
    Where every byte of the job goes, on the fullest rank. `read_bytes`: of the largest tensor of the checkpoint that
    the job goes on from, if it does.

    `device="cpu"` plans a run on the CPU: other kernels, no caching allocator, nothing outside torch; need,
    allocated and reserved are then one number. Raises UnknownModel, JobError.
    """
    return estimate_written(job, architecture, device=device, behaviour=behaviour, read_bytes=read_bytes)[1]


def estimate_written(
    job: Job,
    architecture: Architecture,
    *,
    device: str = "cuda",
    behaviour: Behaviour | None = None,
    read_bytes: int | None = None,
) -> tuple[WrittenTape, Result]:
    """`estimate`, and the tape that the result was read off."""
    notes = architecture_notes(job, architecture)
    architecture = with_special_tokens(job, architecture)
    written = write_tape(job, architecture, device=device, behaviour=behaviour, read_bytes=read_bytes)
    result = summarise(
        written,
        job,
        engine={"name": "shape", "device": device},
        host=host_memory(job, architecture),
        parameters=count_parameters(job, architecture),
    )
    notes = (
        attention_notes(job, written.graph.target)
        + zero_notes(job, architecture)
        + accelerate_notes(job, behaviour or Behaviour.for_job(job))
        + quantization_notes(job, behaviour or Behaviour.for_job(job))
        + optimizer_notes(job)
        + notes
    )
    result = replace(result, warnings=result.warnings + notes)
    return written, result


def summarise(
    written: WrittenTape, job: Job, *, engine: dict[str, str], host: Host, parameters: ParameterCount
) -> Result:
    """
    The result of a job whose tape is written, whoever wrote it.

    `engine` names the writer, the `device` it wrote for and the versions of the software it ran.
    """
    tape = written.flatten()
    if engine["device"] == "cpu":
        measured = measure_live(tape)
        outside, context = 0, ""
    else:
        measured = measure(tape, job.allocator)
        outside, context = non_torch_bytes(job)
    result = assemble(written, tape, measured, engine=engine, outside_bytes=outside)
    return replace(
        result,
        job=job,
        error_band=error_band(job, result.need_bytes, outside, engine=engine["name"]),
        host=host,
        parameters=parameters,
        warnings=_warnings(job, context, engine["name"]),
    )


def assemble(
    written: WrittenTape, tape: Tape, measured: Measured, *, engine: dict[str, str], outside_bytes: int
) -> Result:
    """
    What the replay of a tape says alone: need, peak, budgets, phases, largest tensors, timeline.

    `tape` is that of `written`, with a mark at its beginning and one at its end.
    """
    unit = BLOCK_BYTES if engine["device"] == "cuda" else 1
    states = snapshots(tape, written, [peak.event for peak in measured.phases], unit)
    phases = tuple(
        PhaseLine(
            peak.phase,
            peak.step,
            peak.allocated_bytes,
            peak.reserved_bytes,
            state.lines(peak.allocated_bytes),
        )
        for peak, state in zip(measured.phases, states)
    )
    worst = max(range(len(phases)), key=lambda index: phases[index].allocated_peak_bytes)
    return Result(
        job=None,
        origins={},
        engine=engine,
        need_bytes=measured.need_bytes + outside_bytes,
        peak=_peak(measured, worst, outside_bytes, tape, written),
        error_band=None,
        budget=phases[worst].budget,
        # Accumulation repeats forward and backward.
        phases=tuple(highest_by(phases, lambda line: (line.phase, line.step)).values()),
        top=_top(states[worst], written),
        host=None,
        parameters=None,
        timeline=timeline(tape),
    )


def need_bytes(job: Job, architecture: Architecture) -> int:
    """
    The smallest capacity of one GPU at which the job completes, in bytes, what is outside torch included.
    """
    tape = write_tape(job, architecture).flatten()
    return smallest_capacity(tape.events, tape.sizes, tape.streams, job.allocator) + non_torch_bytes(job)[0]


def with_known_need(result: Result, job: Job, need_bytes: int) -> Result:
    """
    Another job's need, as `need_bytes` gave it, and its error band in the result of one; all else stays. A verdict
    takes no more.
    """
    band = error_band(job, need_bytes, non_torch_bytes(job)[0])
    return replace(result, job=job, need_bytes=need_bytes, error_band=band)


def quick_need_bytes(job: Job, architecture: Architecture) -> int:
    """
    A lower bound of `need_bytes`, without replaying an event: the live bytes at the peak of a step that finds the
    optimizer's states in place, as every step from the second on does.
    """
    live = write_tape(job, architecture, first_step=NUM_STEPS).peak_live_bytes(BLOCK_BYTES)
    return -(-live // CAPACITY_STEP_BYTES) * CAPACITY_STEP_BYTES + non_torch_bytes(job)[0]


class PhaseMeasure(NamedTuple):
    """The highest moment of one stretch between two marks."""

    phase: str
    step: int
    event: int
    """The event after which it was reached; -1: before all."""
    allocated_bytes: int
    reserved_bytes: int


class Measured(NamedTuple):
    """Numbers of a replay; `reserved_bytes` is the highest of all."""

    need_bytes: int
    reserved_bytes: int
    phases: list[PhaseMeasure]


def measure(tape: Tape, settings: AllocatorSettings) -> Measured:
    """
    A tape through the simulated allocator. Where streams use each other's blocks, what is reserved is the higher of
    what it is with a device that keeps up and with a host that is ahead.
    """
    replayed, need = replay_with_need(tape.events, tape.sizes, tape.streams, settings, marks=tape.marks)
    if tape.recorded:
        ahead = replay(
            tape.events,
            tape.sizes,
            tape.streams,
            settings,
            marks=tape.marks,
            recorded=tape.recorded,
            waits=tape.waits,
        )
        replayed = reserved_at_either_pace(replayed, ahead)
    phases = [
        PhaseMeasure(
            peak.mark.phase,
            peak.mark.step,
            peak.allocated_peak_event,
            peak.allocated_peak_bytes,
            peak.reserved_peak_bytes,
        )
        for peak in replayed.phases
        if peak.mark.phase != "end"
    ]
    return Measured(need, replayed.peak_reserved_bytes, phases)


def measure_live(tape: Tape) -> Measured:
    """A tape without any allocator, as on a CPU: need, reserved and allocated are the live bytes."""
    phases = []
    live = 0
    bounds = [mark.event for mark in tape.marks]
    for mark, start, stop in zip(tape.marks, bounds, bounds[1:]):
        peak, peak_event = live, start - 1
        for index in range(start, stop):
            event = tape.events[index]
            if event > 0:
                live += tape.sizes[event]
                if live > peak:
                    peak, peak_event = live, index
            else:
                live -= tape.sizes[-event]
        phases.append(PhaseMeasure(mark.phase, mark.step, peak_event, peak, peak))
    highest = max(phase.allocated_bytes for phase in phases)
    return Measured(highest, highest, phases)


def _peak(measured: Measured, worst: int, outside: int, tape: Tape, written: WrittenTape) -> Peak:
    phase = measured.phases[worst]
    event = tape.events[phase.event]
    return Peak(
        allocated_bytes=phase.allocated_bytes,
        reserved_bytes=measured.reserved_bytes,
        non_torch_bytes=outside,
        device_bytes=measured.reserved_bytes + outside,
        phase=phase.phase,
        step=phase.step,
        where=written.describe(abs(event)).where,
    )


def _top(state: Snapshot, written: WrittenTape) -> tuple[TensorLine, ...]:
    lines = []
    for storage_id in state.largest(TOP_TENSORS):
        storage = written.describe(storage_id)
        lines.append(
            TensorLine(storage.where, storage.shape, storage.dtype, storage.num_bytes, storage.category)
        )
    return tuple(lines)


def _warnings(job: Job, context: str, engine: str) -> tuple[str, ...]:
    notes = [f"outside torch: {context}"] if context else []
    if zero_stage(job) and engine == "shape":
        pass  # notes.zero_notes says how
    elif job.parallel.strategy.startswith("ZERO"):
        notes.append(
            f"{job.parallel.strategy} of a model in 4 bits is planned to first order: loaded whole and then cut, as "
            "DeepSpeed does; its states are cut, its buffers are those of FSDP"
        )
    elif job.world_size > 1:
        notes.append(
            f"sharding follows torch's FSDP{job.parallel.fsdp_version} and DDP; no plan of it has been held against a "
            "GPU of ours yet"
        )
    return tuple(notes)
