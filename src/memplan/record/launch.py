"""
`memplan record`: the job's record begun, a measuring process started under the job's allocator settings, its
time limited, and the record completed with what was predicted.

Importing this module does not import torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError
from memplan.job.spec import Job
from memplan.model import resolve_config
from memplan.preflight.environment import (
    VARIABLES,
    allocator_environment,
    current_platform,
    installed_torch_version,
)
from memplan.record.analyse import Prediction, compare, predict
from memplan.record.file import COMPLETED, OUT_OF_MEMORY, RUNNING, RecordError, RecordFile
from memplan.units import MiB

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob

TIME_LIMIT_SECONDS = 600
_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()
_CHILD_VARIABLES = {
    "KINETO_LOG_LEVEL": "99", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error",
    "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
_LAST_WORDS = 2000
"""Characters of standard error that a process leaves when it dies without a word in the record."""
_MAX_TRIES = 8


def begin_record(
    loaded: LoadedJob, path: Path, *, steps: int, model_config: dict[str, Any] | None = None
) -> RecordFile:
    """
    The record of a job, ready to be measured.

    Args:
        model_config: the model's config.json where it is not the one that the job's name leads to.

    Raises:
        ModelError: the model's config cannot be found.
        RecordError: torch is missing, `steps` is not positive, or the checkpoint is stored quantised.
    """
    if steps < 1:
        raise RecordError(f"`--steps` is {steps}, and at least one step has to run", hint="use `--steps 3`")
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise RecordError(
            f"recording needs {' and '.join(f'`{name}`' for name in missing)}, not installed here",
            hint='pip install "memplan[train]"',
        )
    if model_config is None:
        model_config = resolve_config(loaded.job.model, base_dir=loaded.base_dir).config
    if model_config.get("quantization_config") or loaded.job.has_gptq_base:
        raise RecordError(
            f"the weights of `{loaded.job.model}` are stored quantised, and recordings draw plain numbers",
            hint="name the checkpoint it was made from, with `method: qlora` to store the base in 4 bits",
        )
    job = loaded.job.replace(weights="random")
    return RecordFile.create(path, dataclasses.asdict(job), model_config, steps=steps)


def record_job(
    loaded: LoadedJob,
    path: Path,
    *,
    steps: int,
    limits: bool = False,
    trace: bool = True,
    time_limit_seconds: float = TIME_LIMIT_SECONDS,
) -> RecordFile:
    """
    Measure a job in a process of its own and return the complete record; raises as `begin_record` does.
    """
    record = begin_record(loaded, path, steps=steps)
    record = Measurement(record, trace=trace).finish(time_limit_seconds)
    try:
        if limits:
            find_limits(record, time_limit_seconds=time_limit_seconds)
    finally:
        add_prediction(record, engine="auto")
    return record


class Measurement:
    """
    A measuring process for one record, started at once.

    Args:
        limit_bytes: the most that torch's allocator may reserve.
        trace: record every event.
        wait: import the libraries and wait for `go`, so that the next job is ready when one ends.
    """

    def __init__(
        self, record: RecordFile, *, limit_bytes: int | None = None, trace: bool = True, wait: bool = False
    ) -> None:
        self.record = record
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
        command = [sys.executable, *_SAFE_PATH, "-m", "memplan.record.worker", str(record.path)]
        command += ["--limit", str(limit_bytes)] if limit_bytes is not None else []
        command += [] if trace else ["--no-trace"]
        command += ["--wait"] if wait else []
        self._process = subprocess.Popen(
            command,
            env=child_environment(record.job),
            stdin=subprocess.PIPE if wait else subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )

    def go(self) -> None:
        """Let a process that waits begin."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.write(b"go\n")
                self._process.stdin.close()
        except BrokenPipeError:
            pass  # it died while it waited; `finish` says so

    def discard(self) -> None:
        """End a process that is not needed any more; its record, which says nothing yet, goes too."""
        self._kill()
        self._close()
        self.record.path.unlink(missing_ok=True)

    def finish(self, time_limit_seconds: float) -> RecordFile:
        """
        Wait for the process and return the record as it left it, with an outcome in any case. An interrupt
        ends the process.
        """
        outcome = None
        try:
            self._process.wait(timeout=time_limit_seconds)
        except subprocess.TimeoutExpired:
            outcome = "time_limit"
        except BaseException:
            self._kill()
            self._complete("interrupted", "interrupted")
            self._close()
            raise
        self._kill()
        if outcome == "time_limit":
            record = self._complete(outcome, f"not done after {time_limit_seconds:.0f} s")
        else:
            record = self._complete("killed", self._last_words())
        self._close()
        return record

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _complete(self, outcome: str, error: str) -> RecordFile:
        """The record from the disk; one that still says `running` gets the outcome."""
        record = RecordFile.read(self.record.path)
        if record.fields["outcome"] == RUNNING:
            record.update(outcome=outcome, error=error)
        return record

    def _last_words(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().decode("utf-8", errors="replace").strip()
        code = self._process.returncode
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        words = without_folders(text[-_LAST_WORDS:])
        return f"the process {how}" + (f": {words}" if words else "")

    def _close(self) -> None:
        self._errors.close()
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()


def without_folders(text: str) -> str:
    """
    Absolute paths cut down to file names: records travel.

    >>> without_folders('File "/usr/lib/python3/abc.py", line 1')
    'File "abc.py", line 1'
    """
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:\"']+/)+", "", text)


def child_environment(job: Job) -> dict[str, str]:
    """Ours, with the job's allocator settings in place of any that are set."""
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    allocator = allocator_environment(job, installed_torch_version(), current_platform())
    return {**_CHILD_VARIABLES, **inherited, **allocator.variables}


def add_prediction(record: RecordFile, engine: str = "shape") -> Prediction | None:
    """Put what memplan says today beside what was measured; where it can say nothing, the record says why."""
    try:
        prediction = predict(record, engine)
    except MemplanError as error:
        record.update(plan=None, plan_error=error.message, comparison=[])
        return None
    phases = [
        {
            "phase": phase,
            "step": step,
            "allocated_peak_bytes": peaks.allocated_bytes,
            "reserved_peak_bytes": peaks.reserved_bytes,
        }
        for (phase, step), peaks in prediction.phases.items()
    ]
    plan = {
        "engine": prediction.engine,
        "need_bytes": prediction.need_bytes,
        "outside_bytes": prediction.outside_bytes,
        "phases": phases,
    }
    lines = [line.to_json() for line in compare(record, prediction)]
    record.update(plan=plan, plan_error=None, comparison=lines)
    return prediction


def find_limits(
    record: RecordFile,
    *,
    time_limit_seconds: float,
    completes: Callable[[RecordFile, int, float], bool] | None = None,
) -> None:
    """
    Find the smallest limit under which the job completes, each try in a fresh process, between the bytes that
    were allocated and those that were reserved at the peaks. Every try is in the record before the next.

    Raises:
        RecordError: the job did not complete without a limit, or its device has no allocator to limit.
    """
    steps = [phase for phase in record.fields["phases"] if phase["reserved_peak_bytes"]]
    if record.fields["outcome"] != COMPLETED or not steps:
        raise RecordError("`--limits` needs a CUDA GPU and a job that completes without a limit")
    low = max(phase["allocated_peak_bytes"] for phase in steps)
    high = max(phase["reserved_peak_bytes"] for phase in steps)
    tries: list[dict[str, Any]] = []
    found = {"tries": tries, "smallest_bytes": high, "largest_failed_bytes": None}
    step = max(2 * MiB, high // 400 // (2 * MiB) * 2 * MiB)
    run_limited = completes or _completes
    ends_at = time.monotonic() + time_limit_seconds
    while high - low > step and len(tries) < _MAX_TRIES and time.monotonic() < ends_at:
        middle = (low + high) // 2 // (2 * MiB) * 2 * MiB
        completed = run_limited(record, middle, ends_at - time.monotonic())
        tries.append({"limit_bytes": middle, "completed": completed})
        if completed:
            high = found["smallest_bytes"] = middle
        else:
            low = found["largest_failed_bytes"] = middle
        record.update(limits=found)
    record.update(limits=found)


def _completes(record: RecordFile, limit_bytes: int, seconds: float) -> bool:
    """Whether the job completes under a limit; raises RecordError where that cannot be told."""
    with tempfile.TemporaryDirectory(prefix="memplan-") as folder:
        fields = record.fields
        limited = RecordFile.create(
            Path(folder) / "record.json", fields["job"], fields["model_config"], steps=fields["steps"]
        )
        limited = Measurement(limited, limit_bytes=limit_bytes, trace=False).finish(seconds)
    outcome = limited.fields["outcome"]
    if outcome not in (COMPLETED, OUT_OF_MEMORY):
        raise RecordError(f"a run under a limit ended as `{outcome}`: {limited.fields['error']}")
    return bool(outcome == COMPLETED)
