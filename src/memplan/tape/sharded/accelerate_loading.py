"""
How a model comes to a rank's device under accelerate, and is cut or copied there.

FSDP2 (accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model): a model in host memory comes unit by unit, whole, and
goes when the unit's shards are cut (torch/distributed/fsdp/_fully_shard/_fully_shard.py). The matrices of embeddings
and head stay until all is cut, and so does the last one that the optimizer holds: variables of the function. A 4-bit
model has been on the device before, where bitsandbytes packs it, and a dict of its state keeps it until all is cut.

DDP broadcasts parameters in copies of 250 MiB, two at a time (torch/nn/parallel/distributed.py, __init__;
torch/csrc/distributed/c10d/comm.cpp, broadcast_coalesced).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from math import prod

from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.packing import DYNAMIC_MAP_BYTES
from memplan.tape.sharded.fsdp2_accelerate import EMBEDDING, TAIL
from memplan.tape.sharded.sharding import Part, shard_shape
from memplan.tape.sharded.wrapping import buckets_of_broadcast
from memplan.tape.tensors import ITEMSIZE, Parameter, Shape, Storage


class WholeUnits:
    """
    What FSDP2 will cut.

    Args:
        on_device: the whole model is there from loading on.
    """

    def __init__(self, g: Graph, *, on_device: bool) -> None:
        self.g = g
        self.on_device = on_device
        self._units: dict[int | None, list[tuple[Parameter, Shape, str, str]]] = {}
        self._codes: dict[int | None, list[str]] = {}
        self._packed: dict[int | None, list[tuple[Linear, Part, int]]] = {}

    def add(self, unit: int | None, parameter: Parameter, local: Shape, category: str, *, dtype: str) -> None:
        """A parameter, the shape of this rank's part, the category of both, and the dtype that it is loaded in."""
        self._units.setdefault(unit, []).append((parameter, local, category, dtype))
        if self.on_device:
            self._load(parameter, dtype, category)

    def add_code(self, layer: int | None, name: str) -> None:
        """A 4-bit layer of double quantisation, whose map is copied into the dict (functional.py, as_dict)."""
        self._codes.setdefault(layer, []).append(name)

    def add_packed(self, layer: int | None, linear: Linear, part: Part, ranks: int) -> None:
        """A 4-bit layer, which holds its packed weight first."""
        self._packed.setdefault(layer, []).append((linear, part, ranks))

    def prepare(self) -> None:
        """peft's prepare_model_for_kbit_training: what is not packed becomes float32, one by one."""
        self.g.begin("kbit")
        for items in self._units.values():
            for parameter, _, category, dtype in items:
                if dtype != parameter.stored_dtype:
                    self.g.enter(parameter.layer)
                    self._load(parameter, parameter.stored_dtype, category)
        self.g.enter(None)

    def _load(self, parameter: Parameter, dtype: str, category: str) -> None:
        num_bytes = prod(parameter.shape) * ITEMSIZE[dtype]
        parameter.storage = self.g.storage(num_bytes, parameter.name, dtype, parameter.shape, category)

    def cut(self, layers: Iterable[int], kept: Iterable[Parameter]) -> None:
        """
        Cut all units.

        Args:
            kept: parameters whose whole form stays until the end.
        """
        g, to_the_end = self.g, {id(parameter) for parameter in kept}
        g.begin("load_cut")
        whole: dict[int | None, list[Storage]] = {}
        for unit in (*layers, EMBEDDING, TAIL, None):
            place = None if unit in (EMBEDDING, TAIL) else unit
            g.enter(place)
            for name in self._codes.get(unit, []):
                code = g.storage(DYNAMIC_MAP_BYTES, f"{name} copy of code of absmax", category="quant_state")
                whole.setdefault(place, []).append(code)
                del code
            arrived = [self._whole(parameter) for parameter, *_ in self._units.get(unit, [])]
            for index, (parameter, local, category, _) in enumerate(self._units.get(unit, [])):
                stored = parameter.stored_dtype
                parameter.storage = g.storage(
                    prod(local) * ITEMSIZE[stored], parameter.name, stored, local, category
                )
                if self.on_device or id(parameter) in to_the_end:
                    whole.setdefault(place, []).append(arrived[index])
            for linear, part, ranks in self._packed.get(unit, []):
                local = shard_shape(part.shape, ranks)
                g.persistent.append(g.new(local, part.stored_dtype, f"{part.name} packed weight", "weights"))
                packed = linear.held.pop(0).storage
                assert packed is not None
                whole.setdefault(place, []).append(packed)
                del packed
            arrived.clear()
        g.begin("load_cut end")
        for place in list(whole):
            g.enter(place)
            del whole[place]
        g.enter(None)

    def _whole(self, parameter: Parameter) -> Storage:
        if self.on_device:
            assert parameter.storage is not None
            return parameter.storage
        num_bytes = prod(parameter.shape) * ITEMSIZE[parameter.stored_dtype]
        return self.g.storage(num_bytes, f"{parameter.name} before it is cut", category="workspace")


def broadcast(g: Graph, tensors: Sequence[tuple[int | None, Part]], layers: Sequence[int]) -> None:
    """
    Copies that DDP sends to the other ranks.

    Args:
        tensors: of the blocks recorded and of what is outside them (None), each with its block.
        layers: the blocks recorded; those that are left out are like the next one.
    """
    g.begin("broadcast")
    first = next((index for index, (layer, _) in enumerate(tensors) if layer is not None), len(tensors))
    parts = [part for _, part in tensors[:first]]
    for before, layer in zip((None, *layers), layers):
        of_block = [part for place, part in tensors if place == layer]
        parts += of_block * (1 if before is None else layer - before)
    parts += [part for layer, part in tensors[first:] if layer is None]
    in_flight: deque[Storage] = deque()
    for num_bytes in buckets_of_broadcast(parts):
        if len(in_flight) == 2:
            in_flight.popleft()
        in_flight.append(g.storage(num_bytes, "bucket of a broadcast", category="comm"))
    while in_flight:
        in_flight.popleft()
