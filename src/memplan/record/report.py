"""A record in lines of text: how it ended, and predicted beside measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from memplan.record.analyse import context_bytes
from memplan.record.file import RecordFile
from memplan.units import format_bytes


def record_lines(record: RecordFile) -> Iterator[str]:
    """What `memplan record` prints."""
    fields = record.fields
    device = fields["device"]
    if device is not None:
        words = "no GPU: measured with torch's profiler" if device["type"] == "cpu" else device["name"]
        yield f"device: {device['type']} ({words})"
    yield f"outcome: {fields['outcome']}" + (f", {fields['error']}" if fields["error"] else "")
    if fields["plan_error"]:
        yield f"no prediction: {fields['plan_error']}"
    if fields["trace_error"]:
        yield f"note: {fields['trace_error']}"
    outside = context_bytes(record)
    if outside is not None:
        yield f"outside torch's allocator at the end: {format_bytes(outside)}"
    if fields["comparison"]:
        yield ""
        yield f"{'':34}{'predicted':>14}{'measured':>14}{'error':>9}"
        yield from map(_comparison_line, fields["comparison"])


def _comparison_line(line: dict[str, Any]) -> str:
    where = "the steps" if line["phase"] is None else line["phase"].replace("_", " ")
    step = f" of step {line['step']}" if line["step"] else ""
    predicted, measured = format_bytes(line["predicted_bytes"]), format_bytes(line["measured_bytes"])
    return f"{line['statistic'] + ', ' + where + step:34}{predicted:>14}{measured:>14}{line['error']:>+9.2%}"
