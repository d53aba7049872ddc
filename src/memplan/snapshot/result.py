"""The result of a recording: where every byte was at the peak that was measured."""

from __future__ import annotations

from dataclasses import replace

from memplan.budget.estimate import assemble, measure
from memplan.budget.result import Result
from memplan.errors import GpuError, SnapshotError
from memplan.gpu.catalogue import find_gpu
from memplan.gpu.context import context_bytes
from memplan.snapshot.read import RECORDED_PHASE, RecordedTape
from memplan.tape.tape import Mark, Tape


def summarise_recording(recorded: RecordedTape, *, file: str, gpu: str | None = None) -> Result:
    """
    The result of a recorded tape, with neither job nor error band.

    Reserved bytes are those that were recorded. The need is that of these allocations in this order, with the
    allocator's settings of the run. A snapshot does not show what is outside torch: that is the catalogue's figure
    for `gpu`, as in a plan, and a warning says so.

    Raises:
        SnapshotError: nothing was recorded.
    """
    tape = _bounded(recorded.tape)
    if not recorded.storages:
        raise SnapshotError(
            f"`{file}` holds no allocation",
            hint="call `torch.cuda.memory._record_memory_history()` before the run, and dump the snapshot after it",
        )
    outside, source = _outside(gpu)
    measured = measure(tape, recorded.settings)
    bounds = [(mark, after.event) for mark, after in zip(tape.marks, tape.marks[1:]) if mark.phase != "end"]
    phases = [
        phase._replace(reserved_bytes=recorded.reserved_peak(mark.event, max(stop, mark.event + 1)))
        for phase, (mark, stop) in zip(measured.phases, bounds, strict=True)
    ]
    measured = measured._replace(
        phases=phases, reserved_bytes=recorded.reserved_peak(0, len(tape.events) + 1)
    )
    engine = {"name": "snapshot", "device": "cuda", "file": file}
    result = assemble(recorded, tape, measured, engine=engine, outside_bytes=outside)
    kind = ("written by memplan: a plan, not a measurement",) if recorded.planned else ()
    notes = (*kind, *recorded.notes, f"outside torch, where a snapshot does not look: CUDA context, {source}")
    return replace(result, warnings=notes)


def _outside(gpu: str | None) -> tuple[int, str]:
    """(bytes of the CUDA context, where they come from)"""
    profile = None
    if gpu is not None:
        try:
            profile = find_gpu(gpu)
        except GpuError:  # a size, or a live GPU
            profile = None
    return context_bytes(profile)


def _bounded(tape: Tape) -> Tape:
    """The tape with a mark at its beginning and one at its end, which a tape that was made by hand may lack."""
    marks = list(tape.marks)
    if not marks or marks[0].event > 0:
        marks.insert(0, Mark(0, RECORDED_PHASE, 0))
    if marks[-1].phase != "end":
        marks.append(Mark(len(tape.events), "end", marks[-1].step))
    return replace(tape, marks=marks)
