"""Where the storages of a tape come to lie: the tape through the simulated allocator, address by address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memplan.allocator import AllocatorOutOfMemory, CachingAllocator
from memplan.allocator.segments import Pool
from memplan.job.spec import AllocatorSettings
from memplan.tape.tape import Tape

BASE_ADDRESS = 0x7F00_0000_0000
"""Added to every address of the simulation: where drivers put device memory, and exact as a double."""


class Action(NamedTuple):
    """
    One entry of a trace: `alloc`, `free`, `oom`, or `segment_alloc`, `segment_free`, `segment_map`,
    `segment_unmap`.
    """

    kind: str
    event: int
    """Index into `Tape.events` of the event that it belongs to."""
    storage: int
    """0 for what happens to segments."""
    address: int
    """For `oom` the bytes that the driver had left."""
    num_bytes: int
    """Requested, for storages."""
    stream: int


@dataclass(frozen=True)
class Block:
    """A part of a segment; `storage` is 0 where it is cached."""

    address: int
    num_bytes: int
    storage: int


@dataclass(frozen=True)
class PlacedSegment:
    """Contiguous memory of the driver, and the blocks that fill it."""

    address: int
    num_bytes: int
    stream: int
    small: bool
    """Whether it serves the pool of small requests."""
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Placement:
    """Every action of a tape, and the segments that are there after the last."""

    actions: list[Action]
    segments: list[PlacedSegment]


def place(tape: Tape, settings: AllocatorSettings, *, limit_bytes: int | None = None) -> Placement:
    """
    Run a tape through an empty allocator of which the driver can give `limit_bytes` (None: without end).

    Storages of no bytes take nothing and do not appear. Where the tape does not complete under the limit, the last
    action is `oom`.
    """
    allocator = CachingAllocator(settings, limit_bytes=limit_bytes)
    sizes = allocator.all_block_bytes(tape.sizes)
    actions: list[Action] = []
    addresses: dict[int, int] = {}
    pools: dict[int, Pool] = {}
    event = 0

    def watch(kind: str, address: int, num_bytes: int, pool: Pool) -> None:
        pools[address] = pool
        actions.append(Action(kind, event, 0, BASE_ADDRESS + address, num_bytes, pool.stream))

    allocator.segment_watcher = watch
    for event, code in enumerate(tape.events):
        storage = abs(code)
        stream = tape.streams.get(storage, 0)
        try:
            allocator.run((code,), sizes, tape.streams)
        except AllocatorOutOfMemory as failure:
            left = failure.limit_bytes - failure.reserved_bytes
            actions.append(Action("oom", event, storage, left, tape.sizes[storage], stream))
            break
        if not sizes[storage]:
            continue
        if code > 0:
            addresses[storage] = BASE_ADDRESS + allocator.block_of(storage)[0]
            actions.append(Action("alloc", event, storage, addresses[storage], tape.sizes[storage], stream))
        else:
            address = addresses.pop(storage)
            actions.append(Action("free", event, storage, address, tape.sizes[storage], stream))
    return Placement(actions, _segments(allocator, addresses, pools))


def _segments(
    allocator: CachingAllocator, addresses: dict[int, int], pools: dict[int, Pool]
) -> list[PlacedSegment]:
    """As PyTorch reports them: each contiguous run of mapped blocks is a segment."""
    storages = {address: storage for storage, address in addresses.items()}
    segments = []
    for blocks in allocator.segments():
        pool = pools.get(blocks[0][0])
        if pool is None:  # addresses that the driver had no memory for
            continue
        run: list[Block] = []
        for address, num_bytes, state in [*blocks, (0, 0, "unmapped")]:
            if state != "unmapped":
                place = BASE_ADDRESS + address
                run.append(Block(place, num_bytes, storages[place] if state == "live" else 0))
            elif run:
                total = sum(block.num_bytes for block in run)
                segments.append(PlacedSegment(run[0].address, total, pool.stream, pool.small, tuple(run)))
                run = []
    return segments
