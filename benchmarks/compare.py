"""Predictions beside the published measurements: the same statistic, over the same part of the run."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from benchmarks.published import Case, Measurement
from memplan.allocator import (
    AllocatorOutOfMemory,
    Replay,
    replay,
    replay_with_need,
    reserved_at_either_pace,
)
from memplan.budget.count import count_parameters
from memplan.budget.outside import non_torch_bytes
from memplan.gpu.catalogue import match_gpu
from memplan.job.spec import DTYPE_BYTES
from memplan.tape.behaviour import Behaviour
from memplan.tape.tape import Mark
from memplan.tape.writer import write_tape

CAUSES = Path(__file__).parent / "data" / "causes.json"
PEAKS = ("allocated", "reserved", "device")
END = "allocated at the end of training"
UNSTATED = "not stated"
"""The statistic of sources that print none (`benchmarks.unstated`)."""

ONE_GPU = "transformers, one GPU"
ASSUMED = "transformers, one GPU, one assumption"
SHARDED = "transformers, several GPUs"
RECORDED = "recorded by us, one GPU"
TRACED = "peft's comparison of adapters, traced"
ALSO_TRACED = "transformers, one GPU, traced"
SCRIPTED = "scripts of their own, traced"
TITAN = "torchtitan under FSDP2, traced"
LITGPT = "litgpt on one GPU, traced"
TORCHTUNE = "torchtune on one GPU, traced"
OTHER = "litgpt under FSDP1"
GROUPS = (ONE_GPU, ASSUMED, SHARDED, OTHER, RECORDED, TITAN, LITGPT, TORCHTUNE, ALSO_TRACED, SCRIPTED, TRACED)
OWN_CODE = {"torchtitan": TITAN, "litgpt": LITGPT, "torchtune": TORCHTUNE}
"""By whose model code ran."""

SHAPE, TRACE = "shape", "trace"
"""The engines."""


@dataclass(frozen=True)
class Row:
    """One statistic of one case: what was measured and what memplan predicts."""

    case: Case
    measured: Measurement
    predicted_bytes: int
    engine: str = SHAPE

    @property
    def error(self) -> float:
        """predicted / measured - 1: above 0 the prediction is too high."""
        return self.predicted_bytes / self.measured.bytes - 1

    @property
    def group(self) -> str:
        if self.case.script:
            return SCRIPTED
        if self.case.model_code in OWN_CODE:
            return OWN_CODE[self.case.model_code] if self.engine == TRACE else OTHER
        if self.engine == TRACE:
            return TRACED if self.case.source == "peft" else ALSO_TRACED
        if self.case.is_recorded:
            return RECORDED
        if self.case.gpus > 1:
            return SHARDED
        return ASSUMED if self.case.completeness else ONE_GPU

    @property
    def cause(self) -> str:
        """Why it is off, where that was looked into; empty where it was not."""
        for entry in _causes():
            if entry["statistic"] == self.measured.statistic and fnmatchcase(self.case.id, entry["cases"]):
                return entry["cause"]
        return ""


@dataclass(frozen=True)
class NeedRow:
    """
    The need inside torch's allocator, predicted, and what the run shows of it: at least the peak that it allocated,
    at most what it reserved, since it completed in that.
    """

    case: Case
    allocated_bytes: int
    reserved_bytes: int
    predicted_bytes: int
    outside_bytes: int | None = None
    """
    What nvidia-smi showed beyond what the replay reserves; None where it is not the source's figure, and where the
    card's capacity bounds what is reserved.
    """

    @property
    def error(self) -> float:
        """How far the prediction lies outside of that, relative to it; 0 inside."""
        nearest = min(max(self.predicted_bytes, self.allocated_bytes), self.reserved_bytes)
        return self.predicted_bytes / nearest - 1


def compare_need(case: Case) -> NeedRow | None:
    """None for a case on several GPUs, and for one of which not both peaks are known."""
    if not case.fields or case.gpus > 1:
        return None
    bounds = case.need_bounds()
    if bounds is None:
        return None
    run = Run(case, case.behaviour)
    return NeedRow(case, *bounds, run.need_bytes(), run.outside_bytes())


def compare(case: Case) -> list[Row]:
    """A row per statistic of this case that memplan predicts; none for a case without a job or without a statistic."""
    if not case.fields or case.measured.statistic == UNSTATED:
        return []
    run = Run(case, case.behaviour)
    rows = []
    for measured in (case.measured, *case.also_measured):
        predicted = run.predict(measured.statistic)
        if predicted is not None:
            rows.append(Row(case, measured, predicted))
    return rows


class Run:
    """
    A case replayed as `estimate` replays it, without what a comparison does not ask for; `replay` is that with the host
    ahead of the device.
    """

    def __init__(self, case: Case, behaviour: Behaviour) -> None:
        self.case = case
        self.behaviour = behaviour
        self.tape = write_tape(case.job, case.architecture, behaviour=behaviour).flatten()
        self.replay = self._through_the_allocator()

    def predict(self, statistic: str) -> int | None:
        """Bytes of this statistic over the case's scope; None for one that is not predicted."""
        replayed = self.at_either_pace() if statistic == "reserved" else self.replay
        phases = [phase for phase in replayed.phases if self._inside(phase.mark)]
        if statistic == "allocated":
            return max(phase.allocated_peak_bytes for phase in phases) - self._between_stages_bytes()
        if statistic == "reserved":
            return max(phase.reserved_peak_bytes for phase in phases)
        if statistic == "device":
            return self._mean_over_ranks()
        if statistic == END and self.case.gpus == 1:
            return self.replay.allocated_bytes
        return None

    def at_either_pace(self) -> Replay:
        """With a device that keeps up; what is reserved is the higher of that and of `replay`, as in `estimate`."""
        if not self.tape.recorded:
            return self.replay
        tape = self.tape
        keeping_up = replay(tape.events, tape.sizes, tape.streams, self.case.job.allocator, marks=tape.marks)
        return reserved_at_either_pace(keeping_up, self.replay)

    def _between_stages_bytes(self) -> int:
        """
        What the sum of the Trainer's deltas over its stages leaves out: fms-acceleration puts adapters that FSDP is to
        leave alone onto the device after the Trainer was made and before it trains (its benchmarks' README: memory
        outside of the stages is not tracked).
        """
        if not self.behaviour.whole_adapters:
            return 0
        trained = count_parameters(self.case.job, self.case.architecture).trainable
        return trained * DTYPE_BYTES[self.case.job.lora.dtype]

    def outside_bytes(self) -> int | None:
        """See `NeedRow.outside_bytes`."""
        measured = (self.case.measured, *self.case.also_measured)
        device = next((figure.bytes for figure in measured if figure.statistic == "device"), None)
        reserved, limit = self.replay.peak_reserved_bytes, self.limit_bytes
        return None if device is None or (limit is not None and reserved > limit) else device - reserved

    def need_bytes(self) -> int:
        """The smallest capacity at which the tape completes."""
        tape = self.tape
        return replay_with_need(
            tape.events, tape.sizes, tape.streams, self.case.job.allocator, marks=tape.marks
        )[1]

    def _inside(self, mark: Mark) -> bool:
        return {"process": True, "train": mark.step > 0, "second step": mark.step == 2}[self.case.scope]

    def _mean_over_ranks(self) -> int:
        """What is published of several GPUs is their mean; ranks of FSDP1 have other parts of the tensors."""
        if not self.behaviour.fsdp1:
            return self._device_bytes()
        others = [
            Run(self.case, replace(self.behaviour, rank=rank))._device_bytes()
            for rank in range(1, self.case.gpus)
        ]
        return sum(others, self._device_bytes()) // self.case.gpus

    def _device_bytes(self) -> int:
        """What the driver shows: at a card's capacity the allocator gives its cache back instead of growing."""
        limit, replayed = self.limit_bytes, self.at_either_pace()
        if limit is not None and replayed.peak_reserved_bytes > limit:
            with suppress(AllocatorOutOfMemory):
                replayed = self._through_the_allocator(limit_bytes=limit)
        return replayed.peak_reserved_bytes + non_torch_bytes(self.case.job)[0]

    @property
    def limit_bytes(self) -> int | None:
        """What the card has for torch's allocator; None where it is not known."""
        job = self.case.job
        profile = None if job.gpu is None else match_gpu(job.gpu)
        capacity = None if profile is None else profile.torch_total_bytes or profile.memory_bytes
        return None if capacity is None else capacity - non_torch_bytes(job)[0]

    def _through_the_allocator(self, limit_bytes: int | None = None) -> Replay:
        tape = self.tape
        return replay(
            tape.events,
            tape.sizes,
            tape.streams,
            self.case.job.allocator,
            limit_bytes=limit_bytes,
            marks=tape.marks,
            recorded=tape.recorded,
            waits=tape.waits,
        )


@cache
def _causes() -> list[dict[str, str]]:
    entries: list[dict[str, str]] = json.loads(CAUSES.read_text(encoding="utf-8"))
    return entries
