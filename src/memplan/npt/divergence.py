"""How far the predictions of an NPT model are from those of its base, a few tokens at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_TOKENS = 256
"""Tokens whose logits, of both models, are there at once."""


def logits_divergence(
    hidden: Tensor,
    target: Tensor,
    head: Any,
    *,
    temperature: float,
    padding: Tensor | None = None,
    num_tokens: int | Tensor,
) -> Tensor:
    """
    T^2 KL(softmax(target's logits / T) || softmax(hidden's logits / T)), mean over the tokens that count; a scalar in
    float32 or wider (Hinton, Vinyals and Dean, arXiv:1503.02531, section 2.1).

    Args:
        hidden, target: last hidden states (B, S, d); only the first gets a gradient.
        head: the output projection, frozen and without a bias.
        padding: (B, S) bool, True for tokens that do not count, or None.
        num_tokens: how many count.
    """
    weight = head.weight.detach()
    device_type = hidden.device.type
    # Meta tensors know no autocast of their own.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        compute_dtype = torch.get_autocast_dtype(device_type)
        hidden, target, weight = (tensor.to(compute_dtype) for tensor in (hidden, target, weight))
    counts = None if padding is None else ~padding.flatten()
    divergence: Tensor = ChunkedDivergence.apply(
        hidden.flatten(0, -2), target.flatten(0, -2), weight, counts, num_tokens, temperature
    )
    return divergence


class ChunkedDivergence(torch.autograd.Function):
    """
    `logits_divergence` of (tokens, d), whose gradient is computed in the forward pass, chunk by chunk: neither model's
    logits are ever there for more than CHUNK_TOKENS tokens. What stays until backward is the gradient of `hidden`.

        d / d logits = T (softmax(logits / T) - softmax(target logits / T)) / num_tokens
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        target: Tensor,
        weight: Tensor,
        counts: Tensor | None,
        num_tokens: int | Tensor,
        temperature: float,
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            counted = None if counts is None else counts[rows]
            gradient = None if grad_hidden is None else grad_hidden[rows]
            total += _chunk(hidden[rows], target[rows], weight, counted, num_tokens, temperature, gradient)
        ctx.save_for_backward(grad_hidden)
        return total * temperature**2 / num_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad, None, None, None, None, None


def _chunk(
    hidden: Tensor,
    target: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    num_tokens: int | Tensor,
    temperature: float,
    gradient: Tensor | None,
) -> Tensor:
    """Summed divergence of some tokens; their gradient is written to `gradient`."""
    expected = _log_probabilities(target, weight, temperature)
    found = _log_probabilities(hidden, weight, temperature)
    probabilities = expected.exp()
    divergence = expected.sub_(found).mul_(probabilities).sum(-1)
    del expected
    if counts is not None:
        divergence.mul_(counts)
    if gradient is not None:
        slope = found.exp_().sub_(probabilities).mul_(temperature).div_(num_tokens)
        if counts is not None:
            slope.mul_(counts.unsqueeze(-1))
        del probabilities
        torch.mm(slope.to(hidden.dtype), weight, out=gradient)
    return divergence.sum()


def _log_probabilities(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(tokens, vocab) in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return torch.log_softmax(F.linear(hidden, weight).to(wide).div_(temperature), -1)
