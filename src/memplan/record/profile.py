"""
torch's profiler as a witness of allocations: each with the operation that made it, in forward and backward,
on the CPU and on CUDA alike.

The caching allocator reports block sizes, not requested ones, and the profiler knows no streams; those come
from the allocator's own history. The history knows no operations in backward; those come from here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memplan.tape.tape import FlatTape, Mark, Storage, Tape

_MARK = "memplan/"
_MEMORY = "[memory]"
_ENGINE = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class Allocation:
    """One event: `num_bytes` > 0 were allocated at `address`, or < 0 freed, inside `operation`."""

    time_ns: int
    address: int
    num_bytes: int
    device_type: str
    operation: str


@dataclass(frozen=True)
class Witnessed:
    """What the profiler saw: allocations in order of time, and where phases begin among them."""

    allocations: list[Allocation]
    marks: list[tuple[int, str, int]]
    """(time in ns, phase, step)"""

    def on(self, device_type: str) -> Witnessed:
        """Of one type of device."""
        chosen = [event for event in self.allocations if event.device_type == device_type]
        return Witnessed(chosen, self.marks)

    def tape_marks(self) -> list[Mark]:
        """The marks by index among the allocations."""
        marks = []
        index = 0
        for time_ns, phase, step in self.marks:
            while index < len(self.allocations) and self.allocations[index].time_ns < time_ns:
                index += 1
            marks.append(Mark(index, phase, step))
        return marks


class Profile:
    """The profiler, from construction to `stop`; on the CPU, without tracing of kernels."""

    def __init__(self) -> None:
        self._profiler: Any = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        self._profiler.__enter__()

    def mark(self, phase: str, step: int) -> None:
        """A phase begins."""
        with torch.profiler.record_function(f"{_MARK}{phase}/{step}"):
            pass

    def stop(self) -> Witnessed:
        """End profiling and say what it saw; call it once."""
        self._profiler.__exit__(None, None, None)
        roots = self._profiler.profiler.kineto_results.experimental_event_tree()
        return read_tree(roots)


def read_tree(roots: Iterable[Any]) -> Witnessed:
    """The allocations and marks in the profiler's trees of events."""
    allocations, marks = [], []
    for event, path in _walk(roots):
        name = event.name
        if name == _MEMORY:
            fields = event.extra_fields
            allocations.append(
                Allocation(
                    event.start_time_ns,
                    fields.ptr,
                    fields.alloc_size,
                    torch.device(fields.device).type,
                    describe_path(path),
                )
            )
        elif name.startswith(_MARK):
            phase, step = name[len(_MARK) :].rsplit("/", 1)
            marks.append((event.start_time_ns, phase, int(step)))
    allocations.sort(key=lambda allocation: allocation.time_ns)
    marks.sort()
    return Witnessed(allocations, marks)


def _walk(roots: Iterable[Any]) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """Every event in its tree's order, with the names of those around it, the outermost first."""
    stack: list[tuple[Any, tuple[str, ...]]] = [(root, ()) for root in list(roots)[::-1]]
    while stack:
        event, path = stack.pop()
        yield event, path
        inside = (*path, event.name)
        stack += [(child, inside) for child in event.children[::-1]]


def describe_path(path: Sequence[str]) -> str:
    """
    The operations around an allocation in few words: the outermost and the innermost, behind the autograd
    node in backward. An optimizer's step stands for itself.

    >>> describe_path(["aten::linear", "aten::addmm"])
    'linear addmm'
    >>> describe_path(["autograd::engine::evaluate_function: MmBackward0", "MmBackward0", "aten::mm"])
    'MmBackward0: mm'
    """
    node = next((name[len(_ENGINE) :] for name in path if name.startswith(_ENGINE)), "")
    operations = [
        name.removeprefix("aten::") for name in path if not name.startswith(_ENGINE) and name != node
    ]
    ends = list(dict.fromkeys([*operations[:1], *operations[-1:]]))
    words = " ".join(ends)
    node = node.removeprefix("torch::autograd::")
    return f"{node}: {words}" if node and words else node or words


def tape_of(witnessed: Witnessed, *, category: str = "activations") -> FlatTape:
    """
    The tape of what was witnessed. Frees of what was allocated before are left out.

    The profiler knows no categories: every storage gets the same one.
    """
    events: list[int] = []
    sizes = [0]
    storages: list[Storage] = []
    live: dict[int, int] = {}
    positions = []
    for allocation in witnessed.allocations:
        positions.append(len(events))
        if allocation.num_bytes > 0:
            sizes.append(allocation.num_bytes)
            storages.append(Storage(allocation.num_bytes, category, allocation.operation, None, None))
            live[allocation.address] = len(storages)
            events.append(len(storages))
        elif allocation.address in live:
            events.append(-live.pop(allocation.address))
    positions.append(len(events))
    marks = [Mark(positions[mark.event], mark.phase, mark.step) for mark in witnessed.tape_marks()]
    return FlatTape(Tape(events, sizes, marks), storages)


class NotTheSame(ValueError):
    """The profiler and the allocator's history disagree about what was allocated."""


def label(history: FlatTape, witnessed: Witnessed) -> FlatTape:
    """
    The allocator's history, with the operations and marks of the profiler's account of the same events.

    Raises NotTheSame where the two differ in number, order or size: a requested size is never above that of
    its block.
    """
    events, seen = history.tape.events, witnessed.allocations
    if len(events) != len(seen):
        raise NotTheSame(f"the profiler saw {len(seen)} events, the allocator {len(events)}")
    operations: dict[int, str] = {}
    for index, (event, allocation) in enumerate(zip(events, seen)):
        size = history.tape.sizes[abs(event)]
        if (event > 0) != (allocation.num_bytes > 0) or size > abs(allocation.num_bytes):
            raise NotTheSame(
                f"event {index} is {size} bytes for one and {allocation.num_bytes} for the other"
            )
        if event > 0:
            operations[event] = allocation.operation
    storages = [
        Storage(
            storage.num_bytes,
            storage.category,
            _joined(operations.get(index, ""), storage.where),
            storage.dtype,
            storage.shape,
        )
        for index, storage in enumerate(history.storages, start=1)
    ]
    tape = history.tape
    return FlatTape(Tape(events, tape.sizes, witnessed.tape_marks(), tape.streams), storages)


def _joined(operation: str, where: str) -> str:
    return f"{operation} @ {where}" if operation and where else operation or where
