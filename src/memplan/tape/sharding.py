"""
Sharded and replicated training, to first order: what is gathered, reduced and kept on the fullest rank.

FSDP2 wraps each block and the rest of the model as units. Before a unit runs, its shards are gathered into one buffer
and copied out to full parameters; after it, those go (FULL_SHARD) or stay until backward (SHARD_GRAD_OP). In backward
the next unit is gathered while the current one runs, and a unit's gradients are copied into one float32 buffer that is
reduced to a shard. (torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py and _fsdp_collectives.py.) Gathering and
reducing have streams of their own, hence pools of their own in the allocator. DDP keeps a bucket copy of the gradients
(torch/nn/parallel/distributed.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from memplan.job.spec import Job
from memplan.tape.engine import ITEMSIZE, Graph, Parameter, Storage, Tensor

GATHER_STREAM = 1
REDUCE_STREAM = 2


@dataclass(frozen=True)
class Layout:
    """What of the model's state is cut into how many parts."""

    parameters: int
    gradients: int
    optimizer: int
    keep_unsharded: bool
    """Parameters gathered in forward stay until their backward."""
    replicas: int
    params_on_host: bool
    optimizer_on_host: bool

    @property
    def gathers(self) -> bool:
        """Whether units are gathered at all: sharded, or fetched from the host."""
        return self.parameters > 1 or self.params_on_host


def layout(job: Job) -> Layout:
    """The degrees that a strategy stands for. ZeRO stages as in https://arxiv.org/abs/1910.02054, section 5."""
    parallel = job.parallel
    strategy, degree = parallel.strategy, parallel.dp_shard
    everything = strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "ZERO_3")
    return Layout(
        parameters=degree if everything else 1,
        gradients=degree if everything or strategy == "ZERO_2" else 1,
        optimizer=degree if everything or strategy in ("ZERO_1", "ZERO_2") else 1,
        keep_unsharded=strategy == "SHARD_GRAD_OP",
        replicas=parallel.dp_replicate if strategy == "NO_SHARD" else 1,
        params_on_host=job.offload.params,
        optimizer_on_host=job.offload.optimizer or job.offload.params,
    )


def shard_shape(shape: tuple[int, ...], degree: int) -> tuple[int, ...]:
    """The fullest rank's part: FSDP2 cuts dimension 0 into equal parts, the last ones shorter."""
    return (-(-shape[0] // degree), *shape[1:]) if shape else shape


@dataclass(frozen=True)
class Part:
    """One tensor of a unit: its full shape and the dtype it is gathered in."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]


class Units:
    """Gathers and reduces the units of a sharded model, in a graph. Unit None is the model outside its blocks."""

    def __init__(self, g: Graph, layout: Layout, layers: list[int]) -> None:
        self.g = g
        self.layout = layout
        self.layers = layers
        self.parts: dict[int | None, list[Part]] = {}
        self.trainable: dict[int | None, list[Parameter]] = {}
        self.gathered: dict[int | None, Storage] = {}
        self.unsharded: dict[int | None, list[Tensor]] = {}
        self.reducing: Storage | None = None
        self.flat = False
        """
        FSDP1: a unit is gathered as one flat parameter, which its tensors are views of, and reduced in the dtype it is
        computed in (torch/distributed/fsdp/_flat_param.py, _runtime_utils.py).
        """
        self.reached_blocks = False
        """Backward has left the loss for the blocks: what it visits outside them now comes last."""

    # -- forward -------------------------------------------------------------------------------------------

    def before_forward(self, layer: int | None) -> None:
        """Pre-forward hook: the unit's parameters are there when this returns."""
        self._gather(layer)
        self._copy_out(layer)

    def after_forward(self, layer: int | None) -> None:
        """Post-forward hook; the root unit and, without resharding, every unit stay gathered."""
        if layer is not None and not self.layout.keep_unsharded:
            self.unsharded.pop(layer, None)

    # -- backward ------------------------------------------------------------------------------------------

    def visit_backward(self, layer: int | None) -> None:
        """Backward reaches a unit: it is gathered if it is not, and the one that comes after it is on its way."""
        if layer not in self.unsharded:
            if layer not in self.gathered:
                self._gather(layer)
            self._copy_out(layer)
        self.reached_blocks = self.reached_blocks or layer is not None
        following = self._following(layer)
        if following is not None and following not in self.unsharded and following not in self.gathered:
            self._gather(following)

    def leave_backward(self, layer: int | None) -> None:
        """Post-backward: gradients to a float32 buffer, reduced to a shard; the unit's parameters go."""
        if layer is not None:
            self.unsharded.pop(layer, None)
        self._reduce(layer)

    def end_backward(self) -> None:
        """The last unit's buffer and the root's parameters go."""
        self._reduce(None)
        self.reducing = None
        self.reached_blocks = False
        self.unsharded.pop(None, None)

    def _following(self, layer: int | None) -> int | None:
        if layer is None:
            return None if self.reached_blocks else self.layers[-1]
        position = self.layers.index(layer)
        return self.layers[position - 1] if position else None

    # -- collectives ---------------------------------------------------------------------------------------

    def _comm(self, num_bytes: int, name: str, stream: int) -> Storage:
        g = self.g
        outer, g.stream = g.stream, stream
        storage = g.storage(num_bytes, name, category="comm")
        g.stream = outer
        return storage

    def _gather(self, layer: int | None) -> None:
        num_bytes = sum(part.num_bytes for part in self.parts.get(layer, ()))
        if not num_bytes:
            return
        if self.layout.params_on_host:
            shard = self._comm(
                num_bytes // self.layout.parameters, "shards fetched from the host", GATHER_STREAM
            )
            self.gathered[layer] = self._comm(num_bytes, "all-gather output", GATHER_STREAM)
            del shard
        else:
            self.gathered[layer] = self._comm(num_bytes, "all-gather output", GATHER_STREAM)

    def _copy_out(self, layer: int | None) -> None:
        if self.flat:
            whole = self.gathered.pop(layer, None)
            self.unsharded[layer] = [] if whole is None else [Tensor((), "uint8", whole)]
            return
        self.unsharded[layer] = [
            self.g.new(part.shape, part.dtype, f"{part.name} gathered", "comm")
            for part in self.parts.get(layer, ())
        ]
        self.gathered.pop(layer, None)

    def _reduce(self, layer: int | None) -> None:
        parameters = [parameter for parameter in self.trainable.get(layer, ()) if parameter.grad is not None]
        if not parameters:
            return
        num_bytes = sum(
            prod(parameter.shape) * (ITEMSIZE[parameter.dtype] if self.flat else 4)
            for parameter in parameters
        )
        buffer = self._comm(num_bytes, "reduce-scatter input", REDUCE_STREAM)
        self.reducing = buffer
        for parameter in parameters:
            parameter.grad = None
        if self.layout.optimizer_on_host and self.layout.params_on_host:
            return
        for parameter in parameters:
            if parameter.sharded_grad is None:
                name = f"{parameter.name} grad"
                parameter.sharded_grad = self.g.new(
                    parameter.local_shape, parameter.stored_dtype, name, "gradients"
                )
