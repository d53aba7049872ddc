"""
The weight deltas of an NPT block: codes of attention outputs, norms, and a linear layer with a delta. Mirrors
memplan.npt.modulator line by line.
"""

from __future__ import annotations

from memplan.job.spec import Npt
from memplan.tape.graph import Graph
from memplan.tape.linear import autocast_to, linear
from memplan.tape.linear_layer import Linear
from memplan.tape.ops import add, alias, cast, mul, promote, reshape, scale, unary_saving_output
from memplan.tape.parts import NptModulator
from memplan.tape.products import product_backward
from memplan.tape.tensors import Gradients, Node, Shape, Tensor


def encode(g: Graph, npt: NptModulator, a: Tensor) -> Tensor:
    """The code (..., R) in float32: scale * tanh(a @ A), or a @ C for `linear` and `outer`."""
    reader = npt.a if npt.c is None else npt.c
    z = _product(g, a, cast(g, reader, a.dtype), reader.shape[1], "z")
    if npt.c is not None:
        return cast(g, z, "float32")
    return scale(g, unary_saving_output(g, cast(g, z, "float32"), "tanh"), "modulation")


def squared_norm(g: Graph, npt: NptModulator, code: Tensor, settings: Npt) -> Tensor:
    """Squared Frobenius norm of every token's delta, (...), by Gram matrices of r * r elements."""
    if settings.variant != "outer":
        rank = settings.rank
        gram = mul(g, _gram(g, npt.a, (rank, rank)), _gram(g, npt.b, (rank, rank)), "Gram matrix")
        return _quadratic_form(g, code, gram)
    shape = (settings.components, settings.rank, settings.rank)
    a, b = _view(g, npt.a, npt.a.shape), _view(g, npt.b, npt.b.shape)
    z = alias(code)
    g.record(z, (code,), [], _copy_back, settings.components)
    left = _quadratic_form(g, z, _gram(g, a, shape), settings.components)
    right = _quadratic_form(g, z, _gram(g, b, shape), settings.components)
    return _sum(g, mul(g, left, right, "norms of components"), code.shape[:-1])


def _copy_back(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """Of `z.flatten(0, -3).transpose(0, 1)`: the gradient of several components lies the other way round, a copy."""
    gradient = gradients[0]
    if node.extra == 1:
        return [alias(gradient)]
    copy = g.new(gradient.shape, gradient.dtype, "contiguous copy of grad")
    copy.view = True
    return [copy]


def token_norms(g: Graph, norms: list[Tensor]) -> Tensor:
    """Squared norms of every token's deltas, (...)."""
    total = norms[0]
    for norm in norms[1:]:
        total = add(g, total, norm, "norm of deltas")
    return total


def mean_norm(g: Graph, norms: Tensor) -> Tensor:
    """Mean over tokens of the norms, a scalar."""
    return scale(g, _sum(g, norms, ()), "mean norm")


def _gram(g: Graph, factor: Tensor, shape: Shape) -> Tensor:
    """A^T A or B B^T, for each component. Autocast keeps its cast of a parameter, not that of its transpose."""
    cached = autocast_to(g, factor)
    transposed = cast(g, factor, g.autocast) if g.autocast else factor
    left, right = (transposed, cached) if factor.shape[0] > factor.shape[1] else (cached, transposed)
    saved = g.save(left, right)
    out = g.new(shape, left.dtype, "Gram matrix")
    g.record(out, (left, right), saved, _gram_backward, factor.shape)
    return out


def _gram_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """The gradients of both operands, of which one is the other's transpose; those of components are views."""
    outputs: Gradients = []
    for _operand in range(2):
        gradient = g.new(node.extra, gradients[0].dtype, "grad of operand")
        gradient.view = len(gradients[0].shape) > 2
        outputs.append(gradient)
    return outputs


def _quadratic_form(g: Graph, code: Tensor, gram: Tensor, components: int = 1) -> Tensor:
    """((code @ gram) * code).sum(-1)"""
    wide = code
    gram = autocast_to(g, gram)
    projected = _contract(g, autocast_to(g, code), gram, code.shape, "code times Gram matrix")
    product = mul(g, projected, wide, "norm of delta")
    del projected
    tokens = code.shape[:-1]
    return _sum(g, product, tokens if components == 1 else (*tokens, components))


def modulated(g: Graph, layer: Linear, x: Tensor, npt: NptModulator, code: Tensor, settings: Npt) -> Tensor:
    """layer(x) + delta(x, a)."""
    run = _materialised if settings.form == "materialised" else _factored
    return run(g, npt, x, code, linear(g, x, layer), settings)


def _product(g: Graph, x: Tensor, weight: Tensor, columns: int, name: str) -> Tensor:
    """`x @ weight` of (..., k) and (k, columns)."""
    weight = autocast_to(g, weight)
    x = autocast_to(g, x)
    saved = (
        g.save(x if weight.needs_grad else None, weight if x.needs_grad else None)
        if g.needs(x, weight)
        else None
    )
    out = g.new((*x.shape[:-1], columns), x.dtype, name)
    if saved is not None:
        g.record(out, (x, weight), saved, _product_backward, (x.shape, weight.shape))
    return out


def _product_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """The product is of the folded matrix, and so the gradient of `x` a view, which no other is added to in place."""
    outputs = product_backward(g, node, gradients, saved)
    if outputs[0] is not None:
        outputs[0].view = len(node.extra[0]) > 2
    return outputs


def _factored(g: Graph, npt: NptModulator, x: Tensor, code: Tensor, out: Tensor, settings: Npt) -> Tensor:
    """addmm(out, u, B): no tensor larger than the layer's output."""
    read = _product(g, x, cast(g, npt.a, x.dtype), npt.a.shape[1], "low-rank input")
    if npt.bias is not None:
        read = add(g, read, npt.bias, "low-rank input with bias")
    u = cast(g, _modulate(g, read, code, settings), out.dtype)
    del read
    b = autocast_to(g, cast(g, npt.b, out.dtype))
    low_u, low_out = autocast_to(g, u), autocast_to(g, out)
    saved = g.save(b, low_u)
    result = g.new(out.shape, low_out.dtype, "with delta")
    g.record(result, (low_out, low_u, b), saved, _addmm_backward, (u.shape, b.shape))
    return result


def _addmm_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    shape_u, shape_b = node.extra
    gradient = gradients[0]
    g.claim_workspace()
    grad_u = g.new(shape_u, gradient.dtype, "grad of operand")
    grad_b = g.new(shape_b, gradient.dtype, "grad of operand")
    return [gradient if node.edges[0] is not None else None, grad_u, grad_b]


def _modulate(g: Graph, read: Tensor, code: Tensor, settings: Npt) -> Tensor:
    """read * code, or for each component <read, z> z."""
    if settings.variant != "outer":
        return mul(g, read, code, "modulated input")
    shape = (*code.shape[:-1], settings.components, settings.rank)
    z = reshape(g, code, shape)
    product = mul(g, z, reshape(g, read, (*read.shape[:-1], *shape[-2:])), "product of readings")
    c = _sum(g, product, (*shape[:-1], 1))
    del product
    return reshape(g, mul(g, c, z, "modulated input"), code.shape)


def _sum(g: Graph, x: Tensor, shape: Shape) -> Tensor:
    """A sum to `shape`; backward expands the gradient, a view."""
    out = g.new(shape, x.dtype, "sum")
    if g.needs(x):
        g.record(out, (x,), [], _expand, x.shape)
    return out


def _expand(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.extra)]


def _materialised(g: Graph, npt: NptModulator, x: Tensor, code: Tensor, out: Tensor, settings: Npt) -> Tensor:
    """The weight delta of every token, (B, S, d, f), applied to it."""
    dtype, width = out.dtype, npt.b.shape[1]
    if settings.variant != "outer":
        delta = _diagonal_product(g, npt, code, dtype)
    else:
        delta = _outer_product(g, npt, code, dtype, settings)
    applied = _apply_delta(g, cast(g, x, dtype), delta, (*x.shape[:-1], width))
    if npt.bias is None:
        return add(g, out, applied, "with delta")
    features = cast(g, _modulate(g, npt.bias, code, settings), dtype)
    delta_bias = _product(g, features, cast(g, npt.b, dtype), width, "bias delta")
    result = add(g, out, applied, "with delta of weight")
    return add(g, result, delta_bias, "with delta")


def _diagonal_product(g: Graph, npt: NptModulator, code: Tensor, dtype: str) -> Tensor:
    """(A * code) B"""
    a = cast(g, npt.a, dtype)
    scaled = mul(g, a, _view(g, cast(g, code, dtype), (*code.shape[:-1], 1, code.shape[-1])), "scaled A")
    return _product(g, scaled, cast(g, npt.b, dtype), npt.b.shape[1], "weight delta")


def _outer_product(g: Graph, npt: NptModulator, code: Tensor, dtype: str, settings: Npt) -> Tensor:
    """sum_j (A_j z_j^T) (z_j B_j): vectors of d and of f for each component, and their product."""
    assert npt.c is not None
    tokens, k = code.shape[:-1], settings.components
    z = cast(g, code, dtype)
    d, f = npt.a.shape[0], npt.b.shape[1]
    a, b = cast(g, npt.a, dtype), cast(g, npt.b, dtype)
    left = _contract(g, z, a, (*tokens, d, k), "vectors of x")
    right = _contract(g, z, b, (*tokens, k, f), "vectors of the output")
    return _contract(g, left, right, (*tokens, d, f), "weight delta")


def _contract(g: Graph, x: Tensor, y: Tensor, shape: Shape, name: str) -> Tensor:
    """A batched product of two operands."""
    saved = g.save(x, y)
    out = g.new(shape, x.dtype, name)
    g.record(out, (x, y), saved, product_backward, (x.shape, y.shape))
    return out


def _view(g: Graph, x: Tensor, shape: Shape) -> Tensor:
    out = alias(x, shape)
    if g.needs(x):
        g.record(out, (x,), [], _view_back, x.shape)
    return out


def _view_back(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.extra)]


def _apply_delta(g: Graph, x: Tensor, delta: Tensor, shape: Shape) -> Tensor:
    delta, x = autocast_to(g, delta), autocast_to(g, x)
    saved = g.save(x, delta if x.needs_grad else None)
    out = g.new(shape, promote(x.dtype, delta.dtype), "delta of output")
    g.record(out, (x, delta), saved, product_backward, (x.shape, delta.shape))
    return out
