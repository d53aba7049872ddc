"""
The child process of `memplan train`: `python -m memplan.train.worker OUTPUT_DIR [--resume]`.

Turns how a run ends into what a person reads, an exit code, and the outcome in the record.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from memplan.cli.main import report_error
from memplan.errors import MemplanError
from memplan.train import report
from memplan.train.advice import free_capacity, retry_command, smallest_change
from memplan.train.launch import FINAL, JOB_FILE, read_job
from memplan.train.record import RECORD
from memplan.train.report import say
from memplan.train.run import Interrupted, Run
from memplan.train.tokens import first_line
from memplan.units import format_bytes

COMPLETED, OUT_OF_MEMORY = 0, 1
INTERNAL_ERROR = 70
"""EX_SOFTWARE of sysexits.h, as in the command line."""
TRACEBACK = "traceback.txt"

_OUT_OF_MEMORY_TEXTS = ("DefaultCPUAllocator", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says where memory runs out beside its CUDA allocator: a plain RuntimeError."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job in the folder that the arguments name."""
    folder, *flags = sys.argv[1:] if arguments is None else arguments
    if sys.platform == "linux":
        _follow_parent()
    return run_job(Path(folder), resume="--resume" in flags, dry_run="--dry-run" in flags)


def run_job(
    folder: Path,
    *,
    resume: bool = False,
    dry_run: bool = False,
    hook: Callable[[str, int], None] = lambda phase, step: None,
) -> int:
    """
    Train the job in `folder`/job.yaml and return the exit code: see `launch`.

    Args:
        hook: is told (phase, step) when a phase begins; tests fail a run from here.
    """
    began = time.perf_counter()
    stop = _Stop()
    try:
        job = read_job(folder / JOB_FILE)
        run = Run(folder, job, resume=resume, dry_run=dry_run, stop_signal=stop.at_step_boundary, hook=hook)
    except MemplanError as error:
        report_error(error.message, error.hint)
        return error.exit_code
    out_of_memory: str | None = None
    try:
        with stop:
            run.execute()
    except Interrupted as interrupted:
        return _interrupted(run, interrupted)
    except MemplanError as error:
        return _failed(run, error)
    except Exception as error:
        out_of_memory = _out_of_memory_words(error)
        if out_of_memory is None:
            return _broken(run, error)
    # Outside the except block: inside it the traceback still holds every tensor of the failed step.
    if out_of_memory is not None:
        return _explain_out_of_memory(run, out_of_memory)
    _finish(run, "completed")
    if not dry_run:
        for line in _closing_lines(run, time.perf_counter() - began):
            say(line)
    return COMPLETED


class _Stop:
    """
    Holds SIGINT and SIGTERM until the step at hand is done. Before the first step there is nothing to save,
    and a signal ends the run at once.
    """

    def __init__(self) -> None:
        self._signum: int | None = None
        self._training = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._before[signum] = signal.signal(signum, self._handle)

    def __exit__(self, *exc_info: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]

    def at_step_boundary(self) -> int | None:
        """The signal that arrived, if one did."""
        self._training = True
        return self._signum

    def _handle(self, signum: int, frame: object) -> None:
        self._signum = signum
        if not self._training:
            raise Interrupted(signum, 0)
        say("finishing this step and saving; once more to stop at once")


def _follow_parent() -> None:
    """Get SIGTERM when the launcher dies without a word, so that no run stays behind holding a GPU."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)


def _finish(run: Run, outcome: str, error: str | None = None) -> None:
    """Complete the record; how the run ended is said even where it cannot be written."""
    try:
        run.finish(outcome, error)
    except MemplanError as unwritten:
        say(f"note: {unwritten.message}")


def _interrupted(run: Run, interrupted: Interrupted) -> int:
    name = signal.Signals(interrupted.signum).name
    sentence = (
        f"interrupted by {name} after step {interrupted.step}"
        if interrupted.step
        else f"interrupted by {name}"
    )
    _finish(run, "interrupted", sentence)
    say(sentence)
    _say_how_to_continue(run)
    return 128 + interrupted.signum


def _failed(run: Run, error: MemplanError) -> int:
    _finish(run, "failed", error.message)
    report_error(error.message, error.hint)
    _say_how_to_continue(run)
    return error.exit_code


def _broken(run: Run, error: Exception) -> int:
    """
    A fault that we have no words for: its traceback goes into a file, and onto the screen only if asked for.
    """
    phase, step = run.phase
    sentence = f"{type(error).__name__} in {phase} of step {step}: {first_line(error)}"
    _finish(run, "failed", sentence)
    hint = "`MEMPLAN_DEBUG=1` shows the traceback"
    if os.environ.get("MEMPLAN_DEBUG") == "1":
        traceback.print_exc()
    elif not run.dry_run:
        path = run.folder / TRACEBACK
        with suppress(OSError):
            path.write_text(traceback.format_exc(), encoding="utf-8")
            hint = f"the traceback is in `{path}`"
    report_error(sentence, hint)
    _say_how_to_continue(run)
    return INTERNAL_ERROR


def _say_how_to_continue(run: Run) -> None:
    if run.saved_step is not None:
        say(f"\nthe last checkpoint is that of step {run.saved_step}; continue with `{run.resume_command}`")


def _out_of_memory_words(error: Exception) -> str | None:
    """What the allocator said, in a few words; None if the error is another one."""
    text = str(error)
    is_named = any(words in text for words in _OUT_OF_MEMORY_TEXTS)
    if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not is_named:
        return None
    size = re.search(r"[Tt]ried to allocate ([\d.]+) (\w+)", text)
    if size is None:
        return first_line(error)
    amount = format_bytes(int(size[1])) if size[2] == "bytes" else f"{size[1]} {size[2]}"
    return f"tried to allocate {amount} more"


def _explain_out_of_memory(run: Run, detail: str) -> int:
    phase, step = run.phase
    run.release()
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    capacity = free_capacity(run.device, run.plan)
    _finish(run, "out_of_memory", f"out of memory in {phase} of step {step}: {detail}")
    for line in report.out_of_memory_lines(run.plan, phase, step, detail, capacity):
        say(line)
    change = None
    if run.plan is not None and run.architecture is not None:
        change = smallest_change(run.job, run.architecture, run.plan, capacity, run.device.type)
    if change is None:
        say("\nhint: no change that leaves the model as it is makes this job fit; train fewer layers")
        _say_how_to_continue(run)
        return OUT_OF_MEMORY
    command = retry_command(run.folder, run.job, change, has_checkpoint=run.saved_step is not None)
    slower = f", a step taking {change.slowdown:.2f} times as long" if change.slowdown > 1 else ""
    say(f"\nhint: the smallest change that fits: {change.summary}")
    say(f"      needs {format_bytes(change.need_bytes)}{slower}:")
    say(f"      {command}")
    return OUT_OF_MEMORY


def _closing_lines(run: Run, seconds: float) -> list[str]:
    fields = run.record.fields
    loss, steps = fields["loss"], fields["steps"]
    longest, limit = fields["data"]["longest"], run.job.max_seq_len
    since = f" (from step {fields['resumed_from'] + 1})" if fields["resumed_from"] else ""
    lines = [f"completed {steps['last']} steps{since} in {seconds:.0f} s"]
    lines.append(f"loss {loss['first']:.4g} -> {loss['last']:.4g}")
    lines += ["", *report.comparison_lines(run.plan, run.peaks), ""]
    if longest < limit:
        lines.append(
            f"note: the longest sample has {longest} of {limit} tokens, so the run stays below its plan"
        )
    lines += [f"weights: {run.folder / FINAL}", f"record:  {run.folder / RECORD}"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
