"""
The matrix, one cell after the other, each in a process of its own, as long as there is time.

While a cell runs, the process of the next one imports its libraries and waits: an import takes longer than
most cells.
"""

from __future__ import annotations

import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record.matrix import Cell
from memplan.errors import MemplanError
from memplan.record.file import RecordFile
from memplan.record.launch import Measurement, add_prediction, begin_record, find_limits

LEAST_SECONDS = 15
"""No cell is begun with less time left."""
HEADER = f"{'cell':32}{'outcome':>16}{'allocated':>11}{'reserved':>10}{'device':>9}{'need':>9}{'seconds':>9}"


def waiting_process(record: RecordFile) -> Measurement:
    """A measuring process that imports its libraries and waits."""
    return Measurement(record, wait=True)


class Clock:
    """How much time there is left."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._ends_at = now() + seconds

    def left(self) -> float:
        """Seconds, below 0 when it is over."""
        return self._ends_at - self._now()


def run_matrix(
    cells: Sequence[Cell],
    folder: Path,
    clock: Clock,
    *,
    resume: bool = False,
    archive: Path | None = None,
    say: Callable[[str], None] = print,
    start: Callable[[RecordFile], Any] = waiting_process,
) -> int:
    """
    Record the cells into `folder`/NAME.json and print a line for each; returns how many were recorded.

    Args:
        resume: leave out cells whose record is there and finished.
        archive: a zip file of the folder, whole after every cell.
        start: a process that waits to measure a record (`Measurement`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in cells if not (resume and is_finished(record_path(folder, cell)))]
    say(f"{len(waiting)} of {len(cells)} cells to record")
    say(HEADER)
    count = 0
    ready = _begin(waiting[0], folder, start) if waiting else None
    for index, cell in enumerate(waiting):
        if clock.left() < LEAST_SECONDS:
            say(f"no time left for {len(waiting) - index} cells; `--resume` goes on from here")
            break
        current, ready = ready, None
        if current is not None:
            current.go()
        began = time.monotonic()
        try:
            if index + 1 < len(waiting):
                ready = _begin(waiting[index + 1], folder, start)
            if current is not None:
                record = current.finish(min(cell.seconds, max(1.0, clock.left())))
                _complete(cell, record, clock)
                say(cell_line(cell.name, record, time.monotonic() - began))
                count += 1
        except BaseException:
            if ready is not None:
                ready.discard()
            raise
        if archive is not None:
            write_archive(folder, archive)
    if ready is not None:
        ready.discard()
    return count


def record_path(folder: Path, cell: Cell) -> Path:
    """Where the record of a cell goes."""
    return folder / f"{cell.name}.json"


def is_finished(path: Path) -> bool:
    """Whether a record is there and says how it ended."""
    try:
        return RecordFile.read(path).is_finished
    except MemplanError:
        return False


def _begin(cell: Cell, folder: Path, start: Callable[[RecordFile], Any]) -> Any:
    """A process that waits; None where the cell cannot be begun, which is said."""
    try:
        record = begin_record(
            cell.loaded, record_path(folder, cell), steps=cell.steps, model_config=cell.model_config
        )
    except MemplanError as error:
        print(f"{cell.name}: {error.message}", file=sys.stderr)
        return None
    return start(record)


def _complete(cell: Cell, record: RecordFile, clock: Clock) -> None:
    """Limits where they are asked for, and the prediction; nothing that goes wrong here ends the matrix."""
    if cell.limits:
        try:
            find_limits(record, time_limit_seconds=min(cell.seconds, clock.left()))
        except MemplanError as error:
            print(f"{cell.name}: {error.message}", file=sys.stderr)
    try:
        add_prediction(record)
    except Exception as error:
        record.update(plan_error=f"{type(error).__name__}: {error}")


def cell_line(name: str, record: RecordFile, seconds: float) -> str:
    """One line: predicted / measured - 1 over the steps, by statistic."""
    errors = {
        line["statistic"]: line["error"] for line in record.fields["comparison"] if line["step"] is None
    }
    figures = [
        f"{errors[key]:+.2%}" if key in errors else "-" for key in ("allocated", "reserved", "device", "need")
    ]
    widths = (11, 10, 9, 9)
    texts = "".join(f"{figure:>{width}}" for figure, width in zip(figures, widths))
    fields = record.fields
    line = f"{name:32}{fields['outcome']:>16}{texts}{seconds:>9.1f}"
    remark = fields["error"] or fields["plan_error"] or fields["trace_error"]
    return f"{line}  {remark[:100]}" if remark else line


def write_archive(folder: Path, archive: Path) -> None:
    """Every JSON file of the folder in one zip file, replaced at once."""
    temporary = archive.with_name(f".{archive.name}.new")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(folder.glob("*.json")):
            file.write(path, path.name)
    temporary.replace(archive)
