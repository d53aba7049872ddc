"""
FSDP2 (`fully_shard`), hook by hook, as torch/distributed/fsdp/_fully_shard has it: _fsdp_state.py (hooks),
_fsdp_param_group.py (units) and _fsdp_collectives.py (buffers).

A unit's shards are gathered into one buffer and copied out to full parameters. In forward that buffer stays until the
next unit has copied out of its own; in backward it goes at once, and the next unit is gathered while the current one
runs. Whole gradients are copied into one float32 buffer, which is reduced to this rank's part of it. Gathering and
reducing have streams of their own, hence pools of their own in the allocator.
"""

from __future__ import annotations

from math import prod

from memplan.tape.graph import Graph
from memplan.tape.sharded.sharding import (
    ALL_REDUCE_STREAM,
    GATHER_STREAM,
    REDUCE_STREAM,
    Contents,
    Layout,
    Part,
    shard_shape,
)
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage, Tensor


class Fsdp2Units:
    """
    Gathers and reduces units in a graph.

    Args:
        has_backward: NPT blocks have no backward pass that hooks would see: all units go after forward, the root too.
    """

    def __init__(self, g: Graph, layout: Layout, contents: Contents, *, has_backward: bool = True) -> None:
        self.g = g
        self.layout = layout
        self.contents = contents
        self.has_backward = has_backward
        self.is_last = True
        self.casts_inputs = True
        self.reduce_dtype: str | None = "float32"
        """Of the buffers that gradients are reduced in; None: their own."""
        self.gathered: dict[int | None, Storage] = {}
        """Buffers that are gathered and not yet copied out of."""
        self.copied_last: Storage | None = None
        """`all_gather_state`: in forward, the buffer that was copied out of last."""
        self.unsharded: dict[int | None, list[Tensor]] = {}
        self.order: list[int | None] = []
        """Units in the order in which they have run."""
        self.hooked: set[int | None] = set()
        """Units whose input requires gradients: only those see backward leave them."""
        self.reducing: Storage | None = None
        self.unreduced: dict[int | None, Tensor] = {}
        """With replicas, sums of the micro batches before the last."""
        self.all_reduced: dict[int | None, Tensor] = {}
        """With replicas, what the last reduction of a unit was made in."""

    def check(self, layer: int | None) -> None:
        """`unshard` and `reshard` outside forward and backward: on the stream at hand, and nothing is kept."""
        self._unshard(layer, in_step=False)
        self._wait_for_unshard(layer, in_forward=False)
        self.unsharded.pop(layer, None)

    # -- forward -------------------------------------------------------------------------------------------

    def before_forward(self, layer: int | None, x: Tensor | None) -> None:
        """FSDPParamGroup.pre_forward"""
        self._unshard(layer)
        self._wait_for_unshard(layer, in_forward=True)
        if x is not None and self.g.needs(x):
            self.hooked.add(layer)

    def after_forward(self, layer: int | None) -> None:
        """FSDPParamGroup.post_forward; of the root also FSDPState._post_forward."""
        is_kept = layer is None or self.layout.keep_unsharded
        if not (self.has_backward and is_kept):
            self.unsharded.pop(layer, None)
        self.order.append(layer)
        if layer is None:
            self.copied_last = None
            if not self.has_backward:
                self.order.clear()

    # -- backward ------------------------------------------------------------------------------------------

    def visit_backward(self, layer: int | None) -> None:
        """FSDPParamGroup.pre_backward: a hook on the output of a unit; the root's is the loss."""
        if not self.has_backward or layer not in self.order:
            return
        self._unshard(layer)
        self._wait_for_unshard(layer, in_forward=False)
        index = self.order.index(layer)
        self.order = self.order[:index]
        if index:
            self._unshard(self.order[-1])

    def leave_backward(self, layer: int | None) -> None:
        """RegisterPostBackwardFunction, a node before the unit's first."""
        if self.has_backward and layer in self.hooked:
            self.hooked.remove(layer)
            self._post_backward(layer)

    def end_backward(self) -> None:
        """FSDPState._root_post_backward_final_callback, when the whole graph has run."""
        if not self.has_backward:
            return
        g = self.g
        g.begin(f"{g.group} end")
        for layer in self.units():
            g.enter(layer if layer in self.contents.layers else None)
            if layer in self.unsharded or self.contents.with_gradients(layer):
                self._post_backward(layer)
            self.gathered.pop(layer, None)
            self.all_reduced.pop(layer, None)
        g.enter(None)
        self.reducing = None
        self.order.clear()

    def units(self) -> tuple[int | None, ...]:
        """In the order of the modules, the root first."""
        return (None, *self.contents.layers)

    def _post_backward(self, layer: int | None) -> None:
        """FSDPParamGroup.post_backward: parameters go, the last unit's buffer too, gradients are reduced."""
        parameters = self.contents.with_gradients(layer)
        self.unsharded.pop(layer, None)
        self.reducing = None
        if parameters:
            self.all_reduced.pop(layer, None)
            self._reduce(layer, parameters)

    # -- gathering -----------------------------------------------------------------------------------------

    def _unshard(self, layer: int | None, *, in_step: bool = True) -> None:
        """FSDPParamGroup.unshard, foreach_all_gather."""
        parts, ranks = self.contents.parts.get(layer), self.layout.parameters
        if not parts or ranks == 1 or layer in self.gathered or layer in self.unsharded:
            return
        with self.g.on_stream(GATHER_STREAM if in_step else 0):
            inputs = self._inputs(parts)
            num_bytes = sum(self._local_numel(part) * ITEMSIZE[part.dtype] for part in parts)
            self.gathered[layer] = self.g.storage(num_bytes * ranks, "all-gather output", category="comm")
            if self.g.device == "cpu":
                # ProcessGroupGloo::_allgather_base receives into a buffer of its own.
                self.g.scratch(num_bytes * ranks, name="gloo's copy of what is gathered")
            del inputs

    def _inputs(self, parts: list[Part]) -> list[Tensor]:
        """
        _get_param_all_gather_inputs: shards that are stored in another dtype are cast together, those on the host
        fetched and cast one by one. All of them go when they have been copied into the buffer.
        """
        if self.layout.params_on_host:
            return [self._fetch(part) for part in parts]
        cast = [part for part in parts if part.dtype != part.stored_dtype]
        if not cast:
            return []
        count = sum(self._local_numel(part) for part in cast)
        return [self.g.new((count,), cast[0].dtype, "cast of shards", "comm")]

    def _fetch(self, part: Part) -> Tensor:
        shape = (self._local_numel(part),)
        fetched = self.g.new(shape, part.stored_dtype, f"{part.name} fetched from the host", "comm")
        if part.dtype == part.stored_dtype:
            return fetched
        return self.g.new(shape, part.dtype, f"{part.name} cast", "comm")

    def _wait_for_unshard(self, layer: int | None, *, in_forward: bool) -> None:
        """FSDPParamGroup.wait_for_unshard, foreach_all_gather_copy_out: parameters of their own."""
        parts = self.contents.parts.get(layer)
        if not parts or layer in self.unsharded:
            return
        if self.layout.parameters == 1:
            self._copy_alone(layer, parts)
            return
        gathered = self.gathered.pop(layer)
        before = self.copied_last if in_forward else None
        self.unsharded[layer] = [self._whole(part) for part in parts]
        if in_forward:
            self.copied_last = gathered
        del before

    def _copy_alone(self, layer: int | None, parts: list[Part]) -> None:
        """A single rank gathers nothing: it copies its parameters, one after the other."""
        shard: Tensor | None = None
        self.unsharded[layer] = []
        for part in parts:
            fresh = self._fetch(part) if self.layout.params_on_host else self._cast(part)
            shard = fresh
            del fresh
            self.unsharded[layer].append(self._whole(part))
        del shard

    def _cast(self, part: Part) -> Tensor | None:
        if part.dtype == part.stored_dtype:
            return None
        return self.g.new((self._local_numel(part),), part.dtype, f"{part.name} cast", "comm")

    def _whole(self, part: Part) -> Tensor:
        """Padded to as many equal parts as there are ranks."""
        count = self._local_numel(part) * self.layout.parameters
        return self.g.new((count,), part.dtype, f"{part.name} gathered", "comm")

    def _local_numel(self, part: Part) -> int:
        return prod(shard_shape(part.shape, self.layout.parameters))

    # -- reducing ------------------------------------------------------------------------------------------

    def _reduce(self, layer: int | None, parameters: list[Parameter]) -> None:
        """
        foreach_reduce: whole gradients to one buffer, of which each rank gets its part, all of a unit's in one storage.
        The buffer stays until the next unit's.
        """
        g, ranks = self.g, self.layout.gradients
        dtype = self.reduce_dtype or parameters[0].dtype
        size = ITEMSIZE[dtype]
        count = sum(prod(shard_shape(parameter.shape, ranks)) for parameter in parameters)
        self.reducing = g.storage(count * ranks * size, "reduce-scatter input", category="comm")
        if g.device == "cpu":
            g.scratch(*_chunking_scratch(parameters, ranks, dtype), name="gradients in equal parts")
        last = (
            parameters[-1].grad if ranks > 1 else None
        )  # a loop's variable, which goes when the function returns
        for parameter in parameters:
            parameter.grad = None
        with g.on_stream(REDUCE_STREAM):
            reduced = g.new((count,), dtype, "gradients of a unit", "gradients")
            if g.device == "cpu" and ranks > 1:
                # ProcessGroupGloo::_reduce_scatter_base reduces a clone of all of it and takes its part of that.
                g.scratch(count * ranks * size, name="gloo's copy of what is reduced")
        stream, partial = REDUCE_STREAM, self.unreduced.get(layer)
        if self.layout.replicas > 1:
            stream = ALL_REDUCE_STREAM
            if not self.is_last:
                self.unreduced.setdefault(layer, reduced)
                return
            self.unreduced.pop(layer, None)  # goes when this returns
            self.all_reduced[layer] = reduced
        stored = parameters[0].stored_dtype
        if stored != dtype:
            with g.on_stream(stream):
                reduced = g.new((count,), stored, "gradients of a unit", "gradients")
        if self.layout.params_on_host:
            return
        for parameter in parameters:
            if parameter.sharded_grad is None:
                parameter.sharded_grad = Tensor(parameter.local_shape, stored, reduced.storage)
        del last, partial


def _chunking_scratch(parameters: list[Parameter], ranks: int, dtype: str) -> list[int]:
    """
    _chunk_cat on the CPU (aten/src/ATen/native/TensorShape.cpp): padded copies of all gradients that cannot be cut into
    equal parts, and one after the other the parts of those of another dtype than the buffer, side by side.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    padded = [_padded_bytes(gradient, ranks) for gradient in gradients if gradient.shape[0] % ranks]
    cast = [_padded_bytes(gradient, ranks) for gradient in gradients if gradient.dtype != dtype]
    return [*padded, max(cast, default=0)]


def _padded_bytes(gradient: Tensor, ranks: int) -> int:
    return prod(shard_shape(gradient.shape, ranks)) * ranks * ITEMSIZE[gradient.dtype]
