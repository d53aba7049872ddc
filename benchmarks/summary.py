"""Median, percentile and worst of errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """Of a set of errors (predicted / measured - 1)."""

    count: int
    median: float
    """Of the absolute errors, as `p90`."""
    p90: float
    worst: float
    """The error that is largest in absolute value, with its sign."""
    too_low: int
    """How many predictions were below the measurement by more than 0.5 %."""


TOO_LOW = -0.005


def summarize(errors: Sequence[float]) -> Summary:
    """Raises ValueError for no errors."""
    if not errors:
        raise ValueError("there is nothing to summarize")
    sizes = sorted(abs(error) for error in errors)
    return Summary(
        count=len(sizes),
        median=_quantile(sizes, 0.5),
        p90=_quantile(sizes, 0.9),
        worst=max(errors, key=abs),
        too_low=sum(error < TOO_LOW for error in errors),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Between the two nearest values, as `statistics.quantiles` with the inclusive method."""
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)
