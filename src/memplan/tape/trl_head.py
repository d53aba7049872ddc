"""
TRL's head and loss (trl 1.16, trainer/utils.py, add_fused_lm_head; kernels/chunked_logprob.py), which its SFTTrainer
puts in place of transformers' own: the logits of some tokens and a part of the vocabulary at a time, in one buffer, and
once more in backward.
"""

from __future__ import annotations

from math import prod

from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Linear
from memplan.tape.loss import Locals
from memplan.tape.ops import alias, scale, scale_backward
from memplan.tape.scratch import cast_to_sum, index_put_accumulate
from memplan.tape.tensors import Gradients, Node, Tensor

TILE_TOKENS = 4096
TILE_VOCABULARY = 32768
"""Tokens and entries of the vocabulary whose logits are there at once."""

_STATISTICS = 7
"""float32 numbers per token that the kernel keeps while it goes through the vocabulary."""


class Outputs:
    """What the model with TRL's head returns beside the log-probabilities, in the order in which it goes."""

    loss: list[Tensor]
    """The model's own, which is not trained on, and what its graph keeps."""
    others: list[Tensor]
    """Entropy and hits, (B, S - 1)."""
    mask: Tensor
    """Labels that count, (B, S - 1)."""


def trl_forward(g: Graph, hidden: Tensor, head: Linear, outputs: Outputs, count: int) -> Tensor:
    """
    Log-probabilities (B, S - 1) of (B, S, d) hidden states, `count` labels of which count. The caller holds `hidden`;
    `outputs` is given the rest.
    """
    batch, length, _ = hidden.shape
    shape = (batch, length - 1)
    weight = head.current_weight(g)
    mask = outputs.mask = g.new(shape, "bool", "labels that count")
    rows = _select_hidden(g, hidden, mask, count)
    targets = _select_labels(g, count)
    log_probabilities, hits = _log_probabilities(g, rows, weight, targets)
    del rows, targets
    scattered = _scattered(g, log_probabilities, shape)
    outputs.others = [_scattered(g, None, shape), _scattered(g, None, shape, "bool")]
    del log_probabilities, hits
    total = g.new((), "float32", "sum of log-probabilities")
    negated = g.new((), "float32", "sum of losses")
    del total
    number = _count(g, mask, "labels")
    bounded = g.new((), "int64", "number of labels, at least one")
    del number
    outputs.loss = [g.new((), "float32", "loss per label of the batch"), bounded]
    del negated, bounded
    return scattered


def trl_loss(g: Graph, held: list[Tensor], outputs: Outputs) -> Tensor:
    """
    SFTTrainer.compute_loss: per label of the step, with what it logs (trl 1.16, trainer/sft_trainer.py). `held` is the
    only reference to the log-probabilities.
    """
    log_probabilities = held[0]
    negated = g.new(log_probabilities.shape, "float32", "losses")
    if g.needs(log_probabilities):
        g.record(negated, (log_probabilities,), [], _negated_backward)
    total = g.new((), "float32", "sum of losses")
    if g.needs(negated):
        g.record(total, (negated,), [], _sum_backward)
    number = g.new((), "float32", "labels of the step, at least one")
    quotient = g.new((), "float32", "loss per label")
    if g.needs(total):
        g.record(quotient, (total,), [number], scale_backward)
    del total, number
    loss = scale(g, quotient, "loss of this process")
    del quotient
    _log(g, outputs)
    outputs.loss.clear()
    del log_probabilities
    held.clear()
    while outputs.others:
        del outputs.others[0]
    del outputs.mask, negated
    return loss


def _log(g: Graph, outputs: Outputs) -> None:
    """Entropy and accuracy per label, and the tokens of the batch, each summed twice: once over processes."""
    sums = []
    for values in (outputs.mask, *outputs.others):
        of_process = _count(g, values, values.dtype)
        sums.append(g.new((), of_process.dtype, "sum over processes"))
        del of_process
    for _ in outputs.others:
        g.new((), "bool", "whether labels count")
        g.new((), "float32", "mean")
    tokens = g.new((), "int64", "tokens of the batch")
    g.new((), "int64", "tokens over processes")
    del tokens
    while sums:
        del sums[0]


def _count(g: Graph, values: Tensor, name: str) -> Tensor:
    is_bool = values.dtype == "bool"
    total = g.new((), "int64" if is_bool else values.dtype, f"sum of {name}")
    if is_bool:
        g.scratch(*cast_to_sum(prod(values.shape)), name="sum")
    return total


def _select_hidden(g: Graph, hidden: Tensor, mask: Tensor, count: int) -> Tensor:
    """`hidden[:, :-1][mask]`."""
    batch, length, width = hidden.shape
    positions = g.new((count, 2), "int64", "positions of the labels that count")
    rows = g.new((count, width), hidden.dtype, "hidden states that count")
    if g.needs(hidden):
        part = alias(hidden, (batch, length - 1, width))
        g.record(part, (hidden,), [], _part_backward, hidden.shape)
        g.record(rows, (part,), [mask], _select_backward, part.shape)
    del positions
    return rows


def _select_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """Added up in zeros of all positions but the last."""
    rows = gradients.pop(0)
    part = g.new(node.extra, rows.dtype, "grad of positions with a label")
    positions = g.new((rows.shape[0], 2), "int64", "positions of the labels that count")
    if g.device == "cuda":
        g.scratch(*index_put_accumulate(rows.shape[0]), name="index_put")
    del positions, rows
    return [part]


def _part_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    """Part of zeros of all positions."""
    return [g.new(node.extra, gradients[0].dtype, "grad of all positions")]


def _select_labels(g: Graph, count: int) -> Tensor:
    positions = g.new((count, 2), "int64", "positions of the labels that count")
    targets = g.new((count,), "int64", "targets")
    del positions
    return targets


def _log_probabilities(g: Graph, rows: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """ChunkedLogProbFunction.forward, with the entropy and the hits that SFTTrainer logs, which it returns too."""
    count = rows.shape[0]
    dtype = g.autocast or rows.dtype
    statistics = [g.new((count,), "float32", "statistics of tokens") for _ in range(_STATISTICS)]
    tile = g.new((min(count, TILE_TOKENS), TILE_VOCABULARY), dtype, "logits of a tile")
    kept = _multiply_tiles(g, rows, weight, dtype, keeps_head=False)
    logarithm = g.new((count,), "float32", "logarithms")
    normaliser = g.new((count,), "float32", "logarithms of sums of exponentials")
    del logarithm
    out = g.new((count,), "float32", "log-probabilities")
    share = g.new((count,), "float32", "weighted logits")
    entropy = g.new((count,), "float32", "entropy")
    del share
    hits = [g.new((count,), "bool", name) for name in ("targets not below", "targets above", "hits")]
    del hits[:2]
    if g.needs(rows, weight):
        saved = [entropy, normaliser, targets, weight, rows]  # the last goes first
        g.record(out, (rows, weight), saved, _log_probabilities_backward, dtype)
    while statistics:
        del statistics[0]
    kept.clear()
    del tile, normaliser, entropy
    return out, hits[0]


def _multiply_tiles(g: Graph, rows: Tensor, weight: Tensor, dtype: str, *, keeps_head: bool) -> Locals:
    """
    The products, which write into the tile: what they take beside it are casts of their operands, of which the last
    ones stay until the function returns, those of the head if `keeps_head`.
    """
    count, width = rows.shape
    g.claim_workspace()
    kept = Locals()
    for start in range(0, count, TILE_TOKENS):
        if rows.dtype != dtype:
            size = min(TILE_TOKENS, count - start)
            kept["hidden"] = g.new((size, width), dtype, "hidden states of a tile")
        for first in range(0, weight.shape[0], TILE_VOCABULARY):
            if weight.dtype != dtype:
                size = min(TILE_VOCABULARY, weight.shape[0] - first)
                kept["head"] = g.new((size, width), dtype, "part of the head in the dtype of products")
                if not keeps_head:
                    del kept["head"]
    return kept


def _log_probabilities_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], saved: list[Tensor | None]
) -> Gradients:
    """The same products again; both gradients are added up in float32, and cast."""
    weight, rows = saved[-2:]
    assert rows is not None and weight is not None
    sums = [
        g.new(tensor.shape, "float32", f"sum of grads of {name}") if edge is not None else None
        for tensor, edge, name in zip((rows, weight), node.edges, ("hidden states", "head"))
    ]
    tile = g.new((min(rows.shape[0], TILE_TOKENS), TILE_VOCABULARY), node.extra, "logits of a tile")
    kept = _multiply_tiles(g, rows, weight, node.extra, keeps_head=True)
    outputs: Gradients = []
    for position, (tensor, name) in enumerate(((rows, "hidden states"), (weight, "head"))):
        total = sums[position]
        is_cast = total is not None and tensor.dtype != "float32"
        outputs.append(g.new(tensor.shape, tensor.dtype, f"grad of {name}") if is_cast else total)
        del total
    while sums:
        del sums[0]
    kept.clear()
    del tile
    return outputs


def _scattered(g: Graph, values: Tensor | None, shape: tuple[int, int], dtype: str = "float32") -> Tensor:
    """Zeros with the values of the tokens that count, a copy; None: values that no gradient is asked of."""
    zeros = g.new(shape, dtype, "zeros")
    out = g.new(shape, dtype, "values of all positions")
    del zeros
    if values is not None and g.needs(values):
        g.record(out, (values,), [], _scattered_backward, values.shape)
    return out


def _scattered_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(node.extra, "float32", "grad of log-probabilities")]


def _negated_backward(
    g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]
) -> Gradients:
    return [g.new(gradients[0].shape, "float32", "grad of losses")]


def _sum_backward(g: Graph, node: Node, gradients: dict[int, Tensor], _: list[Tensor | None]) -> Gradients:
    return [alias(gradients[0], node.metadata[0][0])]
