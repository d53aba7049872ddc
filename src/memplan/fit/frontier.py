"""How far one field can go before the job no longer fits: the longest sequence, the largest micro batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.errors import JobError
from memplan.fit.search import Evaluate, estimate_of
from memplan.gpu.capacity import Capacity
from memplan.job.spec import Job
from memplan.model.architecture import Architecture, Outline

STEPS = {"max_seq_len": 64, "micro_batch_size": 1}
"""The fields that can be maximised; values are multiples of the step."""

LARGEST_MICRO_BATCH = 4096
LARGEST_LENGTH = 1 << 20
"""Where the model's config names no longest sequence."""


@dataclass(frozen=True)
class Frontier:
    """The largest value of a field with which the job fits."""

    field: str
    value: int | None
    """None if the job does not fit even with the smallest value."""
    need_bytes: int
    """With `value`; with the smallest value if that is None."""
    headroom_bytes: int
    """Negative if `value` is None."""
    limit: str
    """What stops it: `capacity`, `max_position_embeddings`, or `largest tried`."""


def maximize(
    job: Job,
    architecture: Architecture | Outline,
    capacity: Capacity,
    field: str,
    *,
    evaluate: Evaluate | None = None,
) -> Frontier:
    """
    The largest `max_seq_len` or `micro_batch_size` with which the job fits in `capacity.usable_bytes`.

    `max_seq_len` is a multiple of 64, at most the model's `max_position_embeddings`. `micro_batch_size` is
    any number up to 4096, with the accumulation steps as they are, so that the global batch grows with it.
    The value fits and the next one does not, or its lower bound is already above the capacity; where need
    rises with the field, that makes it the largest of all.

    Raises `JobError` for another field, and `MemplanError` if the job cannot be estimated.
    """
    if field not in STEPS:
        raise JobError(f"{field} cannot be maximised", hint=f"maximise {' or '.join(STEPS)}")
    step = STEPS[field]
    named = architecture.max_position_embeddings if field == "max_seq_len" else 0
    largest = named or (LARGEST_LENGTH if field == "max_seq_len" else LARGEST_MICRO_BATCH)
    if largest < step:
        raise JobError(
            f"{field} is maximised in multiples of {step}, and {architecture.name} takes at most {largest}",
            hint="set the length yourself and ask whether it fits",
        )
    search = _Search(job, field, step, capacity.usable_bytes, evaluate or estimate_of(architecture))
    count = search.largest(largest // step)
    need_bytes = search.need_bytes(max(count, 1))
    stopped_by = "max_position_embeddings" if named else "largest tried"
    return Frontier(
        field=field,
        value=count * step or None,
        need_bytes=need_bytes,
        headroom_bytes=capacity.usable_bytes - need_bytes,
        limit=stopped_by if count == largest // step else "capacity",
    )


class _Search:
    """One field in multiples of its step, and every need computed so far."""

    def __init__(self, job: Job, field: str, step: int, limit_bytes: int, evaluate: Evaluate) -> None:
        self.job = job
        self.field = field
        self.step = step
        self.limit_bytes = limit_bytes
        self.evaluate = evaluate
        self.needs: dict[int, int] = {}

    def largest(self, most: int) -> int:
        """
        The last multiple up to `most` that fits, 0 if none: the last by lower bound, then down from there.
        """
        start, beyond = 0, 1
        while beyond <= most and self._may_fit(beyond):  # long sequences take long to plan
            start, beyond = beyond, 2 * beyond
        low = _last(self._may_fit, start, min(beyond, most + 1))
        high = low + 1
        distance = 1
        while low and not self._fits(low):
            high, low = low, max(low - distance, 0)
            distance *= 2
        return _last(self._fits, low, high)

    def need_bytes(self, count: int) -> int:
        if count not in self.needs:
            self.needs[count] = self.evaluate.need_bytes(self._job(count))
        return self.needs[count]

    def _fits(self, count: int) -> bool:
        return self.need_bytes(count) <= self.limit_bytes

    def _may_fit(self, count: int) -> bool:
        return self.evaluate.lower_bound_bytes(self._job(count)) <= self.limit_bytes

    def _job(self, count: int) -> Job:
        return self.job.replace(**{self.field: count * self.step})


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """
    The last integer in [low, high) for which `holds`, given that it does for `low` and not from some point
    on.
    """
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
