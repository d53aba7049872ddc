"""Products of batches of matrices and softmax, as attention and experts use them."""

from __future__ import annotations

from math import prod

from memplan.tape.graph import Graph
from memplan.tape.ops import alias, cast, reshape
from memplan.tape.scratch import softmax_backward
from memplan.tape.tensors import ITEMSIZE, Gradients, Node, Tensor


def repeat_heads(g: Graph, x: Tensor, groups: int, *, interleaved: bool = False) -> Tensor:
    """
    repeat_kv, or `interleaved` repeat_interleave: key and value heads copied once per query head of their group;
    backward sums over the copies.
    """
    batch, heads, length, head_dim = x.shape
    shape = (batch, heads * groups, length, head_dim)
    # repeat_kv repeats a single head by a stride of 0, which a product of several sequences copies.
    is_view = heads == 1 and not interleaved
    out = alias(x, shape, transposed=True) if is_view else g.new(shape, x.dtype, "repeated heads")
    if g.needs(x):
        g.record(out, (x,), [], _repeat_backward, x.shape)
    return out


def _repeat_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "sum over repeated heads")]


def _folded(g: Graph, x: Tensor) -> Tensor:
    """(B, H, ...) as (B*H, ...) for bmm: swapped heads of a single sequence are a view, of more a copy."""
    return reshape(g, x, x.shape) if x.transposed and x.shape[0] > 1 else x


def batched_matmul(
    g: Graph, a: Tensor, b: Tensor, columns: int, *, columns_first: bool = False, repeated: bool = False
) -> Tensor:
    """
    torch.matmul of (B, H, S, K) and (B, H, K, columns): operands that are not contiguous are copied for bmm, as are
    heads that `b` has fewer of. `columns_first`: `b` is (B, H, columns, K), seen transposed. `repeated`: `b` is one
    head by a stride of 0, which a cast writes out in order.
    """
    dtype = g.autocast
    if dtype:
        low = cast(g, b, dtype)  # autocast's arguments are evaluated from the last to the first
        low.transposed &= low is b or not repeated
        b = low
        del low
        a = cast(g, a, dtype)
    groups = a.shape[1] // b.shape[1]
    left, right = _folded(g, a), _folded(g, repeat_heads(g, b, groups) if groups > 1 else b)
    product = g.new((*a.shape[:-1], columns), a.dtype, "output")
    out = alias(product)
    if g.needs(left, right):
        saved = [left if right.needs_grad else None, right if left.needs_grad else None]
        backward = _transposed_product_backward if columns_first else product_backward
        g.record(product, (left, right), saved, backward, (a.shape, right.shape))
        g.record(out, (product,), [], _unfolded_backward)
    return out


def _unfolded_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    """As for operands: the gradient of several sequences is copied where heads are swapped."""
    gradient = gradients[0]
    if gradient.transposed and gradient.shape[0] > 1:
        return [g.new(gradient.shape, gradient.dtype, "contiguous copy of grad")]
    return [alias(gradient)]


def _transposed_product_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    grad_a, grad_b = product_backward(g, node, gradients, saved)
    if grad_b is not None:
        grad_b.columns = True
    return [grad_a, grad_b]


def product_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """Of any product of two operands whose shapes are in `extra`: the right one's gradient first."""
    gradient = gradients[0]
    shape_a, shape_b = node.extra
    edge_a, edge_b = node.edges
    grad_b = g.new(shape_b, gradient.dtype, "grad of operand") if edge_b is not None else None
    grad_a = g.new(shape_a, gradient.dtype, "grad of operand") if edge_a is not None else None
    return [grad_a, grad_b]


def softmax(g: Graph, x: Tensor, dtype: str) -> Tensor:
    """
    F.softmax(x, -1, dtype=dtype): to float32, float16 is converted inside CUDA's kernel (SoftMax.cpp, softmax);
    whatever else is of another dtype is cast first.
    """
    if g.autocast and g.device == "cuda":
        dtype = "float32"
    if x.dtype not in (dtype, "float16" if g.device == "cuda" else dtype):
        x = cast(g, x, dtype)
    out = g.new(x.shape, dtype, "attention weights")
    if g.needs(x):
        g.record(out, (x,), [alias(out)], _softmax_backward)
    return out


def _softmax_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    """_softmax_backward_data multiplies gradient and output into a temporary first (SoftMax.cu)."""
    gradient = gradients[0]
    out = g.new(gradient.shape, node.metadata[0][1], "grad of scores")
    if g.device == "cuda":
        g.scratch(*softmax_backward(prod(gradient.shape) * ITEMSIZE[gradient.dtype]), name="softmax backward")
    return [out]
