"""
What the worker asks of a device. `CudaDevice` is a thin layer over torch.cuda; `CpuDevice` takes the
profiler's account for the truth.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from memplan.errors import MemplanError
from memplan.record.phases import END, tape_phases, up_to_end
from memplan.record.profile import NotTheSame, Profile, Witnessed, label, tape_of
from memplan.tape.tape import FlatTape

HISTORY_ENTRIES = 2_000_000
"""Entries of the allocator's history; a step of a large model makes some tens of thousands."""
_PEAKS = {
    "allocated_peak_bytes": "allocated_bytes.all.peak", "requested_peak_bytes": "requested_bytes.all.peak",
    "reserved_peak_bytes": "reserved_bytes.all.peak", "allocated_bytes": "allocated_bytes.all.current",
    "reserved_bytes": "reserved_bytes.all.current", "num_alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
}  # fmt: skip


class Device(Protocol):
    """A device that steps run on and are measured on."""

    type: str
    tensors: torch.device
    """Where tensors go."""

    def open(self) -> dict[str, Any]:
        """Begin to measure; returns the record's `device`."""

    def begin(self, phase: str, step: int) -> None:
        """A phase begins, and the one before it ends."""

    def end(self) -> None:
        """The last phase is over; called once, also after a failure."""

    def phases(self) -> list[dict[str, Any]]:
        """The phases that are over; empty before `end` where the measure is taken at the end."""

    def process(self) -> dict[str, Any]:
        """The record's `process`, as far as it is known."""

    def statistics(self) -> dict[str, int]:
        """The allocator's own, at the end."""

    def segments(self) -> list[list[Any]]:
        """The record's `segments`."""

    def trace(self) -> tuple[FlatTape, str | None]:
        """
        Every event since `open`, and what is wrong with the account of it, if anything is. Call it after
        `end`. Raises ValueError where there is none.
        """


def make_device(*, history: bool = True, limit_bytes: int | None = None) -> Device:
    """CUDA where torch sees a GPU, else the CPU. `limit_bytes` caps the CUDA allocator."""
    if torch.cuda.is_available():
        return CudaDevice(torch.cuda, history=history, limit_bytes=limit_bytes)
    return CpuDevice()


def device_used_bytes() -> int | None:
    """What the driver says is in use on the first visible GPU, by whoever; None where it cannot be asked."""
    from memplan.gpu.nvml import NvmlProbe
    from memplan.gpu.probe import GpuReading
    from memplan.gpu.visible import visible_devices

    with suppress(MemplanError, OSError):
        devices, _ = visible_devices(NvmlProbe().read(), os.environ)
        if devices and isinstance(devices[0], GpuReading):
            return devices[0].used_bytes
    return None


class Profiler(Protocol):
    """What `Profile` does."""

    def mark(self, phase: str, step: int) -> None:
        """A phase begins."""

    def stop(self) -> Witnessed:
        """End profiling and say what it saw."""


class CudaDevice:
    """
    The CUDA caching allocator's statistics at every phase boundary, and its history.

    Args:
        cuda: the module `torch.cuda`, or a double of it.
        tensors: where tensors go; another device than CUDA only with a double.
        history: record every event; without it there is no trace.
        limit_bytes: the most that the allocator may reserve.
        used_bytes: asks the driver what is in use without making a context.
        make_profile: starts a profiler.
    """

    type = "cuda"

    def __init__(
        self,
        cuda: Any,
        *,
        tensors: torch.device | None = None,
        history: bool = True,
        limit_bytes: int | None = None,
        used_bytes: Callable[[], int | None] = device_used_bytes,
        make_profile: Callable[[], Profiler] = Profile,
    ) -> None:
        self.cuda = cuda
        self.tensors = torch.device("cuda", 0) if tensors is None else tensors
        self._history = history
        self._limit_bytes = limit_bytes
        self._used_bytes = used_bytes
        self._make_profile = make_profile
        self._process: dict[str, Any] = {}
        self._phases: list[dict[str, Any]] = []
        self._current: tuple[str, int] | None = None
        self._profile: Profiler | None = None
        self._witnessed: Witnessed | None = None
        self._snapshot: dict[str, Any] | None = None

    def open(self) -> dict[str, Any]:
        self._process["used_before_context_bytes"] = self._used_bytes()
        self.cuda.init()
        self.cuda.synchronize()  # the context exists from the first call to the driver on
        self._note_process("after_context")
        self._process["used_after_context_bytes"] = self._used_bytes()
        properties = self.cuda.get_device_properties(0)
        if self._limit_bytes is not None:
            self.cuda.set_per_process_memory_fraction(
                min(1.0, self._limit_bytes / properties.total_memory), 0
            )
        if self._history:
            self.cuda.memory._record_memory_history(
                "all", context="alloc", stacks="python", max_entries=HISTORY_ENTRIES
            )
            self._profile = self._make_profile()
        return {
            "type": "cuda",
            "name": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "total_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "limit_bytes": self._limit_bytes,
        }

    def begin(self, phase: str, step: int) -> None:
        self._close()
        self.cuda.reset_peak_memory_stats(0)
        self._current = (phase, step)
        if self._profile is not None:
            self._profile.mark(phase, step)
        if self._history:
            with suppress(AttributeError):  # absent before torch 2.10
                self.cuda.memory._set_memory_metadata(f"{phase} of step {step}" if step else phase)

    def end(self) -> None:
        self._close()
        self._current = None
        self._note_process("at_end")
        if self._profile is not None:
            profile, self._profile = self._profile, None
            self._witnessed = profile.stop()
        if self._history:
            self._snapshot = self.cuda.memory._snapshot()
            self.cuda.memory._record_memory_history(enabled=None)

    def phases(self) -> list[dict[str, Any]]:
        return [phase for phase in self._phases if phase["phase"] != END]

    def process(self) -> dict[str, Any]:
        return self._process

    def statistics(self) -> dict[str, int]:
        return {name: value for name, value in self.cuda.memory_stats(0).items() if value}

    def segments(self) -> list[list[Any]]:
        snapshot = self._snapshot or self.cuda.memory._snapshot()
        return [
            [
                segment["total_size"],
                segment["allocated_size"],
                segment["stream"],
                segment["segment_type"],
                bool(segment.get("is_expandable")),
            ]
            for segment in snapshot["segments"]
        ]

    def trace(self) -> tuple[FlatTape, str | None]:
        from memplan.snapshot.read import tape_of as read_history

        if self._snapshot is None or self._witnessed is None:
            raise ValueError("the allocator's history was not recorded")
        history = read_history(self._snapshot, device=0)
        try:
            return up_to_end(label(history, self._witnessed.on("cuda"))), None
        except NotTheSame as error:
            return up_to_end(history), f"without operations: {error}"

    def _close(self) -> None:
        if self._current is None:
            return
        stats = self.cuda.memory_stats(0)
        free, total = self.cuda.mem_get_info(0)
        phase, step = self._current
        measured = {name: stats.get(key, 0) for name, key in _PEAKS.items()}
        self._phases.append({"phase": phase, "step": step, **measured, "device_used_bytes": total - free})

    def _note_process(self, moment_name: str) -> None:
        free, total = self.cuda.mem_get_info(0)
        self._process[f"mem_get_info_{moment_name}"] = {"free_bytes": free, "total_bytes": total}


class CpuDevice:
    """The CPU's allocations as the profiler reports them. There is no caching allocator: reserved is None."""

    type = "cpu"

    def __init__(self) -> None:
        self.tensors = torch.device("cpu")
        self._profile: Profile | None = None
        self._witnessed: Witnessed | None = None

    def open(self) -> dict[str, Any]:
        self._profile = Profile()
        return {
            "type": "cpu",
            "name": platform.machine(),
            "total_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        }

    def begin(self, phase: str, step: int) -> None:
        if self._profile is not None:
            self._profile.mark(phase, step)

    def end(self) -> None:
        if self._profile is not None:
            profile, self._profile = self._profile, None
            self._witnessed = profile.stop().on("cpu")

    def phases(self) -> list[dict[str, Any]]:
        return [] if self._witnessed is None else tape_phases(up_to_end(tape_of(self._witnessed)))

    def process(self) -> dict[str, Any]:
        return {}

    def statistics(self) -> dict[str, int]:
        return {}

    def segments(self) -> list[list[Any]]:
        return []

    def trace(self) -> tuple[FlatTape, str | None]:
        if self._witnessed is None:
            raise ValueError("the profiler was not stopped")
        return up_to_end(tape_of(self._witnessed)), None
