"""
What FSDP1 does to a model that it wraps: unit by unit, the whole model passes through the device.

torch/distributed/fsdp/_init_utils.py, _init_param_handle_from_module: a unit's parameters are moved to the device,
copied in buckets for the broadcast from rank 0 (sync_module_states), concatenated into one flat parameter, and of that
a shard is cloned before the rest goes. What this leaves in the allocator's cache is most of what training reserves
beyond what it allocates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from memplan.model.architecture import Architecture
from memplan.tape.graph import Graph
from memplan.tape.sharded.sharding import Part
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage
from memplan.units import MiB

BROADCAST_BUCKET_BYTES = 250 * MiB
"""PARAM_BROADCAST_BUCKET_SIZE (torch/distributed/fsdp/_init_utils.py)."""


class ToWrap(NamedTuple):
    """A tensor of the block `layer` (None: outside the blocks); of a packed one there is no parameter."""

    layer: int | None
    part: Part
    parameter: Parameter | None = None
    is_buffer: bool = False
    """It goes to the device and stays there, whole, outside the flat parameter."""


def add_rotary_tables(
    g: Graph,
    block: str,
    architecture: Architecture,
    dtype: str,
    layer: int,
    to_wrap: list[ToWrap] | None,
) -> None:
    """Tables of a block that has its own (`Behaviour.rotary_tables`): to be wrapped with it, or on the device now."""
    shape = (architecture.max_position_embeddings, architecture.head_dim)
    for name in ("cos_cached", "sin_cached"):
        add_buffer(g, f"{block}.self_attn.rotary_emb.{name}", shape, dtype, layer, to_wrap)


def add_buffer(
    g: Graph, name: str, shape: tuple[int, ...], dtype: str, layer: int, to_wrap: list[ToWrap] | None
) -> None:
    """A tensor of a block that is no parameter: to be wrapped with the block, or on the device now."""
    if to_wrap is None:
        g.persistent.append(g.new(shape, dtype, name, "weights"))
    else:
        to_wrap.append(ToWrap(layer, Part(name, shape, dtype, dtype), is_buffer=True))


def wrap_units(g: Graph, tensors: Sequence[ToWrap], layers: Sequence[int], degree: int) -> list[Storage]:
    """
    The blocks one after the other, then what is left. In a model with adapters each of their matrices is a unit of its
    own, wrapped before its block (peft/utils/other.py, fsdp_auto_wrap_policy). Returns the shards.
    """
    g.begin("wrap")
    buffers = [item for item in tensors if item.is_buffer]
    tensors = [item for item in tensors if not item.is_buffer]
    adapted = any(item.parameter is None or not item.parameter.needs_grad for item in tensors)
    shards = []
    sent: list[Storage] = []
    for layer in [*layers, None]:
        g.enter(layer)
        of_block = [item for item in tensors if item.layer == layer]
        alone = [
            item for item in of_block if adapted and item.parameter is not None and item.parameter.needs_grad
        ]
        units = [[item] for item in alone]
        units.append([item for item in of_block if item not in alone])
        for unit in units:
            in_unit = [item.part for item in buffers if item.layer == layer and unit is units[-1]]
            shard = wrap_unit(g, [item.part for item in unit], degree, in_unit, sent)
            shards.append(shard)
            for item in unit:
                if item.parameter is not None:
                    item.parameter.storage = shard
    return shards


def upcast_shards(
    g: Graph, tensors: Sequence[ToWrap], layers: Sequence[int], degree: int, shards: list[Storage]
) -> dict[int | None, list[Storage]]:
    """
    accelerate makes the shards that train float32 where they are not, the root's first: they take the place of the
    others in `shards`. Returns those by block, which live on: the parameters are views of them until their unit is let
    go for the first time (_flat_param.py, _use_sharded_views).
    """
    g.begin("upcast")
    wrapped: dict[int | None, list[Storage]] = {}
    for layer in [None, *layers]:
        g.enter(layer)
        trained = [
            item.parameter
            for item in tensors
            if item.layer == layer and item.parameter is not None and item.parameter.needs_grad
            if item.part.dtype != item.parameter.stored_dtype
        ]
        for before in dict.fromkeys(parameter.storage for parameter in trained):
            assert before is not None
            unit = [parameter for parameter in trained if parameter.storage is before]
            numel = sum(prod(parameter.shape) for parameter in unit)
            shard = g.storage(-(-numel // degree) * ITEMSIZE["float32"], "float32 shard", category="weights")
            for parameter in unit:
                parameter.storage = shard
            shards[shards.index(before)] = shard
            wrapped.setdefault(layer, []).append(before)
    return wrapped


def wrap_unit(
    g: Graph,
    parts: Sequence[Part],
    degree: int,
    buffers: Sequence[Part] = (),
    sent: list[Storage] | None = None,
) -> Storage:
    """
    One unit: all of its parameters, their flat copies and the shard of one of `degree` ranks, which alone is left
    beside the unit's buffers.

    Args:
        sent: buckets of the unit before, then of this one. NCCL has read them on a stream of its own, so that the
            allocator has them back when the device is done, which the copy of a parameter from the host waits for.
    """
    sent = [] if sent is None else sent
    moved = []
    for part in parts:
        moved.append(g.storage(part.num_bytes, f"{part.name} before sharding", category="workspace"))
        sent.clear()
    g.persistent += [g.storage(part.num_bytes, part.name, category="weights") for part in buffers]
    sent += _broadcast(g, [*buffers, *parts])
    total = sum(part.num_bytes for part in parts)
    flat = g.storage(total, "flat parameter", category="workspace")
    if degree == 1:
        moved.clear()
        return flat
    shard = g.storage(-(-total // degree), f"shard of {parts[-1].name.rsplit('.', 1)[0]}", category="weights")
    del flat
    while moved:
        moved.pop(0)
    return shard


def _broadcast(g: Graph, parts: Sequence[Part]) -> list[Storage]:
    return [g.storage(size, "bucket of a broadcast", category="comm") for size in buckets_of_broadcast(parts)]


def buckets_of_broadcast(parts: Iterable[Part]) -> list[int]:
    """
    Bytes of copies of whole tensors, of one dtype each, a bucket being full when it reaches BROADCAST_BUCKET_BYTES
    (torch/csrc/distributed/c10d/reducer.cpp, compute_bucket_assignment_by_size). A tensor that has a bucket to itself
    is sent as it is (torch/csrc/utils/tensor_flatten.h, flatten_dense_tensors).
    """
    full: list[tuple[int, list[int]]] = []
    filling: dict[str, tuple[int, list[int]]] = {}
    for index, part in enumerate(parts):
        _, sizes = filling.setdefault(part.dtype, (index, []))
        sizes.append(part.num_bytes)
        if sum(sizes) >= BROADCAST_BUCKET_BYTES:
            full.append(filling.pop(part.dtype))
    buckets = sorted([*full, *filling.values()])  # in the order of their first tensors
    return [sum(sizes) for _, sizes in buckets if len(sizes) > 1]
