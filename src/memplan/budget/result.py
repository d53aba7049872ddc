"""The answer to "how much, what, when": `Result`, the same shape for every flag; bytes are ints."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol, TypeVar

from memplan.gpu.capacity import Capacity
from memplan.job.spec import Job

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Line:
    """Bytes of one category alive at a moment."""

    category: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class TensorLine:
    """One large tensor alive at the peak."""

    where: str
    shape: tuple[int, ...] | None
    dtype: str | None
    bytes: int
    category: str


@dataclass(frozen=True)
class Peak:
    """
    The highest moment. `device_bytes` = reserved + non_torch: what the driver would show with room to spare.
    """

    allocated_bytes: int
    reserved_bytes: int
    non_torch_bytes: int
    device_bytes: int
    phase: str
    step: int
    where: str
    """The tensor whose allocation made the peak, and the module it belongs to."""


@dataclass(frozen=True)
class PhaseLine:
    """Peak of one phase of one step."""

    phase: str
    step: int
    allocated_peak_bytes: int
    reserved_bytes: int
    budget: tuple[Line, ...]


class HasPeak(Protocol):
    """A peak of a phase of a step, planned or measured."""

    @property
    def phase(self) -> str: ...

    @property
    def step(self) -> int: ...

    @property
    def allocated_peak_bytes(self) -> int: ...


P = TypeVar("P", bound=HasPeak)
K = TypeVar("K", bound=Hashable)


def highest_by(peaks: Iterable[P], key: Callable[[P], K]) -> dict[K, P]:
    """The highest of the peaks that have a key in common, in order of first appearance."""
    highest: dict[K, P] = {}
    for peak in peaks:
        known = highest.get(key(peak))
        if known is None or peak.allocated_peak_bytes > known.allocated_peak_bytes:
            highest[key(peak)] = peak
    return highest


@dataclass(frozen=True)
class Host:
    """RAM that all ranks of one node take, loading included."""

    peak_bytes: int
    """Without what the system can take back."""
    budget: tuple[Line, ...]
    page_cache_bytes: int = 0
    """Of the files that loading reads or maps, once for all ranks: in RAM while there is room for it."""


@dataclass(frozen=True)
class ParameterCount:
    total: int
    trainable: int
    active: int | None
    """Those that one token passes through; None for a traced mixture of experts that has no program."""


@dataclass(frozen=True)
class ErrorBand:
    """Where the truth lies, given how far this engine was off for this kind of job."""

    low_bytes: int
    high_bytes: int
    source: str


@dataclass(frozen=True)
class Verdict:
    """`fits`, `tight` (the error band crosses the capacity), `does_not_fit` or `unknown`."""

    state: str
    headroom_bytes: int | None
    reason: str


@dataclass(frozen=True)
class Change:
    """A set of edits of the job that makes it fit. `set` maps dotted job fields to their new values."""

    set: dict[str, Any]
    summary: str
    tier: int
    slowdown: float
    """Predicted factor on the time of a step; 1.0 is no cost."""
    need_bytes: int
    headroom_bytes: int


@dataclass(frozen=True)
class Result:
    """
    Everything memplan knows about one job, or about one recording, which knows no job. `None` where it was not asked or
    is not known.
    """

    job: Job | None
    origins: dict[str, str]
    engine: dict[str, str]
    need_bytes: int
    peak: Peak
    error_band: ErrorBand | None
    budget: tuple[Line, ...]
    phases: tuple[PhaseLine, ...]
    top: tuple[TensorLine, ...]
    host: Host | None
    parameters: ParameterCount | None
    timeline: tuple[tuple[str, int, int], ...] = ()
    """
    (phase, step, live bytes) at points in order, for drawing; the largest value of each stretch of the tape.
    """
    capacity: Capacity | None = None
    verdict: Verdict | None = None
    changes: tuple[Change, ...] | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def with_warnings(self, *warnings: str) -> Result:
        """The result with more that is worth knowing."""
        return replace(self, warnings=(*self.warnings, *warnings))

    def to_json(self) -> dict[str, Any]:
        """A plain dict for `json.dumps`, with `schema_version`."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}
