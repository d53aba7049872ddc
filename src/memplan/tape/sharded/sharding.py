"""
What of a model is cut over ranks, and the units that are gathered and reduced together.

Unit None is the model outside its blocks; every block is a unit of its own. fsdp2.py and fsdp1.py say what memory the
two FSDPs of torch take to gather and reduce them, ddp.py what replicas take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from memplan.job.spec import Job
from memplan.tape.graph import Graph
from memplan.tape.sharded.zero_groups import zero_stage
from memplan.tape.tensors import ITEMSIZE, Parameter

GATHER_STREAM = 1
REDUCE_STREAM = 2
ALL_REDUCE_STREAM = 3
PRE_GATHER_STREAM = 4

SHARDED = ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD")
"""Strategies of FSDP."""


class Layout(NamedTuple):
    """What of the model's state is cut into how many parts."""

    parameters: int
    gradients: int
    optimizer: int
    keep_unsharded: bool
    """Parameters gathered in forward stay until their backward."""
    replicas: int
    """Copies of a whole model, or of a sharded one."""
    gathers: bool
    """Units are gathered: sharded, even if over a single rank, or fetched from the host."""
    params_on_host: bool
    optimizer_on_host: bool


def layout(job: Job, device: str = "cuda") -> Layout:
    """
    The degrees that a strategy stands for. ZeRO stages as in https://arxiv.org/abs/1910.02054, section 5.

    A run on `cpu` has but one memory: what is offloaded stays in it.
    """
    has_host = device != "cpu"
    parallel = job.parallel
    strategy, degree = parallel.strategy, parallel.dp_shard
    everything = strategy in SHARDED or (strategy == "ZERO_3" and not zero_stage(job))
    return Layout(
        parameters=degree if everything else 1,
        gradients=degree if everything or strategy == "ZERO_2" else 1,
        optimizer=degree if everything or zero_stage(job) else 1,
        keep_unsharded=strategy == "SHARD_GRAD_OP",
        replicas=parallel.dp_replicate,
        gathers=everything or (job.offload.params and not zero_stage(job)),
        params_on_host=has_host and job.offload.params,
        # What NPT trains is no shard, and stays on the device.
        optimizer_on_host=has_host
        and (job.offload.optimizer or job.offload.params)
        and not (job.method == "npt" and job.offload.params),
    )


def shard_shape(shape: tuple[int, ...], degree: int) -> tuple[int, ...]:
    """The fullest rank's part: FSDP2 cuts dimension 0 into equal parts, the last ones shorter."""
    return (-(-shape[0] // degree), *shape[1:]) if shape else shape


def fill_shards(g: Graph, whole: Mapping[str, list[int]]) -> None:
    """
    Shards have their memory, all of them, before they are filled from what is drawn or packed whole, one tensor after
    the other (train/skeleton.py): the largest one decides.

    On CUDA it is left out, as in the trace: loading is nowhere near the peak of a step.

    Args:
        whole: by tensor, bytes that are there at once while it is made.
    """
    if whole and g.device == "cpu":
        name, sizes = max(whole.items(), key=lambda item: sum(item[1]))
        g.begin("load_whole")
        g.scratch(*sizes, name=f"{name} before it is cut")


class Part(NamedTuple):
    """One tensor of a unit: its full shape, the dtype it is stored in, and the one it is gathered in."""

    name: str
    shape: tuple[int, ...]
    stored_dtype: str
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Of the whole tensor as it is gathered."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def module(self) -> str:
        """Path of the layer that the tensor is of; of an adapter's, the layer that it adapts."""
        return self.name.partition(".lora_")[0].removesuffix(".weight").removesuffix(".bias")


@dataclass
class Contents:
    """What the units of a model are made of."""

    layers: list[int]
    parts: dict[int | None, list[Part]] = field(default_factory=dict)
    trainable: dict[int | None, list[Parameter]] = field(default_factory=dict)

    def sort(self) -> None:
        """Into the order of the modules: adapters, which come last, to the layers that they adapt."""
        for parts in self.parts.values():
            modules = list(dict.fromkeys(part.module for part in parts))
            parts.sort(key=lambda part: modules.index(part.module))

    def with_gradients(self, layer: int | None) -> list[Parameter]:
        """The unit's parameters that have a gradient now."""
        return [parameter for parameter in self.trainable.get(layer, ()) if parameter.grad is not None]


@contextmanager
def whole_root(g: Graph) -> Iterator[None]:
    """Around a forward pass of the model: what is outside its blocks is there inside."""
    if g.units is not None:
        g.units.before_forward(None, None)
    yield
    if g.units is not None:
        g.units.after_forward(None)
