"""
Rows of frozen embeddings that train beside adapters (peft/tuners/trainable_tokens/layer.py, TrainableTokensLayer).

At every use the whole matrix is copied with the trained rows in their places (`index_copy`), and its gradient is as
large as the matrix before the rows are taken out of it.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.tape.graph import Graph
from memplan.tape.ops import cast
from memplan.tape.tensors import Gradients, Node, Parameter, Tensor


class TokenRows(NamedTuple):
    """The trained rows of `weight`, and a copy of what they were, which peft keeps."""

    weight: Parameter
    trained: Parameter
    original: Tensor


def merged(g: Graph, rows: TokenRows) -> Tensor:
    """The matrix with the trained rows in it; `index_copy` keeps its source, though it needs no more than its shape."""
    index = g.new((rows.trained.shape[0],), "int64", "ids of trained tokens", "inputs")
    source = cast(g, rows.trained, rows.weight.dtype)
    out = g.new(rows.weight.shape, rows.weight.dtype, "weight with trained rows")
    if g.needs(source):
        g.record(out, (source,), [index, source], _backward, source.shape)
    return out


def _backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """`index_select` of the gradient, expanded to the shape it has: a view."""
    out = g.new(node.extra, gradients[0].dtype, "grad of trained rows")
    out.view = True
    return [out]
