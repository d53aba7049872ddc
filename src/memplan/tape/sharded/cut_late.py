"""
Stage 3 of ZeRO with a 4-bit base: every rank loads all of the model, since transformers makes no quantised one under
zero.Init (modeling_utils.py, get_init_context), and DeepSpeed then cuts it, one tensor after the other
(deepspeed/runtime/zero/parameter_offload.py, _convert_to_zero_parameters).
"""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.packing import packed_bytes
from memplan.tape.sharded.sharding import Layout, shard_shape
from memplan.tape.tensors import Parameter, Shape, Storage


class Uncut:
    """What is whole and will be cut."""

    def __init__(self, g: Graph, layout: Layout) -> None:
        self.g = g
        self.layout = layout
        self._waiting: list[tuple[int | None, Parameter | Linear, Shape, str]] = []

    def add(self, parameter: Parameter, local: Shape, category: str) -> None:
        """A parameter that is whole, the shape of this rank's part, and the category of both."""
        self._waiting.append((parameter.layer, parameter, local, category))

    def add_packed(self, layer: int | None, linear: Linear) -> None:
        """A 4-bit layer of a block, which holds its packed weight first and then the constants."""
        count = packed_bytes(linear.in_features * linear.out_features)
        self._waiting.append((layer, linear, shard_shape((count,), self.layout.parameters), "weights"))

    def cut(self, group: str) -> None:
        """Cut everything that waits; the constants of packed weights stay whole."""
        g, on_host = self.g, self.layout.params_on_host
        g.begin(group)
        for layer, whole, local, category in self._waiting:
            g.enter(layer)
            if isinstance(whole, Parameter):
                storage = None if on_host else g.new(local, whole.stored_dtype, whole.name, category).storage
                whole.storage = storage or Storage([], 0)  # in host memory, not on the tape
                continue
            if not on_host:
                g.persistent.append(g.new(local, "uint8", f"{whole.name} packed weight", category))
            del whole.held[0]
        g.enter(None)
        self._waiting.clear()
