"""
Device memory of the process outside torch's allocator: the CUDA context, and NCCL with more than one rank.
"""

from __future__ import annotations

from memplan.errors import GpuError
from memplan.gpu.catalogue import GpuProfile, find_gpu
from memplan.gpu.context import context_bytes
from memplan.job.spec import Job
from memplan.units import GiB

NCCL_BYTES = 3 * GiB // 2
"""
Growth of the process by torch.distributed's start on A100, 0.55 to 2.00 GiB with the context included
(stas00/ml-engineering, training/performance); it depends on topology and channels and is not measured here.
"""


def gpu_profile(job: Job) -> GpuProfile | None:
    """
    The catalogue's entry for the GPU that the job names; None where it names a size, a live GPU, or nothing.
    """
    if job.gpu is None:
        return None
    try:
        return find_gpu(job.gpu)
    except GpuError:
        return None


def non_torch_bytes(job: Job) -> tuple[int, str]:
    """(bytes, where they come from)"""
    context, source = context_bytes(gpu_profile(job))
    if job.world_size == 1:
        return context, f"CUDA context, {source}"
    return context + NCCL_BYTES, f"CUDA context, {source}; NCCL 1.50 GiB, from a report on A100"
