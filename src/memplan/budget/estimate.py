"""
From a job to its result: tape, replay, and what was alive at the peak. Pure: same job, same bytes, anywhere.
"""

from __future__ import annotations

from memplan.allocator import replay_with_need
from memplan.budget.accuracy import error_band
from memplan.budget.alive import Snapshot, snapshots, timeline
from memplan.budget.count import count_parameters
from memplan.budget.host import host_memory
from memplan.budget.outside import non_torch_bytes
from memplan.budget.result import Peak, PhaseLine, Result, TensorLine
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.tape.repeat import Expansion
from memplan.tape.shape import Behaviour
from memplan.tape.tape import Mark, Tape
from memplan.tape.writer import NUM_STEPS, write_tape
from memplan.units import MiB

BLOCK_BYTES = 512
"""What the CUDA allocator rounds every request up to."""
CAPACITY_STEP_BYTES = 2 * MiB
"""Granularity of device memory, and so of any need."""
TOP_TENSORS = 20


def estimate(
    job: Job, architecture: Architecture, *, device: str = "cuda", behaviour: Behaviour | None = None
) -> Result:
    """
    Where every byte of the job goes, on the fullest rank.

    `device="cpu"` plans a run on the CPU: other kernels, no caching allocator, nothing outside torch; need,
    allocated and reserved are then one number. Raises UnknownModel, JobError.
    """
    expansion = write_tape(job, architecture, device=device, behaviour=behaviour)
    tape = expansion.flatten()
    if device == "cpu":
        measured = _without_allocator(tape)
        outside, context = 0, ""
    else:
        measured = _with_allocator(tape, job)
        outside, context = non_torch_bytes(job)
    unit = BLOCK_BYTES if device == "cuda" else 1
    states = snapshots(tape, expansion, [peak.event for peak in measured.phases], unit)
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
    need_bytes = measured.need_bytes + outside
    parameters = count_parameters(job, architecture)
    return Result(
        job=job,
        origins={},
        engine={"name": "shape", "device": device},
        need_bytes=need_bytes,
        peak=_peak(measured, worst, outside, tape, expansion),
        error_band=error_band(job, need_bytes, outside),
        budget=phases[worst].budget,
        phases=_merge(phases),
        top=_top(states[worst], expansion),
        host=host_memory(job, architecture),
        parameters=parameters,
        timeline=timeline(tape),
        warnings=_warnings(job, context),
    )


def need_bytes(job: Job, architecture: Architecture) -> int:
    """
    The smallest capacity of one GPU at which the job completes, in bytes, what is outside torch included.
    """
    tape = write_tape(job, architecture).flatten()
    return _with_allocator(tape, job).need_bytes + non_torch_bytes(job)[0]


def quick_need_bytes(job: Job, architecture: Architecture) -> int:
    """
    A lower bound of `need_bytes`, without replaying an event: the live bytes at the peak of a step that finds the
    optimizer's states in place, as every step from the second on does.
    """
    live = write_tape(job, architecture, first_step=NUM_STEPS).peak_live_bytes(BLOCK_BYTES)
    return -(-live // CAPACITY_STEP_BYTES) * CAPACITY_STEP_BYTES + non_torch_bytes(job)[0]


class _PhasePeak:
    """Peak of one stretch between two marks."""

    def __init__(self, mark: Mark, event: int, allocated_bytes: int, reserved_bytes: int) -> None:
        self.phase, self.step = mark.phase, mark.step
        self.event = event
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes


class _Measured:
    """Numbers of a replay."""

    def __init__(self, need_bytes: int, reserved_bytes: int, phases: list[_PhasePeak]) -> None:
        self.need_bytes = need_bytes
        self.reserved_bytes = reserved_bytes
        self.phases = phases


def _with_allocator(tape: Tape, job: Job) -> _Measured:
    replay, need = replay_with_need(tape.events, tape.sizes, tape.streams, job.allocator, marks=tape.marks)
    phases = [
        _PhasePeak(peak.mark, peak.allocated_peak_event, peak.allocated_peak_bytes, peak.reserved_peak_bytes)
        for peak in replay.phases
        if peak.mark.phase != "end"
    ]
    return _Measured(need, replay.peak_reserved_bytes, phases)


def _without_allocator(tape: Tape) -> _Measured:
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
        phases.append(_PhasePeak(mark, peak_event, peak, peak))
    highest = max(phase.allocated_bytes for phase in phases)
    return _Measured(highest, highest, phases)


def _peak(measured: _Measured, worst: int, outside: int, tape: Tape, expansion: Expansion) -> Peak:
    phase = measured.phases[worst]
    event = tape.events[phase.event]
    return Peak(
        allocated_bytes=phase.allocated_bytes,
        reserved_bytes=measured.reserved_bytes,
        non_torch_bytes=outside,
        device_bytes=measured.reserved_bytes + outside,
        phase=phase.phase,
        step=phase.step,
        where=expansion.describe(abs(event)).where,
    )


def _merge(phases: tuple[PhaseLine, ...]) -> tuple[PhaseLine, ...]:
    """One line per phase and step: accumulation repeats forward and backward."""
    merged: dict[tuple[str, int], PhaseLine] = {}
    for line in phases:
        known = merged.get((line.phase, line.step))
        if known is None or line.allocated_peak_bytes > known.allocated_peak_bytes:
            merged[line.phase, line.step] = line
    return tuple(merged.values())


def _top(state: Snapshot, expansion: Expansion) -> tuple[TensorLine, ...]:
    lines = []
    for storage_id in state.largest(TOP_TENSORS):
        storage = expansion.describe(storage_id)
        lines.append(
            TensorLine(storage.where, storage.shape, storage.dtype, storage.num_bytes, storage.category)
        )
    return tuple(lines)


def _warnings(job: Job, context: str) -> tuple[str, ...]:
    notes = [f"outside torch: {context}"] if context else []
    if job.world_size > 1:
        notes.append(
            "sharded and replicated jobs are planned to first order: no prefetch beyond the next block"
        )
    return tuple(notes)
