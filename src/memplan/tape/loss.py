"""The language-model head and its loss: full logits as transformers computes them, and in chunks."""

from __future__ import annotations

from collections.abc import Callable

from memplan.tape.engine import Gradients, Graph, Node, Tensor
from memplan.tape.linear import Linear, autocast_to
from memplan.tape.ops import alias, cast

CHUNK_TOKENS = 1024
"""Tokens per chunk of our chunked loss."""


def cross_entropy(g: Graph, logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy over (N, V): log-softmax (saved) and a scalar; backward makes two more tensors of its size."""
    probabilities = g.new(logits.shape, logits.dtype, "log-probabilities")
    if g.needs(logits):
        g.record(probabilities, (logits,), [alias(probabilities)], _log_softmax_backward)
    loss = g.new((), logits.dtype, "loss")
    weight = g.new((), logits.dtype, "loss weight")
    if g.needs(probabilities):
        g.record(loss, (probabilities,), [probabilities, labels, weight], _nll_backward, logits.shape)
    return loss


def _nll_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of log-probabilities")]


def _log_softmax_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    return [g.new(gradients[0].shape, node.metadata[0][1], "grad of logits")]


def shifted_labels(g: Graph, labels: Tensor) -> tuple[Tensor, Tensor]:
    """ForCausalLMLoss of transformers: labels padded by one on the right, and a copy without the first column."""
    batch, length = labels.shape
    padded = g.new((batch, length + 1), "int64", "padded labels")
    shifted = g.new((batch, length), "int64", "shifted labels")
    return padded, alias(shifted, (batch * length,))


def full_loss(
    g: Graph,
    logits: Tensor,
    labels: Tensor,
    *,
    upcast: bool = True,
    shift_logits: bool = False,
    kernel: Callable[[Graph, Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """
    The loss of (B, S, V) logits. The caller decides how long the logits themselves live.

    `shift_logits`: transformers before 4.49 copied the float32 logits without the last position instead of shifting
    the labels, and held both while the loss was computed.
    """
    if upcast:
        logits = cast(g, logits, "float32")
    batch, length, vocabulary = logits.shape
    if shift_logits:
        labels = g.new((batch * (length - 1),), "int64", "shifted labels")
        shifted = _drop_last_position(g, logits)
    else:
        padded, labels = shifted_labels(g, labels)
        shifted = logits
    flat = _flatten(g, shifted)
    loss = kernel(g, flat, labels)
    del flat
    return loss


def _flatten(g: Graph, x: Tensor) -> Tensor:
    out = alias(x, (x.shape[0] * x.shape[1], x.shape[2]))
    if g.needs(x):
        g.record(out, (x,), [], _unflatten, x.shape)
    return out


def _unflatten(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.extra)]


def _drop_last_position(g: Graph, logits: Tensor) -> Tensor:
    """`logits[..., :-1, :].contiguous()`: a copy, unless there is one sequence only."""
    batch, length, vocabulary = logits.shape
    shape = (batch, length - 1, vocabulary)
    out = alias(logits, shape) if batch == 1 else g.new(shape, logits.dtype, "shifted logits")
    if g.needs(logits):
        g.record(out, (logits,), [], _restore_last_position, logits.shape)
    return out


def _restore_last_position(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of all positions")]


def chunked_loss(g: Graph, hidden: Tensor, head: Linear, labels: Tensor) -> Tensor:
    """
    memplan.train.loss.ChunkedLinearCrossEntropy over (B, S, d): logits of CHUNK_TOKENS tokens at a time, their gradient
    formed in forward; what stays is the gradient of the hidden states, and of the head's weight where that trains.
    """
    weight: Tensor | None = head.weight
    assert weight is not None
    hidden, weight = autocast_to(g, hidden), autocast_to(g, weight)
    batch, length, width = hidden.shape
    labels = shifted_labels(g, labels)[1]
    num_tokens = batch * length
    grad_hidden = grad_weight = None
    if g.needs(hidden):
        grad_hidden = g.new((num_tokens, width), hidden.dtype, "grad of hidden states")
    if g.needs(weight):
        grad_weight = g.new(weight.shape, weight.dtype, "grad of head")
    total = g.new((), "float32", "loss")
    for start in range(0, num_tokens, CHUNK_TOKENS):
        _chunk(g, min(CHUNK_TOKENS, num_tokens - start), head.out_features, hidden.dtype)
    loss = g.new((), "float32", "loss")
    del total
    if g.needs(hidden, weight):
        g.record(loss, (hidden, weight), [grad_weight, grad_hidden], _chunked_backward, hidden.shape)
    return loss


def _chunk(g: Graph, size: int, vocabulary: int, dtype: str) -> None:
    """Logits in their dtype, once more in float32; the gradient is written over the former."""
    logits = g.new((size, vocabulary), dtype, "logits of a chunk")
    if dtype != "float32":
        scores = g.new((size, vocabulary), "float32", "logits of a chunk in float32")
        del scores
    del logits


def _chunked_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """Both stored gradients, times the gradient of the loss."""
    outputs: Gradients = []
    for tensor, name in zip(reversed(saved), ("hidden states", "head")):
        outputs.append(None if tensor is None else g.new(tensor.shape, tensor.dtype, f"grad of {name}"))
    if outputs[0] is not None:
        outputs[0] = alias(outputs[0], node.extra)
    return outputs
