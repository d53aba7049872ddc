"""The whole preflight of a job on a machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from memplan.budget.result import Result, Verdict
from memplan.errors import NoLiveGpu
from memplan.gpu.capacity import Capacity
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.preflight.disk import DiskCheck, check_disk
from memplan.preflight.environment import AllocatorEnvironment, allocator_environment
from memplan.preflight.lints import Lint, Subject, lint
from memplan.preflight.live import LiveCheck, Machine, is_live, look, this_machine, wait_for
from memplan.preflight.verdict import judge

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob


@dataclass(frozen=True)
class Preflight:
    """What a preflight found. `result` holds capacity, verdict and warnings as well."""

    result: Result
    live: LiveCheck
    environment: AllocatorEnvironment
    lints: tuple[Lint, ...]
    disk: DiskCheck

    JSON_FIELDS: ClassVar[tuple[str, ...]] = ("live", "environment", "lints", "disk")
    """The fields that are not in the result already."""

    @property
    def capacity(self) -> Capacity | None:
        """The card asked about, or the one that is there; None without either."""
        return self.result.capacity

    @property
    def verdict(self) -> Verdict | None:
        """Whether the job fits on it; None without one."""
        return self.result.verdict

    def exit_code(self, *, strict: bool = False) -> int:
        """0 fits or nothing to compare with, 1 does not fit the card or the disk, 3 cannot tell."""
        state = self.verdict.state if self.verdict else "fits"
        if state == "does_not_fit" or not self.disk.is_enough or (strict and state == "tight"):
            return 1
        return 3 if state == "unknown" else 0

    def to_json(self) -> dict[str, Any]:
        """A plain dict of `JSON_FIELDS`."""
        return {name: _plain(getattr(self, name)) for name in self.JSON_FIELDS}


def run_preflight(
    loaded: LoadedJob,
    architecture: Architecture | None,
    result: Result,
    *,
    wait_seconds: float = 0.0,
    machine: Machine | None = None,
    on_wait: Callable[[str], None] | None = None,
) -> Preflight:
    """
    Judge `result` on the card that the job names, or else on the one that is there, and look around.

    With `wait_seconds`, a job that does not fit for now is judged again until it fits or the time is over;
    that makes sense for a live card only. Without a GPU the live check is skipped and says so.

    Raises:
        NoLiveGpu: `gpu: live` was asked for and there is none.
        GpuError: the GPU named means nothing to us.
    """
    machine = machine or this_machine()
    job = loaded.job
    judged = _judged(result, job, machine)
    waited = 0.0
    if wait_seconds and judged.capacity is not None and is_live(job.gpu):

        def fits() -> bool:
            nonlocal judged
            judged = _judged(result, job, machine)
            return judged.verdict is not None and judged.verdict.state != "does_not_fit"

        waited = wait_for(fits, wait_seconds, machine, on_wait)
    which = job.gpu if job.gpu is not None and is_live(job.gpu) else "live"
    lints = lint(Subject(job, architecture, machine.environ, machine.torch_version, machine.platform))
    warnings = dict.fromkeys([*judged.warnings, *map(str, lints)])
    return Preflight(
        result=replace(judged, warnings=tuple(warnings)),
        live=replace(look(machine, which), waited_seconds=waited),
        environment=allocator_environment(job, machine.torch_version, machine.platform, machine.environ),
        lints=lints,
        disk=check_disk(job, result, Path.cwd()),
    )


def _judged(result: Result, job: Job, machine: Machine) -> Result:
    """The result with capacity and verdict; without, where no card is named and none is there."""
    from memplan.gpu.capacity import live_capacity, resolve_capacity

    try:
        if job.gpu is None or is_live(job.gpu):
            capacity = live_capacity(job.gpu or "live", machine.probe, machine.environ)
        else:
            capacity = resolve_capacity(job.gpu)
    except NoLiveGpu:
        if job.gpu is not None:
            raise
        return result
    return replace(result, capacity=capacity, verdict=judge(result, capacity, job.margin))


def _plain(value: Any) -> Any:
    return [asdict(item) for item in value] if isinstance(value, tuple) else asdict(value)
