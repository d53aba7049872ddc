"""
The training loop. The planner writes its tape in the order of these lines; change one and the other changes
with it.

For every micro batch: ids and labels to the device, decoder, loss, backward. `full` loss frees the hidden
states and the logits before backward begins, so that only what autograd saved is alive. After the last micro
batch: gradient clipping, optimizer, gradients freed. NPT layers train themselves inside the decoder's forward
pass: no head, no loss here, no backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memplan.errors import RunError
from memplan.job.spec import Job
from memplan.train.build import Built, derive_seed
from memplan.train.data import IGNORE_INDEX, Batches
from memplan.train.loss import chunked_cross_entropy, full_cross_entropy, fused_cross_entropy
from memplan.train.optimizer import learning_rate

if TYPE_CHECKING:
    from memplan.npt import LocalMetrics


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    step: int
    loss: float
    """Per token of the global batch; for NPT the mean objective of the layers."""
    learning_rate: float
    num_tokens: int
    """Tokens that the loss was taken over."""
    relative_error: dict[int, float] | None = None
    """NPT: by layer, mean square of the difference to the original block over that of the block itself."""


class Loop:
    """
    Runs optimizer steps, counted from 1. The result of a step depends on the job, the weights and the step
    alone.

    Args:
        begin: is told (phase, step) when a phase begins.
    """

    def __init__(
        self,
        job: Job,
        built: Built,
        optimizer: torch.optim.Optimizer,
        batches: Batches,
        device: torch.device,
        *,
        begin: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.job = job
        self.built = built
        self.optimizer = optimizer
        self.batches = batches
        self.device = device
        self.begin = begin
        self.parameters = built.trainable

    def step(self, step: int) -> StepResult:
        """
        One optimizer step.

        Raises:
            RunError: the loss is not a number; the weights are those of the step before.
        """
        result = self._step_npt(step) if self.job.method == "npt" else self._step_language_model(step)
        self.begin("optimizer_step", step)
        if not math.isfinite(result.loss):
            raise RunError(
                f"the loss became {result.loss} at step {step}",
                hint="lower `train.learning_rate`, add `train.warmup_steps`, or set `train.max_grad_norm`",
            )
        if self.job.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = result.learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _step_language_model(self, step: int) -> StepResult:
        # Each sequence predicts all its tokens but the first.
        num_tokens = sum(length - 1 for micro in self.batches.lengths(step) for length in micro)
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for micro in range(self.job.gradient_accumulation_steps):
            self.begin("forward", step)
            seed_micro_batch(self.job.train.seed, step, micro)
            batch = self.batches.micro_batch(step, micro)
            input_ids, labels = batch.input_ids.to(self.device), batch.labels.to(self.device)
            del batch
            loss = self._forward(input_ids, labels, num_tokens)
            self.begin("backward", step)
            loss.backward()
            total += loss.detach()
            del loss, input_ids, labels
        return StepResult(step, total.item(), learning_rate(self.job.train, step), num_tokens)

    def _forward(self, input_ids: Tensor, labels: Tensor, num_tokens: int) -> Tensor:
        """Summed loss of one micro batch over `num_tokens`, a scalar."""
        with self._autocast():
            hidden = self.built.decoder(input_ids=input_ids, use_cache=False).last_hidden_state
            head: Any = self.built.head
            if self.job.loss != "full":
                linear_loss = chunked_cross_entropy if self.job.loss == "chunked" else fused_cross_entropy
                return linear_loss(hidden, head, labels, num_tokens)
            logits = head(hidden)
            del hidden
            return full_cross_entropy(logits, labels, num_tokens)

    def _step_npt(self, step: int) -> StepResult:
        from memplan.npt import read_metrics, set_mode

        lengths = self.batches.lengths(step)
        num_tokens = sum(sum(micro) for micro in lengths)
        objective, error = 0.0, torch.zeros(())
        layers: tuple[int, ...] = ()
        for micro in range(self.job.gradient_accumulation_steps):
            self.begin("forward", step)
            seed_micro_batch(self.job.train.seed, step, micro)
            batch = self.batches.micro_batch(step, micro)
            input_ids, mask = batch.input_ids.to(self.device), _token_mask(batch.labels)
            del batch
            share = sum(lengths[micro]) / num_tokens
            set_mode(self.built.model, "local", loss_scale=share, token_mask=mask)
            # Each layer turns gradients on for itself and runs its own backward.
            with torch.no_grad(), self._autocast():
                self.built.decoder(input_ids=input_ids, use_cache=False)
            metrics = read_metrics(self.built.model)
            layers = metrics.layers
            objective += share * self._npt_objective(metrics)
            error = error + share * metrics.relative_error.float().cpu()
            del input_ids, mask
        by_layer = dict(zip(layers, error.tolist()))
        return StepResult(step, objective, learning_rate(self.job.train, step), num_tokens, by_layer)

    def _npt_objective(self, metrics: LocalMetrics) -> float:
        penalty = self.job.npt.regularization * metrics.delta_norm
        return float((metrics.loss + penalty).mean())

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> float:
        """
        Loss over one pass of `batches`, without dropout; for NPT the mean objective.

        The memory it takes stays below that of a training step: the same batch, and nothing saved for
        backward.
        """
        model, was_training = self.built.model, self.built.model.training
        model.eval()
        try:
            return (
                self._evaluate_npt(batches)
                if self.job.method == "npt"
                else self._evaluate_language_model(batches)
            )
        finally:
            model.train(was_training)

    def _evaluate_language_model(self, batches: Batches) -> float:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        num_tokens = 0
        for batch in batches.one_pass():
            num_tokens += int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
            total += self._forward(batch.input_ids.to(self.device), batch.labels.to(self.device), 1)
        return total.item() / num_tokens

    def _evaluate_npt(self, batches: Batches) -> float:
        from memplan.npt import read_metrics, set_mode

        objective, num_tokens = 0.0, 0
        for batch in batches.one_pass():
            tokens = int((batch.labels != IGNORE_INDEX).sum())
            set_mode(self.built.model, "local", backward="never", token_mask=_token_mask(batch.labels))
            with self._autocast():
                self.built.decoder(input_ids=batch.input_ids.to(self.device), use_cache=False)
            objective += tokens * self._npt_objective(read_metrics(self.built.model))
            num_tokens += tokens
        return objective / num_tokens

    def _autocast(self) -> torch.autocast:
        dtype = self.job.autocast
        return torch.autocast(
            self.device.type, dtype=getattr(torch, dtype) if dtype else None, enabled=dtype is not None
        )


def _token_mask(labels: Tensor) -> Tensor | None:
    """(batch, seq) bool, True for tokens that are no padding; None if none are."""
    mask = labels != IGNORE_INDEX
    return None if bool(mask.all()) else mask


def seed_micro_batch(seed: int, step: int, micro: int, rank: int = 0) -> None:
    """
    Set every generator that dropout draws from: a function of the arguments, so that resuming needs no stored
    state.
    """
    torch.manual_seed(derive_seed(seed, step, micro, rank))
