"""
What the loop does with NPT layers: their micro batches, and what an evaluation measures of them. The planner writes
its tape in the order of these lines (memplan.tape.npt).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from memplan.job.spec import Job
from memplan.npt import npt_blocks, read_metrics, set_mode
from memplan.npt.curriculum import stream_at
from memplan.train.data import IGNORE_INDEX, MicroBatch

if TYPE_CHECKING:
    from memplan.npt import LocalMetrics
    from memplan.train.group import Group
    from memplan.train.parallel import Parallel


@dataclass(frozen=True)
class NptMeasure:
    """What was measured of NPT blocks over a batch or a pass."""

    objective: float
    """What is trained for: by `npt.objective`."""
    relative_error: dict[Any, float]
    """By layer, mean square of the difference to the original block over that of the block itself; `end_to_end`: the
    same of the last hidden states."""
    delta_norm: dict[int, float]
    """By layer, mean over tokens of the squared Frobenius norm of the weight deltas."""


class NptSteps:
    """Micro batches of NPT layers on one rank; sums are over all ranks."""

    def __init__(self, job: Job, parallel: Parallel) -> None:
        self.job = job
        self.parallel = parallel
        self.model = parallel.built.model
        self.layers = tuple(block.npt_layer for block in npt_blocks(self.model))
        """Indices of the converted blocks."""
        self.is_end_to_end = job.npt.objective == "end_to_end"

    def local(self, batch: MicroBatch, share: float, step: int) -> LocalMetrics:
        """
        Forward pass of a step in which every block runs its backward; the micro batch has this share of the global
        batch's tokens.
        """
        stream: Any = stream_at(self.job.npt, step, self.job.train.max_steps)
        set_mode(self.model, "local", stream=stream, loss_scale=share, token_mask=batch.token_mask)
        # Each layer turns gradients on for itself and runs its own backward.
        with torch.no_grad():
            self.parallel(batch)
        return read_metrics(self.model)

    def sums(self) -> Sums:
        """An empty sum of measures."""
        return Sums(self.parallel.group)

    def objective(self, metrics: LocalMetrics) -> float:
        """Mean over blocks of loss and penalty."""
        penalty = self.job.npt.regularization * metrics.delta_norm
        return float((metrics.loss + penalty).mean())

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> NptMeasure:
        """
        Objective, errors and norms over a pass. Blocks are measured on the hidden states of the original model,
        whatever they train on.
        """
        total = self.sums()
        for batch in batches:
            mask = batch.token_mask
            tokens = batch.input_ids.numel() if mask is None else int(mask.sum())
            batch = batch.to(self.parallel.group.device)
            whole = self.parallel.step.distil(batch) if self.is_end_to_end else None
            set_mode(self.model, "local", backward="never", token_mask=batch.token_mask)
            self.parallel(batch)
            metrics = read_metrics(self.model)
            objective = self.objective(metrics) if whole is None else whole.objective.item()
            total.add(objective, metrics, tokens, None if whole is None else whole.relative_error)
        return total.mean()

    @torch.no_grad()
    def cross_entropies(self, batches: Iterable[MicroBatch]) -> dict[str, float]:
        """Nats per predicted token over a pass, by mode: `base` is the original model."""
        modes: tuple[Literal["base", "npt"], ...] = ("base", "npt")
        sums = torch.zeros(3, dtype=torch.float64)
        for batch in batches:
            batch = batch.to(self.parallel.group.device)
            sums[0] += int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
            for position, mode in enumerate(modes, start=1):
                set_mode(self.model, mode)
                sums[position] += self.parallel(batch, 1).item()
        num_targets, base, npt = self.parallel.group.add_up(sums).tolist()
        return {"base": base / num_targets, "npt": npt / num_targets}


class Sums:
    """Weighted sums of what micro batches measured, on the host; `mean` adds them up over ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._layers: tuple[int, ...] = ()
        self._sums = torch.zeros((), dtype=torch.float64)
        self._has_end = False

    def add(
        self, objective: float, metrics: LocalMetrics, weight: float, end_to_end: torch.Tensor | None = None
    ) -> None:
        """One micro batch; `end_to_end` is the relative error of its last hidden states, where that is measured."""
        self._layers = metrics.layers
        self._has_end = end_to_end is not None
        errors, norms = metrics.relative_error.float().cpu(), metrics.delta_norm.float().cpu()
        values = [1.0, objective, *errors.tolist(), *norms.tolist()]
        if end_to_end is not None:
            values.append(end_to_end.item())
        self._sums = self._sums + weight * torch.tensor(values, dtype=torch.float64)

    def mean(self) -> NptMeasure:
        """The weighted mean over all ranks."""
        weight, objective, *values = self._group.add_up(self._sums).tolist()
        values = [value / weight for value in values]
        count = len(self._layers)
        errors: dict[Any, float] = dict(zip(self._layers, values[:count]))
        norms = dict(zip(self._layers, values[count : 2 * count]))
        if self._has_end:
            errors["end_to_end"] = values[-1]
        return NptMeasure(objective / weight, errors, norms)
