"""
What a run leaves behind for readers: `record.json`, rewritten whole at every change of state, and
`metrics.jsonl`. With several processes the first one writes them.

    schema_version  1
    job, plan       the job as resolved; the estimate (the object of `memplan estimate --format json`) or null
    measured        {phases: [{phase, step, allocated_peak_bytes, reserved_bytes, rank}], peak: the highest of them}
    versions        of memplan, python, torch, transformers, peft
    device          {type, name, total_bytes}
    data            {documents, samples, tokens, targets, truncated, left_out, longest, tokenizer}
    outcome         running | completed | interrupted | out_of_memory | failed
    error           the sentence that was printed, or null
    steps           {first, last, max}: of this start of the run
    loss            {first, last}
    resumed_from    the checkpoint's step, or null
    replan          {set, summary}: after running out of memory, what `--on-oom replan` goes on with; or null
    started_at, finished_at   UTC

A process that is killed leaves `running`; the launcher then writes `failed`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from memplan.budget.result import highest_by
from memplan.errors import RunError

SCHEMA_VERSION = 1
RECORD = "record.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class PhasePeak:
    """The highest moment of one phase of one step on one rank. `step` is 0 while loading."""

    phase: str
    step: int
    allocated_peak_bytes: int
    reserved_bytes: int | None = None
    """Peak of the caching allocator's segments; None on the CPU, which has none."""
    rank: int = 0


def highest_by_phase(peaks: Iterable[PhasePeak]) -> dict[str, PhasePeak]:
    """The worst step of each phase, in order of first appearance."""
    return highest_by(peaks, lambda peak: peak.phase)


class Record:
    """The fields of `record.json`; every `update` is on disk, whole, before it returns."""

    def __init__(self, folder: Path, fields: dict[str, Any], *, is_written: bool = True) -> None:
        self.path = folder / RECORD
        self.fields = fields
        self.is_written = is_written

    @classmethod
    def start(cls, folder: Path, job: dict[str, Any], *, is_written: bool = True) -> Record:
        """
        A new record of a run that has just begun, in place of the one before it; not `is_written`: in memory only.
        """
        record = cls(
            folder,
            {
                "schema_version": SCHEMA_VERSION,
                "job": job,
                "plan": None,
                "measured": {"phases": [], "peak": None},
                "versions": {},
                "device": None,
                "data": None,
                "outcome": "running",
                "error": None,
                "steps": {"first": None, "last": None, "max": job["train"]["max_steps"]},
                "loss": {"first": None, "last": None},
                "resumed_from": None,
                "replan": None,
                "started_at": _now(),
                "finished_at": None,
            },
            is_written=is_written,
        )
        record.update()
        return record

    @classmethod
    def read(cls, folder: Path) -> Record | None:
        """The record in a folder; None if there is none that can be read."""
        try:
            fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return cls(folder, fields) if isinstance(fields, dict) else None

    def update(self, **fields: Any) -> None:
        """Set fields and write the file."""
        self.fields.update(fields)
        if self.is_written:
            write_atomically(self.path, json.dumps(self.fields, indent=2) + "\n")

    def finish(self, outcome: str, error: str | None = None) -> None:
        """The run is over."""
        self.update(outcome=outcome, error=error, finished_at=_now())


class Metrics:
    """`metrics.jsonl`: a line per optimizer step, flushed as it is written."""

    def __init__(self, folder: Path, *, resumed_from: int) -> None:
        """Keep the lines of steps up to `resumed_from`; later ones will be done again."""
        self.path = path = folder / METRICS
        kept = (
            [line for line in read_metrics_lines(folder) if line["step"] <= resumed_from]
            if resumed_from
            else []
        )
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: dict[str, Any]) -> None:
        """
        Write one line.

        Raises:
            RunError: it cannot be written.
        """
        with _explained(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more lines will come."""
        self._file.close()


def read_metrics_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a last line that was cut off is left out."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def write_atomically(path: Path, text: str) -> None:
    """
    Put `text` at `path` so that a reader sees the old content or the new one, never a part.

    Raises:
        RunError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.new")
    with _explained(path):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"`{path}` cannot be written: {error.strerror}", hint="make room on the disk, or mend the folder"
        ) from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
