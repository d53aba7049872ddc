"""
Operations of a mixture of experts: choosing them, gathering rows, products grouped by expert, adapters on stacks.

None of their sizes depends on which expert a token is sent to: transformers 5 sorts the tokens of all experts into
one tensor of `tokens x experts per token` rows and multiplies it in groups (`grouped_mm`, its default:
integrations/moe.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memplan.tape import scratch
from memplan.tape.graph import Graph
from memplan.tape.linear import autocast_to
from memplan.tape.ops import alias, cast
from memplan.tape.products import product_backward
from memplan.tape.tensors import ITEMSIZE, Gradients, Node, Parameter, Shape, Tensor


class StackAdapter(NamedTuple):
    """LoRA on a stacked parameter (E, out, in), for all experts together: A (E*r, in), B (out, E*r)."""

    a: Parameter
    b: Parameter
    scaling: float


@dataclass
class Stack:
    """A router's weight (E, d) or the weights of all experts (E, out, in), with their adapter if they have one."""

    name: str
    weight: Parameter
    adapter: StackAdapter | None = None

    @property
    def parameters(self) -> list[Parameter]:
        """The weight, and those of its adapter."""
        return [self.weight, *([] if self.adapter is None else [self.adapter.a, self.adapter.b])]


def top_k(g: Graph, probabilities: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` over (N, E): values and int64 indices (N, count); saves the indices."""
    shape = (probabilities.shape[0], count)
    values = g.new(shape, probabilities.dtype, "weights of chosen experts")
    indices = g.new(shape, "int64", "chosen experts")
    if g.needs(probabilities):
        g.record(values, (probabilities,), [indices], _top_k_backward, probabilities.shape)
    return values, indices


def _top_k_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """value_selecting_reduction_backward: scattered into zeros."""
    return [g.new(node.extra, gradients[0].dtype, "grad of probabilities")]


def normalized(g: Graph, weights: Tensor) -> Tensor:
    """`weights /= weights.sum(-1, keepdim=True)`: in place, with a copy of what it was for backward."""
    rows = (*weights.shape[:-1], 1)
    total = g.new(rows, weights.dtype, "sum of weights")
    if g.needs(weights):
        g.record(total, (weights,), [], _expanded_backward, weights.shape)
    if not g.needs(weights):
        return weights
    before = g.new(weights.shape, weights.dtype, "weights before division")
    out = alias(weights)
    g.record(out, (weights, total), [before, total], _division_backward)
    return out


def _expanded_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    """The gradient of a sum is expanded, a view."""
    return [alias(gradients[0], node.extra)]


def _division_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """Of a / b: -grad * ((a / b) / b), summed over the row, and grad / b."""
    gradient = gradients[0]
    quotient = g.new(gradient.shape, gradient.dtype, "quotient")
    twice = g.new(gradient.shape, gradient.dtype, "quotient over divisor")
    negated = g.new(gradient.shape, gradient.dtype, "negated grad")
    divisor = g.new(gradient.shape, gradient.dtype, "grad of divisor")
    del quotient, twice, negated
    return [g.new(gradient.shape, gradient.dtype, "grad of quotient"), divisor]


def sorted_by_expert(g: Graph, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.sort` of (S,) expert ids: sorted ids and the permutation, int64."""
    shape = chosen.shape
    values = g.new(shape, "int64", "sorted expert ids")
    permutation = g.new(shape, "int64", "permutation")
    g.scratch(*scratch.sort(shape[0]), name="sort")
    return values, permutation


def gather_rows(g: Graph, x: Tensor, indices: Tensor, name: str) -> Tensor:
    """`x[indices]` over the first dimension; saves the indices."""
    saved = g.save(indices) if g.needs(x) else None
    out = g.new((indices.shape[0], *x.shape[1:]), x.dtype, name)
    if saved is not None:
        g.record(out, (x,), saved, _gather_backward, x.shape)
    return out


def _gather_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """
    index_put with accumulation into zeros; on CUDA it sorts the indices first.
    """
    indices = saved[0]
    assert indices is not None
    out = g.new(node.extra, gradients[0].dtype, "grad of gathered rows")
    if g.device == "cuda":
        g.scratch(*scratch.index_put_accumulate(indices.shape[0]), name="index_put")
    return [out]


def sum_of_choices(g: Graph, x: Tensor, num_tokens: int) -> Tensor:
    """(N * k, d) viewed as (N, k, d) and summed over k."""
    out = g.new((num_tokens, *x.shape[1:]), x.dtype, "sum over chosen experts")
    if g.needs(x):
        g.record(out, (x,), [], _sum_of_choices_backward, x.shape)
    return out


def _sum_of_choices_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    """Expanded over k, and copied where that is no view of (N * k, d)."""
    gradient = gradients[0]
    if node.extra == gradient.shape:
        return [alias(gradient)]
    return [g.new(node.extra, gradient.dtype, "grad of each choice")]


def halves(g: Graph, x: Tensor) -> tuple[Tensor, Tensor]:
    """`x.chunk(2, -1)`: views; backward writes both gradients into one tensor with `cat`."""
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    first, second = alias(x, shape), alias(x, shape)
    if g.needs(x):
        node = g.record(first, (x,), [], _halves_backward, x.shape)
        second.node, second.slot, second.needs_grad = node, 1, True
    return first, second


def _halves_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of both halves")]


def grouped_product(g: Graph, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """
    `grouped_mm` of rows (S, in) sorted by expert with (E, out, in): (S, out). Not covered by autocast: the rows get
    the weight's dtype. Backward forms the weight's gradient first.
    """
    x = cast(g, x, weight.dtype)
    needed = g.needs(x, weight)
    seen = weight if g.hooks is None else alias(weight)  # its transpose, which keeps what is gathered
    wanted = [x if weight.needs_grad else None, offsets, seen if x.needs_grad else None]
    del seen
    saved = g.save(*wanted) if needed else None
    out = g.new((x.shape[0], weight.shape[1]), x.dtype, "output of experts")
    if saved is not None:
        g.record(out, (x, weight), saved, product_backward, (x.shape, weight.shape))
    return out


def masked_rows(g: Graph, x: Tensor, mask: Tensor, *, in_place: bool) -> Tensor:
    """`x.masked_fill(mask, 0)` of rows (S, n) by a mask (S,), which backward needs."""
    saved = g.save(mask) if g.needs(x) else None
    out = alias(x) if in_place else g.new(x.shape, x.dtype, "masked rows")
    if saved is not None:
        g.record(out, (x,), saved, _masked_backward)
    return out


def _masked_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(gradients[0].shape, gradients[0].dtype, "masked grad")]


class Folded:
    """
    A stack whose adapter is folded into it for one pass: peft's ParamWrapper registers a parametrization, whose check
    computes the folded weight once and drops it; the first use computes it again, and it is kept until the pass ends.
    """

    def __init__(self, g: Graph, stack: Stack, *, multiplied_out: bool = False) -> None:
        """`multiplied_out`: as `Behaviour.expert_deltas`; a 2-D weight's adapter always is."""
        self.g = g
        self.stack = stack
        self.kept: Tensor | None = None
        self.factors: list[Tensor] = []
        adapter = stack.adapter
        if adapter is None:
            return
        if len(stack.weight.shape) == 2:
            self.factors = [_delta(g, stack, adapter.b, adapter.a)]
        elif multiplied_out:
            self.factors = [_delta(g, stack, *_viewed_factors(g, stack, adapter))]
        else:
            self.factors = list(_factors(g, stack, adapter))
        with g.no_grad():
            self._fold()

    def weight(self) -> Tensor:
        """The weight as the experts see it."""
        if self.stack.adapter is None:
            return self.stack.weight
        if self.kept is None:
            self.kept = self._fold()
        return self.kept

    def drop_factors(self) -> None:
        """The parametrization is removed."""
        while self.factors:
            self.factors.pop(0)

    def drop_weight(self) -> None:
        """The cache of folded weights is emptied."""
        self.kept = None

    def _fold(self) -> Tensor:
        g, weight = self.g, self.stack.weight
        if len(self.factors) == 1:
            delta = self.factors[0]
            out = g.new(weight.shape, weight.dtype, f"{self.stack.name} with adapter")
            if g.needs(delta):
                g.record(out, (weight, delta), [], _sum_backward)
            return out
        left, right = self.factors
        assert self.stack.adapter is not None
        saved = g.save(right, left) if g.needs(left, right) else None
        out = g.new(weight.shape, weight.dtype, f"{self.stack.name} with adapter")
        _copy_for_product(g, left)
        if saved is not None:
            unscaled = self.stack.adapter.scaling == 1
            g.record(out, (left, right), saved, _fold_backward, unscaled)
        return out


def _delta(g: Graph, stack: Stack, left: Tensor, right: Tensor) -> Tensor:
    """get_delta_weight: (B @ A) * scaling of a 2-D weight, or by an einsum of a batch of them. Autocast sees both."""
    right = autocast_to(g, right)
    left = autocast_to(g, left)
    saved = g.save(right, left) if g.needs(left, right) else None
    product = g.new(stack.weight.shape, right.dtype, "product of factors")
    if len(left.shape) == 3:
        _copy_for_product(g, left)
    if saved is not None:
        g.record(product, (left, right), saved, _delta_backward, None)
    del left, right
    scaled = g.new(product.shape, product.dtype, "scaled product of factors")
    if g.needs(product):
        g.record(scaled, (product,), [], _scaled_backward)
    del product
    return cast(g, scaled, stack.weight.dtype)


def _delta_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """The gradient of the right factor first."""
    gradient = gradients[0]
    right, left = saved
    assert left is not None and right is not None
    grad_right = g.new(right.shape, gradient.dtype, "grad of right factor")
    if len(left.shape) == 3:
        _copy_for_product(g, left)
    return [g.new(left.shape, gradient.dtype, "grad of left factor"), grad_right]


def _factors(g: Graph, stack: Stack, adapter: StackAdapter) -> tuple[Tensor, Tensor]:
    """ParamWrapper.get_delta_factors: those of `_viewed_factors`, in the dtype of the weight."""
    left, right = _viewed_factors(g, stack, adapter)
    return cast(g, left, stack.weight.dtype), cast(g, right, stack.weight.dtype)


def _viewed_factors(g: Graph, stack: Stack, adapter: StackAdapter) -> tuple[Tensor, Tensor]:
    """B as (E, out, r) and A as (E, r, in)."""
    num_experts, out_features, in_features = stack.weight.shape
    rank = adapter.a.shape[0] // num_experts
    right = _viewed(g, adapter.a, (num_experts, rank, in_features), copied=False)
    left = _viewed(g, adapter.b, (num_experts, out_features, rank), copied=True)
    return left, right


def _viewed(g: Graph, parameter: Parameter, shape: Shape, *, copied: bool) -> Tensor:
    """A view; `copied`: of another order, so that backward's view of the gradient is a copy."""
    out = alias(parameter, shape)
    if g.needs(parameter):
        g.record(out, (parameter,), [], _viewed_backward, (parameter.shape, copied))
    return out


def _viewed_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    shape, copied = node.extra
    return [g.new(shape, gradients[0].dtype, "grad of factor") if copied else alias(gradients[0], shape)]


def _copy_for_product(g: Graph, left: Tensor) -> None:
    """B's rows and columns are both strided, which no library takes: a copy for the product."""
    num_experts, rows, columns = left.shape
    strides = (1, columns * num_experts, num_experts)
    g.scratch(*scratch.batched_operand(left.shape, strides, ITEMSIZE[left.dtype]), name="batched product")


def _sum_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [gradients[0] if edge is not None else None for edge in node.edges]


def _scaled_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [g.new(gradients[0].shape, gradients[0].dtype, "scaled grad")]


def _fold_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """baddbmm: the product of each factor's gradient, scaled into another tensor unless the scale is 1."""
    right, left = saved
    assert left is not None and right is not None
    outputs: Gradients = []
    for factor, name in ((left, "left"), (right, "right")):
        product = g.new(factor.shape, factor.dtype, f"grad of {name} factor")
        if factor is right:
            _copy_for_product(g, left)
        if not node.extra:
            product = g.new(factor.shape, factor.dtype, f"scaled grad of {name} factor")
        outputs.append(product)
        del product
    return outputs
