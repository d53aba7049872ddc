"""
The training loop. The planner writes its tape in the order of these lines; change one and the other changes
with it.

For every micro batch: ids and labels to the device, decoder, loss, backward. `full` loss frees the hidden
states and the logits before backward begins, so that only what autograd saved is alive. After the last micro
batch: gradient clipping, optimizer, gradients freed. NPT layers train themselves inside the decoder's forward
pass: no head, no loss here, no backward. `Step` in parallel.py has decoder, head and loss.

With several ranks, micro batch `m` of rank `r` of `W` is micro batch `m * W + r` of the global batch, with its samples
and its dropout: what a step computes does not depend on how many ranks compute it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from memplan.errors import RunError
from memplan.job.spec import Job
from memplan.train.build import Built, derive_seed
from memplan.train.data import IGNORE_INDEX, Batches, MicroBatch
from memplan.train.group import Group
from memplan.train.optimizer import learning_rate
from memplan.train.parallel import Parallel
from memplan.train.scaling import LossScale

if TYPE_CHECKING:
    from memplan.train.npt_steps import NptMeasure, NptSteps


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did."""

    step: int
    loss: float
    """Per token of the global batch; for NPT the mean objective of the layers."""
    learning_rate: float
    num_tokens: int
    """Tokens that the loss was taken over."""
    relative_error: dict[Any, float] | None = None
    """NPT: by layer, mean square of the difference to the original block over that of the block itself.
    `end_to_end`: the same of the last hidden states."""
    delta_norm: dict[int, float] | None = None
    """NPT: by layer, mean over tokens of the squared Frobenius norm of the weight delta."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over other data gave."""

    loss: float
    """Per token; for NPT the mean objective of the layers."""
    npt: NptMeasure | None = None
    cross_entropies: dict[str, float] | None = None
    """NPT: nats per token with the blocks on (`npt`) and off (`base`)."""


class Loop:
    """
    Runs optimizer steps, counted from 1. The result of a step depends on the job, the weights and the step
    alone.

    Args:
        batches: micro batches of all ranks.
        parallel: the model as this rank runs it; None: alone.
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
        parallel: Parallel | None = None,
        begin: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.job = job
        self.built = built
        self.optimizer = optimizer
        self.batches = batches
        self.device = device
        self.begin = begin
        self.parallel = parallel or Parallel(job, built, Group(device=device))
        self.group = self.parallel.group
        self.parameters = list(self.parallel.trainable.values())
        self.loss_scale = LossScale(job, device)
        self.npt = _npt_steps(job, self.parallel)

    def step(self, step: int) -> StepResult:
        """
        One optimizer step.

        Raises:
            RunError: the loss is not a number; the weights are those of the step before.
        """
        result = self._forward_and_backward(step)
        self.begin("optimizer_step", step)
        if not math.isfinite(result.loss):
            raise RunError(
                f"the loss became {result.loss} at step {step}",
                hint="lower `train.learning_rate`, add `train.warmup_steps`, or set `train.max_grad_norm`",
            )
        if self.job.train.max_grad_norm is not None:
            self.loss_scale.unscale(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters, self.job.train.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = result.learning_rate
        self.loss_scale.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        return result

    def _step_language_model(self, step: int) -> StepResult:
        num_tokens = self.batches.num_targets(step)
        # Gradients are averaged over ranks: each takes its loss over as many tokens as it has on average.
        share = num_tokens / self.group.world_size
        # A scaled loss is one over fewer tokens. Scaled afterwards, what the chunked loss keeps would have vanished.
        scale = self.loss_scale.value()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for micro in range(self.job.gradient_accumulation_steps):
            self.begin("forward", step)
            batch = self._micro_batch(step, micro)
            batch = batch.to(self.device)
            with self.parallel.micro_batch(is_last=micro == self.job.gradient_accumulation_steps - 1):
                loss = self.parallel(batch, share / scale)
                self.begin("backward", step)
                loss.backward()
            total += loss.detach()
            del loss, batch
        loss_of_step = self.group.add_up(total).item() / self.group.world_size / scale
        return StepResult(step, loss_of_step, learning_rate(self.job.train, step), num_tokens)

    def _micro_batch(self, step: int, micro: int) -> MicroBatch:
        """This rank's micro batch (from 0), with the random state that belongs to it."""
        number = self._number(micro)
        seed_micro_batch(self.job.train.seed, step, number)
        return self.batches.micro_batch(step, number)

    def _number(self, micro: int) -> int:
        """Of this rank's micro batch among those of the global batch."""
        return micro * self.group.world_size + self.group.rank

    def _forward_and_backward(self, step: int) -> StepResult:
        if self.npt is None:
            return self._step_language_model(step)
        if self.npt.is_end_to_end:
            return self._step_npt_end_to_end(step)
        return self._step_npt(step, self.npt)

    def _step_npt_end_to_end(self, step: int) -> StepResult:
        lengths = self.batches.lengths(step)
        num_tokens = sum(sum(micro) for micro in lengths)
        totals = torch.zeros(())
        for micro in range(self.job.gradient_accumulation_steps):
            self.begin("forward", step)
            batch = self._micro_batch(step, micro).to(self.device)
            share = sum(lengths[self._number(micro)]) / num_tokens
            found = self.parallel.step.distil(batch)
            self.begin("backward", step)
            (found.objective * share).backward()
            ends = torch.stack([found.objective.detach(), found.relative_error]).float().cpu()
            totals = totals + share * torch.cat([ends, found.delta_norm.float().cpu()])
            del found, batch
        self.parallel.reduce_gradients()
        objective, relative_error, *norms = self.group.add_up(totals).tolist()
        rate = learning_rate(self.job.train, step)
        by_layer = dict(zip(self.npt.layers if self.npt else (), norms))
        return StepResult(step, objective, rate, num_tokens, {"end_to_end": relative_error}, by_layer)

    def _step_npt(self, step: int, npt: NptSteps) -> StepResult:
        lengths = self.batches.lengths(step)
        num_tokens = sum(sum(micro) for micro in lengths)
        total = npt.sums()
        for micro in range(self.job.gradient_accumulation_steps):
            self.begin("forward", step)
            batch = self._micro_batch(step, micro)
            batch = batch.to(self.device)
            share = sum(lengths[self._number(micro)]) / num_tokens
            metrics = npt.local(batch, share, step)
            total.add(npt.objective(metrics), metrics, share)
            del batch
        self.parallel.reduce_gradients()
        mean = total.mean()
        rate = learning_rate(self.job.train, step)
        return StepResult(step, mean.objective, rate, num_tokens, mean.relative_error, mean.delta_norm)

    @torch.no_grad()
    def evaluate(self, batches: Batches, step: int) -> Evaluation:
        """
        Loss over one pass of `batches` after a step, without dropout; for NPT the mean objective, and what is measured
        of its blocks.

        The memory it takes stays below that of a training step: the same batch, and nothing saved for
        backward.
        """
        self.begin("evaluation", step)
        model, was_training = self.built.model, self.built.model.training
        model.eval()
        try:
            if self.npt is None:
                return Evaluation(self._evaluate_language_model(batches))
            measure = self.npt.evaluate(self._share_of_pass(batches))
            entropies = self.npt.cross_entropies(self._share_of_pass(batches))
            return Evaluation(measure.objective, measure, entropies)
        finally:
            self.parallel.settle()
            model.train(was_training)

    def _evaluate_language_model(self, batches: Batches) -> float:
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        num_tokens = torch.zeros((), dtype=torch.int64)
        for batch in self._share_of_pass(batches):
            num_tokens += (batch.labels[:, 1:] != IGNORE_INDEX).sum()
            total += self.parallel(batch.to(self.device), 1)
        return self.group.add_up(total).item() / int(self.group.add_up(num_tokens))

    def _share_of_pass(self, batches: Batches) -> Iterator[MicroBatch]:
        """
        This rank's micro batches of one pass, as many as any other's: sharded ranks gather together. Where there is
        none left, one in which nothing counts.
        """
        world_size, rank = self.group.world_size, self.group.rank
        mine: MicroBatch | None = None
        for number, batch in enumerate(batches.one_pass()):
            turn = number % world_size
            if turn == 0 and mine is not None:
                yield mine
                mine = None
            if turn == rank:
                mine = batch
            elif mine is None:
                mine = MicroBatch(
                    batch.input_ids,
                    torch.full_like(batch.labels, IGNORE_INDEX),
                    batch.position_ids,
                    torch.zeros_like(batch.labels, dtype=torch.bool),
                )
        if mine is not None:
            yield mine


def _npt_steps(job: Job, parallel: Parallel) -> NptSteps | None:
    if job.method != "npt":
        return None
    from memplan.train.npt_steps import NptSteps

    return NptSteps(job, parallel)


def seed_micro_batch(seed: int, step: int, micro: int) -> None:
    """
    Set every generator that dropout draws from: a function of the arguments, so that resuming needs no stored
    state. `micro` counts over all ranks.
    """
    torch.manual_seed(derive_seed(seed, step, micro))
