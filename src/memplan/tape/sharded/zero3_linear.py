"""
The linear layer that ZeRO's stage 3 puts in the place of torch's (deepspeed/runtime/zero/linear.py of 0.19.8): its
graph keeps the parameter and no view of its memory, which can so be freed after forward, and always keeps the input.
"""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.tensors import Gradients, Node, Tensor


def matmul(g: Graph, x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """LinearFunctionForZeroStage3.forward: x (..., in) times a weight (out, in): (..., out)."""
    g.claim_workspace()
    out = g.new((*x.shape[:-1], out_features), x.dtype, "output")
    if g.needs(x, weight, bias):
        inputs = (x, weight) if bias is None else (x, weight, bias)
        g.record(out, inputs, [x, weight, bias], _backward, (x.shape, weight.shape))
    return out


def _backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """
    The input's gradient, the weight's, and the bias's as a sum of its own. Rows of several sequences whose channels are
    strided are copied for each product.
    """
    gradient = gradients[0]
    x_shape, weight_shape = node.extra
    g.claim_workspace()
    outputs: Gradients = []
    for edge, shape in zip(node.edges, (x_shape, weight_shape, weight_shape[:1])):
        copy = None
        if edge is not None and gradient.columns and x_shape[0] > 1 and len(shape) > 1:
            copy = g.new(gradient.shape, gradient.dtype, "contiguous copy of grad", "workspace")
        outputs.append(None if edge is None else g.new(shape, gradient.dtype, "grad of linear layer"))
        del copy
    return outputs
