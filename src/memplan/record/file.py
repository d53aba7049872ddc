"""
The record: one JSON object, rewritten whole at every change of state, so that nothing measured is lost.

    schema_version  1
    job             as resolved, but for `weights`, which are random
    model_config    the model's config.json; with it the record needs no other file
    steps           optimizer steps asked for
    outcome         running | completed | out_of_memory | missing_library | refused | failed | killed | time_limit
    error           a sentence; null if completed. traceback: its last lines, files without folders
    phase           [phase, step] at which it ended
    versions        of memplan, python, torch, CUDA, cuDNN, driver and libraries; null: not installed
    environment     allocator variables as the process saw them
    device          type (cuda | cpu), name, and for CUDA compute capability, bytes, multiprocessors
    process         device bytes used before and after the context, and at the end
    phases          in order: peaks and ends of allocated, requested and reserved bytes
    statistics      the allocator's own, at the end
    segments        at the end: [bytes, allocated bytes, stream, "large" or "small", expandable]
    trace           every allocation and free (memplan.record.compact), or null; trace_error says why
    limits          with `--limits`: the tries under a limit, and the smallest capacity that completed
    plan            the estimate for the same device, or null; plan_error says why
    comparison      statistic by statistic: predicted and measured bytes, error = predicted / measured - 1
"""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from memplan.errors import MemplanError
from memplan.job.fields import job_sections
from memplan.job.spec import Job
from memplan.train.record import write_atomically

SCHEMA_VERSION = 1
RUNNING, COMPLETED, OUT_OF_MEMORY = "running", "completed", "out_of_memory"


class RecordError(MemplanError):
    """A record cannot be made or read."""


class RecordFile:
    """The fields of a record; every `update` is on disk, whole, before it returns."""

    def __init__(self, path: Path, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    @classmethod
    def create(
        cls, path: Path, job: dict[str, Any], model_config: dict[str, Any], *, steps: int
    ) -> RecordFile:
        """A record of a measurement that is about to begin, in place of what is at `path`."""
        record = cls(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "created_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "job": job,
                "model_config": model_config,
                "steps": steps,
                "outcome": RUNNING,
                "error": None,
                "traceback": None,
                "phase": None,
                "versions": {},
                "environment": {},
                "device": None,
                "process": {},
                "phases": [],
                "statistics": {},
                "segments": [],
                "trace": None,
                "trace_error": None,
                "limits": None,
                "plan": None,
                "plan_error": None,
                "comparison": [],
            },
        )
        record.update()
        return record

    @classmethod
    def read(cls, path: Path) -> RecordFile:
        """
        The record at a path.

        Raises:
            RecordError: there is none, or one of another version.
        """
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RecordError(f"`{path}` is not a record: {error}") from error
        if not isinstance(fields, dict) or fields.get("schema_version") != SCHEMA_VERSION:
            raise RecordError(
                f"`{path}` is not a record of schema version {SCHEMA_VERSION}",
                hint="make it again with `memplan record`",
            )
        return cls(path, fields)

    def update(self, **fields: Any) -> None:
        """Set fields and write the file."""
        self.fields.update(fields)
        write_atomically(self.path, json.dumps(self.fields, indent=1) + "\n")

    @property
    def job(self) -> Job:
        """The job as it was recorded."""
        return job_of(self.fields["job"])

    @property
    def is_finished(self) -> bool:
        """Whether it says how the measurement ended."""
        return bool(self.fields["outcome"] != RUNNING)


def job_of(fields: dict[str, Any]) -> Job:
    """
    A job from its fields, nested as `dataclasses.asdict` gives them. What it asks for is not checked again: a record
    may be of a job that only measurements want, such as sharding over one rank.
    """
    sections = job_sections()
    values = {
        name: sections[name](**_known(value, sections[name])) if name in sections else value
        for name, value in _known(fields, Job).items()
    }
    return Job(**values)


def _known(fields: dict[str, Any], cls: type) -> dict[str, Any]:
    """The fields that this version has; lists as tuples."""
    names = {field.name for field in dataclasses.fields(cls)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in fields.items()
        if name in names
    }
