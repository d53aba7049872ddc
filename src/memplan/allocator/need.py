"""
The smallest capacity at which a tape completes.

Under a limit the allocator gives its cache back and tries again before it fails, so that a tape needs less
than the peak of reserved bytes; but blocks are pinned in segments, so that it needs more than the peak of
allocated bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from operator import neg
from typing import NamedTuple

from memplan.allocator.cache import AllocatorOutOfMemory
from memplan.allocator.caching_allocator import CachingAllocator
from memplan.allocator.replay import Replay, follow
from memplan.allocator.sizes import GRANULARITY_BYTES, LARGE_SEGMENT_BYTES, UNLIMITED, round_up
from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import Mark

_MIN_EVENTS_BETWEEN_CHECKPOINTS = 200
"""Copying an allocator takes about as long as running this many events."""
_MIN_EVENTS_BETWEEN_MEETINGS = 4000
_MAX_MEETINGS = 16
"""States of a run under a limit that are copied at regular events, for others to come to."""
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

    Frees take effect at once, those of storages that other streams use (`Tape.recorded`) too: before the
    allocator gives up, the host waits for all streams. It is not strictly what such a tape, one of FSDP1,
    completes in: after that wait torch asks the driver alone and does not search its cache again
    (`DeviceCachingAllocator::malloc`). 66 of the 74 published runs complete at it all the same,
    seven within 236 MiB more, one of replicas within 1102.
    """
    allocator = CachingAllocator(settings)
    search = _Search(allocator, events, sizes, streams)
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


class _Passed(NamedTuple):
    """What a stretch of a run says of limits: those from `most` up to but without `least` lead through it alike."""

    most: int
    """The most reserved bytes."""
    least: int
    """The lowest reserved bytes that the driver refused."""
    retries: int

    def then(self, other: _Passed) -> _Passed:
        """Both stretches, one after the other."""
        return _Passed(max(self.most, other.most), min(self.least, other.least), self.retries + other.retries)


_NOTHING = _Passed(0, UNLIMITED, 0)


class _Known(NamedTuple):
    """A state that a run was in before `event`, and the stretch from the known state before."""

    event: int
    state: CachingAllocator
    passed: _Passed
    following: list[_Known]
    """Where runs were seen to go on to; which of them depends on the limit."""


class _Search:
    """
    Runs of one tape under limits, each from the latest known state that its limit leads to.

    States are copied just before requests for which a limit may matter. Which limits lead from one to the next is
    known from the reserved bytes that were held and refused between them. Once the cache was given back they are
    copied at regular events too: runs in which that took place at different requests often come to the same state
    there, and go on as the other run did.
    """

    def __init__(
        self,
        allocator: CachingAllocator,
        events: Sequence[int],
        sizes: Sequence[int],
        streams: Mapping[int, int],
    ) -> None:
        self.events = events
        self.block_sizes = allocator.all_block_bytes(sizes)
        self.streams = streams
        self.lowest = round_up(peak_live_bytes(events, self.block_sizes), GRANULARITY_BYTES)
        """No limit below this is worth a run."""
        self.root = _Known(0, allocator.clone(), _NOTHING, [])
        self.meetings: dict[int, list[_Known]] = {}
        """By event: known states of runs that had given their cache back."""
        self.between_meetings = max(_MIN_EVENTS_BETWEEN_MEETINGS, len(events) // _MAX_MEETINGS)
        self.effort = 0
        """Events of runs under limits so far, as if none had gone on as another did."""

    def observe(self, allocator: CachingAllocator) -> None:
        """Copy the states of an unlimited run before its reserved bytes pass `lowest`, and as they rise."""
        step = max(self.lowest // 64, LARGE_SEGMENT_BYTES)
        latest = self.root

        def watcher(storage: int) -> None:
            nonlocal latest
            latest = self._add(latest, self.events.index(storage), allocator, _passed(allocator))
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
            climbing = self.effort < _MAX_CLIMB * len(self.events)
            limit = failure.required_bytes if climbing else self._middle(highest)
        budget = self.effort + _MAX_NARROWING * len(self.events)
        while self.lowest < highest and self.effort < budget:
            allocator, failure = self._run(self._middle(highest))
            if failure is None:
                highest = allocator.most_reserved_bytes
        return highest

    def _middle(self, highest: int) -> int:
        return (self.lowest + highest) // 2 // GRANULARITY_BYTES * GRANULARITY_BYTES

    def _add(self, before: _Known, event: int, allocator: CachingAllocator, passed: _Passed) -> _Known:
        known = _Known(event, allocator.clone(), passed, [])
        before.following.append(known)
        return known

    def _latest(self, known: _Known, limit: int) -> tuple[_Known, _Passed]:
        """The latest known state that a limit leads to from a known one, and the stretch to it."""
        best, best_passed = known, _NOTHING
        pending = [(known, _NOTHING)]
        seen = set()
        while pending:
            known, passed = pending.pop()
            if known.event > best.event:
                best, best_passed = known, passed
            if id(known.following) not in seen:
                seen.add(id(known.following))
                pending += [
                    (following, passed.then(following.passed))
                    for following in known.following
                    if following.passed.most <= limit < following.passed.least
                ]
        return best, best_passed

    def _forget(self) -> None:
        """Drop the known states to which no limit from `lowest` up leads."""
        pending = [self.root, *chain.from_iterable(self.meetings.values())]
        seen = set()
        while pending:
            following = pending.pop().following
            if id(following) not in seen:
                seen.add(id(following))
                following[:] = [known for known in following if known.passed.least > self.lowest]
                pending += following

    def _run(self, limit: int) -> tuple[CachingAllocator, AllocatorOutOfMemory | None]:
        """The allocator after the tape under a limit, or where it failed; raises `lowest` if it did."""
        run = _Run(self, limit)
        start = run.latest.event
        failure = run.finish()
        end = len(self.events) if failure is None else self.events.index(failure.storage, start)
        self.effort += end - start
        allocator = run.allocator
        passed = run.passed.then(_passed(allocator))
        allocator.most_reserved_bytes, allocator.least_refused_bytes, allocator.num_retries = passed
        if failure is not None:
            self.lowest = max(self.lowest, allocator.least_refused_bytes)
            self._forget()
        return allocator, failure


class _Run:
    """One run under a limit. Its allocator counts from the latest known state on."""

    def __init__(self, search: _Search, limit: int) -> None:
        self.search = search
        self.limit = limit
        self.passed = _NOTHING
        """From the beginning to the latest known state."""
        self._go_on_from(search.root)

    def _go_on_from(self, known: _Known) -> None:
        self.latest, passed = self.search._latest(known, self.limit)
        self.passed = self.passed.then(passed)
        self.allocator = self.latest.state.clone()
        self.allocator.limit_bytes = self.allocator.watch_bytes = self.limit
        self.allocator.watcher = self._watch
        _count_anew(self.allocator)

    def finish(self) -> AllocatorOutOfMemory | None:
        """Run to the end of the tape, or to the failure returned."""
        search = self.search
        position = self.latest.event
        while position < len(search.events):
            stop = position + search.between_meetings - position % search.between_meetings
            try:
                self.allocator.run(search.events[position:stop], search.block_sizes, search.streams)
            except AllocatorOutOfMemory as failure:
                return failure
            position = stop
            if self.passed.retries + self.allocator.num_retries and stop < len(search.events):
                position = self._meet(stop)
        return None

    def _watch(self, storage: int) -> None:
        event = self.search.events.index(storage, self.latest.event)
        if event >= self.latest.event + _MIN_EVENTS_BETWEEN_CHECKPOINTS:
            self._reach(event)

    def _reach(self, event: int) -> None:
        passed = _passed(self.allocator)
        self.passed = self.passed.then(passed)
        self.latest = self.search._add(self.latest, event, self.allocator, passed)
        _count_anew(self.allocator)

    def _meet(self, event: int) -> int:
        """Before which event to go on: a later one if another run was in this state and is known to reach it."""
        others = self.search.meetings.setdefault(event, [])
        for other in others:
            if other.state.is_in_state_of(self.allocator):
                passed = _passed(self.allocator)
                self.passed = self.passed.then(passed)
                self.latest.following.append(other._replace(passed=passed))
                self._go_on_from(other)
                return self.latest.event
        self._reach(event)
        others.append(self.latest)
        return event


def _passed(allocator: CachingAllocator) -> _Passed:
    return _Passed(allocator.most_reserved_bytes, allocator.least_refused_bytes, allocator.num_retries)


def _count_anew(allocator: CachingAllocator) -> None:
    allocator.most_reserved_bytes = allocator.reserved_bytes
    allocator.least_refused_bytes = UNLIMITED
    allocator.num_retries = 0
