"""
Measured peaks per phase: the plan's other half.

A meter is told when a phase begins and remembers, for every phase of every step it saw, the most bytes that
were allocated at once. On CUDA the caching allocator counts by itself. On the CPU torch's profiler reports
allocations and frees; it runs while the model loads and for `PROFILED_STEPS` optimizer steps, then stops, so the
rest of the run is not slowed.
"""

from __future__ import annotations

import os
import sys
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from memplan.budget.result import highest_by
from memplan.train.gloo import settled_collectives
from memplan.train.parallel import local_part
from memplan.train.record import PhasePeak

PROFILED_STEPS = 3
_MARK = "memplan/"
_MEMORY = "[memory]"
_MAPPED = f"{_MARK}mapped"
_ADOPTED, _BETWEEN = "adopted", "between"
"""Marks that are no phases: the model is loaded; a step is over, and what saving takes is no part of it."""


class Meter(Protocol):
    """What the loop tells about itself, and what can be read afterwards."""

    counts_allocations: bool
    """Whether `live_bytes` is what tensors take, and not the whole process."""

    def begin(self, phase: str, step: int) -> None:
        """A phase begins here, and the one before it ends."""

    def adopt(self, model: nn.Module, others: Iterable[torch.Tensor] = ()) -> None:
        """The model is loaded; `others` are tensors that are there beside its parameters and buffers."""

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

    counts_allocations = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._current: tuple[str, int] | None = None
        self._peaks: dict[tuple[str, int], PhasePeak] = {}

    def begin(self, phase: str, step: int) -> None:
        self._close()
        torch.cuda.reset_peak_memory_stats(self.device)
        self._current = (phase, step)

    def adopt(self, model: nn.Module, others: Iterable[torch.Tensor] = ()) -> None:
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

    counts_allocations = False

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._model_bytes = 0
        self._num_steps = 0
        self._peaks: list[PhasePeak] | None = None
        self._profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._stack = ExitStack()
        self._stack.enter_context(settled_collectives())
        self._stack.enter_context(_marked_mappings())
        self._stack.enter_context(self._profiler)

    def begin(self, phase: str, step: int) -> None:
        if self._profiler is not None:
            with torch.profiler.record_function(f"{_MARK}{phase}/{step}"):
                pass

    def end_step(self, step: int) -> None:
        self._num_steps += 1
        self.begin(_BETWEEN, step)
        if self._num_steps >= self.steps:
            self._stop()

    def adopt(self, model: nn.Module, others: Iterable[torch.Tensor] = ()) -> None:
        """Count the bytes of `model` that the allocator never saw; call it when the model is loaded."""
        if self._profiler is not None:
            self._model_bytes = storage_bytes([*model.parameters(), *model.buffers(), *others])
            self.begin(_ADOPTED, 0)

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
        self._stack.close()
        roots = profiler.profiler.kineto_results.experimental_event_tree()
        self._peaks = replay(_read_tree(roots), model_bytes=self._model_bytes)


@dataclass(frozen=True)
class Event:
    """What the profiler reports: so many bytes allocated at an address, or freed if negative; or one of our marks."""

    time_ns: int
    name: str
    address: int = 0
    num_bytes: int = 0


def _read_tree(roots: Iterable[Any]) -> Iterator[Event]:
    """The events of memory and the marks in the profiler's trees, each tree in its order."""
    stack = list(roots)[::-1]
    while stack:
        event = stack.pop()
        name = event.name
        if (
            name == _MAPPED
        ):  # what is in it is no allocation; its free, later, is that of a block nobody knows
            continue
        stack += event.children[::-1]
        if name == _MEMORY:
            fields = event.extra_fields
            yield Event(event.start_time_ns, name, fields.ptr, fields.alloc_size)
        elif name.startswith(_MARK):
            yield Event(event.start_time_ns, name)


@contextmanager
def _marked_mappings() -> Iterator[None]:
    """
    Files that safetensors maps inside are marked: torch reports them as if their bytes were allocated, and they are the
    page cache's.
    """
    original = torch.UntypedStorage.from_file

    def from_file(*arguments: Any, **named: Any) -> Any:
        with torch.profiler.record_function(_MAPPED):
            return original(*arguments, **named)

    torch.UntypedStorage.from_file = staticmethod(from_file)
    try:
        yield
    finally:
        del torch.UntypedStorage.from_file


class LiveBlocks:
    """
    Blocks of memory that are allocated, by address.

    The profiler sees no free on a thread that it does not follow, as gloo's are (`settled_collectives` keeps nearly all
    frees off them). A block whose memory is given out again was freed before, and is counted until then.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._sizes: dict[int, int] = {}
        self._addresses: list[int] = []
        """Sorted. Blocks do not overlap."""

    def allocate(self, address: int, num_bytes: int) -> None:
        """A block is there, and none of those that it overlaps is any more."""
        index = bisect_left(self._addresses, address)
        if index:
            before = self._addresses[index - 1]
            if before + self._sizes[before] > address:
                self.free(before)
                index -= 1
        while index < len(self._addresses) and self._addresses[index] < address + num_bytes:
            self.free(self._addresses[index])
        insort(self._addresses, address)
        self._sizes[address] = num_bytes
        self.num_bytes += num_bytes

    def free(self, address: int) -> None:
        """A block goes; nothing happens where none is known."""
        num_bytes = self._sizes.pop(address, None)
        if num_bytes is not None:
            del self._addresses[bisect_left(self._addresses, address)]
            self.num_bytes -= num_bytes


def replay(events: Iterable[Event], *, model_bytes: int = 0) -> list[PhasePeak]:
    """
    Peaks per phase from what the profiler has reported.

    At the mark of `adopt` whatever `model_bytes` exceeds the bytes allocated until then is added, from there on
    and to the peak of loading.
    """
    peaks: list[PhasePeak] = []
    blocks = LiveBlocks()
    unseen = peak = 0
    current: tuple[str, int] | None = None
    for event in sorted(events, key=lambda event: event.time_ns):
        if event.name == _MEMORY:
            if event.num_bytes > 0:
                blocks.allocate(event.address, event.num_bytes)
            else:
                blocks.free(event.address)
            peak = max(peak, unseen + blocks.num_bytes)
            continue
        phase, step = event.name[len(_MARK) :].rsplit("/", 1)
        if phase == _ADOPTED:
            unseen = max(0, model_bytes - blocks.num_bytes)
            peak = max(peak, unseen + blocks.num_bytes)
            continue
        if current is not None:
            peaks.append(PhasePeak(*current, allocated_peak_bytes=peak))
        current = (phase, int(step)) if phase != _BETWEEN else None
        peak = unseen + blocks.num_bytes
    if current is not None:
        peaks.append(PhasePeak(*current, allocated_peak_bytes=peak))
    # One line per phase and step: accumulation repeats forward and backward.
    return list(highest_by(peaks, lambda peak: (peak.phase, peak.step)).values())


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind tensors on this rank: tied weights count once."""
    storages = [local_part(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def inventory(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes on this rank of weights (adapters and buffers included), gradients and optimizer states."""
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    return {
        "weights": storage_bytes([*parameters, *model.buffers()]),
        "gradients": storage_bytes(p.grad for p in parameters if p.grad is not None),
        "optimizer": storage_bytes(value for value in states if isinstance(value, torch.Tensor)),
    }


def resident_bytes() -> int:
    """Resident set of this process: now on Linux, its peak elsewhere."""
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
