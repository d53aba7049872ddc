"""
A double of `torch.cuda`: its allocator is the simulation, and what it allocates is a tape, a phase at a time.

The real steps run on the CPU meanwhile; they only decide when phases begin.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from memplan.allocator import CachingAllocator
from memplan.job.spec import AllocatorSettings, Job
from memplan.record.analyse import architecture_of
from memplan.record.device import CudaDevice
from memplan.record.file import RecordFile
from memplan.record.profile import Allocation, Witnessed
from memplan.tape.tape import FlatTape
from memplan.tape.writer import write_tape
from memplan.units import GiB, MiB

CONTEXT_BYTES = 500 * MiB
OTHERS_BYTES = 1 * GiB
TOTAL_BYTES = 140 * GiB


class CudaDouble:
    """The functions of `torch.cuda` that `CudaDevice` calls, for a process that allocates as `flat` does."""

    def __init__(self, flat: FlatTape, settings: AllocatorSettings, *, fails_in: int | None = None) -> None:
        self.flat = flat
        self.allocator = CachingAllocator(settings)
        self.block_sizes = self.allocator.all_block_bytes(flat.tape.sizes)
        self.bounds = [*(mark.event for mark in flat.tape.marks), len(flat.tape.events)]
        self.phase = 0
        self.fails_in = fails_in
        """Index of the phase that runs out of memory."""
        self.has_context = False
        self.history: list[Any] = []
        self.metadata: list[str] = []
        self.fraction: float | None = None
        self.memory = SimpleNamespace(
            _record_memory_history=lambda *arguments, **options: self.history.append((arguments, options)),
            _set_memory_metadata=self.metadata.append,
            _snapshot=self.snapshot,
        )

    def init(self) -> None:
        """torch.cuda.init makes no context."""

    def synchronize(self) -> None:
        """The first call to the driver makes the context."""
        self.has_context = True

    def get_device_properties(self, index: int) -> SimpleNamespace:
        """Of a card of the catalogue."""
        return SimpleNamespace(
            name="NVIDIA H200", major=9, minor=0, total_memory=TOTAL_BYTES, multi_processor_count=132
        )

    def set_per_process_memory_fraction(self, fraction: float, index: int) -> None:
        """The cap."""
        self.fraction = fraction

    def mem_get_info(self, index: int = 0) -> tuple[int, int]:
        """(free, total)"""
        self.has_context = True
        return TOTAL_BYTES - self.used_bytes(), TOTAL_BYTES

    def used_bytes(self) -> int:
        """What the driver says is in use."""
        return OTHERS_BYTES + self.has_context * CONTEXT_BYTES + self.allocator.reserved_bytes

    def memory_stats(self, index: int = 0) -> dict[str, int]:
        """Runs the next phase first: the double's clock is the question how the phase went."""
        tape = self.flat.tape
        if self.phase < len(tape.marks):
            start, stop = self.bounds[self.phase : self.phase + 2]
            if self.phase == self.fails_in:
                self.phase = len(tape.marks)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 ...")
            self.allocator.run(tape.events[start:stop], self.block_sizes, tape.streams)
            self.phase += 1
        allocator = self.allocator
        return {
            "allocated_bytes.all.peak": allocator.peak_allocated_bytes,
            "allocated_bytes.all.current": allocator.allocated_bytes,
            "reserved_bytes.all.peak": allocator.peak_reserved_bytes,
            "reserved_bytes.all.current": allocator.reserved_bytes,
            "num_ooms": 0,
        }

    def reset_peak_memory_stats(self, index: int = 0) -> None:
        """Peaks begin anew."""
        self.allocator.reset_peaks()

    def snapshot(self) -> dict[str, Any]:
        """What the allocator's history would hold."""
        from memplan.snapshot import snapshot_of

        return snapshot_of(self.flat, self.allocator.settings)


class ProfileDouble:
    """A profiler that saw the events of a tape, each in an operation named after its storage."""

    def __init__(self, flat: FlatTape) -> None:
        self.flat = flat

    def mark(self, phase: str, step: int) -> None:
        """Marks are those of the tape."""

    def stop(self) -> Witnessed:
        """Two nanoseconds an event, marks in between."""
        tape = self.flat.tape
        allocations = []
        for index, event in enumerate(tape.events):
            size = -(-tape.sizes[abs(event)] // 512) * 512
            name = f"op{abs(event)}" if event > 0 else ""
            allocations.append(Allocation(2 * index, abs(event), size if event > 0 else -size, "cuda", name))
        marks = [(2 * mark.event - 1, mark.phase, mark.step) for mark in tape.marks]
        return Witnessed(allocations, marks)


def cuda_device(double: CudaDouble, **options: Any) -> CudaDevice:
    """The real layer over the double, tensors on the CPU."""
    return CudaDevice(
        double,
        tensors=torch.device("cpu"),
        used_bytes=double.used_bytes,
        make_profile=lambda: ProfileDouble(double.flat),
        **options,
    )


def flattened(job: Job, record: RecordFile) -> FlatTape:
    """The plan's tape, storages listed."""
    written = write_tape(job, architecture_of(record))
    tape = written.flatten()
    return FlatTape(tape, [written.describe(storage) for storage in range(1, len(tape.sizes))])
