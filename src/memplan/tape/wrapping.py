"""
What FSDP1 does to a model that it wraps: unit by unit, the whole model passes through the device.

torch/distributed/fsdp/_init_utils.py, _init_param_handle_from_module: a unit's parameters are moved to the device,
copied in buckets for the broadcast from rank 0 (sync_module_states), concatenated into one flat parameter, and of that
a shard is cloned before the rest goes. What this leaves in the allocator's cache is most of what training reserves
beyond what it allocates.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from memplan.tape.graph import Graph
from memplan.tape.sharding import Part
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage
from memplan.units import MiB

BROADCAST_BUCKET_BYTES = 250 * MiB
"""PARAM_BROADCAST_BUCKET_SIZE (torch/distributed/fsdp/_init_utils.py)."""
BUCKETS_IN_FLIGHT = 2
"""broadcast_coalesced (torch/csrc/distributed/c10d/comm.cpp)."""


class ToWrap(NamedTuple):
    """A tensor of the block `layer` (None: outside the blocks); of a packed one there is no parameter."""

    layer: int | None
    part: Part
    parameter: Parameter | None = None


def wrap_units(g: Graph, tensors: Sequence[ToWrap], layers: Sequence[int], degree: int) -> list[Storage]:
    """
    The blocks one after the other, then what is left. In a model with adapters each of their matrices is a unit of its
    own, wrapped before its block (peft/utils/other.py, fsdp_auto_wrap_policy). Returns the shards.
    """
    g.begin("wrap")
    adapted = any(item.parameter is None or not item.parameter.needs_grad for item in tensors)
    shards = []
    for layer in [*layers, None]:
        g.enter(layer)
        of_block = [item for item in tensors if item.layer == layer]
        alone = [
            item for item in of_block if adapted and item.parameter is not None and item.parameter.needs_grad
        ]
        units = [[item] for item in alone]
        units.append([item for item in of_block if item not in alone])
        for unit in units:
            shard = wrap_unit(g, [item.part for item in unit], degree)
            shards.append(shard)
            for item in unit:
                if item.parameter is not None:
                    item.parameter.storage = shard
    return shards


def upcast_shards(
    g: Graph, tensors: Sequence[ToWrap], layers: Sequence[int], degree: int, shards: list[Storage]
) -> dict[int | None, Storage]:
    """
    accelerate makes the shards that train float32, the root's first: they take the place of the others in `shards`.
    Returns those by unit, which live on: the parameters are views of them until their unit is let go for the first
    time (_flat_param.py, _use_sharded_views).
    """
    g.begin("upcast")
    wrapped: dict[int | None, Storage] = {}
    for layer in [None, *layers]:
        g.enter(layer)
        trained = [
            item.parameter
            for item in tensors
            if item.layer == layer and item.parameter is not None and item.parameter.needs_grad
        ]
        if not trained:
            continue
        before = trained[0].storage
        assert before is not None
        numel = sum(prod(parameter.shape) for parameter in trained)
        shard = g.storage(-(-numel // degree) * ITEMSIZE["float32"], "float32 shard", category="weights")
        for parameter in trained:
            parameter.storage = shard
        shards[shards.index(before)] = shard
        wrapped[layer] = before
    return wrapped


def wrap_unit(g: Graph, parts: Sequence[Part], degree: int) -> Storage:
    """
    One unit: all of its parameters, their flat copies and the shard of one of `degree` ranks, which alone is left.
    """
    moved = [
        g.storage(part.num_bytes, f"{part.name} before sharding", category="workspace") for part in parts
    ]
    _broadcast(g, parts)
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


def _broadcast(g: Graph, parts: Sequence[Part]) -> None:
    """Copies of whole tensors, a bucket being full when it reaches BROADCAST_BUCKET_BYTES; two at a time."""
    buckets: list[Storage] = []
    pending = 0
    for index, part in enumerate(parts):
        pending += part.num_bytes
        if pending >= BROADCAST_BUCKET_BYTES or index == len(parts) - 1:
            if len(buckets) == BUCKETS_IN_FLIGHT:
                buckets.pop(0)
            buckets.append(g.storage(pending, "bucket of a broadcast", category="comm"))
            pending = 0
    while buckets:
        buckets.pop(0)
