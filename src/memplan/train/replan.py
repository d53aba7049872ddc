"""`--on-oom replan`: after running out of memory, on from the last state with a change that learns the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memplan.job.spec import Job
from memplan.train.record import Record
from memplan.train.speech import say

OUT_OF_MEMORY = 1
"""Exit code of a run that ended so."""
MAX_REPLANS = 3
HIGHEST_TIER = 1
"""Changes up to this tier are free or cost time; the others change what is learned."""


def run_and_replan(
    job: Job,
    folder: Path,
    run: Callable[[Job, bool], int],
    *,
    resume: bool,
    has_checkpoint: Callable[[], bool],
) -> int:
    """
    Run a job; while it runs out of memory and its record names a change, run the changed one in its place.

    Args:
        folder: where the record is.
        run: (job, resume) to an exit code, each time in fresh processes.
        resume: of the first run.
        has_checkpoint: whether there is something to continue from; else the run starts again from step 1.
    """
    code = run(job, resume)
    for _ in range(MAX_REPLANS):
        change = _proposed_change(folder) if code == OUT_OF_MEMORY else None
        if change is None:
            return code
        job = job.replace(**{name: _value(value) for name, value in change["set"].items()})
        continues = has_checkpoint()
        since = "from the last checkpoint" if continues else "from step 1"
        say(
            f"\nreplanned: {change['summary']}; the global batch and the order of the data stay; going on {since}"
        )
        code = run(job, continues)
    return code


def _proposed_change(folder: Path) -> Mapping[str, Any] | None:
    record = Record.read(folder)
    if record is None or record.fields.get("outcome") != "out_of_memory":
        return None
    change: Mapping[str, Any] | None = record.fields.get("replan")
    return change


def _value(value: Any) -> Any:
    """Lists of the record are tuples of a job."""
    return tuple(value) if isinstance(value, list) else value
