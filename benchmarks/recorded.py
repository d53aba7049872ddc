"""
Our own measurements in `data/records/*.json`, made by `memplan record` and `python -m benchmarks.record`, as cases
beside the published ones. Those of the CPU and those that did not complete are no cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.published import Case, Measurement
from memplan.errors import UnknownModel
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.record.analyse import architecture_of, device_peak_bytes, planned_job
from memplan.record.file import COMPLETED, RecordFile
from memplan.tape.behaviour import Behaviour

FOLDER = Path(__file__).parent / "data" / "records"
SOURCE = "memplan record"


@dataclass(frozen=True)
class Recorded(Case):
    """One record. It is planned as `estimate` plans it: software and loop are those at hand."""

    record: RecordFile | None = None

    @property
    def is_recorded(self) -> bool:
        return True

    @cached_property
    def job(self) -> Job:
        return planned_job(self._record)

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self._record)

    @property
    def behaviour(self) -> Behaviour:
        return Behaviour.for_job(self.job)

    def need_bounds(self) -> tuple[int, int] | None:
        """What the limits say, where they were looked for: the largest that failed, and the smallest that completed."""
        limits = self._record.fields["limits"]
        if limits and limits["largest_failed_bytes"]:
            return limits["largest_failed_bytes"], limits["smallest_bytes"]
        return super().need_bounds()

    @property
    def _record(self) -> RecordFile:
        assert self.record is not None
        return self.record


def load_recorded(folder: Path = FOLDER) -> list[Case]:
    """A case for every completed record of a CUDA device, in the order of their names; none without the folder."""
    cases: list[Case] = []
    for path in sorted(folder.glob("*.json")):
        record = RecordFile.read(path)
        fields = record.fields
        if fields["outcome"] == COMPLETED and fields["device"]["type"] == "cuda":
            cases.append(_case(path.stem, record))
    return cases


def _case(name: str, record: RecordFile) -> Recorded:
    fields = record.fields
    figures = _measurements(record)
    unsupported = ""
    try:
        architecture_of(record)
    except UnknownModel as error:
        unsupported = error.message
    return Recorded(
        id=f"recorded-{name}",
        source=SOURCE,
        where=f"data/records/{name}.json",
        hardware=fields["device"]["name"],
        gpus=1,
        model=fields["job"]["model"],
        measured=figures[0],
        also_measured=tuple(figures[1:]),
        trust="high",
        scope="train",
        unsupported=unsupported,
        fields={} if unsupported else fields["job"],
        software={key: value for key, value in fields["versions"].items() if value},
        record=record,
    )


def _measurements(record: RecordFile) -> list[Measurement]:
    """Peaks over the steps, and of the whole process on the device."""
    phases = [phase for phase in record.fields["phases"] if phase["step"] > 0]
    figures = {
        "allocated": max(phase["allocated_peak_bytes"] for phase in phases),
        "reserved": max(phase["reserved_peak_bytes"] for phase in phases),
        "device": device_peak_bytes(record),
    }
    return [Measurement(name, value, f"{value} B") for name, value in figures.items() if value is not None]
