"""
FSDP of torch.distributed.fsdp: a unit is gathered as one flat parameter, which its tensors are views of, and reduced in
the dtype it is computed in (torch/distributed/fsdp/_flat_param.py, _runtime_utils.py).
"""

from __future__ import annotations

from math import prod

from memplan.tape.graph import Graph
from memplan.tape.sharding import GATHER_STREAM, REDUCE_STREAM, Contents, Layout
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage, Tensor


class Fsdp1Units:
    """
    Gathers and reduces flat units in a graph.

    `adapter_units`: each matrix of an adapter is a unit of its own (peft's fsdp_auto_wrap_policy), so that what
    backward fetches ahead is a matrix, and the next block only when the first adapter of this one is reached
    (_runtime_utils.py, _get_handle_to_prefetch).

    Not `fetches_ahead`: with reentrant checkpointing around it a unit runs forward without a graph, which leaves no
    mark that backward will need it before its recomputation has begun, and what has no mark is not fetched ahead
    (_runtime_utils.py, _register_pre_backward_hooks).
    """

    def __init__(
        self, g: Graph, layout: Layout, contents: Contents, *, adapter_units: bool, fetches_ahead: bool = True
    ) -> None:
        self.adapter_units = adapter_units
        self.fetches_ahead = fetches_ahead
        self.g = g
        self.layout = layout
        self.contents = contents
        self.is_last = True
        self.gathered: dict[int | None, Storage] = {}
        self.unsharded: dict[int | None, Storage | None] = {}
        self.reducing: Storage | None = None
        self.reached_blocks = False
        """Backward has left the loss for the blocks: what it visits outside them now comes last."""

    # -- forward -------------------------------------------------------------------------------------------

    def before_forward(self, layer: int | None, x: Tensor | None) -> None:
        """Pre-forward hook."""
        self._gather(layer)
        self.unsharded[layer] = self.gathered.pop(layer, None)

    def after_forward(self, layer: int | None) -> None:
        """Post-forward hook; the root unit and, without resharding, every unit stay gathered for backward."""
        if layer is not None and not self.layout.keep_unsharded:
            self.unsharded.pop(layer, None)

    # -- backward ------------------------------------------------------------------------------------------

    def visit_backward(self, layer: int | None) -> None:
        """A unit is gathered if it is not, and the one that comes after it is on its way."""
        if layer not in self.unsharded:
            if layer not in self.gathered:
                self._gather(layer)
            self.unsharded[layer] = self.gathered.pop(layer, None)
        self.reached_blocks = self.reached_blocks or layer is not None
        if layer is None or not self.adapter_units:
            self._gather_ahead(layer)

    def _gather_ahead(self, layer: int | None) -> None:
        following = self._following(layer) if self.fetches_ahead else None
        if following is not None and following not in self.unsharded and following not in self.gathered:
            self._gather(following)

    def leave_backward(self, layer: int | None) -> None:
        """The unit's parameters go, and its gradients to a buffer that is reduced to a shard."""
        if layer is not None:
            if self.adapter_units:
                self._gather_ahead(layer)
            self.unsharded.pop(layer, None)
        self._reduce(layer)

    def end_backward(self) -> None:
        """The last unit's buffer and the root's parameters go."""
        self.g.enter(None)
        self._reduce(None)
        self.reducing = None
        self.reached_blocks = False
        self.unsharded.pop(None, None)

    def _following(self, layer: int | None) -> int | None:
        layers = self.contents.layers
        if layer is None:
            return None if self.reached_blocks else layers[-1]
        position = layers.index(layer)
        return layers[position - 1] if position else None

    # -- collectives ---------------------------------------------------------------------------------------

    def _gather(self, layer: int | None) -> None:
        num_bytes = sum(part.num_bytes for part in self.contents.parts.get(layer, ()))
        if not num_bytes:
            return
        g = self.g
        with g.on_stream(GATHER_STREAM):
            shard = None
            if self.layout.params_on_host:
                local_bytes = num_bytes // self.layout.parameters
                shard = g.storage(local_bytes, "shards fetched from the host", category="comm")
            self.gathered[layer] = g.storage(num_bytes, "all-gather output", category="comm")
            del shard

    def _reduce(self, layer: int | None) -> None:
        parameters = self.contents.with_gradients(layer)
        if not parameters:
            return
        num_bytes = sum(prod(parameter.shape) * ITEMSIZE[parameter.dtype] for parameter in parameters)
        with self.g.on_stream(REDUCE_STREAM):
            self.reducing = self.g.storage(num_bytes, "reduce-scatter input", category="comm")
        for parameter in parameters:
            parameter.grad = None
        if self.layout.optimizer_on_host and self.layout.params_on_host:
            return
        for parameter in parameters:
            if parameter.sharded_grad is None:
                parameter.sharded_grad = self._sharded_gradient(parameter)

    def _sharded_gradient(self, parameter: Parameter) -> Tensor:
        name = f"{parameter.name} grad"
        return self.g.new(parameter.local_shape, parameter.stored_dtype, name, "gradients")
