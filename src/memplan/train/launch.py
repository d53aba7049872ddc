"""
`memplan train`: check what can be checked without torch, prepare the output folder, run the trainer in child
processes, one for each device of the job.

The trainer is a child because the allocator's settings must be in the environment before torch is imported. Where
torchrun, accelerate or srun has started one of us for each device, each has one child, and the first prepares the
folder.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from memplan.errors import RunError
from memplan.job.data_names import BUILT_IN_DATA, PATH_FIELDS, is_hub_dataset
from memplan.job.fields import field_value
from memplan.job.spec import Job
from memplan.train.checkpoint import has_checkpoint, published_step
from memplan.train.output_folder import CHECKPOINTS, FINAL, JOB_FILE, check_folder, write_job
from memplan.train.processes import Ending, Membership, Workers, membership
from memplan.train.record import Record
from memplan.train.refusals import check_trainable
from memplan.train.replan import run_and_replan
from memplan.train.report import resume_command
from memplan.train.speech import say
from memplan.train.tokens import model_path

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob

LOCK_FILE = ".lock"

_SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()
"""Files in the working directory must not stand in for libraries."""

_CHILD_DEFAULTS = {
    "KINETO_LOG_LEVEL": "99",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    # Threads that wait sleep instead of spinning: on cores that others use too, spinning doubles a step's time.
    "OMP_WAIT_POLICY": "PASSIVE",
}
"""Environment of the child, where the user has set nothing else: quiet libraries, threads that share cores."""


def launch(loaded: LoadedJob, *, resume: bool = False, dry_run: bool = False, replans: bool = False) -> int:
    """
    Train a job on this machine and return the exit code: 0 completed, 1 out of memory, 2 an error that was
    explained, 130 or 143 interrupted with a checkpoint saved.

    Args:
        loaded: the job; relative paths in it are resolved against its file.
        resume: continue from the newest checkpoint in `train.output_dir`.
        dry_run: do everything up to the first step, and write nothing.
        replans: after running out of memory, go on with the smallest change that learns the same, if there is one.

    Raises:
        RunError: this trainer cannot run the job, or the output folder holds another run.
        DataError: no training data is named, or it does not exist.
    """
    check_trainable(loaded)
    job = self_contained(loaded)
    member = membership(os.environ, job.world_size)
    if job.has_float16_adapters and (member is None or member.rank == 0):
        say(
            "warning: float16 adapters train without loss scaling, so that small gradients vanish; "
            "`--set lora.dtype=float32` keeps them"
        )
    folder = Path(job.train.output_dir)
    check_folder(folder, job, resume=resume)
    done = published_step(folder / FINAL) if resume else None
    if done is not None and done >= _num_steps(folder, job, done):
        if member is None or member.rank == 0:
            length = f"`train.max_steps` is {job.train.max_steps}"
            if job.train.epochs is not None:
                length = f"`train.epochs` is {job.train.epochs:g}"
            say(f"this run is complete: {done} steps are done, and {length}")
        return 0
    if dry_run or (member is not None and member.rank != 0):
        with TemporaryDirectory(prefix="memplan-") as scratch:
            write_job(Path(scratch) / JOB_FILE, job)
            return _run(Path(scratch), job, member, resume=resume, dry_run=dry_run)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the output folder `{folder}` cannot be made: {error.strerror}",
            hint="choose another one with `--set train.output_dir=...`",
        ) from error
    with _lock(folder) as lock:
        check_folder(folder, job, resume=resume)

        def run(job: Job, resume: bool) -> int:
            write_job(folder / JOB_FILE, job)
            return _run(folder, job, member, resume=resume, lock=lock)

        if not replans or member is not None:
            return run(job, resume)
        return run_and_replan(
            job, folder, run, resume=resume, has_checkpoint=lambda: has_checkpoint(folder / CHECKPOINTS)
        )


def _num_steps(folder: Path, job: Job, done: int) -> int:
    """Steps of the run in `folder`; where the job counts epochs, those of its record, or more than are done."""
    if job.train.epochs is None:
        return job.train.max_steps
    record = Record.read(folder)
    fields = record.fields if record is not None else {}
    if fields.get("job", {}).get("train", {}).get("epochs") != job.train.epochs:
        return done + 1
    return int(fields["steps"]["max"])


def self_contained(loaded: LoadedJob) -> Job:
    """
    The job with absolute paths, so that it means the same wherever its copy lies. `output_dir` is under the
    working directory.
    """
    job = loaded.job
    changes: dict[str, Any] = {"train.output_dir": str(Path(job.train.output_dir).expanduser().absolute())}
    for name in PATH_FIELDS:
        source = field_value(job, name)
        if source in (None, BUILT_IN_DATA) or is_hub_dataset(source, loaded.resolve_path(source)):
            continue
        changes[name] = str(loaded.resolve_path(source).absolute())
    local = model_path(job.model, loaded.base_dir)
    if local is not None:
        changes["model"] = str(local.absolute())
    return job.replace(**changes)


def _environment(job: Job) -> dict[str, str]:
    """What the child needs beyond our own environment: allocator settings and `_CHILD_DEFAULTS`."""
    from memplan.preflight.environment import allocator_environment, current_platform, installed_torch_version

    allocator = allocator_environment(job, installed_torch_version(), current_platform(), os.environ)
    for note in allocator.notes:
        say(f"note: {note}")
    return allocator.variables | {
        name: value for name, value in _CHILD_DEFAULTS.items() if name not in os.environ
    }


@contextmanager
def _lock(folder: Path) -> Iterator[int | None]:
    """
    Hold the folder for this process and its child, so that two runs never write into it at once.

    Raises:
        RunError: another run holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield None
        return
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is writing into `{folder}`",
                hint="wait for it, or use `--set train.output_dir=...`",
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)


def _run(
    folder: Path,
    job: Job,
    member: Membership | None,
    *,
    resume: bool,
    dry_run: bool = False,
    lock: int | None = None,
) -> int:
    """Run the children, or the one child that is a member of a group, and return the exit code."""
    command = [sys.executable, *_SAFE_PATH, "-m", "memplan.train.worker", str(folder)]
    command += ["--resume"] * resume + ["--dry-run"] * dry_run
    workers = Workers(
        command,
        {**os.environ, **_environment(job), **(member.variables if member else {})},
        count=job.world_size if member is None else 1,
        keep_open=() if lock is None else (lock,),
    )
    ending = workers.wait()
    if ending.killed is not None:
        _explain_death(ending, folder, job, member)
    return ending.code


def _explain_death(ending: Ending, folder: Path, job: Job, member: Membership | None) -> None:
    """A child was killed and could not say anything itself."""
    assert ending.killed is not None
    rank, signum = ending.killed
    who = "the training process"
    if job.world_size > 1:
        who = f"the training process of rank {rank if member is None else member.rank}"
    sentence = f"{who} was killed by {signal.Signals(signum).name}"
    if ending.stopped is not None:
        sentence = f"stopped at once by {signal.Signals(ending.stopped).name}, without saving"
    elif signum == signal.SIGKILL:
        sentence += "; the system does that to a process that takes more RAM than there is"
    elif signum == signal.SIGILL:
        sentence += (
            "; some virtual machines announce AMX and do not have it, which bfloat16 on their CPU runs into"
        )
    record = Record.read(folder)
    if record is not None and record.fields.get("outcome") == "running":
        record.finish("interrupted" if ending.stopped is not None else "failed", sentence)
    say(f"error: {sentence}")
    if ending.stopped is None and signum == signal.SIGILL:
        say("\nhint: set `ONEDNN_MAX_CPU_ISA=AVX2` in the environment, or use `--set dtype=float32`")
    output = Path(job.train.output_dir)
    if has_checkpoint(output / CHECKPOINTS):
        say(f"\nhint: continue from the last checkpoint with `{resume_command(output)}`")
