"""
A simulation of PyTorch's CUDA caching allocator: which bytes are handed out, which are held from the driver.

The rules are those of `DeviceCachingAllocator` in `c10/cuda/CUDACachingAllocator.cpp`, torch 2.13, for one
device without CUDA graphs or private pools:

* requests are rounded up to 512 B, or to a fraction of a power of two (`roundup_power2_divisions`);
* requests up to 1 MiB live in the small pool, larger ones in the large pool; each stream has its own of both;
* the smallest cached block that is large enough is taken, the lowest address among equals; what is left over
  stays cached if it is at least 512 B (small pool, expandable segments) or more than 1 MiB (large pool);
* without such a block, memory is taken from the driver: 2 MiB for the small pool, 20 MiB for requests below
  10 MiB, else the request rounded up to 2 MiB. Expandable segments instead map pages of 2 MiB (small pool) or
  20 MiB (large) at the lowest address where the request fits;
* if the driver has none left, cached segments (or whole pages) go back to it and the request is tried again;
* a freed block merges with free neighbours of its segment;
* one that another stream has used (`record_stream`) does so later, when that stream has come by; when the driver
  has no more memory, the host waits for that, but the cache is not searched again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

from memplan.allocator.cache import Cache
from memplan.allocator.segments import ADDRESS_BITS, BOUNDARY
from memplan.allocator.sizes import SMALL_REQUEST_BYTES, UNLIMITED, block_bytes
from memplan.job.spec import AllocatorSettings


class CachingAllocator(Cache):
    """
    The allocator of one device, empty at first.

    `limit_bytes` is what the driver can give (None: without end). `allowed_bytes` is the cap that
    `torch.cuda.set_per_process_memory_fraction` sets; `garbage_collection_threshold` is a fraction of it and,
    as in PyTorch, has no effect without it, nor on expandable segments. `total_bytes` is the memory of the
    device, of which an expandable segment reserves 9/8 as addresses.
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        *,
        limit_bytes: int | None = None,
        allowed_bytes: int | None = None,
        total_bytes: int = 1 << 44,
    ) -> None:
        super().__init__(
            settings, limit_bytes=limit_bytes, allowed_bytes=allowed_bytes, total_bytes=total_bytes
        )
        self.peak_allocated_bytes = 0
        self.peak_allocated_storage = 0
        """The storage whose allocation made the peak; 0 if none did since `reset_peaks`."""
        self._live: dict[int, int] = {}
        """Row of the block of each live storage; `BOUNDARY` if it has none."""
        self.outstanding: dict[int, int] = {}
        """Row of the block of each storage that was freed before another stream had come by, oldest first."""

    # Allocating and freeing

    def malloc(self, storage: int, num_bytes: int, stream: int = 0) -> None:
        """
        Hand out `num_bytes` as `storage` (above 0 and not alive). Zero bytes take nothing.

        Raises `AllocatorOutOfMemory` if neither the cache nor the driver has them after `release_cached`.
        """
        self.run((storage,), {storage: self.block_bytes(num_bytes)}, {storage: stream})

    def free(self, storage: int) -> None:
        """Take a storage back. KeyError if it is not alive."""
        self.run((-storage,), {}, {})

    def free_recorded(self, storage: int) -> None:
        """
        Take a storage back that another stream may still use (`record_stream`): it counts as allocated no more, and is
        cached when `pass_events` finds its event over (`insert_events`). KeyError if it is not alive.
        """
        block = self._live.pop(storage)
        if block != BOUNDARY:
            self.outstanding[storage] = block
            self.allocated_bytes -= self.blocks.size[block]

    def pass_events(self, count: int | None = None) -> None:
        """The events of the oldest `count` outstanding blocks are over (None: of all): they are cached."""
        for storage in [*self.outstanding][:count]:
            self._live[storage] = block = self.outstanding.pop(storage)
            self.allocated_bytes += self.blocks.size[block]
            self.run((-storage,), {}, {})

    def block_bytes(self, requested_bytes: int) -> int:
        """Bytes of the block that a request needs under these settings."""
        return block_bytes(requested_bytes, self.settings.roundup_power2_divisions)

    def all_block_bytes(self, sizes: Iterable[int]) -> list[int]:
        """`block_bytes` of every size."""
        sizes = list(sizes)
        rounded = {size: self.block_bytes(size) for size in set(sizes)}
        return [*map(rounded.__getitem__, sizes)]

    def run(
        self, events: Iterable[int], sizes: Sequence[int] | Mapping[int, int], streams: Mapping[int, int]
    ) -> None:
        """
        Follow the events of a tape: `+i` allocates storage `i`, of `block_bytes` `sizes[i]`, on stream
        `streams.get(i, 0)`; `-i` frees it.

        Raises `AllocatorOutOfMemory`; the events before the one that failed have then taken place, and a run
        may go on with that one once the limit is higher.
        """
        # An event costs less than a microsecond because the usual paths call and look up next to nothing.
        live = self._live
        blocks = self.blocks
        address_of, size_of, key_of, mapped = blocks.address, blocks.size, blocks.key, blocks.mapped
        previous_of, next_of, pool_of, spare = blocks.previous, blocks.next, blocks.pool, blocks.spare
        pools = self.pools
        small, large = self.pool(True, 0), self.pool(False, 0)
        expandable = self.expandable
        collects = self.collects
        rare_rules = collects or self.max_split_bytes != UNLIMITED
        split_below = UNLIMITED if expandable else self.max_split_bytes
        allocated = self.allocated_bytes
        peak = self.peak_allocated_bytes
        peak_storage = self.peak_allocated_storage
        try:
            for event in events:
                if event > 0:
                    size = sizes[event]
                    if not size:
                        live[event] = BOUNDARY
                        continue
                    pool = small if size <= SMALL_REQUEST_BYTES else large
                    if streams and event in streams:
                        pool = self.pool(pool.small, streams[event])
                    keys = pool.keys
                    rows = pool.rows
                    index = bisect_left(keys, size << ADDRESS_BITS)
                    if index == len(keys) or rare_rules:
                        self.allocated_bytes = allocated
                        index = self.find(pool, index, size, event)
                        block = rows[index]
                    else:
                        block = rows[index]
                        if expandable and not mapped[next_of[block]] and index + 1 < len(keys):
                            index = self.least_expandable(pool, index)
                            block = rows[index]
                    remainder = size_of[block] - size
                    if remainder >= pool.min_remainder_bytes and size < split_below:
                        rest = block
                        block = spare.pop() if spare else blocks.new_row()
                        address_of[block] = address = address_of[rest]
                        size_of[block] = size
                        pool_of[block] = pool.number
                        previous_of[block] = neighbour = previous_of[rest]
                        next_of[neighbour] = block
                        next_of[block] = rest
                        previous_of[rest] = block
                        address_of[rest] = address = address + size
                        size_of[rest] = remainder
                        key_of[rest] = key = (remainder << ADDRESS_BITS) + address
                        if not index or keys[index - 1] < key:
                            keys[index] = key
                        else:
                            del keys[index], rows[index]
                            index = bisect_left(keys, key, 0, index - 1)
                            keys.insert(index, key)
                            rows.insert(index, rest)
                    else:
                        del keys[index], rows[index]
                        size = size_of[block]
                        key_of[block] = 0
                    live[event] = block
                    allocated += size
                    if allocated > peak:
                        peak = allocated
                        peak_storage = event
                else:
                    block = live.pop(-event)
                    if block == BOUNDARY:
                        continue
                    pool = pools[pool_of[block]]
                    keys = pool.keys
                    rows = pool.rows
                    size = size_of[block]
                    allocated -= size
                    index = -1
                    neighbour = previous_of[block]
                    key = key_of[neighbour]
                    if key:
                        index = bisect_left(keys, key)
                        key_of[neighbour] = 0
                        spare.append(neighbour)
                        size += size_of[neighbour]
                        address_of[block] = address = address_of[neighbour]
                        previous_of[block] = neighbour = previous_of[neighbour]
                        next_of[neighbour] = block
                    else:
                        address = address_of[block]
                    neighbour = next_of[block]
                    key = key_of[neighbour]
                    if key:
                        other = bisect_left(keys, key)
                        if index < 0:
                            index = other
                        else:
                            del keys[other], rows[other]
                            if other < index:
                                index -= 1
                        key_of[neighbour] = 0
                        spare.append(neighbour)
                        size += size_of[neighbour]
                        next_of[block] = neighbour = next_of[neighbour]
                        previous_of[neighbour] = block
                    size_of[block] = size
                    key_of[block] = key = (size << ADDRESS_BITS) + address
                    if index < 0:
                        index = bisect_left(keys, key)
                        keys.insert(index, key)
                        rows.insert(index, block)
                    elif index + 1 == len(keys) or key < keys[index + 1]:
                        # Larger than what it takes the place of, and still smaller than the next.
                        keys[index] = key
                        rows[index] = block
                    else:
                        del keys[index], rows[index]
                        index = bisect_left(keys, key, index)
                        keys.insert(index, key)
                        rows.insert(index, block)
                    if collects:
                        self.cached_since[block] = self.num_searches
        finally:
            self.allocated_bytes = allocated
            self.peak_allocated_bytes = peak
            self.peak_allocated_storage = peak_storage

    def reset_peaks(self) -> None:
        """Peaks start again from what is held now."""
        self.peak_allocated_bytes = self.allocated_bytes
        self.peak_reserved_bytes = self.reserved_bytes
        self.peak_allocated_storage = self.peak_reserved_storage = 0

    # Looking at the state

    def segments(self) -> list[list[tuple[int, int, str]]]:
        """
        Every segment, by address, as the (address, bytes, state) of its blocks in order; the state is `live`,
        `cached` or, in expandable segments, `unmapped`.
        """
        blocks = self.blocks
        rows = [row for row in self._live.values() if row != BOUNDARY]
        for pool in self.pools:
            rows += pool.rows + pool.unmapped
        heads = sorted((blocks.address[row], row) for row in rows if blocks.previous[row] == BOUNDARY)
        return [
            [(blocks.address[row], blocks.size[row], self._state(row)) for row in self.rows_from(head)]
            for _, head in heads
        ]

    def _state(self, row: int) -> str:
        if not self.blocks.mapped[row]:
            return "unmapped"
        return "cached" if self.blocks.key[row] else "live"

    def block_of(self, storage: int) -> tuple[int, int]:
        """(address, bytes) of a live storage, (0, 0) if it has no bytes. KeyError if it is not alive."""
        row = self._live[storage]
        return self.blocks.address[row], self.blocks.size[row]

    def is_in_state_of(self, other: CachingAllocator) -> bool:
        """
        Whether segments and blocks lie as in another allocator of the same settings that ran the same tape: from here
        on the two act alike. What was counted on the way is not compared. Where garbage is collected, ages are part of
        the state: False.
        """
        # Cached blocks differ first and are compared in one go.
        return (
            not self.collects
            and self._next_address == other._next_address
            and [pool.keys for pool in self.pools] == [pool.keys for pool in other.pools]
            and [*self._live] == [*other._live]
            and self._layout() == other._layout()
        )

    def _layout(self) -> list[list[int]]:
        """Address, bytes and the neighbour before it (0: none) of every block, in an order that the state defines."""
        rows = [*self._live.values()]
        for pool in self.pools:
            rows += pool.rows
            rows += pool.unmapped
        address, size = self.blocks.address, self.blocks.size
        before = map(self.blocks.previous.__getitem__, rows)
        columns = (
            map(address.__getitem__, rows),
            map(size.__getitem__, rows),
            map(address.__getitem__, before),
        )
        return [*map(list, columns)]

    def clone(self) -> CachingAllocator:
        """An allocator in the same state that shares nothing with this one, and that nobody watches."""
        twin = CachingAllocator(
            self.settings,
            limit_bytes=self.limit_bytes,
            allowed_bytes=self.allowed_bytes,
            total_bytes=self.total_bytes,
        )
        for name in _COPIED:
            setattr(twin, name, getattr(self, name))
        twin.blocks = self.blocks.copy()
        for pool in self.pools:
            other = twin.pool(pool.small, pool.stream)
            other.keys = pool.keys.copy()
            other.rows = pool.rows.copy()
            other.unmapped = pool.unmapped.copy()
        twin._live = self._live.copy()
        twin.outstanding = self.outstanding.copy()
        twin.cached_since = self.cached_since.copy()
        return twin


_COPIED = (
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
    "_next_address",
)
