"""Two sides side by side: results with their totals, phases and categories, and the tensors that differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from memplan.budget.result import PhaseLine, Result, Verdict
from memplan.gpu.capacity import Capacity
from memplan.job.fields import field_value, job_fields
from memplan.job.spec import AllocatorSettings
from memplan.snapshot.diff import TapeDiff, diff_tapes
from memplan.tape.tape import CATEGORIES, PHASES, WrittenTape

SCHEMA_VERSION = 1

TOTALS: dict[str, Callable[[Result], int]] = {
    "need": lambda result: result.need_bytes,
    "allocated": lambda result: result.peak.allocated_bytes,
    "reserved": lambda result: result.peak.reserved_bytes,
    "device": lambda result: result.peak.device_bytes,
}


@dataclass(frozen=True)
class Side:
    """A job or a recording: what was typed, and what there is to know about it."""

    source: str
    written: WrittenTape
    settings: AllocatorSettings
    result: Result

    @property
    def is_recording(self) -> bool:
        """Whether it was measured, so that its tensors have neither categories nor shapes."""
        return any(line.category == "unknown" for line in self.result.budget)

    def to_json(self) -> dict[str, Any]:
        """The parts of its result that say what it is, and when its peak is."""
        result = self.result
        return {
            "source": self.source,
            "engine": result.engine,
            "peak": asdict(result.peak),
            "capacity": _plain(result.capacity),
            "verdict": _plain(result.verdict),
            "warnings": list(result.warnings),
        }


@dataclass(frozen=True)
class Amount:
    """One number on both sides; None where a side has no such phase."""

    name: str
    a_bytes: int | None
    b_bytes: int | None

    @property
    def change_bytes(self) -> int:
        """What B takes more than A."""
        return (self.b_bytes or 0) - (self.a_bytes or 0)


@dataclass(frozen=True)
class Comparison:
    """What B takes more than A, from the totals down to the tensors."""

    a: Side
    b: Side
    fields: dict[str, tuple[Any, Any]]
    """Fields of the job that differ, dotted; empty unless both sides are jobs."""
    totals: tuple[Amount, ...]
    """`need`, `allocated`, `reserved`, `device`: each side at its own peak."""
    categories: tuple[Amount, ...]
    """
    At the peak of each side. A recording has none of its own: beside a plan, its tensors count where the plan's of the
    same size do, and the rest is `unknown`.
    """
    phases: tuple[Amount, ...]
    """The highest allocated bytes of each phase over all steps."""
    tensors: TapeDiff

    @property
    def need(self) -> Amount:
        return self.totals[0]

    def to_json(self) -> dict[str, Any]:
        """A plain dict for `json.dumps`, with `schema_version`."""
        return {
            "schema_version": SCHEMA_VERSION,
            "a": self.a.to_json(),
            "b": self.b.to_json(),
            "fields": {name: list(values) for name, values in self.fields.items()},
            **{
                name: [asdict(amount) | {"change_bytes": amount.change_bytes} for amount in amounts]
                for name, amounts in (
                    ("totals", self.totals), ("categories", self.categories), ("phases", self.phases),
                )
            },
            "alike": {
                "bytes": self.tensors.alike_bytes,
                "count": self.tensors.alike_count,
                "by_size": self.tensors.alike_by_size,
            },
            "tensors": [asdict(change) | {"change_bytes": change.change_bytes} for change in self.tensors.changes],
        }  # fmt: skip


def compare(a: Side, b: Side) -> Comparison:
    """Align two sides at their peaks and over their phases."""
    tensors = diff_tapes(a.written, b.written, settings_a=a.settings, settings_b=b.settings)
    return Comparison(
        a,
        b,
        fields=_fields(a.result, b.result),
        totals=tuple(Amount(name, read(a.result), read(b.result)) for name, read in TOTALS.items()),
        categories=_categories(_by_category(a, b, tensors), _by_category(b, a, tensors)),
        phases=_phases(a.result, b.result),
        tensors=tensors,
    )


def _fields(a: Result, b: Result) -> dict[str, tuple[Any, Any]]:
    if a.job is None or b.job is None:
        return {}
    pairs = {name: (field_value(a.job, name), field_value(b.job, name)) for name in job_fields()}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _by_category(side: Side, other: Side, tensors: TapeDiff) -> Counter[str]:
    """Bytes by category at the peak of a side; those of a recording as far as the plan beside it explains them."""
    lines = Counter({line.category: line.bytes for line in side.result.budget})
    if side.is_recording and not other.is_recording:
        lines.update(tensors.alike_by_category)
        lines["unknown"] -= sum(tensors.alike_by_category.values())
    return +lines


def _categories(left: Counter[str], right: Counter[str]) -> tuple[Amount, ...]:
    names = [name for name in CATEGORIES if name in left or name in right]
    return tuple(Amount(name, left[name], right[name]) for name in names)


def _phases(a: Result, b: Result) -> tuple[Amount, ...]:
    left, right = _highest(a.phases), _highest(b.phases)
    names = dict.fromkeys([*(name for name in PHASES if name in left or name in right), *left, *right])
    return tuple(Amount(name, left.get(name), right.get(name)) for name in names)


def _highest(phases: tuple[PhaseLine, ...]) -> dict[str, int]:
    highest: dict[str, int] = {}
    for line in phases:
        highest[line.phase] = max(highest.get(line.phase, 0), line.allocated_peak_bytes)
    return highest


def _plain(value: Capacity | Verdict | None) -> dict[str, Any] | None:
    return None if value is None else asdict(value)
