"""
Blocks that another stream uses: freed at once for the statistics, given out again when that stream has come by.

Expectations follow DeviceCachingAllocator: `free` puts a block with `stream_uses` behind an event (`insert_events`),
`malloc` looks at the events first (`process_events`), and `release_cached_blocks` waits for all of them.
"""

from __future__ import annotations

import pytest

from memplan.allocator import (
    AllocatorOutOfMemory,
    CachingAllocator,
    replay,
    replay_with_need,
    reserved_at_either_pace,
)
from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import Mark
from memplan.units import MiB

SETTINGS = AllocatorSettings(expandable_segments=False)


def allocator(limit: int | None = None) -> CachingAllocator:
    return CachingAllocator(SETTINGS, limit_bytes=None if limit is None else limit * MiB)


def states(tested: CachingAllocator) -> list[list[tuple[float, str]]]:
    return [[(size / MiB, state) for _, size, state in segment] for segment in tested.segments()]


def test_a_block_waits_for_its_event():
    """30 MiB freed count as allocated no more, but the next 30 MiB are new; when the event is over they are found."""
    tested = allocator()
    tested.malloc(1, 30 * MiB)
    tested.free_recorded(1)
    assert (0, 30 * MiB) == (tested.allocated_bytes, tested.reserved_bytes)

    tested.malloc(2, 30 * MiB)
    assert (30 * MiB, 60 * MiB) == (tested.allocated_bytes, tested.reserved_bytes)

    tested.pass_events()
    tested.malloc(3, 30 * MiB)
    assert (60 * MiB, 60 * MiB) == (tested.allocated_bytes, tested.reserved_bytes)
    assert 60 * MiB == tested.peak_allocated_bytes


def test_events_are_over_in_the_order_of_the_frees():
    """The first of two: 30 MiB, which the request for 20 MiB splits; the 50 MiB behind it are still waiting."""
    tested = allocator()
    tested.malloc(1, 30 * MiB)
    tested.malloc(2, 50 * MiB)
    tested.free_recorded(1)
    tested.free_recorded(2)
    tested.pass_events(1)
    tested.malloc(3, 20 * MiB)

    assert [2] == [*tested.outstanding]
    assert [[(20.0, "live"), (10.0, "cached")]] == states(tested)


def test_a_block_merges_when_its_event_is_over():
    """Between two free neighbours of 2 MiB each in a segment of 20 MiB, it is the last to come back."""
    tested = allocator()
    for storage in (1, 2, 3):
        tested.malloc(storage, 2 * MiB)
    tested.free_recorded(2)
    tested.free(1)
    tested.free(3)
    tested.pass_events()

    assert [[(20.0, "cached")]] == states(tested)


def test_the_host_waits_before_the_cache_is_given_back():
    """30 MiB of 40 are outstanding: 30 more complete by a retry, as if they had been free."""
    tested = allocator(limit=40)
    tested.malloc(1, 30 * MiB)
    tested.free_recorded(1)
    tested.malloc(2, 30 * MiB)

    assert (1, 30 * MiB) == (tested.num_retries, tested.reserved_bytes)


def test_what_is_free_after_that_wait_is_not_searched_for():
    """
    Two blocks of 9 MiB in the one segment of 20 MiB that there is, the first outstanding: the retry asks the driver
    again, and not the cache, in which there are 9 MiB by then.
    """
    tested = allocator(limit=20)
    tested.malloc(1, 9 * MiB)
    tested.malloc(2, 9 * MiB)
    tested.free_recorded(1)
    with pytest.raises(AllocatorOutOfMemory):
        tested.malloc(3, 9 * MiB)

    tested.malloc(4, 9 * MiB)
    assert 18 * MiB == tested.allocated_bytes


def test_copies_are_independent():
    """What is outstanding in one comes back there alone."""
    tested = allocator()
    tested.malloc(1, 30 * MiB)
    tested.free_recorded(1)
    twin = tested.clone()
    twin.pass_events()

    assert [[(30.0, "cached")]] == states(twin)
    assert [1] == [*tested.outstanding]


EVENTS = [1, -1, 2, -2, 9, -9, 3, -3, 10, -10, 4, -4]
"""Four times 30 MiB on stream 1, one after the other; before the last two the host waits."""
SIZES = [0, *[30 * MiB] * 4, 0, 0, 0, 0, 0, 0]
STREAMS = dict.fromkeys((1, 2, 3, 4), 1)


@pytest.mark.parametrize(
    ("recorded", "waits", "reserved"),
    [
        (set(), {}, 30),  # the device keeps up
        ({1, 2, 3, 4}, {}, 120),  # nothing makes the host wait
        ({1, 2, 3, 4}, {9: 0, 10: 0}, 60),  # for all: 1 and 2 lie side by side, 3 takes one of them, 4 too
        ({1, 2, 3, 4}, {9: 1, 10: 1}, 60),  # for all but the last: 3 takes the block of 1, 4 that of 2
        ({1, 2, 3, 4}, {10: 1}, 90),  # 3 finds nothing; 4 takes the block of 1
        (
            {2},
            {9: 1},
            60,
        ),  # 2 finds the block of 1; it is the last, for which the host does not wait: 3 is new
    ],
)
def test_how_far_ahead_the_host_may_be(recorded: set[int], waits: dict[int, int], reserved: int):
    """The reserved peak in MiB; what is allocated does not depend on it, nor does the need."""
    result = replay(EVENTS, SIZES, STREAMS, SETTINGS, recorded=recorded, waits=waits)

    assert reserved * MiB == result.peak_reserved_bytes
    assert 30 * MiB == result.peak_allocated_bytes
    assert 30 * MiB == replay_with_need(EVENTS, SIZES, STREAMS, SETTINGS)[1]
    replay(EVENTS, SIZES, STREAMS, SETTINGS, limit_bytes=30 * MiB, recorded=recorded, waits=waits)


def test_what_is_reserved_at_either_pace():
    """The higher of both, of the whole and of each phase; what is allocated is that of a device that keeps up."""
    marks = [Mark(0, "forward", 1), Mark(6, "backward", 1)]
    keeping_up = replay(EVENTS, SIZES, STREAMS, SETTINGS, marks=marks)
    ahead = replay(EVENTS, SIZES, STREAMS, SETTINGS, marks=marks, recorded={1, 2, 3, 4})
    either = reserved_at_either_pace(keeping_up, ahead)

    assert [60 * MiB, 120 * MiB] == [phase.reserved_peak_bytes for phase in either.phases]
    assert (120 * MiB, ahead.peak_reserved_event) == (either.peak_reserved_bytes, either.peak_reserved_event)
    assert keeping_up.peak_allocated_bytes == either.peak_allocated_bytes
    assert 120 * MiB == reserved_at_either_pace(ahead, keeping_up).peak_reserved_bytes
