"""The allocator against a plain statement of its rules, and what must hold whatever the requests are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_allocator import OutOfMemory, ReferenceAllocator

from memplan.allocator import (
    AllocatorOutOfMemory,
    CachingAllocator,
    replay,
    replay_with_need,
    smallest_capacity_exact,
)
from memplan.allocator.sizes import UNLIMITED
from memplan.job.spec import AllocatorSettings
from memplan.units import KiB, MiB

SETTINGS = {
    "classic": AllocatorSettings(expandable_segments=False),
    "expandable": AllocatorSettings(expandable_segments=True),
    "max_split": AllocatorSettings(expandable_segments=False, max_split_size_mb=25),
    "roundup": AllocatorSettings(expandable_segments=False, roundup_power2_divisions=4),
    "expandable_max_split": AllocatorSettings(expandable_segments=True, max_split_size_mb=25),
    "expandable_roundup": AllocatorSettings(expandable_segments=True, roundup_power2_divisions=8),
}
COLLECTING = {"collecting": AllocatorSettings(expandable_segments=False, garbage_collection_threshold=0.4)}
EDGES = [0, 1, 511, 512, 513, 100 * KiB, MiB - 512, MiB, MiB + 1, 3 * MiB, 9 * MiB, 10 * MiB - 1, 10 * MiB]
SIZES = st.one_of(
    st.sampled_from([*EDGES, 11 * MiB, 19 * MiB, 20 * MiB, 21 * MiB, 24 * MiB, 25 * MiB, 33 * MiB, 64 * MiB]),
    st.integers(1, 2 * MiB),
    st.integers(1, 60 * MiB),
)

COUNTERS = (
    "allocated_bytes",
    "reserved_bytes",
    "most_reserved_bytes",
    "least_refused_bytes",
    "peak_allocated_bytes",
    "peak_allocated_storage",
    "peak_reserved_bytes",
    "peak_reserved_storage",
    "num_retries",
    "num_searches",
)

Operations = list[tuple[int, int, int]]
"""(bytes, stream, which live storage to free first: an index, or -1 for none)"""

operations = st.lists(
    st.tuples(SIZES, st.sampled_from([0, 0, 0, 7]), st.integers(-1, 3) | st.integers(-1, 30)),
    min_size=1,
    max_size=60,
)
configurations = st.sampled_from(sorted(SETTINGS))


def tape(operations: Operations) -> tuple[list[int], list[int], dict[int, int]]:
    events: list[int] = []
    sizes = [0]
    streams: dict[int, int] = {}
    live: list[int] = []
    for size, stream, freed in operations:
        if 0 <= freed < len(live):
            events.append(-live.pop(freed))
        storage = len(sizes)
        sizes.append(size)
        live.append(storage)
        events.append(storage)
        if stream:
            streams[storage] = stream
    return events, sizes, streams


def check(allocator: CachingAllocator, live: Sequence[int]) -> None:
    """Blocks tile their segments, neighbours are merged, and the totals are those of the blocks."""
    totals = {"live": 0, "cached": 0, "unmapped": 0}
    seen = set()
    for segment in allocator.segments():
        for (address, size, state), (following, _, next_state) in pairwise(segment):
            assert following == address + size
            assert state != next_state or state == "live"
        for address, size, state in segment:
            assert size > 0 and size % 512 == 0
            assert address not in seen
            seen.add(address)
            totals[state] += size
        if allocator.expandable:
            assert segment[-1][2] == "unmapped"
    assert totals["live"] == allocator.allocated_bytes
    assert totals["live"] + totals["cached"] == allocator.reserved_bytes
    placed = sorted(block for block in map(allocator.block_of, live) if block[1])
    assert all(address + size <= following for (address, size), (following, _) in pairwise(placed))


@settings(max_examples=300)
@given(configurations, operations, st.one_of(st.none(), st.integers(10, 200)))
def test_the_allocator_agrees_with_the_plain_statement_of_its_rules(name, operations, limit_mib):
    """Same blocks at the same addresses after every event, same retries, and failure at the same request."""
    limit = None if limit_mib is None else limit_mib * MiB
    events, sizes, streams = tape(operations)
    allocator = CachingAllocator(SETTINGS[name], limit_bytes=limit)
    reference = ReferenceAllocator(SETTINGS[name], limit_bytes=limit)
    live = []
    for event in events:
        if event < 0:
            allocator.free(-event)
            reference.free(-event)
            live.remove(-event)
        else:
            stream = streams.get(event, 0)
            try:
                reference.malloc(event, sizes[event], stream)
            except OutOfMemory:
                with pytest.raises(AllocatorOutOfMemory):
                    allocator.malloc(event, sizes[event], stream)
                assert reference.segments() == allocator.segments()
                return
            allocator.malloc(event, sizes[event], stream)
            live.append(event)
        assert reference.segments() == allocator.segments()
        assert reference.reserved == allocator.reserved_bytes
        assert reference.allocated == allocator.allocated_bytes
        assert reference.retries == allocator.num_retries
        check(allocator, live)


@settings(max_examples=60)
@given(configurations, operations, st.integers(10, 200))
def test_a_run_is_the_same_as_its_events_one_by_one(name, operations, limit_mib):
    """The loop keeps its counters in locals; what it leaves behind must not depend on where it stops."""
    events, sizes, streams = tape(operations)
    one = CachingAllocator(SETTINGS[name], limit_bytes=limit_mib * MiB)
    other = CachingAllocator(SETTINGS[name], limit_bytes=limit_mib * MiB)
    block_sizes = one.all_block_bytes(sizes)
    failures = []
    for allocator, pieces in ((one, [events]), (other, [[event] for event in events])):
        try:
            for piece in pieces:
                allocator.run(piece, block_sizes, streams)
        except AllocatorOutOfMemory as error:
            failures.append(vars(error))
    assert len(failures) in (0, 2) and failures[:1] == failures[1:]
    assert one.segments() == other.segments()
    for counter in COUNTERS:
        assert getattr(one, counter) == getattr(other, counter)


@settings(max_examples=60)
@given(configurations | st.just("collecting"), operations, st.integers(10, 200), st.integers(0, 60))
def test_a_clone_goes_on_as_the_original_and_shares_nothing_with_it(name, operations, limit_mib, cut):
    """Cloned anywhere, the twin ends where the original ends, and the original does not notice."""
    events, sizes, streams = tape(operations)
    # Under a memory fraction rather than a limit where garbage is collected.
    limits = {"allowed_bytes" if name == "collecting" else "limit_bytes": limit_mib * MiB}
    original = CachingAllocator((SETTINGS | COLLECTING)[name], **limits)
    block_sizes = original.all_block_bytes(sizes)
    try:
        original.run(events[:cut], block_sizes, streams)
    except AllocatorOutOfMemory:
        return
    before = original.segments()
    twin = original.clone()
    assert before == twin.segments()
    outcomes = []
    for allocator in (twin, original):
        assert before == allocator.segments()
        try:
            allocator.run(events[cut:], block_sizes, streams)
            outcomes.append(None)
        except AllocatorOutOfMemory as error:
            outcomes.append(vars(error))
    assert outcomes[0] == outcomes[1]
    assert original.segments() == twin.segments()
    for counter in COUNTERS:
        assert getattr(original, counter) == getattr(twin, counter)


@settings(max_examples=100)
@given(configurations, operations, st.integers(10, 200), st.integers(0, 100))
def test_every_limit_between_most_reserved_and_least_refused_leads_to_the_same_state(
    name, operations, limit_mib, other_mib
):
    """What the search for the need rests on when it goes on from a state of another run."""
    events, sizes, streams = tape(operations)

    def run(limit: int) -> tuple[CachingAllocator, bool]:
        allocator = CachingAllocator(SETTINGS[name], limit_bytes=limit)
        try:
            allocator.run(events, allocator.all_block_bytes(sizes), streams)
        except AllocatorOutOfMemory:
            return allocator, False
        return allocator, True

    allocator, completes = run(limit_mib * MiB)
    low, high = allocator.most_reserved_bytes, allocator.least_refused_bytes
    for limit in (low, min(low + other_mib * MiB, high - 1), high - 1):
        other, other_completes = run(limit)
        assert (allocator.segments(), completes) == (other.segments(), other_completes)
    if high < UNLIMITED:
        assert high == run(high)[0].most_reserved_bytes


@settings(max_examples=100)
@given(configurations, operations)
def test_without_a_limit_nothing_fails_and_nothing_is_given_back(name, operations):
    """Reserved bytes only rise, and the peak of reserved bytes as a limit changes nothing."""
    events, sizes, streams = tape(operations)
    unlimited = replay(events, sizes, streams, SETTINGS[name])
    assert unlimited.num_retries == 0
    assert unlimited.reserved_bytes == unlimited.peak_reserved_bytes
    limit = unlimited.peak_reserved_bytes
    assert unlimited == replay(events, sizes, streams, SETTINGS[name], limit_bytes=limit)


@settings(max_examples=150)
@given(configurations, operations)
def test_a_tape_completes_at_its_need_which_lies_between_its_two_peaks(name, operations):
    """The guarantee of `replay_with_need`, on tapes that look like nothing in particular."""
    events, sizes, streams = tape(operations)
    unlimited, need = replay_with_need(events, sizes, streams, SETTINGS[name])
    assert unlimited == replay(events, sizes, streams, SETTINGS[name])
    assert need <= unlimited.peak_reserved_bytes
    assert need % (2 * MiB) == 0
    limited = replay(events, sizes, streams, SETTINGS[name], limit_bytes=need)
    assert limited.peak_reserved_bytes <= need
    assert limited.peak_allocated_bytes <= need


@settings(max_examples=60)
@given(configurations, operations)
def test_bisection_ends_at_a_limit_that_completes_above_one_that_fails(name, operations):
    """The slow search is what it says."""
    events, sizes, streams = tape(operations)
    exact = smallest_capacity_exact(events, sizes, streams, SETTINGS[name])
    replay(events, sizes, streams, SETTINGS[name], limit_bytes=exact)
    if exact:
        with pytest.raises(AllocatorOutOfMemory):
            replay(events, sizes, streams, SETTINGS[name], limit_bytes=exact - 2 * MiB)
