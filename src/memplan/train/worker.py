"""
The child process of `memplan train`: `python -m memplan.train.worker OUTPUT_DIR [--resume]`; one of several, if the
environment says so.

Turns how a run ends into what a person reads, an exit code, and the outcome in the record. Of several processes the
first one speaks, until one fails: then the first one that does.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from memplan.budget.result import Change
from memplan.errors import MemplanError, report_error
from memplan.store import fingerprint, remember_run, store_path
from memplan.train import report
from memplan.train.advice import free_capacity, retry_command, smallest_change
from memplan.train.group import end_process, is_lost_peer, join
from memplan.train.kernels import attention_kernel
from memplan.train.metrics import npt_table
from memplan.train.output_folder import FINAL, JOB_FILE, different_fields, read_job
from memplan.train.parallel import is_sharded
from memplan.train.processes import LOST_PEER, STORE_DESCRIPTOR
from memplan.train.record import RECORD, Record, read_metrics_lines
from memplan.train.replan import HIGHEST_TIER
from memplan.train.run import Interrupted, Run
from memplan.train.speech import say, speak
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
    run: Run | None = None
    out_of_memory: str | None = None
    try:
        with stop:
            job = read_job(folder / JOB_FILE)
            group = join(needs_group=is_sharded(job))
            if not group.is_first:
                _be_quiet()
            run = Run(
                folder,
                job,
                resume=resume,
                dry_run=dry_run,
                stop_signal=stop.at_step_boundary,
                hook=hook,
                group=group,
            )
            with attention_kernel(job.attention_kernel):
                run.execute()
    except Interrupted as interrupted:
        # After a step all ranks have agreed to stop; before the first, each stops by itself.
        return _interrupted(run, interrupted, together=interrupted.step > 0)
    except MemplanError as error:
        if run is None:
            return _not_begun(error)
        return _explained(run, error.exit_code, partial(_say_failed, run, error))
    except Exception as error:
        if run is None:
            raise
        if run.group.world_size > 1 and is_lost_peer(error):
            return _left_alone(run, stop.received)
        out_of_memory = out_of_memory_words(error)
        if out_of_memory is None:
            return _explained(run, INTERNAL_ERROR, partial(_say_broken, run, error))
    # Outside the except block: inside it the traceback still holds every tensor of the failed step.
    if out_of_memory is not None:
        run.release()
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        return _explained(run, OUT_OF_MEMORY, partial(_say_out_of_memory, run, out_of_memory))
    assert run is not None
    if run.group.is_first:
        _finish(run, "completed")
    if run.group.is_first and not dry_run:
        if run.architecture is not None:
            key = fingerprint(run.job, run.architecture)
            remember_run(store_path(os.environ), run.record.fields, key)
        for line in _closing_lines(run, time.perf_counter() - began):
            say(line)
    run.group.leave()
    return COMPLETED


def _be_quiet() -> None:
    """Of several processes one speaks: what libraries say in the others it has said as well."""
    speak(prefix=None)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _takes_the_word(run: Run) -> bool:
    """Whether this process is the one to explain the end of the run; it is heard from now on if it is."""
    group = run.group
    run.stop_measuring()
    if not group.is_first_to_fail():
        return False
    speak(prefix="" if group.is_first else f"rank {group.rank}: ")
    return True


def _left_alone(run: Run, signum: int | None) -> int:
    """
    Another process is gone. If it could, it has said why; where we were started together, the launcher sees how it
    ended, and says it.
    """
    run.stop_measuring()
    if signum is not None:
        return _interrupted(run, Interrupted(signum, run.saved_step or 0))
    if STORE_DESCRIPTOR not in os.environ and _takes_the_word(run):
        phase, step = run.phase
        sentence = f"another process of this run ended; rank {run.group.rank} was in {phase} of step {step}"
        _finish(run, "failed", sentence)
        report_error(sentence, None)
        _say_how_to_continue(run)
    return LOST_PEER


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

    @property
    def received(self) -> int | None:
        """The signal that arrived, if one did."""
        return self._signum

    def at_step_boundary(self) -> int | None:
        """The signal that arrived, if one did; from the first time this is asked, a signal waits to be asked about."""
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


def _interrupted(run: Run | None, interrupted: Interrupted, *, together: bool = False) -> int:
    """
    Args:
        together: all ranks are here, so that each can wait until the first has said everything: the launcher ends
            those that stay when one has gone.
    """
    code = 128 + interrupted.signum
    if run is None:
        return code
    run.stop_measuring()
    if not run.group.is_first:
        if together:
            run.group.leave()
        return code
    name = signal.Signals(interrupted.signum).name
    sentence = (
        f"interrupted by {name} after step {interrupted.step}"
        if interrupted.step
        else f"interrupted by {name}"
    )
    _finish(run, "interrupted", sentence)
    say(sentence)
    _say_how_to_continue(run)
    if together:
        run.group.leave()
    return code


def _not_begun(error: MemplanError) -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        report_error(error.message, error.hint)
    return error.exit_code


def _explained(run: Run, code: int, explain: Callable[[], None]) -> int:
    """
    The exit code of a run that has failed. Of all processes that fail one explains why, and the others let it: finding
    a change that fits takes longer than the launcher waits once one has gone.
    """
    if _takes_the_word(run):
        explain()
        run.group.has_explained()
    else:
        run.group.await_explanation()
    return code


def _say_failed(run: Run, error: MemplanError) -> None:
    _finish(run, "failed", error.message)
    report_error(error.message, error.hint)
    _say_how_to_continue(run)


def _say_broken(run: Run, error: Exception) -> None:
    """
    A fault that we have no words for: its traceback goes into a file, and onto the screen only if asked for.
    """
    phase, step = run.phase
    where = "" if run.group.is_first else f"rank {run.group.rank}: "
    sentence = f"{where}{type(error).__name__} in {phase} of step {step}: {first_line(error)}"
    _finish(run, "failed", sentence)
    hint = "`MEMPLAN_DEBUG=1` shows the traceback"
    if os.environ.get("MEMPLAN_DEBUG") == "1":
        traceback.print_exc()
    elif not run.dry_run:
        path = Path(run.job.train.output_dir) / TRACEBACK
        with suppress(OSError):
            path.write_text(traceback.format_exc(), encoding="utf-8")
            hint = f"the traceback is in `{path}`"
    report_error(sentence, hint)
    _say_how_to_continue(run)


def _say_how_to_continue(run: Run) -> None:
    if run.saved_step is not None:
        say(f"\nthe last checkpoint is that of step {run.saved_step}; continue with `{run.resume_command}`")


def out_of_memory_words(error: Exception) -> str | None:
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


def _say_out_of_memory(run: Run, detail: str) -> None:
    """What was planned, what is free now that the run has let go of its own, and the smallest change that fits."""
    phase, step = run.phase
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
        return
    if change.tier <= HIGHEST_TIER and not different_fields(run.job, run.job.replace(**change.set)):
        _propose(run, change)
    command = retry_command(
        Path(run.job.train.output_dir), run.job, change, has_checkpoint=run.saved_step is not None
    )
    slower = f", a step taking {change.slowdown:.2f} times as long" if change.slowdown > 1 else ""
    say(f"\nhint: the smallest change that fits: {change.summary}")
    say(f"      needs {format_bytes(change.need_bytes)}{slower}:")
    say(f"      {command}")


def _propose(run: Run, change: Change) -> None:
    """Leave the change in the record, for a launcher that was asked to go on with it."""
    record = Record.read(Path(run.job.train.output_dir))
    if record is not None:
        with suppress(MemplanError):
            record.update(replan={"set": change.set, "summary": change.summary})


def _closing_lines(run: Run, seconds: float) -> list[str]:
    fields = run.record.fields
    loss, steps = fields["loss"], fields["steps"]
    longest, limit = fields["data"]["longest"], run.job.max_seq_len
    since = f" (from step {fields['resumed_from'] + 1})" if fields["resumed_from"] else ""
    lines = [f"completed {steps['last']} steps{since} in {seconds:.0f} s"]
    lines.append(f"loss {loss['first']:.4g} -> {loss['last']:.4g}")
    table = npt_table(read_metrics_lines(run.folder))
    lines += ["", *table] if table else []
    lines += ["", *report.comparison_lines(run.plan, run.peaks), ""]
    if longest < limit:
        lines.append(
            f"note: the longest sample has {longest} of {limit} tokens, so the run stays below its plan"
        )
    lines += [f"weights: {run.folder / FINAL}", f"record:  {run.folder / RECORD}"]
    return lines


if __name__ == "__main__":
    end_process(main())
