"""torch's allocator over a driver that gives addresses as drivers do: of equal free blocks torch takes the lowest."""

from __future__ import annotations

from bisect import insort

from memplan.allocator import CachingAllocator
from memplan.allocator.segments import Pool
from memplan.allocator.sizes import round_up
from memplan.job.spec import AllocatorSettings
from memplan.units import MiB

RANGE_BYTES = 32 * MiB
"""The driver takes addresses in multiples of this."""
TOP = 1 << 44


class DriversOrder(CachingAllocator):
    """
    Segments at the addresses that cudaMalloc gives them on Linux, as public snapshots of torch's allocator show them
    (kkaitlyn111/cs336-a2-systems, memory_files/memory_ctx128_*.pickle: 117 of 119 that lie in a range that was there
    already, and 919 of 953 that open one): of what is left of ranges the lowest part that is large enough, else a new
    range right below all others. Ranges that are empty again are not used again here, which these do not settle.
    """

    def __init__(self, settings: AllocatorSettings) -> None:
        super().__init__(settings)
        self._lowest = TOP
        self._parts: list[tuple[int, int]] = []
        """(address, bytes) left of ranges."""

    def _new_range(self, pool: Pool, size: int) -> int:
        row = super()._new_range(pool, size)
        self.blocks.address[row] = self._place(size)
        return row

    def _place(self, size: int) -> int:
        for index, (address, left) in enumerate(self._parts):
            if left >= size:
                self._parts[index : index + 1] = [(address + size, left - size)] if left > size else []
                return address
        whole = round_up(size, RANGE_BYTES)
        self._lowest -= whole
        if whole > size:
            insort(self._parts, (self._lowest + size, whole - size))
        return self._lowest
