"""Records against what memplan says today, as text: statistics, the allocator alone, and what was not planned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from memplan.errors import MemplanError
from memplan.record.analyse import (
    Difference,
    Line,
    Moment,
    Prediction,
    compare,
    context_bytes,
    different_allocations,
    different_at_peaks,
    predict,
    replay_measured,
)
from memplan.record.file import RecordFile
from memplan.units import KiB, MiB, format_bytes

MIN_BYTES = 64 * KiB
"""Smaller storages are not looked at one by one."""
_FEW = 4


def load_records(folder: Path) -> Iterator[tuple[str, RecordFile]]:
    """(name, record) of every record in a folder that says how it ended."""
    for path in sorted(folder.glob("*.json")):
        try:
            record = RecordFile.read(path)
        except MemplanError:
            continue
        if "outcome" in record.fields and record.is_finished:
            yield path.stem, record


def analyse(folder: Path, *, details: bool = False, engine: str = "auto") -> Iterator[str]:
    """All of it, line by line, by the plans of an engine; `details` lists every storage that differs."""
    records = list(load_records(folder))
    if not records:
        yield f"no records in {folder}"
        return
    predictions = {name: _predict(record, engine) for name, record in records}
    yield from _outcomes(records, predictions)
    yield ""
    yield from _statistics(records, predictions)
    yield ""
    yield from _allocator(records)
    for name, record in records:
        prediction = predictions[name]
        if isinstance(prediction, Prediction):
            yield from _differences(name, record, prediction, details=details)


def _predict(record: RecordFile, engine: str) -> Prediction | str:
    try:
        return predict(record, engine)
    except MemplanError as error:
        return error.message


def _outcomes(
    records: Sequence[tuple[str, RecordFile]], predictions: dict[str, Prediction | str]
) -> Iterator[str]:
    yield "# Outcomes"
    for name, record in records:
        fields = record.fields
        remarks = [fields["error"], fields["trace_error"]]
        prediction = predictions[name]
        if isinstance(prediction, str):
            remarks.append(f"no plan: {prediction}")
        elif prediction.engine != "shape":
            remarks.append(f"planned by the {prediction.engine}")
        outside = context_bytes(record)
        if outside is not None:
            remarks.append(f"{format_bytes(outside)} outside torch")
        yield f"{name:32}{fields['outcome']:>16}  {'; '.join(filter(None, remarks))}"


def _statistics(
    records: Sequence[tuple[str, RecordFile]], predictions: dict[str, Prediction | str]
) -> Iterator[str]:
    yield "# Predicted / measured - 1"
    yield f"{'record':32}{'statistic':>11}  {'of':24}{'predicted':>14}{'measured':>14}{'error':>9}"
    for name, record in records:
        prediction = predictions[name]
        if isinstance(prediction, Prediction):
            for line in compare(record, prediction):
                yield f"{name:32}{_line_text(line)}"


def _line_text(line: Line) -> str:
    of = "the steps" if line.phase is None else f"{line.phase} {line.step or ''}"
    predicted, measured = format_bytes(line.predicted_bytes), format_bytes(line.measured_bytes)
    return f"{line.statistic:>11}  {of:24}{predicted:>14}{measured:>14}{line.error:>+9.2%}"


def _allocator(records: Sequence[tuple[str, RecordFile]]) -> Iterator[str]:
    yield "# The allocator alone: measured events through the simulation, largest error of any phase"
    found = False
    for name, record in records:
        lines = replay_measured(record)
        worst = {
            statistic: max(errors, key=abs)
            for statistic in ("allocated", "reserved")
            if (errors := [line.error for line in lines if line.statistic == statistic])
        }
        if worst:
            found = True
            yield f"{name:32}" + "".join(f"{key} {error:+.3%}  " for key, error in worst.items()).rstrip()
    if not found:
        yield "no record of a CUDA device with its events"


def _differences(name: str, record: RecordFile, prediction: Prediction, *, details: bool) -> Iterator[str]:
    """The last step's phases, or all of them: what is allocated, and what is alive at the peak."""
    views = {
        "alive at its peak": different_at_peaks(record, prediction, min_bytes=MIN_BYTES),
        "allocated in it": different_allocations(record, prediction, min_bytes=MIN_BYTES),
    }
    lines = []
    for view, found in views.items():
        for moment, differences in found.items():
            if details or moment[1] in (0, record.fields["steps"]):
                lines += list(_moment_lines(moment, view, differences, details=details))
    if lines:
        yield ""
        yield f"# {name}: storages of {format_bytes(MIN_BYTES)} or more on one side only"
        yield from lines


def _moment_lines(
    moment: Moment, view: str, differences: Sequence[Difference], *, details: bool
) -> Iterator[str]:
    phase, step = moment
    total = sum(difference.num_bytes * difference.count for difference in differences)
    yield f"{phase} {step or ''} {view}: measured has {total / MiB:+,.2f} MiB more".replace("  ", " ")
    shown = differences if details else differences[:_FEW]
    for difference in shown:
        side = "not planned" if difference.count > 0 else "planned only"
        where = " | ".join(difference.where)
        yield f"  {side}: {abs(difference.count)} x {difference.num_bytes:,} B  {where}"
    if len(shown) < len(differences):
        yield f"  and {len(differences) - len(shown)} more sizes"
