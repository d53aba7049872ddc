"""The scratch table (memplan.tape.scratch) by operator: from the arguments of a call to bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from memplan.tape import scratch
from memplan.tape.multiprocessors import Multiprocessors


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _softmax_backward(grad: Tensor, *_: Any, **__: Any) -> list[int]:
    return scratch.softmax_backward(_num_bytes(grad))


def _embedding_backward(grad: Tensor, indices: Tensor, *_: Any, **__: Any) -> list[int]:
    return scratch.embedding_backward(indices.numel(), grad.shape[-1])


def _flash_backward(_: Tensor, query: Tensor, key: Tensor, *__: Any, **___: Any) -> list[int]:
    batch, heads, length, head_dim = query.shape
    return scratch.flash_backward(
        batch, heads, key.shape[1], length, key.shape[2], head_dim, query.element_size()
    )


def _cudnn_backward(_: Tensor, query: Tensor, *__: Any, **___: Any) -> list[int]:
    batch, heads, length, head_dim = query.shape
    return scratch.cudnn_backward(batch, heads, length, head_dim)


def _efficient_backward(
    _: Tensor, query: Tensor, key: Tensor, value: Tensor, *__: Any, **___: Any
) -> list[int]:
    batch, heads, length, head_dim = query.shape
    return scratch.efficient_backward(
        batch, heads, length, key.shape[2], head_dim, query.element_size(), value.shape[-1]
    )


def _index_put(_: Tensor, indices: Any, __: Tensor, accumulate: bool = False, *___: Any) -> list[int]:
    if not accumulate:
        return []
    counts = [index.numel() for index in indices if isinstance(index, Tensor)]
    return scratch.index_put_accumulate(max(counts, default=0))


def _sort(values: Tensor, *_: Any, **__: Any) -> list[int]:
    return scratch.sort(values.numel()) if values.dim() == 1 else []


def _sum(values: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> list[int]:
    """Not of 16 bits in float32, which CUDA's kernel converts as it reads."""
    kind = values.dtype
    summed = dtype or (kind if kind.is_floating_point or kind.is_complex else torch.int64)
    if summed == kind or (summed == torch.float32 and kind in (torch.float16, torch.bfloat16)):
        return []
    return scratch.cast_to_sum(values.numel(), summed.itemsize)


def _running_sum(values: Tensor, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> list[int]:
    kind = values.dtype
    summed = dtype or (kind if kind.is_floating_point or kind.is_complex else torch.int64)
    return scratch.cast_to_sum(values.numel(), summed.itemsize) if summed != kind else []


def _product(*operands: Any, **_: Any) -> list[int]:
    """bmm and baddbmm: the two operands come last."""
    return [
        num_bytes
        for operand in operands[-2:]
        for num_bytes in scratch.batched_operand(operand.shape, operand.stride(), operand.element_size())
    ]


def _column_sum(card: Multiprocessors, tensor: Tensor, dims: Any = None, *_: Any, **__: Any) -> list[int]:
    """Where all that is added up comes first, so that the tensor is a matrix whose rows are."""
    if not dims or not tensor.is_floating_point() or not tensor.is_contiguous() or not tensor.numel():
        return []
    added = {dim % tensor.dim() for dim in ([dims] if isinstance(dims, int) else dims)}
    if added != set(range(len(added))):
        return []
    rows = prod(tensor.shape[: len(added)])
    return scratch.column_sum(rows, tensor.numel() // rows, tensor.element_size(), card)


SUMS = ("aten::sum", "aten::mean")

SCRATCH: dict[str, Callable[..., list[int]]] = {
    "aten::_softmax_backward_data": _softmax_backward,
    "aten::embedding_dense_backward": _embedding_backward,
    "aten::_scaled_dot_product_flash_attention_backward": _flash_backward,
    "aten::_scaled_dot_product_efficient_attention_backward": _efficient_backward,
    "aten::_scaled_dot_product_cudnn_attention_backward": _cudnn_backward,
    "aten::sort": _sort,
    "aten::sum": _sum,
    "aten::cumsum": _running_sum,
    "aten::bmm": _product,
    "aten::baddbmm": _product,
    "aten::index_put": _index_put,
    "aten::index_put_": _index_put,
    "aten::_index_put_impl_": _index_put,
}

ON_ANY_DEVICE = ("aten::sum", "aten::cumsum")
"""Not CUDA's kernels, but what comes before them."""


def scratch_of(operator: str, card: Multiprocessors | None) -> Callable[..., list[int]] | None:
    """What gives the bytes that a call of this operator takes inside, on this CUDA card or on no such one."""
    before = SCRATCH.get(operator)
    if card is None:
        return before if operator in ON_ANY_DEVICE else None
    return partial(_summed, card, before) if operator in SUMS else before


def _summed(
    card: Multiprocessors, before: Callable[..., list[int]] | None, *args: Any, **kwargs: Any
) -> list[int]:
    """A conversion, and parts of the sum."""
    return [*(before(*args, **kwargs) if before else ()), *_column_sum(card, *args, **kwargs)]
