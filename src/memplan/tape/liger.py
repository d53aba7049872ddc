"""
Liger's norm, rotary positions and gated activation (liger-kernel 0.8.5, ops/{rms_norm,rope,swiglu}.py), as
`use_liger_kernel` of transformers' Trainer puts them into a model. They save what they read, and write their gradients
over it. Its head and loss are in kernels.py.
"""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.modules import hooked
from memplan.tape.multiprocessors import FULL_CHIPS
from memplan.tape.ops import alias
from memplan.tape.tensors import Gradients, Node, Tensor

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose blocks are planned with them (transformers/monkey_patch.py)."""


@hooked
def liger_rms_norm(g: Graph, x: Tensor, weight: Tensor) -> Tensor:
    """
    LigerRMSNormFunction: saves x and a float32 per row. Backward writes over the gradient it is given; that of the
    weight is a row for each multiprocessor, in float32, added up.
    """
    out = g.new(x.shape, x.dtype, "output")
    rows = g.new(x.shape[:-1], "float32", "reciprocal root mean square")
    if g.needs(x, weight):
        g.record(out, (x, weight), [rows, weight, x], _norm_backward)  # the last goes first
    return out


def _norm_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    weight = saved[1]
    assert weight is not None
    gradient = None
    if node.edges[1] is not None:
        width = weight.shape[0]
        most = FULL_CHIPS.get(g.target.compute_capability, max(FULL_CHIPS.values()))
        parts = g.new((most, width), "float32", "parts of the weight's grad")
        gradient = g.new((width,), "float32", "grad of weight")
        if weight.dtype != "float32":
            gradient = g.new((width,), weight.dtype, "grad of weight")
        del parts
    return [alias(gradients[0]), gradient]


def liger_rotary(g: Graph, x: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    """LigerRopeFunction of (B, H, S, D): written over x, and over the gradient in backward; saves the table."""
    out = alias(x)
    if g.needs(x):
        g.record(out, (x,), list(reversed(table)), _rotary_backward)
    return out


def _rotary_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    return [alias(gradients[0])]


def liger_gate(g: Graph, gate: Tensor, up: Tensor) -> Tensor:
    """LigerSiLUMulFunction: silu(gate) * up. Backward writes both gradients over what was saved."""
    out = g.new(gate.shape, gate.dtype, "gated")
    if g.needs(gate, up):
        g.record(out, (gate, up), [up, gate], _gate_backward)
    return out


def _gate_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    up, gate = saved
    assert gate is not None and up is not None
    return [alias(gate), alias(up)]
