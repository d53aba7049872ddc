"""
A run as its folder shows it, to somebody who only looks: running, finished, failed, or killed without a word.

Reads files and takes no lock that a run would wait for. Whatever is half written, missing or damaged is left out.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import RunError
from memplan.train.history import EvaluationHistory
from memplan.train.record import METRICS, RECORD, PhasePeak, highest_by_phase

TAIL_BYTES = 256 << 10
"""Of `metrics.jsonl`, this much of its end is read; a line takes about 200 bytes."""
SPEED_LINES = 50
"""Steps that the speed is an average over."""
_STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunView:
    """What there is to see of a run."""

    folder: Path
    state: str
    """`starting`, `running`, `completed`, `interrupted`, `out_of_memory`, `failed`, or `killed`: nobody writes here."""
    record: dict[str, Any]
    lines: tuple[dict[str, Any], ...]
    """The newest lines of `metrics.jsonl`, oldest first."""
    checkpoints: tuple[int, ...]
    """Steps of the checkpoints, without looking into them."""
    has_final: bool

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.state not in ("starting", "running")

    @property
    def last_step(self) -> int | None:
        """The last step done; None before the first."""
        return self.lines[-1]["step"] if self.lines else None

    @property
    def max_steps(self) -> int | None:
        """Steps that the job asks for."""
        steps = self.record.get("steps")
        return steps.get("max") if isinstance(steps, dict) else None

    @property
    def tokens_per_s(self) -> float | None:
        """Over the newest steps: their tokens by the time that the steps themselves took."""
        seconds = self._seconds()
        return sum(line["tokens"] for line in self.lines[-SPEED_LINES:]) / seconds if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the speed of the newest ones; without saving and evaluating."""
        seconds, last, most = self._seconds(), self.last_step, self.max_steps
        if not seconds or last is None or most is None or self.is_over:
            return None
        return max(0, most - last) * seconds / len(self.lines[-SPEED_LINES:])

    def _seconds(self) -> float:
        recent = self.lines[-SPEED_LINES:]
        return sum(line["tokens"] / line["tokens_per_s"] for line in recent if line["tokens_per_s"])

    @property
    def evaluations(self) -> EvaluationHistory:
        """Evaluations among the newest lines."""
        return EvaluationHistory.from_metrics(self.lines)

    def planned_bytes(self) -> dict[str, int]:
        """Planned peak of each phase, that of its worst step."""
        plan = self.record.get("plan")
        peaks: dict[str, int] = {}
        for line in plan.get("phases", ()) if isinstance(plan, dict) else ():
            peaks[line["phase"]] = max(peaks.get(line["phase"], 0), line["allocated_peak_bytes"])
        return peaks

    def measured_bytes(self) -> dict[str, int]:
        """Measured peak of each phase, of its worst step and rank; empty until the run has measured."""
        measured = self.record.get("measured")
        phases = measured.get("phases", ()) if isinstance(measured, dict) else ()
        highest = highest_by_phase(PhasePeak(**line) for line in phases)
        return {phase: peak.allocated_peak_bytes for phase, peak in highest.items()}


def view_run(folder: Path) -> RunView:
    """
    The run in a folder.

    Raises:
        RunError: there is none.
    """
    record = _read_record(folder)
    if record is None and not (folder / "job.yaml").is_file():
        what = "is no folder" if not folder.is_dir() else "holds no run"
        raise RunError(f"`{folder}` {what}", hint="name the `train.output_dir` of a run")
    state = str((record or {}).get("outcome", "starting"))
    if record is None or state == "running":
        alive = is_held(folder)
        state = ("starting" if record is None else "running") if alive is not False else "killed"
    return RunView(
        folder,
        state,
        record or {},
        tuple(read_tail(folder / METRICS)),
        tuple(_checkpoint_steps(folder / "checkpoints")),
        (folder / "final").is_dir(),
    )


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return fields if isinstance(fields, dict) else None


def read_tail(path: Path, num_bytes: int = TAIL_BYTES) -> list[dict[str, Any]]:
    """The whole lines in the last `num_bytes` of a JSONL file of metrics; damaged ones are left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - num_bytes))
            text = file.read()
    except OSError:
        return []
    lines = text.split(b"\n")[:-1]  # what stands behind the last line's end is half written
    if size > num_bytes:
        lines = lines[1:]
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"step", "loss", "tokens", "tokens_per_s"} <= set(value):
            found.append(value)
    return found


def is_held(folder: Path) -> bool | None:
    """Whether a process holds the folder's lock; None where that cannot be told."""
    try:
        import fcntl

        with (folder / ".lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return None
    return False


def _checkpoint_steps(root: Path) -> list[int]:
    try:
        names = [path.name for path in root.iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for name in names if (match := _STEP_FOLDER.fullmatch(name)))
