"""
A training step of NPT layers: every converted block computes its teacher and its student from one attention output,
and runs its backward before it returns. Mirrors memplan.npt.block line by line.
"""

from __future__ import annotations

from dataclasses import replace

from memplan.job.spec import Job, Npt
from memplan.tape.engine import backward
from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.linear_layer import Linear
from memplan.tape.loss import evaluation_loss
from memplan.tape.norms import layer_norm, rms_norm
from memplan.tape.npt_delta import encode, mean_norm, modulated, squared_norm, token_norms
from memplan.tape.npt_loss import logits_divergence
from memplan.tape.ops import add, alias, dropout, mul, scale
from memplan.tape.parts import Block, Model, NptModulator
from memplan.tape.programs import Settings, decoder
from memplan.tape.programs.blocks import Attend
from memplan.tape.programs.gpt2 import gpt2_mlp
from memplan.tape.programs.layers import activation, gated_mlp
from memplan.tape.sharded.sharding import whole_root
from memplan.tape.tensors import Gradients, Node, Tensor


def local_step(g: Graph, model: Model, ids: Tensor, job: Job, settings: Settings) -> Tensor:
    """The decoder without gradients, whose converted blocks train themselves: last hidden states, no head."""
    metrics = settings.npt_metrics
    settings.npt_block = lambda block, hidden, attend: _local_block(
        g, model, block, hidden, job, attend, metrics
    )
    with g.no_grad():
        return decoder(g, model, ids, settings)


def evaluate(
    g: Graph, model: Model, batch: tuple[Tensor, ...], job: Job, settings: Settings, num_converted: int
) -> None:
    """One batch of memplan.train.npt_steps: objective and metrics, and the cross-entropy with blocks off and on."""
    ids, labels = batch
    objective_of_pass = None
    if job.npt.objective == "end_to_end":
        objective_of_pass = end_to_end_step(g, model, ids, job, settings, "evaluation", num_converted)
    g.begin("evaluation of blocks")
    measured = replace(job, npt=replace(job.npt, stream="teacher"))
    settings.npt_block = lambda block, hidden, attend: _local_block(
        g, model, block, hidden, measured, attend, settings.npt_metrics, trains=False
    )
    with whole_root(g):
        hidden = decoder(g, model, ids, settings)
        g.leave_autocast()
        del hidden
    metrics = read_metrics(g, num_converted)
    del objective_of_pass, metrics
    for mode in ("base", "npt"):
        g.begin(f"evaluation of {mode}")
        settings.npt_block = None
        if mode == "npt":
            settings.npt_block = lambda block, hidden, attend: _npt_block(
                g, model, block, hidden, job, attend, None
            )
        with whole_root(g):
            hidden = decoder(g, model, ids, settings)
            loss = evaluation_loss(g, hidden, model.head, labels)
            g.leave_autocast()
            del hidden, loss


def end_to_end_step(
    g: Graph, model: Model, ids: Tensor, job: Job, settings: Settings, label: str, num_converted: int
) -> Tensor:
    """memplan.npt.distillation: the base without a graph, the converted model with one, and the loss between them."""
    settings.npt_block = None
    with g.no_grad():
        target = decoder(g, model, ids, settings)
    g.begin(f"student {label}")
    norms: list[tuple[int, Tensor]] = []
    settings.npt_block = lambda block, hidden, attend: _npt_block(g, model, block, hidden, job, attend, norms)
    hidden = decoder(g, model, ids, settings)
    loss = _equivalence_loss(g, hidden, target)
    square = _mean_square(g, target)
    error = _number(g, "relative error")
    del square
    if job.npt.logits_weight:
        loss = _with_divergence(g, loss, logits_divergence(g, hidden, target, model.head))
    norm = _stack(g, [norm for _, norm in norms], num_converted)
    g.begin(f"norms freed {label}")
    norms.reverse()
    while norms:
        g.enter(norms[-1][0])
        norms.pop()
    g.enter(None)
    mean = scale(g, _mean(g, norm), "penalty")
    objective = add(g, loss, mean, "objective")
    del target, hidden, loss, mean
    g.leave_autocast()
    share = scale(g, objective, "share of loss")
    del error, norm, objective
    return share


def _with_divergence(g: Graph, loss: Tensor, divergence: Tensor) -> Tensor:
    """(1 - w) loss + w divergence"""
    loss = scale(g, loss, "weighted loss")
    return add(g, loss, scale(g, divergence, "weighted divergence"), "loss")


def _stack(g: Graph, norms: list[Tensor], count: int) -> Tensor:
    """torch.stack of one number per converted block; backward hands out views."""
    out = g.new((count,), "float32", "norms of deltas", "logits_loss")
    g.record(out, tuple(norms), [], _unstack)
    return out


def _unstack(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], ()) for _edge in node.edges]


def _mean(g: Graph, x: Tensor) -> Tensor:
    out = _number(g, "mean")
    g.record(out, (x,), [], _expand_mean, x.shape)
    return out


def _expand_mean(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """expand, and a division by the number of elements."""
    return [g.new(node.extra, "float32", "grad of norms")]


def _npt_block(
    g: Graph,
    model: Model,
    block: Block,
    h: Tensor,
    job: Job,
    attend: Attend,
    norms: list[tuple[int, Tensor]] | None,
) -> Tensor:
    """Mode `npt` of a block, which adds the mean norm of its deltas to `norms`, if there is such a list."""
    assert block.npt is not None
    a = _attention(g, model, block, h, attend)
    x = _norm(g, model, block, 2, h)
    with g.module("np"):
        modulators = _modulators(block.npt)
        codes = [encode(g, modulator, a) for modulator in modulators]
        if norms is not None:
            norms.append((block.layer, _mean_norm(g, modulators, codes, job.npt)))
        y = _student_mlp(g, model, block, block.npt, x, codes, job.npt)
    return add(g, h, y, "residual stream")


def _attention(g: Graph, model: Model, block: Block, h: Tensor, attend: Attend) -> Tensor:
    """Attn(LN1(h)); eager attention's weights go last."""
    output, weights = attend(_norm(g, model, block, 1, h))
    return output


def _modulators(npt: NptModulator) -> list[NptModulator]:
    return [made for made in (npt, npt.up, npt.down) if made is not None]


def read_metrics(g: Graph, num_blocks: int) -> list[Tensor]:
    """memplan.npt.read_metrics: what is held of one number per converted block."""
    loss, squares = _numbers(g, num_blocks, "losses"), _numbers(g, num_blocks, "mean squares of targets")
    relative_error = _numbers(g, num_blocks, "relative errors")
    norms = _numbers(g, num_blocks, "norms of deltas")
    del squares
    return [norms, relative_error, loss]


def objective(g: Graph, num_blocks: int) -> None:
    """The trainer's mean over blocks of loss and penalty, a number on the host."""
    penalty = _numbers(g, num_blocks, "penalties")
    objectives = _numbers(g, num_blocks, "objectives")
    mean = _number(g, "objective")
    del objectives, mean, penalty


def measured_before(g: Graph, blocks: list[Block], settings: Settings) -> None:
    """What converted blocks hold of a forward pass before the first one on the tape."""
    g.begin("measured")
    for block in blocks:
        if block.npt is not None:
            g.enter(block.layer)
            settings.npt_metrics[block.layer] = [_number(g, "measured") for _ in range(3)]
    g.enter(None)


def _numbers(g: Graph, count: int, name: str) -> Tensor:
    return g.new((count,), "float32", name, "logits_loss")


def _number(g: Graph, name: str) -> Tensor:
    return g.new((), "float32", name, "logits_loss")


def _norm(g: Graph, model: Model, block: Block, which: int, x: Tensor) -> Tensor:
    if model.architecture.family == "gpt2":
        name = f"ln_{which}"
        with g.module(name):
            return layer_norm(g, x, block.norms[f"{name}.weight"], block.norms[f"{name}.bias"])
    name = "input_layernorm" if which == 1 else "post_attention_layernorm"
    with g.module(name):
        return rms_norm(g, x, block.norms[f"{name}.weight"])


def _local_block(
    g: Graph,
    model: Model,
    block: Block,
    h: Tensor,
    job: Job,
    attend: Attend,
    metrics: dict[int, list[Tensor]],
    *,
    trains: bool = True,
) -> Tensor:
    """`metrics` keeps what a block measured until it measures again. Not `trains`: it only measures."""
    assert block.npt is not None
    a = _attention(g, model, block, h, attend)
    residual = add(g, h, a, "residual")
    normed = _norm(g, model, block, 2, residual)
    branch = (
        gpt2_mlp(g, model, block, normed)
        if model.architecture.family == "gpt2"
        else gated_mlp(g, block, normed)
    )
    del normed
    target = add(g, a, branch, "target")
    out = add(g, residual, branch, "residual stream") if job.npt.stream != "student" else None
    x = _norm(g, model, block, 2, h)
    del residual, branch
    outer, g.grad_enabled = g.grad_enabled, trains
    with g.module("np"):
        modulators = _modulators(block.npt)
        codes = [encode(g, modulator, a) for modulator in modulators]
        norm = _mean_norm(g, modulators, codes, job.npt)
        y = _student_mlp(g, model, block, block.npt, x, codes, job.npt)
        equivalence = _equivalence_loss(g, y, target)
        target_square = _mean_square(g, target)
        if out is None:
            out = g.new(y.shape, y.dtype, "residual stream")
        del a, x, y, target
        loss = add(g, equivalence, scale(g, norm), "loss")
        scaled_loss = scale(g, loss)
    metrics[block.layer] = [norm, target_square, equivalence]
    if trains:
        backward(g, scaled_loss)
    g.grad_enabled = outer
    return out


def _mean_norm(g: Graph, modulators: list[NptModulator], codes: list[Tensor], settings: Npt) -> Tensor:
    norms = token_norms(
        g, [squared_norm(g, modulator, code, settings) for modulator, code in zip(modulators, codes)]
    )
    outer_category, g.category = g.category, "logits_loss"
    norm = mean_norm(g, norms)
    g.category = outer_category
    return norm


def _student_mlp(
    g: Graph, model: Model, block: Block, npt: NptModulator, x: Tensor, codes: list[Tensor], settings: Npt
) -> Tensor:
    if model.architecture.family == "gpt2":
        pre = modulated(g, block.linears["mlp.c_fc"], x, npt, codes[0], settings)
        act = activation(g, pre, model.architecture.hidden_act)
        last = _last(g, block.linears["mlp.c_proj"], act, npt, codes, settings)
        return dropout(g, last, model.architecture.residual_dropout)
    pre = modulated(g, block.linears["mlp.gate_proj"], x, npt, codes[0], settings)
    act = activation(g, pre, "silu")
    up = block.linears["mlp.up_proj"]
    raised = linear(g, x, up) if npt.up is None else modulated(g, up, x, npt.up, codes[1], settings)
    gated = mul(g, act, raised, "gated")
    del act, pre, raised
    return _last(g, block.linears["mlp.down_proj"], gated, npt, codes, settings)


def _last(
    g: Graph, layer: Linear, x: Tensor, npt: NptModulator, codes: list[Tensor], settings: Npt
) -> Tensor:
    return linear(g, x, layer) if npt.down is None else modulated(g, layer, x, npt.down, codes[-1], settings)


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
    total = g.new((), "float32", "sum of squares")
    del squares
    mean = _number(g, "mean square")
    del total
    return mean


def _equivalence_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    error = saved[0]
    assert error is not None
    doubled = g.new((), "float32", "twice the grad")
    coefficient = g.new((), "float32", "coefficient")
    del doubled
    product = g.new(error.shape, "float32", "grad of output in float32")
    if error.dtype != "float32":
        product = g.new(error.shape, error.dtype, "grad of output")
    del coefficient
    return [product]
