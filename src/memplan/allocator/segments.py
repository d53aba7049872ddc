"""Memory that the allocator holds from the driver: segments, cut into blocks; cached blocks in pools."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from memplan.allocator.sizes import (
    LARGE_SEGMENT_BYTES,
    MIN_BLOCK_BYTES,
    SMALL_REQUEST_BYTES,
    SMALL_SEGMENT_BYTES,
    UNLIMITED,
    round_up,
    segment_bytes,
)

ADDRESS_BITS = 64
BOUNDARY = 0
"""The row that stands for "no block" at either end of a segment: never cached, never unmapped."""
_ROWS = 256
"""How many rows a table grows by."""


class Blocks:
    """
    The blocks of all segments, one row per block and a list per column.

    A block is handed out, cached (`key` is not 0), or addresses without memory (not `mapped`; expandable
    segments only). Columns of numbers rather than objects, so that a copy costs no more than a few list
    copies.
    """

    __slots__ = ("address", "key", "mapped", "next", "pool", "previous", "size", "spare")

    def __init__(self) -> None:
        self.address = [0]
        self.size = [0]
        self.key = [0]
        """Rank among cached blocks: by size, then by address."""
        self.mapped = [True]
        self.previous = [BOUNDARY]
        self.next = [BOUNDARY]
        self.pool = [0]
        """Index into `Segments.pools`."""
        self.spare: list[int] = []
        """Rows of blocks that have gone; all of them mapped and not cached."""

    def new_row(self) -> int:
        """A row to fill, mapped and not cached."""
        if not self.spare:
            rows = range(len(self.size), len(self.size) + _ROWS)
            self.spare.extend(reversed(rows))
            self.mapped += [True] * _ROWS
            for column in (self.address, self.size, self.key, self.previous, self.next, self.pool):
                column += [0] * _ROWS
        return self.spare.pop()

    def copy(self) -> Blocks:
        twin = Blocks()
        for column in Blocks.__slots__:
            setattr(twin, column, getattr(self, column).copy())
        return twin


class Pool:
    """Cached blocks of the small or of the large requests of one stream, best fit first."""

    __slots__ = ("keys", "min_remainder_bytes", "number", "page_bytes", "rows", "small", "stream", "unmapped")

    def __init__(self, number: int, small: bool, stream: int, expandable: bool) -> None:
        self.number = number
        self.small = small
        self.stream = stream
        self.page_bytes = SMALL_SEGMENT_BYTES if small else LARGE_SEGMENT_BYTES
        self.min_remainder_bytes = MIN_BLOCK_BYTES if small or expandable else SMALL_REQUEST_BYTES + 1
        """A block is split if at least this would be left over (`should_split`)."""
        self.keys: list[int] = []
        self.rows: list[int] = []
        """The cached blocks, parallel to `keys`."""
        self.unmapped: list[int] = []
        """The unmapped blocks, by address."""


class Segments:
    """
    What is held from the driver, and how it is cut. `Cache` decides when to take and to give back.

    An expandable segment is a range of addresses of which pages are mapped to memory as needed; the others
    are mapped whole. Reserved bytes are those of all mapped blocks.
    """

    def __init__(self, *, expandable: bool, limit_bytes: int, total_bytes: int) -> None:
        self.expandable = expandable
        self.limit_bytes = limit_bytes
        self.total_bytes = total_bytes
        self.reserved_bytes = 0
        self.most_reserved_bytes = 0
        self.least_refused_bytes = UNLIMITED
        """
        The lowest reserved bytes that the driver ever refused. Any limit from `most_reserved_bytes` up to but
        without this one would have led to the same state.
        """
        self.refused_bytes = 0
        """The reserved bytes that were refused last."""
        self.blocks = Blocks()
        self.pools: list[Pool] = []
        self.segment_watcher: Callable[[str, int, int, Pool], None] | None = None
        """
        Called with the name that PyTorch's traces give to what happened to memory of the driver (`segment_alloc`,
        `segment_free`, `segment_map`, `segment_unmap`), its address, its bytes, and the pool it serves.
        """
        self._next_address = LARGE_SEGMENT_BYTES

    def pool(self, small: bool, stream: int) -> Pool:
        """The pool of small or large requests of a stream; made if there is none yet."""
        for pool in self.pools:
            if pool.small is small and pool.stream == stream:
                return pool
        self.pools.append(Pool(len(self.pools), small, stream, self.expandable))
        return self.pools[-1]

    def rows_from(self, row: int) -> Iterator[int]:
        """A block and those behind it, to the end of its segment."""
        while row != BOUNDARY:
            yield row
            row = self.blocks.next[row]

    def is_whole(self, row: int) -> bool:
        """Whether a block is all of its segment."""
        return self.blocks.previous[row] == self.blocks.next[row] == BOUNDARY

    # Taking

    def reserve(self, pool: Pool, size: int) -> int:
        """A new cached block of at least `size` bytes; `BOUNDARY` if the driver cannot give it."""
        if self.expandable:
            return self._expand(pool, size)
        segment = segment_bytes(size)
        if not self._take(segment):
            return BOUNDARY
        row = self._new_range(pool, segment)
        self.insert(row)
        if self.segment_watcher is not None:
            self.segment_watcher("segment_alloc", self.blocks.address[row], segment, pool)
        return row

    def _take(self, num_bytes: int) -> bool:
        reserved = self.reserved_bytes + num_bytes
        if reserved > self.limit_bytes:
            self.refused_bytes = reserved
            self.least_refused_bytes = min(self.least_refused_bytes, reserved)
            return False
        self.reserved_bytes = reserved
        self.most_reserved_bytes = max(self.most_reserved_bytes, reserved)
        return True

    def _new_range(self, pool: Pool, size: int) -> int:
        """A block alone on addresses never used before."""
        blocks = self.blocks
        row = blocks.new_row()
        blocks.address[row] = self._next_address
        blocks.size[row] = size
        blocks.previous[row] = blocks.next[row] = BOUNDARY
        blocks.pool[row] = pool.number
        # Pages are counted from address 0, so that a range has to start where pages of either size do.
        self._next_address = round_up(self._next_address + size, LARGE_SEGMENT_BYTES)
        return row

    def _expand(self, pool: Pool, size: int) -> int:
        """Map pages at the lowest address with room for `size` bytes (`try_allocate_expandable_block`)."""
        sizes = self.blocks.size
        row = self._room(pool, size)
        if not self.blocks.mapped[row]:
            row = self._map(pool, row, min(size, sizes[row]))
        while row != BOUNDARY and sizes[row] < size:
            missing = size - sizes[row]
            row = self.blocks.next[row]
            row = self._map(pool, row, min(missing, sizes[row]))
        return row

    def _room(self, pool: Pool, size: int) -> int:
        """The first of a run of cached and unmapped blocks of at least `size` (`find_expandable_block`)."""
        blocks = self.blocks
        for row in pool.unmapped:
            before = blocks.previous[row]
            start = before if blocks.key[before] else row
            room = 0
            for candidate in self.rows_from(start):
                if blocks.mapped[candidate] and not blocks.key[candidate]:
                    break
                room += blocks.size[candidate]
                if room >= size:
                    return start
        addresses = max(self.total_bytes + self.total_bytes // 8, size)
        row = self._new_range(pool, round_up(addresses, pool.page_bytes))
        blocks.mapped[row] = False
        pool.unmapped.append(row)
        return row

    def _map(self, pool: Pool, row: int, size: int) -> int:
        """
        Back the first `size` bytes of an unmapped block, rounded up to pages, and cache them. The block that holds
        them; `BOUNDARY` if the driver cannot give them.
        """
        blocks = self.blocks
        mapped = round_up(size, pool.page_bytes)
        if not self._take(mapped):
            return BOUNDARY
        if self.segment_watcher is not None:
            self.segment_watcher("segment_map", blocks.address[row], mapped, pool)
        if mapped < blocks.size[row]:
            row = self._split_front(row, mapped)
        else:
            pool.unmapped.remove(row)
        blocks.mapped[row] = True
        self._merge(row)
        self.insert(row)
        return row

    # Giving back

    def release(self, row: int) -> None:
        """Give a cached block back, which is a whole segment that cannot expand (`release_block`)."""
        self.remove(row)
        size, pool = self.blocks.size[row], self.pools[self.blocks.pool[row]]
        self.reserved_bytes -= size
        self.blocks.spare.append(row)
        if self.segment_watcher is not None:
            self.segment_watcher("segment_free", self.blocks.address[row], size, pool)

    def unmap(self, row: int) -> None:
        """Give back the whole pages of a cached block, and its segment once that is empty (`unmap_block`)."""
        blocks = self.blocks
        page = self.pools[blocks.pool[row]].page_bytes
        start = round_up(blocks.address[row], page)
        size = (blocks.address[row] + blocks.size[row]) // page * page - start
        if size <= 0:
            return
        self.remove(row)
        if start > blocks.address[row]:
            before = row
            row = self._split(before, start - blocks.address[before])
            self.insert(before)
        if size < blocks.size[row]:
            self.insert(self._split(row, size))
        blocks.mapped[row] = False
        self.reserved_bytes -= size
        if self.segment_watcher is not None:
            self.segment_watcher("segment_unmap", start, size, self.pools[blocks.pool[row]])
        self._merge(row)
        if self.is_whole(row):
            blocks.mapped[row] = True
            blocks.spare.append(row)
        else:
            self.insert(row)

    # Cutting and joining

    def insert(self, row: int) -> None:
        """Put a block among the cached ones of its pool, or among the unmapped ones."""
        blocks = self.blocks
        pool = self.pools[blocks.pool[row]]
        if not blocks.mapped[row]:
            addresses = [blocks.address[other] for other in pool.unmapped]
            pool.unmapped.insert(bisect_left(addresses, blocks.address[row]), row)
            return
        key = (blocks.size[row] << ADDRESS_BITS) + blocks.address[row]
        blocks.key[row] = key
        index = bisect_left(pool.keys, key)
        pool.keys.insert(index, key)
        pool.rows.insert(index, row)

    def remove(self, row: int) -> None:
        """Take a block out of where `insert` put it."""
        blocks = self.blocks
        pool = self.pools[blocks.pool[row]]
        if not blocks.mapped[row]:
            pool.unmapped.remove(row)
            return
        index = bisect_left(pool.keys, blocks.key[row])
        blocks.key[row] = 0
        del pool.keys[index], pool.rows[index]

    def _split(self, row: int, size: int) -> int:
        """Cut a block that is in no pool down to its first `size` bytes; returns the rest, likewise."""
        blocks = self.blocks
        rest = blocks.new_row()
        behind = blocks.next[row]
        blocks.address[rest] = blocks.address[row] + size
        blocks.size[rest] = blocks.size[row] - size
        blocks.mapped[rest] = blocks.mapped[row]
        blocks.pool[rest] = blocks.pool[row]
        blocks.previous[rest] = row
        blocks.next[rest] = behind
        blocks.previous[behind] = rest
        blocks.next[row] = rest
        blocks.size[row] = size
        return rest

    def _split_front(self, row: int, size: int) -> int:
        """Cut the first `size` bytes off a block that stays where `insert` put it; returns them, in no pool."""
        blocks = self.blocks
        front = blocks.new_row()
        before = blocks.previous[row]
        blocks.address[front] = blocks.address[row]
        blocks.size[front] = size
        blocks.pool[front] = blocks.pool[row]
        blocks.previous[front] = before
        blocks.next[before] = front
        blocks.next[front] = row
        blocks.previous[row] = front
        blocks.address[row] += size
        blocks.size[row] -= size
        return front

    def _merge(self, row: int) -> None:
        """Let a block that is in no pool swallow the neighbours that are cached, or unmapped, like it."""
        blocks = self.blocks
        mapped = blocks.mapped[row]
        before, behind = blocks.previous[row], blocks.next[row]
        if blocks.key[before] if mapped else not blocks.mapped[before]:
            self._forget(before)
            blocks.address[row] = blocks.address[before]
            blocks.size[row] += blocks.size[before]
            blocks.previous[row] = blocks.previous[before]
            blocks.next[blocks.previous[row]] = row
        if blocks.key[behind] if mapped else not blocks.mapped[behind]:
            self._forget(behind)
            blocks.size[row] += blocks.size[behind]
            blocks.next[row] = blocks.next[behind]
            blocks.previous[blocks.next[row]] = row

    def _forget(self, row: int) -> None:
        self.remove(row)
        self.blocks.mapped[row] = True
        self.blocks.spare.append(row)
