"""A tape through the allocator: which numbers, at which events, for which phases."""

from __future__ import annotations

import pytest
from transformer_tape import transformer_tape

from memplan.allocator import AllocatorOutOfMemory, CachingAllocator, replay
from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import Mark
from memplan.units import MiB

CLASSIC = AllocatorSettings(expandable_segments=False)
EXPANDABLE = AllocatorSettings(expandable_segments=True)

EVENTS = [1, 2, -1, 3, -2, -3, 4, 5]
SIZES = [0, 30 * MiB, 12 * MiB, 20 * MiB, 0, 11 * MiB]


def test_peaks_and_the_events_that_made_them():
    """20 MiB are cut from the segment of 30 that was freed; the last block of 11 from what merged again."""
    result = replay(EVENTS, SIZES, {}, CLASSIC)
    assert (42 * MiB, 1) == (result.peak_allocated_bytes, result.peak_allocated_event)
    assert (42 * MiB, 1) == (result.peak_reserved_bytes, result.peak_reserved_event)
    assert (12 * MiB, 42 * MiB) == (result.allocated_bytes, result.reserved_bytes)
    assert (0, ()) == (result.num_retries, result.phases)


def test_the_first_of_equal_peaks_counts():
    """Allocated or reserved."""
    result = replay([1, -1, 2], [0, 5 * MiB, 5 * MiB], {}, CLASSIC, marks=[Mark(2, "forward", 2)])
    assert (0, 0) == (result.peak_allocated_event, result.peak_reserved_event)
    result = replay([1, -1, 2], [0, 5 * MiB, 5 * MiB], {}, CLASSIC)
    assert 0 == result.peak_allocated_event


def test_slack_of_blocks_that_are_not_split_counts_as_allocated():
    """As in `torch.cuda.memory_allocated`: the 11 MiB of the example take a segment of 12."""
    assert 12 * MiB == replay([1], [0, 11 * MiB], {}, CLASSIC).allocated_bytes
    assert 11 * MiB == replay([1], [0, 11 * MiB], {}, EXPANDABLE).allocated_bytes


def test_each_phase_has_its_own_peaks():
    """From its mark to the next; one that never rises stands highest before its first event."""
    marks = [
        Mark(2, "forward", 1),
        Mark(4, "backward", 1),
        Mark(6, "optimizer_step", 1),
        Mark(6, "forward", 2),
    ]
    result = replay(EVENTS, SIZES, {}, CLASSIC, marks=marks)
    assert marks == [phase.mark for phase in result.phases]
    peaks = [(phase.allocated_peak_bytes // MiB, phase.allocated_peak_event) for phase in result.phases]
    assert [(42, 1), (32, 3), (0, 5), (12, 7)] == peaks
    assert {42 * MiB} == {phase.reserved_peak_bytes for phase in result.phases}
    assert {42 * MiB} == {phase.reserved_bytes for phase in result.phases}
    assert (42 * MiB, 1) == (result.peak_allocated_bytes, result.peak_allocated_event)


def test_a_phase_may_end_with_less_reserved_than_its_peak():
    """Where a limit makes the allocator give its cache back."""
    result = replay(
        [1, -1, 2], [0, 40 * MiB, 50 * MiB], {}, CLASSIC, limit_bytes=60 * MiB, marks=[Mark(1, "load", 0)]
    )
    assert (50 * MiB, 2) == (result.peak_reserved_bytes, result.peak_reserved_event)
    assert (1, 50 * MiB) == (result.num_retries, result.phases[0].reserved_bytes)
    result = replay(
        [1, -1, 2], [0, 60 * MiB, 50 * MiB], {}, CLASSIC, limit_bytes=60 * MiB, marks=[Mark(0, "load", 0)]
    )
    assert (60 * MiB, 0) == (result.peak_reserved_bytes, result.peak_reserved_event)
    assert 60 * MiB == result.phases[0].reserved_bytes


def test_a_tape_of_nothing():
    """No peak, no event."""
    result = replay([], [0], {}, EXPANDABLE)
    assert (0, -1, 0, -1) == (
        result.peak_allocated_bytes,
        result.peak_allocated_event,
        result.peak_reserved_bytes,
        result.peak_reserved_event,
    )


def test_failure_names_the_event():
    """Index into the whole tape, also when the phase before has ended."""
    with pytest.raises(AllocatorOutOfMemory) as failure:
        replay(EVENTS, SIZES, {}, CLASSIC, limit_bytes=31 * MiB, marks=[Mark(1, "forward", 1)])
    assert (1, 2) == (failure.value.event, failure.value.storage)


def test_streams_of_the_tape_have_pools_of_their_own():
    """Storages that are not named live on stream 0."""
    sizes = [0, 30 * MiB, 30 * MiB, 30 * MiB]
    assert 30 * MiB == replay([1, -1, 2, -2, 3], sizes, {}, CLASSIC).reserved_bytes
    assert 60 * MiB == replay([1, -1, 2, -2, 3], sizes, {2: 1}, CLASSIC).reserved_bytes


@pytest.mark.parametrize("settings", [CLASSIC, EXPANDABLE])
@pytest.mark.parametrize("sharded", [False, True])
def test_the_numbers_of_a_training_tape_are_those_of_its_events_one_by_one(settings, sharded):
    """Peaks, their events and phases from the loop against a curve of every event."""
    tape = transformer_tape(num_layers=3, checkpointing=True, foreach=True, sharded=sharded)
    result = replay(tape.events, tape.sizes, tape.streams, settings, marks=tape.marks)
    allocator = CachingAllocator(settings)
    allocated, reserved = [], []
    for event in tape.events:
        if event > 0:
            allocator.malloc(event, tape.sizes[event], tape.streams.get(event, 0))
        else:
            allocator.free(-event)
        allocated.append(allocator.allocated_bytes)
        reserved.append(allocator.reserved_bytes)
    assert (max(allocated), allocated.index(max(allocated))) == (
        result.peak_allocated_bytes,
        result.peak_allocated_event,
    )
    assert (max(reserved), reserved.index(max(reserved))) == (
        result.peak_reserved_bytes,
        result.peak_reserved_event,
    )
    assert (allocated[-1], reserved[-1]) == (result.allocated_bytes, result.reserved_bytes)
    stops = [mark.event for mark in tape.marks[1:]] + [len(tape.events)]
    for phase, stop in zip(result.phases, stops):
        start = max(phase.mark.event - 1, 0)
        assert (
            max(allocated[start:stop]) == phase.allocated_peak_bytes == allocated[phase.allocated_peak_event]
        )
        assert max(reserved[start:stop]) == phase.reserved_peak_bytes
        assert reserved[stop - 1] == phase.reserved_bytes
