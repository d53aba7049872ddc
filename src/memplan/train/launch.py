"""
`memplan train`: check what can be checked without torch, prepare the output folder, run the trainer in a
child process.

The trainer is a child because the allocator's settings must be in the environment before torch is imported.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from memplan.errors import DataError, MemplanError, RunError
from memplan.job.fields import job_fields
from memplan.job.load import BUILT_IN_DATA
from memplan.job.spec import Job
from memplan.train.checkpoint import has_checkpoint, published_step
from memplan.train.record import Record
from memplan.train.report import resume_command, say
from memplan.train.tokens import model_path

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob

JOB_FILE = "job.yaml"
CHECKPOINTS = "checkpoints"
FINAL = "final"
LOCK_FILE = ".lock"

TORCH_OPTIMIZERS = ("adamw", "sgd", "adafactor")
"""torch's own; the others are those of bitsandbytes."""

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

INSTALL = 'pip install "memplan[train]"'

MAY_CHANGE = (
    "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "activation_offload",
    "attention", "loss", "optimizer_kernel", "npt.form", "loop", "gpu", "margin", "data.eval",
    "train.max_steps", "train.save_every", "train.output_dir", "allocator.", "offload.", "load.", "parallel.",
)  # fmt: skip
"""Fields that a resumed run may change: they decide memory, speed or length, not what is learned."""


def launch(loaded: LoadedJob, *, resume: bool = False, dry_run: bool = False) -> int:
    """
    Train a job on this machine and return the exit code: 0 completed, 1 out of memory, 2 an error that was
    explained, 130 or 143 interrupted with a checkpoint saved.

    Args:
        loaded: the job; relative paths in it are resolved against its file.
        resume: continue from the newest checkpoint in `train.output_dir`.
        dry_run: do everything up to the first step, and write nothing.

    Raises:
        RunError: this trainer cannot run the job, or the output folder holds another run.
        DataError: no training data is named, or it does not exist.
    """
    check_trainable(loaded)
    job = self_contained(loaded)
    folder = Path(job.train.output_dir)
    check_folder(folder, job, resume=resume)
    done = published_step(folder / FINAL) if resume else None
    if done is not None and done >= job.train.max_steps:
        say(f"this run is complete: {done} steps are done, and `train.max_steps` is {job.train.max_steps}")
        return 0
    if dry_run:
        with TemporaryDirectory(prefix="memplan-") as scratch:
            write_job(Path(scratch) / JOB_FILE, job)
            return _run(Path(scratch), job, resume=resume, dry_run=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the output folder `{folder}` cannot be made: {error.strerror}",
            hint="choose another one with `--set train.output_dir=...`",
        ) from error
    with _lock(folder) as lock:
        check_folder(folder, job, resume=resume)
        write_job(folder / JOB_FILE, job)
        return _run(folder, job, resume=resume, lock=lock)


def check_trainable(loaded: LoadedJob) -> None:
    """
    Refuse what this trainer cannot do, before anything is loaded or written.

    Raises:
        RunError, DataError: with the field and what to set instead.
    """
    job = loaded.job
    refuse_untrainable(job)
    _check_packages(job)
    if job.data.train is None:
        raise DataError(
            "the job names no training data", hint=f"set it, e.g. `--set data.train={BUILT_IN_DATA}`"
        )
    for source in (job.data.train, job.data.eval):
        if source not in (None, BUILT_IN_DATA) and not loaded.resolve_path(source).exists():
            raise DataError(
                f"the data `{source}` does not exist ({loaded.resolve_path(source)})",
                hint="check `data.train` and `data.eval`",
            )


def refuse_untrainable(job: Job) -> None:
    """
    Refuse jobs that can be planned but not trained here.

    Raises:
        RunError: with the field and what to set instead.
    """
    trained_dtype = {"full": job.dtype, "lora": job.lora.dtype}.get(job.method)
    refusals: list[tuple[bool, str, str]] = [
        (
            job.method == "qlora",
            "`method: qlora` can be planned but not trained yet",
            "use `--set method=lora`",
        ),
        (
            job.world_size > 1,
            f"this job needs {job.world_size} GPUs, and training runs on one device",
            "set `parallel.dp_shard` and `parallel.dp_replicate` to 1; `memplan fit` says what makes it fit",
        ),
        (
            job.offload.params or job.offload.optimizer,
            "`offload` can be planned but not trained yet",
            "use `--set offload.params=false --set offload.optimizer=false`",
        ),
        (
            job.activation_offload,
            "`activation_offload` can be planned but not trained yet",
            "use `--set activation_offload=false --set activation_checkpointing=full`",
        ),
        (
            "float16" in (job.autocast, trained_dtype),
            "training in float16 needs loss scaling, which this trainer does not do",
            "use bfloat16, which needs none",
        ),
    ]
    for refused, message, hint in refusals:
        if refused:
            raise RunError(message, hint=hint)


def check_device(job: Job, device_type: str) -> None:
    """
    Refuse what needs a CUDA GPU where there is none.

    Raises:
        RunError: with the field and what to set instead.
    """
    if device_type == "cuda":
        return
    needs_cuda = [
        (job.optimizer not in TORCH_OPTIMIZERS, f"`optimizer: {job.optimizer}`", "optimizer=adamw"),
        (job.loss == "fused" and job.method != "npt", "`loss: fused`", "loss=chunked"),
        (job.attention == "flash_attention_2", "`attention: flash_attention_2`", "attention=sdpa"),
    ]
    for wanted, what, instead in needs_cuda:
        if wanted:
            raise RunError(
                f"{what} runs on CUDA only, and torch sees no CUDA GPU here", hint=f"use `--set {instead}`"
            )


def _check_packages(job: Job) -> None:
    packages = ["torch", "transformers", "safetensors", *(["peft"] if job.method == "lora" else [])]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RunError(
            f"training needs {', '.join(f'`{name}`' for name in missing)}, not installed here", hint=INSTALL
        )
    needed = [
        (job.loss == "fused" and job.method != "npt", "liger_kernel", "`loss: fused`", "--set loss=chunked"),
        (
            job.attention == "flash_attention_2",
            "flash_attn",
            "`attention: flash_attention_2`",
            "--set attention=sdpa",
        ),
        (
            job.optimizer not in TORCH_OPTIMIZERS,
            "bitsandbytes",
            f"`optimizer: {job.optimizer}`",
            "--set optimizer=adamw",
        ),
    ]
    for wanted, package, what, instead in needed:
        if wanted and find_spec(package) is None:
            name = package.replace("_", "-")
            raise RunError(
                f"{what} needs the package `{name}`, not installed here",
                hint=f"pip install {name}, or `{instead}`",
            )


def self_contained(loaded: LoadedJob) -> Job:
    """
    The job with absolute paths, so that it means the same wherever its copy lies. `output_dir` is under the
    working directory.
    """
    job = loaded.job
    changes: dict[str, Any] = {"train.output_dir": str(Path(job.train.output_dir).expanduser().absolute())}
    for name, source in (("data.train", job.data.train), ("data.eval", job.data.eval)):
        if source not in (None, BUILT_IN_DATA):
            changes[name] = str(loaded.resolve_path(source).absolute())
    local = model_path(job.model, loaded.base_dir)
    if local is not None:
        changes["model"] = str(local.absolute())
    return job.replace(**changes)


def check_folder(folder: Path, job: Job, *, resume: bool) -> None:
    """
    Refuse to write over another run, or to resume what is not there.

    A run that left neither a checkpoint nor final weights has nothing to lose and may be started over.

    Raises:
        RunError: with another `output_dir` or `--resume` as the remedy.
    """
    elsewhere = "choose another folder with `--set train.output_dir=...`"
    if not (folder / JOB_FILE).exists():
        if resume:
            raise RunError(
                f"there is no run to resume in `{folder}`",
                hint="leave out `--resume`, or check `train.output_dir`",
            )
        if (folder / FINAL).exists() or has_checkpoint(folder / CHECKPOINTS):
            raise RunError(f"`{folder}` holds weights of a run without its `{JOB_FILE}`", hint=elsewhere)
        return
    has_weights = (folder / FINAL).exists() or has_checkpoint(folder / CHECKPOINTS)
    if not has_weights and not resume:
        return
    different = different_fields(read_job(folder / JOB_FILE), job)
    if different:
        names = ", ".join(f"`{name}`" for name in different)
        raise RunError(
            f"`{folder}` holds a run of a different job: it differs in {names}",
            hint=elsewhere,
        )
    if not resume:
        raise RunError(
            f"`{folder}` already holds a run of this job",
            hint=f"continue it with `{resume_command(folder)}`, or {elsewhere}",
        )


def different_fields(before: Job, after: Job) -> list[str]:
    """
    Dotted fields in which two jobs would learn something else: all but `MAY_CHANGE`, and the global batch
    size.
    """
    old, new = _flatten(dataclasses.asdict(before)), _flatten(dataclasses.asdict(after))
    fixed = [name for name in new if not name.startswith(tuple(_prefixes())) and name not in MAY_CHANGE]
    different = [name for name in fixed if old[name] != new[name]]
    if before.global_batch_size != after.global_batch_size:
        different.append("global_batch_size")
    return different


def _prefixes() -> list[str]:
    return [name for name in MAY_CHANGE if name.endswith(".")]


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def write_job(path: Path, job: Job) -> None:
    """The job with every field spelt out, so that later defaults cannot change it."""
    from memplan.job import write

    write.write_job(path, job, origins=dict.fromkeys(job_fields(), "user"), overwrite=True)


def read_job(path: Path) -> Job:
    """
    The job that `write_job` wrote.

    Raises:
        RunError: it is not one.
    """
    from memplan.job.load import load_job

    try:
        return load_job(str(path)).job
    except MemplanError as error:
        raise RunError(
            f"`{path}` cannot be read: {error.message}", hint="choose another `train.output_dir`"
        ) from error


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


def _run(folder: Path, job: Job, *, resume: bool, dry_run: bool = False, lock: int | None = None) -> int:
    """
    Run the child and return its exit code.

    It has a session of its own, so that Ctrl-C reaches it once: through us. A second signal ends it at once.
    """
    command = [sys.executable, *_SAFE_PATH, "-m", "memplan.train.worker", str(folder)]
    command += ["--resume"] * resume + ["--dry-run"] * dry_run
    process = subprocess.Popen(
        command,
        env={**os.environ, **_environment(job)},
        start_new_session=True,
        pass_fds=() if lock is None else (lock,),
        stdin=subprocess.DEVNULL,
    )
    received: list[int] = []

    def forward(signum: int, frame: object) -> None:
        received.append(signum)
        if len(received) == 1:
            process.send_signal(signum)
        else:
            process.kill()

    before = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    if code >= 0:
        return code
    return _explain_death(-code, folder, received)


def _explain_death(signum: int, folder: Path, received: list[int]) -> int:
    """The child was killed and could not say anything itself."""
    name = signal.Signals(signum).name
    sentence = f"the training process was killed by {name}"
    if received:
        sentence = f"stopped at once by {signal.Signals(received[0]).name}, without saving"
    elif signum == signal.SIGKILL:
        sentence += "; the system does that to a process that takes more RAM than there is"
    record = Record.read(folder)
    if record is not None and record.fields.get("outcome") == "running":
        record.finish("interrupted" if received else "failed", sentence)
    say(f"error: {sentence}")
    if has_checkpoint(folder / CHECKPOINTS):
        say(f"\nhint: continue from the last checkpoint with `{resume_command(folder)}`")
    return 128 + (received[0] if received else signum)
