"""Where the block for a request comes from: the cache, or the driver, to which the cache may give back."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from memplan.allocator.segments import ADDRESS_BITS, BOUNDARY, Pool, Segments
from memplan.allocator.sizes import NON_SPLIT_ROUNDING_BYTES, UNLIMITED, round_up, segment_bytes
from memplan.job.spec import AllocatorSettings
from memplan.units import MiB


class AllocatorOutOfMemory(Exception):
    """
    A request failed even after the cache was given back. Internal: not a sentence for users.

    `required_bytes` is the limit under which the driver would not have refused; `event` the index into the
    tape's events, if the request came from a tape.
    """

    def __init__(
        self,
        *,
        storage: int,
        requested_bytes: int,
        allocated_bytes: int,
        reserved_bytes: int,
        limit_bytes: int,
        required_bytes: int,
    ) -> None:
        super().__init__(
            f"storage {storage}: {requested_bytes} B requested, {allocated_bytes} B allocated, "
            f"{reserved_bytes} B reserved, limit {limit_bytes} B"
        )
        self.storage = storage
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes
        self.required_bytes = required_bytes
        self.event: int | None = None


class Cache(Segments):
    """
    The search for a block, in the order of `DeviceCachingAllocator::malloc`: best fit in the cache; garbage
    collection; new memory, at once, after giving back unsplittable segments, or after giving back all that is
    cached.
    """

    def __init__(
        self,
        settings: AllocatorSettings,
        *,
        limit_bytes: int | None,
        allowed_bytes: int | None,
        total_bytes: int,
    ) -> None:
        super().__init__(
            expandable=settings.expandable_segments,
            limit_bytes=UNLIMITED if limit_bytes is None else limit_bytes,
            total_bytes=total_bytes,
        )
        self.settings = settings
        self.allowed_bytes = allowed_bytes
        self.allocated_bytes = 0
        self.peak_reserved_bytes = 0
        self.peak_reserved_storage = 0
        """The storage whose allocation made the peak; 0 if none did since `reset_peaks`."""
        self.num_retries = 0
        """Requests for which all that is cached was given back (`num_alloc_retries`)."""
        self.watch_bytes = UNLIMITED
        self.watcher: Callable[[int], None] | None = None
        """
        Called with a storage, before anything changes, if it cannot be served from the cache and may take the
        reserved bytes above `watch_bytes`.
        """
        max_split = settings.max_split_size_mb
        self.max_split_bytes = UNLIMITED if max_split is None else max_split * MiB
        self.collects = bool(settings.garbage_collection_threshold and allowed_bytes and not self.expandable)
        self.num_searches = 0
        """Requests of the large pool; counted only if garbage is collected, as `cached_since`."""
        self.cached_since: dict[int, int] = {}
        """`num_searches` when a block was freed last; the rest of a split block has no age, being split."""

    def find(self, pool: Pool, index: int, size: int, storage: int) -> int:
        """Index in `pool` of the block to use; `index` is that of the first large enough, or past the end."""
        if self.collects and not pool.small:
            self.num_searches += 1
        if index < len(pool.keys):
            index = self.least_expandable(pool, index)
            found = self.blocks.size[pool.rows[index]]
            max_split = self.max_split_bytes
            if found < (max_split if size < max_split else size + NON_SPLIT_ROUNDING_BYTES):
                return index
        row = self._grow(pool, size, storage)
        return bisect_left(pool.keys, self.blocks.key[row])

    def least_expandable(self, pool: Pool, index: int) -> int:
        """Best fit counts unmapped addresses behind a block as part of it, to leave it room to grow."""
        least = self._expandable_bytes(pool.rows[index])
        for candidate in range(index + 1, len(pool.rows)):
            size = self._expandable_bytes(pool.rows[candidate])
            if size >= least:
                break
            index, least = candidate, size
        return index

    def _expandable_bytes(self, row: int) -> int:
        behind = self.blocks.next[row]
        return self.blocks.size[row] + (0 if self.blocks.mapped[behind] else self.blocks.size[behind])

    def _grow(self, pool: Pool, size: int, storage: int) -> int:
        """A new cached block of at least `size` bytes, at the cost of the cache if the driver has no more."""
        most = round_up(size, pool.page_bytes) if self.expandable else segment_bytes(size)
        if self.reserved_bytes + most > self.watch_bytes and self.watcher is not None:
            self.watcher(storage)
        if self.collects:
            self._collect_garbage()
        row = self._reserve_if_allowed(pool, size)
        if row == BOUNDARY and self._release_oversize(pool, size):
            row = self._reserve_if_allowed(pool, size)
        if row == BOUNDARY:
            self.release_cached()
            self.num_retries += 1
            row = self._reserve_if_allowed(pool, size)
        if self.reserved_bytes > self.peak_reserved_bytes:
            self.peak_reserved_bytes = self.reserved_bytes
            self.peak_reserved_storage = storage
        if row == BOUNDARY:
            raise AllocatorOutOfMemory(
                storage=storage,
                requested_bytes=size,
                allocated_bytes=self.allocated_bytes,
                reserved_bytes=self.reserved_bytes,
                limit_bytes=self.limit_bytes,
                required_bytes=self.refused_bytes,
            )
        return row

    def _reserve_if_allowed(self, pool: Pool, size: int) -> int:
        reserved = self.reserved_bytes + segment_bytes(size)
        if self.allowed_bytes is not None and reserved > self.allowed_bytes:
            self.refused_bytes = reserved
            return BOUNDARY
        return self.reserve(pool, size)

    def release_cached(self) -> None:
        """
        Give every cached segment, or page of an expandable segment, that holds nothing alive back to the
        driver (`release_cached_blocks`), when all streams have come by.
        """
        self.pass_events()
        for pool in self.pools:
            for row in pool.rows.copy():
                if self.expandable:
                    self.unmap(row)
                elif self.is_whole(row):
                    self.release(row)

    def pass_events(self) -> None:
        """What was freed while another stream used it is cached from now on; overridden where blocks are freed."""

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """
        Under `max_split_size_mb`, give back the smallest unsplittable cached segment that is large enough,
        else the largest ones until their sum is (`release_available_cached_blocks`); whether enough was given
        back.
        """
        max_split = self.max_split_bytes
        if max_split == UNLIMITED or self.expandable:
            return False
        wanted = max(size, max_split)
        index = bisect_left(pool.keys, wanted << ADDRESS_BITS)
        if index < len(pool.rows):
            self.release(pool.rows[index])
            return True
        released = 0
        for row in reversed(pool.rows.copy()):
            if released >= wanted or self.blocks.size[row] < max_split:
                break
            released += self.blocks.size[row]
            self.release(row)
        return released >= wanted

    def _collect_garbage(self) -> None:
        """
        Above the threshold, give back the cached large segments that have waited for at least the average
        time of them, until enough is given back (`garbage_collect_cached_blocks`). Time is counted in
        searches of the large pool.
        """
        assert self.allowed_bytes is not None and self.settings.garbage_collection_threshold is not None
        threshold = int(self.settings.garbage_collection_threshold * self.allowed_bytes)
        target = self.reserved_bytes - threshold
        ages = {
            row: self.num_searches - self.cached_since[row]
            for pool in self.pools
            if not pool.small
            for row in pool.rows
            if self.is_whole(row)
        }
        released = 0
        while released < target and ages:
            average = sum(ages.values()) / len(ages)
            for row in [row for row, age in ages.items() if age >= average]:
                del ages[row]
                released += self.blocks.size[row]
                self.release(row)
