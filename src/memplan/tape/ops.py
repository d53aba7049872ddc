"""
Elementwise operations and views: what each allocates, saves and does in backward.

Formulas of tools/autograd/derivatives.yaml and torch/csrc/autograd/FunctionsManual.cpp. An operation whose inputs need
no gradient records nothing. `needs` below is by input position; the outputs of a backward line up with the inputs.
"""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.tensors import Gradients, Node, Shape, Tensor

_RANK = {"bool": 0, "uint8": 1, "int64": 2, "float16": 3, "bfloat16": 3, "float32": 4, "float64": 5}


def promote(left: str, right: str) -> str:
    """dtype of an operation on two tensors; float16 with bfloat16 is float32, as in torch.promote_types."""
    if left == right:
        return left
    if _RANK[left] == _RANK[right]:
        return "float32"
    return left if _RANK[left] > _RANK[right] else right


def broadcast(left: Shape, right: Shape) -> Shape:
    """Shape of an elementwise operation on two tensors."""
    if left == right or not right:
        return left
    if not left:
        return right
    size = max(len(left), len(right))
    left = (1,) * (size - len(left)) + left
    right = (1,) * (size - len(right)) + right
    return tuple(max(pair) for pair in zip(left, right))


def alias(tensor: Tensor, shape: Shape | None = None, transposed: bool | None = None) -> Tensor:
    """A detached view of the same storage."""
    view = Tensor(
        tensor.shape if shape is None else shape,
        tensor.dtype,
        tensor.storage,
        tensor.transposed if transposed is None else transposed,
    )
    view.view = True
    view.columns = tensor.columns
    return view


# -- views -------------------------------------------------------------------------------------------------


def reshape(g: Graph, x: Tensor, shape: Shape) -> Tensor:
    """`x.view(shape)`; a transposed tensor has to be copied."""
    out = g.new(shape, x.dtype, "contiguous copy") if x.transposed else alias(x, shape)
    if g.needs(x):
        g.record(out, (x,), [], _reshape_backward, x.shape)
    return out


def _reshape_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    gradient = gradients[0]
    if gradient.transposed:
        return [g.new(node.extra, gradient.dtype, "contiguous copy of grad")]
    return [alias(gradient, node.extra)]


def split_heads(g: Graph, x: Tensor, num_heads: int, head_dim: int) -> Tensor:
    """(B, S, H*D) -> (B, H, S, D), a view."""
    batch, length, _ = x.shape
    out = alias(x, (batch, num_heads, length, head_dim), transposed=True)
    if g.needs(x):
        g.record(out, (x,), [], _split_heads_backward, x.shape)
    return out


def _split_heads_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    gradient = gradients[0]
    if gradient.transposed or gradient.columns or gradient.shape[1] == 1:
        return [alias(gradient, node.extra, transposed=False)]
    return [g.new(node.extra, gradient.dtype, "contiguous copy of grad")]


def swap_heads(g: Graph, x: Tensor) -> Tensor:
    """(B, S, H, D) -> (B, H, S, D) or back, a view."""
    first, second, third, last = x.shape
    out = alias(x, (first, third, second, last), transposed=not x.transposed)
    if g.needs(x):
        g.record(out, (x,), [], _swap_heads_backward, x.shape)
    return out


def _swap_heads_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [alias(gradients[0], node.extra, transposed=not gradients[0].transposed)]


def merge_heads(g: Graph, x: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, S, H*D): a view when the memory is in that order, else a copy."""
    batch, heads, length, head_dim = x.shape
    shape = (batch, length, heads * head_dim)
    if x.transposed:
        out = alias(x, shape, transposed=False)
    else:
        out = g.new(shape, x.dtype, "merged heads")
    if g.needs(x):
        g.record(out, (x,), [], _merge_heads_backward, x.shape)
    return out


def _merge_heads_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [alias(gradients[0], node.extra, transposed=True)]


# -- elementwise -------------------------------------------------------------------------------------------


def cast(g: Graph, x: Tensor, dtype: str) -> Tensor:
    """`x.to(dtype)`: the same tensor when it already is."""
    if x.dtype == dtype:
        return x
    out = g.new(x.shape, dtype, f"cast to {dtype}", transposed=x.transposed)
    if g.needs(x):
        g.record(out, (x,), [], _cast_backward, x.dtype)
    return out


def _cast_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    gradient = gradients[0]
    if gradient.dtype == node.extra:
        return [gradient]
    out = g.new(gradient.shape, node.extra, f"cast to {node.extra}", transposed=gradient.transposed)
    out.columns = gradient.columns
    return [out]


def _converted_on_cpu(g: Graph, operands: tuple[Tensor, ...], dtype: str) -> list[Tensor]:
    """
    Copies of operands of other dtypes: kernels of the CPU convert no elements as they go
    (aten/src/ATen/TensorIterator.cpp, promote_inputs_to_common_dtype). Numbers are not counted.
    """
    if g.device != "cpu":
        return []
    return [
        g.new(operand.shape, dtype, f"operand as {dtype}", "workspace")
        for operand in operands
        if operand.shape and operand.dtype != dtype
    ]


def add(g: Graph, a: Tensor, b: Tensor, name: str = "sum") -> Tensor:
    """`a + b`; saves nothing, its gradient is passed on as it is."""
    dtype = promote(a.dtype, b.dtype)
    converted = _converted_on_cpu(g, (a, b), dtype)
    out = g.new(broadcast(a.shape, b.shape), dtype, name, transposed=a.transposed)
    del converted
    if g.needs(a, b):
        g.record(out, (a, b), [], _add_backward)
    return out


def add_in_place(g: Graph, a: Tensor, b: Tensor, name: str = "sum") -> Tensor:
    """`a += b`: the sum has the storage of `a`; saves nothing."""
    out = alias(a)
    out.view = a.view
    if g.needs(a, b):
        g.record(out, (a, b), [], _add_backward)
    return out


def _add_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    gradient = gradients[0]
    return [gradient if edge is not None else None for edge in node.edges]


def add_scalar(g: Graph, x: Tensor, name: str = "sum") -> Tensor:
    """`x + 1.0`"""
    out = g.new(x.shape, x.dtype, name, transposed=x.transposed)
    if g.needs(x):
        g.record(out, (x,), [], _add_backward)
    return out


def mul(g: Graph, a: Tensor, b: Tensor, name: str = "product") -> Tensor:
    """`a * b`; saves each operand that the other's gradient needs."""
    needed = g.needs(a, b)
    saved = g.save(a if b.needs_grad else None, b if a.needs_grad else None) if needed else None
    dtype = promote(a.dtype, b.dtype)
    converted = _converted_on_cpu(g, (a, b), dtype)
    out = g.new(broadcast(a.shape, b.shape), dtype, name, transposed=a.transposed)
    del converted
    if saved is not None:
        g.record(out, (a, b), saved, _mul_backward)
    return out


def _mul_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    gradient = gradients[0]
    a, b = saved
    outputs: Gradients = [None, None]
    for position, factor in ((1, a), (0, b)):
        if factor is not None:
            shape = broadcast(gradient.shape, factor.shape)
            dtype = promote(gradient.dtype, factor.dtype)
            outputs[position] = g.new(shape, dtype, "grad of factor", transposed=gradient.transposed)
    return outputs


def scale(g: Graph, x: Tensor, name: str = "scaled") -> Tensor:
    """`x * 0.5`"""
    out = g.new(x.shape, x.dtype, name, transposed=x.transposed)
    if g.needs(x):
        g.record(out, (x,), [], scale_backward)
    return out


def scale_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    gradient = gradients[0]
    out = g.new(gradient.shape, gradient.dtype, "scaled grad", transposed=gradient.transposed)
    out.columns = gradient.columns
    return [out]


def negate(g: Graph, x: Tensor, name: str = "negated") -> Tensor:
    """`-x`"""
    out = g.new(x.shape, x.dtype, name, transposed=x.transposed)
    if g.needs(x):
        g.record(out, (x,), [], scale_backward)
    return out


def unary_saving_input(g: Graph, x: Tensor, name: str) -> Tensor:
    """silu, gelu, relu and the like as one kernel: saves its input; one kernel backward."""
    saved = g.save(x) if g.needs(x) else None
    out = g.new(x.shape, x.dtype, name, transposed=x.transposed)
    if saved is not None:
        g.record(out, (x,), saved, _unary_backward)
    return out


def unary_saving_output(g: Graph, x: Tensor, name: str) -> Tensor:
    """tanh: saves its result."""
    out = g.new(x.shape, x.dtype, name, transposed=x.transposed)
    if g.needs(x):
        g.record(out, (x,), [alias(out)], _unary_backward)
    return out


def _unary_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    gradient = gradients[0]
    return [
        g.new(gradient.shape, gradient.dtype, "grad of activation function", transposed=gradient.transposed)
    ]


def clamp_in_place(g: Graph, x: Tensor) -> None:
    """`x.clamp_(min, max)`: what x was is copied for backward, which asks it again where it was inside."""
    if g.needs(x):
        original = g.new(x.shape, x.dtype, "copy before clamp")
        source = alias(x)
        source.node, source.slot, source.needs_grad = x.node, x.slot, x.needs_grad
        g.record(x, (source,), [original], _clamp_backward)


def _clamp_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    gradient = gradients[0]
    zero = g.new((), gradient.dtype, "zero")
    above = g.new(gradient.shape, "bool", "inside bounds")
    below = g.new(gradient.shape, "bool", "inside bounds")
    out = g.new(gradient.shape, gradient.dtype, "grad of clamp")
    del above, below, zero
    return [out]


def autocast_to_float32(g: Graph, x: Tensor) -> Tensor:
    """Autocast's cast for pow, softmax and layer_norm on CUDA (autocast_mode.h, AT_FORALL_FP32)."""
    return cast(g, x, "float32") if g.autocast and g.device == "cuda" else x


def power(g: Graph, x: Tensor, name: str = "power") -> Tensor:
    """`x.pow(n)`, n a Python number other than 0 and 1: saves its input."""
    x = autocast_to_float32(g, x)
    saved = g.save(x) if g.needs(x) else None
    out = g.new(x.shape, x.dtype, name, transposed=x.transposed)
    if saved is not None:
        g.record(out, (x,), saved, _power_backward)
    return out


def _power_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """pow_backward: grad * (n * x.pow(n - 1))"""
    x = saved[0]
    assert x is not None
    lower_power = g.new(x.shape, x.dtype, "power of lower order")
    factor = g.new(x.shape, x.dtype, "derivative of power")
    dtype = promote(gradients[0].dtype, factor.dtype)
    out = g.new(x.shape, dtype, "grad of power", transposed=gradients[0].transposed)
    del factor, lower_power
    return [out]


def mean_last(g: Graph, x: Tensor, name: str = "mean") -> Tensor:
    """`x.mean(-1, keepdim=True)`; backward expands the gradient and divides it."""
    out = g.new((*x.shape[:-1], 1), x.dtype, name)
    if g.needs(x):
        g.record(out, (x,), [], _mean_backward, x.shape)
    return out


def _mean_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of mean")]


def rsqrt(g: Graph, x: Tensor) -> Tensor:
    """`torch.rsqrt(x)`: saves its result."""
    out = g.new(x.shape, x.dtype, "rsqrt")
    if g.needs(x):
        g.record(out, (x,), [alias(out)], _rsqrt_backward)
    return out


def _rsqrt_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """-0.5 * grad * result.pow(3)"""
    gradient = gradients[0]
    cubed = g.new(gradient.shape, gradient.dtype, "cube")
    halved = g.new(gradient.shape, gradient.dtype, "half of grad")
    out = g.new(gradient.shape, gradient.dtype, "grad of rsqrt")
    del halved, cubed
    return [out]


def dropout(g: Graph, x: Tensor, probability: float) -> Tensor:
    """
    F.dropout in training: native_dropout with a bool mask on CUDA, made before the output; on the CPU a mask of x's
    dtype that is multiplied.

    (aten/src/ATen/native/Dropout.cpp, aten/src/ATen/native/cuda/Dropout.cu)
    """
    if probability == 0 or not g.training:
        return x
    if g.device == "cpu":
        noise = g.new(x.shape, x.dtype, "dropout mask", transposed=x.transposed)
        return mul(g, x, noise, "dropout")
    mask = g.new(x.shape, "bool", "dropout mask", transposed=x.transposed)
    out = g.new(x.shape, x.dtype, "dropout", transposed=x.transposed)
    if g.needs(x):
        g.record(out, (x,), [mask], _unary_backward)
    return out


def concatenate(g: Graph, parts: tuple[Tensor, ...], shape: Shape, name: str) -> Tensor:
    """`torch.cat(parts, -1)`; backward narrows the gradient. Autocast casts all parts to the widest dtype."""
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = promote(dtype, part.dtype)
    if g.autocast:
        parts = tuple(cast(g, part, dtype) for part in parts)
    out = g.new(shape, dtype, name)
    if g.needs(*parts):
        g.record(out, parts, [], _concatenate_backward, [part.shape for part in parts])
    return out


def _concatenate_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [
        alias(gradients[0], shape) if edge is not None else None
        for edge, shape in zip(node.edges, node.extra)
    ]


def narrow_last(g: Graph, x: Tensor, size: int) -> Tensor:
    """
    `x[..., i : i + size]`, a view; backward writes the gradient into a zeroed tensor of x's size. All of x is an
    alias, whose gradient is passed on.
    """
    out = alias(x, (*x.shape[:-1], size))
    if not g.needs(x):
        return out
    if size == x.shape[-1]:
        g.record(out, (x,), [], _add_backward)
    else:
        g.record(out, (x,), [], _narrow_backward, x.shape)
    return out


def _narrow_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of slice")]
