"""The language-model head and its loss: full logits as transformers computes them, and in chunks."""

from __future__ import annotations

from collections.abc import Callable

from memplan.tape.graph import Graph
from memplan.tape.linear import linear
from memplan.tape.linear_layer import Linear
from memplan.tape.ops import alias, autocast_to_float32, cast, scale
from memplan.tape.tensors import Gradients, Node, Tensor
from memplan.tape.views import whole_slices

CHUNK_TOKENS = 1024
"""Tokens per chunk of our chunked loss."""


def cross_entropy(g: Graph, logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy over (N, V): log-softmax (saved) and a scalar; backward makes two more tensors of its size."""
    if g.autocast and g.device == "cpu":  # on whose list it is; on CUDA's are the two functions inside
        logits = cast(g, logits, "float32")
    probabilities = g.new(logits.shape, logits.dtype, "log-probabilities")
    if g.needs(logits):
        g.record(probabilities, (logits,), [alias(probabilities)], _log_softmax_backward)
    scores = autocast_to_float32(g, probabilities)
    loss = g.new((), scores.dtype, "loss")
    weight = g.new((), scores.dtype, "loss weight")
    if g.needs(scores):
        g.record(loss, (scores,), [weight, labels, scores], _nll_backward, logits.shape)
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
    """ForCausalLMLoss of transformers: labels padded by one on the right, and without the first column, a copy
    unless there is one sequence only.
    """
    batch, length = labels.shape
    padded = g.new((batch, length + 1), "int64", "padded labels")
    if batch == 1:
        return padded, alias(padded, (length,))
    shifted = g.new((batch, length), "int64", "shifted labels")
    return padded, alias(shifted, (batch * length,))


def full_loss(
    g: Graph,
    logits: Tensor,
    labels: Tensor,
    *,
    upcast: bool = True,
    shift_logits: bool = False,
    divide: bool = False,
    per_token: bool = False,
    shifts: bool = True,
    kernel: Callable[[Graph, Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """
    The loss of (B, S, V) logits. The caller decides how long the logits themselves live.

    `shift_logits`: transformers before 4.49 copied the float32 logits without the last position instead of shifting
    the labels, and held both while the loss was computed. `divide`: memplan.train.loss.full_cross_entropy, a sum that
    is divided by the tokens of the global batch. `per_token`: so is transformers' own loss, by the tokens that its
    Trainer counted (loss_utils.py, fixed_cross_entropy). Not `shifts`: labels are of the masked tokens themselves.
    """
    if upcast:
        logits = cast(g, logits, "float32")
    batch, length, vocabulary = logits.shape
    if not shifts:
        labels, shifted = alias(labels, (batch * length,)), logits
    elif shift_logits:
        rows = (batch * (length - 1),)
        labels = alias(labels, rows) if batch == 1 else g.new(rows, "int64", "shifted labels")
        shifted = drop_last_position(g, logits, "shifted logits")
    else:
        padded, labels = shifted_labels(g, labels)
        shifted = logits
        if divide:
            del padded  # a local of a function of its own
    flat = _flatten(g, shifted)
    loss = kernel(g, flat, labels)
    if divide or per_token:
        loss = scale(g, loss, "loss per token")
    del flat
    return loss


def _flatten(g: Graph, x: Tensor) -> Tensor:
    out = alias(x, (x.shape[0] * x.shape[1], x.shape[2]))
    if g.needs(x):
        g.record(out, (x,), [], _unflatten, x.shape)
    return out


def _unflatten(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.extra)]


def drop_last_position(g: Graph, x: Tensor, name: str) -> Tensor:
    """`x[..., :-1, :].contiguous()` of (B, S, ...): a copy, unless there is one sequence only."""
    batch, length, width = x.shape
    shape = (batch, length - 1, width)
    out = alias(x, shape) if batch == 1 else g.new(shape, x.dtype, name)
    if g.needs(x):
        g.record(out, (x,), [], _restore_last_position, x.shape)
    return whole_slices(g, out, 1)


def _restore_last_position(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, gradients[0].dtype, "grad of all positions")]


def chunked_loss(
    g: Graph, hidden: Tensor, head: Linear, labels: Tensor, *, softcapped: bool = False
) -> Tensor:
    """
    memplan.train.loss.chunked_cross_entropy over (B, S, d): logits of CHUNK_TOKENS tokens at a time, their gradient
    formed in forward; what stays is the gradient of the hidden states, and of the head's weight where that trains.
    The caller holds `hidden`.
    """
    weight = head.current_weight(g)
    if g.autocast:
        hidden, weight = cast(g, hidden, g.autocast), cast(g, weight, g.autocast)
    return _chunks(g, hidden, weight, shifted_labels(g, labels)[1], softcapped)


def _chunks(g: Graph, hidden: Tensor, weight: Tensor, labels: Tensor, softcapped: bool) -> Tensor:
    """ChunkedLinearCrossEntropy.forward; its locals of a chunk live until the next one's take their names."""
    batch, length, width = hidden.shape
    num_tokens, dtype = batch * length, hidden.dtype
    grad_hidden = grad_weight = None
    if g.needs(hidden):
        grad_hidden = g.new((num_tokens, width), dtype, "grad of hidden states")
    if g.needs(weight):
        grad_weight = g.new(weight.shape, dtype, "grad of head")
    total = g.new((), "float32", "loss")
    g.claim_workspace()
    kept = Locals()
    for start in range(0, num_tokens, CHUNK_TOKENS):
        _chunk(g, (min(CHUNK_TOKENS, num_tokens - start), weight.shape[0]), dtype, kept, softcapped)
    loss = g.new((), "float32", "loss per token")
    del total
    kept.clear()
    if g.needs(hidden, weight):
        g.record(loss, (hidden, weight), [grad_weight, grad_hidden], _chunked_backward, hidden.shape)
    return loss


def evaluation_loss(g: Graph, hidden: Tensor, head: Linear, labels: Tensor) -> Tensor:
    """
    memplan.train.loss.evaluation_cross_entropy over (B, S, d), without gradients: logits of a few tokens at a time, of
    which the last ones' stay until the next are there.
    """
    targets = shifted_labels(g, labels)[1]
    num_tokens, width = hidden.shape[0] * hidden.shape[1], hidden.shape[2]
    first = linear(g, alias(hidden, (1, width)), head)
    rows = max(1, num_tokens * width // first.shape[-1])
    del first
    total = g.new((), "float32", "sum of losses")
    kept = Locals()
    for start in range(0, num_tokens, rows):
        logits = linear(g, alias(hidden, (min(rows, num_tokens - start), width)), head)
        kept["scores"] = cast(g, logits, "float32")
        del logits
        loss = cross_entropy(g, kept["scores"], targets)
        del loss
    loss = g.new((), "float32", "loss per token")
    del total
    kept.clear()
    return loss


class Locals(dict[str, Tensor]):
    """Variables of a loop: a new value is there before the old one goes; at the end they go in order."""

    def clear(self) -> None:
        for name in list(self):
            del self[name]


def _chunk(g: Graph, shape: tuple[int, int], dtype: str, kept: Locals, softcapped: bool) -> None:
    """Logits in their dtype, once more in float32; the gradient is written over the former. A cap's slope is kept."""
    size = shape[0]
    logits = g.new(shape, dtype, "logits of a chunk")
    scores = None if dtype == "float32" else g.new(shape, "float32", "logits of a chunk in float32")
    kept["predicted"] = g.new((size,), "bool", "predicted tokens")
    kept["target"] = g.new((size,), "int64", "targets")
    slope = g.new(shape, "float32", "slope of the cap") if softcapped else None

    def column(name: str) -> Tensor:
        return g.new((size, 1), "float32", name)

    column("largest logits")
    kept["target_scores"] = column("scores of targets")
    kept["total"] = column("sums of exponentials")
    term = column("logarithms")
    term = column("losses")
    term = column("losses of predicted tokens")
    loss = g.new((), "float32", "loss of a chunk")
    del term, loss
    column("ones")
    del scores, logits, slope


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
