"""
Kernels that replace operations of transformers: Triton's for the loss, norms and rotary positions, as Unsloth
wrote them and others copied, and Liger's fused head and loss.

They save little and write results and gradients over their arguments. (fms-acceleration,
plugins/fused-ops-and-kernels/src/fms_acceleration_foak/{kernels/unsloth,fused_ops/liger_ce};
linkedin/Liger-Kernel, src/liger_kernel/ops/fused_linear_cross_entropy.py)
"""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.linear import autocast_to
from memplan.tape.linear_layer import Linear
from memplan.tape.loss import drop_last_position, shifted_labels
from memplan.tape.modules import hooked
from memplan.tape.ops import alias
from memplan.tape.scratch import cast_to_sum
from memplan.tape.tensors import Gradients, Node, Tensor

MAX_FUSED_SIZE = 65536
"""Widest row that one Triton program reads; wider vocabularies go in parts of it."""


def triton_cross_entropy(g: Graph, logits: Tensor, labels: Tensor) -> Tensor:
    """Fast_CrossEntropyLoss over (N, V): saves the logits; backward writes their gradient over them."""
    num_rows, vocabulary = logits.shape
    parts = -(-vocabulary // MAX_FUSED_SIZE)
    losses = g.new((num_rows,), "float32", "losses")
    log_sum_exp = g.new((num_rows, parts), "float32", "log-sum-exp of parts")
    if parts > 1:
        log_sum_exp = g.new((num_rows,), "float32", "log-sum-exp")
    if g.needs(logits):
        g.record(losses, (logits,), [logits, log_sum_exp, labels], _triton_cross_entropy_backward)
    total = g.new((), "float32", "sum of losses")
    if g.needs(losses):
        g.record(total, (losses,), [], _expand_backward)
    loss = g.new((), "float32", "loss")
    if g.needs(total):
        g.record(loss, (total,), [], _same_backward)
    return loss


def _expand_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """The gradient of a sum is expanded, a view."""
    return [alias(gradients[0], node.metadata[0][0])]


def _same_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [gradients[0]]


def _triton_cross_entropy_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    assert saved[0] is not None
    return [alias(saved[0])]


@hooked
def triton_rms_norm(g: Graph, x: Tensor, weight: Tensor) -> Tensor:
    """Fast_RMS_Layernorm: saves x and a float32 per row; backward writes over the gradient it is given."""
    out = g.new(x.shape, x.dtype, "output")
    rows = g.new((*x.shape[:-1], 1), "float32", "reciprocal root mean square")
    if g.needs(x):
        g.record(out, (x,), [x, weight, rows], _overwritten_backward)
    return out


def triton_rotary(g: Graph, x: Tensor) -> Tensor:
    """Fast_RoPE_Embedding of (B, H, S, D): written over x, and over the gradient in backward."""
    out = alias(x)
    if g.needs(x):
        g.record(out, (x,), [], _overwritten_backward)
    return out


def _overwritten_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [alias(gradients[0])]


def liger_loss(g: Graph, hidden: Tensor, head: Linear, labels: Tensor, *, before_0_5: bool = False) -> Tensor:
    """
    LigerFusedLinearCrossEntropy over (B, S, d): head and loss for a chunk of tokens at a time, their gradients
    in forward. A chunk has as many tokens as make its logits about as large as the hidden states, rounded up to a
    power of two.

    As in liger-kernel 0.8.5, on sm80 or newer: one buffer for the logits of all chunks where nothing is cast, and the
    products added to the gradients in place, but for a float32 head's, which goes through one of its size.
    `before_0_5`: as in its first form.
    """
    if before_0_5:
        return _first_liger_loss(g, hidden, head)
    weight = head.current_weight(g)
    shape = hidden.shape
    num_tokens, width = shape[0] * shape[1], shape[2]
    targets = shifted_labels(g, labels)[1]
    grad_hidden = g.new((num_tokens, width), hidden.dtype, "grad of hidden states")
    grad_weight = g.new(weight.shape, weight.dtype, "grad of head") if weight.needs_grad else None
    losses = g.new((num_tokens,), "float32", "losses")
    counted = g.new((num_tokens,), "bool", "targets that count")
    count = g.new((), "int64", "number of targets")
    g.scratch(*cast_to_sum(num_tokens), name="sum")
    del count
    chunk_tokens = min(_chunk_tokens(num_tokens, head.out_features, width), num_tokens)
    dtype = g.autocast or hidden.dtype
    buffer = None
    if not g.autocast and weight.dtype == hidden.dtype:
        buffer = g.new((chunk_tokens, head.out_features), dtype, "logits of a chunk")
    g.claim_workspace()
    for start in range(0, num_tokens, chunk_tokens):
        rows = min(chunk_tokens, num_tokens - start)
        logits = buffer or _cast_logits(g, rows, hidden, weight, dtype)
        if buffer is None:
            low = autocast_to(g, weight)
            part = g.new((rows, width), dtype, "grad of a chunk's hidden states")
            del low, part
        if grad_weight is not None:
            _grad_of_head(g, rows, hidden, grad_weight, dtype)
        del logits
    del buffer
    loss = g.new((), "float32", "loss")
    if g.needs(hidden, weight):
        g.record(loss, (hidden, weight), [grad_hidden, grad_weight], _liger_backward)
    del counted, losses, targets
    return loss


def _scratch_cast(
    g: Graph, tensor: Tensor, dtype: str, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    """Autocast's copy of something that is no leaf, for one product."""
    return None if tensor.dtype == dtype else g.new(shape or tensor.shape, dtype, f"cast to {dtype}")


def _cast_logits(g: Graph, rows: int, hidden: Tensor, weight: Tensor, dtype: str) -> Tensor:
    low_weight = _scratch_cast(g, weight, dtype)
    low_hidden = _scratch_cast(g, hidden, dtype, (rows, hidden.shape[-1]))
    logits = g.new((rows, weight.shape[0]), dtype, "logits of a chunk")
    del low_hidden, low_weight
    return logits


def _grad_of_head(g: Graph, rows: int, hidden: Tensor, grad_weight: Tensor, dtype: str) -> None:
    if dtype == "float32":
        product = g.new(grad_weight.shape, dtype, "product with a chunk's logits")
        del product
    else:
        part = _scratch_cast(g, hidden, dtype, (rows, hidden.shape[-1]))
        del part


def _chunk_tokens(num_tokens: int, vocabulary: int, width: int) -> int:
    return _power_of_two(-(-num_tokens // -(-vocabulary // width)))


def _first_liger_loss(g: Graph, hidden: Tensor, head: Linear) -> Tensor:
    """
    Before 0.5 the hidden states were copied without the last position, and a chunk's logits to float32, back, and once
    more to be scaled.
    """
    weight = head.current_weight(g)
    batch, length, width = hidden.shape
    dtype = g.autocast or hidden.dtype
    shape = (batch, length - 1, width)
    num_tokens = shape[0] * shape[1]
    shifted = drop_last_position(g, hidden, "shifted hidden states")
    weight = autocast_to(g, weight)
    grad_weight = g.new(weight.shape, weight.dtype, "grad of head") if weight.needs_grad else None
    grad_hidden = g.new((num_tokens, width), hidden.dtype, "grad of hidden states")
    losses = g.new((num_tokens,), "float32", "losses")
    chunk_tokens = _chunk_tokens(num_tokens, head.out_features, width)
    logits: Tensor | None = None
    gradient: Tensor | None = None
    fresh: Tensor | None
    for start in range(0, num_tokens, chunk_tokens):
        chunk = (min(chunk_tokens, num_tokens - start), head.out_features)
        fresh = g.new(chunk, dtype, "logits of a chunk")
        logits, fresh = fresh, None
        scores = g.new(chunk, "float32", "logits of a chunk in float32")
        logits = None
        logits = g.new(chunk, dtype, "grad of a chunk's logits")
        del scores
        fresh = g.new(chunk, dtype, "scaled grad of a chunk's logits")
        gradient, fresh = fresh, None
        part = g.new((chunk[0], width), dtype, "grad of a chunk's hidden states")
        del part
    loss = g.new((), "float32", "loss")
    del losses, logits, gradient
    if g.needs(shifted, weight):
        g.record(loss, (shifted, weight), [grad_hidden, grad_weight], _liger_backward)
    del shifted
    return loss


def _power_of_two(value: int) -> int:
    """The next power of two, as triton.next_power_of_2."""
    return 1 << max(0, value - 1).bit_length()


def _liger_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """The stored gradients, scaled in place where the loss's gradient is not 1, with which it is compared."""
    grad_hidden, grad_weight = saved
    g.scratch(4, name="one")
    assert grad_hidden is not None
    outputs: Gradients = [None, None if grad_weight is None else alias(grad_weight)]
    if node.edges[0] is not None:
        outputs[0] = alias(grad_hidden, node.metadata[0][0])
    return outputs
