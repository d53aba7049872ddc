"""Room on disk for the checkpoints and the final weights of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from memplan.budget.result import Result
from memplan.job.spec import DTYPE_BYTES, Job

_STATE_BYTES: dict[str, Callable[[int], float]] = {
    "adamw": lambda itemsize: 2 * itemsize,
    "paged_adamw": lambda itemsize: 2 * itemsize,
    # One byte per moment and a float32 scale per 256 of them: bitsandbytes/optim/optimizer.py.
    "adamw_8bit": lambda itemsize: 2 * (1 + 4 / 256),
    "paged_adamw_8bit": lambda itemsize: 2 * (1 + 4 / 256),
    "ao_adamw_8bit": lambda itemsize: 2 * (1 + 4 / 256),
    "ao_adamw_4bit": lambda itemsize: 2 * (1 / 2 + 4 / 256),
    "ao_adamw_fp8": lambda itemsize: 2 * (1 + 4 / 256),
    "lion": lambda itemsize: itemsize,
    "sgd": lambda itemsize: itemsize,
    # Rows and columns instead of the product: far below a byte per parameter.
    "adafactor": lambda itemsize: 1,
}
"""Bytes of optimizer state per trained parameter, at most, from the bytes of one parameter."""


@dataclass(frozen=True)
class DiskCheck:
    """What a run of `memplan train` holds on disk at once, and what is free where it writes."""

    path: str
    """The nearest existing folder above `train.output_dir`."""
    free_bytes: int
    checkpoint_bytes: int
    """One checkpoint: trained weights and optimizer states."""
    final_bytes: int
    """The trained weights alone."""
    num_checkpoints: int
    """Most that there are at once: those that are kept, the best one, and the one being written."""

    @property
    def needed_bytes(self) -> int:
        """All checkpoints and the final weights."""
        return self.num_checkpoints * self.checkpoint_bytes + self.final_bytes

    @property
    def is_enough(self) -> bool:
        """Whether that is free."""
        return self.needed_bytes <= self.free_bytes


def check_disk(job: Job, result: Result, base_dir: Path) -> DiskCheck:
    """Compare what the run of `job` writes with what is free where `train.output_dir` is or will be."""
    path = (base_dir / job.train.output_dir).absolute()
    while not path.exists():
        path = path.parent
    itemsize = trained_itemsize(job)
    assert result.parameters is not None, "recordings are not preflighted"
    trainable = result.parameters.trainable
    final_bytes = trainable * itemsize
    most = job.train.keep_checkpoints + 1
    # How many steps a number of epochs makes is known when the data has been read: at worst enough.
    num_saves = most if job.train.epochs is not None else -(-job.train.max_steps // job.train.save_every)
    has_best = job.data.eval is not None and job.train.keep_best
    return DiskCheck(
        path=str(path),
        free_bytes=shutil.disk_usage(path).free,
        checkpoint_bytes=final_bytes + int(trainable * _STATE_BYTES[job.optimizer](itemsize)),
        final_bytes=final_bytes,
        num_checkpoints=min(num_saves, most) + has_best,
    )


def trained_itemsize(job: Job) -> int:
    """
    Bytes of one trained parameter: of the adapters for `lora` and `qlora`, or of copies of `lora.modules_to_save` where
    these are wider; of the base otherwise.
    """
    if job.method not in ("lora", "qlora"):
        return DTYPE_BYTES[job.dtype]
    copies = [DTYPE_BYTES[job.saved_dtype]] if job.modules_to_save else []
    return max([DTYPE_BYTES[job.lora.dtype], *copies])
