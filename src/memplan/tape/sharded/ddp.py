"""
DDP: every rank has the whole model, and a second copy of its gradients in buckets, which are reduced as they fill.

At first all gradients of one dtype share a bucket. As the second step begins they are laid out anew, in the order in
which they have arrived in the first: a bucket of at least 1 MiB, then such of at least 25 MiB
(torch/nn/parallel/distributed.py, _ddp_init_helper and _pre_forward; torch/csrc/distributed/c10d/reducer.cpp,
rebuild_buckets and compute_bucket_assignment_by_size).

A DDP that looks for unused parameters has buckets of those sizes from the start, in the order of the parameters, and
keeps them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import prod

from memplan.tape.graph import Graph
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage

FIRST_BUCKET_BYTES = 1 << 20
BUCKET_BYTES = 25 << 20


class Buckets:
    """
    The buckets of a model of which some blocks are recorded.

    Args:
        trainable: of the recorded blocks and of what is outside them.
        layers: the recorded blocks.
        finds_unused: DDP looks for parameters that a step has not used.
    """

    def __init__(
        self,
        g: Graph,
        trainable: Sequence[Parameter],
        layers: Sequence[int],
        finds_unused: bool,
    ) -> None:
        self.g = g
        self.layers = sorted(layers)
        self.is_rebuilt = finds_unused
        g.begin("buckets")
        if finds_unused:
            sizes = bucket_bytes(self._whole(trainable), by_first=True)
            self.held = [g.storage(size, "gradient bucket", category="comm") for size in reversed(sizes)]
            return
        dtypes = dict.fromkeys(parameter.dtype for parameter in trainable)
        whole = self._whole([*_of(trainable, None), *_inside(trainable, layers)])
        self.held = self._allocate(whole, list(reversed(dtypes)))

    def rebuild(self) -> None:
        """Before the first forward pass of a step, when gradients have arrived: once."""
        g = self.g
        if self.is_rebuilt or not g.arrived:
            return
        self.is_rebuilt = True
        g.begin("buckets rebuilt")
        parameters = list(self._whole(g.arrived))
        sizes = bucket_bytes(parameters)
        indices = g.new((len(parameters) + 1,), "int32", "parameters by bucket", "comm")
        counts = g.new((len(sizes),), "int32", "parameters per bucket", "comm")
        del counts, indices
        self.held.clear()
        self.held = [g.storage(size, "gradient bucket", category="comm") for size in sizes]

    def _allocate(self, parameters: Iterable[Parameter], dtypes: list[str]) -> list[Storage]:
        sizes = dict.fromkeys(dtypes, 0)
        for parameter in parameters:
            sizes[parameter.dtype] += _num_bytes(parameter)
        return [self.g.storage(size, "gradient bucket", category="comm") for size in sizes.values()]

    def _whole(self, parameters: Iterable[Parameter]) -> Iterator[Parameter]:
        """Those of all blocks, from those of the recorded ones: blocks that are left out are like the next one."""
        previous: int | None = None
        position = {layer: index for index, layer in enumerate(self.layers)}
        for layer, group in groupby(parameters, key=lambda parameter: parameter.layer):
            found = list(group)
            times = 1
            if layer is not None:
                if (
                    previous is not None
                ):  # the recorded block before this one, whether or not anything trains in it
                    times = abs(layer - self.layers[position[layer] + (1 if layer < previous else -1)])
                previous = layer
            for _ in range(times):
                yield from found


def bucket_bytes(parameters: Iterable[Parameter], *, by_first: bool = False) -> list[int]:
    """
    Bytes of the buckets that gradients fill as they arrive; each dtype has its own.

    Args:
        by_first: in the order of their first parameters; else those that are not full come last, and of these those
            first whose dtype came last, as libstdc++ keeps an unordered map.
    """
    full: list[tuple[int, int]] = []
    filling: dict[str, tuple[int, int]] = {}
    limits: dict[str, int] = {}
    for index, parameter in enumerate(parameters):
        dtype = parameter.dtype
        first, size = filling.get(dtype, (0, 0))
        filling[dtype] = (first if size else index, size + _num_bytes(parameter))
        if filling[dtype][1] >= limits.setdefault(dtype, FIRST_BUCKET_BYTES):
            full.append(filling[dtype])
            filling[dtype] = (0, 0)
            limits[dtype] = BUCKET_BYTES
    buckets = [*full, *(bucket for bucket in reversed(filling.values()) if bucket[1])]
    return [size for _, size in (sorted(buckets) if by_first else buckets)]


def _of(parameters: Iterable[Parameter], layer: int | None) -> list[Parameter]:
    return [parameter for parameter in parameters if parameter.layer == layer]


def _inside(parameters: Sequence[Parameter], layers: Sequence[int]) -> list[Parameter]:
    return [parameter for layer in layers for parameter in _of(parameters, layer)]


def _num_bytes(parameter: Parameter) -> int:
    return prod(parameter.shape) * ITEMSIZE[parameter.dtype]
