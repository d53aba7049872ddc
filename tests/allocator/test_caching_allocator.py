"""Each rule of the caching allocator, on an example worked by hand."""

from __future__ import annotations

import pytest

from memplan.allocator import AllocatorOutOfMemory, CachingAllocator, block_bytes
from memplan.job.spec import AllocatorSettings
from memplan.units import KiB, MiB


def classic(limit: int | None = None, **settings: object) -> CachingAllocator:
    return CachingAllocator(
        AllocatorSettings(expandable_segments=False, **settings),
        limit_bytes=None if limit is None else limit * MiB,
    )


def expandable(limit: int | None = None, **settings: object) -> CachingAllocator:
    return CachingAllocator(
        AllocatorSettings(expandable_segments=True, **settings),
        limit_bytes=None if limit is None else limit * MiB,
    )


def layout(allocator: CachingAllocator) -> list[list[tuple[float, str]]]:
    """(MiB, state) of the blocks of each segment, without the unmapped end of expandable ones."""
    segments = [[(size / MiB, state) for _, size, state in segment] for segment in allocator.segments()]
    return [segment[:-1] if segment[-1][1] == "unmapped" else segment for segment in segments]


# Sizes


@pytest.mark.parametrize(
    ("requested", "block"),
    [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (MiB, MiB), (MiB + 1, MiB + 512)],
)
def test_requests_are_rounded_up_to_512_bytes(requested, block):
    """And nothing is nothing."""
    assert block == block_bytes(requested)


@pytest.mark.parametrize(
    ("requested", "divisions", "block"),
    [
        (1200, 4, 1536),  # at most 512 B x divisions: plain rounding
        (5 * KiB, 4, 5 * KiB),  # steps of 1 KiB between 4 and 8 KiB
        (5 * KiB + 1, 4, 6 * KiB),
        (64 * MiB, 8, 64 * MiB),  # powers of two stay
        (64 * MiB + 1, 8, 72 * MiB),
        (65 * MiB, 1, 65 * MiB),  # one division: off
    ],
)
def test_power_of_two_divisions_round_to_equal_steps_between_powers(requested, divisions, block):
    """`roundup_power2_divisions`."""
    assert block == block_bytes(requested, divisions)
    assert [block] == classic(roundup_power2_divisions=divisions).all_block_bytes([requested])


def test_a_storage_without_bytes_takes_nothing():
    """It can be freed, and is gone then like any other."""
    allocator = classic(limit=0)
    allocator.malloc(1, 0)
    assert (0, 0) == allocator.block_of(1)
    assert [] == allocator.segments()
    allocator.free(1)
    with pytest.raises(KeyError):
        allocator.free(1)


def test_small_requests_share_segments_of_2_mib():
    """Three requests of 1 MiB, the largest small size, need two segments."""
    allocator = classic()
    for storage in (1, 2, 3):
        allocator.malloc(storage, MiB)
    assert [[(1, "live"), (1, "live")], [(1, "live"), (1, "cached")]] == layout(allocator)


def test_requests_below_10_mib_share_segments_of_20_mib():
    """From one byte above 1 MiB on."""
    allocator = classic()
    allocator.malloc(1, MiB + 1)
    allocator.malloc(2, 10 * MiB - 512)
    assert 20 * MiB == allocator.reserved_bytes
    allocator.malloc(3, 9 * MiB + 1)
    assert 40 * MiB == allocator.reserved_bytes


def test_requests_from_10_mib_on_get_segments_of_their_own():
    """Rounded up to 2 MiB; a remainder of at most 1 MiB stays part of the block and counts as allocated."""
    allocator = classic()
    allocator.malloc(1, 10 * MiB)
    allocator.malloc(2, 11 * MiB)
    allocator.malloc(3, 12 * MiB + 512)
    assert [[(10, "live")], [(12, "live")], [(12 + 512 / MiB, "live"), (2 - 512 / MiB, "cached")]] == layout(
        allocator
    )


# Choosing and cutting


def test_the_smallest_block_that_is_large_enough_is_taken():
    """Best fit, not first fit; the lowest address among equals."""
    allocator = classic()
    for storage, size in enumerate((40, 20, 30, 20), start=1):
        allocator.malloc(storage, size * MiB)
    addresses = {storage: allocator.block_of(storage)[0] for storage in (1, 2, 3, 4)}
    for storage in (4, 3, 2, 1):
        allocator.free(storage)
    allocator.malloc(5, 20 * MiB)
    allocator.malloc(6, 19 * MiB)
    allocator.malloc(7, 25 * MiB)
    assert [addresses[2], addresses[4], addresses[3]] == [allocator.block_of(i)[0] for i in (5, 6, 7)]
    assert 110 * MiB == allocator.reserved_bytes


@pytest.mark.parametrize(("remainder", "blocks"), [(MiB, 1), (MiB + 512, 2)])
def test_a_large_block_is_split_only_if_more_than_1_mib_remains(remainder, blocks):
    """Without expandable segments."""
    allocator = classic()
    allocator.malloc(1, 20 * MiB)
    allocator.free(1)
    allocator.malloc(2, 20 * MiB - remainder)
    assert blocks == len(allocator.segments()[0])
    assert 20 * MiB - (remainder if blocks == 2 else 0) == allocator.allocated_bytes


@pytest.mark.parametrize(("make", "size"), [(classic, MiB), (expandable, MiB), (expandable, 20 * MiB)])
def test_small_blocks_and_expandable_ones_are_split_down_to_512_bytes(make, size):
    """Nothing is lost there."""
    allocator = make()
    allocator.malloc(1, size)
    allocator.malloc(2, size)
    allocator.free(1)
    allocator.malloc(3, size - 512)
    assert 2 * size - 512 == allocator.allocated_bytes
    assert 512 in [block for _, block, state in allocator.segments()[0] if state == "cached"]


def test_a_freed_block_merges_with_its_neighbours_on_both_sides():
    """But not with those of another segment."""
    allocator = classic()
    for storage in (1, 2, 3, 4, 5):
        allocator.malloc(storage, 5 * MiB)
    allocator.free(1)
    allocator.free(3)
    allocator.free(5)
    assert [(5, "cached"), (5, "live"), (5, "cached"), (5, "live")] == layout(allocator)[0]
    allocator.free(2)
    assert [[(15, "cached"), (5, "live")], [(20, "cached")]] == layout(allocator)
    allocator.malloc(6, 15 * MiB)
    assert [[(15, "live"), (5, "live")], [(20, "cached")]] == layout(allocator)


def test_streams_keep_apart():
    """A block that was freed on one stream never serves another."""
    allocator = classic()
    allocator.malloc(1, 20 * MiB, stream=3)
    allocator.free(1)
    allocator.malloc(2, 20 * MiB)
    assert 40 * MiB == allocator.reserved_bytes
    allocator.malloc(3, 20 * MiB, stream=3)
    assert 40 * MiB == allocator.reserved_bytes
    allocator.malloc(4, MiB, stream=3)
    allocator.malloc(5, MiB)
    assert 44 * MiB == allocator.reserved_bytes


# Running out


def test_whole_cached_segments_are_given_back_before_a_request_fails():
    """Of every stream and both pools; segments that hold anything alive stay."""
    allocator = classic(limit=64)
    allocator.malloc(1, 20 * MiB)
    allocator.malloc(2, MiB)
    allocator.malloc(3, 20 * MiB, stream=5)
    allocator.malloc(4, 5 * MiB)
    for storage in (1, 2, 3):
        allocator.free(storage)
    assert 62 * MiB == allocator.reserved_bytes
    allocator.malloc(5, 44 * MiB)
    assert [[(5, "live"), (15, "cached")], [(44, "live")]] == layout(allocator)
    assert 1 == allocator.num_retries


def test_failure_says_what_would_have_been_enough_and_a_run_can_go_on_from_there():
    """The exception holds the figures; the failed request can be made again under a higher limit."""
    allocator = classic(limit=60)
    allocator.malloc(1, 5 * MiB)
    allocator.malloc(2, 30 * MiB)
    allocator.free(2)
    with pytest.raises(AllocatorOutOfMemory) as failure:
        allocator.malloc(3, 45 * MiB + 1)
    error = failure.value
    assert (3, 45 * MiB + 512, 5 * MiB) == (error.storage, error.requested_bytes, error.allocated_bytes)
    assert (20 * MiB, 60 * MiB, 66 * MiB) == (error.reserved_bytes, error.limit_bytes, error.required_bytes)
    with pytest.raises(KeyError):
        allocator.free(3)
    allocator.limit_bytes = error.required_bytes
    allocator.malloc(3, 45 * MiB + 1)
    assert 66 * MiB == allocator.reserved_bytes
    assert 1 == allocator.num_retries


def test_the_range_of_limits_that_lead_to_the_same_state():
    """From the most that was reserved up to the least that was refused, wherever in the run that was."""

    def run(limit: int) -> CachingAllocator:
        allocator = classic(limit=limit)
        for storage, size in ((1, 30), (2, 40), (3, 60)):
            allocator.malloc(storage, size * MiB)
            allocator.free(storage)
        return allocator

    allocator = run(65)
    assert (60 * MiB, 70 * MiB) == (allocator.most_reserved_bytes, allocator.least_refused_bytes)
    assert 2 == run(60).num_retries == run(69).num_retries
    assert 1 == run(70).num_retries


# Expandable segments


def test_an_expandable_segment_grows_page_by_page():
    """Pages of 20 MiB for large requests, 2 MiB for small ones; blocks may lie across pages."""
    allocator = expandable()
    allocator.malloc(1, 15 * MiB)
    assert 20 * MiB == allocator.reserved_bytes
    allocator.malloc(2, 15 * MiB)
    assert [[(15, "live"), (15, "live"), (10, "cached")]] == layout(allocator)
    allocator.malloc(3, 51 * MiB)
    assert [[(15, "live"), (15, "live"), (51, "live"), (19, "cached")]] == layout(allocator)
    for storage in (4, 5, 6):
        allocator.malloc(storage, MiB)
    assert 104 * MiB == allocator.reserved_bytes


def test_only_whole_pages_are_given_back_and_the_lowest_hole_is_filled_first():
    """What is left of a page between live blocks stays cached, and is used again where it lies."""
    allocator = expandable(limit=100)
    for storage, size in enumerate((10, 60, 10, 20), start=1):
        allocator.malloc(storage, size * MiB)
    allocator.free(2)
    allocator.free(4)
    assert [[(10, "live"), (60, "cached"), (10, "live"), (20, "cached")]] == layout(allocator)
    with pytest.raises(AllocatorOutOfMemory) as failure:
        allocator.malloc(5, 61 * MiB)
    assert 40 * MiB + 80 * MiB == failure.value.required_bytes
    holes = [(10, "live"), (10, "cached"), (40, "unmapped"), (10, "cached"), (10, "live")]
    assert [holes] == layout(allocator)
    allocator.malloc(6, 45 * MiB)
    assert [[(10, "live"), (45, "live"), (15, "cached"), (10, "live")]] == layout(allocator)
    assert 80 * MiB == allocator.reserved_bytes


def test_best_fit_leaves_the_end_of_an_expandable_segment_room_to_grow():
    """The block at the end counts with the unmapped addresses behind it, so a larger one is taken first."""
    allocator = expandable()
    for storage, size in enumerate((15, 15), start=1):
        allocator.malloc(storage, size * MiB)
    allocator.free(1)
    assert [[(15, "cached"), (15, "live"), (10, "cached")]] == layout(allocator)
    allocator.malloc(3, 8 * MiB)
    assert [[(8, "live"), (7, "cached"), (15, "live"), (10, "cached")]] == layout(allocator)


def test_an_expandable_segment_that_holds_nothing_goes_back_whole():
    """Its addresses too."""
    allocator = expandable()
    allocator.malloc(1, 5 * MiB)
    allocator.malloc(2, MiB, stream=4)
    allocator.free(1)
    allocator.release_cached()
    assert [[(1, "live"), (1, "cached")]] == layout(allocator)
    assert 2 * MiB == allocator.reserved_bytes


def test_a_full_address_range_is_followed_by_another():
    """Ranges are 9/8 of the device's memory, in whole pages."""
    allocator = CachingAllocator(AllocatorSettings(), total_bytes=160 * MiB)
    allocator.malloc(1, 150 * MiB)
    allocator.malloc(2, 40 * MiB)
    assert [[150 * MiB, 10 * MiB, 20 * MiB], [40 * MiB, 140 * MiB]] == [
        [size for _, size, _ in segment] for segment in allocator.segments()
    ]
