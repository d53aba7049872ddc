"""End-to-end equivalence: a converted model's last hidden states and predictions beside those of its base, the same
weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memplan.npt.conversion import npt_blocks, set_mode
from memplan.npt.divergence import logits_divergence
from memplan.npt.loss import EquivalenceLoss, mean_square


@dataclass(frozen=True)
class EndToEnd:
    """What one pass of base and NPT model gave."""

    objective: Tensor
    """(1 - w) hidden loss + w divergence of predictions + regularization * mean norm; a scalar with a graph, where
    gradients are on."""
    relative_error: Tensor
    """Of last hidden states: mean square of the difference over that of the base's; a scalar."""
    delta_norm: Tensor
    """By block, mean over tokens of the squared Frobenius norm of the deltas."""


def end_to_end(
    model: nn.Module,
    decoder: nn.Module,
    inputs: dict[str, Any],
    token_mask: Tensor | None,
    *,
    head: Any = None,
    logits_weight: float = 0.0,
    temperature: float = 1.0,
) -> EndToEnd:
    """
    The end-to-end objective: mean square of the difference between last hidden states with NPT blocks on and off, over
    elements of the tokens that count; with `logits_weight`, the divergence of predictions beside it or in its place
    (`logits_divergence`); and the penalty on the norms of deltas.

    The base runs first and without a graph: what is alive when the NPT blocks begin is its last hidden states. Leaves
    the model in mode `npt`.

    Args:
        decoder: token ids to last hidden states (B, S, d), after the final norm.
        inputs: what the decoder is called with.
        token_mask: (B, S), nonzero where a token counts; None where all do.
        head: the output projection, where `logits_weight` is not 0.
        logits_weight: w above, from 0 to 1.
        temperature: T of `logits_divergence`.
    """
    set_mode(model, "base")
    with torch.no_grad():
        target = decoder(**inputs).last_hidden_state
    set_mode(model, "npt", token_mask=token_mask, measure=True)
    hidden = decoder(**inputs).last_hidden_state
    blocks = npt_blocks(model)
    controls = blocks[0].npt_controls
    padding = controls.padding
    num_tokens = target.shape[0] * target.shape[1] if controls.num_tokens is None else controls.num_tokens
    num_elements = num_tokens * target.shape[-1]
    if padding is not None:
        target.masked_fill_(padding.unsqueeze(-1), 0.0)
    loss = EquivalenceLoss.apply(hidden, target, padding, num_elements)
    relative_error = loss.detach() / mean_square(target, num_elements)
    if logits_weight:
        divergence = logits_divergence(
            hidden, target, head, temperature=temperature, padding=padding, num_tokens=num_tokens
        )
        loss = (1.0 - logits_weight) * loss + logits_weight * divergence
        del divergence
    norms = torch.stack([block.npt_norm.to(loss.device) for block in blocks if block.npt_norm is not None])
    for block in blocks:
        block.npt_norm = None
    objective = loss + controls.regularization * norms.mean()
    return EndToEnd(objective, relative_error, norms.detach())
