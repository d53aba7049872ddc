"""What host memory depends on of a model, and how large blocks of it are."""

from __future__ import annotations

from typing import NamedTuple

from memplan.job.spec import DTYPE_BYTES, Job


class HostSizes(NamedTuple):
    """What host memory depends on of a model, in elements."""

    base: int
    trainable: int
    largest: int
    """Of the largest tensor of the base."""
    embedding: int
    hidden_size: int
    num_layers: int
    packed: int = 0
    """Of the base, those that are in 4 bits."""
    copied: int = 0
    """Of what trains, those of `lora.modules_to_save`."""
    stacked: int = 0
    """Of the base, those that transformers puts together from several tensors of a checkpoint, such as experts."""
    largest_stack: int = 0
    """Of the largest such tensor."""
    stored_dtype: str | None = None
    """dtype of the checkpoint, but for what it has in 4 bits; None where it is not known."""
    offloaded: int = 0
    """Pinned bytes of one rank's activations, where all of them are offloaded."""
    is_stored_packed: bool = False
    """The checkpoint has in 4 bits what the job has."""


def trained_numbers(job: Job, sizes: HostSizes) -> list[tuple[int, int]]:
    """How many numbers of how many bytes train: adapters, and whole copies beside them."""
    dtypes = {"full": job.dtype, "npt": "float32"}
    itemsize = DTYPE_BYTES[dtypes.get(job.method, job.lora.dtype)]
    copied = [(sizes.copied, DTYPE_BYTES[job.saved_dtype])] if sizes.copied else []
    return [(sizes.trainable - sizes.copied, itemsize), *copied]


def pinned_bytes(num_bytes: int) -> int:
    """torch pins powers of two (ATen/core/CachingHostAllocator.h, allocate)."""
    return 1 << (num_bytes - 1).bit_length()
