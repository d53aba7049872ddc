"""
A training step of NPT layers: every converted block computes its teacher and its student from one attention output,
and runs its backward before it returns. Mirrors memplan.npt.block line by line.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.job.spec import Job
from memplan.tape.attention import product_backward
from memplan.tape.engine import Gradients, Graph, Node, Tensor
from memplan.tape.linear import autocast_to, linear
from memplan.tape.model import Block, Model, NptModulator
from memplan.tape.ops import (
    add,
    alias,
    cast,
    dropout,
    layer_norm,
    mul,
    promote,
    rms_norm,
    scale,
    unary_saving_output,
)
from memplan.tape.programs import Settings, activation, decoder, gated_mlp, gpt2_mlp


def local_step(g: Graph, model: Model, ids: Tensor, job: Job, settings: Settings) -> None:
    """The decoder without gradients, whose converted blocks train themselves; no head, no logits."""
    settings.npt_block = lambda block, hidden, attend: _local_block(g, model, block, hidden, job, attend)
    with g.no_grad():
        decoder(g, model, ids, settings)


def _norm(g: Graph, model: Model, block: Block, which: int, x: Tensor) -> Tensor:
    if model.architecture.family == "gpt2":
        name = f"ln_{which}"
        with g.module(name):
            return layer_norm(g, x, block.norms[f"{name}.weight"], block.norms[f"{name}.bias"])
    name = "input_layernorm" if which == 1 else "post_attention_layernorm"
    with g.module(name):
        return rms_norm(g, x, block.norms[f"{name}.weight"])


def _local_block(
    g: Graph, model: Model, block: Block, h: Tensor, job: Job, attend: Callable[[Tensor], Tensor]
) -> Tensor:
    assert block.npt is not None
    a = attend(_norm(g, model, block, 1, h))
    residual = add(g, h, a, "residual")
    normed = _norm(g, model, block, 2, residual)
    branch = (
        gpt2_mlp(g, model, block, normed)
        if model.architecture.family == "gpt2"
        else gated_mlp(g, block, normed)
    )
    del normed
    target = add(g, a, branch, "target")
    out = add(g, residual, branch, "residual stream")
    x = _norm(g, model, block, 2, h)
    del residual, branch
    outer, g.grad_enabled = g.grad_enabled, True
    with g.module("np"):
        loss = _student(g, model, block, block.npt, a, x, target, job)
    del a, x, target
    g.backward(loss)
    g.grad_enabled = outer
    return out


def _student(
    g: Graph, model: Model, block: Block, npt: NptModulator, a: Tensor, x: Tensor, target: Tensor, job: Job
) -> Tensor:
    m = _encode(g, npt, a)
    norms = _squared_norm(g, npt, m)
    y = _student_mlp(g, model, block, npt, x, m, job.npt.form)
    equivalence = _equivalence_loss(g, y, target)
    _mean_square(g, target)
    del norms
    return equivalence


def _product(g: Graph, x: Tensor, weight: Tensor, columns: int, name: str) -> Tensor:
    """`x @ weight` of (..., k) and (k, columns)."""
    x, weight = autocast_to(g, x), autocast_to(g, weight)
    saved = (
        g.save(x if weight.needs_grad else None, weight if x.needs_grad else None)
        if g.needs(x, weight)
        else None
    )
    out = g.new((*x.shape[:-1], columns), x.dtype, name)
    if saved is not None:
        g.record(out, (x, weight), saved, product_backward, (x.shape, weight.shape))
    return out


def _encode(g: Graph, npt: NptModulator, a: Tensor) -> Tensor:
    """m(a) = scale * tanh(a @ A), (..., r) in float32."""
    z = _product(g, a, cast(g, npt.a, a.dtype), npt.a.shape[1], "z")
    return scale(g, unary_saving_output(g, cast(g, z, "float32"), "tanh"), "modulation")


def _squared_norm(g: Graph, npt: NptModulator, m: Tensor) -> Tensor:
    """
    Squared Frobenius norm of every token's delta, by Gram matrices of r * r elements. Its graph keeps `m @ gram` until
    the block's backward; the rest is smaller than that.
    """
    rank = npt.a.shape[1]
    gram = g.new((rank, rank), "float32", "Gram matrix")
    projected = g.new(m.shape, "float32", "norm of delta")
    del gram
    product = g.new(m.shape, "float32", "norm of delta")
    norms = g.new(m.shape[:-1], "float32", "norm of delta")
    del product, norms
    return projected


def _student_mlp(
    g: Graph, model: Model, block: Block, npt: NptModulator, x: Tensor, m: Tensor, form: str
) -> Tensor:
    gpt2 = model.architecture.family == "gpt2"
    first = block.linears["mlp.c_fc" if gpt2 else "mlp.gate_proj"]
    gate = linear(g, x, first)
    if form == "materialised":
        pre = _materialised(g, npt, x, m, gate)
    else:
        pre = _factored(g, npt, x, m, gate)
    del gate
    if gpt2:
        pre = activation(g, pre, model.architecture.hidden_act)
        pre = linear(g, pre, block.linears["mlp.c_proj"])
        return dropout(g, pre, model.architecture.residual_dropout)
    act = activation(g, pre, "silu")
    gated = mul(g, act, linear(g, x, block.linears["mlp.up_proj"]), "gated")
    del act, pre
    return linear(g, gated, block.linears["mlp.down_proj"])


def _factored(g: Graph, npt: NptModulator, x: Tensor, m: Tensor, gate: Tensor) -> Tensor:
    """addmm(gate, (x @ A) * m, B): no tensor larger than the gate."""
    rank, width = npt.b.shape
    v = _product(g, x, cast(g, npt.a, x.dtype), rank, "low-rank input")
    u = cast(g, mul(g, v, m, "modulated input"), gate.dtype)
    b = cast(g, npt.b, gate.dtype)
    saved = g.save(u, b)
    out = g.new(gate.shape, gate.dtype, "modulated gate")
    g.record(out, (u, b), saved, product_backward, (u.shape, b.shape))
    return out


def _materialised(g: Graph, npt: NptModulator, x: Tensor, m: Tensor, gate: Tensor) -> Tensor:
    """The weight delta of every token, (B, S, d, f), applied to it."""
    rank, width = npt.b.shape
    scaled = mul(g, cast(g, npt.a, gate.dtype), _expanded(g, cast(g, m, gate.dtype)), "scaled A")
    delta = _product(g, scaled, cast(g, npt.b, gate.dtype), width, "weight delta")
    applied = _apply_delta(g, x, delta, (*x.shape[:-1], width))
    return add(g, gate, applied, "modulated gate")


def _expanded(g: Graph, m: Tensor) -> Tensor:
    """`m.unsqueeze(-2)`, a view."""
    out = alias(m, (*m.shape[:-1], 1, m.shape[-1]))
    if g.needs(m):
        g.record(out, (m,), [], _squeezed, m.shape)
    return out


def _squeezed(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.extra)]


def _apply_delta(g: Graph, x: Tensor, delta: Tensor, shape: tuple[int, ...]) -> Tensor:
    saved = g.save(x)
    out = g.new(shape, promote(x.dtype, delta.dtype), "delta of gate")
    g.record(out, (delta,), saved, _apply_delta_backward, delta.shape)
    return out


def _apply_delta_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of weight delta")]


def _equivalence_loss(g: Graph, y: Tensor, target: Tensor) -> Tensor:
    """EquivalenceLoss: the error is saved; its mean square goes through one norm per row."""
    error = g.new(y.shape, y.dtype, "error")
    loss = _mean_square(g, error)
    g.record(loss, (y,), [error], _equivalence_backward)
    return loss


def _mean_square(g: Graph, x: Tensor) -> Tensor:
    norms = g.new(x.shape[:-1], "float32", "row norms")
    squares = g.new(x.shape[:-1], "float32", "row norms")
    del norms
    total = g.new((), "float32", "mean square")
    del squares
    return total


def _equivalence_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    error = saved[0]
    assert error is not None
    product = g.new(error.shape, "float32", "grad of output in float32")
    if error.dtype == "float32":
        return [product]
    return [g.new(error.shape, error.dtype, "grad of output")]
