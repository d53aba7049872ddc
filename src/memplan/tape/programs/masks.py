"""Positions, and the masks that transformers makes of them (transformers/masking_utils.py)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

from memplan.tape.graph import Graph
from memplan.tape.ops import alias
from memplan.tape.programs.blocks import Settings
from memplan.tape.scratch import cast_to_sum
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
    window is not longer than the sequence, the batch holds padding, or the model `always` makes one, which then knows
    of no documents, and flash_attention_2 none. That of a batch is looked at, and part of what is made.
    """
    behaviour, slides = settings.behaviour, window is not None and shape[1] >= window
    padded = behaviour.mask_in_batch and behaviour.padding_mask and behaviour.check_packing
    needed = settings.position_ids is not None or always or slides
    with g.module("mask"):
        given = given_mask(g, shape, settings)
        documents = None if always or given is not None else _documents(g, shape, settings)
        if settings.attention == "flash_attention_2":
            look_at_all(g, given)
            return None
        if settings.attention == "sdpa" and not needed:
            for _ in range(
                1 + padded
            ):  # where it masks anything, the part beside a cache is looked at as well
                (_look_at_sum if behaviour.sums_masks else look_at_all)(g, given)
            if not padded:
                return None
        allowed = _allowed(g, shape, documents, given if behaviour.check_packing else None, window, settings)
        if settings.attention == "sdpa":
            return allowed
        zero, lowest = g.new((), dtype, "zero"), g.new((), dtype, "lowest")
        mask = g.new((shape[0], 1, shape[1], shape[1]), dtype, "causal mask")
        del lowest, zero
    return mask


def given_mask(g: Graph, shape: tuple[int, ...], settings: Settings) -> Tensor | None:
    """
    That of the batch (B, S) as bool, where there is one (masking_utils.py, _preprocess_mask_arguments). Before 4.54 it
    was compared with ones, which takes as much (modeling_attn_mask_utils.py, _ignore_causal_mask_sdpa).
    """
    return g.new(shape, "bool", "mask of the batch") if settings.behaviour.mask_in_batch else None


def look_at_all(g: Graph, given: Tensor | None) -> None:
    """`given.all()`"""
    if given is not None:
        g.new((), "bool", "whether nothing is masked")


def _look_at_sum(g: Graph, given: Tensor | None) -> None:
    """fast_all of masking_utils.py: `given.sum() == given.numel()`"""
    if given is not None:
        total = g.new((), "int64", "tokens that are not masked")
        g.scratch(*cast_to_sum(prod(given.shape)), name="sum")
        g.new((), "bool", "whether nothing is masked")
        del total


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
    g.scratch(*cast_to_sum(batch * length), name="cumsum")
    del restarts
    is_one = g.new((batch,), "bool", "rows of one document")
    every = g.new((), "bool", "rows of one document")
    del is_one, every, first, differences
    return None if settings.position_ids is None else documents


def _allowed(
    g: Graph,
    shape: tuple[int, ...],
    documents: Tensor | None,
    given: Tensor | None,
    window: int | None,
    settings: Settings,
) -> Tensor:
    """
    sdpa_mask of masking_utils.py: which keys a query sees, as bool, from indices along every dimension; (1, 1, S, S),
    or (B, 1, S, S) where documents or a mask are given.
    """
    batch, length = shape
    rows, heads = g.new((batch,), "int64", "index of row"), g.new((1,), "int64", "index of head")
    query, key = counted(g, length), counted(g, length)
    if documents is not None:
        packed = _packed_mask if settings.behaviour.remap_positions else _packed_mask_of_rows
        allowed = packed(g, batch, length, window)
    elif given is not None:
        allowed = _not_padding(g, batch, length, window)
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


def _not_padding(g: Graph, batch: int, length: int, window: int | None) -> Tensor:
    """(B, 1, S, S): as without a mask, and then those keys of the given one (padding_mask_function)."""
    keys = partial(g.new, (batch, 1, 1, length), "bool", "keys that are no padding")
    return _causal_and(g, keys, batch, length, window, "causal mask")


def _causal_and(
    g: Graph, other: Callable[[], Tensor], batch: int, length: int, window: int | None, name: str
) -> Tensor:
    """(B, 1, S, S) of (1, 1, S, S), which is made first, and what differs from row to row (and_masks)."""
    result = g.new((), "bool", "mask so far")
    part = _causal_mask(g, 1, length, window)
    both = g.new((1, 1, length, length), "bool", "mask so far")
    del part
    result = both
    del both
    part = other()
    mask = g.new((batch, 1, length, length), "bool", name)
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
    return _causal_and(g, partial(_same_document, g, batch, length), batch, length, window, "packed mask")


def _same_document(g: Graph, batch: int, length: int) -> Tensor:
    """Bool (B, 1, S, S): packed_sequence_mask_function of masking_utils.py."""
    indices = (batch, 1, length, 1)
    query, key = g.new(indices, "int64", "documents"), g.new(indices, "int64", "documents")
    part = g.new((batch, 1, length, length), "bool", "same document")
    del query, key
    return part
