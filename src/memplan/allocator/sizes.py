"""Constants and roundings of PyTorch's CUDA caching allocator (`c10/core/AllocatorConfig.h`)."""

from __future__ import annotations

from memplan.units import MiB

MIN_BLOCK_BYTES = 512
SMALL_REQUEST_BYTES = 1 * MiB
"""Largest request of the small pool (`kSmallSize`)."""
SMALL_SEGMENT_BYTES = 2 * MiB
LARGE_SEGMENT_BYTES = 20 * MiB
"""Segment that large requests below `OWN_SEGMENT_BYTES` are packed in (`large_segment_size_mb`)."""
OWN_SEGMENT_BYTES = 10 * MiB
"""Smallest request that gets a segment of its own (`kMinLargeAlloc`)."""
GRANULARITY_BYTES = 2 * MiB
"""Everything that is taken from the driver is a multiple of this (`kRoundLarge`)."""
NON_SPLIT_ROUNDING_BYTES = 20 * MiB
"""An unsplittable block serves requests that are smaller by less than this (`max_non_split_rounding_mb`)."""

UNLIMITED = 1 << 62
"""More bytes than any device has."""


def round_up(num_bytes: int, multiple: int) -> int:
    """The smallest multiple that is not below `num_bytes`."""
    return -(-num_bytes // multiple) * multiple


def block_bytes(requested_bytes: int, roundup_power2_divisions: int | None = None) -> int:
    """
    Bytes of the block that a request needs (`round_size`); 0 for 0.

    With divisions, requests above 512 B x divisions round up to the next of so many equal steps between two
    powers of two.

    >>> block_bytes(1), block_bytes(513), block_bytes(1200 * 1024, 4) // 1024
    (512, 1024, 1280)
    """
    divisions = roundup_power2_divisions or 1
    if divisions > 1 and requested_bytes > MIN_BLOCK_BYTES * divisions:
        power = 1 << (requested_bytes.bit_length() - 1)
        return round_up(requested_bytes, power >> (divisions.bit_length() - 1))
    return round_up(requested_bytes, MIN_BLOCK_BYTES)


def segment_bytes(size: int) -> int:
    """Bytes that are asked of the driver for a block of `size` bytes (`get_allocation_size`)."""
    if size <= SMALL_REQUEST_BYTES:
        return SMALL_SEGMENT_BYTES
    if size < OWN_SEGMENT_BYTES:
        return LARGE_SEGMENT_BYTES
    return round_up(size, GRANULARITY_BYTES)
