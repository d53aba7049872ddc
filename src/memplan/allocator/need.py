"""
The smallest capacity at which a tape completes.

Under a limit the allocator gives its cache back and tries again before it fails, so that a tape needs less
than the peak of reserved bytes; but blocks are pinned in segments, so that it needs more than the peak of
allocated bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import neg

from memplan.allocator.cache import AllocatorOutOfMemory
from memplan.allocator.caching_allocator import CachingAllocator
from memplan.allocator.replay import Replay, follow
from memplan.allocator.sizes import GRANULARITY_BYTES, LARGE_SEGMENT_BYTES, round_up
from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import Mark

_MIN_EVENTS_BETWEEN_CHECKPOINTS = 200
"""Copying an allocator takes about as long as running this many events."""
_MAX_CLIMB = 2
"""Effort for raising the limit by what is required, in replays of the tape; bisection goes on from there."""
_MAX_NARROWING = 0.25
"""Effort for looking below a limit that is enough, in replays of the tape."""


def smallest_capacity(
    events: Sequence[int], sizes: Sequence[int], streams: Mapping[int, int], settings: AllocatorSettings
) -> int:
    """The capacity of `replay_with_need`, in bytes."""
    return replay_with_need(events, sizes, streams, settings)[1]


def replay_with_need(
    events: Sequence[int],
    sizes: Sequence[int],
    streams: Mapping[int, int],
    settings: AllocatorSettings,
    *,
    marks: Sequence[Mark] = (),
) -> tuple[Replay, int]:
    """
    The unlimited `replay` of a tape, and the smallest capacity (`limit_bytes`) at which it completes.

    Guaranteed: the tape completes at the capacity returned; it is a multiple of 2 MiB, at least the peak of
    live bytes and at most the peak of reserved bytes. Not guaranteed: that none below completes, nor that all
    above do, since the moment at which the cache is given back shapes what follows. Limits are raised to what
    the first request that fails requires, until the tape completes, then narrowed down by bisection as long
    as that takes less than a quarter of a replay.
    """
    allocator = CachingAllocator(settings)
    search = _Search(events, allocator.all_block_bytes(sizes), streams)
    search.observe(allocator)
    unlimited = follow(allocator, events, search.block_sizes, streams, marks)
    return unlimited, search.smallest(unlimited.peak_reserved_bytes)


def smallest_capacity_exact(
    events: Sequence[int], sizes: Sequence[int], streams: Mapping[int, int], settings: AllocatorSettings
) -> int:
    """As `smallest_capacity`, by plain bisection with whole replays down to 2 MiB. Slow; for checks."""
    block_sizes = CachingAllocator(settings).all_block_bytes(sizes)

    def completes(limit_bytes: int) -> bool:
        try:
            CachingAllocator(settings, limit_bytes=limit_bytes).run(events, block_sizes, streams)
        except AllocatorOutOfMemory:
            return False
        return True

    unlimited = CachingAllocator(settings)
    unlimited.run(events, block_sizes, streams)
    low = round_up(peak_live_bytes(events, block_sizes), GRANULARITY_BYTES)
    high = unlimited.peak_reserved_bytes
    while low < high:
        middle = (low + high) // 2 // GRANULARITY_BYTES * GRANULARITY_BYTES
        if completes(middle):
            high = middle
        else:
            low = middle + GRANULARITY_BYTES
    return high


def peak_live_bytes(events: Sequence[int], sizes: Sequence[int]) -> int:
    """The largest sum of `sizes` alive at once."""
    changes = [*sizes, *map(neg, reversed(sizes[1:]))]
    # The change of event -i stands at index -i.
    return max(accumulate(map(changes.__getitem__, events)), default=0)


class _Search:
    """
    Runs of one tape under limits, each from the latest known state that its limit leads to.

    States are copied just before requests for which a limit may matter. A state knows the range of limits
    that lead to it, `most_reserved_bytes` to `least_refused_bytes`.
    """

    def __init__(self, events: Sequence[int], block_sizes: Sequence[int], streams: Mapping[int, int]) -> None:
        self.events = events
        self.block_sizes = block_sizes
        self.streams = streams
        self.lowest = round_up(peak_live_bytes(events, block_sizes), GRANULARITY_BYTES)
        """No limit below this is worth a run."""
        self.checkpoints: list[tuple[int, CachingAllocator]] = []
        """(event, state before it)"""
        self.num_events = 0
        """Events run under limits so far."""

    def observe(self, allocator: CachingAllocator) -> None:
        """Copy the states of an unlimited run before its reserved bytes pass `lowest`, and as they rise."""
        step = max(self.lowest // 64, LARGE_SEGMENT_BYTES)

        def watcher(storage: int) -> None:
            self.checkpoints.append((self.events.index(storage), allocator.clone()))
            allocator.watch_bytes = max(allocator.watch_bytes, allocator.reserved_bytes) + step

        allocator.watch_bytes = self.lowest
        allocator.watcher = watcher

    def smallest(self, highest: int) -> int:
        """The smallest limit at which the tape completes, given that it completes at `highest`."""
        limit = self.lowest
        while limit < highest:
            allocator, failure = self._run(limit)
            if failure is None:
                highest = allocator.most_reserved_bytes
                break
            climbing = self.num_events < _MAX_CLIMB * len(self.events)
            limit = failure.required_bytes if climbing else self._middle(highest)
        budget = self.num_events + _MAX_NARROWING * len(self.events)
        while self.lowest < highest and self.num_events < budget:
            allocator, failure = self._run(self._middle(highest))
            if failure is None:
                highest = allocator.most_reserved_bytes
        return highest

    def _middle(self, highest: int) -> int:
        return (self.lowest + highest) // 2 // GRANULARITY_BYTES * GRANULARITY_BYTES

    def _run(self, limit: int) -> tuple[CachingAllocator, AllocatorOutOfMemory | None]:
        """The allocator after the tape under a limit, or where it failed; raises `lowest` if it did."""
        self.checkpoints = [
            (event, state) for event, state in self.checkpoints if state.least_refused_bytes > self.lowest
        ]
        start, state = max(
            (
                (event, state)
                for event, state in self.checkpoints
                if state.most_reserved_bytes <= limit < state.least_refused_bytes
            ),
            key=lambda checkpoint: checkpoint[0],
        )
        allocator = state.clone()
        latest = start

        def watcher(storage: int) -> None:
            nonlocal latest
            event = self.events.index(storage, latest)
            if event >= latest + _MIN_EVENTS_BETWEEN_CHECKPOINTS:
                self.checkpoints.append((event, allocator.clone()))
                latest = event

        allocator.limit_bytes = allocator.watch_bytes = limit
        allocator.watcher = watcher
        try:
            allocator.run(self.events[start:], self.block_sizes, self.streams)
        except AllocatorOutOfMemory as failure:
            self.num_events += self.events.index(failure.storage, start) - start
            self.lowest = max(self.lowest, allocator.least_refused_bytes)
            return allocator, failure
        self.num_events += len(self.events) - start
        return allocator, None
