"""
DeepSpeed's parameter groups as stages 1 and 2 of ZeRO keep them: flat, padded, in one partition per rank
(deepspeed/runtime/zero/stage_1_and_2.py of 0.19.8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from memplan.job.spec import Job
from memplan.tape.tensors import Parameter

DEEPSPEED = "0.19.8"
"""The version whose source is planned for."""
NCCL_START_ALIGNMENT = 2
"""`nccl_start_alignment_factor`, in elements per rank."""


def zero_stage(job: Job) -> int:
    """
    The stage that is planned as DeepSpeed runs it; 0 for none. What stage 3 does to packed weights is not known.
    """
    if job.parallel.strategy == "ZERO_3" and job.has_quantized_base:
        return 0
    return {"ZERO_1": 1, "ZERO_2": 2, "ZERO_3": 3}.get(job.parallel.strategy, 0)


def as_deepspeed_runs_it(job: Job) -> Job:
    """
    Mixed precision is a cast of every parameter that is not packed, adapters included, and no autocast (engine.py,
    _cast_module_mixed_precision; accelerate wraps no `forward` for DeepSpeed). In stage 3 the model is made in that
    dtype, and adapters, which come later, keep theirs.
    """
    dtype = job.autocast or job.dtype
    adapters = job.lora.dtype if zero_stage(job) == 3 else dtype
    return replace(
        job,
        dtype=dtype,
        autocast=None,
        lora=replace(job.lora, dtype=adapters, modules_to_save_dtype=None),
        quantization=replace(job.quantization, kbit_preparation=False),
    )


def reduce_bucket_elements(hidden_size: int) -> int:
    """
    Of `reduce_bucket_size: auto` (transformers/integrations/deepspeed.py, trainer_config_finalize).

    >>> reduce_bucket_elements(4096)
    16777216
    """
    return hidden_size * hidden_size


def prefetch_elements(hidden_size: int) -> int:
    """Of `stage3_prefetch_bucket_size: auto`, as above."""
    return int(0.9 * hidden_size * hidden_size)


def persistence_threshold(hidden_size: int) -> int:
    """Of `stage3_param_persistence_threshold: auto`, as above, in elements."""
    return 10 * hidden_size


class FlatGroup:
    """
    One parameter group of the optimizer, in order, and where its parameters lie in the flat tensor of the group.

    Args:
        parameters: of all blocks of the model.
        degree: ranks that the flat tensor is cut over; it is padded to equal parts that start aligned.
    """

    def __init__(self, parameters: Sequence[Parameter], degree: int) -> None:
        self.parameters = list(parameters)
        self.offsets: dict[Parameter, int] = {}
        self.numel = 0
        for parameter in self.parameters:
            self.offsets[parameter] = self.numel
            self.numel += prod(parameter.shape)
        alignment = NCCL_START_ALIGNMENT * degree
        self.padded = -(-self.numel // alignment) * alignment
        self.partition = self.padded // degree
        self.dtype = self.parameters[0].dtype

    def parts(self, parameter: Parameter) -> Iterator[tuple[int, int]]:
        """(rank, elements) of the pieces that the partitions' bounds cut a parameter into."""
        start = self.offsets[parameter]
        end = start + prod(parameter.shape)
        while start < end:
            rank = start // self.partition
            stop = min(end, (rank + 1) * self.partition)
            yield rank, stop - start
            start = stop

    def elements_of(self, rank: int, parameter: Parameter) -> int:
        """How much of a parameter is in a rank's partition."""
        return sum(count for owner, count in self.parts(parameter) if owner == rank)

    def of(self, rank: int) -> list[Parameter]:
        """Parameters that are in a rank's partition, at least in part."""
        return [parameter for parameter in self.parameters if self.elements_of(rank, parameter)]
