"""
Measured peaks per phase: the plan's other half.

A meter is told when a phase begins and remembers, for every phase of every step it saw, the most bytes that
were allocated at once. On CUDA the caching allocator counts by itself. On the CPU torch's profiler reports
every allocation and free; it runs while the model loads and for `PROFILED_STEPS` optimizer steps, then stops,
so the rest of the run is not slowed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import nn

from memplan.train.record import PhasePeak

PROFILED_STEPS = 3
_MARK = "memplan/"


class Meter(Protocol):
    """What the loop tells about itself, and what can be read afterwards."""

    def begin(self, phase: str, step: int) -> None:
        """A phase begins here, and the one before it ends."""

    def adopt(self, model: nn.Module) -> None:
        """The model is loaded."""

    def end_step(self, step: int) -> None:
        """Optimizer step `step` (from 1) is over."""

    def peaks(self) -> list[PhasePeak]:
        """Everything measured so far, in order."""

    def peak_bytes(self) -> int | None:
        """The highest peak so far; None while it is not known yet."""

    def live_bytes(self) -> int:
        """Bytes to report beside the loss: allocated on CUDA, the process's resident set on the CPU."""


def make_meter(device: torch.device, *, steps: int = PROFILED_STEPS) -> Meter:
    """
    The meter for a device; on the CPU it starts profiling at once and stops after `steps` optimizer steps.
    """
    return CudaMeter(device) if device.type == "cuda" else CpuMeter(steps)


class CudaMeter:
    """Reads and resets the allocator's peak statistics at every phase boundary, for the whole run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._current: tuple[str, int] | None = None
        self._peaks: dict[tuple[str, int], PhasePeak] = {}

    def begin(self, phase: str, step: int) -> None:
        self._close()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._current = (phase, step)

    def adopt(self, model: nn.Module) -> None:
        """Nothing to add: the allocator has seen every weight."""

    def end_step(self, step: int) -> None:
        self._close()
        self._current = None

    def peaks(self) -> list[PhasePeak]:
        self._close()
        return list(self._peaks.values())

    def peak_bytes(self) -> int | None:
        return max((peak.allocated_peak_bytes for peak in self._peaks.values()), default=None)

    def live_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def _close(self) -> None:
        if self._current is None:
            return
        stats = torch.cuda.memory_stats(self.device)
        allocated, reserved = stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]
        # Later steps are kept only where they are worse, or a long run would record a line for each.
        phase, step = self._current
        key = (phase, min(step, PROFILED_STEPS + 1))
        known = self._peaks.get(key)
        if known is None or allocated > known.allocated_peak_bytes:
            reserved = max(reserved, known.reserved_bytes or 0) if known else reserved
            self._peaks[key] = PhasePeak(phase, step, allocated, reserved)


class CpuMeter:
    """
    Replays the CPU allocator's events from the profiler, split at marks that the loop leaves among them.

    Weights that reach memory past the allocator (mapped from a file) are not among the events; `adopt` adds
    them.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._model_bytes = 0
        self._num_steps = 0
        self._peaks: list[PhasePeak] | None = None
        self._profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._profiler.__enter__()

    def begin(self, phase: str, step: int) -> None:
        if self._profiler is not None:
            with torch.profiler.record_function(f"{_MARK}{phase}/{step}"):
                pass

    def end_step(self, step: int) -> None:
        self._num_steps += 1
        if self._num_steps >= self.steps:
            self._stop()

    def adopt(self, model: nn.Module) -> None:
        """Count the bytes of `model` that the allocator never saw; call it when the model is loaded."""
        if self._profiler is not None:
            self._model_bytes = storage_bytes([*model.parameters(), *model.buffers()])
            self.begin("adopt", 0)

    def peaks(self) -> list[PhasePeak]:
        self._stop()
        return self._peaks or []

    def peak_bytes(self) -> int | None:
        return max((peak.allocated_peak_bytes for peak in self._peaks or ()), default=None)

    def live_bytes(self) -> int:
        return resident_bytes()

    def _stop(self) -> None:
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        events = profiler.profiler.kineto_results.events()
        self._peaks = replay(
            ((event.start_ns(), event.name(), event.nbytes()) for event in events),
            model_bytes=self._model_bytes,
        )


def replay(events: Iterable[tuple[int, str, int]], *, model_bytes: int = 0) -> list[PhasePeak]:
    """
    Peaks per phase from (time, name, bytes) of profiler events: `[memory]` ones count, marks separate.

    At the `adopt` mark whatever `model_bytes` exceeds the bytes allocated until then is added, from there on
    and to the peak of loading.
    """
    relevant = [event for event in events if event[1] == "[memory]" or event[1].startswith(_MARK)]
    relevant.sort(key=lambda event: event[0])
    peaks: list[PhasePeak] = []
    live = peak = 0
    current: tuple[str, int] | None = None
    for _, name, num_bytes in relevant:
        if name == "[memory]":
            live += num_bytes
            peak = max(peak, live)
            continue
        phase, step = name[len(_MARK) :].rsplit("/", 1)
        if phase == "adopt":
            unseen = max(0, model_bytes - live)
            live += unseen
            peak = max(peak, live)
            continue
        if current is not None:
            peaks.append(PhasePeak(*current, allocated_peak_bytes=peak))
        current, peak = (phase, int(step)), live
    if current is not None:
        peaks.append(PhasePeak(*current, allocated_peak_bytes=peak))
    return _merge(peaks)


def _merge(peaks: list[PhasePeak]) -> list[PhasePeak]:
    """One line per phase and step: accumulation repeats forward and backward."""
    merged: dict[tuple[str, int], PhasePeak] = {}
    for peak in peaks:
        known = merged.get((peak.phase, peak.step))
        if known is None or peak.allocated_peak_bytes > known.allocated_peak_bytes:
            merged[peak.phase, peak.step] = peak
    return list(merged.values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors: tied weights count once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def resident_bytes() -> int:
    """Resident set of this process: now on Linux, its peak elsewhere."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
