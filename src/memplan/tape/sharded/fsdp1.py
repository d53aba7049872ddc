"""
FSDP of torch.distributed.fsdp: a unit is gathered as one flat parameter, which its tensors are views of, and reduced as
one flat gradient, in the dtype it is computed in (torch/distributed/fsdp/_flat_param.py, _runtime_utils.py).

Every stream has a pool of its own in the allocator. The flat parameter is taken on the stream that gathers, a cast of
its shard on one before that, and the shard of the flat gradient that this rank keeps on the stream that reduces: what
gradients leave behind is of no use to anything else. The flat gradient is the backward pass of the split into views, a
concatenation, which runs where they were split, on the stream that gathers. So are those of adapters planned; that of
a block is planned on the stream that computes, since waits go by what the gathering stream has freed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from memplan.tape.graph import Graph
from memplan.tape.sharded.sharding import (
    GATHER_STREAM,
    PRE_GATHER_STREAM,
    REDUCE_STREAM,
    Contents,
    Layout,
    Part,
)
from memplan.tape.tensors import ITEMSIZE, Gradients, Node, Parameter, Storage, Tensor


def cut_flat(contents: Contents, rank: int, ranks: int, *, each: bool) -> None:
    """
    What a rank has of every tensor that trains: the part of it inside the rank's part of the flat parameter, which may
    be all, some or none of it. `each`: every tensor is a unit of its own.
    """
    for parameters in contents.trainable.values():
        units = [[parameter] for parameter in parameters] if each else [parameters]
        for unit in units:
            shard = -(-sum(prod(parameter.shape) for parameter in unit) // ranks)
            start = -rank * shard
            for parameter in unit:
                end = start + prod(parameter.shape)
                parameter.local_shape = (max(0, min(end, shard) - max(start, 0)),)
                start = end


class Fsdp1Units:
    """
    Gathers and reduces flat units in a graph.

    `adapter_units`: each matrix of an adapter is a unit of its own (peft's fsdp_auto_wrap_policy): gathered for its
    product, let go after it, reduced when it has its gradient. What backward fetches ahead is the matrix that ran
    before, and the next block from the first one of this block (_runtime_utils.py, _get_handle_to_prefetch).

    `recomputes_units`: checkpointing with a backward of its own runs a unit's whole forward again, hooks included. The
    unit is gathered for it, let go after it, and gathered again for its backward; and since a forward without gradients
    leaves no hook on its output, none is known to be needed, and none fetched ahead (_register_pre_backward_hooks).
    """

    def __init__(
        self,
        g: Graph,
        layout: Layout,
        contents: Contents,
        *,
        adapter_units: bool = False,
        recomputes_units: bool = False,
        wrapped: dict[int | None, list[Storage]] | None = None,
        prefetch: str = "BACKWARD_PRE",
    ) -> None:
        self.prefetch = prefetch
        self.unreduced: dict[tuple[int | None, str], Storage] = {}
        """Whole gradients of micro batches before the last, by block and first parameter of the unit."""
        self.adapter_units = adapter_units
        self.recomputes_units = recomputes_units
        self.g = g
        self.layout = layout
        self.contents = contents
        self.is_last = True
        self.casts_inputs = False
        self.gathered: dict[int | None, Storage] = {}
        self.matrices: dict[tuple[int | None, str], Storage] = {}
        """Of adapters that are units, by block and name: gathered now."""
        self.run_order: dict[int | None, list[Parameter]] = {}
        """By block, the matrices of its adapters in the order of forward."""
        if adapter_units:
            g.on_gradient = self._reduce_matrix
        self.unsharded: dict[int | None, Storage | None] = {}
        self.wrapped = wrapped or {}
        self.reached_blocks = False
        """Backward has left the loss for the blocks: what it visits outside them now comes last."""

    # -- forward -------------------------------------------------------------------------------------------

    def before_forward(self, layer: int | None, x: Tensor | None) -> None:
        """Pre-forward hook."""
        self._gather(layer)
        self.unsharded[layer] = self.gathered.pop(layer, None)

    def after_forward(self, layer: int | None) -> None:
        """
        Post-forward hook; the root unit and, without resharding, every unit stay gathered for backward. The parameters
        of the root are views of its shard all the same (_flat_param.py, _use_sharded_flat_param).
        """
        if self.layout.keep_unsharded:
            return
        if layer is None:
            self.wrapped.pop(None, None)
        else:
            self._reshard(layer)

    # -- backward ------------------------------------------------------------------------------------------

    def visit_backward(self, layer: int | None) -> None:
        """A unit is gathered if it is not, and the one that comes after it is on its way."""
        if layer not in self.unsharded:
            if layer not in self.gathered:
                self._gather(layer)
            self.unsharded[layer] = self.gathered.pop(layer, None)
        self.reached_blocks = self.reached_blocks or layer is not None
        if self.prefetch == "BACKWARD_PRE" and (layer is None or not self.adapter_units):
            self._gather_ahead(layer)

    def after_recomputation(self, layer: int | None) -> None:
        """A unit has run again inside backward, by a checkpoint around it: let go as after forward, then gathered."""
        if not self.layout.keep_unsharded:
            self._reshard(layer)
            self.before_forward(layer, None)

    def _gather_ahead(self, layer: int | None) -> None:
        following = None if self.recomputes_units else self._following(layer)
        if following is not None and following not in self.unsharded and following not in self.gathered:
            self._gather(following)

    def leave_backward(self, layer: int | None) -> None:
        """The unit's gradients go to a flat one, its parameters go, and the gradient is reduced to a shard."""
        if layer is None:
            return
        self._reduce(layer)
        self._reshard(layer)

    def end_backward(self) -> None:
        """What is outside the blocks has its last gradient, that of the embeddings."""
        self.g.enter(None)
        self._reduce(None)
        self.reached_blocks = False
        self._reshard(None)
        self.g.wait()

    def _following(self, layer: int | None) -> int | None:
        layers = self.contents.layers
        if layer is None:
            return None if self.reached_blocks else layers[-1]
        position = layers.index(layer)
        return layers[position - 1] if position else None

    # -- adapters ------------------------------------------------------------------------------------------

    def around_matrix(self, parameter: Parameter, forward: Callable[[], Tensor]) -> Tensor:
        """A product with a matrix that is a unit: the hooks before and after it, and that on its output's gradient."""
        if not self.adapter_units:
            return forward()
        order = self.run_order.setdefault(parameter.layer, [])
        if parameter not in order:
            order.append(parameter)
        self._gather_matrix(parameter)
        out = forward()
        if not self.layout.keep_unsharded:
            del self.matrices[parameter.layer, parameter.name]
        node = out.node
        if node is not None:
            product = node.backward

            def gather_first(
                g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
            ) -> Gradients:
                self._gather_matrix(parameter)
                if self.prefetch == "BACKWARD_PRE":
                    self._gather_ahead_of(parameter)
                g.enter(node.layer)
                return product(g, node, gradients, saved)

            node.backward = gather_first
        return out

    def _gather_ahead_of(self, parameter: Parameter) -> None:
        order = self.run_order[parameter.layer]
        before = order.index(parameter) - 1
        if before < 0:
            self._gather_ahead(parameter.layer)
        else:
            self._gather_matrix(order[before])

    def _gather_matrix(self, parameter: Parameter) -> None:
        key = parameter.layer, parameter.name
        if key not in self.matrices:
            self.matrices[key] = self._unshard([self._part(parameter)])

    def _part(self, parameter: Parameter) -> Part:
        return next(part for part in self.contents.parts[parameter.layer] if part.name == parameter.name)

    def _reduce_matrix(self, parameter: Parameter) -> None:
        """AccumulateGrad of a matrix: _post_backward_hook."""
        if _is_matrix(parameter.name):
            self._reduce_unit(parameter.layer, [parameter])

    def _reshard_matrix(self, parameter: Parameter) -> None:
        """In that hook, which AccumulateGrad calls with the flat gradient there."""
        if self.is_last or not self.layout.keep_unsharded:
            self.matrices.pop((parameter.layer, parameter.name), None)
        if self.prefetch == "BACKWARD_POST" and _is_matrix(parameter.name):
            self._gather_ahead_of(parameter)

    # -- collectives ---------------------------------------------------------------------------------------

    def _gather(self, layer: int | None) -> None:
        """A unit: of a block whose adapters are units of their own, what is left."""
        parts = self.contents.parts.get(layer, [])
        if self.adapter_units:
            parts = [part for part in parts if not _is_matrix(part.name)]
        if any(part.num_bytes for part in parts):
            self.gathered[layer] = self._unshard(parts)

    def _unshard(self, parts: Sequence[Part]) -> Storage:
        """FlatParamHandle.pre_unshard, unshard and post_unshard."""
        g = self.g
        num_bytes = sum(part.num_bytes for part in parts)
        on_host = self.layout.params_on_host
        moved = sum(part.num_bytes for part in parts if on_host or part.dtype != part.stored_dtype)
        shard = None
        if moved:
            with g.on_stream(PRE_GATHER_STREAM):
                name = "shards fetched from the host" if on_host else "cast of the shard"
                shard = g.storage(-(-moved // self.layout.parameters), name, category="comm")
                g.record_stream(shard)
        g.wait(but_last_of=GATHER_STREAM)
        with g.on_stream(GATHER_STREAM):
            gathered = g.storage(num_bytes, "all-gather output", category="comm")
            if g.device == "cpu" and self.layout.parameters > 1:
                # ProcessGroupGloo::_allgather_base receives into a buffer of its own.
                g.scratch(num_bytes, name="gloo's copy of what is gathered")
        g.record_stream(gathered)
        del shard
        return gathered

    def _reshard(self, layer: int | None) -> None:
        """
        FlatParamHandle.reshard, which also makes the parameters views of what is the shard now. What stays gathered
        from forward to backward also stays until the last micro batch (_should_free_in_backward).
        """
        self.wrapped.pop(layer, None)
        if self.layout.keep_unsharded and not self.is_last:
            return
        self.unsharded.pop(layer, None)

    def _reduce(self, layer: int | None) -> None:
        parameters = self.contents.with_gradients(layer)
        units = [[parameter] for parameter in parameters] if self.adapter_units else [parameters]
        for unit in units:
            if unit:
                self._reduce_unit(layer, unit)

    def _reduce_unit(self, layer: int | None, parameters: Sequence[Parameter]) -> None:
        """SplitWithSizesBackward, then _post_backward_hook."""
        g, ranks = self.g, self.layout.gradients
        count = sum(prod(parameter.shape) for parameter in parameters)
        dtype, stored = parameters[0].dtype, parameters[0].stored_dtype
        with g.on_stream(GATHER_STREAM if self.adapter_units else 0):
            flat = g.storage(count * ITEMSIZE[dtype], "flat gradient", category="comm")
        g.record_stream(flat)
        for parameter in parameters:
            if self.adapter_units and parameter.grad is not None and parameter.grad.storage is not None:
                g.record_stream(parameter.grad.storage)
            parameter.grad = None
        if self.adapter_units:
            self._reshard_matrix(parameters[0])
        else:
            self._reshard(layer)
            if self.prefetch == "BACKWARD_POST":
                self._gather_ahead(layer)
        key = layer, parameters[0].name
        if not self.is_last:  # accelerate's `no_sync`: added up in place, and reduced with the last one
            self.unreduced.setdefault(key, flat)
            return
        flat = self.unreduced.pop(key, flat)
        on_host = self.layout.optimizer_on_host and self.layout.params_on_host
        with g.on_stream(REDUCE_STREAM):
            reduced = g.new((-(-count // ranks),), dtype, "gradients of a unit", "gradients")
            if g.device == "cpu" and ranks > 1:
                # ProcessGroupGloo::_reduce_scatter_base reduces a clone of all of it and takes its part of that.
                g.scratch(count * ITEMSIZE[dtype], name="gloo's copy of what is reduced")
            if stored != dtype:
                reduced = g.new(reduced.shape, stored, "gradients of a unit", "gradients")
        if not on_host:
            for parameter in parameters:
                if parameter.sharded_grad is None:
                    parameter.sharded_grad = Tensor(parameter.local_shape, stored, reduced.storage)
        del flat


def _is_matrix(name: str) -> bool:
    """Whether a parameter is one of an adapter's two."""
    return ".lora_A." in name or ".lora_B." in name
