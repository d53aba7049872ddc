"""`max_split_size_mb`, `garbage_collection_threshold` and memory fractions, on examples worked by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from memplan.allocator import AllocatorOutOfMemory, CachingAllocator
from memplan.job.spec import AllocatorSettings
from memplan.units import MiB


def splitting(max_split: int, limit: int | None = None) -> CachingAllocator:
    settings = AllocatorSettings(expandable_segments=False, max_split_size_mb=max_split)
    return CachingAllocator(settings, limit_bytes=None if limit is None else limit * MiB)


def first_blocks(allocator: CachingAllocator) -> list[float]:
    """MiB of the first block of each segment, in the order in which they were taken from the driver."""
    return [segment[0][1] / MiB for segment in allocator.segments()]


# max_split_size_mb


def test_blocks_from_the_maximum_split_size_on_stay_whole():
    """Neither split, nor used for a request below that size, nor for one smaller by 20 MiB or more."""
    allocator = splitting(100)
    allocator.malloc(1, 130 * MiB)
    allocator.free(1)
    allocator.malloc(2, 99 * MiB)
    assert 230 * MiB == allocator.reserved_bytes
    allocator.malloc(3, 110 * MiB)
    assert 340 * MiB == allocator.reserved_bytes
    allocator.malloc(4, 110 * MiB + 512)
    assert 340 * MiB == allocator.reserved_bytes
    assert 130 * MiB == allocator.block_of(4)[1]
    allocator.free(3)
    allocator.malloc(5, 100 * MiB)
    assert 110 * MiB == allocator.block_of(5)[1]


def test_under_a_maximum_split_size_only_what_is_needed_is_given_back_first():
    """The smallest unsplittable segment that is large enough, else the largest ones; the rest stays."""
    allocator = splitting(100, limit=700)
    for storage, size in enumerate((100, 110, 150, 250, 40, 20), start=1):
        allocator.malloc(storage, size * MiB)
    for storage in range(1, 7):
        allocator.free(storage)
    allocator.malloc(7, 128 * MiB)
    assert [100, 110, 250, 40, 20, 128] == first_blocks(allocator)
    allocator.malloc(8, 300 * MiB)
    assert [100, 40, 20, 128, 300] == first_blocks(allocator)
    assert 0 == allocator.num_retries
    allocator.malloc(9, 172 * MiB)
    assert [128, 300, 172] == first_blocks(allocator)
    assert 1 == allocator.num_retries


@pytest.mark.parametrize(
    ("settings", "growth"),
    [
        (AllocatorSettings(expandable_segments=True, max_split_size_mb=128), 200 * MiB),
        (AllocatorSettings(expandable_segments=True), 0),
        (AllocatorSettings(expandable_segments=False, max_split_size_mb=128), 0),
    ],
)
def test_a_maximum_split_size_makes_expandable_segments_grow_without_end(settings, growth):
    """
    Their blocks are cut and merged all the same, but what has merged to that size serves no smaller request:
    each cycle of two buffers of 100 MiB, and a small one that outlives them, takes 200 MiB or a page more.
    """
    allocator = CachingAllocator(settings)
    reserved = []
    for first in range(1, 90, 3):
        allocator.malloc(first, 100 * MiB)
        allocator.malloc(first + 1, 100 * MiB)
        allocator.malloc(first + 2, 5 * MiB)
        allocator.free(first)
        allocator.free(first + 1)
        if first > 1:
            allocator.free(first - 1)
        reserved.append(allocator.reserved_bytes)
    assert 210 * MiB == allocator.peak_allocated_bytes
    assert all(growth <= after - before <= 1.1 * growth for before, after in pairwise(reserved))


# garbage_collection_threshold


def collecting(threshold: float, allowed: int | None) -> CachingAllocator:
    settings = AllocatorSettings(expandable_segments=False, garbage_collection_threshold=threshold)
    return CachingAllocator(settings, allowed_bytes=None if allowed is None else allowed * MiB)


def fill_and_free(allocator: CachingAllocator) -> None:
    """Segments of 20, 30 and 40 MiB, cached; that of 20 for longest, that of 40 used in between."""
    for storage, size in enumerate((20, 30, 40), start=1):
        allocator.malloc(storage, size * MiB)
    for storage in (1, 2, 3):
        allocator.free(storage)
    allocator.malloc(4, 40 * MiB)
    allocator.free(4)


def test_above_the_threshold_the_blocks_that_waited_longest_are_given_back():
    """Those that waited for at least the average time, in rounds until enough is given back."""
    allocator = collecting(0.5, 160)
    fill_and_free(allocator)
    assert 90 * MiB == allocator.reserved_bytes
    allocator.malloc(5, 45 * MiB)
    # 10 MiB over the threshold of 80: those of 20 and 30 have waited for 2 searches, that of 40 for 1.
    assert [40, 46] == first_blocks(allocator)
    assert 0 == allocator.num_retries


def test_a_block_that_waited_for_just_the_average_time_is_given_back():
    """As a single one always has."""
    allocator = collecting(0.1, 100)
    allocator.malloc(1, 20 * MiB)
    allocator.free(1)
    allocator.malloc(2, 30 * MiB)
    assert [30] == first_blocks(allocator)


@pytest.mark.parametrize(("threshold", "allowed"), [(0.9, 160), (0.5, None)])
def test_nothing_is_collected_below_the_threshold_or_without_a_memory_fraction(threshold, allowed):
    """As in PyTorch, the threshold is a fraction of what `set_per_process_memory_fraction` allows."""
    allocator = collecting(threshold, allowed)
    fill_and_free(allocator)
    allocator.malloc(5, 45 * MiB)
    assert [20, 30, 40, 46] == first_blocks(allocator)


@pytest.mark.parametrize("expandable_segments", [False, True])
def test_a_memory_fraction_is_a_limit_on_reserved_bytes(expandable_segments):
    """The cache is given back before it is held to have been reached."""
    settings = AllocatorSettings(expandable_segments=expandable_segments)
    allocator = CachingAllocator(settings, allowed_bytes=60 * MiB)
    allocator.malloc(1, 40 * MiB)
    allocator.free(1)
    allocator.malloc(2, 60 * MiB)
    assert 60 * MiB == allocator.reserved_bytes
    with pytest.raises(AllocatorOutOfMemory) as failure:
        allocator.malloc(3, MiB)
    assert 62 * MiB == failure.value.required_bytes
