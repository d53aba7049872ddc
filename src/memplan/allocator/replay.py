"""A tape through the allocator: peaks of allocated and reserved bytes, over all and for each phase."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from memplan.allocator.cache import AllocatorOutOfMemory
from memplan.allocator.caching_allocator import CachingAllocator
from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import Mark


class PhasePeak(NamedTuple):
    """One phase of one step: from its mark to the next."""

    mark: Mark
    allocated_peak_bytes: int
    allocated_peak_event: int
    """The event after which this was reached; that before the first of the phase if it never rose in it."""
    reserved_peak_bytes: int
    reserved_bytes: int
    """At the end of the phase."""


class Replay(NamedTuple):
    """
    What a tape takes. Allocated bytes are those of the blocks that storages live in, slack included
    (`torch.cuda.memory_allocated`); reserved bytes those of the segments (`torch.cuda.memory_reserved`).
    """

    peak_allocated_bytes: int
    peak_allocated_event: int
    """Index of the first event after which the peak stood; -1 for a tape that allocates nothing."""
    peak_reserved_bytes: int
    peak_reserved_event: int
    allocated_bytes: int
    """At the end of the tape, as `reserved_bytes`."""
    reserved_bytes: int
    num_retries: int
    """Requests for which the whole cache was given back; 0 without a limit."""
    phases: tuple[PhasePeak, ...]
    """One for each mark, in order."""


def replay(
    events: Sequence[int],
    sizes: Sequence[int],
    streams: Mapping[int, int],
    settings: AllocatorSettings,
    *,
    limit_bytes: int | None = None,
    marks: Sequence[Mark] = (),
    recorded: Collection[int] = (),
    waits: Mapping[int, int] = MappingProxyType({}),
) -> Replay:
    """
    Run a tape (`Tape.events`, `sizes`, `streams`, `marks`) through an empty allocator, of which the driver
    can give `limit_bytes` (None: without end).

    With `recorded` and `waits` (`Tape`) the host is as far ahead of the device as what makes it wait allows; without,
    the device keeps up, and every block is there again when it is freed. A run is between the two; which of them
    reserves more depends on the tape (`reserved_at_either_pace`).

    Raises `AllocatorOutOfMemory`, with the index of the event, if the tape does not complete under the limit.
    """
    allocator = CachingAllocator(settings, limit_bytes=limit_bytes)
    return follow(allocator, events, allocator.all_block_bytes(sizes), streams, marks, recorded, waits)


def reserved_at_either_pace(keeping_up: Replay, ahead: Replay) -> Replay:
    """
    The replay in which the device keeps up, with the reserved peaks of that in which the host is ahead where they are
    higher: blocks that come back late make room elsewhere necessary, and a cache that grew early serves what would
    otherwise take a segment of its own.
    """
    phases = tuple(
        phase._replace(reserved_peak_bytes=max(phase.reserved_peak_bytes, other.reserved_peak_bytes))
        for phase, other in zip(keeping_up.phases, ahead.phases, strict=True)
    )
    if ahead.peak_reserved_bytes <= keeping_up.peak_reserved_bytes:
        return keeping_up._replace(phases=phases)
    return keeping_up._replace(
        phases=phases,
        peak_reserved_bytes=ahead.peak_reserved_bytes,
        peak_reserved_event=ahead.peak_reserved_event,
    )


def follow(
    allocator: CachingAllocator,
    events: Sequence[int],
    block_sizes: Sequence[int],
    streams: Mapping[int, int],
    marks: Sequence[Mark],
    recorded: Collection[int] = (),
    waits: Mapping[int, int] = MappingProxyType({}),
) -> Replay:
    """`replay` on an allocator at hand, with `block_sizes` in place of the bytes requested."""
    peak_allocated = peak_reserved = 0
    peak_allocated_event = peak_reserved_event = -1
    phases = []
    starts = [0, *(mark.event for mark in marks), len(events)]
    for mark, start, stop in zip([None, *marks], starts, starts[1:]):
        allocator.reset_peaks()
        try:
            _run(allocator, events[start:stop], block_sizes, streams, recorded, waits)
        except AllocatorOutOfMemory as error:
            error.event = events.index(error.storage, start)
            raise
        allocated_event = _event(events, allocator.peak_allocated_storage, start)
        if allocator.peak_allocated_bytes > peak_allocated:
            peak_allocated, peak_allocated_event = allocator.peak_allocated_bytes, allocated_event
        if allocator.peak_reserved_bytes > peak_reserved:
            peak_reserved = allocator.peak_reserved_bytes
            peak_reserved_event = _event(events, allocator.peak_reserved_storage, start)
        if mark is not None:
            phases.append(
                PhasePeak(
                    mark=mark,
                    allocated_peak_bytes=allocator.peak_allocated_bytes,
                    allocated_peak_event=allocated_event,
                    reserved_peak_bytes=allocator.peak_reserved_bytes,
                    reserved_bytes=allocator.reserved_bytes,
                )
            )
    return Replay(
        peak_allocated_bytes=peak_allocated,
        peak_allocated_event=peak_allocated_event,
        peak_reserved_bytes=peak_reserved,
        peak_reserved_event=peak_reserved_event,
        allocated_bytes=allocator.allocated_bytes,
        reserved_bytes=allocator.reserved_bytes,
        num_retries=allocator.num_retries,
        phases=tuple(phases),
    )


def _run(
    allocator: CachingAllocator,
    events: Sequence[int],
    block_sizes: Sequence[int],
    streams: Mapping[int, int],
    recorded: Collection[int],
    waits: Mapping[int, int],
) -> None:
    """Events, of which the frees of recorded storages and the places where the host waits are not the usual ones."""
    start = 0
    if recorded:
        for index, event in enumerate(events):
            if -event in recorded:
                allocator.run(events[start:index], block_sizes, streams)
                allocator.free_recorded(-event)
                start = index + 1
            elif event in waits:
                allocator.run(events[start:index], block_sizes, streams)
                allocator.pass_events(_over(allocator, streams, waits[event]))
                start = index
    allocator.run(events[start:], block_sizes, streams)


def _over(allocator: CachingAllocator, streams: Mapping[int, int], but_last_of: int) -> int | None:
    """How many outstanding blocks the device has come by where the host waits; None for all."""
    if not but_last_of:
        return None
    outstanding = [streams.get(storage, 0) for storage in allocator.outstanding]
    return max((index for index, stream in enumerate(outstanding) if stream == but_last_of), default=0)


def _event(events: Sequence[int], storage: int, start: int) -> int:
    return events.index(storage, start) if storage else start - 1
