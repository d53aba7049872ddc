"""
The rules of the caching allocator once more, in the plainest way: lists of blocks, searched from end to end.

The fast simulation has to agree with it block by block. No garbage collection.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from memplan.job.spec import AllocatorSettings
from memplan.units import MiB

ADDRESS_SPACE = (1 << 44) + (1 << 41)


class OutOfMemory(Exception):
    pass


@dataclass
class Block:
    address: int
    size: int
    state: str
    """live, cached or unmapped"""


@dataclass
class Segment:
    small: bool
    stream: int
    blocks: list[Block] = field(default_factory=list)

    @property
    def page(self) -> int:
        return 2 * MiB if self.small else 20 * MiB

    def coalesce(self) -> None:
        joined: list[Block] = []
        for block in self.blocks:
            if joined and joined[-1].state == block.state != "live":
                joined[-1].size += block.size
            else:
                joined.append(block)
        self.blocks = joined

    def grown(self, block: Block) -> int:
        """Bytes of a block with the unmapped ones behind it."""
        index = self.blocks.index(block) + 1
        behind = self.blocks[index : index + 1]
        return block.size + sum(other.size for other in behind if other.state == "unmapped")


def up(num_bytes: int, multiple: int) -> int:
    return (num_bytes + multiple - 1) // multiple * multiple


class ReferenceAllocator:
    def __init__(self, settings: AllocatorSettings, limit_bytes: int | None = None) -> None:
        self.expandable = settings.expandable_segments
        self.max_split = (settings.max_split_size_mb or 1 << 40) * MiB
        self.limit = limit_bytes if limit_bytes is not None else 1 << 62
        self.divisions = settings.roundup_power2_divisions or 1
        self.held: list[Segment] = []
        self.live: dict[int, tuple[Segment, Block] | None] = {}
        self.next_address = 20 * MiB
        self.retries = 0

    @property
    def reserved(self) -> int:
        return sum(
            block.size for segment in self.held for block in segment.blocks if block.state != "unmapped"
        )

    @property
    def allocated(self) -> int:
        return sum(block.size for segment in self.held for block in segment.blocks if block.state == "live")

    def segments(self) -> list[list[tuple[int, int, str]]]:
        segments = sorted(self.held, key=lambda segment: segment.blocks[0].address)
        return [
            [(block.address, block.size, block.state) for block in segment.blocks] for segment in segments
        ]

    def rounded(self, num_bytes: int) -> int:
        if self.divisions > 1 and num_bytes > 512 * self.divisions:
            power = 1
            while power * 2 <= num_bytes:
                power *= 2
            return up(num_bytes, power // self.divisions)
        return up(num_bytes, 512)

    def malloc(self, storage: int, num_bytes: int, stream: int = 0) -> None:
        if num_bytes == 0:
            self.live[storage] = None
            return
        size = self.rounded(num_bytes)
        small = size <= MiB
        segment, block = self.best_fit(size, small, stream) or self.grow(size, small, stream)
        rest = block.size - size
        if rest >= 512 if small or self.expandable else rest > MiB and size < self.max_split:
            index = segment.blocks.index(block)
            segment.blocks.insert(index + 1, Block(block.address + size, rest, "cached"))
            block.size = size
        block.state = "live"
        self.live[storage] = segment, block

    def free(self, storage: int) -> None:
        entry = self.live.pop(storage)
        if entry is not None:
            segment, block = entry
            block.state = "cached"
            segment.coalesce()

    def cached(self, small: bool, stream: int) -> list[tuple[Segment, Block]]:
        found = [
            (segment, block)
            for segment in self.held
            for block in segment.blocks
            if (segment.small, segment.stream, block.state) == (small, stream, "cached")
        ]
        return sorted(found, key=lambda pair: (pair[1].size, pair[1].address))

    def best_fit(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        fits = [pair for pair in self.cached(small, stream) if pair[1].size >= size]
        if not fits:
            return None
        best = fits[0]
        for other in fits[1:]:
            if other[0].grown(other[1]) >= best[0].grown(best[1]):
                break
            best = other
        found = best[1].size
        refused = found >= self.max_split if size < self.max_split else found >= size + 20 * MiB
        return None if refused else best

    def grow(self, size: int, small: bool, stream: int) -> tuple[Segment, Block]:
        pair = self.reserve(size, small, stream)
        if pair is None and self.release_oversize(size, small, stream):
            pair = self.reserve(size, small, stream)
        if pair is None:
            self.release_all()
            self.retries += 1
            pair = self.reserve(size, small, stream)
        if pair is None:
            raise OutOfMemory
        return pair

    def reserve(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        if self.expandable:
            return self.expand(size, small, stream)
        wanted = 2 * MiB if small else 20 * MiB if size < 10 * MiB else up(size, 2 * MiB)
        if self.reserved + wanted > self.limit:
            return None
        return self.new_segment(wanted, small, stream, "cached")

    def new_segment(self, size: int, small: bool, stream: int, state: str) -> tuple[Segment, Block]:
        block = Block(self.next_address, size, state)
        segment = Segment(small, stream, [block])
        self.held.append(segment)
        self.next_address = up(self.next_address + size, 20 * MiB)
        return segment, block

    def expand(self, size: int, small: bool, stream: int) -> tuple[Segment, Block] | None:
        for segment in self.held:
            if (segment.small, segment.stream) != (small, stream):
                continue
            start = room = 0
            for index, block in enumerate(segment.blocks):
                if block.state == "live":
                    start, room = index + 1, 0
                    continue
                room += block.size
                if room >= size and any(b.state == "unmapped" for b in segment.blocks[start : index + 1]):
                    return self.map_from(segment, start, size)
        page = 2 * MiB if small else 20 * MiB
        segment, _ = self.new_segment(up(ADDRESS_SPACE, page), small, stream, "unmapped")
        return self.map_from(segment, 0, size)

    def map_from(self, segment: Segment, start: int, size: int) -> tuple[Segment, Block] | None:
        address = segment.blocks[start].address
        while True:
            index = next(i for i, block in enumerate(segment.blocks) if block.address == address)
            block = segment.blocks[index]
            if block.state == "cached" and block.size >= size:
                return segment, block
            have = block.size if block.state == "cached" else 0
            target = segment.blocks[index + 1] if have else block
            mapped = min(up(min(size - have, target.size), segment.page), target.size)
            if self.reserved + mapped > self.limit:
                return None
            if mapped < target.size:
                rest = Block(target.address + mapped, target.size - mapped, "unmapped")
                segment.blocks.insert(segment.blocks.index(target) + 1, rest)
                target.size = mapped
            target.state = "cached"
            segment.coalesce()

    def release_oversize(self, size: int, small: bool, stream: int) -> bool:
        if self.max_split >= 1 << 60 or self.expandable:
            return False
        wanted = max(size, self.max_split)
        oversize = [pair for pair in self.cached(small, stream) if pair[1].size >= self.max_split]
        enough = [pair for pair in oversize if pair[1].size >= wanted]
        if enough:
            self.held.remove(enough[0][0])
            return True
        released = 0
        while oversize and released < wanted:
            segment, block = oversize.pop()
            self.held.remove(segment)
            released += block.size
        return released >= wanted

    def release_all(self) -> None:
        for segment in list(self.held):
            if not self.expandable:
                if [block.state for block in segment.blocks] == ["cached"]:
                    self.held.remove(segment)
                continue
            pieces: list[Block] = []
            for block in segment.blocks:
                start = up(block.address, segment.page)
                stop = (block.address + block.size) // segment.page * segment.page
                if block.state != "cached" or start >= stop:
                    pieces.append(block)
                    continue
                end = block.address + block.size
                cuts = [(block.address, start, "cached"), (start, stop, "unmapped"), (stop, end, "cached")]
                pieces += [Block(a, b - a, state) for a, b, state in cuts if b > a]
            given_back = pieces != segment.blocks
            segment.blocks = pieces
            segment.coalesce()
            if given_back and [block.state for block in segment.blocks] == ["unmapped"]:
                self.held.remove(segment)
