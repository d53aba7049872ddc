"""The divergence of predictions between NPT model and base. Mirrors memplan.npt.divergence line by line."""

from __future__ import annotations

from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.ops import alias, cast
from memplan.tape.tensors import Gradients, Node, Tensor

CHUNK_TOKENS = 256
"""That of memplan.npt.divergence."""


def logits_divergence(g: Graph, hidden: Tensor, target: Tensor, head: Linear) -> Tensor:
    """The caller holds `hidden` and `target`, (B, S, d)."""
    weight: Tensor | None = head.weight
    assert weight is not None
    if g.autocast:
        hidden, target = cast(g, hidden, g.autocast), cast(g, target, g.autocast)
        weight = cast(g, weight, g.autocast)
    width, dtype = hidden.shape[-1], hidden.dtype
    num_tokens = hidden.shape[0] * hidden.shape[1]
    trains = g.needs(hidden)
    grad_hidden = g.new((num_tokens, width), dtype, "grad of hidden states") if trains else None
    total = g.new((), "float32", "divergence")
    g.claim_workspace()
    for start in range(0, num_tokens, CHUNK_TOKENS):
        _chunk(g, min(CHUNK_TOKENS, num_tokens - start), weight.shape[0], dtype, trains=trains)
    scaled = g.new((), "float32", "scaled divergence")
    divergence = g.new((), "float32", "divergence per token")
    del scaled, total
    g.record(divergence, (hidden,), [grad_hidden], _divergence_backward, hidden.shape)
    return divergence


def _chunk(g: Graph, size: int, vocab_size: int, dtype: str, *, trains: bool) -> None:
    """Both models' logits of a chunk, one after the other; of each its log-probabilities stay."""
    shape = (size, vocab_size)
    expected = _log_probabilities(g, shape, dtype)
    slope = _log_probabilities(g, shape, dtype)
    probabilities = g.new(shape, "float32", "probabilities")
    divergences = g.new((size,), "float32", "divergences")
    del expected, probabilities
    if trains and dtype != "float32":
        rounded = g.new(shape, dtype, "slope of logits")
        del rounded
    chunk = g.new((), "float32", "divergence of a chunk")
    del divergences, slope, chunk


def _log_probabilities(g: Graph, shape: tuple[int, int], dtype: str) -> Tensor:
    logits = g.new(shape, dtype, "logits of a chunk")
    if dtype != "float32":
        logits = g.new(shape, "float32", "logits of a chunk in float32")
    found = g.new(shape, "float32", "log-probabilities of a chunk")
    del logits
    return found


def _divergence_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """The stored gradient, times that of the divergence."""
    stored = saved[0]
    assert stored is not None
    return [alias(g.new(stored.shape, stored.dtype, "grad of hidden states"), node.extra)]
