"""What the evaluations of a run say: which was the best, and whether it is time to stop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class EvaluationHistory:
    """
    Evaluation losses by step. It holds nothing that `metrics.jsonl` does not: a resumed run rebuilds it from there.

    >>> history = EvaluationHistory({2: 1.5, 4: 1.2, 6: 1.3})
    >>> history.best_step, history.num_since_best, history.is_exhausted(1), history.is_exhausted(2)
    (4, 1, True, False)
    """

    losses: dict[int, float] = field(default_factory=dict)

    @classmethod
    def from_metrics(cls, lines: Iterable[dict[str, Any]]) -> EvaluationHistory:
        """The history in lines of `metrics.jsonl`."""
        return cls({line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line})

    def add(self, step: int, loss: float) -> None:
        """An evaluation after `step`."""
        self.losses[step] = loss

    @property
    def best_step(self) -> int | None:
        """The step with the lowest loss, of equal ones the first; None before the first evaluation."""
        return min(self.losses, key=lambda step: (self.losses[step], step), default=None)

    @property
    def num_since_best(self) -> int:
        """Evaluations since the best one."""
        best = self.best_step
        return 0 if best is None else sum(step > best for step in self.losses)

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row were no better than the best one before them."""
        return patience is not None and self.num_since_best >= patience
