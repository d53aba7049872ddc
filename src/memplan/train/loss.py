"""
The loss of a causal language model, with all logits at once (`full`) or a chunk of tokens at a time
(`chunked`).

Both return the summed cross-entropy divided by `num_tokens`, the tokens of the whole global batch, so that
gradients of micro batches add up to the gradient of the batch however unequal their token counts are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from memplan.train.data import IGNORE_INDEX

CHUNK_TOKENS = 1024


def full_cross_entropy(logits: Tensor, labels: Tensor, num_tokens: float, *, shifts: bool = True) -> Tensor:
    """
    Summed cross-entropy over `num_tokens`, computed in float32 from the logits of all tokens.

    Args:
        logits: (batch, seq, vocab), in the dtype of the head.
        labels: (batch, seq) int64, the ids of the same tokens; `IGNORE_INDEX` on those that are not to be
            predicted.
        num_tokens: predicted tokens of the global batch.
        shifts: each position predicts the next token; else its own, as with masked tokens.
    """
    scores = logits.float().flatten(0, 1)
    targets = _shift(labels) if shifts else labels.flatten()
    return F.cross_entropy(scores, targets, ignore_index=IGNORE_INDEX, reduction="sum") / num_tokens


def _shift(labels: Tensor) -> Tensor:
    """
    (batch * seq,): for each token the one after it; `IGNORE_INDEX` for the last. As transformers'
    ForCausalLMLoss.
    """
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()


def chunked_cross_entropy(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    num_tokens: float,
    chunk_tokens: int = CHUNK_TOKENS,
    *,
    softcap: float | None = None,
    scaling: float | None = None,
) -> Tensor:
    """
    The same loss as `full_cross_entropy(head(hidden), ...)` without ever holding the logits of more than one
    chunk.

    Args:
        hidden: (batch, seq, hidden), the input of the head.
        head: the output projection; its weight gets a gradient if it asks for one. It has no bias.
        labels, num_tokens: as in `full_cross_entropy`.
        chunk_tokens: tokens per chunk.
        softcap: c of `c * tanh(logits / c)`, in float32; None for plain logits.
        scaling: what the logits are divided by, in float32, before any softcap.
    """
    weight = head.weight
    if not torch.is_grad_enabled():
        weight = weight.detach()
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(compute_dtype), weight.to(compute_dtype)
    with torch.autocast(device_type, enabled=False):
        loss: Tensor = ChunkedLinearCrossEntropy.apply(
            hidden.flatten(0, -2), weight, _shift(labels), num_tokens, chunk_tokens, softcap, scaling
        )
    return loss


def fused_cross_entropy(
    hidden: Tensor,
    head: Any,
    labels: Tensor,
    num_tokens: float,
    *,
    softcap: float | None = None,
    scaling: float | None = None,
) -> Tensor:
    """
    The same loss by Liger's kernel, on CUDA; arguments as in `chunked_cross_entropy`. The kernel divides no logits, so
    that `scaling` is taken from the hidden states, in their dtype.
    """
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    if scaling is not None:
        hidden = hidden / scaling
    loss: Tensor = liger_fused_linear_cross_entropy(
        hidden.flatten(0, -2),
        head.weight,
        _shift(labels),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        softcap=softcap,
    )
    return loss / num_tokens


def evaluation_cross_entropy(hidden: Tensor, head: Any, labels: Tensor, num_tokens: float) -> Tensor:
    """
    The same loss without gradients, for any head; arguments as in `chunked_cross_entropy`. Its chunks are so small that
    logits take no more than the hidden states: an NPT step holds no logits at all.
    """
    flat, targets = hidden.flatten(0, -2), _shift(labels)
    vocab_size = head(flat[:1]).shape[-1]
    rows = max(1, flat.numel() // vocab_size)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for some, some_targets in zip(flat.split(rows), targets.split(rows)):
        scores = head(some).float()
        total += F.cross_entropy(scores, some_targets, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / num_tokens


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """
    Cross-entropy of `hidden @ weight.T` whose gradients are computed in the forward pass, chunk by chunk.

    Beyond its result it holds one (chunk, vocab) float32 buffer, the chunk's logits in the dtype of `hidden`
    where that is not float32, and from forward to backward the gradient of `hidden` (tokens, hidden) and,
    only if the weight asks for one, of the weight (vocab, hidden), each in the dtype of what it belongs to. With a
    softcap it holds the cap's slope besides, another (chunk, vocab) float32 buffer.

        d loss / d logits = (softmax(logits) - onehot(label)) / num_tokens
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        num_tokens: float,
        chunk_tokens: int,
        softcap: float | None = None,
        scaling: float | None = None,
    ) -> Tensor:
        accumulate_dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        loss = torch.zeros((), dtype=accumulate_dtype, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows], weight)
            scores = logits.to(accumulate_dtype)
            predicted = (labels[rows] != IGNORE_INDEX).unsqueeze(1)
            target = labels[rows].clamp_min(0).unsqueeze(1)
            slope = None
            if scaling is not None:
                scores.div_(scaling)
            if softcap is not None:
                scores.div_(softcap).tanh_()
                slope = scores.square().neg_().add_(1)
                scores.mul_(softcap)

            scores.sub_(scores.amax(1, keepdim=True))
            target_scores = scores.gather(1, target)
            total = scores.exp_().sum(1, keepdim=True)
            loss += ((total.log() - target_scores) * predicted).sum()

            scores.div_(total)
            scores.scatter_add_(1, target, torch.full_like(target_scores, -1.0))
            scores.mul_(predicted).div_(num_tokens)
            if slope is not None:
                scores.mul_(slope)
            if scaling is not None:
                scores.div_(scaling)
            grad_logits = logits.copy_(scores) if logits.dtype != accumulate_dtype else scores
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[rows])
            del logits, scores, grad_logits, slope
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / num_tokens

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss
        if grad_weight is not None:
            grad_weight = grad_weight * grad_loss
        return grad_hidden, grad_weight, None, None, None, None, None
