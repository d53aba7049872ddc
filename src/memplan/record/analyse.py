"""
A record against what memplan says today: statistic by statistic, the allocator alone on the measured events,
and event by event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from memplan.allocator import replay, replay_with_need
from memplan.budget.outside import non_torch_bytes
from memplan.errors import MemplanError, TraceError, UnknownModel
from memplan.gpu.catalogue import match_gpu
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.config import architecture_from_config
from memplan.record.compact import decode
from memplan.record.file import RecordFile
from memplan.record.phases import alive_at_peaks, tape_phases
from memplan.tape.tape import FlatTape, WrittenTape
from memplan.tape.writer import write_tape
from memplan.tracing.estimate import missing_software

ENGINES = ("shape", "trace", "auto")
"""What writes the tape; `auto` traces what has no program and where torch is installed."""
Moment = tuple[str, int]
"""Phase and step."""


@dataclass(frozen=True)
class Line:
    """One statistic: what was measured and what was predicted."""

    statistic: str
    """`allocated`, `reserved` (peaks, of a phase where one is named), `device`, `need`"""
    phase: str | None
    step: int | None
    predicted_bytes: int
    measured_bytes: int

    @property
    def error(self) -> float:
        """predicted / measured - 1: above 0 the prediction is too high."""
        return self.predicted_bytes / self.measured_bytes - 1

    def to_json(self) -> dict[str, Any]:
        """As a record holds it."""
        return {**asdict(self), "error": round(self.error, 6)}


@dataclass(frozen=True)
class PhasePeaks:
    """Peaks of one phase of one step; `reserved_bytes` is None on the CPU."""

    allocated_bytes: int
    reserved_bytes: int | None


@dataclass(frozen=True)
class Prediction:
    """What memplan says of a record's job on the record's device."""

    engine: str
    """`shape` or `trace`: what wrote the tape."""
    flat: FlatTape
    phases: dict[Moment, PhasePeaks]
    need_bytes: int | None
    """Inside torch's allocator; None on the CPU."""
    outside_bytes: int


def planned_job(record: RecordFile) -> Job:
    """The job, with the card that it ran on where it names none: kernels and workspaces depend on it."""
    job, device = record.job, record.fields["device"]
    if job.gpu is None and device and device["type"] == "cuda" and match_gpu(device["name"]) is not None:
        return job.replace(gpu=device["name"])
    return job


def architecture_of(record: RecordFile) -> Architecture:
    """Of the config that the record holds; raises UnknownModel."""
    return architecture_from_config(
        record.fields["model_config"], name=record.fields["job"]["model"], source="record"
    )


def predict(record: RecordFile, engine: str = "shape") -> Prediction:
    """
    The tape of the record's steps and its replay.

    Args:
        engine: of ENGINES. A trace imports torch and runs the step of the libraries at hand, not those of the record.

    Raises:
        UnknownModel, JobError, TraceError: there is no plan for this job.
    """
    job = planned_job(record)
    device = (record.fields["device"] or {}).get("type", "cuda")
    written, engine = _write(record, job, device, engine)
    flat = _flat(written)
    if device == "cpu":
        return Prediction(engine, flat, _peaks(tape_phases(flat)), None, 0)
    tape = flat.tape
    replayed, need = replay_with_need(tape.events, tape.sizes, tape.streams, job.allocator, marks=tape.marks)
    phases = [
        {
            "phase": peak.mark.phase,
            "step": peak.mark.step,
            "allocated_peak_bytes": peak.allocated_peak_bytes,
            "reserved_peak_bytes": peak.reserved_peak_bytes,
        }
        for peak in replayed.phases
        if peak.mark.phase != "end"
    ]
    return Prediction(engine, flat, _peaks(phases), need, non_torch_bytes(job)[0])


def _write(record: RecordFile, job: Job, device: str, engine: str) -> tuple[WrittenTape, str]:
    """The tape, and the engine that wrote it."""
    steps = record.fields["steps"]
    if engine != "trace":
        try:
            return write_tape(job, architecture_of(record), device=device, num_steps=steps), "shape"
        except UnknownModel:
            if engine == "shape" or missing_software():
                raise
    from memplan.tracing.writer import trace_job

    try:
        return trace_job(job, record.fields["model_config"], device=device, num_steps=steps), "trace"
    except MemplanError:
        raise
    except Exception as error:
        # Whatever a model's code raises on tensors without values; the record stands without a plan.
        words = (str(error).splitlines() or [""])[0]
        raise TraceError(f"the trace failed: {type(error).__name__}: {words}") from error


def compare(record: RecordFile, prediction: Prediction) -> list[Line]:
    """
    Every statistic that was measured and is predicted: of each phase, over all steps, over the process.

    Loading counts as a phase but not in the peaks over all, which are those of the steps.
    """
    measured = _peaks(record.fields["phases"])
    lines = []
    for moment, peaks in measured.items():
        predicted = prediction.phases.get(moment)
        if predicted is not None:
            lines += _lines(moment, predicted, peaks)
    steps = [moment for moment in measured if moment[1] > 0 and moment in prediction.phases]
    if not steps or record.fields["outcome"] != "completed":
        return lines
    lines += _lines(
        None,
        _highest(prediction.phases[moment] for moment in steps),
        _highest(measured[moment] for moment in steps),
    )
    device = device_peak_bytes(record)
    if device is not None:
        reserved = max(peaks.reserved_bytes or 0 for peaks in prediction.phases.values())
        lines.append(Line("device", None, None, reserved + prediction.outside_bytes, device))
    limits = record.fields["limits"]
    if limits and limits["smallest_bytes"] and prediction.need_bytes is not None:
        lines.append(Line("need", None, None, prediction.need_bytes, limits["smallest_bytes"]))
    return lines


def device_peak_bytes(record: RecordFile) -> int | None:
    """The most that the driver saw this process use; None where what others used is not known."""
    before = record.fields["process"].get("used_before_context_bytes")
    used = [phase.get("device_used_bytes") for phase in record.fields["phases"]]
    known = [value for value in used if value is not None]
    return max(known) - before if known and before is not None else None


def context_bytes(record: RecordFile) -> int | None:
    """What this process holds outside torch's allocator at the end; None where it is not known."""
    process, phases = record.fields["process"], record.fields["phases"]
    before, at_end = process.get("used_before_context_bytes"), process.get("mem_get_info_at_end")
    if before is None or at_end is None or not phases:
        return None
    return int(at_end["total_bytes"] - at_end["free_bytes"] - before - _reserved_at_end(record))


def _reserved_at_end(record: RecordFile) -> int:
    return sum(segment[0] for segment in record.fields["segments"])


def replay_measured(record: RecordFile) -> list[Line]:
    """
    The measured events through the simulated allocator, beside the peaks that the real one reported: what is
    off here is off in the simulation. Empty without a trace or a caching allocator.
    """
    if record.fields["trace"] is None or record.fields["device"]["type"] != "cuda":
        return []
    tape = decode(record.fields["trace"]).tape
    replayed = replay(tape.events, tape.sizes, tape.streams, record.job.allocator, marks=tape.marks)
    simulated = _peaks(
        {
            "phase": peak.mark.phase,
            "step": peak.mark.step,
            "allocated_peak_bytes": peak.allocated_peak_bytes,
            "reserved_peak_bytes": peak.reserved_peak_bytes,
        }
        for peak in replayed.phases
    )
    measured = _peaks(record.fields["phases"])
    return [
        line
        for moment, peaks in measured.items()
        if moment in simulated
        for line in _lines(moment, simulated[moment], peaks)
    ]


@dataclass(frozen=True)
class Difference:
    """Storages of one size that one side has more of than the other."""

    num_bytes: int
    count: int
    """Above 0: measured and not predicted. Below 0: predicted and not measured."""
    where: tuple[str, ...]
    """What they are, on the side that has more; the most frequent first."""


def different_allocations(
    record: RecordFile, prediction: Prediction, *, min_bytes: int
) -> dict[Moment, list[Difference]]:
    """By phase and step, what is allocated in it on one side only; sizes below `min_bytes` left out."""
    return _by_moment(record, prediction, _allocated, min_bytes)


def different_at_peaks(
    record: RecordFile, prediction: Prediction, *, min_bytes: int
) -> dict[Moment, list[Difference]]:
    """By phase and step, what is alive at its peak on one side only."""
    return _by_moment(record, prediction, alive_at_peaks, min_bytes)


def _by_moment(
    record: RecordFile,
    prediction: Prediction,
    choose: Callable[[FlatTape], dict[Moment, set[int]]],
    min_bytes: int,
) -> dict[Moment, list[Difference]]:
    if record.fields["trace"] is None:
        return {}
    measured = decode(record.fields["trace"])
    theirs, ours = choose(measured), choose(prediction.flat)
    found = {}
    for moment, ids in theirs.items():
        if moment in ours:
            differences = _differences(measured, ids, prediction.flat, ours[moment], min_bytes)
            if differences:
                found[moment] = differences
    return found


def _differences(
    measured: FlatTape, measured_ids: set[int], predicted: FlatTape, predicted_ids: set[int], min_bytes: int
) -> list[Difference]:
    theirs = Counter(measured.tape.sizes[storage] for storage in measured_ids)
    ours = Counter(predicted.tape.sizes[storage] for storage in predicted_ids)
    differences = []
    for size in theirs | ours:
        count = theirs[size] - ours[size]
        if count and size >= min_bytes:
            side, ids = (measured, measured_ids) if count > 0 else (predicted, predicted_ids)
            names = Counter(
                side.describe(storage).where for storage in ids if side.tape.sizes[storage] == size
            )
            where = tuple(name for name, _ in names.most_common(3))
            differences.append(Difference(size, count, where))
    return sorted(differences, key=lambda found: -abs(found.num_bytes * found.count))


def _allocated(flat: FlatTape) -> dict[Moment, set[int]]:
    """The ids allocated in each phase and step."""
    tape = flat.tape
    bounds = [*(mark.event for mark in tape.marks), len(tape.events)]
    found: dict[Moment, set[int]] = {}
    for mark, start, stop in zip(tape.marks, bounds, bounds[1:]):
        ids = {event for event in tape.events[start:stop] if event > 0}
        found.setdefault((mark.phase, mark.step), set()).update(ids)
    return found


def _flat(written: WrittenTape) -> FlatTape:
    tape = written.flatten()
    storages = [written.describe(storage) for storage in range(1, len(tape.sizes))]
    return FlatTape(tape, storages)


def _peaks(phases: Iterable[dict[str, Any]]) -> dict[Moment, PhasePeaks]:
    """By phase and step, the higher ones where accumulation repeats a phase."""
    merged: dict[Moment, PhasePeaks] = {}
    for phase in phases:
        moment = (phase["phase"], phase["step"])
        peaks = PhasePeaks(phase["allocated_peak_bytes"], phase["reserved_peak_bytes"])
        merged[moment] = _highest([merged[moment], peaks]) if moment in merged else peaks
    return merged


def _highest(peaks: Iterable[PhasePeaks]) -> PhasePeaks:
    chosen = list(peaks)
    reserved = [each.reserved_bytes for each in chosen if each.reserved_bytes is not None]
    return PhasePeaks(max(each.allocated_bytes for each in chosen), max(reserved) if reserved else None)


def _lines(moment: Moment | None, predicted: PhasePeaks, measured: PhasePeaks) -> list[Line]:
    phase, step = moment if moment is not None else (None, None)
    pairs = [
        ("allocated", predicted.allocated_bytes, measured.allocated_bytes),
        ("reserved", predicted.reserved_bytes, measured.reserved_bytes),
    ]
    return [
        Line(statistic, phase, step, ours, theirs)
        for statistic, ours, theirs in pairs
        if ours is not None and theirs
    ]
