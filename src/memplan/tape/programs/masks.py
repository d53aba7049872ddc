"""Positions, and the masks that transformers makes of them (transformers/masking_utils.py)."""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.ops import alias
from memplan.tape.programs.blocks import Settings
from memplan.tape.tensors import Tensor


def positions(g: Graph, length: int, settings: Settings) -> Tensor:
    """Position ids: those of the batch, or (1, S) counted up."""
    if settings.position_ids is not None:
        return settings.position_ids
    return alias(counted(g, length), (1, length))


def counted(g: Graph, length: int) -> Tensor:
    """`torch.arange(length) + 0`"""
    start = g.new((length,), "int64", "positions")
    positions = g.new((length,), "int64", "positions")
    del start
    return positions


def attention_mask(
    g: Graph,
    shape: tuple[int, ...],
    dtype: str,
    settings: Settings,
    window: int | None = None,
    *,
    always: bool = False,
) -> Tensor | None:
    """
    The (B, 1, S, S) mask of masking_utils.py, of a sliding window where one is given. Eager attention always adds one:
    made as bool, kept in the dtype of the hidden states. sdpa takes one, of bool, where documents are packed, the
    window is not longer than the sequence, or the model `always` makes one, which then knows of no documents, and
    flash_attention_2 none.
    """
    needed = settings.position_ids is not None or always or (window is not None and shape[1] >= window)
    with g.module("mask"):
        documents = None if always else _documents(g, shape, settings)
        if settings.attention == "flash_attention_2" or (settings.attention == "sdpa" and not needed):
            return None
        allowed = _allowed(g, shape, documents, window, settings)
        if settings.attention == "sdpa":
            return allowed
        zero, lowest = g.new((), dtype, "zero"), g.new((), dtype, "lowest")
        mask = g.new((shape[0], 1, shape[1], shape[1]), dtype, "causal mask")
        del lowest, zero
    return mask


def _documents(g: Graph, shape: tuple[int, ...], settings: Settings) -> Tensor | None:
    """
    Where transformers is given neither a mask nor a cache, it numbers the documents that positions begin in every row,
    to see whether there are several (masking_utils.py, find_packed_sequence_indices).
    """
    behaviour = settings.behaviour
    if not behaviour.check_packing or behaviour.padding_mask or behaviour.use_cache:
        return None
    batch, length = shape
    first = g.new((batch, 1), "int64", "position before the first")
    joined = g.new((batch, length + 1), "int64", "positions")
    differences = g.new((batch, length), "int64", "differences of positions")
    del joined
    restarts = g.new((batch, length), "bool", "restarts")
    documents = g.new((batch, length), "int64", "documents")
    del restarts
    is_one = g.new((batch,), "bool", "rows of one document")
    every = g.new((), "bool", "rows of one document")
    del is_one, every, first, differences
    return None if settings.position_ids is None else documents


def _allowed(
    g: Graph, shape: tuple[int, ...], documents: Tensor | None, window: int | None, settings: Settings
) -> Tensor:
    """sdpa_mask of masking_utils.py: which keys a query sees, as bool, from indices along every dimension."""
    batch, length = shape
    rows, heads = g.new((batch,), "int64", "index of row"), g.new((1,), "int64", "index of head")
    query, key = counted(g, length), counted(g, length)
    if documents is not None:
        packed = _packed_mask if settings.behaviour.remap_positions else _packed_mask_of_rows
        allowed = packed(g, batch, length, window)
    else:
        allowed = _causal_mask(g, 1, length, window)
    del rows, heads, query, key
    return allowed


def _causal_mask(g: Graph, batch: int, length: int, window: int | None) -> Tensor:
    """Bool: not after the query, and not further before it than the window (masking_utils.py, and_masks)."""
    shape = (batch, 1, length, length)
    if window is None:
        return g.new(shape, "bool", "causal mask")
    result = g.new((), "bool", "mask so far")
    start = g.new((1, 1, length, 1), "int64", "start of window")
    part = g.new(shape, "bool", "sliding window")
    del start
    both = g.new(shape, "bool", "mask so far")
    del part
    result = both
    del both
    part = g.new(shape, "bool", "causal mask")
    mask = g.new(shape, "bool", "sliding causal mask")
    del part, result
    return mask


def _packed_mask(g: Graph, batch: int, length: int, window: int | None) -> Tensor:
    """
    packed_sequence_compatibility_function: the same document, and before it there, as bool (B, 1, S, S) each, combined
    one after the other (transformers/masking_utils.py, and_masks).
    """
    shape, indices = (batch, 1, length, length), (batch, 1, length, 1)
    result = g.new((), "bool", "mask so far")
    part = _same_document(g, batch, length)
    both = g.new(shape, "bool", "mask so far")
    del part
    result = both
    del both
    query, key = g.new(indices, "int64", "positions"), g.new(indices, "int64", "positions")
    part = _causal_mask(g, batch, length, window)
    del query, key
    mask = g.new(shape, "bool", "packed mask")
    del part, result
    return mask


def _packed_mask_of_rows(g: Graph, batch: int, length: int, window: int | None) -> Tensor:
    """As `Behaviour.remap_positions` says of the versions before: (1, 1, S, S), and then the same document."""
    result = g.new((), "bool", "mask so far")
    part = _causal_mask(g, 1, length, window)
    both = g.new((1, 1, length, length), "bool", "mask so far")
    del part
    result = both
    del both
    part = _same_document(g, batch, length)
    mask = g.new((batch, 1, length, length), "bool", "packed mask")
    del part, result
    return mask


def _same_document(g: Graph, batch: int, length: int) -> Tensor:
    """Bool (B, 1, S, S): packed_sequence_mask_function of masking_utils.py."""
    indices = (batch, 1, length, 1)
    query, key = g.new(indices, "int64", "documents"), g.new(indices, "int64", "documents")
    part = g.new((batch, 1, length, length), "bool", "same document")
    del query, key
    return part
